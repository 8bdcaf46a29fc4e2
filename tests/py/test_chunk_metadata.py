# SPDX-License-Identifier: Apache-2.0
"""The six tables of a prefill step, against values worked by hand and against their definition."""

from __future__ import annotations

import pytest
import torch

import xgdn
from cases import cu_seqlens_of, i32
from xgdn import layers, ops


def test_worked_values() -> None:
    m = ops.build_chunk_metadata([130, 64, 1, 1300], 8)
    assert m.chunk_indices_chunk64.tolist() == [[0, 0], [0, 1], [0, 2], [1, 0], [2, 0], *([3, j] for j in range(21))]
    assert m.chunk_offsets_chunk64.tolist() == [0, 3, 4, 5, 26]
    assert m.update_chunk_offsets_chunk64.tolist() == [0, 4, 6, 8, 30]
    assert m.final_chunk_indices_chunk64.tolist() == [3, 5, 7, 29]
    assert m.chunk_indices_large_block.tolist() == [[0, 0], [1, 0], [2, 0], [3, 0], [3, 1]]
    # 2^18 / (8 * 64) = 512
    assert m.block_indices_cumsum.tolist() == [[0, 0], [1, 0], [2, 0], [3, 0], [3, 1], [3, 2]]
    assert all(table.dtype == torch.int32 and table.is_contiguous() for table in m)


@pytest.mark.parametrize(
    ("heads", "block"),
    [(1, 4096), (2, 2048), (3, 2048), (5, 1024), (8, 512), (31, 256), (32, 128), (33, 128), (63, 128), (64, 64)],
)
def test_cumsum_block_is_the_next_power_of_two(heads: int, block: int) -> None:
    for length, rows in ((block, 1), (block + 1, 2)):
        assert ops.build_chunk_metadata([length], heads).block_indices_cumsum.shape == (rows, 2)


def test_heads_are_of_one_table_alone() -> None:
    lengths = [130, 4097]
    m, of_eight = ops.build_chunk_metadata(lengths), ops.build_chunk_metadata(lengths, 8)
    for name in set(m._fields) - {"block_indices_cumsum"}:
        assert getattr(m, name).equal(getattr(of_eight, name)), name
    assert m.block_indices_cumsum.tolist() == [[0, 0], [1, 0], [1, 1]]
    assert len(of_eight.block_indices_cumsum) == 1 + 9


def test_empty_sequences_keep_their_number() -> None:
    m = ops.build_chunk_metadata([0, 65, 0, 0, 1, 0], 4)
    assert m.chunk_indices_chunk64.tolist() == [[1, 0], [1, 1], [4, 0]]
    assert m.chunk_offsets_chunk64.tolist() == [0, 0, 2, 2, 2, 3, 3]
    assert m.update_chunk_offsets_chunk64.tolist() == [0, 1, 4, 5, 6, 8, 9]
    assert m.final_chunk_indices_chunk64.tolist() == [0, 3, 4, 5, 7, 8]
    assert m.chunk_indices_large_block.tolist() == [[1, 0], [4, 0]]
    assert m.block_indices_cumsum.tolist() == [[1, 0], [4, 0]]


def test_compact_ranks_count_the_others() -> None:
    lengths = [0, 65, 0, 0, 1, 0]
    m = ops.build_chunk_metadata(lengths, 4, sequence_ids="compact_ranks")
    true = ops.build_chunk_metadata(lengths, 4)
    assert m.chunk_indices_chunk64.tolist() == [[0, 0], [0, 1], [1, 0]]
    assert m.chunk_indices_large_block.tolist() == [[0, 0], [1, 0]]
    assert m.block_indices_cumsum.tolist() == [[0, 0], [1, 0]]
    for name in ("chunk_offsets_chunk64", "update_chunk_offsets_chunk64", "final_chunk_indices_chunk64"):
        assert getattr(m, name).equal(getattr(true, name))


@pytest.mark.parametrize("lengths", [[], [0], [0, 0, 0]], ids=str)
def test_nothing_to_do(lengths: list[int]) -> None:
    m = ops.build_chunk_metadata(lengths)
    assert m.chunk_indices_chunk64.shape == (0, 2)
    assert m.chunk_offsets_chunk64.tolist() == [0] * (len(lengths) + 1)
    assert m.final_chunk_indices_chunk64.tolist() == list(range(len(lengths)))


def test_random_lengths_against_the_definition() -> None:
    lengths = torch.randint(0, 3000, (50,)).tolist()
    lengths[7] = lengths[8] = 0
    m = ops.build_chunk_metadata(lengths, 16)
    for table, size in (
        (m.chunk_indices_chunk64, 64),
        (m.chunk_indices_large_block, 1216),
        (m.block_indices_cumsum, 256),
    ):
        assert table.tolist() == [[i, j] for i, length in enumerate(lengths) for j in range(-(-length // size))]


def test_tables_own_their_memory() -> None:
    tables = list(ops.build_chunk_metadata([130, 64], 8))
    assert len({table.untyped_storage().data_ptr() for table in tables}) == len(tables)


STEPS = [(1,), (64, 65, 0, 1), (0,), (0, 0, 130), (130, 0, 0), (1300, 3, 0, 1216, 1217), (1, 1, 1, 1, 1, 1)]


def assert_written_is_built(lengths: tuple[int, ...], heads: int, pooled: ops.ChunkMetadata) -> None:
    """The step's rows, bit for bit, and behind them no chunks."""
    built = ops.build_chunk_metadata(lengths, heads)
    for name, want in built._asdict().items():
        got = getattr(pooled, name).cpu()
        used, tail = got[: len(want)], got[len(want) :]
        assert used.dtype == want.dtype
        assert torch.equal(used, want), name
        assert (tail == (want[-1] if "offsets" in name else -1)).all(), name


@pytest.mark.parametrize("heads", [1, 8, 31])
@pytest.mark.parametrize("lengths", STEPS, ids=str)
def test_tables_written_by_device_code_are_the_same(lengths: tuple[int, ...], heads: int) -> None:
    pooled = ops.ChunkMetadata.allocate(max_sequences=7, max_tokens=4000, num_v_heads_local=heads)
    before = [getattr(pooled, name).data_ptr() for name in ops.ChunkMetadata._fields]
    for step in (STEPS[-2], lengths):  # over what a larger step has left
        pooled.write(cu_seqlens_of(step), heads)
        assert_written_is_built(step, heads, pooled)
    assert before == [getattr(pooled, name).data_ptr() for name in ops.ChunkMetadata._fields]


def test_pools_have_room_for_the_worst_step() -> None:
    """Every sequence one token over a whole number of chunks."""
    lengths = (65, 129, 1, 1, 193)
    pooled = ops.ChunkMetadata.allocate(max_sequences=5, max_tokens=sum(lengths), num_v_heads_local=8)
    pooled.write(cu_seqlens_of(lengths), 8)
    assert_written_is_built(lengths, 8, pooled)


def test_too_many_sequences_for_the_pool_are_refused() -> None:
    pooled = ops.ChunkMetadata.allocate(max_sequences=2, max_tokens=100, num_v_heads_local=8)
    with pytest.raises(ValueError, match=r"cu_seqlens: expected 1\.\.2 sequences \(set by the tables\), got 3"):
        pooled.write(cu_seqlens_of((1, 2, 3)), 8)


@pytest.mark.parametrize("heads", [0, 65, -1])
def test_head_counts_that_the_cumsum_block_cannot_have(heads: int) -> None:
    with pytest.raises(NotImplementedError, match=rf"num_v_heads_local: expected 1\.\.64, got {heads}"):
        ops.build_chunk_metadata([5], heads)


def test_a_negative_length() -> None:
    with pytest.raises(IndexError, match=r"\[build_chunk_metadata\] lengths: expected values >= 0, got -1 at 1"):
        ops.build_chunk_metadata([5, -1], 8)


def test_an_unknown_kind_of_ids() -> None:
    with pytest.raises(ValueError, match="sequence_ids: expected 'true' or 'compact_ranks', got 'ranks'"):
        ops.build_chunk_metadata([5], 8, sequence_ids="ranks")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("lengths", "words"),
    [
        ([2**33], r"at most 2147483647 tokens and sequences together, got 8589934592 at 0"),
        ([2**40, 5], r"got 1099511627776 at 0"),
        ([5, 2**63 - 1], r"got 9223372036854775807 at 1"),
        ([2**30, 2**30], r"got 1073741824 at 1"),
    ],
    ids=str,
)
def test_more_tokens_than_an_index_can_name(lengths: list[int], words: str) -> None:
    with pytest.raises(IndexError, match=rf"\[build_chunk_metadata\] lengths: expected {words}|{words}"):
        ops.build_chunk_metadata(lengths, 8)
    with pytest.raises(IndexError, match=r"\[allocate_chunk_metadata\] max_"):
        ops.ChunkMetadata.allocate(max_sequences=len(lengths), max_tokens=min(sum(lengths), 2**62), num_v_heads_local=8)


@pytest.mark.parametrize("size", [-1, 2**31])
@pytest.mark.parametrize("name", ["max_sequences", "max_tokens"])
def test_pools_of_impossible_sizes(name: str, size: int) -> None:
    with pytest.raises(IndexError, match=rf"{name}: expected 0\.\.2147483647, got {size}"):
        ops.ChunkMetadata.allocate(**{"max_sequences": 1, "max_tokens": 1, name: size}, num_v_heads_local=8)


@pytest.mark.parametrize("lengths", [[30.9], [torch.tensor(30.9)], torch.tensor([30.9, 2.0])], ids=str)
def test_lengths_are_whole_numbers(lengths: list[int]) -> None:
    with pytest.raises(TypeError):
        ops.build_chunk_metadata(lengths, 8)
    assert ops.build_chunk_metadata(torch.tensor([65, 1]), 8).chunk_offsets_chunk64.tolist() == [0, 2, 3]


@pytest.mark.parametrize("device", ["meta", torch.device("cpu"), None], ids=str)
def test_tables_are_built_where_they_are_wanted(device: torch.device | str | None) -> None:
    want = ops.build_chunk_metadata([130, 64], 8)
    got = ops.build_chunk_metadata([130, 64], 8, device=device)
    for table, other in zip(got, want, strict=True):
        assert table.device.type == ("meta" if device == "meta" else "cpu")
        assert (table.shape, table.dtype) == (other.shape, other.dtype)


def test_written_tables_are_checked() -> None:
    pooled = ops.ChunkMetadata.allocate(max_sequences=3, max_tokens=100, num_v_heads_local=8)
    with pytest.raises(TypeError, match=r"\[write_chunk_metadata\] cu_seqlens: expected Int, got Float"):
        pooled.write(torch.tensor([0.0, 3.5]), 8)
    with pytest.raises(ValueError, match=r"chunk_offsets_chunk64: expected .* got \[3\]"):
        pooled._replace(chunk_offsets_chunk64=pooled.chunk_offsets_chunk64[:3]).write(cu_seqlens_of((1, 2)), 8)
    twice = pooled._replace(update_chunk_offsets_chunk64=pooled.chunk_offsets_chunk64)
    with pytest.raises(
        ValueError, match=r"expected memory of its own, got memory that .*chunk_offsets_chunk64 lies in"
    ):
        twice.write(cu_seqlens_of((1, 2)), 8)


def test_one_class_serves_ops_and_layers() -> None:
    assert xgdn.ChunkMetadata is ops.ChunkMetadata is layers.ChunkMetadata
    chunk = ops.build_chunk_metadata([65, 1], 4)
    slots = i32([0, 1])
    segment = layers.Segment(
        kind=layers.SegmentKind.PREFILL,
        cu_seqlens_cpu=cu_seqlens_of((65, 1)),
        state_indices=slots,
        conv_indices=slots,
        chunk=chunk,
    )
    assert torch.equal(segment.chunk_indices, chunk.chunk_indices_chunk64)
    assert torch.equal(segment.chunk_offsets, chunk.chunk_offsets_chunk64)
    decode = layers.Segment(
        kind=layers.SegmentKind.DECODE, cu_seqlens_cpu=cu_seqlens_of((1, 1)), state_indices=slots, conv_indices=slots
    )
    assert decode.chunk_indices is None
    assert decode.chunk_offsets is None
    with pytest.raises(TypeError):
        layers.Segment(
            kind=layers.SegmentKind.PREFILL,
            cu_seqlens_cpu=cu_seqlens_of((65, 1)),
            state_indices=slots,
            conv_indices=slots,
            chunk=tuple(chunk)[:5],
        )
