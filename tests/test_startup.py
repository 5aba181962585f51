"""What --help and a wrong flag load: nothing of what only building a model or drawing needs."""

from __future__ import annotations

import json
import subprocess
import sys

from tests.test_imports import ROOT

SLOW = """transformers torchvision torch._dynamo torch._inductor sympy scipy sklearn matplotlib
tensorboard timm peft faiss datasets eccv_caption nltk PIL huggingface_hub requests""".split()
PROGRAM = """
import json, sys
import torch
with_torch = set(sys.modules)
import train, eval
codes = [train.main(["--help"]), eval.main(["--help"]), train.main(["--batch_size", "x"])]
print(json.dumps({"codes": codes, "loaded": sorted(set(sys.modules) - with_torch)}))
"""


def test_help_and_wrong_flags_load_nothing_slow():
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], cwd=ROOT, capture_output=True, text=True, check=True
    )
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["codes"] == [0, 0, 2]
    assert "lib.model.backbones" in found["loaded"]
    assert set(SLOW) & set(found["loaded"]) == set()
