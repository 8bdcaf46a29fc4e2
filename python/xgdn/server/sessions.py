# SPDX-License-Identifier: Apache-2.0
"""Open sessions by name, and their files: each is of one client, and nobody else finds it."""

import hashlib
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote

from xgdn.engine import Engine
from xgdn.errors import CheckpointError, OutOfBlocks, OutOfSlots, RangeError, RequestError
from xgdn.server.api_error import ApiError, bad_request
from xgdn.server.api_keys import Client
from xgdn.server.metrics import Metrics
from xgdn.server.session_schemas import (
    CreateSessionBody,
    ForkSessionBody,
    SaveSessionBody,
    TruncateSessionBody,
    is_name,
)
from xgdn.server.settings import Settings
from xgdn.session import Session

_SUFFIX = ".safetensors"
_LONGEST_FOLDER = 128  # characters of a client's name

_Key = tuple[str | None, str]  # names of the client and of the session


@dataclass
class _Open:
    name: str
    last_used: float  # of the clock
    session: Session | None = None  # None: not there yet
    is_busy: bool = True
    created_at: int = field(default_factory=lambda: int(time.time()))
    num_tokens: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)  # of the session, which one thread may use at a time

    def own(self) -> Session:
        assert self.session is not None, "found by nobody before it is there"
        return self.session

    def summary(self) -> dict[str, Any]:
        names = {"id": self.name, "object": "session", "created_at": self.created_at}
        return {**names, "num_tokens": self.num_tokens, "is_busy": self.is_busy}


class Turn:
    """A session's part in a request, which alone has it until the end."""

    def __init__(self, entry: _Open, release: Callable[[], None]) -> None:
        self._entry = entry
        self._release = release
        with entry.lock:
            self.tokens: Sequence[int] = entry.own().tokens  # so far

    def keep(self, tokens: Sequence[int]) -> None:
        """Make these the session's tokens. May wait for a step."""
        with self._entry.lock:
            self._entry.own().set_tokens(tokens)
        self._entry.num_tokens = len(tokens)

    def end(self) -> None:
        """Let others have it. Never waits."""
        self._release()


class Sessions:
    """Keeps sessions until they are closed, or idle for too long.

    Any thread may call it. All but `summaries` and `files` may wait for a step of the engine.
    """

    def __init__(
        self, engine: Engine, settings: Settings, metrics: Metrics, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._engine = engine
        self._settings = settings
        self._clock = clock
        self._open: dict[_Key, _Open] = {}
        self._lock = threading.Lock()
        self._expired = metrics.sessions_expired
        metrics.sessions.set_function(lambda: len(self._open))
        metrics.session_tokens.set_function(lambda: sum(entry.num_tokens for entry in [*self._open.values()]))

    def create(self, client: Client, body: CreateSessionBody) -> dict[str, Any]:
        """Open a session, of a file if the body names one; raises ApiError."""
        path = None if body.file is None else self._file(client, body.file)
        if path is not None and not path.exists():
            raise _no_file(body.file)
        with self._reserved(client, body.id) as entry:
            entry.session = self._new() if path is None else self._loaded(path)
            return self._document(entry)

    def describe(self, client: Client, name: str) -> dict[str, Any]:
        with self._lock:
            entry = self._find(client, name)
        return self._document(entry)

    def summaries(self, client: Client) -> list[dict[str, Any]]:
        with self._lock:
            own = [entry for (owner, _), entry in self._open.items() if owner == client.name]
            return [entry.summary() for entry in own if entry.session is not None]

    def close(self, client: Client, name: str) -> None:
        with self._held(client, name) as entry:
            with self._lock:
                del self._open[client.name, name]
            with entry.lock:
                entry.session = None  # and its state, which may wait for a step

    def fork(self, client: Client, name: str, body: ForkSessionBody) -> dict[str, Any]:
        with self._held(client, name) as parent, self._reserved(client, body.id) as entry:
            with parent.lock:
                entry.session = parent.own().fork()
            return self._document(entry)

    def truncate(self, client: Client, name: str, body: TruncateSessionBody) -> dict[str, Any]:
        with self._held(client, name) as entry:
            try:
                with entry.lock:
                    entry.own().truncate(body.num_tokens)
            except RangeError:
                message = f"'num_tokens': expected at most {entry.num_tokens}, got {body.num_tokens}."
                raise bad_request(message, "num_tokens") from None
            return self._document(entry)

    def save(self, client: Client, name: str, body: SaveSessionBody) -> dict[str, Any]:
        file = body.file or name
        path = self._file(client, file)
        with self._held(client, name) as entry:
            others = [it for it in self._files(client) if it != path]
            if len(others) >= self._settings.max_session_files:
                message = f"Expected at most {self._settings.max_session_files} files, got {len(others)} and another."
                raise ApiError(409, "too_many_session_files", message)
            try:
                path.parent.mkdir(mode=0o700, exist_ok=True)
                with entry.lock:
                    entry.own().save(path)
            except (CheckpointError, OSError) as error:
                raise ApiError(500, "session_file_error", _without_path(error, path)) from None
            return _file_document(path)

    def files(self, client: Client) -> list[dict[str, Any]]:
        return [_file_document(path) for path in self._files(client)]

    def delete_file(self, client: Client, name: str) -> None:
        try:
            self._file(client, name).unlink()
        except FileNotFoundError:
            raise _no_file(name) from None

    def begin(self, client: Client, name: str) -> Turn:
        """Have the session for a request until `Turn.end`; raises ApiError when there is none, or another has it."""
        entry = self._hold(client, name)
        return Turn(entry, lambda: self._release(entry))

    def expire(self) -> None:
        """Close the sessions that have been idle for too long."""
        oldest = self._clock() - self._settings.session_idle_seconds
        with self._lock:
            keys = [key for key, entry in self._open.items() if not entry.is_busy and entry.last_used < oldest]
            expired = [self._open.pop(key) for key in keys]
        self._expired.inc(len(expired))

    def _find(self, client: Client, name: str) -> _Open:
        entry = self._open.get((client.name, name))
        if entry is None or entry.session is None:
            raise _not_found(name)
        return entry

    def _hold(self, client: Client, name: str) -> _Open:
        with self._lock:
            entry = self._find(client, name)
            if entry.is_busy:
                message = f"The session '{name}' is in use by another request."
                raise ApiError(409, "session_busy", message, headers={"Retry-After": "1"})
            entry.is_busy = True
        return entry

    def _release(self, entry: _Open) -> None:
        entry.last_used = self._clock()
        entry.is_busy = False

    @contextmanager
    def _held(self, client: Client, name: str) -> Iterator[_Open]:
        entry = self._hold(client, name)
        try:
            yield entry
        finally:
            self._release(entry)

    @contextmanager
    def _reserved(self, client: Client, name: str | None) -> Iterator[_Open]:
        """Give a new entry its place, which others count but do not find until it has a session."""
        self.expire()
        name = name or f"sess_{uuid.uuid4().hex}"
        entry = _Open(name, self._clock())
        with self._lock:
            self._check_room(client)
            if (client.name, name) in self._open:
                raise ApiError(409, "session_exists", f"There is a session '{name}' already.")
            self._open[client.name, name] = entry
        try:
            yield entry
        except BaseException:
            with self._lock:
                del self._open[client.name, name]
            raise
        self._release(entry)

    def _check_room(self, client: Client) -> None:
        num_own = sum(owner == client.name for owner, _ in self._open)
        limit = client.limits.open_sessions
        if limit is not None and num_own >= limit:
            raise _too_many(f"{num_own} of {limit} sessions of this key are open.")
        if len(self._open) >= self._settings.max_sessions:
            raise _too_many(f"{len(self._open)} of {self._settings.max_sessions} sessions are open.")

    def _new(self) -> Session:
        try:
            return Session(self._engine)
        except RequestError:
            message = "Sessions need a prefix cache: the server has no --prefix-cache-slots."
            raise ApiError(501, "sessions_disabled", message) from None

    def _loaded(self, path: Path) -> Session:
        self._new()
        try:
            return Session.load(self._engine, path)
        except CheckpointError as error:
            raise bad_request(_without_path(error, path), "file", "invalid_session_file") from None
        except (OutOfSlots, OutOfBlocks):
            raise _too_many("the state of the file has no room beside them.") from None

    def _document(self, entry: _Open) -> dict[str, Any]:
        with entry.lock:
            if entry.session is None:  # another request has closed it
                raise _not_found(entry.name)
            entry.num_tokens = len(entry.session.tokens)
            num_kept = entry.session.num_kept
        return {**entry.summary(), "cached_tokens": num_kept}

    def _folder(self, client: Client) -> Path:
        directory = self._settings.session_dir
        if directory is None:
            raise ApiError(501, "no_session_dir", "The server keeps no files of sessions: it has no --session-dir.")
        if client.name is None:
            return directory / "anyone"
        name = quote(client.name, safe="")
        return directory / f"key-{name if len(name) <= _LONGEST_FOLDER else hashlib.sha256(name.encode()).hexdigest()}"

    def _file(self, client: Client, name: str) -> Path:
        """Return its path, which is in the client's folder, as no name has a dot or a slash."""
        folder = self._folder(client)
        if not is_name(name):
            raise _no_file(name)
        return folder / f"{name}{_SUFFIX}"

    def _files(self, client: Client) -> list[Path]:
        if self._settings.session_dir is None:
            return []
        return sorted(it for it in self._folder(client).glob(f"*{_SUFFIX}") if is_name(it.name.removesuffix(_SUFFIX)))


def _file_document(path: Path) -> dict[str, Any]:
    size, modified = 0, 0
    with suppress(FileNotFoundError):  # it has just been deleted
        size, modified = path.stat().st_size, int(path.stat().st_mtime)
    return {"file": path.name.removesuffix(_SUFFIX), "object": "session.file", "bytes": size, "created_at": modified}


def _too_many(message: str) -> ApiError:
    return ApiError(429, "too_many_sessions", f"Too many sessions: {message}", headers={"Retry-After": "1"})


def _not_found(name: str) -> ApiError:
    return ApiError(404, "session_not_found", f"There is no session '{name}', or no longer.")


def _no_file(name: str | None) -> ApiError:
    return ApiError(404, "session_file_not_found", f"There is no file '{name}' of a session.")


def _without_path(error: Exception, path: Path) -> str:
    """Return its message without the server's directories."""
    return str(error).replace(f"{path.parent}/", "")
