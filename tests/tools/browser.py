"""Debian's Chromium, headless, and programs that it looks at."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
DESKTOP, PHONE = (1280, 1000), (390, 844)


def require_browser() -> None:
    """Skip the test where Chromium, its driver or selenium is missing."""
    pytest.importorskip("selenium")
    if not (shutil.which("chromium") and shutil.which("chromedriver")):
        pytest.skip("no chromium and chromium-driver: make test-browser installs them")


@contextmanager
def browser(size: tuple[int, int] = DESKTOP) -> Iterator:
    """A headless Chromium with a window of that size; its network log is kept."""
    from selenium import webdriver
    from selenium.webdriver.chrome.options import Options
    from selenium.webdriver.chrome.service import Service

    options = Options()
    options.binary_location = shutil.which("chromium")
    for flag in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu"):
        options.add_argument(flag)
    options.add_argument("--no-proxy-server")
    options.set_capability("goog:loggingPrefs", {"performance": "ALL", "browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(shutil.which("chromedriver")))
    try:
        driver.set_window_size(*size)
        # headless windows are not narrower than 500 pixels: the page's own width is set
        metrics = {"width": size[0], "height": size[1], "deviceScaleFactor": 1, "mobile": False}
        driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        driver.set_page_load_timeout(120)
        yield driver
    finally:
        driver.quit()


def requested(driver) -> list[str]:
    """Return the addresses that the page has asked for since the last call."""
    messages = [json.loads(one["message"])["message"] for one in driver.get_log("performance")]
    sent = [one for one in messages if one["method"] == "Network.requestWillBeSent"]
    return [one["params"]["request"]["url"] for one in sent]


def overflow(driver) -> int:
    """Return by how many pixels the page is wider than its window."""
    return driver.execute_script(
        "return document.documentElement.scrollWidth - document.documentElement.clientWidth"
    )


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


@contextmanager
def served(*arguments: str) -> Iterator[str]:
    """Run python -m tools.serve on a free port; yield its address once it answers."""
    port = free_port()
    command = [sys.executable, "-m", "tools.serve", *arguments, "--port", str(port)]
    process = subprocess.Popen(command, cwd=ROOT)
    address = f"http://127.0.0.1:{port}"
    try:
        deadline = time.time() + 180
        while True:
            assert process.poll() is None, "tools.serve has ended"
            assert time.time() < deadline, "tools.serve does not answer"
            try:
                urllib.request.urlopen(address, timeout=20).read()
                break
            except OSError:
                time.sleep(0.5)
        yield address
    finally:
        process.terminate()
        process.wait(20)
