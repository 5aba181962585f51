"""The real path of transformers with a tiny random LLaVA."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
import transformers

pytest.importorskip("PIL")
if transformers.__version__.startswith("4."):
    pytest.skip("the backend needs transformers 5", allow_module_level=True)

from lib.data.describe.outcomes import Sampling, Task
from lib.data.describe.transformers_backend import TransformersBackend
from lib.errors import InputError
from tests.data.describe.tiny_llava import save_tiny_llava
from tests.data.prepare.pictures import picture_folder


@pytest.fixture(scope="module")
def llava(tmp_path_factory) -> str:
    return str(save_tiny_llava(tmp_path_factory.mktemp("llava")))


@pytest.fixture(scope="module")
def tasks(tmp_path_factory) -> list[Task]:
    root = tmp_path_factory.mktemp("pics")
    return [Task(name[:-4], name, root / name) for name in picture_folder(root, 5)]


def outcomes(llava, tasks, batch_size=2, dtype="fp32", seed=0, **sampling):
    sampling = Sampling(**{"max_new_tokens": 6, **sampling})
    backend = TransformersBackend(llava, sampling, batch_size, dtype, seed=seed)
    found = {}
    backend.describe(tasks, lambda task, outcome: found.update({task.name: outcome}))
    return found


def test_texts_do_not_depend_on_the_batch(llava, tasks):
    """Greedy: padding on the left and the other images of a batch change nothing."""
    alone = outcomes(llava, tasks, batch_size=1, temperature=0)
    together = outcomes(llava, tasks, batch_size=3, temperature=0)
    assert list(together) == [task.name for task in tasks]
    assert together == alone
    assert len({one.text for one in alone.values()}) > 1  # the image reaches the text


def test_the_prompt_is_not_part_of_the_text(llava, tasks):
    for one in outcomes(llava, tasks).values():
        assert "Provide" not in (one.text or "")
        assert "ASSISTANT" not in (one.text or "").split(" ")[0]
        assert one.cut in (True, False)


def test_drawing_follows_the_seed(llava, tasks):
    hot = {"temperature": 1.0, "top_p": 1.0, "max_new_tokens": 12}
    first = outcomes(llava, tasks, **hot)
    assert outcomes(llava, tasks, **hot) == first
    assert outcomes(llava, tasks, seed=1, **hot) != first


def test_bf16_and_a_bad_image_among_good_ones(llava, tasks, tmp_path):
    (tmp_path / "bad.jpg").write_bytes(b"no image")
    bad = Task("bad", "bad.jpg", tmp_path / "bad.jpg")
    found = outcomes(llava, [tasks[0], bad, tasks[1]], 3, "bf16")
    assert "can't be read" in found["bad.jpg"].reason
    assert set(found) == {"p00.jpg", "bad.jpg", "p01.jpg"}


def test_a_batch_too_large_for_the_memory_is_halved(llava, tasks, monkeypatch):
    expected = outcomes(llava, tasks, 1, temperature=0)
    original, sizes = TransformersBackend._generate, []

    def small_memory(self, images):
        sizes.append(len(images))
        if len(images) > 2:
            raise torch.OutOfMemoryError("no room")
        return original(self, images)

    monkeypatch.setattr(TransformersBackend, "_generate", small_memory)
    assert outcomes(llava, tasks, 5, temperature=0) == expected
    assert sizes == [5, 2, 3, 1, 2]


def test_models_that_can_not_be_used_are_told(llava, tmp_path, backbones):
    with pytest.raises(InputError, match="can't be loaded as an image-text-to-text model"):
        TransformersBackend(backbones["vit"], Sampling())
    folder = shutil.copytree(llava, tmp_path / "mute")
    for path in folder.glob("*.jinja"):
        path.unlink()
    for path in folder.glob("*.json"):
        told = json.loads(path.read_text())
        told.pop("chat_template", None)
        path.write_text(json.dumps(told))
    with pytest.raises(InputError, match="no chat template"):
        TransformersBackend(str(folder), Sampling())


def test_an_older_transformers_is_refused(llava, monkeypatch):
    monkeypatch.setattr(transformers, "__version__", "4.57.1")
    with pytest.raises(InputError, match=r"needs transformers 5, here is 4\.57\.1.*--base_url"):
        TransformersBackend(llava, Sampling("what is here?"))
