"""The openai client against a real server on loopback that behaves in every way."""

from __future__ import annotations

import time

import pytest

pytest.importorskip("openai")
pytest.importorskip("PIL")

from lib.data.describe.openai_backend import (
    OpenAIBackend,
    ServerSettings,
    duration,
    said_wait,
    spent_wait,
)
from lib.data.describe.outcomes import Sampling, Task
from lib.errors import InputError
from tests.data.describe.server import MODEL, ChatServer, error, said, sent_image
from tests.data.prepare.pictures import picture_folder


@pytest.fixture(scope="module")
def tasks(tmp_path_factory) -> list[Task]:
    root = tmp_path_factory.mktemp("pics")
    names = picture_folder(root, 6)
    return [Task(name[:-4], name, root / name) for name in names]


def ask(server, tasks, model=MODEL, sampling=Sampling(), **settings):  # noqa: B008
    """Describe the tasks; return (outcomes by name, seconds)."""
    settings = {"retries": 2, "first_wait": 0.02, "time_limit": 5.0, **settings}
    backend = OpenAIBackend(model, sampling, ServerSettings(server.url, **settings))
    outcomes, started = {}, time.monotonic()
    backend.describe(tasks, lambda task, outcome: outcomes.update({task.name: outcome}))
    return outcomes, time.monotonic() - started


def test_what_is_sent_and_what_comes_back(tasks):
    with ChatServer(lambda number, request: said(f" text {number} ")) as server:
        sampling = Sampling(image_size=32)
        outcomes, _ = ask(server, tasks, None, sampling)  # the model's name is the server's
    assert sorted(one.text for one in outcomes.values()) == [f"text {n}" for n in range(6)]
    request = server.requests[0]
    assert request["model"] == MODEL
    assert (request["temperature"], request["top_p"], request["max_tokens"]) == (0.2, 0.9, 500)
    assert request["messages"][0]["content"][1]["text"] == sampling.prompt
    assert sent_image(request).shape == (24, 32, 3)


def test_several_at_once_and_no_more_than_asked(tasks):
    with ChatServer(lambda number, request: said("t", delay=0.1)) as server:
        ask(server, tasks, concurrency=3)
    assert server.most_busy == 3


@pytest.mark.parametrize("kind", ["500", "503", "cut", "nonsense", "empty"])
def test_a_try_that_fails_is_tried_again(tasks, kind):
    def behave(number, request):
        if number >= 2:
            return said("well")
        if kind in ("500", "503"):
            return error(int(kind))
        answer = said("well", cut=kind == "cut")
        if kind == "nonsense":
            answer.body = {"choices": None}
        if kind == "empty":
            answer.body = {"choices": []}
        return answer

    with ChatServer(behave) as server:
        outcomes, _ = ask(server, tasks[:1])
    assert outcomes["p00.jpg"].text == "well"
    assert len(server.requests) == 3


def test_tries_end_and_say_why(tasks):
    with ChatServer(lambda number, request: error(500, "the model crashed")) as server:
        outcomes, _ = ask(server, tasks[:1])
    assert len(server.requests) == 3
    assert outcomes["p00.jpg"].broken
    assert "the model crashed" in outcomes["p00.jpg"].reason


@pytest.mark.parametrize("how", [{"delay": 9.0}, {"drip": 9.0}])
def test_a_slow_answer_is_given_up_at_the_limit(tasks, how):
    """Also one whose bytes keep coming, which a limit on each read would wait for."""
    with ChatServer(lambda number, request: said("late", **how)) as server:
        outcomes, seconds = ask(server, tasks[:1], time_limit=0.3, retries=1)
    assert outcomes["p00.jpg"].reason == "no answer within --time_limit"
    assert seconds < 6


def test_nothing_there_at_all(tasks):
    with ChatServer(lambda number, request: said("t")) as server:
        pass
    outcomes, _ = ask(server, tasks[:1])
    assert outcomes["p00.jpg"].broken
    with pytest.raises(InputError, match=r"did not tell its models .*is it running"):
        ask(server, tasks[:1], None)


def test_a_rate_limit_holds_everyone_as_long_as_it_says(tasks):
    def behave(number, request):
        return error(429, retry_after=1) if number == 0 else said("t")

    with ChatServer(behave) as server:
        outcomes, _ = ask(server, tasks, concurrency=1, retries=0)  # it does not count as a try
    assert all(one.text for one in outcomes.values())
    assert server.times[1] - server.times[0] >= 1


def test_a_spent_allowance_is_waited_for_before_it_is_refused(tasks):
    headers = {"x-ratelimit-remaining-requests": "0", "x-ratelimit-reset-requests": "600ms"}

    def behave(number, request):
        return said("t", headers=headers if number == 1 else {})

    with ChatServer(behave) as server:
        ask(server, tasks, concurrency=1)
    gaps = [after - before for before, after in zip(server.times, server.times[1:], strict=False)]
    assert gaps[1] >= 0.6


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [({"retry-after": "7"}, 7), ({"retry-after-ms": "250"}, 0.25), ({}, None),
     ({"retry-after": "Wed, 21 Oct 2015 07:28:00 GMT"}, 0), ({"retry-after": "soon"}, None),
     ({"x-ratelimit-remaining-tokens": "0", "x-ratelimit-reset-tokens": "1m2s"}, 62)],
)  # fmt: skip
def test_waits_that_servers_name(headers, seconds):
    assert said_wait(headers) == seconds


def test_durations():
    told = {"20ms": 0.02, "1.5s": 1.5, "6m0s": 360, "1h2m3s": 3723, "8": 8, "": 0, "x": 0}
    assert {text: pytest.approx(duration(text)) for text in told} == told
    assert (
        spent_wait({"x-ratelimit-remaining-requests": "3", "x-ratelimit-reset-requests": "9s"}) == 0
    )


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (said("I'm sorry, I can't assist with that."), "refused: I'm sorry"),
        (said(None, refusal="policy"), "refused: policy"),
        (said("A man", finish="content_filter"), "refused: content filter"),
        (said(""), "empty text"),
    ],
)
def test_refusals_are_failures_and_not_tried_at_once_again(tasks, answer, reason):
    with ChatServer(lambda number, request: answer) as server:
        outcomes, _ = ask(server, tasks[:1])
    assert outcomes["p00.jpg"].reason.startswith(reason)
    assert not outcomes["p00.jpg"].broken
    assert len(server.requests) == 1


def test_a_cut_text_stays_and_is_counted(tasks):
    with ChatServer(lambda number, request: said("A man who", finish="length")) as server:
        outcomes, _ = ask(server, tasks[:1])
    assert (outcomes["p00.jpg"].text, outcomes["p00.jpg"].cut) == ("A man who", True)


@pytest.mark.parametrize(
    ("status", "told"), [(401, "set OPENAI_API_KEY"), (404, "does not know model tiny-vlm")]
)
def test_a_server_that_can_not_be_used_ends_it_at_once(tasks, status, told):
    serving = ChatServer(lambda number, request: error(status))
    with serving as server, pytest.raises(InputError, match=told):
        ask(server, tasks, concurrency=1)
    assert len(server.requests) == 1


def test_an_image_that_can_not_be_read_is_a_failure_of_its_own(tasks, tmp_path):
    (tmp_path / "bad.jpg").write_bytes(b"no image")
    bad = Task("bad", "bad.jpg", tmp_path / "bad.jpg")
    with ChatServer(lambda number, request: said("t")) as server:
        outcomes, _ = ask(server, [bad, tasks[0]])
    assert "can't be read" in outcomes["bad.jpg"].reason
    assert not outcomes["bad.jpg"].broken
    assert outcomes["p00.jpg"].text == "t"
