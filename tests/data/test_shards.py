"""Training out of shards: each image once, the same however the work is split, resumed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("webdataset")

import eval as evaluation
import train
from lib.data.images import decode
from lib.data.shard_loader import ShardLoader, plan_share
from lib.data.shards import SampleNames, ShardStream, Share, open_shards
from lib.data.sources import ImageFolderSource
from lib.data.tars import shard_sizes
from lib.errors import InputError
from tests.data.prepare.pictures import jpeg, write_shard
from vocab import WordTokenizer, learn_vocabulary

ROOT = Path(__file__).resolve().parents[2]
SIZES = (13, 9, 11, 7)


def entries(key: int) -> dict[str, bytes]:
    told = {"captions": [f"caption {k} of sample {key}" for k in range(3)], "dense": f"dense {key}"}
    return {"jpg": jpeg(key), "json": json.dumps(told).encode()}


@pytest.fixture(scope="module")
def pattern(tmp_path_factory) -> str:
    """Four shards of 40 samples, numbered through: row r holds picture r."""
    root, first = tmp_path_factory.mktemp("shards"), 0
    for number, size in enumerate(SIZES):
        write_shard(root / f"s-{number}.tar", list(range(first, first + size)), entries)
        first += size
    return str(root / "s-{0..3}.tar")


@pytest.fixture(scope="module")
def tokenizer() -> WordTokenizer:
    return WordTokenizer(learn_vocabulary(["caption of sample dense 0 1 2 3 4 5 6 7 8 9"]))


def loader(pattern, tokenizer, share, workers=0, res=None, seed=0, **how) -> ShardLoader:
    shards = open_shards(pattern, needs_dense=bool(how.get("max_dense_word")))
    source = None if res is None else ImageFolderSource([], res, augment=how.pop("augment", True))
    stream = ShardStream(shards, tokenizer, source, share, 40, seed=seed, **how)
    return ShardLoader(stream, workers)


def rows(batches) -> list[list[int]]:
    return [batch.image_ids.tolist() for batch, bad in batches]


def test_each_image_once_an_epoch_with_one_of_its_captions(pattern, tokenizer):
    share, _ = plan_share(40, 4, 5, 0)
    batches = loader(pattern, tokenizer, share, augment_words=False)
    assert len(batches) == 8
    first, again, second = (rows(batches.batches(epoch)) for epoch in (0, 0, 1))
    assert sorted(chain(*first)) == list(range(40))
    assert first == again
    assert first != second
    drawn = Counter()
    for epoch in range(3):
        for batch, _ in batches.batches(epoch):
            for row, ids in zip(batch.image_ids.tolist(), batch.ids.tolist(), strict=True):
                words = [tokenizer.tokens[one] for one in ids]
                assert str(row) == "".join(
                    w.strip("#")
                    for w in words[words.index("sample") + 1 : -1]
                    if w not in ("[SEP]", "[PAD]")
                )
                drawn[words[2]] += 1
    assert set(drawn) == {"0", "1", "2"}


def test_samples_of_a_shard_are_shuffled(pattern, tokenizer):
    batches = loader(pattern, tokenizer, plan_share(40, 4, 5, 0)[0]).batches(0)
    order = list(chain(*rows(batches)))
    ends = np.cumsum(SIZES)
    shard = [int(np.searchsorted(ends, row, side="right")) for row in order]
    assert [one for one, before in zip(shard, [None, *shard], strict=False) if one != before] != [
        0,
        1,
        2,
        3,
    ] or order != sorted(order)
    assert all(order[i : i + 7] != sorted(order[i : i + 7]) for i in (0, 10, 20))


@pytest.mark.parametrize(("world", "workers"), [(1, 1), (1, 2), (2, 1), (2, 2)])
def test_ranks_and_workers_share_the_shards(pattern, tokenizer, world, workers):
    """Nothing twice and nothing forgotten, but for a worker whose shards are too few."""
    seen, steps = Counter(), set()
    for rank in range(world):
        share = Share(2, 40 // (2 * world), rank, world, workers)
        batches = rows(loader(pattern, tokenizer, share, workers if workers > 1 else 0).batches(3))
        steps.add(len(batches))
        assert all(len(one) == 2 for one in batches)
        seen.update(row for one in batches for row in one)
    assert steps == {40 // (2 * world)}
    if (world, workers) == (1, 1):
        assert set(seen.values()) == {1}
    assert sum(seen.values()) == 40
    assert max(seen.values()) <= 2
    assert len(seen) >= 26


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("start", [1, 4, 8])
def test_a_resumed_epoch_goes_on_as_if_it_had_not_stopped(pattern, tokenizer, workers, start):
    if (os.cpu_count() or 1) < workers:
        pytest.skip("a loader takes no more workers than there are cores")
    share = Share(3, 13, 0, 1, workers)
    whole = loader(pattern, tokenizer, share, workers, res=16)
    rest = loader(pattern, tokenizer, share, workers, res=16)
    expected = list(whole.batches(2))[start:]
    found = list(rest.batches(2, start))
    assert len(found) == 13 - start
    for (one, _), (other, _) in zip(expected, found, strict=True):
        assert one.image_ids.tolist() == other.image_ids.tolist()
        assert torch.equal(one.pixels, other.pixels)
        assert torch.equal(one.ids, other.ids)


def test_shards_that_are_through_are_not_opened_again(pattern, tokenizer, monkeypatch):
    from lib.data import shards

    opened = []
    true_read = shards.read_samples
    monkeypatch.setattr(shards, "read_samples", lambda path: opened.append(path) or true_read(path))
    share, _ = plan_share(40, 4, 5, 0)
    batches = loader(pattern, tokenizer, share)
    opened.clear()
    list(batches.batches(0))
    every = list(opened)
    opened.clear()
    list(batches.batches(0, 6))  # 30 of 40 samples are used
    assert len(every) == 4
    assert opened == every[-len(opened) :]
    assert len(opened) <= 2


def test_pixels_are_those_of_the_file(pattern, tokenizer, tmp_path):
    (tmp_path / "a.jpg").write_bytes(jpeg(5))
    share, _ = plan_share(40, 4, 40, 0)
    ((batch, bad),) = loader(pattern, tokenizer, share, res=24, augment=False).batches(0)
    expected = ImageFolderSource([str(tmp_path / "a.jpg")], 24, augment=False).read(0)
    assert bad == []
    assert torch.equal(batch.pixels[batch.image_ids.tolist().index(5)], expected)
    assert decode(str(tmp_path / "a.jpg")) is not None


def test_dense_texts_come_with_the_samples_or_from_the_file_of_describe(tmp_path, tokenizer):
    def bare(key):
        return {"jpg": jpeg(key), "txt": f"caption {key}".encode()}

    write_shard(tmp_path / "s-0.tar", [1, 2], bare)
    path = tmp_path / "web_train.jsonl"
    with pytest.raises(InputError, match=r"dense texts, .*web_train.jsonl; describe them"):
        open_shards(str(tmp_path / "s-0.tar"), None, True, path, "describe them")
    lines = [{"image_id": f"s-0/0000{n}", "text": f"dense {n}"} for n in (2, 1)]
    path.write_text("\n".join(map(json.dumps, lines)) + "\n")
    shards = open_shards(str(tmp_path / "s-0.tar"), None, True, path)
    assert shards.dense == ["dense 1", "dense 2"]
    stream = ShardStream(shards, tokenizer, None, Share(2, 1), 40, max_dense_word=40)
    ((batch, _),) = ShardLoader(stream, 0).batches(0)
    assert batch.dense_lengths.tolist() == [4, 4]


def test_faulty_samples_are_told_and_left_out(tmp_path, tokenizer):
    def some(key):
        faults = {
            1: {"jpg": b"\xff\xd8 no", "txt": b"a"},
            2: {"txt": b"no image"},
            3: {"jpg": jpeg(3)},
        }
        return faults.get(key, {"jpg": jpeg(key), "txt": b"caption"})

    write_shard(tmp_path / "s-0.tar", list(range(8)), some)
    share, _ = plan_share(8, 1, 8, 0)
    ((batch, bad),) = loader(str(tmp_path / "s-0.tar"), tokenizer, share, res=16).batches(0)
    assert sorted(batch.image_ids.tolist()) == [0, 4, 5, 6, 7]
    told = sorted(bad)
    assert told[0].endswith("s-0.tar: sample 00002 has no image, only txt")
    assert told[1:] == ["s-0/00001", "s-0/00003 (no caption)"]


@pytest.mark.parametrize("workers", [0, 1])
def test_a_damaged_shard_ends_it_with_its_name(tmp_path, tokenizer, workers):
    path = write_shard(tmp_path / "s-0.tar", list(range(8)))
    share, _ = plan_share(8, 1, 4, workers)
    batches = loader(str(path), tokenizer, share, workers)
    path.write_bytes(path.read_bytes()[:6000])
    with pytest.raises(InputError, match=r"s-0.tar.*(damaged|holds)") as caught:
        list(batches.batches(0))
    assert "\n" not in str(caught.value)


def test_sizes_are_counted_or_listed(pattern, tmp_path):
    paths = [pattern.replace("{0..3}", str(n)) for n in range(4)]
    assert shard_sizes(paths).tolist() == list(SIZES)
    listed = tmp_path / "sizes.json"
    listed.write_text(json.dumps({f"s-{n}.tar": 100 + n for n in range(4)}))
    assert shard_sizes(paths, listed).tolist() == [100, 101, 102, 103]
    urls = [f"https://nowhere/s-{n}.tar" for n in range(4)]
    assert shard_sizes(urls, listed).tolist() == [100, 101, 102, 103]
    with pytest.raises(InputError, match="--shard_sizes"):
        shard_sizes(urls)
    listed.write_text("[1]")
    with pytest.raises(InputError, match=r"sizes\.json can't be read"):
        shard_sizes(paths, listed)


def test_a_wrong_list_of_sizes_is_noticed(pattern, tokenizer, tmp_path):
    listed = tmp_path / "sizes.json"
    listed.write_text(json.dumps({f"s-{n}.tar": 20 for n in range(4)}))
    shards = open_shards(pattern, listed)
    stream = ShardStream(shards, tokenizer, None, Share(8, 10), 40)
    with pytest.raises(InputError, match=r"s-\d.tar holds \d+ samples, not 20"):
        list(ShardLoader(stream, 0).batches(0))


def test_names_and_shares():
    names = SampleNames(["a/x.tar", "a/y.tar"], np.array([2, 3]))
    assert [names[row] for row in (0, 1, 2, 4)] == [
        "x sample 0",
        "x sample 1",
        "y sample 0",
        "y sample 2",
    ]
    assert len(names) == 5
    share, workers = plan_share(100, 3, 4, 8, 1, 2)
    assert (share.steps, share.workers, workers) == (12, 1, 1)
    assert replace(share, workers=1) == share
    with pytest.raises(InputError, match="3 shards for 4 processes"):
        plan_share(100, 3, 4, 8, 0, 4)
    with pytest.raises(InputError, match="--batch_size 64"):
        plan_share(100, 3, 64, 8, 0, 2)


def run_flags(pattern, layouts, folder, *extra) -> list[str]:
    tiny = "--vit_type tiny --bert_path tiny --img_res 32 --embed_size 32 --tiny_patch_size 8"
    quick = "--batch_size 8 --workers 1 --val_step 100 --save_step 4 --log_step 1"
    base = ["--dataset", "f30k", "--data_path", str(layouts), "--val_split", "test"]
    base += ["--shards", pattern, *tiny.split(), *quick.split(), "--logger_name", str(folder)]
    return [*base, *extra]


def weights(folder) -> dict:
    return torch.load(folder / "checkpoint_last.pth", weights_only=True)["model"]


def same_weights(one, other) -> bool:
    return all(torch.equal(value, weights(other)[name]) for name, value in weights(one).items())


def test_training_on_shards_and_evaluation_on_the_folder(pattern, layouts, tmp_path, capsys):
    folder = tmp_path / "run"
    assert train.main(run_flags(pattern, layouts, folder, "--num_epochs", "1")) == 0
    assert "40 images in 4 shards" in (folder / "train.log").read_text()
    checkpoint = str(folder / "model_best.pth")
    assert evaluation.main(["--checkpoint", checkpoint, "--data_path", str(layouts)]) == 0
    assert "f30k_8" in json.loads((folder / "results.json").read_text())
    other = pattern.replace("{0..3}", "{0..2}")
    assert train.main(["--resume", str(folder), "--num_epochs", "3", "--shards", other]) == 2
    assert "33 images (was 40)" in capsys.readouterr().err


@pytest.mark.slow
def test_training_on_shards_goes_on_after_an_epoch(pattern, layouts, tmp_path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert train.main(run_flags(pattern, layouts, whole, "--num_epochs", "2")) == 0
    assert train.main(run_flags(pattern, layouts, cut, "--num_epochs", "1")) == 0
    assert not same_weights(whole, cut)
    assert train.main(["--resume", str(cut), "--num_epochs", "2"]) == 0
    assert same_weights(whole, cut)


@pytest.mark.slow
def test_kill_9_in_an_epoch_over_shards_changes_nothing(pattern, layouts, tmp_path):
    flags = run_flags(pattern, layouts, tmp_path / "whole", "--num_epochs", "6")
    assert train.main(flags) == 0
    killed = tmp_path / "killed"
    flags = run_flags(pattern, layouts, killed, "--num_epochs", "6")
    process = subprocess.Popen([sys.executable, "train.py", *flags], cwd=ROOT)
    deadline = time.monotonic() + 200
    while time.monotonic() < deadline and process.poll() is None:
        log = killed / "train.log"
        if (killed / "checkpoint_last.pth").exists() and "epoch" in log.read_text():
            break
        time.sleep(0.01)
    process.kill()
    process.wait()
    assert train.main(["--resume", str(killed)]) == 0
    assert same_weights(tmp_path / "whole", killed)


def test_flags_that_exclude_shards(pattern, layouts, tmp_path, capsys):
    base = [
        "--data_path",
        str(layouts),
        "--logger_name",
        str(tmp_path / "run"),
        "--shards",
        pattern,
    ]
    assert train.main([*base, "--image_cache", str(tmp_path)]) == 2
    assert "--shards and --image_cache exclude each other" in capsys.readouterr().err
    assert train.main([*base, "--shards", "nowhere-{0..1}.tar"]) == 2
    assert "2 of 2 shards" in capsys.readouterr().err
    assert Path(tmp_path / "run").exists()
