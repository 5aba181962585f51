"""Every row of README's table of what one has, walked on small made inputs to a trained model."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest

pytest.importorskip("datasets")
pytest.importorskip("imagehash")
pytest.importorskip("openai")
pytest.importorskip("webdataset")

import eval as evaluation
import train
from tests.data.describe.server import ChatServer, said
from tests.data.prepare.pictures import (
    caption_csv,
    captions_of,
    karpathy_json,
    picture_folder,
    write_shard,
)
from tools import check_data, describe, prepare

ROOT = Path(__file__).resolve().parent.parent
TINY = "--vit_type tiny --bert_path tiny --img_res 32 --embed_size 32 --tiny_patch_size 8".split()
QUICK = "--num_epochs 1 --workers 0 --batch_size 4 --val_step 1000 --log_step 1".split()
PROGRAMS = {"tools.prepare": prepare, "tools.describe": describe, "train.py": train}


def rows() -> dict[str, list[str]]:
    """What one has -> the commands of README's table."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    table = text[text.index("| you have | you run |") :].split("\n\n")[0]
    found = {}
    for line in table.splitlines()[2:]:
        have, run = line.strip("|").split(" | ", 1)
        found[have.strip()] = re.findall(r"`([^`]*)`", run)
    return found


def flickr8k() -> None:
    names = picture_folder(Path("Flicker8k_Dataset"), 12)
    lines = [f"{name}#{k}\t{text}" for name in names for k, text in enumerate(captions_of(name))]
    Path("Flickr8k.token.txt").write_text("\n".join(lines) + "\n")
    for split, mine in {"train": names[:8], "dev": names[8:10], "test": names[10:]}.items():
        Path(f"Flickr_8k.{split}Images.txt").write_text("\n".join(mine) + "\n")


def hub() -> None:
    names = picture_folder(Path("someone/photos/train"), 20)
    lines = [json.dumps({"file_name": name, "text": f"about {name}"}) for name in names]
    Path("someone/photos/train/metadata.jsonl").write_text("\n".join(lines))


def shards() -> None:
    for number in range(2):
        write_shard(Path(f"shards-00{number}.tar"), list(range(20 * number, 20 * number + 20)))


MAKE = {
    "Flickr30K": lambda: (
        karpathy_json(Path("dataset_flickr30k.json"), "flickr30k"),
        picture_folder(Path("data/flickr30k-images"), 10),
    ),
    "COCO": lambda: (
        karpathy_json(Path("dataset_coco.json"), "coco"),
        picture_folder(Path("data/coco-images/val2014"), 10),
    ),
    "Flickr8k": flickr8k,
    "pictures and a CSV": lambda: caption_csv(
        Path("captions.csv"), picture_folder(Path("pictures"), 20)
    ),
    "a Hugging Face data set": hub,
    "WebDataset shards": shards,
    "only photos": lambda: picture_folder(Path("photos"), 20),
}


def test_every_row_is_walked():
    assert list(rows()) == list(MAKE)
    assert all(rows().values())


def run(command: str, *extra: str) -> int:
    words = shlex.split(command)
    words = words[words.index("python") + 1 :]
    words = words[1:] if words[0] == "-m" else words
    return PROGRAMS[words[0]].main([*words[1:], *extra])


def prepare_row(have: str, url: str) -> tuple[str, list[str]]:
    """Run a row's commands up to the data set; return its name, and commands that train on it."""
    name, later = "", []
    for command in rows()[have]:
        if "train.py" in command:
            later.append(command)
        elif "describe" in command:
            assert run(command, "--base_url", url) == 0
        else:
            small = ["--check_counts", "0"] if "karpathy" in command else []
            assert run(command, *small) == 0
            given = re.search(r"--dataset (\w+)", command)
            name = given[1] if given else {"Flickr30K": "f30k", "COCO": "coco"}[have]
    return name, later


@pytest.mark.slow
@pytest.mark.parametrize("have", MAKE)
def test_a_row_leads_to_results(have, tmp_path, monkeypatch, capsys):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    MAKE[have]()
    with ChatServer(lambda number, request: said(f"a long text, number {number}")) as server:
        name, later = prepare_row(have, server.url)
        where = ["--dataset", name]
        assert check_data.main([*where, *TINY]) == 1
        assert f"tools.describe --dataset {name} --split train" in capsys.readouterr().out
        assert describe.main([*where, "--base_url", server.url]) == 0
    assert check_data.main([*where, *TINY]) == 0
    folder = f"runs/{name}_seps"
    assert train.main([*where, *TINY, *QUICK, "--logger_name", folder]) == 0
    assert evaluation.main(where) == 0
    ((table, results),) = json.loads(Path(folder, "results.json").read_text()).items()
    assert table == f"{name}_{results['images']}"
    for command in later:
        assert run(command, *TINY, *QUICK, "--logger_name", "runs/again") == 0
