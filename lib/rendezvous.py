"""How the processes of a distributed run find each other, and who is missing where they do not."""

from __future__ import annotations

import os
import socket
import sys
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from urllib.parse import urlparse

import torch.distributed as dist

from lib.errors import InputError, PeerError

BUSY_PORT_SECONDS = 10.0  # a run that was just killed may hold its port for a moment
FIRST_REPORT_SECONDS = 5.0  # then after twice as long each time
POLL_SECONDS = 0.05


@dataclass(frozen=True)
class Place:
    """One process among `world`, and where rank 0 listens; `served` where a launcher listens."""

    rank: int
    world: int
    host: str
    port: int
    served: bool = False

    @property
    def address(self) -> str:
        return f"{self.host}:{self.port}"


def environment_integer(name: str) -> int | None:
    """Return an integer from the environment; None where it is not set, or empty."""
    text = os.environ.get(name, "").strip()
    if not text:
        return None
    try:
        return int(text)
    except ValueError:
        raise InputError(
            f"{name}={text} in the environment is no whole number; unset {name}, or let "
            "torch.distributed.run set it"
        ) from None


def find_place(url: str, world: int, rank: int) -> Place:
    """Return this process's place: numbers from RANK and WORLD_SIZE, where both are set.

    A `url` other than env:// goes before MASTER_ADDR and MASTER_PORT. Raises InputError where
    something is missing or out of range.
    """
    here, total = environment_integer("RANK"), environment_integer("WORLD_SIZE")
    named = "--rank and --world_size"
    if here is not None and total is not None:
        rank, world, named = here, total, "RANK and WORLD_SIZE"
    if not 0 <= rank < world:
        raise InputError(
            f"rank {rank} of {world} processes ({named}): ranks are counted from 0 to {world - 1}"
        )
    host, port = _address(url)
    agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    return Place(rank, world, host, port, served=agent and url == "env://")


def _address(url: str) -> tuple[str, int]:
    host: str | None
    port: int | None
    if url == "env://":
        host, port = os.environ.get("MASTER_ADDR", "").strip(), environment_integer("MASTER_PORT")
        if not host or port is None:
            raise InputError(
                "several processes need MASTER_ADDR and MASTER_PORT in the environment: start "
                "them with python -m torch.distributed.run, or give --dist_url tcp://HOST:PORT"
            )
        return host, _checked_port(port)
    try:
        parts = urlparse(url)
        host, port = parts.hostname, parts.port
    except ValueError:
        host = port = None
    if not url.startswith("tcp://") or not host or port is None:
        raise InputError(f"--dist_url {url}: give tcp://HOST:PORT")
    return host, _checked_port(port)


def _checked_port(port: int) -> int:
    if not 0 < port < 2**16:
        raise InputError(f"port {port}: give one from 1 to 65535")
    return port


def meet(place: Place, seconds: float) -> dist.Store:
    """Return a store that the processes of this run share, and nobody before or after them.

    Says who is missing after some seconds, and again. A store that dies under the meeting, as that
    of a run that is being restarted may, is tried anew. Raises InputError after `seconds`.
    """
    deadline = _Deadline(seconds)
    while True:
        try:
            store = _open_store(place, deadline)
            session = _roll_call(store, place, deadline)
            return dist.PrefixStore(session, store)
        except dist.DistError as error:
            deadline.wait(_missing(place, [0], _first_line(error)), longest=2.0)


class _Deadline:
    """Counts the seconds of a meeting, and says now and then what it waits for."""

    def __init__(self, seconds: float) -> None:
        self.started = time.monotonic()
        self.seconds = seconds
        self.pause = POLL_SECONDS
        self.next_report = FIRST_REPORT_SECONDS

    @property
    def passed(self) -> float:
        return time.monotonic() - self.started

    def wait(self, told: str, longest: float = 0.25) -> None:
        """Sleep a little, longer each time; raise InputError with `told` where time is up."""
        if self.passed >= self.seconds:
            raise InputError(f"{told}; gave up after {self.passed:.0f} s (--dist_timeout)")
        if self.passed >= self.next_report:
            print(f"{told}; waiting since {self.passed:.0f} s", file=sys.stderr, flush=True)
            self.next_report *= 2
        time.sleep(self.pause)
        self.pause = min(2 * self.pause, longest)


def _missing(place: Place, ranks: list[int], reason: str = "") -> str:
    names = ", ".join(str(rank) for rank in ranks[:8]) + (", …" if len(ranks) > 8 else "")
    reason = f" ({reason:.100})" if reason else ""
    return (
        f"rank {place.rank} of {place.world} at {place.address}: rank {names} is missing{reason}; "
        "is it started, and are RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT right"
    )


def _open_store(place: Place, deadline: _Deadline) -> dist.TCPStore:
    serves = place.rank == 0 and not place.served
    while True:
        left = max(1.0, min(FIRST_REPORT_SECONDS, deadline.seconds - deadline.passed))
        try:
            return dist.TCPStore(
                place.host,
                place.port,
                place.world,
                is_master=serves,
                timeout=timedelta(seconds=left),
                wait_for_workers=False,
            )
        except (RuntimeError, ValueError) as error:
            reason = _first_line(error)
            if serves and deadline.passed > BUSY_PORT_SECONDS:
                raise InputError(
                    f"rank 0 can't listen at {place.address} ({reason:.120}): set another "
                    "MASTER_PORT (torch.distributed.run: --master_port), or give --dist_url "
                    "tcp://HOST:PORT"
                ) from None
            deadline.wait(_missing(place, [0], reason), longest=2.0)


def _roll_call(store: dist.Store, place: Place, deadline: _Deadline) -> str:
    """Return the session's name once all are there.

    Each process asks under a name of its own and is answered under it, as what a killed run left in
    the store may still be there.
    """
    facts = f"{place.world} {socket.gethostname()}"
    if place.rank == 0:
        session = _lead(store, place, deadline)
    else:
        session = _follow(store, place, facts, deadline)
    store.set_timeout(timedelta(seconds=deadline.seconds))
    return session


def _lead(store: dist.Store, place: Place, deadline: _Deadline) -> str:
    session = uuid.uuid4().hex
    missing = list(range(1, place.world))
    while True:
        for rank in missing:
            ask = _read(store, f"ask/{rank}")
            if ask is not None:
                store.set(f"answer/{ask}", f"{session} {place.world}")
        missing = [rank for rank in missing if _read(store, f"{session}/here/{rank}") is None]
        if not missing:
            store.set(f"{session}/go", "1")
            return session
        deadline.wait(_missing(place, missing))


def _follow(store: dist.Store, place: Place, facts: str, deadline: _Deadline) -> str:
    mine = uuid.uuid4().hex
    store.set(f"ask/{place.rank}", mine)
    while (answer := _read(store, f"answer/{mine}")) is None:
        deadline.wait(_missing(place, [0], f"or another process is rank {place.rank} already"))
    session, world = answer.split()
    if int(world) != place.world:
        raise InputError(
            f"rank {place.rank} was started as one of {place.world} processes, rank 0 as one of "
            f"{world}: give all the same WORLD_SIZE"
        )
    if store.add(f"{session}/seat/{place.rank}", 1) > 1:
        raise InputError(f"two processes are rank {place.rank}: give each its own RANK")
    store.set(f"{session}/here/{place.rank}", facts)
    while _read(store, f"{session}/go") is None:
        absent = [
            rank for rank in range(1, place.world) if not store.check([f"{session}/here/{rank}"])
        ]
        deadline.wait(_missing(place, absent or [0]))
    return session


def _read(store: dist.Store, key: str) -> str | None:
    return store.get(key).decode() if store.check([key]) else None


@contextmanager
def peers_told() -> Iterator[None]:
    """Turn what gloo and NCCL raise where another process is gone into a PeerError."""
    try:
        yield
    except RuntimeError as error:
        if not is_lost_peer(error):
            raise
        raise PeerError(
            "another process of this run ended or does not answer, and says why itself "
            f"({_first_line(error):.120}); go on with --resume"
        ) from None


def is_lost_peer(error: BaseException) -> bool:
    """Return True for what torch.distributed raises where another process is gone."""
    if isinstance(error, (dist.DistError, PeerError)):
        return isinstance(error, dist.DistError)
    text = str(error)
    signs = ("gloo/", "NCCL", "Connection closed by peer", "Connection reset by peer")
    return isinstance(error, RuntimeError) and any(sign in text for sign in signs)


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
