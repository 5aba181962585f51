"""Train, validate, save, stop and go on; sole owner of the step counter."""

from __future__ import annotations

import math
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from lib.batch import Batch
from lib.checkpoints.checkpoint import BEST, LAST
from lib.distributed import (
    all_true,
    barrier,
    gather_values,
    is_main,
    rank,
    sum_over_ranks,
    world_size,
)
from lib.errors import InputError, NonFiniteError
from lib.methods.base import Method
from lib.model.precision import autocast_for, scaler_for
from lib.retrieval.evaluation import SplitLoaders, evaluate_split
from lib.training.clock import Clock
from lib.training.logs import RunLog, flatten_metrics
from lib.training.optim import Schedule, set_learning_rate

RESUMED_WITH_NEW_FLAGS = ("base_lr", "weight_decay", "betas")
LOWEST_LOSS_SCALE = 2.0**-14  # fp16: below this, gradients overflow whatever the scale


@dataclass
class Settings:
    """How long, how often and how carefully to train; the flags of the same names."""

    num_epochs: int = 30
    grad_clip: float = 2.0
    grad_accum: int = 1
    log_step: int = 200
    val_step: int = 500
    save_step: int = 1000
    vse_mean_warmup_epochs: int = 1
    embedding_warmup_epochs: int = 0
    max_violation: bool = False
    max_bad_images: int = 100
    skip_nonfinite: int = 0
    amp: str = "off"


@dataclass
class Progress:
    """Where a run stands; all of it is saved, so that resuming goes on as if nothing happened."""

    epoch: int = 0
    batch: int = 0  # batches of this epoch already used
    pairs_per_batch: int = 0  # of all processes together
    step: int = 0  # optimizer steps
    best_rsum: float = -1.0
    last_rsum: float = -1.0
    validated_step: int = -1
    skipped: int = 0  # non-finite steps in a row
    bad_images: list[str] = field(default_factory=list)


class Trainer:
    """Trains on what `train_batches(epoch, first_batch)` yields: (Batch or None, bad paths).

    `save(file_name, trainer)` writes a checkpoint; the trainer decides when. `picture(model)` draws
    what goes to TensorBoard with each validation.
    """

    def __init__(
        self,
        model: Method,
        optimizer: torch.optim.Optimizer,
        schedule: Schedule,
        train_batches: Callable[[int, int], Iterator[tuple[Batch | None, list[str]]]],
        batches_per_epoch: int,
        pairs_per_batch: int,
        image_names: Sequence[str],
        validation: SplitLoaders,
        settings: Settings,
        device: torch.device,
        log: RunLog,
        save: Callable[[str, Trainer], None],
        picture: Callable[[Method], Any] | None = None,
    ) -> None:
        self.model = model
        self.optimizer = optimizer
        self.schedule = schedule
        self.train_batches = train_batches
        self.batches_per_epoch = batches_per_epoch
        self.image_names = image_names
        self.validation = validation
        self.settings = settings
        self.device = device
        self.log = log
        self.save = save
        self.picture = picture
        self.progress = Progress(pairs_per_batch=pairs_per_batch)
        self.autocast = autocast_for(settings.amp, device)
        self.scaler = scaler_for(settings.amp, device)
        self.network = self._distribute(model)
        self.stop_signal: int | None = None

    def _distribute(self, model: Method) -> nn.Module:
        if world_size() == 1:
            return model
        devices = [self.device.index] if self.device.type == "cuda" else None
        return DistributedDataParallel(
            model, device_ids=devices, find_unused_parameters=model.may_leave_unused
        )

    # --- the run -------------------------------------------------------------------------------

    def fit(self) -> bool:
        """Train to the last epoch; return False where a signal stopped it early.

        Raises NonFiniteError, InputError (too many bad images) or OSError (checkpoint not written).
        """
        with self._catch_signals():
            for epoch in range(self.progress.epoch, self.settings.num_epochs):
                self.progress.epoch = epoch
                if not self._train_epoch(epoch):
                    self.save(LAST, self)
                    return False
                self.progress.epoch, self.progress.batch = epoch + 1, 0
                if self.progress.validated_step != self.progress.step:
                    self.validate()
                self.save(LAST, self)
        return True

    def _train_epoch(self, epoch: int) -> bool:
        hard = self.settings.max_violation or epoch >= self.settings.vse_mean_warmup_epochs
        self.model.set_hard_negatives(hard)
        self.model.train()
        clock, bad_images = Clock(), set()
        batches = self.train_batches(epoch, self.progress.batch)
        with self._bar(epoch) as bar:
            group: list[Batch] = []
            waiting = 0  # batches read since the last step
            for batch, bad_paths in clock.waiting(batches, lambda: self.stop_signal is not None):
                waiting += 1
                if self._usable(batch, bad_paths, bad_images):
                    group.append(batch)
                last = self.progress.batch + waiting == self.batches_per_epoch
                if waiting == self.settings.grad_accum or last:
                    self.progress.batch += waiting
                    if group:
                        self._step(group, epoch, clock, bar)
                    group, waiting = [], 0
                    if self._should_stop():
                        return False
        if bad_images:
            self.log.say(
                f"epoch {epoch}: {len(bad_images)} images could not be decoded and were left out"
            )
        return self.progress.batch == self.batches_per_epoch

    def _usable(self, batch: Batch | None, bad_paths: list[str], bad_images: set[str]) -> bool:
        """Return True where every rank has a batch; note what any of them could not decode."""
        empty, bad = sum_over_ranks([int(batch is None), len(bad_paths)], self.device)
        if bad:
            paths = [path for paths in gather_values(bad_paths) for path in paths]
            bad_images.update(paths)
            self._note_bad(paths)
        return not empty

    def _step(self, group: list[Batch], epoch: int, clock: Clock, bar: tqdm) -> None:
        progress, settings = self.progress, self.settings
        set_learning_rate(self.optimizer, self.schedule(progress.step))
        self.model.set_alignment_scale(self._alignment_scale(epoch))
        losses, norm = self._forward_backward(group)
        bad = [name for name, value in losses.items() if not math.isfinite(value)]
        overflow = self.scaler.is_enabled() and self.scaler.get_scale() > LOWEST_LOSS_SCALE
        if not math.isfinite(norm) and not overflow:
            bad.append("gradient norm")
        if bad:
            self._non_finite(bad, group)
        else:
            progress.skipped = 0
            self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        progress.step += 1
        clock.stepped(sum(len(batch.ids) for batch in group) * world_size())
        self._report(losses, norm, clock, bar)
        if progress.step % settings.val_step == 0:
            self.validate()
            self.save(LAST, self)
            clock.restart()
        elif progress.step % settings.save_step == 0:
            self.save(LAST, self)

    def _forward_backward(self, group: list[Batch]) -> tuple[dict[str, float], float]:
        """Return each loss part's mean over the group, and the gradient norm before clipping."""
        total: dict[str, float] = {}
        for index, batch in enumerate(group):
            last = index == len(group) - 1
            wait = nullcontext() if last or world_size() == 1 else self.network.no_sync()
            with wait:
                losses = self._losses(batch.to(self.device))
                self.scaler.scale(losses["loss"] / len(group)).backward()
            for name, value in losses.items():
                total[name] = total.get(name, 0.0) + float(value.detach()) / len(group)
        self.scaler.unscale_(self.optimizer)
        limit = self.settings.grad_clip if self.settings.grad_clip > 0 else math.inf
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), limit)
        return total, float(norm)

    def _losses(self, batch: Batch) -> dict[str, Tensor]:
        with self.autocast():
            return self.network(
                batch.pixels,
                batch.ids,
                batch.lengths,
                batch.image_ids,
                batch.dense_ids,
                batch.dense_lengths,
                batch.pixel_lengths,
            )

    def _alignment_scale(self, epoch: int) -> float:
        """Return the alignment loss's factor: rises to 1 over the warm-up epoch (SPEC 6)."""
        if epoch != self.settings.embedding_warmup_epochs:
            return 1.0
        return min(1.0, self.progress.batch / self.batches_per_epoch)

    def _non_finite(self, parts: list[str], group: list[Batch]) -> None:
        self.progress.skipped += 1
        mine = [self.image_names[int(row)] for batch in group for row in batch.image_ids]
        names = [name for names in gather_values(mine) for name in names]
        message = (
            f"step {self.progress.step}: not finite: {', '.join(parts)}; "
            f"image ids of the batch: {', '.join(names)}"
        )
        if self.progress.skipped > self.settings.skip_nonfinite:
            raise NonFiniteError(message)
        self.log.say(f"{message}; step skipped ({self.progress.skipped} in a row)")

    def _note_bad(self, paths: list[str]) -> None:
        for path in paths:
            if path not in self.progress.bad_images:
                self.progress.bad_images.append(path)
                self.log.say(f"warning: {path} can't be decoded; its pairs are left out")
        if len(self.progress.bad_images) > self.settings.max_bad_images:
            raise InputError(
                f"{len(self.progress.bad_images)} images can't be decoded, more than "
                f"--max_bad_images {self.settings.max_bad_images}, the last {paths[-1]}; "
                "mend the image folder or raise the limit"
            )

    # --- validation, reports -------------------------------------------------------------------

    def validate(self) -> dict[str, Any]:
        """Return dev recalls; write them, and the checkpoint where rSum is the best so far."""
        results = evaluate_split(self.model, self.validation, self.device, self.autocast)
        progress = self.progress
        progress.last_rsum, progress.validated_step = float(results["rsum"]), progress.step
        seconds, protocol = results.pop("seconds"), results.pop("protocol")
        self.log.scalars(flatten_metrics(results, "val"), progress.step)
        self.log.scalars({"time/validation_s": seconds}, progress.step)
        best = results["rsum"] > progress.best_rsum
        if best:
            progress.best_rsum = progress.last_rsum
        self.log.say(
            f"step {progress.step} (epoch {progress.epoch}) {self.validation.name}: "
            f"I2T R@1 {results['i2t']['r1']:.1f}, T2I R@1 {results['t2i']['r1']:.1f}, "
            f"rSum {results['rsum']:.1f}{' (oracle)' if protocol == 'oracle' else ''}"
            f"{' (best)' if best else ''}"
        )
        if best:
            self.save(BEST, self)
        if self.picture is not None and is_main():
            picture = self.picture(self.model)
            if picture is not None:
                self.log.image("val/kept_patches", picture, progress.step)
        barrier()
        return results

    def _report(self, losses: dict[str, float], norm: float, clock: Clock, bar: tqdm) -> None:
        shown = {"loss": f"{losses['loss']:.2f}", "img/s": f"{clock.pairs_per_second:.0f}"}
        if self.progress.best_rsum >= 0:
            shown["rSum"] = f"{self.progress.last_rsum:.1f}"
        bar.set_postfix(shown, refresh=False)
        bar.update(self.progress.batch - bar.n)
        if self.progress.step % self.settings.log_step:
            return
        rates = {f"lr/{g['name']}": g["lr"] for g in self.optimizer.param_groups}
        parts = {f"train/{name}": value for name, value in losses.items()}
        self.log.scalars(
            {**parts, **rates, "train/grad_norm": norm, **clock.scalars()}, self.progress.step
        )

    def _bar(self, epoch: int) -> tqdm:
        return tqdm(
            total=self.batches_per_epoch,
            initial=self.progress.batch,
            desc=f"epoch {epoch + 1}/{self.settings.num_epochs}",
            disable=not is_main(),
            leave=False,
            ncols=80,
            mininterval=0.5,
            bar_format="{desc} {percentage:3.0f}%|{bar}| {remaining} left{postfix}",
        )

    # --- stopping and going on -----------------------------------------------------------------

    def _should_stop(self) -> bool:
        return not all_true(self.stop_signal is None, self.device)

    @contextmanager
    def _catch_signals(self) -> Iterator[None]:
        """Finish the step under way on the first SIGINT or SIGTERM; a second one kills as usual."""

        def note(number: int, frame: object) -> None:
            self.stop_signal = number
            signal.signal(number, previous[number])

        previous = {}
        for number in (signal.SIGINT, signal.SIGTERM):
            previous[number] = signal.signal(number, note)
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def training_state(self) -> dict[str, Any]:
        """Return what resuming needs beside the model: plain values and tensors.

        Every rank must call it, as each one's random state is in it.
        """
        cuda = torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None
        return {
            "progress": asdict(self.progress),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "rng": gather_values({"cpu": torch.get_rng_state(), "cuda": cuda}),
        }

    def load_training_state(self, state: dict[str, Any]) -> None:
        """Go on from `training_state()`; the model's weights are loaded by the caller.

        Rates, decay and betas stay those of this call's flags. Raises InputError where a batch now
        has another number of pairs, as neither the place in the epoch nor the schedule would fit.
        """
        now, then = self.progress.pairs_per_batch, state["progress"]["pairs_per_batch"]
        if now != then:
            raise InputError(
                f"the run to go on with used {then} pairs a step on all processes together, this "
                f"call {now}: change --batch_size or the number of processes"
            )
        self.progress = Progress(**state["progress"])
        flags = [
            {key: group[key] for key in RESUMED_WITH_NEW_FLAGS}
            for group in self.optimizer.param_groups
        ]
        self.optimizer.load_state_dict(state["optimizer"])
        for group, values in zip(self.optimizer.param_groups, flags, strict=True):
            group.update(values)
        if state["scaler"]:
            self.scaler.load_state_dict(state["scaler"])
        if len(state["rng"]) != world_size():
            self.log.say("another number of processes than before: random numbers start anew")
            return
        mine = state["rng"][rank()]
        torch.set_rng_state(mine["cpu"])
        if mine["cuda"] is not None and self.device.type == "cuda":
            torch.cuda.set_rng_state(mine["cuda"], self.device)
