# SPDX-License-Identifier: Apache-2.0
"""What one step of a whole model sends to the device: launches, copies, synchronisations."""

from __future__ import annotations

from dataclasses import replace
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


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> xgdn.Engine:
    """A dense model whose constants are cached and whose probe has run."""
    tiny = replace(checkpoints.CHECKPOINTS[0], changes=HEAD_DIMS)
    directory, _ = checkpoints.make(tiny, tmp_path_factory.mktemp("checkpoint"))
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
