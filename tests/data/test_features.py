"""Cached features of a frozen encoder: the same numbers, keyed, shared, checked, resumed."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

import eval as evaluation
import train
from lib.data.features import PLAIN, FeatureCache, fill, wanted_views
from lib.data.sources import ImageFolderSource
from lib.errors import InputError, WorkerError
from lib.model.encoders import EncoderSource, ImageEncoder


@pytest.fixture
def files(tmp_path) -> list[str]:
    generator = np.random.default_rng(0)
    paths = [str(tmp_path / f"{row}.png") for row in range(5)]
    for path in paths:
        cv2.imwrite(path, generator.integers(0, 256, (40, 56, 3), dtype=np.uint8))
    return paths


def tiny_encoder(seed: int = 0, **changes) -> ImageEncoder:
    torch.manual_seed(seed)
    flags = {"img_res": 32, "tiny_width": 32, "tiny_patch_size": 8, "freeze": "image", **changes}
    return EncoderSource("tiny", "tiny", 16, vocab_size=60, max_word=20, **flags).image()


def open_cache(folder, encoder: ImageEncoder, views: int = 0) -> FeatureCache:
    layout = encoder.layout
    return FeatureCache(folder, encoder.digest(), layout.num_tokens, layout.width, views)


def encode_all(cache: FeatureCache, encoder: ImageEncoder, keys: list) -> int:
    with torch.no_grad():
        return fill(cache, keys, encoder.eval().hidden, encoder.img_res, batch_size=2)


def test_tokens_from_features_are_those_of_the_pixels(files, tmp_path):
    encoder = tiny_encoder()
    cache = open_cache(tmp_path / "cache", encoder)
    assert encode_all(cache, encoder, cache.missing(wanted_views(files, False, cache))) == 0
    source = cache.source(files, augment=False)
    pixels = torch.stack([ImageFolderSource(files, 32, False).read(row) for row in range(5)])
    features = torch.stack([source.sample(row).pixels for row in range(5)])
    assert (features.dtype, tuple(features.shape)) == (torch.float16, (5, 17, 32))
    with torch.no_grad():
        found, expected = encoder(features), encoder(pixels)
    torch.testing.assert_close(found.local, expected.local, atol=2e-3, rtol=2e-3)
    torch.testing.assert_close(found.cls, expected.cls, atol=2e-3, rtol=2e-3)


def test_augmented_views_are_drawn_and_differ_and_stay(files, tmp_path):
    encoder = tiny_encoder()
    cache = open_cache(tmp_path / "cache", encoder, views=3)
    keys = wanted_views(files, True, cache)
    assert len(keys) == 15
    encode_all(cache, encoder, keys)
    again = open_cache(tmp_path / "again", encoder, views=3)
    encode_all(again, encoder, keys[::-1])
    assert all(torch.equal(cache.read(key), again.read(key)) for key in keys)
    views = [cache.read((files[0], view)) for view in (1, 2, 3)]
    assert not torch.equal(views[0], views[1])
    source, rng = cache.source(files, augment=True), np.random.default_rng(0)
    drawn = [source.read(0, rng) for _ in range(40)]
    seen = {next(k for k in range(3) if torch.equal(one, views[k])) for one in drawn}
    assert seen == {0, 1, 2}


def test_what_is_there_is_not_encoded_again_and_a_changed_image_is(files, tmp_path):
    encoder = tiny_encoder()
    cache = open_cache(tmp_path / "cache", encoder)
    keys = wanted_views(files, False, cache)
    encode_all(cache, encoder, keys[:3])  # a run that was stopped
    assert open_cache(tmp_path / "cache", encoder).missing(keys) == keys[3:]
    encode_all(cache, encoder, keys[3:])
    assert cache.missing(keys) == []
    cv2.imwrite(files[1], np.zeros((8, 8, 3), np.uint8))
    os.utime(files[1], ns=(time.time_ns(), time.time_ns() + 1))
    assert cache.missing(keys) == [keys[1]]


def test_another_encoder_resolution_or_preprocessing_has_another_key():
    digests = {
        tiny_encoder().digest(),
        tiny_encoder(seed=1).digest(),
        tiny_encoder(img_res=40).digest(),
        tiny_encoder(img_res=(32, 40)).digest(),
    }
    assert len(digests) == 4
    assert tiny_encoder().digest() in digests
    changed = tiny_encoder()
    changed.proj.weight.data += 1  # what is learnt on top changes nothing
    assert changed.digest() == tiny_encoder().digest()


def test_a_damaged_file_counts_as_none_and_is_made_anew(files, tmp_path):
    encoder = tiny_encoder()
    cache = open_cache(tmp_path / "cache", encoder)
    keys = wanted_views(files, False, cache)
    encode_all(cache, encoder, keys)
    whole = cache.read(keys[0])
    entry = cache.entry(keys[0])
    data = bytearray(entry.read_bytes())
    data[-1] ^= 1
    entry.write_bytes(data)
    assert cache.missing(keys) == []  # its size is right: only the checksum tells
    sample = cache.source(files, augment=False).sample(0)
    assert (sample.pixels, sample.bad_path) == (None, files[0])
    assert cache.missing(keys) == [keys[0]]
    cache.entry(keys[1]).write_bytes(b"short")
    assert cache.missing(keys) == keys[:2]
    encode_all(cache, encoder, keys[:2])
    assert torch.equal(cache.read(keys[0]), whole)


def test_undecodable_images_are_counted_and_left_out(files, tmp_path):
    Path(files[2]).write_bytes(b"no image")
    encoder = tiny_encoder()
    cache = open_cache(tmp_path / "cache", encoder)
    assert encode_all(cache, encoder, wanted_views(files, False, cache)) == 1
    assert cache.read((files[2], PLAIN)) is None
    assert cache.read((files[3], PLAIN)) is not None


@pytest.mark.timeout(60)
def test_a_killed_worker_is_told(files, tmp_path, monkeypatch, quick_watch):
    def read(self, row, rng=None):
        os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr(ImageFolderSource, "read", read)
    cache = FeatureCache(tmp_path / "cache", "encoder", 2, 3)
    with pytest.raises(WorkerError, match="a loader worker was killed"):
        fill(cache, wanted_views(files, False, cache), lambda pixels: pixels, (8, 8), workers=1)


def test_numbers_beyond_float16_are_refused(files, tmp_path):
    cache = FeatureCache(tmp_path / "cache", "encoder", 2, 3)
    with pytest.raises(InputError, match="leaves the range of float16"):
        fill(cache, [(files[0], PLAIN)], lambda pixels: torch.full((1, 2, 3), 1e6), (8, 8))


def test_a_folder_that_cannot_be_made_is_refused(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"--feature_cache .* can't be written to"):
        FeatureCache(tmp_path / "file", "encoder", 2, 3)


# --- a frozen backbone -------------------------------------------------------------------------


def test_a_frozen_backbone_neither_learns_nor_drops_out():
    source = EncoderSource("tiny", "tiny", 16, 32, 60, 20, freeze="both")
    image, text = source.image(), source.text()
    for encoder in (image, text):
        encoder.backbone.config.hidden_dropout_prob = 0.5
        encoder.train()
        assert encoder.training
        assert not encoder.backbone.training
        asking = {name.split(".")[0] for name, p in encoder.named_parameters() if p.requires_grad}
        assert asking == {"proj"}
    tokens = image(torch.rand(2, 3, 32, 32))
    tokens.local.sum().backward()
    assert image.proj.weight.grad is not None
    assert EncoderSource("tiny", "tiny", 16, 32, 60, 20, freeze="text").image().frozen is False


# --- end to end --------------------------------------------------------------------------------

RUN = (
    "--dataset scenes --scenes_size 32,16,16 --img_res 64 --embed_size 32 --tiny_width 32 "
    "--tiny_layers 1 --batch_size 16 --workers 0 --num_epochs 1 --freeze image --image_augment 1 "
    "--feature_views 2"
).split()


@pytest.mark.parametrize("method", ["laps", "hrem"])
def test_training_and_evaluation_read_the_cache(method, scenes_path, tmp_path, monkeypatch, capsys):
    folder, run = str(tmp_path / "cache"), str(tmp_path / "run")
    flags = [*RUN, "--method", method, "--data_path", str(scenes_path), "--logger_name", run]
    assert train.main([*flags, "--feature_cache", folder]) == 0
    assert "80 to encode" in capsys.readouterr().out  # 32 images twice, 16 of dev
    checkpoint = ["--checkpoint", f"{run}/model_best.pth", "--data_path", str(scenes_path)]
    evaluate = [*checkpoint, "--save_results", "0", "--save_similarity"]
    assert evaluation.main([*evaluate, str(tmp_path / "pixels.npy")]) == 0
    cached = [*evaluate, str(tmp_path / "features.npy"), "--feature_cache", folder]
    assert evaluation.main(cached) == 0
    # a second run encodes nothing, and a second evaluation never runs the encoder
    monkeypatch.setattr("lib.model.encoders.image_tokens", None)
    assert evaluation.main(cached) == 0
    pixels, features = (np.load(tmp_path / f"{name}.npy") for name in ("pixels", "features"))
    apart = np.abs(pixels - features)  # float16 may tip the choice of a patch here and there
    assert np.median(apart) < 1e-3
    assert 0 < apart.max() < 0.05


def test_flags_that_serve_some_members_of_an_ensemble_are_taken(scenes_path, tmp_path, capsys):
    data, runs = ["--data_path", str(scenes_path)], {}
    tiny = "--dataset scenes --scenes_size 32,16,16 --img_res 64 --embed_size 32 --tiny_width 32 "
    tiny = [*tiny.split(), *"--tiny_layers 1 --batch_size 16 --workers 0 --num_epochs 1".split()]
    for method, frozen in {"laps": "image", "dense_text": "none"}.items():
        runs[method] = str(tmp_path / f"scenes_{method}")
        flags = ["--method", method, "--freeze", frozen, "--logger_name", runs[method]]
        assert train.main([*tiny, *data, *flags]) == 0
    home = ["--runs", str(tmp_path), "--workers", "0", *data]
    asked = ["--feature_cache", str(tmp_path / "cache"), "--selection_control", "inverted"]
    for members in (["laps", "dense_text"], ["dense_text", "laps"]):
        both = ["--ensemble", *(runs[name] for name in members)]
        assert evaluation.main([*home, *both, *asked]) == 0
        told = tmp_path / "ensembles" / "+".join(f"scenes_{name}" for name in members)
        found = json.loads((told / "results.json").read_text())["scenes_ensemble_inverted"]
        controlled = {one["method"]: "selection_control" in one for one in found["members"]}
        assert controlled == {"laps": True, "dense_text": False}
        assert found["selection_control"] == "inverted"
    assert "16 to encode" in capsys.readouterr().out
    texts = ["--ensemble", runs["dense_text"], runs["dense_text"]]
    for flag, why in zip((asked[:2], asked[2:]), ("no pixels", "keeps all"), strict=True):
        assert evaluation.main([*home, *texts, *flag]) == 2
        assert why in capsys.readouterr().err
    # each run by itself: the cache is passed over where it is of no use, a control is not
    assert evaluation.main([*home, "--dataset", "scenes", *asked[:2]]) == 0
    assert evaluation.main([*home, "--dataset", "scenes", *asked[2:]]) == 2
    assert "dense_text keeps all patches" in capsys.readouterr().err


def test_what_the_cache_can_not_serve_is_refused(scenes_path, tmp_path, capsys):
    flags = [*RUN, "--data_path", str(scenes_path), "--feature_cache", str(tmp_path / "cache")]
    run = ["--logger_name", str(tmp_path / "run")]
    assert train.main([*flags, *run, "--method", "avse"]) == 2
    assert "--method avse cuts into the image encoder" in capsys.readouterr().err
    assert train.main([*flags, *run, "--method", "laps", "--freeze", "text"]) == 2
    assert "add --freeze image" in capsys.readouterr().err
    assert train.main([*flags, *run, "--method", "dense_text"]) == 2
    assert "reads no pixels" in capsys.readouterr().err
    assert train.main([*flags, *run, "--method", "vse", "--precomp", "1"]) == 2
    assert "precomputed regions are no pixels" in capsys.readouterr().err
