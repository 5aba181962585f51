"""--cached_batch against the ordinary step: gradients, steps, rows at once, what it refuses."""

from __future__ import annotations

import math
from contextlib import nullcontext
from functools import partial

import pytest
import torch
import torch.multiprocessing as mp
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import train
from lib import distributed
from lib.batch import Batch
from lib.errors import InputError
from lib.methods.registry import method_names
from lib.model import chunks
from lib.model.precision import DTYPES, autocast_for
from lib.training.optim import build_optimizer
from lib.training.setup import encode_in_chunks, recompute_backbones
from lib.training.update import Update
from tests.helpers import tiny_model, untied_inputs
from tests.training.test_distributed import free_port

PAIRS, ROWS = 7, 3  # chunks of 3, 3 and 1
CPU = torch.device("cpu")


def model_of(method: str, rows: int, hard: bool = True, **flags):
    """A tiny model in training mode and float64 that encodes so many rows at once."""
    model = tiny_model(method, **flags).train().double()
    model.set_hard_negatives(hard)
    encode_in_chunks(model, rows)
    return model


def gradients(model, method: str, autocast=nullcontext, **flags) -> dict[str, torch.Tensor | None]:
    torch.manual_seed(0)
    with autocast():
        losses = model.training_losses(**untied_inputs(PAIRS, method, **flags))
    losses["loss"].backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def assert_same(found: dict, expected: dict, **tolerance) -> None:
    tolerance = tolerance or {"atol": 1e-9, "rtol": 1e-9}
    for name, one in expected.items():
        assert (found[name] is None) == (one is None), name
        if one is not None:
            torch.testing.assert_close(found[name], one, msg=name, **tolerance)


@pytest.mark.parametrize("hard", [False, True])
@pytest.mark.parametrize("method", method_names())
def test_every_method_has_the_gradient_of_the_ordinary_step(method, hard):
    cached, whole = (gradients(model_of(method, rows, hard), method) for rows in (ROWS, 0))
    assert any(one is not None and one.abs().max() > 1e-3 for one in whole.values())
    assert_same(cached, whole)


FLAGS = [
    ("seps", {"dense_side": "caption", "relevance": "topk_mlp"}),
    ("seps", {"selection": "gumbel", "dense_match": "max_mean"}),
    ("seps", {"dense_match": "sentence"}),
    ("seps", {"loss": "infonce", "global_weight": 0.5}),
    ("seps", {"loss": "trip", "freeze": "text"}),
    ("laps", {"detach_patches": 1}),
    ("laps", {"freeze": "image", "embed_size": 24}),
    ("laps", {"freeze": "both"}),
    ("laps", {"text_encoder": "gru", "gru_dropout": 0.0}),
    ("avse", {"avse_keep_train": 0.6, "size_augment": 1, "avse_dropout": 0.2}),
    ("avse", {"freeze": "image"}),
    ("d2s", {"d2s_dropout": 0.2, "size_augment": 1}),
    ("saf", {"sgraf_dropout": 0.4}),
]


@pytest.mark.parametrize(("method", "flags"), FLAGS)
def test_flags_change_nothing_of_that(method, flags):
    """Chance beside the encoders falls on the whole batch at once: as in the ordinary step."""
    found = (gradients(model_of(method, rows, **flags), method, **flags) for rows in (ROWS, 0))
    assert_same(*found)


def test_a_low_rank_side_has_the_gradient_of_the_ordinary_step():
    pytest.importorskip("peft")
    flags = {"lora_rank": 2, "freeze": "text"}
    cached, whole = (gradients(model_of("laps", rows, **flags), "laps") for rows in (ROWS, 0))
    assert any("lora_" in name for name, one in cached.items() if one is not None)
    assert_same(cached, whole)


@pytest.mark.parametrize("method", ["laps", "seps", "hrem"])
def test_two_steps_end_at_the_same_weights(method):
    ends = []
    for rows in (ROWS, 0):
        model = model_of(method, rows)
        optimizer = build_optimizer(model, 1e-3)
        update = Update(model, model, optimizer, CPU, nullcontext, grad_clip=2.0)
        groups = [
            [Batch(**untied_inputs(PAIRS, method, seed=2 * step + one)) for one in range(2)]
            for step in range(2)
        ]
        norms = [update.step(group).norm for group in groups]
        ends.append({**model.state_dict(), "norms": torch.tensor(norms)})
    assert_same(*ends, atol=1e-7, rtol=1e-7)


def test_recomputing_backbones_go_with_it():
    models = [model_of("laps", rows) for rows in (ROWS, 0)]
    recompute_backbones(models[0])
    assert_same(*(gradients(model, "laps") for model in models))


# --- chance in the encoders --------------------------------------------------------------------


def with_dropout(model, share: float):
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = share
    return model


def with_a_graph(function, size, rows, *weights):
    """What gradient caching stands for: the same chunks, all of their graphs kept."""
    parts = zip(*(one.split(size) for one in rows), strict=True)
    return torch.cat([function(*part) for part in parts])


@pytest.mark.parametrize("flags", [{}, {"text_encoder": "gru", "gru_dropout": 0.4}])
def test_a_chunk_drops_the_same_both_times(flags, monkeypatch):
    cached = gradients(with_dropout(model_of("seps", ROWS, **flags), 0.3), "seps")
    after = torch.rand(())
    monkeypatch.setattr(chunks._ComputedAgain, "apply", with_a_graph)
    kept = gradients(with_dropout(model_of("seps", ROWS, **flags), 0.3), "seps")
    assert_same(cached, kept)
    assert torch.rand(()) == after  # the backward pass left the random numbers where they were
    without = gradients(with_dropout(model_of("seps", ROWS, **flags), 0.0), "seps")
    name = next(one for one in kept if one.startswith("text_encoder") and kept[one] is not None)
    assert not torch.allclose(kept[name], without[name])


@pytest.mark.gpu
@pytest.mark.parametrize("amp", ["off", "bf16", "fp16"])
def test_a_chunk_drops_the_same_on_the_gpu(amp, monkeypatch):
    cuda = torch.device("cuda")
    batch = Batch(**untied_inputs(PAIRS, "laps")).to(cuda)
    found, seen = [], set()
    for keeps_graphs in (False, True):
        model = with_dropout(model_of("laps", ROWS), 0.3).float().to(cuda)
        model.text_encoder.proj.register_forward_hook(lambda _, __, output: seen.add(output.dtype))
        if keeps_graphs:
            monkeypatch.setattr(chunks._ComputedAgain, "apply", with_a_graph)
        torch.manual_seed(0)
        with autocast_for(amp, cuda)():
            words = batch.ids, batch.lengths, batch.image_ids
            loss = model.training_losses(batch.pixels, *words)["loss"]
        loss.backward()
        found.append({name: one.grad for name, one in model.named_parameters()})
    for name, kept in found[1].items():
        far = (found[0][name] - kept).norm()
        assert far <= (1e-4 if amp == "off" else 0.03) * kept.norm() + 1e-3, name
    assert seen == {DTYPES.get(amp, torch.float32)}  # when encoded again too


# --- mixed precision, faults -------------------------------------------------------------------


@pytest.mark.parametrize("amp", ["bf16", "fp16"])
def test_mixed_precision_differs_by_its_own_rounding(amp):
    found = []
    for rows in (ROWS, 0):
        model = model_of("laps", rows).float()
        found.append(gradients(model, "laps", autocast_for(amp, CPU)))
    for name, whole in found[1].items():
        if whole is not None:
            far = (found[0][name] - whole).norm()
            assert far <= 0.03 * whole.norm() + 1e-3, name


def test_chunks_are_computed_again_in_the_same_arithmetic():
    model, seen = model_of("laps", ROWS, embed_size=24).float(), []
    model.text_encoder.proj.register_forward_hook(lambda _, __, output: seen.append(output.dtype))
    gradients(model, "laps", autocast_for("bf16", CPU))
    assert seen == [torch.bfloat16] * 6


def test_the_loss_scale_is_taken_out_again():
    norms = []
    for rows in (ROWS, 0):
        model = model_of("chan", rows).float()
        optimizer, autocast = build_optimizer(model, 1e-4), autocast_for("fp16", CPU)
        update = Update(model, model, optimizer, CPU, autocast, "fp16", grad_clip=2.0)
        update.scaler = torch.amp.GradScaler("cpu", init_scale=256.0)  # the first one overflows
        norms.append(update.step([Batch(**untied_inputs(PAIRS, "chan"))]).norm)
    assert norms[0] == pytest.approx(norms[1], rel=0.02)


def test_what_is_not_finite_is_told_and_changes_no_weight():
    model = model_of("chan", ROWS)
    before = {name: one.clone() for name, one in model.state_dict().items()}
    batch = Batch(**untied_inputs(PAIRS, "chan"))
    batch.pixels = batch.pixels.double() / 255
    batch.pixels[-1] = math.inf
    update = Update(model, model, build_optimizer(model, 1e-3), CPU, nullcontext)
    assert update.step([batch]).not_finite
    assert_same(model.state_dict(), before, atol=0, rtol=0)


# --- what is encoded how often -----------------------------------------------------------------


def rows_encoded(model, method: str, **flags) -> dict[str, list[int]]:
    """The rows of each call of the two backbones in one step."""
    seen: dict[str, list[int]] = {"image": [], "text": []}

    def note(side: str):
        return lambda module, _, __, output: seen[side].append(len(output.last_hidden_state))

    model.image_encoder.backbone.register_forward_hook(note("image"), with_kwargs=True)
    model.text_encoder.backbone.register_forward_hook(note("text"), with_kwargs=True)
    gradients(model, method, **flags)
    return seen


def test_encoders_are_given_a_chunk_at_a_time_and_each_twice():
    assert rows_encoded(model_of("laps", ROWS), "laps") == {
        "image": [3, 3, 1] * 2,
        "text": [3, 3, 1] * 2,
    }


def test_a_frozen_side_is_encoded_once():
    model = model_of("laps", ROWS, freeze="image", embed_size=24)  # its projection learns
    assert rows_encoded(model, "laps") == {"image": [3, 3, 1], "text": [3, 3, 1] * 2}


@pytest.mark.parametrize("rows", [0, PAIRS, PAIRS + 1])
def test_a_batch_that_is_no_larger_takes_the_ordinary_step(rows):
    assert rows_encoded(model_of("laps", rows), "laps") == {"image": [PAIRS], "text": [PAIRS]}


def test_views_of_images_are_encoded_in_chunks_too():
    model, seen = model_of("avse", ROWS), []
    model.image_encoder.backbone.embeddings.register_forward_hook(
        lambda module, _, output: seen.append(len(output))
    )
    gradients(model, "avse")
    assert seen == [3, 3, 1] * 2


def test_dense_texts_and_a_teacher_are_encoded_in_chunks_too():
    model = model_of("seps", ROWS)
    assert max(rows_encoded(model, "seps")["text"]) == ROWS
    model, seen = model_of("d2s", ROWS), []
    model.teacher.encoder.backbone.register_forward_hook(
        lambda module, _, output: seen.append(len(output.last_hidden_state))
    )
    gradients(model, "d2s")
    assert seen == [3, 3, 1]


def test_texts_are_read_as_before_training_in_chunks_too():
    flags = {"dense_match": "sentence", "dense_side": "none"}
    model, seen = model_of("seps", ROWS, **flags), []
    model.text_encoder.sentence.backbone.register_forward_hook(
        lambda module, _, output: seen.append(len(output.last_hidden_state))
    )
    gradients(model, "seps", **flags)
    assert max(seen) == ROWS


# --- two processes -----------------------------------------------------------------------------

SHARES = [slice(0, 4), slice(4, 7)]


def accumulated(method: str, rows: int, share: slice, wrap=lambda model: model) -> dict:
    """The weights after two steps of two batches each, of whose pairs a process has a `share`."""
    model = model_of(method, rows)
    update = Update(
        model, wrap(model), build_optimizer(model, 1e-3), CPU, nullcontext, grad_clip=2.0
    )
    for step in range(2):
        drawn = [untied_inputs(PAIRS, method, seed=2 * step + one) for one in range(2)]
        mine = [{name: value[share] for name, value in one.items()} for one in drawn]
        update.step([Batch(**one) for one in mine])
    return dict(model.state_dict())


def train_share(rank: int, port: int, methods: list[str], results) -> None:
    torch.set_num_threads(1)
    distributed.start("gloo", f"tcp://127.0.0.1:{port}", 2, rank)
    for method in methods:
        wrap = partial(DistributedDataParallel, find_unused_parameters=method == "ilaps")
        found = accumulated(method, 2, SHARES[rank], wrap)
        results[rank, method] = {name: one.numpy() for name, one in found.items()}
    distributed.stop()


@pytest.mark.slow
def test_two_processes_that_accumulate_equal_one():
    methods = ["seps", "avse", "ilaps", "d2s", "saf"]
    with mp.Manager() as manager:
        results = manager.dict()
        mp.spawn(train_share, (free_port(), methods, results), nprocs=2)
        results = dict(results)
    for method in methods:
        whole = accumulated(method, 0, slice(None))
        for rank in range(2):
            found = {k: torch.from_numpy(one) for k, one in results[rank, method].items()}
            assert_same(found, whole, atol=1e-7, rtol=1e-6)


# --- the flag ----------------------------------------------------------------------------------


def test_a_batch_norm_in_an_encoder_is_refused_unless_frozen():
    for freeze, refused in (("none", True), ("image", False)):
        model = tiny_model("laps", freeze=freeze)
        model.image_encoder.backbone.add_module("norm", nn.BatchNorm2d(4))
        with pytest.raises(InputError, match="BatchNorm") if refused else nullcontext():
            encode_in_chunks(model, 2)
        encode_in_chunks(model, 0)


def test_a_negative_number_is_refused(tmp_path, capsys):
    folder = str(tmp_path / "run")
    assert train.main(["--cached_batch", "-1", "--logger_name", folder]) == 2
    assert "--cached_batch -1: give a whole number of at least 0" in capsys.readouterr().err
