# SPDX-License-Identifier: Apache-2.0
"""Benchmarks of the ops beside the machine's limit, `xgdn bench ops`, and of a server under load, `xgdn bench serving`.

A `Problem` holds inputs, the float64 truth and a limit; a `Contestant` solves it. Every contestant is checked against
the truth before its time counts, and contestants take turns, call by call, so that noise meets all of them.

The load on a server is in `xgdn.bench.serving`; it needs the extra `xgdn[bench]`.
"""

from xgdn.bench import ours
from xgdn.bench.measure import Contestant, Problem, Row, WrongResult, check, compare
from xgdn.bench.problems import DecodeProblem, DecodeStepProblem, PrefillProblem, VerifyProblem

__all__ = [
    "Contestant",
    "DecodeProblem",
    "DecodeStepProblem",
    "PrefillProblem",
    "Problem",
    "Row",
    "VerifyProblem",
    "WrongResult",
    "check",
    "compare",
    "ours",
]
