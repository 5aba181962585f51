"""Precomputed regions: from files through train.main and eval.main, in four methods."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

import eval as evaluation
import train
from data import load_splits
from lib.checkpoints.checkpoint import load_model
from lib.data.loaders import eval_loader, train_loader
from lib.data.sources import EvalImages, RegionSource, TrainSet
from lib.data.splits import hold_out, load_region_split
from lib.errors import InputError
from lib.methods.base import Method
from lib.training.logs import RunLog
from tests.conftest import SENTENCES
from tests.helpers import tiny_args
from vocab import WordTokenizer, learn_vocabulary

IMAGES, CAPTIONS, WIDTH, CHANNELS = 8, 5, 6, 16
LENGTHS = [6, 1, 3, 6, 2, 5, 4, 6]
SCAN_FEATURES = "https://www.kaggle.com/datasets/kuanghueilee/scan-features"
SMALL = (
    "--dataset f30k --precomp 1 --region_dim 16 --embed_size 32 --bert_path tiny --nhead 4 "
    "--tiny_width 32 --tiny_layers 1 --max_word 20 --batch_size 8 --workers 0 --num_epochs 1 "
    "--warmup 2"
)


def write_features(path: Path, images: int = IMAGES, seed: int = 0, dtype=np.float32) -> np.ndarray:
    shape = (images, WIDTH, CHANNELS)
    features = np.random.default_rng(seed).standard_normal(shape).astype(dtype)
    np.save(path, features)
    return features


def write_captions(path: Path, images: int = IMAGES) -> None:
    lines = [f"{SENTENCES[(k + row) % 5]} number {row}" for row in range(images) for k in range(5)]
    path.write_text("\n".join(lines) + "\n")


def write_regions(root: Path, dataset: str = "f30k", splits=("train", "dev", "test")) -> Path:
    """Write region features of `splits`, without ids and images; return their folder."""
    folder = root / f"{dataset}_precomp"
    folder.mkdir(parents=True)
    for seed, split in enumerate(splits):
        write_features(folder / f"{split}_ims.npy", seed=seed)
        write_captions(folder / f"{split}_caps.txt")
    return folder


@pytest.fixture
def folder(tmp_path) -> Path:
    """The f30k_precomp of a data_path, which is its parent."""
    return write_regions(tmp_path)


def flags(folder: Path, run: Path, *more: str) -> list[str]:
    return [*SMALL.split(), "--data_path", str(folder.parent), "--logger_name", str(run), *more]


def read(folder: Path, split: str = "train", **options):
    return load_region_split(folder.parent, "f30k", split, CHANNELS, **options)


# --- end to end --------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["hrem", "vse", "scan", "chan"])
def test_trains_and_evaluates_on_regions(folder, method, monkeypatch):
    """The regions of every batch, and how many are valid, reach the model."""
    np.save(folder / "train_lens.npy", np.array(LENGTHS))
    np.save(folder / "test_lens.npy", np.array(LENGTHS, dtype=np.uint8))
    seen = watch_encoder(monkeypatch)
    run = folder.parent / "run"
    assert train.main(flags(folder, run, "--method", method)) == 0
    features = np.load(folder / "train_ims.npy")
    batches = [one for training, *one in seen if training]
    assert len(batches) == IMAGES * CAPTIONS // 8
    for pixels, lengths in batches:
        assert pixels.dtype == torch.float32
        for one, length in zip(pixels.numpy(), lengths.tolist(), strict=True):
            row = int(np.abs(features[:, 0] - one[0]).sum(1).argmin())
            assert length == LENGTHS[row]
            np.testing.assert_array_equal(one[:length], features[row, :length])
            assert not one[length:].any()
    assert {tuple(lengths.tolist()) for training, _, lengths in seen if not training} == {(6,) * 8}
    seen.clear()
    argv = ["--checkpoint", str(run / "model_best.pth"), "--data_path", str(folder.parent)]
    assert evaluation.main(argv) == 0
    table = json.loads((run / "results.json").read_text())[f"f30k_{IMAGES}"]
    assert (table["method"], table["val_split"]) == (method, "dev")
    assert (table["images"], table["captions"]) == (IMAGES, IMAGES * CAPTIONS)
    ((_, pixels, lengths),) = seen
    assert lengths.tolist() == LENGTHS
    assert not pixels[1, 1:].any()


def watch_encoder(monkeypatch) -> list:
    """Collect (training, pixels, pixel_lengths) of every call of `encode_images`."""
    original, seen = Method.encode_images, []

    def encode_images(self, pixels, dense_ids=None, dense_lengths=None, pixel_lengths=None):
        seen.append((self.training, pixels, pixel_lengths))
        return original(self, pixels, dense_ids, dense_lengths, pixel_lengths)

    monkeypatch.setattr(Method, "encode_images", encode_images)
    return seen


def test_evaluation_repeats_the_validation_and_reads_another_dtype(folder):
    features = write_features(folder / "dev_ims.npy", dtype=np.float16)
    run = folder.parent / "run"
    assert train.main(flags(folder, run, "--method", "vse")) == 0
    np.save(folder / "dev_ims.npy", np.asfortranarray(features.astype(">f8")))
    argv = ["--checkpoint", str(run / "model_best.pth"), "--data_path", str(folder.parent)]
    assert evaluation.main([*argv, "--split", "dev"]) == 0
    table = json.loads((run / "results.json").read_text())["f30k_dev"]
    best = torch.load(run / "model_best.pth", weights_only=True)["best_rsum"]
    assert table["rsum"] == pytest.approx(best, abs=1e-6)
    assert load_model(run / "model_best.pth")[1].precomp == 1


@pytest.mark.parametrize("missing", ["dev_caps.txt", "dev_ims.npy"])
def test_without_dev_training_images_are_held_out(folder, missing):
    (folder / missing).unlink()
    args = tiny_args("vse", precomp=1, region_dim=CHANNELS)
    asked_for = {"captions_per_image": 0, "val_images": 0, "shards": None}
    vars(args).update(data_path=str(folder.parent), val_split="dev", **asked_for)
    log = RunLog(folder.parent / "run", active=True)
    training, validation = load_splits(args, log)
    log.close()
    assert str(folder / missing) in (folder.parent / "run" / "train.log").read_text()
    assert (len(training.image_ids), len(validation.image_ids)) == (7, 1)
    assert validation.name == args.val_split == "held_out"


def test_flags_that_shorten_a_split_shorten_what_is_held_out_as_they_do_dev(folder):
    (folder / "dev_caps.txt").unlink()
    args = tiny_args("vse", precomp=1, region_dim=CHANNELS)
    asked_for = {"captions_per_image": 1, "val_images": 0, "shards": None}
    vars(args).update(data_path=str(folder.parent), val_split="dev", **asked_for)
    log = RunLog(folder.parent / "run", active=False)
    training, validation = load_splits(args, log)
    assert (len(training.captions), len(validation.captions)) == (7, CAPTIONS)
    args.val_images = 2
    with pytest.raises(InputError, match="held_out split has 1 images, fewer than the 2"):
        load_splits(args, log)


# --- the source --------------------------------------------------------------------------------


def test_the_file_is_memory_mapped_by_whoever_reads_it(folder):
    source = RegionSource(read(folder).regions)
    assert source._features is None  # nothing is open before the first read
    source.read(0)
    assert isinstance(source.features, np.memmap)
    assert source.features is source.features
    again = pickle.loads(pickle.dumps(source))
    assert again._features is None  # a spawned worker maps the file itself
    assert len(pickle.dumps(source)) < 2000
    assert torch.equal(again.read(3)[0], source.read(3)[0])


def test_reads_float32_with_zeros_behind_the_length(folder):
    features = np.load(folder / "train_ims.npy")
    np.save(folder / "train_lens.npy", np.array(LENGTHS))
    features[1, 1:] = np.nan
    np.save(folder / "train_ims.npy", features.astype(np.float64))
    pixels, length = RegionSource(read(folder).regions).read(1)
    assert (length, pixels.shape, pixels.dtype) == (1, (WIDTH, CHANNELS), torch.float32)
    np.testing.assert_array_equal(pixels[0].numpy(), features[1, 0])
    assert not pixels[1:].any()


def test_held_out_images_keep_their_regions_and_lengths(folder):
    np.save(folder / "train_lens.npy", np.array(LENGTHS))
    features = np.load(folder / "train_ims.npy")
    kept, held = hold_out(read(folder), 3)
    for part in (kept, held):
        source = RegionSource(part.regions)
        for row, image_id in enumerate(map(int, part.image_ids)):
            pixels, length = source.read(row)
            assert length == LENGTHS[image_id]
            np.testing.assert_array_equal(pixels[:length], features[image_id, :length])
            caption = part.captions[int(np.flatnonzero(part.caption_image == row)[0])]
            assert caption.endswith(f"number {image_id}")
    assert len(kept.image_ids) == 5


@pytest.mark.parametrize("workers", [0, 1])
def test_loaders_hand_out_regions_and_lengths(folder, workers):
    np.save(folder / "train_lens.npy", np.array(LENGTHS))
    split, features = read(folder), np.load(folder / "train_ims.npy")
    tokenizer = WordTokenizer(learn_vocabulary(split.captions))
    loader = train_loader(TrainSet(split, tokenizer, 224, 20), 8, num_workers=workers)
    for batch, bad_paths in loader.batches(0):
        assert bad_paths == []
        assert batch.pixels.shape == (8, WIDTH, CHANNELS)
        assert batch.pixel_lengths.tolist() == [LENGTHS[row] for row in batch.image_ids]
    (batch,) = eval_loader(EvalImages(split, 224), 8, num_workers=workers)
    assert batch.pixel_lengths.tolist() == LENGTHS
    np.testing.assert_array_equal(batch.pixels[2, :3].numpy(), features[2, :3])


# --- splits ------------------------------------------------------------------------------------


def test_images_have_equally_many_captions_and_ids_go_unread(folder):
    (folder / "train_ids.txt").write_text("one line\n")
    split = read(folder)
    assert split.caption_image.tolist() == [row for row in range(IMAGES) for _ in range(CAPTIONS)]
    assert split.regions.lengths.tolist() == [WIDTH] * IMAGES
    assert split.image_files == []
    assert split.dense is None


def test_the_test_split_of_coco_is_testall(tmp_path):
    folder = write_regions(tmp_path, "coco", ["testall"])
    np.save(folder / "testall_lens.npy", np.array(LENGTHS))
    split = load_region_split(tmp_path, "coco", "test", CHANNELS)
    assert split.regions.file == folder / "testall_ims.npy"
    assert split.regions.lengths.tolist() == LENGTHS


def test_dense_texts_lie_beside_the_regions_or_with_the_captions(folder):
    def write(path: Path, word: str, count: int = IMAGES) -> None:
        path.parent.mkdir(exist_ok=True)
        lines = [json.dumps({"text": f"{word} {n}", "image_id": 90 - n}) for n in range(count)]
        path.write_text("\n".join(lines) + "\n")

    elsewhere = folder.parent / "f30k" / "f30k_train.jsonl"
    with pytest.raises(InputError, match=f"no {elsewhere}"):
        read(folder, needs_dense=True)
    write(elsewhere, "far")
    assert read(folder, needs_dense=True).dense == [f"far {n}" for n in range(IMAGES)]
    write(folder / "f30k_train.jsonl", "near")
    assert read(folder, needs_dense=True).dense[7] == "near 7"
    write(folder / "f30k_train.jsonl", "near", count=3)
    with pytest.raises(InputError, match="has 3 dense texts, but the split has 8 images"):
        read(folder, needs_dense=True)


# --- bad inputs --------------------------------------------------------------------------------


def refuses(folder: Path, *parts: str) -> None:
    with pytest.raises(InputError) as caught:
        read(folder)
    for part in parts:
        assert part in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["train_ims.npy", "train_caps.txt"])
def test_refuses_a_missing_file(folder, name):
    (folder / name).unlink()
    refuses(folder, f"no file {folder / name}", SCAN_FEATURES)


@pytest.mark.parametrize("images", [7, 6, 41])
def test_refuses_counts_that_disagree(folder, images):
    write_features(folder / "train_ims.npy", images=images)
    captions, features = folder / "train_caps.txt", folder / "train_ims.npy"
    refuses(folder, f"{captions} has 40 captions", f"{features} has {images} images")


@pytest.mark.parametrize(
    "array",
    [np.zeros((8, 16), np.float32), np.zeros((8, 6, 16), int), np.zeros((8, 0, 16), np.float32)],
    ids=["two axes", "integers", "no regions"],
)
def test_refuses_arrays_that_are_no_regions(folder, array):
    np.save(folder / "train_ims.npy", array)
    refuses(folder, f"{folder / 'train_ims.npy'} holds {array.dtype} of shape {array.shape}")


def test_refuses_files_that_are_cut_off_or_no_array(folder):
    path = folder / "train_ims.npy"
    path.write_bytes(path.read_bytes()[:-9])
    refuses(folder, f"{path} is no whole .npy file")
    path.write_bytes(b"no array")
    refuses(folder, f"{path} is no whole .npy file")
    np.save(path, np.array([{}], dtype=object))
    refuses(folder, f"{path} is no whole .npy file")


@pytest.mark.parametrize(
    ("lengths", "part"),
    [
        ([6, 0, *LENGTHS[2:]], "row 1 is 0; each image has 1 to 6 regions"),
        ([*LENGTHS[:7], 7], "row 7 is 7; each image has 1 to 6 regions"),
        (LENGTHS[:7], "holds int64 of shape (7,)"),
        (np.ones(8), "holds float64 of shape (8,)"),
    ],
)
def test_refuses_lengths_out_of_range(folder, lengths, part):
    np.save(folder / "train_lens.npy", np.array(lengths))
    refuses(folder, str(folder / "train_lens.npy"), part)


def test_regions_of_another_width_are_refused_before_a_model_is_built(folder, monkeypatch, capsys):
    monkeypatch.setattr(train, "build_model", None)
    argv = flags(folder, folder.parent / "run", "--method", "vse", "--region_dim", "2048")
    assert train.main(argv) == 2
    expected = (
        f"{folder / 'train_ims.npy'} holds regions of 16 channels, the model reads 2048; "
        "train with --region_dim 16"
    )
    assert expected in capsys.readouterr().err
