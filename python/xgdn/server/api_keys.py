# SPDX-License-Identifier: Apache-2.0
"""The keys that clients send, what each may use, and what is left of it."""

import hashlib
import hmac
import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from xgdn.server.api_error import ApiError, bad_request

_MINUTE = 60.0  # seconds
_Limit = Annotated[int, Field(ge=1)]


class Limits(BaseModel):
    """What one key may use; None: as much as the server has."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    requests_per_minute: _Limit | None = None
    tokens_per_minute: _Limit | None = None  # of prompts and answers
    concurrent_sequences: _Limit | None = None  # that run or wait
    open_sessions: _Limit | None = None
    max_tokens: _Limit | None = None  # to generate for a choice
    max_body_bytes: _Limit | None = None


class ApiKey(Limits):
    """A key as it stands in the file of keys; `name` is for the log."""

    name: Annotated[str, Field(min_length=1)]
    key: Annotated[str, Field(pattern="^[ -~]+$", repr=False)]  # what a header can hold


def read_api_keys(path: Path) -> list[ApiKey]:
    """Return the keys of a JSON file, a list of objects.

    Raises:
        ValueError: what is wrong with it, without any key.
        OSError: it cannot be read.
    """
    try:
        keys = TypeAdapter(list[ApiKey]).validate_python(json.loads(path.read_bytes()))
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        place = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in first["loc"])
        raise ValueError(f"{path}: {place.removeprefix('.') or 'the file'}: {first['msg']}") from None
    except ValueError as error:  # of JSON, or of UTF-8
        raise ValueError(f"{path}: no JSON document: {error}") from None
    check_distinct(keys)
    return keys


def check_distinct(keys: Sequence[ApiKey]) -> None:
    """Raise ValueError where two keys have the same name, or are the same."""
    names: dict[str, str] = {}  # by key
    for key in keys:
        if key.name in names.values():
            raise ValueError(f"expected API keys of different names, got '{key.name}' twice")
        if key.key in names:
            raise ValueError(f"expected different API keys, got the same for '{names[key.key]}' and '{key.name}'")
        names[key.key] = key.name


class Allowance:
    """An amount per minute that comes back evenly: all of it may be taken at once, and more, which delays the next."""

    def __init__(self, per_minute: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.per_minute = per_minute
        self._clock = clock
        self._level = float(per_minute)
        self._time = clock()

    def take(self, amount: int) -> None:
        self._level = self.level() - amount
        self._time = self._clock()

    def level(self) -> float:
        """Return what can be taken now; below 0 if more was taken than there was."""
        came_back = (self._clock() - self._time) * self.per_minute / _MINUTE
        return min(float(self.per_minute), self._level + came_back)

    def seconds_until(self, level: float) -> float:
        return max(0.0, (level - self.level()) * _MINUTE / self.per_minute)


class Client:
    """Whoever sends one key: what it may use, and what it has used."""

    def __init__(self, name: str | None, limits: Limits, clock: Callable[[], float] = time.monotonic) -> None:
        self.name = name  # None: the server has no keys
        self.limits = limits
        self._num_sequences = 0
        per_minute = {"requests": limits.requests_per_minute, "tokens": limits.tokens_per_minute}
        self._allowances = {kind: Allowance(limit, clock) for kind, limit in per_minute.items() if limit is not None}

    def admit(self) -> None:
        """Count a request; raise ApiError when there have been too many, or too many tokens."""
        for kind, allowance in self._allowances.items():
            # What a request will cost in tokens is known at its end, so one is enough for it to begin.
            if (wait := allowance.seconds_until(1)) > 0:
                message = (
                    f"Rate limit reached: {allowance.per_minute} {kind} per minute. Try again in {_duration(wait)}."
                )
                raise _too_many(message, wait)
        if "requests" in self._allowances:
            self._allowances["requests"].take(1)

    def charge(self, num_tokens: int) -> None:
        if "tokens" in self._allowances:
            self._allowances["tokens"].take(num_tokens)

    @contextmanager
    def sequences(self, count: int) -> Iterator[None]:
        """Hold `count` of the sequences that the key may have at once; raise ApiError when they are too many."""
        limit = self.limits.concurrent_sequences
        if limit is not None and count > limit:
            raise bad_request(f"Expected at most {limit} sequences (prompts x n) with this key, got {count}.")
        if limit is not None and self._num_sequences + count > limit:
            message = f"Rate limit reached: {self._num_sequences} of {limit} concurrent sequences run or wait."
            raise _too_many(message, 1)
        self._num_sequences += count
        try:
            yield
        finally:
            self._num_sequences -= count

    def headers(self) -> dict[str, str]:
        """Return what is left, as OpenAI's headers."""
        headers = {}
        for kind, allowance in self._allowances.items():
            headers[f"x-ratelimit-limit-{kind}"] = str(allowance.per_minute)
            headers[f"x-ratelimit-remaining-{kind}"] = str(max(0, math.floor(allowance.level())))
            headers[f"x-ratelimit-reset-{kind}"] = _duration(allowance.seconds_until(allowance.per_minute))
        return headers


class Clients:
    """The clients of a server by their keys; without keys, whoever asks is the same one."""

    def __init__(self, keys: Sequence[ApiKey]) -> None:
        self._anyone = None if keys else Client(None, Limits())
        self._by_digest = [(_digest(key.key), Client(key.name, key)) for key in keys]

    def find(self, authorization: str) -> Client | None:
        """Return who sends this header; None: nobody that is known. Its time does not depend on the keys."""
        given = _digest(authorization.removeprefix("Bearer ")) if authorization.startswith("Bearer ") else b""
        found = self._anyone
        for digest, client in self._by_digest:
            if hmac.compare_digest(digest, given):
                found = client
        return found


def _digest(key: str) -> bytes:
    """Equally long for every key, so that comparing them tells nothing of their lengths."""
    return hashlib.sha256(key.encode()).digest()


def _too_many(message: str, wait: float) -> ApiError:
    return ApiError(429, "rate_limit_exceeded", message, headers={"Retry-After": str(math.ceil(wait))})


def _duration(seconds: float) -> str:
    """Return seconds as OpenAI writes them: 12ms, 8.64s, 6m0s."""
    if seconds < 1:
        return f"{math.ceil(round(seconds * 1000, 3))}ms"
    if seconds < _MINUTE:
        return f"{seconds:.2f}".rstrip("0").rstrip(".") + "s"
    minutes, rest = divmod(math.ceil(seconds), 60)
    return f"{minutes}m{rest}s"
