# SPDX-License-Identifier: Apache-2.0
"""The engine with given replies in place of the small model's own, which never calls a tool."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from live_server import CHECKPOINT, TOKENIZER, engine, live
from xgdn.engine import FinishReason, Request, RequestEvent

_END = 0  # the token of <|endoftext|>


class ScriptedEngine:
    """Takes the engine's steps and tells other tokens, one reply per branch."""

    def __init__(self) -> None:
        self._engine = engine()
        self.replies: Sequence[str] = ()
        self.prompts: list[str] = []  # of the requests so far

    def loop(self, **hooks: Any) -> Any:
        loop = self._engine.loop(**hooks)

        def submit(request: Request, give: Callable[[Any], None]) -> int:
            self.prompts.append(TOKENIZER.decode(request.prompt, skip_special_tokens=False))
            script = _Script([[*TOKENIZER.encode(reply).ids, _END] for reply in self.replies], give)
            return int(loop.submit(script.request(request), script.give))

        return SimpleNamespace(submit=submit, cancel=loop.cancel, stop=loop.stop)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)


class _Script:
    def __init__(self, replies: Sequence[Sequence[int]], give: Callable[[Any], None]) -> None:
        self._replies = replies
        self._num_told = [0] * len(replies)
        self._give = give

    def request(self, asked: Request) -> Request:
        """As long as the replies, as far as it may be."""
        return Request(
            asked.prompt,
            max_new_tokens=min(asked.max_new_tokens, max(map(len, self._replies))),
            sampling=asked.sampling,
            ignore_eos=True,
            n=asked.n,
        )

    def give(self, event: RequestEvent) -> None:
        reply, begin = self._replies[event.branch], self._num_told[event.branch]
        if begin == len(reply):
            return
        tokens = reply[begin : begin + len(event.tokens)]
        self._num_told[event.branch] += len(tokens)
        has_ended = self._num_told[event.branch] == len(reply)
        told = {name: getattr(event, name) for name in dir(event) if not name.startswith("_")}
        told |= {"tokens": tokens, "logprobs": event.logprobs[: len(tokens)]}
        told |= {"finish_reason": FinishReason.STOP} if has_ended else {}
        self._give(SimpleNamespace(**told))


@contextmanager
def live_scripted(folder: Path, template: str, **settings: Any) -> Iterator[tuple[ScriptedEngine, str]]:
    """A server of the small model's directory with this chat template, in an empty folder."""
    for file in CHECKPOINT.iterdir():
        (folder / file.name).symlink_to(file)
    (folder / "chat_template.jinja").write_text(template)
    scripted = ScriptedEngine()
    with live(scripted, folder, **settings) as url:
        yield scripted, url
