# SPDX-License-Identifier: Apache-2.0
"""Paged attention and the mixture of experts on npu tensors against their formulas in float64: launches that do not
grow, nothing read on the host, refusals."""

from __future__ import annotations

import pytest
import torch

import xgdn
from attention_calls import ATTENTION, EXPERTS, ROUNDING, AttentionCall, ExpertsCall
from cases import assert_close
from ledger import Ledger, recorded
from xgdn import _C

ATTENTION_LAUNCHES = ["IndexSelect", "IndexSelect", "FlashAttentionVarLenScore", "InplaceCopy"]
EXPERTS_LAUNCHES = [
    "InplaceCopy",  # the choices to int32
    *("MoeInitRoutingV3", "GroupedMatmulV4", "SwiGlu", "GroupedMatmulV4", "MoeFinalizeRoutingV2"),
    "InplaceCopy",
]


@pytest.mark.parametrize("call", [c for c in ATTENTION if not c.int8], ids=str)
def test_attention_is_the_formula(call: AttentionCall) -> None:
    """The cache is NaN wherever no context lies, so nothing else is read."""
    call.make()
    assert_close("out", call.run("npu:0"), call.expected(), call.bound, parts=(0,))
    assert xgdn.last_backend("paged_attention") == "npu"


@pytest.mark.parametrize("call", EXPERTS, ids=str)
def test_experts_are_the_formula(call: ExpertsCall) -> None:
    call.make()
    got, want = call.run("npu:0"), call.expected()
    if call.T > 0:
        assert_close("out", got, want, ROUNDING[call.dtype], parts=(0,))
    assert got.shape == want.shape
    assert xgdn.last_backend("moe_experts") == "npu"


def assert_only_the_arguments_are_copied(ledger: Ledger) -> None:
    """Arguments to the device, the result from it, a wait for each of these copies; nothing in between."""
    assert set(ledger.copies[:-1]) == {"H2D"}
    assert ledger.copies[-1] == "D2H"
    assert len(ledger.syncs) == len(ledger.copies)
    launches = [i for i, entry in enumerate(ledger.entries) if entry["kind"] == "op"]
    inside = ledger.entries[launches[0] : launches[-1]]
    assert not {"copy", "sync"} & {entry["kind"] for entry in inside}


def test_attention_launches_the_same_for_any_number_of_sequences() -> None:
    ATTENTION[0].make().run("npu:0")  # makes the mask
    for sequences in (((1, 9),), ((1, 9),) * 8, ((5, 5), (33, 40), (1, 1), (2, 64))):
        call = AttentionCall(sequences).make()
        with recorded() as ledger:
            call.run("npu:0")
        assert ledger.launches == ATTENTION_LAUNCHES
        assert_only_the_arguments_are_copied(ledger)
        ((q, k, v, *_, out),) = ledger.args("FlashAttentionVarLenScore")
        assert {q["shape"][0], out["shape"][0]} == {sum(t for t, _ in sequences)}, "no padded rows"
        assert {k["shape"][0], v["shape"][0]} == {sum(context for _, context in sequences)}


def test_experts_launch_the_same_for_any_number_of_tokens_and_chosen_experts() -> None:
    for call in (ExpertsCall(1), ExpertsCall(8), ExpertsCall(8, only=(3, 1)), ExpertsCall(40)):
        call.make()
        with recorded() as ledger:
            call.run("npu:0")
        assert ledger.launches == EXPERTS_LAUNCHES
        assert_only_the_arguments_are_copied(ledger)


def test_the_builder_names_every_row_of_the_contexts_in_the_order_of_the_tokens() -> None:
    sizes = {"num_slots": 4, "num_kv_blocks": 20, "kv_block_size": 4, "vocab_size": 9}

    def build(device: str) -> _C.AttentionBatch:
        def step(kind: _C.SegmentKind, slot: int, tokens: int, cached: int, blocks: list[int]) -> _C.SequenceStep:
            return _C.SequenceStep(
                kind=kind, tokens=[1] * tokens, num_cached=cached, state_slots=[slot], kv_blocks=blocks
            )

        builder = _C.BatchBuilder(**sizes, has_attention=True, device=device)
        prompts = step(_C.SegmentKind.PREFILL, 0, 3, 4, [7, 2]), step(_C.SegmentKind.PREFILL, 1, 2, 0, [5])
        return builder.build([*prompts, step(_C.SegmentKind.DECODE, 2, 1, 8, [9, 11, 3])]).input.attention

    with recorded() as ledger:
        attention = build("npu:0")
    assert ledger.copies == ["H2D"]
    decode = [36, 37, 38, 39, 44, 45, 46, 47, 12]
    prompts = [28, 29, 30, 31, 8, 9, 10, 20, 21]
    assert attention.context_rows.cpu().tolist() == decode + prompts
    assert attention.slot_mapping.cpu().tolist() == [12, 8, 9, 10, 20, 21]
    assert attention.context_lens.cpu().tolist() == [9, 7, 2]
    assert [row[:used] for row, used in zip(attention.block_table.cpu().tolist(), (3, 2, 1), strict=True)] == [
        [9, 11, 3],
        [7, 2],
        [5],
    ]
    assert build("cpu").context_rows is None


def test_a_context_of_no_rows_pads() -> None:
    call = AttentionCall(((1, 40), (1, 0), (1, 0), (12, 30), (10, 0))).make()
    padded = torch.tensor([False] + [True] * 2 + [False] * 12 + [True] * 10)
    got = call.run("npu:0")
    assert torch.equal(got[padded], torch.zeros_like(got[padded]))
    assert_close("out", got[~padded], call.expected()[~padded], call.bound)


def test_a_decodes_tensors_stay_where_they_are() -> None:
    """Also those of a device, while contexts grow to all blocks; what they hold is the new step's."""
    builder = _C.BatchBuilder(
        num_slots=3,
        num_kv_blocks=8,
        kv_block_size=4,
        vocab_size=9,
        has_attention=True,
        decode_buckets=[3],
        device="npu:0",
    )
    addresses = set()
    for cached in (0, 3, 4, 15):
        steps = [
            _C.SequenceStep(
                kind=_C.SegmentKind.DECODE,
                tokens=[n + 1],
                num_cached=cached,
                state_slots=[n],
                kv_blocks=[4 * n, 4 * n + 1, 4 * n + 2, 4 * n + 3],
            )
            for n in range(2)
        ]
        step = builder.build(steps).input
        (segment,), attention = step.gdn.segments, step.attention
        tensors = (step.token_ids, step.logit_rows, attention.positions, attention.slot_mapping, attention.block_table)
        tensors = (*tensors, attention.context_lens, attention.context_rows, segment.cu_seqlens, segment.state_indices)
        addresses.add(tuple(t.data_ptr() for t in tensors))
        assert step.token_ids.cpu().tolist() == [1, 2, 0]
        assert segment.state_indices.cpu().tolist() == [0, 1, -1]
        assert attention.context_lens.cpu().tolist() == [cached + 1, cached + 1, 0]
        assert attention.context_rows.cpu().tolist() == [*range(cached + 1), *range(16, 16 + cached + 1)]
    assert len(addresses) == 1


def test_many_sequences_are_grouped() -> None:
    call = AttentionCall(((1, 1),) * 1030, HQ=1, HKV=1, D=16, block_size=1).make()
    with recorded() as ledger:
        got = call.run("npu:0")
    assert [len(args[8]) for args in ledger.args("FlashAttentionVarLenScore")] == [1024, 6]
    assert_close("out", got, call.expected(), ROUNDING[call.dtype])


def assert_refused(run: object, *words: str) -> None:
    with pytest.raises(NotImplementedError) as caught:
        run()  # type: ignore[operator]
    message = str(caught.value)
    assert all(word in message for word in words), message


def test_attention_refusals_have_the_numbers() -> None:
    call = AttentionCall(((2, 5),)).make()
    assert_refused(lambda: call.run("npu:0", with_rows=False, backend="npu"), "pass context_rows")
    assert_refused(
        lambda: call.run("npu:0", with_lengths=False, backend="npu"), "pass cu_seqlens_cpu and context_lens_cpu"
    )
    wide = AttentionCall(((1, 1),), HQ=1, HKV=1, D=784).make()
    assert_refused(lambda: wide.run("npu:0", backend="npu"), "at most 256 query heads of at most 768", "HQ=1 D=784")
    many = AttentionCall(((1, 1),), HQ=258, HKV=1, D=16).make()
    assert_refused(lambda: many.run("npu:0", backend="npu"), "HQ=258 D=16")
    codes = AttentionCall(((2, 5),), int8=True).make()
    assert_refused(lambda: codes.run("npu:0", backend="npu"), "keys and values of the dtype of the tokens", "Char")


def test_a_context_beyond_the_op_is_refused() -> None:
    tokens = (1 << 20) + 1
    pool = torch.empty(tokens, 1, 1, 1, dtype=torch.bfloat16).npu()
    one = torch.zeros(1, 1, 1, dtype=torch.bfloat16).npu()
    rows = torch.zeros(tokens, dtype=torch.int32).npu()
    lens, cu_seqlens = (torch.tensor(values, dtype=torch.int32) for values in ([tokens], [0, 1]))
    assert_refused(
        lambda: torch.ops.xgdn.paged_attention(
            one,
            pool,
            pool,
            rows.unsqueeze(0),
            lens.npu(),
            cu_seqlens.npu(),
            one.clone(),
            context_rows=rows,
            cu_seqlens_cpu=cu_seqlens,
            context_lens_cpu=lens,
            backend="npu",
        ),
        f"contexts of at most {1 << 20} tokens, got {tokens}",
    )


def test_experts_refusals_have_the_numbers() -> None:
    for num_experts in (1, 1025):
        call = ExpertsCall(1, E=num_experts, A=1, D=16, I=16).make()
        assert_refused(lambda call=call: call.run("npu:0", backend="npu"), "2 to 1024 experts", f"E={num_experts}")
    wide = ExpertsCall(1, E=2, A=1, D=1 << 16, I=1).make()
    assert_refused(lambda: wide.run("npu:0", backend="npu"), "widths below 65536", "D=65536 I=1")
