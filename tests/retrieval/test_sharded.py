"""An evaluation in files equals the ordinary one to the last tie, for every method."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch

import eval as evaluation
import sharding
import train
from lib import distributed
from lib.batch import Batch, Tokens
from lib.errors import InputError, NonFiniteError
from lib.methods.registry import method_names
from lib.model.selection import control_selection
from lib.retrieval import sharded, similarity
from lib.retrieval.evaluation import SplitLoaders, score_split
from lib.retrieval.metrics import query_ranks
from lib.retrieval.result_files import read_ranks
from lib.retrieval.shard_files import (
    NESTED,
    PLAIN,
    arrays_tokens,
    open_manifest,
    read_arrays,
    token_arrays,
    write_arrays,
)
from lib.retrieval.sharded import COUNTS, OWN, TEXTS, ShardedEvaluation
from tests.helpers import pair_inputs, random_tokens, tiny_model
from tests.test_train import ROOT, flags

CPU = torch.device("cpu")
IMAGES, CAPTIONS, BATCH = 7, 12, 2
OWNERS = np.array([3, 0, 0, 1, 6, 2, 4, 5, 6, 1, 0, 3])  # in no order


class Side:
    """One side of a split in batches of `BATCH`; counts how often an item is read."""

    def __init__(self, make, indices, read=None):
        self.make, self.indices = make, list(indices)
        self.read = [] if read is None else read

    def __iter__(self):
        for first in range(0, len(self.indices), BATCH):
            self.read += self.indices[first : first + BATCH]
            yield self.make(self.indices[first : first + BATCH])

    def only(self, indices):
        return Side(self.make, indices, self.read)


def loaders(model, method: str) -> SplitLoaders:
    inputs = pair_inputs(CAPTIONS, method=method)
    for values in inputs.values():  # one picture twice, its dense text too: exact ties
        if values is not inputs["image_ids"]:
            values[5] = values[2]
    dense = ("dense_ids", "dense_lengths")
    owned = {
        side: {name: inputs[name] for name in dense if model.dense_owner == side}
        for side in ("image", "caption")
    }

    def images(rows):
        extra = {name: value[rows] for name, value in owned["image"].items()}
        return Batch(pixels=inputs["pixels"][rows], **extra)

    def captions(rows):
        longest = int(inputs["lengths"][rows].max())
        extra = {name: value[OWNERS[rows]] for name, value in owned["caption"].items()}
        ids = inputs["ids"][rows][:, :longest]
        return Batch(ids=ids, lengths=inputs["lengths"][rows], **extra)

    sides = Side(images, range(IMAGES)), Side(captions, range(CAPTIONS))
    return SplitLoaders(*sides, OWNERS, IMAGES)


def part(folder, model, split, names=None) -> ShardedEvaluation:
    how = model, split, CPU, nullcontext, names or {"all": 1}
    return ShardedEvaluation(folder, *how, batch_size=BATCH, block=3)


@pytest.fixture
def few_texts(monkeypatch):
    """Groups of four captions, in both ways of evaluating."""
    monkeypatch.setattr(similarity, "TEXTS_AT_ONCE", 4)
    monkeypatch.setattr(sharded, "TEXTS_AT_ONCE", 4)


@pytest.mark.parametrize(
    ("method", "options"),
    [*((name, {}) for name in method_names()), ("seps", {"dense_match": "sentence"})],
)
def test_the_ranks_are_those_of_the_whole_matrix(method, options, tmp_path, few_texts):
    model = tiny_model(method, **options).eval()
    split = loaders(model, method)
    matrix = score_split(model, split, CPU, nullcontext, False).matrix
    found = part(tmp_path, model, split).finished()
    whole = query_ranks(matrix, caption_images=OWNERS)
    np.testing.assert_array_equal(found.ranks["all"].i2t, whole.i2t)
    np.testing.assert_array_equal(found.ranks["all"].t2i, whole.t2i)
    assert found.ranks["all"].ties == whole.ties > 0
    right = np.empty(CAPTIONS, np.float32)
    work = part(tmp_path, model, split)
    for piece in work._pieces(OWN).values():
        mine = work._captions_of(piece.start, piece.stop)
        right[mine] = read_arrays(work._path(OWN, piece))[0]["right"]
    np.testing.assert_array_equal(right, matrix[OWNERS, np.arange(CAPTIONS)])  # to the bit
    carried = {"image": (True, False), "caption": (False, True), None: (False, False)}
    assert found.carried == carried[model.dense_owner]


@pytest.mark.parametrize("method", ["laps", "seps", "seps_released"])
def test_random_patches_are_those_of_the_whole_matrix(method, tmp_path, few_texts):
    """What is drawn is an image's own, whoever takes which file and whatever comes beside it."""
    model = tiny_model(method).eval()
    split = loaders(model, method)
    learned = score_split(model, split, CPU, nullcontext, False).matrix
    assert control_selection(model, "random", seed=3)
    matrix = score_split(model, split, CPU, nullcontext, False).matrix
    assert not np.array_equal(matrix, learned)
    found = part(tmp_path, model, split).finished()
    whole = query_ranks(matrix, caption_images=OWNERS)
    np.testing.assert_array_equal(found.ranks["all"].i2t, whole.i2t)
    np.testing.assert_array_equal(found.ranks["all"].t2i, whole.t2i)


@pytest.mark.parametrize("method", ["laps", "seps"])
def test_the_ranks_at_a_size_that_people_use(method, tmp_path, few_texts):
    """196 patches, 512 channels: there the compiled code scores."""
    model = tiny_model(method, img_res=112, embed_size=512).eval()
    split = loaders(model, method)
    pixels = torch.randint(0, 256, (IMAGES, 3, 112, 112), dtype=torch.uint8)
    pixels[5] = pixels[2]
    small = split.images.make
    split.images.make = lambda rows: replace(small(rows), pixels=pixels[rows])
    matrix = score_split(model, split, CPU, nullcontext, False).matrix
    found = part(tmp_path, model, split).finished().ranks["all"]
    whole = query_ranks(matrix, caption_images=OWNERS)
    assert (found.i2t.tolist(), found.t2i.tolist()) == (whole.i2t.tolist(), whole.t2i.tolist())
    assert found.ties == whole.ties > 0


def test_an_evaluation_goes_on_where_it_stopped(tmp_path, few_texts, monkeypatch):
    model = tiny_model("laps").eval()
    split = loaders(model, "laps")
    whole = part(tmp_path / "whole", model, split).finished()
    stopped = part(tmp_path / "stopped", model, split)
    score = sharded.ShardedEvaluation._scores

    def killed(self, images, texts, row):
        if self._own is not None and row >= 4:  # in the second block of counts
            raise KeyboardInterrupt
        return score(self, images, texts, row)

    with monkeypatch.context() as patch:
        patch.setattr(sharded.ShardedEvaluation, "_scores", killed)
        with pytest.raises(KeyboardInterrupt):
            stopped.finished()
    kinds = (TEXTS, OWN, COUNTS)
    done = {kind: len(list((tmp_path / "stopped" / kind).iterdir())) for kind in kinds}
    assert done == {TEXTS: 3, OWN: 2, COUNTS: 1}
    again = loaders(model, "laps")
    found = part(tmp_path / "stopped", model, again).finished()
    assert again.captions.read == []  # encoded before
    assert again.images.read == [4, 5, 6]
    np.testing.assert_array_equal(found.ranks["all"].t2i, whole.ranks["all"].t2i)


@pytest.mark.parametrize("kind", [TEXTS, OWN, COUNTS])
def test_a_damaged_file_is_made_anew(tmp_path, few_texts, kind):
    model = tiny_model("laps").eval()
    split = loaders(model, "laps")
    whole = part(tmp_path, model, split).finished()
    path = sorted((tmp_path / kind).iterdir())[0]
    content = bytearray(path.read_bytes())
    name = {TEXTS: b"local.npy", OWN: b"right.npy", COUNTS: b"all.t2i.npy"}[kind]
    content[content.index(b"\n", content.index(name)) + 3] ^= 1  # one bit of a number
    path.write_bytes(content)
    if kind != COUNTS:  # what comes of it is made anew, too
        for block in (tmp_path / COUNTS).iterdir():
            block.unlink()
    found = part(tmp_path, model, split).finished()
    for way in ("i2t", "t2i"):
        ours, theirs = (getattr(one.ranks["all"], way) for one in (found, whole))
        np.testing.assert_array_equal(ours, theirs)
    assert path.read_bytes() != bytes(content)


@pytest.mark.parametrize("kind", [TEXTS, OWN])
def test_a_file_that_was_cut_off_when_all_was_done_is_made_anew(tmp_path, few_texts, kind):
    model = tiny_model("vse").eval()
    split = loaders(model, "vse")
    whole = part(tmp_path, model, split).finished()
    path = sorted((tmp_path / kind).iterdir())[0]
    path.write_bytes(path.read_bytes()[:-9])
    found = part(tmp_path, model, split).finished()
    np.testing.assert_array_equal(found.ranks["all"].t2i, whole.ranks["all"].t2i)
    assert read_arrays(path) is not None


def test_scores_that_are_not_finite_leave_no_file(tmp_path, few_texts):
    model = tiny_model("vse").eval()
    with torch.no_grad():
        for parameter in model.text_encoder.parameters():
            parameter.fill_(float("nan"))
    with pytest.raises(NonFiniteError, match="similarities of images 0 to 1 are not finite"):
        part(tmp_path, model, loaders(model, "vse")).finished()
    assert list((tmp_path / OWN).iterdir()) == []


def test_a_file_that_only_this_process_cannot_read_stays(tmp_path, monkeypatch):
    path = tmp_path / "a.npz"
    write_arrays(path, {"right": np.zeros(1)}, {})

    def too_many(*_, **__):
        raise OSError(errno.EMFILE, "Too many open files")

    with monkeypatch.context() as patch:
        patch.setattr(np, "load", too_many)
        with pytest.raises(OSError, match="Too many"):
            read_arrays(path)
    assert read_arrays(path) is not None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_tokens_come_back_to_the_bit(tmp_path, dtype):
    def cast(tokens: Tokens) -> Tokens:
        return tokens._map(lambda t: t.detach() if t.dtype == torch.bool else t.detach().to(dtype))

    tokens = cast(random_tokens(5, 6, 4, 0, ragged=True, cls=True))
    tokens.dense = cast(random_tokens(5, 3, 4, 1, ragged=True))
    tokens.sentence, tokens.dense.fragments = torch.rand(5, 3).to(dtype), tokens.dense[:5]
    assert {*PLAIN, *NESTED} == {field.name for field in fields(Tokens)}
    write_arrays(tmp_path / "a.npz", token_arrays(tokens), {"host": "here"})
    arrays, facts = read_arrays(tmp_path / "a.npz")
    found = arrays_tokens(arrays, CPU)
    assert facts == {"host": "here"}
    for one, other in ((tokens, found), (tokens.dense, found.dense)):
        assert torch.equal(one.mask, other.mask)
        assert torch.equal(one.local[one.mask], other.local[one.mask])
        assert not other.local[~one.mask].any()
    assert torch.equal(tokens.cls, found.cls)
    assert torch.equal(tokens.sentence, found.sentence)
    assert torch.equal(found.dense.fragments.local, found.dense.local)
    assert found.dense.cls is None


def test_what_fails_on_one_process_is_told_to_all(tmp_path, few_texts, monkeypatch):
    told = []

    def agree(error):
        told.append(error)
        raise error

    def full(self, *_):
        raise NonFiniteError("NaN on this one's device")

    monkeypatch.setattr(distributed, "agree", agree)
    monkeypatch.setattr(ShardedEvaluation, "_scores", full)
    model = tiny_model("vse").eval()
    with pytest.raises(NonFiniteError, match="this one's device"):
        part(tmp_path, model, loaders(model, "vse")).finished()
    assert len(told) == 1


def test_a_folder_of_anything_else_is_refused(tmp_path):
    open_manifest(tmp_path / "new", {"checkpoint_sha256": "a", "batch_size": 64})
    open_manifest(tmp_path / "new", {"checkpoint_sha256": "a", "batch_size": 64})
    with pytest.raises(InputError, match="begun with another checkpoint, another batch_size"):
        open_manifest(tmp_path / "new", {"checkpoint_sha256": "b", "batch_size": 32})
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="holds other files"):
        open_manifest(tmp_path / "full", {})
    with pytest.raises(InputError, match="a file of that name"):
        open_manifest(tmp_path / "full" / "notes.txt", {})


def test_a_folder_that_another_process_began_a_moment_ago(tmp_path, monkeypatch):
    open_manifest(tmp_path, {"batch_size": 64})
    (tmp_path / TEXTS).mkdir()
    there = Path.exists
    monkeypatch.setattr(Path, "exists", lambda one: one.name != "manifest.json" and there(one))
    open_manifest(tmp_path, {"batch_size": 64})
    with pytest.raises(InputError, match="begun with another batch_size"):
        open_manifest(tmp_path, {"batch_size": 32})


# --- through eval.py -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(scenes_path, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "run"
    assert train.main(flags(scenes_path, folder, "--num_epochs", "1")) == 0
    return folder


def argv(run: Path, data: Path, *more: str) -> list[str]:
    where = ["--checkpoint", str(run / "model_best.pth"), "--data_path", str(data)]
    return [*where, "--workers", "0", "--batch_size", "4", *more]


def test_the_program_prints_and_writes_what_the_ordinary_evaluation_does(
    run, scenes_path, tmp_path, capsys, monkeypatch
):
    assert evaluation.main(argv(run, scenes_path)) == 0
    ordinary = json.loads((run / "results.json").read_text())["scenes"]
    ranks = read_ranks(run / "ranks_scenes.npz")
    table = capsys.readouterr().out.splitlines()
    shards = argv(run, scenes_path, "--shards", str(tmp_path / "s"), "--shard_images", "5")
    assert evaluation.main(shards) == 0
    found = json.loads((run / "results.json").read_text())["scenes"]
    assert len(list((tmp_path / "s" / COUNTS).iterdir())) == 2  # whole batches: 8 of 16
    apart = {"seconds", "flags", "date", "hosts", "stages"}
    assert {k: v for k, v in found.items() if k not in apart} == {
        k: v for k, v in ordinary.items() if k not in apart
    }
    again = read_ranks(run / "ranks_scenes.npz")
    np.testing.assert_array_equal(again.t2i, ranks.t2i)
    np.testing.assert_array_equal(again.i2t, ranks.i2t)
    stages = {kind: (one["files"], one["seconds"] > 0) for kind, one in found["stages"].items()}
    assert stages == {TEXTS: (1, True), OWN: (2, True), COUNTS: (2, True)}
    printed = capsys.readouterr().out.splitlines()
    assert next(line for line in table if line.startswith("scenes ")) in printed
    assert evaluation.main([*shards, "--recall_at", "3"]) == 0  # nothing is left to do
    assert "R@3" in capsys.readouterr().out
    assert evaluation.main([*shards, "--batch_size", "8"]) == 2
    assert "another batch_size" in capsys.readouterr().err
    monkeypatch.setattr(sharding, "code_digest", lambda: "of other files")
    assert evaluation.main(shards) == 2
    assert "other files of this code" in capsys.readouterr().err


def test_another_checkpoints_folder_is_refused(run, scenes_path, tmp_path, capsys):
    (tmp_path / "s").mkdir()
    (tmp_path / "s" / "manifest.json").write_text(json.dumps({"format": "evaluation-shards"}))
    assert evaluation.main(argv(run, scenes_path, "--shards", str(tmp_path / "s"))) == 2
    assert "was begun with" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (["--analyse", "where"], "--analyse needs all similarities, and --shards"),
        (["--save_similarity", "s.npy"], "--save_similarity needs all similarities"),
        (["--evaluate_cxc", "1"], "--evaluate_cxc needs all similarities"),
        (["--rerank", "5"], "--shards and --rerank"),
        (["--shard_images", "0"], "--shard_images 0"),
    ],
)
def test_what_needs_the_whole_matrix_is_refused(more, told, capsys):
    assert evaluation.main(["--checkpoint", "x", "--shards", "s", *more]) == 2
    assert told in capsys.readouterr().err


def test_the_shards_of_training_are_not_those_of_the_evaluation(scenes_path, tmp_path):
    from arguments import final_evaluation, parse_train

    args = parse_train(["--shards", "a-{000..003}.tar", "--logger_name", str(tmp_path)])
    assert final_evaluation(args).shards is None


@pytest.mark.slow
def test_processes_of_torchrun_and_one_beside_them_share_the_work(run, scenes_path, tmp_path):
    assert evaluation.main(argv(run, scenes_path)) == 0
    ranks = read_ranks(run / "ranks_scenes.npz")
    words = argv(run, scenes_path, "--shards", str(tmp_path / "s"), "--shard_images", "1")
    launch = "-m torch.distributed.run --nproc_per_node=2 --standalone".split()
    commands = [[*launch, "eval.py", "--multi_gpu", "1"], ["eval.py"]]
    both = [
        subprocess.Popen(
            [sys.executable, *command, *words],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for command in commands
    ]
    outputs = [process.communicate(timeout=240)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0], outputs
    assert any("rSum" in output for output in outputs), outputs
    found = read_ranks(run / "ranks_scenes.npz")
    np.testing.assert_array_equal(found.t2i, ranks.t2i)
    np.testing.assert_array_equal(found.i2t, ranks.i2t)
