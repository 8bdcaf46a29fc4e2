# SPDX-License-Identifier: Apache-2.0
"""A workload: prompts, output lengths and arrivals, drawn from a seed."""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate


@dataclass(frozen=True)
class LoadPlan:
    """`rates` in requests per second; of `check` requests, the share `min_equal` must be answered as they are alone."""

    rates: Sequence[float]
    max_concurrency: int | None = None
    check: int = 8
    min_equal: float = 1.0


@dataclass(frozen=True)
class Lengths:
    """Numbers of tokens, uniform from `lowest` to `highest`."""

    lowest: int
    highest: int

    def draw(self, chance: random.Random) -> int:
        return chance.randint(self.lowest, self.highest)


@dataclass(frozen=True)
class LoadRequest:
    prompt: Sequence[int]
    max_tokens: int


class Workload:
    """`count` requests; the same arguments give the same requests.

    Token ids are uniform in 0 .. `vocab_size` - 1. Each kind of draw has its own stream of random numbers, so
    that another range of lengths leaves the arrivals as they are.
    """

    def __init__(
        self, count: int, *, prompt_tokens: Lengths, output_tokens: Lengths, vocab_size: int, seed: int
    ) -> None:
        prompts, outputs, ids = (random.Random(f"{seed} {name}") for name in ("prompts", "outputs", "ids"))
        self._seed = seed
        self.requests = [
            LoadRequest(
                prompt=[ids.randrange(vocab_size) for _ in range(prompt_tokens.draw(prompts))],
                max_tokens=output_tokens.draw(outputs),
            )
            for _ in range(count)
        ]

    def arrivals(self, rate: float) -> list[float]:
        """Return when each request is due, in seconds from the start: a Poisson process of `rate` requests per second.

        All rates share the same draws, stretched. An infinite rate has them all due at once.
        """
        if math.isinf(rate):
            return [0.0] * len(self.requests)
        chance = random.Random(f"{self._seed} arrivals")
        return list(accumulate(chance.expovariate(1.0) / rate for _ in self.requests))

    def sample(self, count: int) -> list[int]:
        """Return the indices of at most `count` requests, spread over the workload."""
        count = min(count, len(self.requests))
        return [i * len(self.requests) // count for i in range(count)]
