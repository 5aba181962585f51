"""Images, samples and loaders on small files: augmentation, order, workers, ranks, bad images."""

from __future__ import annotations

import json
import os
import pickle
import signal
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from lib.data.images import crop_box, random_crop_and_flip
from lib.data.loaders import PairSampler, eval_loader, train_loader
from lib.data.sources import EvalCaptions, EvalImages, ImageFolderSource, TrainSet
from lib.data.splits import Split, load_split
from lib.errors import InputError
from vocab import WordTokenizer, learn_vocabulary


def write_lines(path: Path, lines) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return path


def write_image(path: Path, shade: int, size: tuple[int, int] = (40, 60)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(shade).integers(0, 256, (*size, 3), dtype=np.uint8)
    cv2.imwrite(str(path), cv2.GaussianBlur(pixels, (0, 0), 3))


def make_split(tmp_path: Path, images: int = 12, per_image: int = 2) -> Split:
    """A split of many images, read from disk."""
    ids = [str(n) for n in range(images)]
    folder = tmp_path / "scenes"
    captions = [f"a cat {n}" for n in range(images * per_image)]
    write_lines(folder / "train_caps.txt", captions)
    write_lines(folder / "train_ids.txt", ids)
    (folder / "id_mapping.json").write_text(json.dumps({one: f"{one}.jpg" for one in ids}))
    for n in range(images):
        write_image(folder / "images" / f"{n}.jpg", n)
    texts = [f"dense {n} {'long ' * n}" for n in range(images)]
    write_lines(folder / "scenes_train.jsonl", [json.dumps({"text": text}) for text in texts])
    return load_split(tmp_path, "scenes", "train", needs_dense=True)


@pytest.fixture(scope="module")
def tokenizer() -> WordTokenizer:
    return WordTokenizer(learn_vocabulary(["a cat caption number dense long 0 1 2 3 4 5 6 7 8 9"]))


def test_refuses_a_batch_larger_than_the_data():
    with pytest.raises(InputError, match=r"--batch_size 4 on 2 process.* more than the 7 captions"):
        PairSampler(7, 4, world=2)


# --- images ------------------------------------------------------------------------------------


def test_pixels_are_rgb_uint8_and_close_to_pil(tmp_path):
    image = pytest.importorskip("PIL.Image")
    write_image(tmp_path / "a.png", 3, (90, 70))
    pixels = ImageFolderSource([str(tmp_path / "a.png")], 32, augment=False).read(0)
    assert pixels.shape == (3, 32, 32)
    assert pixels.dtype == torch.uint8
    with image.open(tmp_path / "a.png") as opened:
        expected = np.asarray(opened.convert("RGB").resize((32, 32), image.Resampling.BICUBIC))
    difference = np.abs(pixels.permute(1, 2, 0).numpy().astype(int) - expected)
    assert difference.max() <= 3


def test_grey_and_narrow_images_are_read(tmp_path):
    cv2.imwrite(str(tmp_path / "a.png"), np.full((4, 300), 77, dtype=np.uint8))
    source = ImageFolderSource([str(tmp_path / "a.png")], 16, augment=True)
    pixels = source.read(0, np.random.default_rng(0))
    assert torch.equal(pixels, torch.full((3, 16, 16), 77, dtype=torch.uint8))


def test_crop_boxes_keep_scale_ratio_and_place():
    rng = np.random.default_rng(0)
    boxes = np.array([crop_box(300, 400, rng) for _ in range(2000)])
    top, left, height, width = boxes.T
    area, ratio = height * width / 120000, width / height
    assert area.min() > 0.59
    assert area.max() <= 1
    assert ratio.min() > 0.74
    assert ratio.max() < 1.345
    assert (top + height).max() == 300  # every border is reached, none is crossed
    assert (left + width).max() == 400
    assert top.min() == left.min() == 0
    assert abs(np.mean(top - (300 - height) / 2)) < 3  # in the middle on average
    assert abs(np.mean(left - (400 - width) / 2)) < 3


def test_half_of_the_training_images_are_mirrored():
    ramp = torch.arange(60, dtype=torch.uint8).expand(3, 40, 60) * 4
    rng = np.random.default_rng(0)
    crops = [random_crop_and_flip(ramp, 8, rng) for _ in range(400)]
    mirrored = sum(int(crop[0, 0, 0] > crop[0, 0, -1]) for crop in crops)
    assert 160 < mirrored < 240


# --- loaders -----------------------------------------------------------------------------------


def make_train_set(split, tokenizer, **options) -> TrainSet:
    options = {"img_res": 16, "max_word": 12, "seed": 5, "max_dense_word": 8, **options}
    return TrainSet(split, tokenizer, **options)


def flatten(batches) -> list[torch.Tensor]:
    """Every tensor of every batch, in order."""
    fields = ("pixels", "ids", "lengths", "image_ids", "caption_index", "dense_ids")
    return [getattr(batch, field) for batch, _ in batches for field in fields]


def assert_same(first, second) -> None:
    first, second = flatten(first), flatten(second)
    assert len(first) == len(second) > 0
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_a_pair_is_a_caption_its_image_and_the_images_dense_text(tmp_path, tokenizer):
    split = make_split(tmp_path)
    options = {"augment_images": False, "augment_words": False}
    loader = train_loader(make_train_set(split, tokenizer, **options), 5)
    plain = ImageFolderSource(split.image_files, 16, augment=False)
    assert len(loader) == 4
    seen = []
    for batch, bad_paths in loader.batches(0):
        assert bad_paths == []
        for b, caption in enumerate(batch.caption_index.tolist()):
            row = caption // 2
            words = tokenizer.encode(split.captions[caption], 12)
            dense = tokenizer.encode(split.dense[row], 8)
            assert batch.image_ids[b] == row
            assert torch.equal(batch.pixels[b], plain.read(row))
            assert batch.ids[b, : batch.lengths[b]].tolist() == words
            assert batch.ids[b, batch.lengths[b] :].eq(tokenizer.pad_id).all()
            assert batch.dense_ids[b, : batch.dense_lengths[b]].tolist() == dense
        assert batch.ids.shape[1] == batch.lengths.max()
        seen += batch.caption_index.tolist()
    assert len(set(seen)) == 20  # no caption twice in an epoch; four of 24 are left out


def test_batches_depend_neither_on_workers_nor_on_what_ran_before(tmp_path, tokenizer):
    split = make_split(tmp_path)
    alone = train_loader(make_train_set(split, tokenizer), 4)
    helped = train_loader(make_train_set(split, tokenizer), 4, num_workers=2)
    assert_same(helped.batches(0), alone.batches(0))
    torch.rand(3)
    np.random.rand(3)
    assert_same(helped.batches(1), alone.batches(1))  # the epoch reaches persistent workers


def test_epochs_and_seeds_differ_in_order_and_augmentation(tmp_path, tokenizer):
    dataset = make_train_set(make_split(tmp_path), tokenizer)
    first, again, later = (dataset[(epoch, 3)] for epoch in (0, 0, 1))
    assert torch.equal(first.pixels, again.pixels)
    assert not torch.equal(first.pixels, later.pixels)
    orders = set()
    for epoch, seed in ((0, 5), (1, 5), (0, 6)):
        sampler = PairSampler(24, 4, seed)
        sampler.set_epoch(epoch)
        orders.add(tuple(index for keys in sampler for _, index in keys))
    assert len(orders) == 3


def test_resuming_in_mid_epoch_goes_on_with_the_same_batches(tmp_path, tokenizer):
    loader = train_loader(make_train_set(make_split(tmp_path), tokenizer), 4)
    whole = list(loader.batches(2))
    assert len(whole) == len(loader) == 6
    assert_same(loader.batches(2, start_step=4), whole[4:])
    assert len(list(loader.batches(3))) == 6


@pytest.mark.parametrize(("pairs", "batch"), [(24, 4), (27, 3), (8, 4)])
def test_two_ranks_split_the_batch_of_one_process(pairs, batch):
    one = PairSampler(pairs, 2 * batch, seed=1)
    two = [PairSampler(pairs, batch, seed=1, rank=rank, world=2) for rank in (0, 1)]
    for sampler in (one, *two):
        sampler.set_epoch(3)
    assert len(one) == len(two[0]) == len(two[1]) == pairs // (2 * batch)
    assert list(one) == [first + second for first, second in zip(*two, strict=True)]


@pytest.mark.parametrize("workers", [0, 2])
def test_pairs_of_an_undecodable_image_are_left_out(tmp_path, tokenizer, workers):
    split = make_split(tmp_path)
    bad = split.image_files[4]
    Path(bad).write_bytes(b"not an image")
    dataset = make_train_set(split, tokenizer, augment_images=False)
    good = ImageFolderSource(split.image_files, 16, augment=False)
    rows, reported = [], []
    for batch, bad_paths in train_loader(dataset, 6, num_workers=workers).batches(0):
        reported += bad_paths
        rows += batch.image_ids.tolist()
        for b, row in enumerate(batch.image_ids.tolist()):
            assert torch.equal(batch.pixels[b], good.read(row))
            assert batch.caption_index[b] // 2 == row
    assert reported == [bad, bad]  # once for each of its two captions
    assert sorted(rows) == [row for row in range(12) if row != 4 for _ in (0, 1)]


def test_a_batch_of_bad_pairs_alone_is_none(tmp_path, tokenizer):
    split = make_split(tmp_path, images=2)
    for file in split.image_files:
        Path(file).write_bytes(b"")
    batches = list(train_loader(make_train_set(split, tokenizer), 2).batches(0))
    assert [batch for batch, _ in batches] == [None, None]
    assert {path for _, paths in batches for path in paths} == set(split.image_files)


@pytest.mark.parametrize("workers", [0, 2])
def test_evaluation_takes_images_and_captions_once_in_order(tmp_path, tokenizer, workers):
    split = make_split(tmp_path)
    images = list(eval_loader(EvalImages(split, 16), 5, num_workers=workers))
    assert torch.cat([batch.image_ids for batch in images]).tolist() == list(range(12))
    assert [batch.pixels.shape[0] for batch in images] == [5, 5, 2]
    assert images[0].ids is images[0].dense_ids is images[0].caption_index is None
    captions = list(eval_loader(EvalCaptions(split, tokenizer, 12), 7, num_workers=workers))
    assert torch.cat([batch.caption_index for batch in captions]).tolist() == list(range(24))
    assert torch.cat([batch.image_ids for batch in captions]).tolist() == [
        row for row in range(12) for _ in (0, 1)
    ]
    assert captions[0].pixels is captions[0].dense_ids is None
    expected = tokenizer.encode(split.captions[23], 12)
    assert captions[3].ids[2, : captions[3].lengths[2]].tolist() == expected


def test_evaluation_shards_and_dense_texts(tmp_path, tokenizer):
    split = make_split(tmp_path)
    images = EvalImages(split, 16, tokenizer, max_dense_word=6)
    (batch,) = eval_loader(images, 8, indices=range(3, 6))
    assert batch.image_ids.tolist() == [3, 4, 5]
    expected = [tokenizer.encode(split.dense[row], 6) for row in (3, 4, 5)]
    assert batch.dense_lengths.tolist() == [len(ids) for ids in expected]
    assert batch.dense_ids[2, : len(expected[2])].tolist() == expected[2]
    captions = EvalCaptions(split, tokenizer, 12, max_dense_word=6)
    (batch,) = eval_loader(captions, 8, indices=[10, 1])
    assert batch.caption_index.tolist() == [10, 1]
    first = tokenizer.encode(split.dense[5], 6)  # the dense text of the caption's own image
    assert batch.dense_ids[0, : batch.dense_lengths[0]].tolist() == first
    assert list(eval_loader(images, 8, indices=[])) == []


def test_a_method_without_pixels_gets_none(tmp_path, tokenizer):
    split = make_split(tmp_path)
    for file in split.image_files:
        Path(file).unlink()
    loader = train_loader(make_train_set(split, tokenizer, img_res=None), 4)
    batch, bad_paths = next(loader.batches(0))
    assert batch.pixels is None
    assert batch.dense_ids.shape[0] == 4
    assert bad_paths == []
    (batch,) = eval_loader(EvalImages(split, None, tokenizer, max_dense_word=6), 12)
    assert batch.pixels is None
    assert batch.dense_ids.shape[0] == 12


@pytest.mark.parametrize("workers", [0, 1])
def test_evaluation_refuses_an_undecodable_image_in_one_sentence(tmp_path, workers):
    split = make_split(tmp_path, images=3)
    Path(split.image_files[1]).write_bytes(b"not an image")
    with pytest.raises(InputError) as caught:
        list(eval_loader(EvalImages(split, 16), 2, num_workers=workers))
    expected = f"{split.image_files[1]} can't be decoded; replace the image file"
    assert str(caught.value) == expected


def test_data_sets_survive_pickling_for_spawned_workers(tmp_path, tokenizer):
    dataset = make_train_set(make_split(tmp_path), tokenizer)
    again = pickle.loads(pickle.dumps(dataset))
    assert torch.equal(again[(1, 2)].pixels, dataset[(1, 2)].pixels)
    assert again[(1, 2)].ids == dataset[(1, 2)].ids


GROUP_SIGNALS = """
import signal, sys, time
from pathlib import Path
from tests.data import test_data
from vocab import WordTokenizer, learn_vocabulary

tokenizer = WordTokenizer(learn_vocabulary(["a cat 0 1 2"]))
dataset = test_data.make_train_set(test_data.make_split(Path(sys.argv[1])), tokenizer)
loader = test_data.train_loader(dataset, 4, num_workers=1)
caught = []
for number in (signal.SIGTERM, signal.SIGINT):
    signal.signal(number, lambda *received: caught.append(received[0]))
count = 0
for epoch in range(2):
    for _ in loader.batches(epoch):
        count += 1
        if count == 1:
            print("ready", flush=True)
            while len(caught) < 2:
                time.sleep(0.01)
print(count)
"""


def test_workers_outlive_group_signals_and_end_with_the_program(tmp_path):
    """Ctrl-C reaches the whole group; a live loader must not keep the program from ending."""
    process = subprocess.Popen(
        [sys.executable, "-c", GROUP_SIGNALS, str(tmp_path)],
        cwd=Path(__file__).resolve().parents[2],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        assert process.stdout.readline() == "ready\n"
        for number in (signal.SIGTERM, signal.SIGINT):
            os.killpg(process.pid, number)
        output, _ = process.communicate(timeout=30)
        assert (output, process.returncode) == ("12\n", 0)
    finally:
        process.kill()
