"""Pictures of what a model sees: on the pixel, for every kind of method, data set and photo."""

from __future__ import annotations

import json

import cv2
import numpy as np
import pytest
import torch

from lib.data.images import decode
from lib.methods.registry import method_names
from lib.model.choice import PatchChoice
from lib.retrieval.evidence import Evidence, gather_evidence
from lib.retrieval.sheets import DIMMED, captions_sheet, pair_sheet
from tests.checkpoints.test_official import METHOD, WHOLE, backbones, official_payload
from tests.helpers import encode, pair_inputs, tiny_model
from tools.opened import open_checkpoint
from tools.visualize import Shown, evidence_of, main

pytest.importorskip("matplotlib")


def read(path) -> np.ndarray:
    return cv2.cvtColor(decode(str(path)), cv2.COLOR_BGR2RGB)


def panel(sheet, title):
    return next(one for one in sheet.panels if one.title.startswith(title))


@pytest.mark.parametrize("grid", [(8, 8), (4, 8), (7, 7)])
def test_the_grid_lands_on_known_boxes_to_the_pixel(grid, scenes_path, tmp_path):
    lines = (scenes_path / "scenes" / "scenes_facts.jsonl").read_text().splitlines()
    facts = json.loads(lines[3])
    image = read(scenes_path / "scenes" / "images" / f"{facts['image_id']:06d}.jpg")
    left, top, right, bottom = facts["things"][0]["box"]
    height, width = image.shape[0] / grid[0], image.shape[1] / grid[1]
    touched = np.zeros(grid, bool)
    for row in range(grid[0]):
        for column in range(grid[1]):
            across = column * width < right and (column + 1) * width > left
            touched[row, column] = across and row * height < bottom and (row + 1) * height > top
    kept = {"sparse": touched.ravel()}
    evidence = Evidence(
        image, "a thing", "seps", 0.0, grid, kept, {}, ("thing",), touched.ravel()[None] * 1.0
    )
    sheet = pair_sheet(evidence)
    sheet.save(tmp_path / "pair.png")
    drawn = read(tmp_path / "pair.png")

    plain, shown = panel(sheet, "image"), panel(sheet, "kept, sparse")
    size = plain.picture.shape[:2]
    assert size[0] % grid[0] == 0
    assert size[1] % grid[1] == 0
    original = drawn[plain.y : plain.y + size[0], plain.x : plain.x + size[1]].astype(int)
    dimmed = drawn[shown.y : shown.y + size[0], shown.x : shown.x + size[1]].astype(int)
    untouched = (original == dimmed).all(2)
    assert np.array_equal(original, plain.picture)  # the sheet scales nothing
    # what stays is exactly the rectangle of whole patches around the thing's box
    rows, columns = np.flatnonzero(touched.any(1)), np.flatnonzero(touched.any(0))
    step = size[0] // grid[0], size[1] // grid[1]
    wanted = np.zeros(size, bool)
    wanted[
        rows[0] * step[0] : (rows[-1] + 1) * step[0],
        columns[0] * step[1] : (columns[-1] + 1) * step[1],
    ] = True
    assert np.array_equal(untouched, wanted)
    scale = size[0] / image.shape[0], size[1] / image.shape[1]
    inside = slice(round(top * scale[0]), round(bottom * scale[0]))
    assert untouched[inside, round(left * scale[1]) : round(right * scale[1])].all()
    outside = ~wanted & (original.mean(2) > 100)
    assert np.allclose(dimmed[outside].mean(1), DIMMED * original[outside].mean(1), atol=1.5)


def test_the_grid_is_the_encoder_s():
    """A patch that is bright in the pixels is where the encoder's own features say it is."""
    model = tiny_model("chan").eval()
    pixels = torch.zeros(2, 3, 32, 32, dtype=torch.uint8)
    pixels[1, :, 8:16, 24:32] = 255  # row 1, column 3 of 4 x 4
    with torch.no_grad():
        embedded = [model.image_encoder.backbone.embeddings(p[None].float()) for p in pixels]
    changed = (embedded[0] - embedded[1]).abs().sum(-1)[0, 1:]  # without [CLS]
    assert changed.argmax().item() == 1 * model.image_encoder.grid[1] + 3


def test_a_word_s_boxes_are_its_best_kept_patches():
    cosines = np.array([[0.9, 0.1, 0.8, 0.7]])
    plain = Evidence(np.zeros((8, 8, 3), np.uint8), "x", "scan", 0.0, (2, 2), cosines=cosines)
    assert plain.best(0, 2).tolist() == [0, 2]
    kept = {"sparse": np.array([False, True, True, True])}
    some = Evidence(np.zeros((8, 8, 3), np.uint8), "x", "seps", 0.0, (2, 2), kept, cosines=cosines)
    assert some.best(0, 2).tolist() == [2, 3]


@pytest.mark.parametrize("side", ["image", "caption", "none"])
def test_seps_names_its_parts_and_they_add_up(side):
    model = tiny_model("seps", dense_side=side).eval()
    images, texts = encode(model, pair_inputs(dense_side=side))
    choice = model.patch_choice(images, texts)
    assert isinstance(choice, PatchChoice)
    parts = choice.scores
    beta = model.beta
    whole = (1 - 2 * beta) * parts["s^p"] + beta * (parts["s^st"] + parts["s^im"])
    assert torch.allclose(parts["sparse"], whole, atol=1e-6)
    assert set(choice.kept) == ({"sparse"} if side == "none" else {"sparse", "dense"})
    if side != "none":
        dense = (1 - 2 * beta) * parts["s^p"] + beta * (parts["s^dt"] + parts["s^im"])
        assert torch.allclose(parts["dense"], dense, atol=1e-6)
    for branch, kept in choice.kept.items():
        assert (kept.sum(-1) == model.kept).all()
        lowest = parts[branch].masked_fill(~kept, 9).amin(-1)
        assert (lowest >= parts[branch].masked_fill(kept, -9).amax(-1)).all()


@pytest.mark.parametrize("method", [one for one in method_names() if one != "dense_text"])
def test_every_method_is_drawn_or_says_why_not(method, make_checkpoint, photos, tmp_path):
    try:
        opened = open_checkpoint(make_checkpoint(method))
    except ValueError as error:
        pytest.skip(str(error))
    file = next(photos.glob("*.jpg"))
    evidence = gather_evidence(
        opened.model,
        opened.photo(file, "a red star"),
        opened.captions(["a red star", "a blue ring"], "a red star"),
        read(file),
        ["a red star", "a blue ring"],
        [opened.words("a red star"), opened.words("a blue ring")],
    )
    assert [one.caption for one in evidence] == ["a red star", "a blue ring"]
    for one in evidence:
        assert bool(one.note) == (not one.kept)
        if one.grid is not None:
            assert one.cosines.shape == (len(one.words), one.grid[0] * one.grid[1])
    assert pair_sheet(evidence[0]).render().ndim == 3
    assert captions_sheet(evidence).render().ndim == 3


def test_images_of_the_data_set(make_checkpoint, tmp_path, capsys):
    checkpoint = make_checkpoint("seps")
    flags = ["--checkpoint", str(checkpoint), "--out", str(tmp_path)]
    sizes = ["--captions", "2"]
    # 64-pixel scenes of the fixture, not those that --scenes_size would draw
    assert main([*flags, *sizes, "--random", "1", "--seed", "3"]) == 0
    files = sorted(path.name for path in tmp_path.glob("*.png"))
    assert len(files) == 3
    image = files[0].split("_")[0]
    assert main([*flags, *sizes, "--image", image, "--name", "again"]) == 0
    again = decode(str(tmp_path / "again_1.png"))
    assert np.array_equal(again, decode(str(tmp_path / f"{image}_1.png")))
    assert main([*flags, "--image", "nothing"]) == 2
    assert main([*flags]) == 2
    assert "--image ID" in capsys.readouterr().err


def test_a_photo_with_and_without_its_dense_text(make_checkpoint, photos, tmp_path, capsys):
    file = str(next(photos.glob("*.jpg")))
    flags = ["--checkpoint", str(make_checkpoint("seps")), "--out", str(tmp_path)]
    photo = ["--image_file", file, "--caption", "a red star"]
    assert main([*flags, *photo, "--dense", "a red star", "--name", "with"]) == 0
    assert "tools.describe" not in capsys.readouterr().out
    assert main([*flags, *photo, "--name", "without"]) == 0
    assert "tools.describe" in capsys.readouterr().out
    heights = [decode(str(tmp_path / f"{one}_1.png")).shape for one in ("with", "without")]
    assert heights[0] != heights[1]  # the dense branch has panels of its own
    assert main([*flags, "--image_file", file]) == 2


@pytest.mark.parametrize("name", WHOLE)
def test_an_official_checkpoint_is_drawn(name, photos, tmp_path, capsys):
    checkpoint = tmp_path / "model_best.pth"
    torch.save(official_payload(name), checkpoint)
    vit, bert = backbones(name)
    file = next(photos.glob("*.jpg"))
    flags = ["--checkpoint", str(checkpoint), "--method", METHOD[name], "--out", str(tmp_path)]
    flags += ["--vit_path", vit, "--bert_path", bert, "--image_file", str(file), "--name", "own"]
    captions = ["a red star", "a blue ring"]
    wants_dense = METHOD[name] == "seps_released"
    dense = ["--dense", "a big red star above a blue ring"] if wants_dense else []
    assert main([*flags, "--caption", *captions, *dense]) == 0
    for written in ("own_1", "own_2", "own_captions"):
        assert decode(str(tmp_path / f"{written}.png")) is not None
    opened = open_checkpoint(checkpoint, METHOD[name], vit, bert)
    shown = Shown("own", str(file), captions, dense[1] if dense else None)
    first, second = evidence_of(shown, opened)
    assert set(first.kept) == ({"sparse", "dense"} if wants_dense else {"sparse"})
    side = 8 if name.endswith("vit") else 6
    assert first.grid == (side, side)
    model = opened.model
    for one in (first, second):  # what is drawn is what the method computes
        kept = next(iter(one.kept.values()))
        assert kept.sum() == model.network.kept < kept.size
        with torch.inference_mode():
            texts = model.encode_text_batch(opened.captions([one.caption], shown.dense))
            images = model.encode_image_batch(opened.photo(file, shown.dense))
            similarity = float(model.similarity(images, texts))
        assert one.similarity == pytest.approx(similarity, abs=1e-5)
    assert not wants_dense or "tools.describe" not in capsys.readouterr().out
    if wants_dense:  # without a dense text it says what is missing
        assert main([*flags, "--caption", *captions]) in (0, 2)
        said = capsys.readouterr()
        assert "tools.describe" in said.out + said.err
