"""Processes that meet, and ones that do not: told who is missing, never a silent wait."""

from __future__ import annotations

import re
import socket
import threading
import time

import pytest
import torch.distributed as dist

from lib import distributed, rendezvous
from lib.errors import InputError, PeerError
from lib.rendezvous import Place, environment_integer, find_place, meet, peers_told


@pytest.fixture
def port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def together(places: list[Place], seconds: float = 20) -> list:
    """Let each place meet in a thread of its own; return its store, or its error."""
    found: list = [None] * len(places)

    def run(index: int) -> None:
        try:
            found[index] = meet(places[index], seconds)
        except InputError as error:
            found[index] = error

    threads = [threading.Thread(target=run, args=(index,)) for index in range(len(places))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def test_three_meet_in_one_store(port):
    stores = together([Place(rank, 3, "127.0.0.1", port) for rank in (2, 0, 1)])
    stores[0].set("word", "said")
    assert [store.get("word") for store in stores] == [b"said"] * 3


def test_what_a_killed_run_left_in_the_launchers_store_is_not_taken_up(port):
    server = dist.TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)
    places = [Place(rank, 2, "127.0.0.1", port, served=True) for rank in (0, 1)]
    first = together(places)
    first[0].set("address", "dead")
    second = together(places)  # torchrun's restart: the same store again
    assert not second[1].check(["address"])
    second[0].set("address", "alive")
    assert second[1].get("address") == b"alive"
    assert server.num_keys() > 0


def test_a_missing_process_is_named_within_seconds(port, capsys, monkeypatch):
    monkeypatch.setattr(rendezvous, "FIRST_REPORT_SECONDS", 0.3)
    started = time.monotonic()
    found = together([Place(0, 3, "127.0.0.1", port), Place(2, 3, "127.0.0.1", port)], seconds=2)
    assert time.monotonic() - started < 15
    told = capsys.readouterr().err
    assert re.search(r"rank 0 of 3 .*rank 1 is missing.*WORLD_SIZE", told)
    assert re.search(r"rank 2 of 3 .*rank 1 is missing", told)
    assert "--dist_timeout" in str(found[0])


def test_a_missing_rank_0_is_named(port, capsys, monkeypatch):
    monkeypatch.setattr(rendezvous, "FIRST_REPORT_SECONDS", 0.3)
    [error] = together([Place(1, 2, "127.0.0.1", port)], seconds=6)
    assert "rank 0 is missing" in str(error)
    assert "rank 0 is missing" in capsys.readouterr().err


def test_different_world_sizes_are_told(port):
    found = together([Place(0, 2, "127.0.0.1", port), Place(1, 3, "127.0.0.1", port)], seconds=2)
    assert "WORLD_SIZE" in str(found[1])
    assert isinstance(found[0], InputError)


def test_a_process_that_comes_late_is_waited_for(port):
    found = []
    first = threading.Thread(
        target=lambda: found.extend(together([Place(1, 2, "127.0.0.1", port)]))
    )
    first.start()
    time.sleep(1.5)
    found.extend(together([Place(0, 2, "127.0.0.1", port)]))
    first.join()
    assert all(isinstance(one, dist.Store) for one in found)


def test_a_taken_port_names_the_ways_out(port, monkeypatch):
    monkeypatch.setattr(rendezvous, "BUSY_PORT_SECONDS", 0.5)
    with socket.socket() as taken:
        taken.bind(("0.0.0.0", port))
        taken.listen()
        with pytest.raises(InputError, match=r"MASTER_PORT.*--dist_url"):
            meet(Place(0, 1, "127.0.0.1", port), 5)


def test_a_port_that_comes_free_is_taken(port):
    """The dying run of a restart holds its port a moment longer."""
    taken = socket.socket()
    taken.bind(("0.0.0.0", port))
    taken.listen()
    threading.Timer(1.0, taken.close).start()
    assert isinstance(meet(Place(0, 1, "127.0.0.1", port), 20), dist.Store)


@pytest.mark.parametrize(
    ("environment", "flags", "told"),
    [
        ({"RANK": "2", "WORLD_SIZE": "2"}, (1, 0), "rank 2 of 2"),
        ({"RANK": "-1", "WORLD_SIZE": "2"}, (1, 0), "rank -1 of 2"),
        ({"RANK": "one", "WORLD_SIZE": "2"}, (1, 0), "RANK=one"),
        ({"RANK": "0", "WORLD_SIZE": "1", "MASTER_PORT": "soon"}, (1, 0), "MASTER_PORT=soon"),
        ({"RANK": "0", "WORLD_SIZE": "1", "MASTER_PORT": "99999"}, (1, 0), "port 99999"),
        (
            {"RANK": "0", "WORLD_SIZE": "1", "MASTER_PORT": ""},
            (1, 0),
            "MASTER_ADDR and MASTER_PORT",
        ),
        ({}, (2, 5), "--rank and --world_size"),
    ],
)
def test_numbers_that_can_not_be(environment, flags, told, monkeypatch):
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match=re.escape(told)):
        find_place("env://", *flags)


@pytest.mark.parametrize("url", ["tcp://host", "host:1", "tcp://host:word", "tcp://:29500", "x"])
def test_an_address_that_is_none(url):
    with pytest.raises(InputError, match="tcp://HOST:PORT"):
        find_place(url, 2, 0)


def test_the_flag_goes_before_the_environment(monkeypatch):
    for name, value in {
        "RANK": "1",
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "a",
        "MASTER_PORT": "1",
    }.items():
        monkeypatch.setenv(name, value)
    assert find_place("tcp://b:2", 1, 0) == Place(1, 2, "b", 2)
    assert find_place("env://", 1, 0) == Place(1, 2, "a", 1)


def test_an_empty_variable_is_one_that_is_not_set(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", " ")
    assert environment_integer("WORLD_SIZE") is None


def test_a_single_process_among_a_schedulers_variables(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match="unset WORLD_SIZE"):
        distributed.start_processes(multi_gpu=False)


def test_a_lost_peer_is_told_and_other_errors_pass():
    with pytest.raises(PeerError, match="another process"), peers_told():
        raise RuntimeError("[/x/gloo/transport/tcp/pair.cc:547] Connection closed by peer")
    with pytest.raises(PeerError), peers_told():
        raise dist.DistBackendError("NCCL error")
    with pytest.raises(RuntimeError, match="shapes"), peers_told():
        raise RuntimeError("shapes do not agree")
