# SPDX-License-Identifier: Apache-2.0
"""Conversations whose state an engine holds between requests."""

from collections.abc import Sequence
from os import PathLike, fspath

from xgdn import _C
from xgdn._C import GenerationResult, Request, SamplingParams
from xgdn.engine import Engine

__all__ = ["Session"]

_REQUEST = Request([])  # of default options


class Session:
    """Tokens, and their state as far as the engine's prefix cache has it.

    With `replay_states` that is after all but the last token of a reply, otherwise at the end of the whole chunks of 64
    tokens of the last prompt. What is not held is computed again, so whatever a session does, its replies are those to
    its tokens alone. A session holds at most one of the engine's `prefix_cache_slots`, which its forks share until they
    go on; use it from one thread at a time.

    Raises:
        xgdn.errors.RequestError: the engine has no `prefix_cache_slots`.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._session = _C.Session(engine._engine)

    def generate(
        self,
        tokens: Sequence[int],
        *,
        max_new_tokens: int = _REQUEST.max_new_tokens,
        sampling: SamplingParams | None = None,
        stop_token_ids: Sequence[int] = (),
        ignore_eos: bool = _REQUEST.ignore_eos,
    ) -> GenerationResult:
        """Append tokens and what follows them; return the reply.

        Raises what `Engine.generate` raises; the session is as it was then.
        """
        return self._session.generate(
            Request(
                list(tokens),
                max_new_tokens=max_new_tokens,
                sampling=sampling or SamplingParams(),
                stop_token_ids=list(stop_token_ids),
                ignore_eos=ignore_eos,
            )
        )

    def set_tokens(self, tokens: Sequence[int]) -> None:
        """Make these its tokens, whatever they were, with the state that requests have computed of them.

        For those who run the requests themselves, to stream them. Raises RangeError for a token outside the vocabulary.
        """
        self._session.set_tokens(list(tokens))

    def fork(self) -> "Session":
        """Return another session with the same tokens and the same state."""
        return self._of(self._engine, self._session.fork(self._engine._engine))

    def truncate(self, num_tokens: int) -> None:
        """Take back the tokens behind the first `num_tokens`. Raises RangeError for more than there are."""
        self._session.truncate(num_tokens)

    def save(self, path: str | PathLike[str]) -> None:
        """Write tokens and state to a safetensors file, which is complete or not there. Raises CheckpointError."""
        self._session.save(fspath(path))

    @classmethod
    def load(cls, engine: Engine, path: str | PathLike[str]) -> "Session":
        """Return the session of a file, of the same model on whatever machine.

        Raises:
            xgdn.errors.CheckpointError: the file is damaged, of another version, or of another model.
            xgdn.errors.OutOfSlots, OutOfBlocks: its state has no room in the engine.
        """
        return cls._of(engine, _C.Session.load(engine._engine, fspath(path)))

    @classmethod
    def _of(cls, engine: Engine, session: _C.Session) -> "Session":
        made = cls.__new__(cls)
        made._engine, made._session = engine, session
        return made

    @property
    def tokens(self) -> list[int]:
        """Tokens so far, prompts and replies."""
        return self._session.tokens

    @property
    def num_kept(self) -> int:
        """Of these, the first whose state is held."""
        return self._session.num_kept
