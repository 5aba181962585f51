"""Loader workers that end or can't deliver: an error within seconds, never a wait without end."""

from __future__ import annotations

import multiprocessing
import os
import signal
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from lib.batch import Batch
from lib.data import workers
from lib.data.packed import PackedTexts
from lib.data.workers import LOST_BATCH, begin_worker, placed, watched
from lib.errors import InputError, WorkerError

pytestmark = pytest.mark.usefixtures("quick_watch")


class Unsendable:
    def __reduce__(self):
        raise OSError(28, "No space left on device")


class Items(Dataset):
    """Six items; the one numbered 3 does what `act` says, in a worker."""

    def __init__(self, act) -> None:
        self.act = act

    def __len__(self) -> int:
        return 6

    def __getitem__(self, index: int):
        return self.act() if index == 3 else index


def first_item(items):
    return items[0]


def read_all(act, number: int = 1, collate=first_item) -> list:
    loader = DataLoader(
        Items(act),
        num_workers=number,
        collate_fn=collate,
        worker_init_fn=begin_worker,
        persistent_workers=number > 0,
    )
    return list(watched(loader))


def test_what_the_loader_yields_passes():
    assert read_all(lambda: 3) == read_all(lambda: 3, number=0) == [0, 1, 2, 3, 4, 5]


@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    ("act", "told"),
    [
        (Unsendable, "shared memory"),
        (lambda: os.kill(os.getpid(), signal.SIGKILL), "killed, most likely for want of memory"),
        (lambda: os.kill(os.getpid(), signal.SIGTERM), "ended from outside"),
        (lambda: os.kill(os.getpid(), signal.SIGBUS), "shared memory"),
        (lambda: os._exit(5), "exit code 5"),
    ],
    ids=["unsendable", "killed", "terminated", "bus error", "exit"],
)
def test_the_end_of_a_worker_is_told_as_what_it_is(act, told):
    before = signal.getsignal(signal.SIGCHLD)
    with pytest.raises(WorkerError, match=told):
        read_all(act)
    assert signal.getsignal(signal.SIGCHLD) == before  # torch's would raise anywhere


def raising(error: Exception):
    def act():
        raise error

    return act


@pytest.mark.parametrize("error", [InputError("a.jpg can't be read"), WorkerError("no room")])
def test_a_workers_sentence_comes_without_its_traceback(error):
    with pytest.raises(type(error)) as caught:
        read_all(raising(error))
    assert str(caught.value) == str(error)


def test_a_fault_of_the_program_stays_one():
    with pytest.raises(RuntimeError, match="shapes do not agree") as caught:
        read_all(raising(RuntimeError("shapes do not agree")))
    assert not isinstance(caught.value, WorkerError)
    with pytest.raises(OSError, match="Input/output"):
        read_all(raising(OSError(5, "Input/output error")))


def a_batch(items):
    return placed(Batch(ids=torch.zeros(1, 4, dtype=torch.long), lengths=torch.ones(1)))


def test_a_batch_comes_in_shared_memory_from_a_worker_alone(monkeypatch):
    assert all(batch.ids.is_shared() for batch in read_all(int, collate=a_batch))
    assert not any(batch.ids.is_shared() for batch in read_all(int, number=0, collate=a_batch))

    def full(self):
        raise RuntimeError("unable to allocate shared memory(shm) for file </torch_1>: Success (0)")

    monkeypatch.setattr(Batch, "share_memory", full)  # the forked workers have it too
    with pytest.raises(WorkerError, match=r"/dev/shm.*--workers 0.*--shm-size"):
        read_all(int, collate=a_batch)


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (OSError(24, "Too many open files"), "ulimit -n"),
        (RuntimeError("received 0 items of ancdata"), "ulimit -n"),
        (OSError(28, "No space left on device"), "/dev/shm"),
    ],
)
def test_workers_that_can_not_be_started(error, told, monkeypatch):
    monkeypatch.setattr(workers, "_iterator", lambda loader: raising(error)())
    with pytest.raises(WorkerError, match=told):
        read_all(int)


def test_a_system_without_process_groups(monkeypatch):
    monkeypatch.delattr(os, "setpgid")
    process = multiprocessing.get_context("fork").Process(target=begin_worker, args=(0,))
    process.start()
    process.join(20)
    assert process.exitcode == 0
    assert LOST_BATCH != 0


def test_packed_texts_are_the_texts():
    texts = ["a dog", "", "ein Bär, 犬 \U0001f436", "\udcff.jpg", "last"]
    packed = PackedTexts(texts)
    assert list(packed) == texts
    assert packed[-1] == "last"
    assert packed[1:3] == texts[1:3]
    assert len(packed) == 5
    assert "last" in packed
    for index in (5, -6):
        with pytest.raises(IndexError):
            packed[index]
    assert list(PackedTexts([])) == []


@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="Linux tells the memory")
def test_a_forked_reader_copies_no_packed_text():
    """A list's strings are copied page by page as their references are counted."""
    texts = [f"a caption of some length that is number {number}" for number in range(100_000)]
    grown = [_grown_in_a_fork(kind) for kind in (texts, PackedTexts(texts))]
    assert grown[1] < 3e6 < grown[0]


def _grown_in_a_fork(texts) -> float:
    """Private bytes that a forked process gains by reading every text."""
    context = multiprocessing.get_context("fork")
    queue = context.SimpleQueue()

    def read() -> None:
        before = _private_bytes()
        for index in range(len(texts)):
            len(texts[index])
        queue.put(_private_bytes() - before)

    process = context.Process(target=read)
    process.start()
    grown = queue.get()
    process.join()
    return grown


def _private_bytes() -> int:
    for line in Path("/proc/self/smaps_rollup").read_text().splitlines():
        if line.startswith("Private_Dirty:"):
            return int(line.split()[1]) * 1024
    raise AssertionError("no such line")
