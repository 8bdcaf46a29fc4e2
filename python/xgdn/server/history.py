# SPDX-License-Identifier: Apache-2.0
"""The engine's last minutes, one sample for every two seconds, in memory of a fixed size."""

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

_BUCKETS_PER_OCTAVE = 32
_SHORTEST = 1e-6  # seconds; shorter ones count as zero
_LONGEST = 1e6
_ZERO = -1  # the bucket of zero


class LogHistogram:
    """Durations by their logarithm: a percentile is within 1.1% of the exact one, however many there are."""

    def __init__(self) -> None:
        self.count = 0
        self._counts: dict[int, int] = {}  # by bucket: bucket i begins at _SHORTEST * 2^(i / _BUCKETS_PER_OCTAVE)

    def observe(self, seconds: float) -> None:
        bucket = _ZERO
        if seconds >= _SHORTEST:
            bucket = int(math.log2(min(seconds, _LONGEST) / _SHORTEST) * _BUCKETS_PER_OCTAVE)
        self._counts[bucket] = self._counts.get(bucket, 0) + 1
        self.count += 1

    def percentile(self, fraction: float) -> float | None:
        """Return the shortest duration that at least this fraction does not exceed; None if nothing was observed."""
        rank = max(math.ceil(fraction * self.count), 1)
        for bucket in sorted(self._counts):
            rank -= self._counts[bucket]
            if rank <= 0:
                middle = float(_SHORTEST * 2 ** ((bucket + 0.5) / _BUCKETS_PER_OCTAVE))
                return 0.0 if bucket == _ZERO else middle
        return None

    def clear(self) -> None:
        self.count = 0
        self._counts.clear()


@dataclass(frozen=True)
class Levels:
    """What is held at one moment."""

    requests_running: int = 0  # sequences
    requests_waiting: int = 0
    slots_used: int = 0
    kv_blocks_used: int = 0

    def peak(self, other: "Levels") -> "Levels":
        """Return the higher one of each."""
        return Levels(*map(max, vars(self).values(), vars(other).values()))


@dataclass(frozen=True)
class Sample:
    """What happened in `History.seconds` before `time`."""

    time: float  # of the clock that `History.advance` gets
    generated_tokens_per_second: float
    prompt_tokens_per_second: float  # computed, so without those that the prefix cache had
    # Seconds; None where there were none.
    time_to_first_token_p50: float | None
    time_to_first_token_p95: float | None
    inter_token_p50: float | None
    inter_token_p95: float | None
    peak: Levels
    cached_prefix_share: float | None  # of the prompt tokens that were looked up; None where none were

    def document(self) -> dict[str, float | None]:
        """Return all figures by name, those of `peak` beside the others."""
        return {name: value for name, value in {**vars(self), **vars(self.peak)}.items() if name != "peak"}


@dataclass
class _PromptTokens:
    """Tokens of prompts in the sample under way."""

    computed: int = 0
    looked_up: int = 0
    found: int = 0


class History:
    """The samples up to now. It has no timer: whoever counts or reads says what time it is.

    Args:
        begin: start of the first sample, in seconds of the clock that all times here are of.
        seconds: length of a sample.
        max_samples: number of samples kept, by default ten minutes.
    """

    def __init__(self, begin: float, *, seconds: float = 2.0, max_samples: int = 300) -> None:
        self.seconds = seconds
        self.max_samples = max_samples
        # Of the sample under way; each token is observed in one of the two.
        self.time_to_first_token = LogHistogram()
        self.inter_token = LogHistogram()
        self._begin = begin
        self._samples: deque[Sample] = deque(maxlen=max_samples)
        self._prompt_tokens = _PromptTokens()
        self._levels = self._peak = Levels()

    def advance(self, now: float) -> None:
        """End the samples that are over. What is counted afterwards belongs to the one under way at `now`."""
        num_over = int((now - self._begin) / self.seconds)
        if num_over > self.max_samples + 1:  # nothing that was counted is within the history any more
            self._begin += (num_over - self.max_samples - 1) * self.seconds
        while self._begin + self.seconds <= now:
            self._end_sample()

    def set_levels(self, levels: Levels) -> None:
        self._levels = levels
        self._peak = self._peak.peak(levels)

    def count_prompt_tokens(self, *, computed: int = 0, looked_up: int = 0, found: int = 0) -> None:
        """Count tokens of prompts: those computed, those looked up in the prefix cache and those found there."""
        self._prompt_tokens.computed += computed
        self._prompt_tokens.looked_up += looked_up
        self._prompt_tokens.found += found

    def since(self, time: float) -> Sequence[Sample]:
        """Return the samples that ended after `time`, the oldest first."""
        return [sample for sample in self._samples if sample.time > time]

    def _end_sample(self) -> None:
        self._begin += self.seconds
        first, between, prompt = self.time_to_first_token, self.inter_token, self._prompt_tokens
        self._samples.append(
            Sample(
                time=self._begin,
                generated_tokens_per_second=(first.count + between.count) / self.seconds,
                prompt_tokens_per_second=prompt.computed / self.seconds,
                time_to_first_token_p50=first.percentile(0.5),
                time_to_first_token_p95=first.percentile(0.95),
                inter_token_p50=between.percentile(0.5),
                inter_token_p95=between.percentile(0.95),
                peak=self._peak,
                cached_prefix_share=prompt.found / prompt.looked_up if prompt.looked_up else None,
            )
        )
        first.clear()
        between.clear()
        self._prompt_tokens = _PromptTokens()
        self._peak = self._levels
