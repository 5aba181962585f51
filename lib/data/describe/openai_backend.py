"""Texts from any server that speaks OpenAI's chat protocol, through the `openai` client."""

from __future__ import annotations

import asyncio
import os
import random
import re
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from email.utils import parsedate_to_datetime
from typing import Any

from lib.data.describe.outcomes import Emit, Outcome, Sampling, Task, judge
from lib.data.describe.pictures import data_url
from lib.data.extras import need
from lib.errors import InputError

LONGEST_BACK_OFF = 60.0  # seconds between tries where the server names no time
MOST_LIMITED = 50  # times that one image may be put off by a rate limit that names its end
UNITS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0}


@dataclass(frozen=True)
class ServerSettings:
    """Where the server is and how it is treated."""

    base_url: str | None = None
    concurrency: int = 16
    time_limit: float = 120.0  # seconds for one answer, from asking to its last byte
    retries: int = 5
    first_wait: float = 1.0  # seconds before the second try, doubled for each further one


class OpenAIBackend:
    """Asks a server, several images at a time, in the order of the tasks.

    Rate limits hold all requests until the server said that it takes more. Raises InputError where
    the server can't be used at all: no such model, no right to ask.
    """

    def __init__(self, model: str | None, sampling: Sampling, settings: ServerSettings) -> None:
        self.openai = need("openai", "openai", "--backend openai")
        need("PIL.Image", "pillow", "--backend openai")
        self.sampling = sampling
        self.settings = settings
        self.gate = Gate()
        self.name = model or asyncio.run(self._only_model())

    def _client(self) -> Any:
        # a server of one's own asks for no key, but the client wants one
        key = os.environ.get("OPENAI_API_KEY") or "none"
        return self.openai.AsyncOpenAI(
            api_key=key, base_url=self.settings.base_url, max_retries=0, timeout=None
        )

    async def _only_model(self) -> str:
        """Return the one model that the server has, where --model names none."""
        where = self.settings.base_url or "the server"
        try:
            async with self._client() as client:
                found = await asyncio.wait_for(client.models.list(), self.settings.time_limit)
        except Exception as error:  # the client raises its own and those of its transport
            raise InputError(
                f"{where} did not tell its models ({_told(error)}); is it running? Else name one "
                "with --model"
            ) from None
        names = [one.id for one in found.data]
        if len(names) != 1:
            raise InputError(f"{where} has {len(names)} models: choose with --model, {names[:5]}")
        return names[0]

    def describe(self, tasks: Iterable[Task], emit: Emit) -> None:
        """Describe the images; see Backend."""
        asyncio.run(self._describe(iter(tasks), emit))

    async def _describe(self, tasks: Iterable[Task], emit: Emit) -> None:
        async with self._client() as client:
            workers = [
                asyncio.ensure_future(self._work(client, tasks, emit))
                for _ in range(self.settings.concurrency)
            ]
            try:
                await asyncio.gather(*workers)
            finally:
                for worker in workers:
                    worker.cancel()
                await asyncio.gather(*workers, return_exceptions=True)

    async def _work(self, client: Any, tasks: Iterable[Task], emit: Emit) -> None:
        for task in tasks:  # shared by all workers: each takes the next
            emit(task, await self._outcome(client, task))

    async def _outcome(self, client: Any, task: Task) -> Outcome:
        try:
            url = await asyncio.to_thread(data_url, task.path, self.sampling.image_size)
        except (OSError, ValueError) as error:
            return Outcome(reason=f"the image can't be read ({error!s:.120})")
        tries = limited = 0
        while True:
            await self.gate.wait()
            try:
                return await asyncio.wait_for(self._ask(client, url), self.settings.time_limit)
            except self._failures() as error:
                self._refuse_useless(error)
                headers = getattr(getattr(error, "response", None), "headers", {})
                wait = said_wait(headers) if _status(error) in (429, 503) else None
                limited += wait is not None
                tries += wait is None
                if not _worth_trying(error) or tries > self.settings.retries:
                    return Outcome(reason=_told(error), broken=True)
                if limited > MOST_LIMITED:
                    return Outcome(reason="rate limit", broken=True)
                if wait is not None:
                    self.gate.hold(wait)
                else:
                    await asyncio.sleep(back_off(tries, self.settings.first_wait))

    def _failures(self) -> tuple[type[Exception], ...]:
        """Return what a try may fail with: the client's errors, and answers that are no answers."""
        answers = (ValueError, TypeError, AttributeError, LookupError)
        return (asyncio.TimeoutError, self.openai.OpenAIError, *answers, OSError)

    def _refuse_useless(self, error: Exception) -> None:
        status = _status(error)
        if status in (401, 403):
            raise InputError(f"the server refuses ({_told(error)}); set OPENAI_API_KEY") from None
        if status == 404:
            raise InputError(
                f"{self.settings.base_url or 'the server'} does not know model {self.name}, or has "
                f"no /chat/completions there ({_told(error)}); --base_url ends in /v1"
            ) from None

    async def _ask(self, client: Any, url: str) -> Outcome:
        message = {
            "role": "user",
            "content": [
                {"type": "image_url", "image_url": {"url": url}},
                {"type": "text", "text": self.sampling.prompt},
            ],
        }
        answer = await client.chat.completions.with_raw_response.create(
            model=self.name,
            messages=[message],
            temperature=self.sampling.temperature,
            top_p=self.sampling.top_p,
            max_tokens=self.sampling.max_new_tokens,
        )
        wait = spent_wait(answer.headers)
        if wait:
            self.gate.hold(wait)
        parsed = answer.parse()
        choice = parsed.choices[0]
        refusal = getattr(choice.message, "refusal", None)
        if choice.finish_reason == "content_filter":
            refusal = refusal or "content filter"
        return judge(choice.message.content, choice.finish_reason == "length", refusal)


class Gate:
    """Lets requests through, except while the server wants none."""

    def __init__(self) -> None:
        self._until = 0.0

    def hold(self, seconds: float) -> None:
        """Let nothing through for some seconds."""
        self._until = max(self._until, time.monotonic() + seconds)

    async def wait(self) -> None:
        """Return once requests are wanted."""
        while (left := self._until - time.monotonic()) > 0:
            await asyncio.sleep(left)


def back_off(tries: int, first: float) -> float:
    """Return the seconds before the next try: doubling, at most a minute, half of it random."""
    whole = min(LONGEST_BACK_OFF, first * 2 ** (tries - 1))
    return whole * (0.5 + 0.5 * random.random())


def said_wait(headers: Mapping[str, str]) -> float | None:
    """Return the seconds that a refusal says to wait, None where it says nothing."""
    told = headers.get("retry-after-ms")
    if told is not None:
        return _number(told, 0.001)
    told = headers.get("retry-after")
    if told is not None:
        return _number(told) if _number(told) is not None else _until_date(told)
    return spent_wait(headers) or None


def spent_wait(headers: Mapping[str, str]) -> float:
    """Return the seconds until an allowance that is used up (x-ratelimit-*) is filled again."""
    waits = [0.0]
    for what in ("requests", "tokens"):
        if headers.get(f"x-ratelimit-remaining-{what}") == "0":
            waits.append(duration(headers.get(f"x-ratelimit-reset-{what}", "")))
    return max(waits)


def duration(text: str) -> float:
    """Return the seconds of 20ms, 1.5s, 6m0s, 1h2m3s or a plain number; 0 for anything else."""
    if (plain := _number(text)) is not None:
        return plain
    parts = re.findall(r"([\d.]+)(ms|s|m|h)", text)
    return sum((_number(value) or 0.0) * UNITS[unit] for value, unit in parts)


def _number(text: str, unit: float = 1.0) -> float | None:
    try:
        return max(0.0, float(text) * unit)
    except ValueError:
        return None


def _until_date(text: str) -> float | None:
    try:
        return max(0.0, (parsedate_to_datetime(text) - datetime.now(timezone.utc)).total_seconds())
    except (TypeError, ValueError):
        return None


def _status(error: Exception) -> int | None:
    return getattr(error, "status_code", None)


def _worth_trying(error: Exception) -> bool:
    """Return whether another try may do: a request that the server can't take never does."""
    status = _status(error)
    return status is None or status in (408, 409, 425, 429) or status >= 500


def _told(error: Exception) -> str:
    if isinstance(error, asyncio.TimeoutError):
        return "no answer within --time_limit"
    text = " ".join(str(error).split()) or type(error).__name__
    return f"{text:.160}"
