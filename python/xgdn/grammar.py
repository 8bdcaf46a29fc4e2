# SPDX-License-Identifier: Apache-2.0
"""What a host plugs in to say which tokens may come next: a JSON schema, a regular expression, any grammar."""

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor


class TokenMatcher(Protocol):
    """The place of one sequence in a grammar.

    The engine calls it from threads beside the one that steps, one call after the other, while the model computes. What
    a call raises ends the sequence with that error.
    """

    def write_mask(self, mask: Tensor) -> None:
        """Write which tokens may come next into `mask`, int32 `[ceil(vocab_size / 32)]`.

        Bit i % 32 of word i // 32 is token i. Where the grammar may end, the tokens that end a reply are among them;
        where it must, there are no others.
        """

    def accept(self, tokens: Sequence[int]) -> None:
        """Take tokens that came, in order; not the one that ends the reply."""

    def forced(self) -> Sequence[int]:
        """Return the tokens that must come next, as far as there is only one way; it may be empty all the same."""


class Grammar(Protocol):
    """A grammar, compiled for a vocabulary."""

    def matcher(self) -> TokenMatcher:
        """Return a matcher at the beginning of a reply."""
