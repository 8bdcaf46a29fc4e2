# SPDX-License-Identifier: Apache-2.0
"""The layer alone on npu:0 against the same layer on the CPU, both in bfloat16, step by step from NaN pools.

Each is held to the layer in float32 with the same weights. Ten roundings of up to 2^-9 lie between hidden states and
output, and the gated norm magnifies them where a read-out happens to be small: hence more room for one sequence than
for a step. The states have fewer.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import accumulate

import pytest
import torch
from torch import Tensor

from cases import assert_bits_equal
from test_layer import HIDDEN, Layer
from xgdn import _C, ops

NUM_SLOTS = 40
WHOLE, ONE_SEQUENCE, STATE = 0.03, 0.15, 0.01
PAD = -1
DELTA, CONV = _C.StateKind.DELTA, _C.StateKind.CONV
DECODE, VERIFY, PREFILL = _C.SegmentKind.DECODE, _C.SegmentKind.VERIFY, _C.SegmentKind.PREFILL

LAYERS = [
    Layer("qwen3_5", K=128, V=128),
    Layer("qwen3_next", K=128, V=128),
    Layer("qwen3_next", H=1, HV=3, K=128, V=128),
    Layer("qwen3_5", H=2, HV=2, K=128, V=128, W=3, bias=True),
]


@dataclass
class Sequence:
    """What one sequence does in a step; `slots` is its row of the slot table, or its one slot."""

    length: int
    slots: tuple[int, ...]
    accepted: int = 1
    has_initial: bool = True
    write: int | None = None


@dataclass
class Side:
    """One device's layer, its pools, and a step's tensors on it."""

    net: _C.Qwen3GatedDeltaNet
    device: str
    state: _C.GdnState = field(init=False)

    def __post_init__(self) -> None:
        self.state = _C.GdnState.allocate(self.net.state_specs(), NUM_SLOTS, device=self.device)
        for kind in (DELTA, CONV):
            self.state.pool(kind).fill_(torch.nan)

    def pool(self, kind: _C.StateKind) -> Tensor:
        return self.state.pool(kind).cpu()

    def segment(self, kind: _C.SegmentKind, begin: int, sequences: list[Sequence]) -> _C.Segment:
        def i32(values: object) -> Tensor:
            return torch.tensor(values, dtype=torch.int32).to(self.device)

        lengths = [s.length for s in sequences]
        first = [s.slots[0] for s in sequences]
        columns = max(len(s.slots) for s in sequences)
        table = [[*s.slots, *(PAD,) * (columns - len(s.slots))] for s in sequences]
        writes = [s.slots[0] if s.write is None else s.write for s in sequences]
        optional: dict[str, object] = {}
        if kind == VERIFY:
            optional["num_accepted"] = i32([s.accepted for s in sequences])
        elif writes != first:
            optional["write_indices"] = optional["conv_write_indices"] = i32(writes)
        if kind == PREFILL:
            heads = self.net.local_config.num_v_heads
            optional["has_initial_state"] = torch.tensor([s.has_initial for s in sequences]).to(self.device)
            optional["chunk"] = ops.build_chunk_metadata(lengths, heads, device=self.device)
        return _C.Segment(
            kind=kind,
            token_begin=begin,
            cu_seqlens_cpu=torch.tensor([0, *accumulate(lengths)], dtype=torch.int32),
            state_indices=i32(table if kind == VERIFY else first),
            conv_indices=i32(first),
            may_have_padding=PAD in first,
            **optional,
        )

    def forward(self, hidden: Tensor, step: list[tuple[_C.SegmentKind, list[Sequence]]]) -> Tensor:
        segments, begin = [], 0
        for kind, sequences in step:
            segments.append(self.segment(kind, begin, sequences))
            begin += sum(s.length for s in sequences)
        return self.net.forward(hidden.to(self.device), _C.GdnBatch(segments), self.state).cpu()


def named_slots(sequence: Sequence, kind: _C.SegmentKind) -> tuple[set[int], set[int]]:
    """The slots of the delta pool and of the conv pool that a sequence writes."""
    if sequence.slots[0] == PAD:
        return set(), set()
    if kind == VERIFY:
        return set(sequence.slots[: sequence.length]), {sequence.slots[0]} if sequence.length else set()
    write = sequence.slots[0] if sequence.write is None else sequence.write
    return {write}, {write}


class Layers:
    def __init__(self, layer: Layer, max_draft_tokens: int) -> None:
        module = layer.reference()
        weights = {name: p.detach() for name, p in module.named_parameters()}
        sizes = {
            "hidden_size": HIDDEN,
            "num_k_heads": layer.H,
            "num_v_heads": layer.HV,
            "head_k_dim": layer.K,
            "head_v_dim": layer.V,
            "conv_kernel_dim": layer.W,
            "max_draft_tokens": max_draft_tokens,
        }
        narrow = {name: w.bfloat16() for name, w in weights.items()}
        exact = {name: w.float() for name, w in narrow.items()}

        def side(tensors: dict[str, Tensor], dtype: torch.dtype, device: str) -> Side:
            config = _C.GdnConfig(**sizes, state_dtype=dtype)
            return Side(_C.Qwen3GatedDeltaNet(config, tensors, dtype=dtype, device=device), device)

        self.npu = side(narrow, torch.bfloat16, "npu:0")
        self.cpu = side(narrow, torch.bfloat16, "cpu")
        self.exact = side(exact, torch.float32, "cpu")

    def assert_near(self, what: str, got: Tensor, cpu: Tensor, exact: Tensor, bound: float) -> None:
        """Rows of a conv slot that only drafts use may be NaN, on every side."""
        known = ~exact.isnan()
        for side, values in (("npu", got), ("cpu", cpu)):
            assert torch.equal(~values.isnan(), known), f"{side}: {what}"
            error = float((values[known].double() - exact[known]).norm() / exact[known].double().norm())
            assert error <= bound, f"{side}: {what}: relative error {error:.3g} > {bound}"

    def step(self, *step: tuple[_C.SegmentKind, list[Sequence]]) -> None:
        """One forward on all sides: outputs, written slots, untouched slots."""
        T = sum(s.length for _, sequences in step for s in sequences)
        hidden = torch.randn(T, HIDDEN).bfloat16()
        before = {kind: self.npu.pool(kind) for kind in (DELTA, CONV)}
        got, cpu = (side.forward(hidden, list(step)) for side in (self.npu, self.cpu))
        exact = self.exact.forward(hidden.float(), list(step))
        self.assert_near("the step", got, cpu, exact, WHOLE)
        begin, written = 0, {DELTA: set[int](), CONV: set[int]()}
        for kind, sequences in step:
            for n, s in enumerate(sequences):
                rows = slice(begin, begin + s.length)
                begin += s.length
                if s.slots[0] == PAD:
                    assert not got[rows].any(), f"{kind} {n}: padding is zeros"
                elif s.length > 0:
                    self.assert_near(f"{kind} {n}", got[rows], cpu[rows], exact[rows], ONE_SEQUENCE)
                for pool, slots in zip((DELTA, CONV), named_slots(s, kind), strict=True):
                    written[pool] |= slots
        for pool, slots in written.items():
            pools = [side.pool(pool) for side in (self.npu, self.cpu, self.exact)]
            for slot in slots:
                self.assert_near(f"{pool} slot {slot}", *(p[slot] for p in pools), STATE)
            others = [slot for slot in range(NUM_SLOTS) if slot not in slots]
            assert_bits_equal(f"{pool}: untouched slots", pools[0][others], before[pool][others])


@pytest.fixture(params=LAYERS, ids=str)
def layers(request: pytest.FixtureRequest) -> Layers:
    return Layers(request.param, max_draft_tokens=0)


@pytest.fixture(params=LAYERS, ids=str)
def drafting_layers(request: pytest.FixtureRequest) -> Layers:
    return Layers(request.param, max_draft_tokens=3)


def prompts(*lengths: int) -> list[Sequence]:
    return [Sequence(length, (slot,), has_initial=False) for slot, length in enumerate(lengths)]


def test_prompts_and_decode(layers: Layers) -> None:
    layers.step((PREFILL, prompts(1, 2, 65, 3, 130)))
    for _ in range(3):
        layers.step((DECODE, [Sequence(1, (slot,)) for slot in (4, 0, 2, 1, 3)]))
    layers.step((DECODE, [Sequence(1, (2,))]))


def test_pieces_of_a_prompt(layers: Layers) -> None:
    layers.step((PREFILL, prompts(64, 5)))
    layers.step((PREFILL, [Sequence(70, (0,)), Sequence(1, (1,)), Sequence(3, (7,), has_initial=False)]))
    layers.step((PREFILL, [Sequence(2, (7,))]))


def test_empty_and_padded_prompts(layers: Layers) -> None:
    layers.step((PREFILL, prompts(3, 66, 1)))
    layers.step((PREFILL, [Sequence(5, (0,)), Sequence(0, (1,)), Sequence(4, (PAD,)), Sequence(67, (2,))]))


def test_padded_decode(layers: Layers) -> None:
    layers.step((PREFILL, prompts(3, 9, 4)))
    layers.step((DECODE, [Sequence(1, (2,)), Sequence(1, (PAD,)), Sequence(1, (0,)), Sequence(1, (PAD,))]))


def test_fork(layers: Layers) -> None:
    layers.step((PREFILL, prompts(6, 9)))
    layers.step((DECODE, [Sequence(1, (0,), write=5), Sequence(1, (1,))]))
    layers.step((DECODE, [Sequence(1, (0,)), Sequence(1, (5,))]))
    layers.step((PREFILL, [Sequence(4, (1,), write=8), Sequence(5, (0,))]))


@pytest.mark.parametrize("accepted", [(1, 2, 3), (4, 4, 4), (2, 1, 2), (3, 3, 1)], ids=str)
def test_ragged_drafts_at_every_acceptance_count(drafting_layers: Layers, accepted: tuple[int, ...]) -> None:
    """Counts larger than the next number of drafts too."""
    tables = [(n, 10 + 3 * n, 11 + 3 * n, 12 + 3 * n) for n in range(3)]
    drafting_layers.step((PREFILL, prompts(5, 1, 66)))
    drafting_layers.step((VERIFY, [Sequence(4, table) for table in tables]))
    counts = [Sequence(n, table, accepted=a) for n, table, a in zip((4, 1, 2), tables, accepted, strict=True)]
    drafting_layers.step((VERIFY, counts))
    drafting_layers.step((VERIFY, [Sequence(1, table, accepted=n) for n, table in zip((4, 1, 2), tables, strict=True)]))


def test_all_kinds_in_one_step(drafting_layers: Layers) -> None:
    drafting_layers.step((PREFILL, prompts(9, 8, 3)))
    table = (1, 20, 21, 22)
    drafting_layers.step(
        (DECODE, [Sequence(1, (0,)), Sequence(1, (2,))]),
        (VERIFY, [Sequence(4, table)]),
        (PREFILL, [Sequence(70, (3,), has_initial=False), Sequence(2, (4,), has_initial=False)]),
    )
    drafting_layers.step(
        (DECODE, [Sequence(1, (3,))]),
        (VERIFY, [Sequence(2, table, accepted=3)]),
        (PREFILL, [Sequence(5, (4,))]),
    )
