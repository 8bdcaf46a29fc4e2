# SPDX-License-Identifier: Apache-2.0
"""The MTP head of a checkpoint against a forward in float64, and what is said of heads that are wrong."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

import xgdn
from checkpoints import CHECKPOINTS, Tiny, qwen3_5
from mtp_checkpoints import LAYER, Reference, Tensors, WithHead, hidden_of, make_with_head, put_head
from test_checkpoints import configure
from test_models import assert_logits_close
from test_replay_states import TINY
from xgdn import _C, errors

TOKENS = torch.randint(0, 128, (141,), generator=torch.Generator().manual_seed(5)).tolist()
SPLITS = {"whole": [140], "chunked": [64, 64, 12], "decode": [64, *[1] * 20, 56]}
SINGLE = [tiny for tiny in CHECKPOINTS if not tiny.save]
DENSE = SINGLE[0]


@pytest.fixture(scope="module", params=SINGLE, ids=str)
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> WithHead:
    tiny: Tiny = request.param
    return make_with_head(tiny, tmp_path_factory.mktemp("heads"))


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> WithHead:
    return make_with_head(DENSE, tmp_path_factory.mktemp("dense"))


def run(directory: Path, sizes: list[int], **options: object) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states of TOKENS but the last, in pieces; logits and hidden states of the head for them."""
    options = {"dtype": torch.float32} | options
    decoder = _C.load_decoder(str(directory), state_dtype=torch.float32, replay_states=True, speculate="mtp", **options)
    states = _C.StatePool(decoder.state_specs(), num_slots=1)
    kv = _C.KvCache(decoder, num_blocks=10, block_size=16)
    builder = _C.BatchBuilder(num_slots=1, num_kv_blocks=10, kv_block_size=16, vocab_size=128, has_attention=True)
    slot, _ = (states.slot(states.allocate(g)) for g in (_C.SlotGroup.CHECKPOINT, _C.SlotGroup.RECENT))
    blocks = kv.allocate(10)
    rows: list[tuple[Tensor, Tensor, Tensor]] = []
    begin = 0
    for size in sizes:

        def step(tokens: list[int]) -> _C.StepInput:
            kind = _C.SegmentKind.DECODE if len(tokens) == 1 else _C.SegmentKind.PREFILL
            return builder.build(
                [
                    _C.SequenceStep(
                        kind=kind,
                        tokens=tokens,
                        num_cached=begin,  # noqa: B023
                        state_slots=[slot],
                        write_slot=slot,
                        conv_slot=slot,
                        conv_write_slot=slot,
                        has_initial_state=begin > 0,  # noqa: B023
                        kv_blocks=blocks,
                    )
                ]
            ).input

        logits, hidden = decoder.forward_with_hidden(step(TOKENS[begin : begin + size]), states, kv)
        assert logits.shape == (1, 128)
        rows.append((hidden, *decoder.forward_mtp(step(TOKENS[begin + 1 : begin + size + 1]), hidden, states, kv)))
        begin += size
    hidden, logits, of_head = (torch.cat(parts) for parts in zip(*rows, strict=True))
    return hidden, logits, of_head


def row_errors(got: Tensor, want: Tensor) -> Tensor:
    assert got.shape == want.shape
    return (got.double() - want.double()).norm(dim=-1) / want.double().norm(dim=-1)


@pytest.mark.parametrize("split", SPLITS)
def test_logits_are_those_of_float64(made: WithHead, split: str) -> None:
    """From the hidden states that the model itself has, and from transformers'."""
    hidden, logits, of_head = run(made.directory, SPLITS[split])
    reference = Reference(made)
    want = reference.hidden(TOKENS[1:], hidden)
    assert row_errors(of_head, want).max() < 2e-5
    assert row_errors(logits, reference.logits(want)).max() < 2e-5
    assert_logits_close(logits, reference.logits(reference.hidden(TOKENS[1:], hidden_of(made, TOKENS[:-1]))))


@pytest.mark.parametrize("tiny", TINY, ids=str)
def test_pieces_have_the_bits_of_the_whole(tmp_path: Path, tiny: Tiny) -> None:
    """Of checkpoints whose products the cpu backend computes itself."""
    directory = make_with_head(tiny, tmp_path).directory
    whole = run(directory, SPLITS["whole"], dtype=torch.bfloat16)
    for split in ("chunked", "decode"):
        for got, want in zip(run(directory, SPLITS[split], dtype=torch.bfloat16), whole, strict=True):
            assert torch.equal(got, want)


@pytest.mark.parametrize(
    ("options", "most"),
    [({"dtype": torch.bfloat16}, 0.04), ({"quantize": "int8"}, 0.04), ({"quantize": "int4"}, 0.3)],
    ids=["bf16", "int8", "int4"],
)
def test_fewer_bits_stay_close(made: WithHead, options: dict[str, object], most: float) -> None:
    """Each row within a few roundings of its dtype, and not without any."""
    hidden, logits, _ = run(made.directory, SPLITS["chunked"], **options)
    reference = Reference(made)
    error = row_errors(logits, reference.logits(reference.hidden(TOKENS[1:], hidden)))
    assert 1e-4 < error.median() < most / 3
    if "moe" not in made.directory.name and "next" not in made.directory.name:  # where experts are not chosen
        assert error.max() < most


def test_every_weight_of_the_head_matters(tmp_path: Path) -> None:
    for tiny in (t for t in SINGLE if t.name in ("qwen3_5-dense", "qwen3_5-moe", "qwen3_next-mixed")):
        made = make_with_head(tiny, tmp_path)
        _, plain, _ = run(made.directory, [140])
        for name, tensor in made.head.items():
            changed: Tensors = made.head | {name: tensor + 0.3 * torch.randn_like(tensor)}
            put_head(made.directory, changed)
            _, logits, _ = run(made.directory, [140])
            moved = row_errors(logits, plain)
            assert moved.max() > 1e-4, f"{tiny}: {name}"


def test_a_head_that_is_not_there_is_named(dense: WithHead, tmp_path: Path) -> None:
    bare = make_with_head(DENSE, tmp_path)
    put_head(bare.directory, {})
    with pytest.raises(
        errors.UnsupportedError, match=r"MTP head \(mtp.fc.weight, mtp.layers.0.\*\) for mtp, got one wi"
    ):
        xgdn.Engine(bare.directory, replay_states=True, speculate="mtp")
    assert not xgdn.Engine(bare.directory).load_report.leaves_mtp_head
    report = xgdn.Engine(dense.directory).load_report
    assert (report.leaves_mtp_head, report.unused_tensors, report.warnings) == (True, [], [])
    report = xgdn.Engine(dense.directory, replay_states=True, speculate="mtp").load_report
    assert (report.leaves_mtp_head, report.unused_tensors) == (False, [])


def test_malformed_heads_name_the_tensor(tmp_path: Path) -> None:
    made = make_with_head(DENSE, tmp_path)
    for name, tensor in made.head.items():
        put_head(made.directory, {key: value for key, value in made.head.items() if key != name})
        with pytest.raises(errors.CheckpointError, match=name):
            xgdn.plan(made.directory, replay_states=True, speculate="mtp")
        put_head(made.directory, made.head | {name: torch.cat([tensor, tensor])})
        with pytest.raises(errors.CheckpointError, match=name):
            xgdn.plan(made.directory, replay_states=True, speculate="mtp")
        xgdn.plan(made.directory)  # a head that is left alone may be anything
    put_head(made.directory, made.head | {"mtp.layers.1.input_layernorm.weight": torch.ones(64)})
    report = xgdn.Engine(made.directory, replay_states=True, speculate="mtp").load_report
    assert report.unused_tensors == ["mtp.layers.1.input_layernorm.weight"]


def test_heads_of_other_shapes_are_refused(tmp_path: Path) -> None:
    made = make_with_head(Tiny("other", qwen3_5), tmp_path)
    for num_layers, has_embeddings, sentence in [
        (2, False, "mtp_num_hidden_layers: expected 1, got 2"),
        (0, False, "config.json says that it has none"),
        (1, True, "mtp_use_dedicated_embeddings: expected false"),
    ]:
        configure(made.directory, mtp_num_hidden_layers=num_layers, mtp_use_dedicated_embeddings=has_embeddings)
        with pytest.raises(errors.UnsupportedError, match=sentence):
            xgdn.plan(made.directory, replay_states=True, speculate="mtp")
        xgdn.plan(made.directory)


def test_the_plan_counts_weights_and_cache(dense: WithHead) -> None:
    options = {"dtype": torch.float32, "replay_states": True}
    plain, mtp = (xgdn.plan(dense.directory, **options, speculate=s, draft_tokens=1) for s in ("lookup", "mtp"))
    num_bytes = sum(tensor.numel() * 4 for tensor in dense.head.values())
    assert mtp.weight_bytes - plain.weight_bytes == num_bytes
    assert (plain.kv_block_bytes, mtp.kv_block_bytes) == (2 * 16 * 2 * 32 * 4, 2 * 2 * 16 * 2 * 32 * 4)
    assert mtp.workspace_bytes > plain.workspace_bytes
    engine = xgdn.Engine(dense.directory, **options, speculate="mtp")
    assert engine.memory_bytes["weights"] == mtp.weight_bytes
    assert engine.memory_bytes["kv_cache"] == mtp.kv_bytes
    assert LAYER in "".join(dense.head)
