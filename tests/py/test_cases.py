# SPDX-License-Identifier: Apache-2.0
"""What the other tests rest on."""

from __future__ import annotations

import itertools

from cases import pairwise


def test_any_two_values_meet_in_few_rows() -> None:
    for sizes in ((1,), (3, 2), (2, 2, 2, 2), (14, 6, 2, 2), (16, 3, 2, 3), (4, 4, 4, 4, 4)):
        axes = [[f"{i}.{a}" for a in range(size)] for i, size in enumerate(sizes)]
        rows = pairwise(*axes)
        assert all(value in axis for row in rows for value, axis in zip(row, axes, strict=True))
        for (i, one), (j, other) in itertools.combinations(enumerate(axes), 2):
            assert {(row[i], row[j]) for row in rows} == set(itertools.product(one, other))
        largest = sorted(sizes)[-2:]
        assert len(rows) <= 2 * largest[0] * largest[-1]
        assert len(rows) == len(set(rows))
