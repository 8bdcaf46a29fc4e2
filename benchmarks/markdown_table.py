# SPDX-License-Identifier: Apache-2.0
"""Tables as Markdown has them."""

from collections.abc import Iterable, Sequence


def markdown(headings: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    def line(cells: Sequence[str]) -> str:
        return f"| {' | '.join(cells)} |"

    return "\n".join([line(headings), "|---" * len(headings) + "|", *map(line, lines)])
