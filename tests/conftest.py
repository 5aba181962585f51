"""Data sets and small pretrained backbones that the end-to-end tests share."""

from __future__ import annotations

import os

os.environ.setdefault("GOMP_SPINCOUNT", "2000")  # read when torch loads, as in train.py

import json
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter
from transformers import BertConfig, BertModel, SwinConfig, SwinModel, ViTConfig, ViTModel

from lib.data.scenes.generate import generate_scenes
from vocab import WordTokenizer, learn_vocabulary

torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))
SENTENCES = (
    "a man with a red hat",
    "two dogs run on the grass",
    "a child plays in the snow near a house",
    "a woman is riding a bike",
    "people sit at a long table",
)


@pytest.fixture(scope="session")
def scenes_path(tmp_path_factory) -> Path:
    """A data_path with a small `scenes` in it: 32 training, 16 dev and 16 test images of 64 px."""
    root = tmp_path_factory.mktemp("data")
    generate_scenes(root / "scenes", sizes=(32, 16, 16), image_size=64)
    return root


@pytest.fixture
def quick_watch(monkeypatch) -> None:
    """A loader notices the end of a worker in a fraction of torch's 5 seconds."""
    monkeypatch.setattr(torch.utils.data._utils, "MP_STATUS_CHECK_INTERVAL", 0.2)
    monkeypatch.setattr(_MultiProcessingDataLoaderIter._try_get_data, "__defaults__", (0.2,))


def write_layout(root: Path, dataset: str, images: int = 8, dev: bool = True) -> None:
    """Write a small f30k or coco in the layout of the SEPS README, pictures included."""
    folder = root / dataset
    folder.mkdir(parents=True)
    picture_root = root / ("flickr30k-images" if dataset == "f30k" else "coco-images")
    test = "test" if dataset == "f30k" else "testall"
    mapping, generator = {}, np.random.default_rng(0)
    splits = ["train", test] + (["dev"] if dev else [])
    for number, split in enumerate(splits):
        ids = [str(100 * number + row) for row in range(images)]
        for one in ids:
            name = f"{one}.jpg" if dataset == "f30k" else f"val2014/COCO_{one}.jpg"
            mapping[one] = name
            path = picture_root / name
            path.parent.mkdir(parents=True, exist_ok=True)
            pixels = generator.integers(0, 256, (40, 56, 3), dtype=np.uint8)
            cv2.imwrite(str(path), pixels)
        captions = [
            f"{SENTENCES[(k + row) % 5]} number {row}" for row in range(images) for k in range(5)
        ]
        lines = ids if split == "train" else [one for one in ids for _ in range(5)]
        (folder / f"{split}_caps.txt").write_text("\n".join(captions) + "\n")
        (folder / f"{split}_ids.txt").write_text("\n".join(lines) + "\n")
        dense = [
            json.dumps({"text": f"the picture shows {SENTENCES[row % 5]} in detail"})
            for row in range(images)
        ]
        if split != "dev":
            (folder / f"{dataset}_{split}.jsonl").write_text("\n".join(dense) + "\n")
    (folder / "id_mapping.json").write_text(json.dumps(mapping))


@pytest.fixture(scope="session")
def layouts(tmp_path_factory) -> Path:
    """A data_path with small f30k and coco folders, as the LAPS and SEPS READMEs lay them out."""
    root = tmp_path_factory.mktemp("layouts")
    write_layout(root, "f30k")
    write_layout(root, "coco", images=10)
    return root


@pytest.fixture(scope="session")
def backbones(tmp_path_factory) -> dict[str, str]:
    """Folders of small saved backbones: vit (224 px), swin (224 px), bert with its vocabulary."""
    root = tmp_path_factory.mktemp("backbones")
    small = {
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 32,
    }
    torch.manual_seed(0)
    ViTModel(ViTConfig(image_size=224, patch_size=32, **small)).save_pretrained(root / "vit")
    SwinModel(
        SwinConfig(
            image_size=224,
            patch_size=4,
            embed_dim=8,
            depths=[1, 1, 1, 1],
            num_heads=[1, 1, 1, 1],
            window_size=7,
        )
    ).save_pretrained(root / "swin")
    words = learn_vocabulary([*SENTENCES, "the picture shows number 0 1 2 3 4 5 6 7 8 9 detail"])
    BertModel(
        BertConfig(vocab_size=len(words), max_position_embeddings=128, **small)
    ).save_pretrained(root / "bert")
    WordTokenizer(words).save(root / "bert")
    return {name: str(root / name) for name in ("vit", "swin", "bert")}
