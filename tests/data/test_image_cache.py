"""Images through --image_cache are those without it, whatever becomes of sources and entries."""

from __future__ import annotations

import json
import multiprocessing
import os
import pickle
import shutil
import stat
from pathlib import Path

import numpy as np
import pytest
import torch

import eval as evaluation
import train
from lib.data import image_cache
from lib.data.image_cache import ImageCache, PreparedImage
from lib.data.images import shrink
from lib.data.loaders import eval_loader
from lib.data.sources import EvalImages, ImageFolderSource, TrainSet
from lib.errors import InputError
from tests.data.test_data import make_split, write_image
from vocab import WordTokenizer, learn_vocabulary


@pytest.fixture(autouse=True)
def _nothing_said_yet():
    image_cache._warn_once.cache_clear()


@pytest.fixture
def files(tmp_path) -> list[str]:
    """Three images larger than any crop at 32 pixels needs."""
    paths = [tmp_path / "images" / f"{n}.png" for n in range(3)]
    for n, path in enumerate(paths):
        write_image(path, n, (150 + 20 * n, 210))
    return [str(path) for path in paths]


@pytest.fixture
def cache(tmp_path) -> ImageCache:
    return ImageCache(tmp_path / "cache")


def entries(cache: ImageCache) -> list[Path]:
    return [path for path in Path(cache.folder).rglob("*") if path.is_file()]


def forbid_decoding(monkeypatch) -> None:
    monkeypatch.setattr("lib.data.sources.decode", lambda path: pytest.fail(f"{path} was decoded"))


def read_all(source: ImageFolderSource, draws: int = 4) -> list[torch.Tensor]:
    """Every image, `draws` times with a generator of its own."""
    rows = range(len(source.files))
    return [source.read(r, np.random.default_rng([r, d])) for r in rows for d in range(draws)]


def assert_equal(first: list[torch.Tensor], second: list[torch.Tensor]) -> None:
    assert len(first) == len(second) > 0
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


# --- the same pixels ---------------------------------------------------------------------------


def test_evaluation_is_the_same_to_the_bit(files, cache, monkeypatch):
    expected = read_all(ImageFolderSource(files, 32, augment=False))
    source = ImageFolderSource(files, 32, augment=False, cache=cache)
    assert_equal(read_all(source), expected)
    assert sorted(path.stat().st_size for path in entries(cache)) == [44 + 3 * 32 * 32] * 3
    forbid_decoding(monkeypatch)
    assert_equal(read_all(source), expected)
    pixels = source.read(0)
    assert (pixels.shape, pixels.dtype) == ((3, 32, 32), torch.uint8)
    pixels.add_(1)  # it belongs to the caller
    assert torch.equal(source.read(0), expected[0])


def test_crops_of_images_that_need_no_shrinking_are_the_same_to_the_bit(files, cache, monkeypatch):
    expected = read_all(ImageFolderSource(files, 140, augment=True), draws=10)
    source = ImageFolderSource(files, 140, augment=True, cache=cache)
    assert_equal(read_all(source, draws=10), expected)
    forbid_decoding(monkeypatch)
    assert_equal(read_all(source, draws=10), expected)


def test_crops_of_shrunk_images_are_close_and_draw_the_same_numbers(files, cache, monkeypatch):
    plain = ImageFolderSource(files, 32, augment=True)
    source = ImageFolderSource(files, 32, augment=True, cache=cache)
    read_all(source)
    assert max(path.stat().st_size for path in entries(cache)) < 3 * 60 * 75
    expected = []
    for seed in range(20):
        rng = np.random.default_rng(seed)
        expected.append((plain.read(0, rng), rng.random()))
    forbid_decoding(monkeypatch)
    for seed, (pixels, after) in enumerate(expected):
        rng = np.random.default_rng(seed)
        difference = (source.read(0, rng).float() - pixels.float()).abs()
        assert difference.mean() < 4  # another crop, or another side up, is off by 10 and more
        assert rng.random() == after


@pytest.mark.parametrize("size", [(480, 640), (640, 480), (300, 300), (100, 2000), (2000, 60)])
def test_a_shrunk_image_is_as_small_as_its_crops_allow(size):
    height, width = size
    pixels = np.zeros((height, width, 3), dtype=np.uint8)
    small = shrink(pixels, 100)
    side = min(small.shape[0], small.shape[1], np.sqrt(0.6 * 0.75 * np.prod(small.shape[:2])))
    assert small.shape[0] / small.shape[1] == pytest.approx(height / width, rel=0.03)
    assert min(100, min(size)) <= side < 102


def test_settings_do_not_get_into_each_others_way(files, cache):
    for augment in (False, True):
        for img_res in (32, 48):
            read_all(ImageFolderSource(files, img_res, augment, cache))
            plain = ImageFolderSource(files, img_res, augment=False)
            assert_equal(read_all(ImageFolderSource(files, img_res, False, cache)), read_all(plain))
    assert len(entries(cache)) == 12


# --- sources and entries that change -----------------------------------------------------------


def test_a_changed_source_is_read_anew(files, cache):
    source = ImageFolderSource(files, 32, augment=False, cache=cache)
    read_all(source)
    write_image(Path(files[0]), 9, (80, 90))
    shutil.copy(files[1], files[2] + ".new")
    os.utime(files[2] + ".new", ns=(1, os.stat(files[2]).st_mtime_ns))
    os.replace(files[2] + ".new", files[2])  # another size, but the time of the old one
    plain = ImageFolderSource(files, 32, augment=False)
    assert_equal(read_all(source), read_all(plain))
    assert len(entries(cache)) == 3


def test_a_touched_source_is_read_anew(files, cache):
    source = ImageFolderSource(files, 32, augment=False, cache=cache)
    source.read(0)
    (entry,) = entries(cache)
    before = entry.read_bytes()
    os.utime(files[0], ns=(1, 10**18))
    source.read(0)
    assert entry.read_bytes() != before  # the time in its header
    assert entry.read_bytes()[44:] == before[44:]


@pytest.mark.parametrize("length", [0, 20, 44, 100, 44 + 3 * 32 * 32 - 1, 44 + 3 * 32 * 32 + 1])
def test_an_entry_of_a_wrong_length_is_made_anew(files, cache, length):
    source = ImageFolderSource(files, 32, augment=False, cache=cache)
    expected = source.read(0)
    (entry,) = entries(cache)
    whole = entry.read_bytes()
    entry.write_bytes((whole + b"x")[:length])
    assert torch.equal(source.read(0), expected)
    assert entry.read_bytes() == whole


def test_what_is_no_entry_is_made_anew(files, cache):
    source = ImageFolderSource(files, 32, augment=False, cache=cache)
    expected = source.read(0)
    (entry,) = entries(cache)
    entry.write_bytes(bytes(entry.stat().st_size))
    assert torch.equal(source.read(0), expected)


def test_undecodable_and_missing_images_are_not_kept(files, cache):
    Path(files[0]).write_bytes(b"not an image")
    source = ImageFolderSource(files, 32, augment=False, cache=cache)
    assert source.read(0) is None
    assert source.sample(0).bad_path == files[0]
    assert entries(cache) == []
    assert source.read(1) is not None
    os.unlink(files[1])  # it is kept, but no longer in the data set
    assert source.read(1) is None


# --- several processes -------------------------------------------------------------------------


def keep_often(folder: str, path: str, shade: int, start, done) -> None:
    """Write and read one entry over and over; tell how many reads were of neither writer."""
    cache = ImageCache(folder)
    made = PreparedImage(np.full((3, 200, 200), shade, dtype=np.uint8), (200, 200))
    entry, stamp = cache.entry(path, ""), (1, 2)
    start.wait()
    bad = 0
    for _ in range(60):
        cache._write(entry, stamp, made)
        found = image_cache._read(entry, stamp)
        bad += found is None or len(np.unique(found.pixels)) != 1
    done.put(bad)


def test_two_processes_may_write_at_once(files, cache, capfd):
    context = multiprocessing.get_context("fork")
    start, done = context.Barrier(2), context.Queue()
    writers = [
        context.Process(target=keep_often, args=(cache.folder, files[0], shade, start, done))
        for shade in (1, 2)
    ]
    for writer in writers:
        writer.start()
    assert [done.get(timeout=60), done.get(timeout=60)] == [0, 0]
    for writer in writers:
        writer.join()
    assert len(entries(cache)) == 1  # and no temporary file
    assert capfd.readouterr().err == ""  # they don't stand in each other's way


def test_colleagues_can_read_what_the_umask_lets_them(files, tmp_path):
    before = os.umask(0o002)
    try:
        cache = ImageCache(tmp_path / "shared")
        ImageFolderSource(files, 32, augment=False, cache=cache).read(0)
    finally:
        os.umask(before)
    (entry,) = entries(cache)
    assert stat.S_IMODE(entry.stat().st_mode) == 0o664
    assert stat.S_IMODE(entry.parent.stat().st_mode) == 0o775


def test_links_to_a_folder_share_their_entries(files, cache, tmp_path):
    (tmp_path / "link").symlink_to(Path(files[0]).parent)
    ImageFolderSource(files, 32, augment=False, cache=cache).read(0)
    ImageFolderSource([str(tmp_path / "link" / "0.png")], 32, augment=False, cache=cache).read(0)
    assert len(entries(cache)) == 1


def test_loader_workers_fill_and_use_it(tmp_path, cache):
    split = make_split(tmp_path, images=5)
    expected = torch.cat([batch.pixels for batch in eval_loader(EvalImages(split, 16), 2)])
    for _ in range(2):
        loader = eval_loader(EvalImages(split, 16, cache=cache), 2, num_workers=2)
        assert torch.equal(torch.cat([batch.pixels for batch in loader]), expected)
        assert len(entries(cache)) == 5
    tokenizer = WordTokenizer(learn_vocabulary(split.captions))
    dataset = TrainSet(split, tokenizer, 16, 12, cache=cache)
    again = pickle.loads(pickle.dumps(dataset))  # as for a spawned worker
    assert torch.equal(again[(1, 2)].pixels, dataset[(1, 2)].pixels)


# --- folders that can't be written -------------------------------------------------------------


@pytest.mark.parametrize("place", ["file", "file/below"])
def test_an_unfit_folder_is_refused_at_the_start(tmp_path, place, scenes_path, capsys):
    (tmp_path / "file").write_text("")
    folder = tmp_path / place
    with pytest.raises(InputError, match=r"--image_cache .*file.* can't be written to \(\w+"):
        ImageCache(folder)
    flags = ["--image_cache", str(folder), "--data_path", str(scenes_path)]
    assert train.main([*SMALL, *flags, "--logger_name", str(tmp_path / "run")]) == 2
    assert capsys.readouterr().err.count("--image_cache") == 1


def test_a_folder_without_the_right_to_write_is_refused(tmp_path, monkeypatch):
    def refuse(**options):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(image_cache.tempfile, "TemporaryFile", refuse)  # root may write anywhere
    with pytest.raises(InputError, match=r"--image_cache .*cache can't .*Permission denied"):
        ImageCache(tmp_path / "cache")


def test_a_full_disk_costs_one_warning(files, cache, monkeypatch, capsys):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(image_cache.os, "replace", full)
    expected = read_all(ImageFolderSource(files, 32, augment=False))
    source = ImageFolderSource(files, 32, augment=False, cache=cache)
    assert_equal(read_all(source), expected)
    assert entries(cache) == []  # no temporary file either
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert f"warning: --image_cache {cache.folder}" in said
    assert "No space left on device" in said


# --- from the command line ---------------------------------------------------------------------

SMALL = (
    "--dataset scenes --scenes_size 32,16,16 --img_res 64 --embed_size 32 --tiny_width 32 "
    "--tiny_layers 1 --batch_size 16 --workers 0 --num_epochs 1 --max_dense_word 30"
).split()


def rsums(folder: Path) -> dict[str, float]:
    found = json.loads((folder / "results.json").read_text())
    return {name: table["rsum"] for name, table in found.items()}


def test_a_run_on_scenes_is_the_same_with_it(scenes_path, tmp_path, monkeypatch):
    """scenes draws no random crops, so nothing at all may differ."""
    data, folder = ["--data_path", str(scenes_path)], tmp_path / "cache"
    told = []
    for name, flag in (("without", []), ("with", ["--image_cache", str(folder)])):
        run = tmp_path / name
        assert train.main([*SMALL, *data, *flag, "--logger_name", str(run)]) == 0
        checkpoint = ["--checkpoint", str(run / "model_best.pth"), "--workers", "0"]
        assert evaluation.main([*data, *flag, *checkpoint]) == 0
        told.append(rsums(run))
    assert told[0] == told[1]
    assert len([path for path in folder.rglob("*") if path.is_file()]) == 32 + 16 + 16
    forbid_decoding(monkeypatch)
    assert evaluation.main([*data, *flag, *checkpoint]) == 0
