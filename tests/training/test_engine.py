"""What the engine does with each step: hard negatives, warm-up, accumulation, dropout, resuming."""

from __future__ import annotations

import os
import signal
from contextlib import nullcontext

import numpy as np
import pytest
import torch

import train
from lib.batch import Batch
from lib.checkpoints.payloads import read_payload
from lib.model.losses import AlignmentLoss
from lib.retrieval.evaluation import SplitLoaders, split_similarity
from lib.training.engine import Trainer
from lib.training.optim import build_optimizer
from lib.training.update import Update
from tests.helpers import pair_inputs, tiny_model

SMALL = (
    "--dataset scenes --scenes_size 32,16,16 --img_res 64 --embed_size 32 --tiny_width 32 "
    "--tiny_layers 1 --batch_size 16 --workers 0 --val_step 1000"
)


def run(data, folder, *flags: str) -> int:
    return train.main(
        [*SMALL.split(), "--data_path", str(data), "--logger_name", str(folder), *flags]
    )


def test_negatives_and_warm_up_follow_the_epochs(scenes_path, tmp_path, monkeypatch):
    seen = []
    forward = AlignmentLoss.forward

    def noted(self, similarity, image_ids):
        seen.append((self.hard_negatives, self.scale))
        return forward(self, similarity, image_ids)

    monkeypatch.setattr(AlignmentLoss, "forward", noted)
    flags = "--method chan --num_epochs 3 --vse_mean_warmup_epochs 2 --embedding_warmup_epochs 1"
    assert run(scenes_path, tmp_path / "run", *flags.split()) == 0
    steps = len(seen) // 3
    assert steps > 1
    rising = [(step + 1) / steps for step in range(steps)]
    expected = [1.0] * steps + rising + [1.0] * steps
    assert [scale for _, scale in seen] == pytest.approx(expected)
    assert [hard for hard, _ in seen] == [False] * 2 * steps + [True] * steps


def batches(method: str, count: int) -> list[Batch]:
    """Batches of unlike losses."""
    return [Batch(**pair_inputs(6, method, seed=seed)) for seed in range(count)]


def update(model) -> Update:
    device = torch.device("cpu")
    optimizer = build_optimizer(model, 1e-4)
    return Update(model, model, optimizer, device, nullcontext)


def test_accumulated_batches_are_averaged():
    group = batches("chan", 3)
    model = tiny_model("chan").train()
    single = []
    for batch in group:
        model.zero_grad()
        update(model)._forward_backward([batch])
        single.append({n: p.grad.clone() for n, p in model.named_parameters()})
    model.zero_grad()
    losses, norm = update(model)._forward_backward(group)
    for name, parameter in model.named_parameters():
        mean = sum(one[name] for one in single) / 3
        torch.testing.assert_close(parameter.grad, mean, atol=1e-6, rtol=1e-4)
    squares = sum(float(p.grad.square().sum()) for p in model.parameters())
    assert norm == pytest.approx(squares**0.5, rel=1e-5)
    each = [update(model)._forward_backward([batch])[0]["loss"] for batch in group]
    assert losses["loss"] == pytest.approx(np.mean(each), rel=1e-5)


def with_dropout(model, share: float = 0.5):
    """The model, every output of its text encoder dropped by chance while it trains."""
    dropout = torch.nn.Dropout(share)
    model.add_module("chance", dropout)
    encode = model.encode_texts

    def encode_texts(*args, **kwargs):
        tokens = encode(*args, **kwargs)
        tokens.local = dropout(tokens.local)
        return tokens

    model.encode_texts = encode_texts
    return model


def test_evaluation_has_no_dropout_and_gives_the_mode_back():
    model = with_dropout(tiny_model("chan")).train()
    inputs = pair_inputs(6, "chan")
    loaders = SplitLoaders(
        images=[Batch(pixels=inputs["pixels"])],
        captions=[Batch(ids=inputs["ids"], lengths=inputs["lengths"])],
        caption_images=np.arange(6),
        num_images=6,
    )
    call = model, loaders, torch.device("cpu"), torch.no_grad, False
    found = split_similarity(*call)
    assert model.training
    assert np.array_equal(found, split_similarity(*call))
    model.eval()
    assert np.array_equal(found, split_similarity(*call))
    assert not model.training


@pytest.mark.parametrize("rows", ["0", "5"])
def test_resuming_goes_on_with_the_random_numbers(
    scenes_path, backbones, tmp_path, monkeypatch, rows
):
    """A backbone with dropout 0.1 trains to the same weights whether it was stopped or not."""
    flags = ["--method", "chan", "--num_epochs", "1", "--bert_path", backbones["bert"]]
    flags += ["--save_step", "1000", "--cached_batch", rows]
    assert run(scenes_path, tmp_path / "whole", *flags) == 0
    step = Trainer._step

    def stopped(self, *args, **kwargs):
        outcome = step(self, *args, **kwargs)
        if self.progress.step == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return outcome

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_step", stopped)
        run(scenes_path, tmp_path / "cut", *flags)
    halfway = read_payload(tmp_path / "cut" / "checkpoint_last.pth")
    assert halfway["training"]["progress"]["step"] == 3
    torch.manual_seed(12345)  # what another process would start with
    assert train.main(["--resume", str(tmp_path / "cut")]) == 0
    whole, cut = (
        read_payload(tmp_path / name / "checkpoint_last.pth")["model"] for name in ("whole", "cut")
    )
    assert whole.keys() == cut.keys()
    for name, weight in whole.items():
        torch.testing.assert_close(cut[name], weight, atol=0, rtol=0, msg=name)
