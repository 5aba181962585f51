"""Train, validate, save, stop and go on; sole owner of the step counter."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from lib.batch import Batch
from lib.checkpoints.checkpoint import BEST, LAST
from lib.distributed import agree, barrier, gather_values, is_main, sum_over_ranks, world_size
from lib.errors import InputError, NonFiniteError, PeerError, WorkerError
from lib.methods.base import Method
from lib.model.precision import autocast_for
from lib.rendezvous import peers_told
from lib.retrieval.evaluation import SplitLoaders, evaluate_split
from lib.training.clock import Clock
from lib.training.logs import RunLog, epoch_bar, flatten_metrics
from lib.training.optim import Schedule, set_learning_rate
from lib.training.progress import (
    Progress,
    restore_optimizer,
    restore_random_state,
    saved_progress,
    training_state,
)
from lib.training.saving import CheckpointWriter
from lib.training.settings import Settings
from lib.training.stopping import StopRequest
from lib.training.update import Outcome, Update

ALWAYS_DRAWN = ("train/loss", "train/alignment")


class Trainer:
    """Trains on what `train_batches(epoch, first_batch)` yields: (Batch or None, bad paths).

    `writer` writes checkpoints, and the trainer decides when: `describe`, to be set before `fit`,
    returns what is in one beside the training state. `picture(model)` draws what goes to
    TensorBoard with each validation.
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
        writer: CheckpointWriter,
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
        self.writer = writer
        self.describe: Callable[[], dict[str, Any]] = dict
        self.picture = picture
        self.progress = Progress(pairs_per_batch=pairs_per_batch)
        self.autocast = autocast_for(settings.amp, device)
        network = self._distribute(model)
        self.update = Update(
            model, network, optimizer, device, self.autocast, settings.amp, settings.grad_clip
        )
        self.stop = StopRequest()

    def _distribute(self, model: Method) -> nn.Module:
        if world_size() == 1:
            return model
        devices = [self.device.index] if self.device.type == "cuda" else None
        return DistributedDataParallel(
            model, device_ids=devices, find_unused_parameters=model.may_leave_unused
        )

    # --- the run

    def fit(self) -> bool:
        """Train to the last epoch; return False where a signal stopped it early.

        What was trained is saved before an error passes on. Raises NonFiniteError, InputError (too
        many bad images, nothing learnt), WorkerError, or OSError (checkpoint not written).
        """
        with self.stop.caught(), self._saving_what_was_trained():
            try:
                finished = self._train()
            except WorkerError:  # raised by all ranks; a scheduler's signal ends the workers too
                if not sum(sum_over_ranks([int(bool(self.stop))], self.device)):
                    raise
                finished = False
            self._save_and_wait()
        return finished

    def _train(self) -> bool:
        """Train to the last epoch; return False where a signal stopped it early."""
        if self.progress.validation_due:
            self.validate()
        for epoch in range(self.progress.epoch, self.settings.num_epochs):
            self.progress.epoch = epoch
            if not self._train_epoch(epoch):
                return False
            self.progress.epoch, self.progress.batch = epoch + 1, 0
            if self.progress.validated_step != self.progress.step:
                self._save_then_validate()
        return True

    def _train_epoch(self, epoch: int) -> bool:
        """Return False where the run is to stop before the epoch's end."""
        progress = self.progress
        hard = self.settings.max_violation or epoch >= self.settings.vse_mean_warmup_epochs
        self.model.set_hard_negatives(hard)
        self.model.train()
        clock = Clock()
        bad_images: set[str] = set()
        batches = clock.waiting(self.train_batches(epoch, progress.batch))
        with epoch_bar(
            epoch, self.settings.num_epochs, self.batches_per_epoch, progress.batch
        ) as bar:
            while progress.batch < self.batches_per_epoch:
                read, fault = self._read_group(batches)
                group = self._agreed(read, fault, bad_images)
                if group is None:
                    return False
                position = progress.batch + len(read)
                outcome = self._step(group, epoch, position) if group else None
                progress.batch = position
                if outcome is not None:
                    clock.stepped(sum(map(len, (batch.ids for batch in group))) * world_size())
                    self._report(outcome, clock, bar)
                    self._save_and_validate_in_time(clock)
        if bad_images:
            count = f"{len(bad_images)} images could not be decoded"
            self.log.say(f"epoch {epoch + 1}: {count} and were left out")
        self._refuse_nothing_learnt(len(bad_images))
        return True

    def _read_group(self, batches: Iterator) -> tuple[list, Exception | None]:
        """Return the batches of the next step, and what kept this rank from reading them all."""
        left = self.batches_per_epoch - self.progress.batch
        read: list[tuple[Batch | None, list[str]]] = []
        try:
            while len(read) < min(self.settings.grad_accum, left):
                read.append(next(batches))
        except StopIteration:
            return read, WorkerError("the loader's batches ended before the epoch did")
        except (InputError, WorkerError) as error:
            return read, error
        except OSError as error:
            return read, WorkerError(f"the training data can't be read ({error})")
        return read, None

    def _agreed(
        self, read: list, fault: Exception | None, bad_images: set[str]
    ) -> list[Batch] | None:
        """Return what of the group every rank can train on; None where any is asked to stop.

        One all-reduce a step says it all; only where something is wrong do the ranks say more. A
        scheduler's signal to every process ends loader workers too, so stopping goes before faults.
        """
        empty = [int(batch is None) for batch, _ in read]
        empty += [0] * (self.settings.grad_accum - len(empty))
        bad = [path for _, paths in read for path in paths]
        mine = [bool(self.stop), fault is not None, self.writer.error is not None]
        counts = [*map(int, mine), len(bad), *empty]
        stop, faults, unwritten, bad_count, *empty = sum_over_ranks(counts, self.device)
        if stop:
            return None
        if faults:
            agree(fault)
        if unwritten:
            self.writer.finish()
        if bad_count:
            paths = [path for paths in gather_values(bad) for path in paths]
            bad_images.update(paths)
            self._note_bad(paths)
        return [batch for (batch, _), none in zip(read, empty, strict=False) if not none]

    def _refuse_nothing_learnt(self, bad_images: int) -> None:
        """Raise InputError where no step so far changed the model."""
        if self.progress.learnt:
            return
        why = "no batch holds images to tell apart: a batch needs pairs of two images or more"
        if bad_images:
            why = f"{bad_images} images can't be decoded, and too few pairs are left; {why}"
        if self.progress.skipped:
            why = "every loss or gradient was not finite; lower --learning_rate"
        raise InputError(f"nothing was learnt in {self.progress.step} steps: {why}")

    def _step(self, group: list[Batch], epoch: int, position: int) -> Outcome:
        """Take one optimizer step; `position` is the place in the epoch after it."""
        progress = self.progress
        set_learning_rate(self.optimizer, self.schedule(progress.step))
        self.model.set_alignment_scale(self._alignment_scale(epoch, position))
        outcome = self.update.step(group)
        if outcome.not_finite:
            self._non_finite(outcome.not_finite, group)
        else:
            progress.skipped = 0
        progress.learnt += int(outcome.learnt)
        progress.step += 1
        return outcome

    def _save_and_validate_in_time(self, clock: Clock) -> None:
        step, settings = self.progress.step, self.settings
        if not self.progress.learnt:
            return  # the weights are still those of the start
        if step % settings.val_step == 0:
            self._save_then_validate()
            clock.restart()
        elif step % settings.save_step == 0:
            self._save_last()

    def _alignment_scale(self, epoch: int, position: int) -> float:
        """Return the alignment loss's factor: rises to 1 over the warm-up epoch (SPEC 6)."""
        if epoch != self.settings.embedding_warmup_epochs:
            return 1.0
        return min(1.0, position / self.batches_per_epoch)

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
        progress.validation_due = False
        self.log.scalars(flatten_metrics(results, "val"), progress.step)
        self.log.scalars({"time/validation_s": seconds}, progress.step)
        best = results["rsum"] > progress.best_rsum
        if best:
            progress.best_rsum = progress.last_rsum
        self.log.say(
            f"step {progress.step} (epoch {progress.shown_epoch}/{self.settings.num_epochs}) "
            f"{self.validation.name}: "
            f"I2T R@1 {results['i2t']['r1']:.1f}, T2I R@1 {results['t2i']['r1']:.1f}, "
            f"rSum {results['rsum']:.1f}{' (oracle)' if protocol == 'oracle' else ''}"
            f"{' (best)' if best else ''}"
        )
        if best:
            self.writer.save(BEST, self.describe)
        if self.picture is not None and is_main():
            picture = self.picture(self.model)
            if picture is not None:
                self.log.image("val/kept_patches", picture, progress.step)
        barrier()
        return results

    def _report(self, outcome: Outcome, clock: Clock, bar: tqdm) -> None:
        shown = {"loss": f"{outcome.losses['loss']:.2f}", "img/s": f"{clock.pairs_per_second:.0f}"}
        if self.progress.best_rsum >= 0:
            shown["rSum"] = f"{self.progress.last_rsum:.1f}"
        bar.set_postfix(shown, refresh=False)
        bar.update(self.progress.batch - bar.n)
        if self.progress.step % self.settings.log_step:
            return
        rates = {f"lr/{g['name']}": g["lr"] for g in self.optimizer.param_groups}
        parts = {f"train/{name}": value for name, value in outcome.losses.items()}
        drawn = {name: parts.pop(name) for name in ALWAYS_DRAWN if name in parts}
        self.log.scalars(
            {**drawn, **rates, "train/grad_norm": outcome.norm, **clock.scalars()},
            self.progress.step,
        )
        self.log.changing_scalars(parts, self.progress.step)

    # --- saving and going on -------------------------------------------------------------------

    def _save_last(self, alone: bool = False) -> None:
        """Begin to write the training state; every rank calls it, as all random states go in.

        `alone` is for rank 0 after others are gone: then its own goes in.
        """
        state = training_state(
            self.progress, self.optimizer, self.update.scaler, self.device, alone
        )
        self.writer.save(LAST, lambda: {**self.describe(), "training": state})
        self.writer.saved_step = self.progress.step

    def _save_and_wait(self) -> None:
        self._save_last()
        self.writer.finish()

    def _save_then_validate(self) -> None:
        """Validate; before that save where it is time, or where nothing was saved so far."""
        self.progress.validation_due = True
        step = self.progress.step
        if step % self.settings.save_step == 0 or self.writer.saved_step is None:
            self._save_last()
        self.validate()

    @contextmanager
    def _saving_what_was_trained(self) -> Iterator[None]:
        """Save before an error passes on, where the weights are those of a whole step.

        Foreseen errors are raised by every rank together; another one may be this rank's alone, and
        saving takes them all.
        """
        try:
            with peers_told():
                yield
        except NonFiniteError as error:
            raise NonFiniteError(f"{error}; {self._told_after_non_finite()}") from None
        except Exception as error:
            alone = isinstance(error, PeerError) and is_main()
            together = isinstance(error, (InputError, WorkerError)) or world_size() == 1
            if (alone or together) and not self.update.halfway and self.writer.error is None:
                self._rescue(alone)
            raise

    def _rescue(self, alone: bool) -> None:
        if self.writer.saved_step != self.progress.step and self.progress.learnt:
            self._save_last(alone)
            self.log.say(f"saved step {self.progress.step} in {LAST}, to go on with --resume")
        self.writer.finish(alone)

    def _told_after_non_finite(self) -> str:
        """Save where nothing was so far; else what lies there may be from before the trouble."""
        self.progress.skipped = 0
        if self.writer.saved_step is None and self.progress.learnt and self._weights_are_finite():
            self._save_and_wait()
        self.writer.finish()
        if self.writer.saved_step is None:
            return "there is no checkpoint to go on from: start anew with a lower --learning_rate"
        return (
            f"the checkpoint of step {self.writer.saved_step} is kept: go on with --resume, and a "
            "lower --learning_rate or --skip_nonfinite"
        )

    def _weights_are_finite(self) -> bool:
        tensors = (value for value in self.model.state_dict().values() if value.is_floating_point())
        return all(bool(torch.isfinite(value).all()) for value in tensors)

    def load_training_state(self, state: dict[str, Any]) -> None:
        """Go on from a saved training state; the model's weights are loaded by the caller.

        Raises InputError where a batch now has another number of pairs.
        """
        self.progress = saved_progress(state, self.progress.pairs_per_batch)
        self.writer.saved_step = self.progress.step
        restore_optimizer(state, self.optimizer, self.update.scaler)
        if not restore_random_state(state, self.device):
            self.log.say(
                "not the random states of these processes were saved: random numbers start anew"
            )
