# SPDX-License-Identifier: Apache-2.0
"""What one step of a whole model sends to the device: launches, copies, synchronisations."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import checkpoints
import xgdn
from ledger import Ledger, recorded

HEAD_DIMS = {"linear_key_head_dim": 128, "linear_value_head_dim": 128}
NUM_GDN_LAYERS = 3

# One GDN layer of a decode step, from its first launch to its last.
DECODE_LAYER = [
    "Matmul",  # q, k, v, z, b, a
    *("IndexSelect", "Cat", "InplaceCopy", "Mul", "ReduceSum", "Silu"),  # convolution: window, taps to fp32, sum
    *("InplaceCopy", "InplaceIndexCopy"),  # its slots: indices to int64, the new rows
    *("Exp", "Add", "Softplus", "Addcmul", "Sigmoid"),  # g and beta
    *("RmsNorm", "RmsNorm"),  # q and k
    "InplaceCopy",  # v as its own tensor
    "RecurrentGatedDeltaRule",
    "InplaceCopy",  # into the layer's tokens
    *("Silu", "RmsNorm", "Mul"),  # gated norm
    "Matmul",  # out
]


# One attention layer, from its norm's end to the output projection: the same in decode and prefill.
ATTENTION = ["IndexSelect", "IndexSelect", "FlashAttentionVarLenScore", "InplaceCopy"]  # keys, values, the layer's rows
# The experts of a sparse layer, between the routing and the shared expert.
EXPERTS = [
    "InplaceCopy",  # the choices to int32
    *("MoeInitRoutingV3", "GroupedMatmulV4", "SwiGlu", "GroupedMatmulV4", "MoeFinalizeRoutingV2"),
    "InplaceCopy",  # into the layer's rows
]
DENSE, MOE, NEXT = (checkpoints.CHECKPOINTS[i] for i in (0, 2, 5))
MODELS = {
    "qwen3_5": replace(DENSE, changes=HEAD_DIMS),
    "qwen3_5_moe": replace(MOE, changes=MOE.changes | HEAD_DIMS),
    "qwen3_next": replace(NEXT, changes=NEXT.changes | HEAD_DIMS),
}


def make_engine(model: str, folder: Path) -> xgdn.Engine:
    """A model whose constants are cached and whose probe has run."""
    directory, _ = checkpoints.make(MODELS[model], folder)
    engine = xgdn.Engine(
        directory,
        dtype=torch.bfloat16,
        state_dtype=torch.bfloat16,
        device="npu:0",
        runner=xgdn.RunnerOptions(max_batch_size=64, max_cached_tokens=4096),
    )
    for batch in (1, 2, 4, 8):
        engine.generate([[1, 2, 3]] * batch, max_new_tokens=3, ignore_eos=True)
    return engine


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> xgdn.Engine:
    return make_engine("qwen3_5", tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture(scope="module", params=MODELS)
def any_engine(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> xgdn.Engine:
    return make_engine(request.param, tmp_path_factory.mktemp("checkpoint"))


def steps(engine: xgdn.Engine, lengths: tuple[int, ...]) -> tuple[Ledger, Ledger]:
    """The prefill step of prompts of these lengths, and the decode step after it."""
    for length in lengths:
        engine.submit(xgdn.Request(torch.randint(0, 128, (length,)).tolist(), max_new_tokens=3, ignore_eos=True))
    with recorded() as prefill:
        engine.step()
    with recorded() as decode:
        engine.step()
    while not engine.is_idle():
        engine.step()
    return prefill, decode


def gdn_layers(ledger: Ledger) -> list[list[dict[str, Any]]]:
    """The launches of each GDN layer: from the matrix product before its delta rule to the one after."""
    launches = ledger.of("op")
    products = [i for i, op in enumerate(launches) if op["name"] == "aclnnMatmul"]
    rules = [i for i, op in enumerate(launches) if "GatedDeltaRule" in op["name"]]
    return [launches[max(p for p in products if p < rule) : min(p for p in products if p > rule) + 1] for rule in rules]


def names(layer: list[dict[str, Any]]) -> list[str]:
    return [op["name"].removeprefix("aclnn") for op in layer]


def assert_only_the_logits_come_back(ledger: Ledger) -> None:
    """One copy to the device, which nothing waits for; then launches; then the logits, and the wait for them."""
    assert ledger.copies == ["H2D", "D2H"]
    (to_device, logits) = ledger.of("copy")
    assert to_device["async"]
    last_launch = max(i for i, entry in enumerate(ledger.entries) if entry["kind"] == "op")
    assert ledger.entries.index(logits) > last_launch
    assert [i for i, entry in enumerate(ledger.entries) if entry["kind"] == "sync" and i < last_launch] == []
    assert len(ledger.syncs) == 1
    assert ledger.of("refusal") == []


def test_decode_step_at_batch_8(engine: xgdn.Engine) -> None:
    _, decode = steps(engine, (3, 1, 7, 2, 5, 4, 6, 9))
    assert_only_the_logits_come_back(decode)
    layers = gdn_layers(decode)
    assert [names(layer) for layer in layers] == [DECODE_LAYER] * NUM_GDN_LAYERS
    assert len(DECODE_LAYER) <= 24


def test_launches_of_a_decode_step_do_not_grow_with_the_batch(engine: xgdn.Engine) -> None:
    for batch in (1, 2, 8):
        _, decode = steps(engine, (2,) * batch)
        # The one row of v at batch 1 is contiguous as it is.
        want = DECODE_LAYER if batch > 1 else DECODE_LAYER[:16] + DECODE_LAYER[17:]
        assert [names(layer) for layer in gdn_layers(decode)] == [want] * NUM_GDN_LAYERS


def test_decode_works_on_the_pool_itself(engine: xgdn.Engine) -> None:
    first, second = (steps(engine, (2,) * batch)[1] for batch in (2, 8))
    pools = [{args[4]["data"] for args in ledger.args("RecurrentGatedDeltaRule")} for ledger in (first, second)]
    assert pools[0] == pools[1]
    assert len(pools[0]) == NUM_GDN_LAYERS


def test_prefill_step_of_ragged_sequences(engine: xgdn.Engine) -> None:
    lengths = (66, 3, 130, 17)
    several, _ = steps(engine, lengths)
    one, _ = steps(engine, (sum(lengths),))
    assert_only_the_logits_come_back(several)
    layers = gdn_layers(several)
    assert len(layers) == NUM_GDN_LAYERS
    assert [names(layer) for layer in layers] == [names(layer) for layer in gdn_layers(one)]
    assert len({tuple(names(layer)) for layer in layers}) == 1


def test_prefill_has_no_padded_rows_and_no_workspace_of_zeros(engine: xgdn.Engine) -> None:
    lengths = (66, 3, 130, 17)
    T, N = sum(lengths), len(lengths)
    prefill, _ = steps(engine, lengths)
    for args in prefill.args("ChunkGatedDeltaRule"):
        shapes = [arg["shape"] for arg in args if isinstance(arg, dict)]
        q, k, v, beta, state, counts, g, out, final = shapes
        assert {rows[0] for rows in (q, k, v, beta, g, out)} == {T}
        assert {rows[0] for rows in (state, counts, final)} == {N}
    for layer in gdn_layers(prefill):
        for op in layer:
            tensors = [arg for arg in op["args"] if isinstance(arg, dict) and arg["shape"]]
            rows = max(arg["shape"][0] for arg in tensors) if tensors else 0
            if op["name"] in ("aclnnInplaceZero", "aclnnInplaceFillScalar", "aclnnInplaceOne"):
                assert rows <= N, f"{op['name']} of {tensors}"


def test_launches_of_a_whole_model_do_not_grow_with_the_batch(any_engine: xgdn.Engine) -> None:
    for length in (2, 40):
        decodes = {batch: steps(any_engine, (length,) * batch)[1] for batch in (1, 2, 4, 8)}
        for ledger in decodes.values():
            assert_only_the_logits_come_back(ledger)
        assert decodes[2].launches == decodes[4].launches == decodes[8].launches
        # Rows of one token are contiguous as they are: v of a GDN layer, and what a narrow leaves of one row.
        removed = Counter(decodes[2].launches) - Counter(decodes[1].launches)
        assert set(removed) <= {"InplaceCopy"}, removed
        assert not Counter(decodes[1].launches) - Counter(decodes[2].launches)


def test_launches_of_a_whole_prefill_do_not_grow_with_the_sequences(any_engine: xgdn.Engine) -> None:
    lengths = (66, 3, 130, 17)
    several, _ = steps(any_engine, lengths)
    one, _ = steps(any_engine, (sum(lengths),))
    assert_only_the_logits_come_back(several)
    assert_only_the_logits_come_back(one)
    assert several.launches == one.launches
    for q, k, v, *_, out in several.args("FlashAttentionVarLenScore"):
        assert {tensor["shape"][0] for tensor in (q, k, v, out)} == {sum(lengths)}, "no padded rows"
    for x, _chosen, *_, rows, places, _counts, _scale in several.args("MoeInitRoutingV3"):
        assert x["shape"][0] == sum(lengths)
        assert rows["shape"][0] == places["shape"][0] == 2 * sum(lengths)


def parts(ledger: Ledger, first: str, part: list[str]) -> int:
    """How often `part` stands in the launches, wherever `first` does."""
    launches = ledger.launches
    skip = part.index(first)
    places = [i - skip for i, name in enumerate(launches) if name == first]
    assert all(launches[i : i + len(part)] == part for i in places)
    return len(places)


def test_attention_and_experts_are_what_the_table_says(any_engine: xgdn.Engine) -> None:
    for ledger in steps(any_engine, (5, 1, 33)):
        num_sparse = ledger.launches.count("MoeInitRoutingV3")
        assert parts(ledger, "FlashAttentionVarLenScore", ATTENTION) == ledger.launches.count(
            "FlashAttentionVarLenScore"
        )
        assert parts(ledger, "MoeInitRoutingV3", EXPERTS) == num_sparse
