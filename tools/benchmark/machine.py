"""The machine, its driver, and the versions of what is measured on it."""

from __future__ import annotations

import platform
import re
import subprocess
from datetime import date
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from lib.retrieval.comparison import machine_name

PACKAGES = ("torch", "transformers", "triton", "numpy", "torchvision")
DRIVER = Path("/proc/driver/nvidia/version")


def circumstances(device: torch.device) -> dict[str, Any]:
    """Return machine, date and versions, and of a GPU its name, memory and driver."""
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    return {
        "machine": machine_name(gpu),
        "threads": torch.get_num_threads(),
        "date": date.today().isoformat(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "versions": {name: version for name in PACKAGES if (version := version_of(name))},
        **(of_gpu(device) if gpu else {}),
    }


def version_of(package: str) -> str | None:
    """Return the version that is installed, None where there is none; nothing is imported."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def of_gpu(device: torch.device) -> dict[str, Any]:
    """Return what is to be known of a CUDA device."""
    facts = torch.cuda.get_device_properties(device)
    return {
        "gpu": facts.name,
        "gpu_gib": facts.total_memory / 2**30,
        "capability": f"{facts.major}.{facts.minor}",
        "driver": driver_version(),
        "cuda": torch.version.cuda,
        "tf32": torch.backends.cuda.matmul.allow_tf32,
    }


def driver_version() -> str | None:
    """Return the version of NVIDIA's driver, from the kernel or from nvidia-smi; None without."""
    if DRIVER.exists():
        found = re.search(r"Kernel Module.*?\s(\d+\.[\d.]+)", DRIVER.read_text())
        if found:
            return found[1]
    ask = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        told = subprocess.run(ask, capture_output=True, text=True, timeout=20).stdout
    except (OSError, subprocess.TimeoutExpired):
        return None
    return told.splitlines()[0].strip() if told.strip() else None
