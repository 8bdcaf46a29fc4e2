# SPDX-License-Identifier: Apache-2.0
"""A process in which grammars are compiled for trial, since there are some that end the process which compiles them.

The engine recurses along chains of rules and references, and intersections of regular expressions take time and memory
without a limit. `GrammarGuard` starts this file as a program that imports nothing of the server.
"""

import ctypes
import json
import resource
import selectors
import subprocess
import sys
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llguidance import LLMatcher, LLParserLimits, LLTokenizer, TokenizerWrapper

# What one grammar may take: states of a lexer have 1 to 2 kB, and some 20,000 units of fuel, or items, a millisecond.
LIMITS = LLParserLimits(
    max_items_in_row=20_000,
    initial_lexer_fuel=1_000_000,
    step_lexer_fuel=200_000,
    step_max_items=100_000,
    max_lexer_states=20_000,
    max_grammar_size=500_000,
    verbose_errors=False,
)
SECONDS, MAX_BYTES = 5.0, 512 * 2**20
_START_SECONDS = 60.0
_STACK_BYTES = 2**20  # less than any thread has that compiles or follows a grammar later


@dataclass(frozen=True)
class Trial:
    """How it went: `error` is the engine's, `num_bytes` what the compiled grammar holds."""

    error: str = ""
    num_bytes: int = 0


class GrammarGuard:
    """The process, which starts with the first grammar. One thread at a time may use it.

    Args:
        vocab_size: of the model.
        special_tokens: names by id.
    """

    def __init__(self, vocab_size: int, special_tokens: Mapping[int, str]) -> None:
        self._setup = [vocab_size, list(special_tokens.items())]
        self._process: subprocess.Popen[str] | None = None

    def compile(self, grammar: str) -> Trial | None:
        """Compile a grammar for its first token; None: it takes more than SECONDS or MAX_BYTES."""
        answer = self._ask(grammar, SECONDS)
        return None if answer is None else Trial(**answer)

    def stop(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None

    def _ask(self, grammar: str, seconds: float) -> Any:
        if self._process is None:
            command = [sys.executable, str(Path(__file__))]
            pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
            self._process = subprocess.Popen(command, text=True, start_new_session=True, **pipes)
            if self._exchange(self._setup, _START_SECONDS) is None:
                raise RuntimeError(f"{' '.join(command)}: expected it to start within {_START_SECONDS:g} s")
        return self._exchange(grammar, seconds)

    def _exchange(self, document: object, seconds: float) -> Any:
        """Return the process's answer; None, and no process is left, if there is none."""
        assert self._process is not None
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        line = ""
        try:
            print(json.dumps(document), file=self._process.stdin, flush=True)
            with selectors.DefaultSelector() as selector:
                selector.register(self._process.stdout, selectors.EVENT_READ)
                line = self._process.stdout.readline() if selector.select(seconds) else ""
        except BrokenPipeError:
            pass
        if not line:
            self.stop()
            return None
        return json.loads(line)


class _Tokens:
    """Bytes, behind tokens of the model that no text has."""

    bos_token_id = None
    eos_token_id = 0

    def __init__(self, vocab_size: int, special_tokens: Mapping[int, str]) -> None:
        names = [special_tokens.get(token, f"<[{token}]>") for token in range(vocab_size)]
        self.tokens = [*(b"\xff" + name.encode() for name in names), *(bytes([byte]) for byte in range(256))]
        self.special_token_ids = list(range(vocab_size))
        self._vocab_size = vocab_size

    def __call__(self, text: str) -> list[int]:
        return [self._vocab_size + byte for byte in text.encode()]


class _MallocUse(ctypes.Structure):
    """glibc's `struct mallinfo2`."""

    _fields_ = tuple(
        (name, ctypes.c_size_t)
        for name in "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost".split()  # noqa: SIM905
    )


def _allocated() -> int:
    """Return the bytes in use; 0 where the C library does not tell."""
    mallinfo2 = getattr(ctypes.CDLL(None), "mallinfo2", None)
    if mallinfo2 is None:
        return 0
    mallinfo2.restype = _MallocUse
    use = mallinfo2()
    return int(use.uordblks + use.hblkhd)


def _compile(tokenizer: LLTokenizer, grammar: str) -> Trial:
    before = _allocated()
    matcher = LLMatcher(tokenizer, grammar, log_level=0, limits=LIMITS)
    if not matcher.is_error():
        matcher.compute_bitmask()
    return Trial(matcher.get_error(), _allocated() - before)


def main() -> None:
    vocab_size, special_tokens = json.loads(sys.stdin.readline())
    tokenizer = LLTokenizer(TokenizerWrapper(_Tokens(vocab_size, dict(special_tokens))))
    address_space = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize() + MAX_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (address_space, address_space))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    threading.stack_size(_STACK_BYTES)
    print("true", flush=True)
    for line in sys.stdin:
        trials: list[Trial] = []
        thread = threading.Thread(target=lambda: trials.append(_compile(tokenizer, json.loads(line))))  # noqa: B023
        thread.start()
        thread.join()
        print(json.dumps(vars(trials[0])), flush=True)


if __name__ == "__main__":
    main()
