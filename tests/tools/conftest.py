"""Checkpoints of untrained small models, and folders of pictures, for the tests of the tools."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from lib.checkpoints.checkpoint import model_payload, save_payload
from tests.helpers import tiny_args
from vocab import learn_vocabulary


@pytest.fixture(scope="session")
def make_checkpoint(tmp_path_factory, scenes_path):
    """A function that writes the checkpoint of an untrained model and returns its path."""
    import torch

    from lib.methods.registry import build_model

    captions = (scenes_path / "scenes" / "train_caps.txt").read_text().splitlines()
    words = learn_vocabulary(captions)

    def make(method: str = "seps", seed: int = 0, **flags) -> Path:
        values = {"dataset": "scenes", "data_path": str(scenes_path), **flags}
        values["scenes_size"] = [32, 16, 16]
        args = tiny_args(method, **values)
        torch.manual_seed(seed)
        model = build_model(args, len(words))
        path = tmp_path_factory.mktemp("checkpoint") / "model_best.pth"
        save_payload(path, model_payload(model, args, words))
        return path

    return make


@pytest.fixture(scope="session")
def seps_checkpoint(make_checkpoint) -> Path:
    """SEPS without dense texts."""
    return make_checkpoint("seps", dense_side="none")


@pytest.fixture
def photos(tmp_path, scenes_path) -> Path:
    """A folder of its own with twelve pictures, some in a folder inside."""
    folder = tmp_path / "photos"
    (folder / "inside").mkdir(parents=True)
    for row, path in enumerate(sorted((scenes_path / "scenes" / "images").glob("*.jpg"))[:12]):
        shutil.copy(path, folder / ("inside" if row % 3 == 0 else "") / path.name)
    return folder
