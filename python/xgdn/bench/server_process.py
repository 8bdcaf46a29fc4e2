# SPDX-License-Identifier: Apache-2.0
"""`xgdn serve` as a child process."""

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn, TextIO

from xgdn.bench.client import ServerError

_PROGRAM = "from xgdn.cli import app; app()"
_STOP_SECONDS = 60  # the server itself gives running requests 30


def vocab_size(model: Path) -> int:
    """Return the vocabulary size in a checkpoint's config.json.

    Raises:
        ServerError: it cannot be read.
    """
    path = model / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        return int(config.get("text_config", config)["vocab_size"])
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise ServerError(f"{path}: vocab_size cannot be read: {error!r}") from None


@contextmanager
def running_server(model: Path, options: Sequence[str], api_key: str | None) -> Iterator[str]:
    """Run `xgdn serve MODEL OPTIONS` on a free port for the block and yield its address; SIGTERM ends it too.

    To be called from the main thread.

    Raises:
        ServerError: the server exited on its own.
    """
    arguments = [sys.executable, "-c", _PROGRAM, "serve", str(model), "--port", "0", "--json", *options]
    environment = os.environ | ({} if api_key is None else {"XGDN_API_KEY": api_key})
    with tempfile.TemporaryFile("w+") as log, _sigterm_as_exception():
        process = subprocess.Popen(arguments, env=environment, stdout=subprocess.PIPE, stderr=log)
        try:
            yield _address(process, log)
            _check_alive(process, log)
        except ServerError:
            _check_alive(process, log)  # its log says more
            raise
        finally:
            process.terminate()
            try:
                process.wait(_STOP_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


@contextmanager
def _sigterm_as_exception() -> Iterator[None]:
    """Raise an exception on SIGTERM: the default action would end this process and leave the child running."""

    def leave(*_: object) -> NoReturn:
        raise SystemExit(128 + signal.SIGTERM)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _address(process: subprocess.Popen[bytes], log: TextIO) -> str:
    """Return the address in the document that the server prints once it is ready; other output before it is skipped."""
    assert process.stdout is not None
    with process.stdout as stdout:
        for line in stdout:
            try:
                return str(json.loads(line)["address"])
            except (ValueError, LookupError, TypeError):
                continue
    process.wait()  # its output has ended, so it is exiting
    _check_alive(process, log)
    raise ServerError("the server ended before it took requests")


def _check_alive(process: subprocess.Popen[bytes], log: TextIO) -> None:
    status = process.poll()
    if status is not None:
        last = _text(log).strip().splitlines()[-1:]
        raise ServerError(f"`xgdn serve` ended with status {status}: {' '.join(last) or 'it said nothing'}")


def _text(log: TextIO) -> str:
    # Not by the file object: its position is the child's too.
    return os.pread(log.fileno(), os.fstat(log.fileno()).st_size, 0).decode(errors="replace")
