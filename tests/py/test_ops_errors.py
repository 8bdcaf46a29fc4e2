# SPDX-License-Identifier: Apache-2.0
"""Bad input: the error's type, and that its message names the op, the argument, what was expected and what came."""

from __future__ import annotations

import copy
import re
from functools import cache
from typing import Any

import pytest
import torch
from torch.utils._pytree import tree_map_only

import xgdn
from cases import OPS, assert_bits_equal, i32
from xgdn import ops

Arguments = dict[str, Any]

# The ops without a result, and what they write.
UPDATED = {
    "store_kv": ["k_cache", "v_cache"],
    "copy_slots": ["pools[0]", "pools[1]"],
    "materialize_state": [],
}


def tensors_of(arguments: Arguments) -> dict[str, torch.Tensor]:
    """By the names that messages give them: those of a list are name[0], name[1], ..., those of a ring ring_k, ..."""
    found: dict[str, torch.Tensor] = {}
    for name, value in arguments.items():
        if isinstance(value, torch.Tensor):
            found[name] = value
        elif isinstance(value, list):
            found |= {f"{name}[{i}]": t for i, t in enumerate(value) if isinstance(t, torch.Tensor)}
        elif isinstance(value, ops.ReplayRing):
            found |= {f"{name}_{field}": t for field, t in value._asdict().items()}
    return found


def replaced(arguments: Arguments, name: str, t: torch.Tensor) -> Arguments:
    """With another tensor by that name."""
    field = name.removeprefix("ring_")
    if "ring" in arguments and field in ops.ReplayRing._fields and name != field:
        return {**arguments, "ring": arguments["ring"]._replace(**{field: t})}
    argument, _, index = name.removesuffix("]").partition("[")
    if index:
        return {**arguments, argument: [t if i == int(index) else x for i, x in enumerate(arguments[argument])]}
    return {**arguments, argument: t}


def int8(*shape: int) -> torch.Tensor:
    return torch.randint(-128, 128, shape, dtype=torch.int8)


def good_arguments(op: str) -> Arguments:
    """Five tokens of two sequences (packed_decode, gdn_decode_step: two tokens) that the op accepts."""
    return copy.deepcopy(_good_arguments()[op])


@cache
def _good_arguments() -> dict[str, Arguments]:
    T, N, S, H, HV, K, V, D, W = 5, 2, 4, 2, 4, 16, 32, 24, 4
    batch = {"cu_seqlens": i32([0, 3, 5]), "state_indices": i32([0, 2])}
    delta = {
        "q": torch.randn(T, H, K),
        "k": torch.randn(T, H, K),
        "v": torch.randn(T, HV, V),
        "g": -torch.rand(T, HV),
        "beta": torch.rand(T, HV),
        "state": torch.randn(S, HV, V, K),
        **batch,
    }
    ring = ops.ReplayRing(torch.randn(3, H, 20, K), torch.randn(3, HV, 20, V), -torch.rand(3, HV, 20), i32([15, 2, 0]))
    conv = {"x": torch.randn(T, D), "weight": torch.randn(D, W), "conv_state": torch.randn(S, W + 1, D), **batch}
    gates = {"A_log": torch.randn(HV), "dt_bias": torch.randn(HV)}
    return {
        "recurrent_gated_delta_rule": delta,
        "chunk_gated_delta_rule": {**delta, "chunk": ops.build_chunk_metadata([3, 2], HV)},
        "replay_gated_delta_rule": {**delta, "ring": ring, "ring_indices": i32([0, 2])},
        "materialize_state": {
            "state": delta["state"],
            "ring": ring,
            "lengths": i32([16, 3]),
            "state_indices": i32([0, 2]),
            "ring_indices": i32([0, 2]),
            "write_indices": i32([1, 2]),
        },
        "packed_decode": {
            "mixed_qkv": torch.randn(N, 2 * H * K + HV * V),
            "a": torch.randn(N, HV),
            "b": torch.randn(N, HV),
            **gates,
            "state": torch.randn(S, HV, V, K),
            "state_indices": i32([0, 2]),
        },
        "causal_conv1d": conv,
        "causal_conv1d_update": {**conv, "max_len": 3},
        "gdn_gating": {"a": torch.randn(T, HV), "b": torch.randn(T, HV), **gates},
        "l2_norm": {"x": torch.randn(T, H, K)},
        "rms_norm_gated": {"x": torch.randn(T, HV, V), "z": torch.randn(T, HV, V), "weight": torch.randn(V)},
        "rms_norm": {
            "x": torch.randn(T, H, K),
            "weight": torch.randn(K),
            "residual": torch.randn(T, H, K),
            "cos": torch.randn(T, 8),
            "sin": torch.randn(T, 8),
        },
        "sigmoid_and_mul": {"x": torch.randn(T, H, K), "gate": torch.randn(T, H, K)},
        "silu_and_mul": {"gate": torch.randn(T, D), "up": torch.randn(T, D)},
        "linear": {
            "x": torch.randn(T, D),
            "weight": torch.randn(K, D),
            "bias": torch.randn(K),
        },
        "rms_norm_linear": {
            "x": torch.randn(T, D),
            "norm_weight": torch.randn(D),
            "weight": torch.randn(K, D),
            "bias": torch.randn(K),
            "residual": torch.randn(T, D),
            "residual_out": torch.randn(T, D),
        },
        "quantized_linear": {"x": torch.randn(T, 2 * V), "codes": int8(1, K, 16, 4), "scales": torch.rand(1, 2, 16)},
        "quantized_moe_experts": {
            "x": torch.randn(T, V),
            "weights": torch.rand(T, 2),
            "chosen": torch.tensor([[0, 2], [1, 0], [2, 1], [0, 1], [2, 0]]),
            "gate_up_codes": int8(3, 8, 8, 16, 4),
            "gate_up_scales": torch.rand(3, 8, 1, 16),
            "down_codes": int8(3, 2, 16, 16, 4),
            "down_scales": torch.rand(3, 2, 2, 16),
        },
        "paged_attention": {
            "q": torch.randn(T, HV, K),
            "k": torch.randn(3, 4, H, K),
            "v": torch.randn(3, 4, H, K),
            "block_table": i32([[2, 0], [1, -1]]),
            "context_lens": i32([7, 2]),
            "cu_seqlens": i32([0, 3, 5]),
        },
        "store_kv": {
            "k": torch.randn(T, H, K),
            "v": torch.randn(T, H, K),
            "k_cache": torch.randn(3, 4, H, K),
            "v_cache": torch.randn(3, 4, H, K),
            "slot_mapping": i32([4, 0, 11, -1, 7]),
        },
        "copy_slots": {
            "pools": [torch.randn(S, HV, V), torch.arange(S * D).int().view(S, D)],
            "from_indices": i32([0, 2]),
            "to_indices": i32([1, 3]),
        },
        "moe_experts": {
            "x": torch.randn(T, D),
            "weights": torch.rand(T, 2),
            "chosen": torch.tensor([[0, 2], [1, 0], [2, 1], [0, 1], [2, 0]]),
            "gate_up": torch.randn(3, 2 * K, D),
            "down": torch.randn(3, D, K),
        },
        "gdn_decode_step": {
            "projected": torch.randn(N, 2 * H * K + 2 * HV * V + 2 * HV),
            "conv_weight": torch.randn(2 * H * K + HV * V, W),
            "conv_state": torch.randn(S, W - 1, 2 * H * K + HV * V),
            **gates,
            "state": torch.randn(S, HV, V, K),
            "norm_weight": torch.randn(V),
            "state_indices": i32([0, 2]),
        },
    }


RECURRENT = "recurrent_gated_delta_rule"
REPLAY = "replay_gated_delta_rule"
MATERIALIZE = "materialize_state"
STEP = "gdn_decode_step"
ATTENTION = "paged_attention"
EXPERTS = "moe_experts"
NORM_LINEAR = "rms_norm_linear"
QUANTIZED = "quantized_linear"
QUANTIZED_EXPERTS = "quantized_moe_experts"
STORE = "store_kv"
COPY = "copy_slots"
RINGS = ops.ReplayRing(torch.randn(3, 2, 20, 16), torch.randn(3, 4, 20, 32), -torch.rand(3, 4, 20), i32([15, 2, 0]))
VERIFY = {"state_indices": i32([[0, 1, 2], [3, 4, 5]]), "num_accepted": i32([1, 3]), "state": torch.randn(6, 4, 32, 16)}

# (op, changed arguments, exception, words of the message)
BAD: list[tuple[str, Arguments, type[Exception], tuple[str, ...]]] = [
    # dtype
    (RECURRENT, {"q": torch.randn(5, 2, 16).double()}, TypeError, ("q", "Float", "Double")),
    (RECURRENT, {"k": torch.randn(5, 2, 16).bfloat16()}, TypeError, ("k", "Float", "BFloat16")),
    (RECURRENT, {"g": torch.randn(5, 4).half()}, TypeError, ("g", "Float", "Half")),
    (RECURRENT, {"state": torch.randn(4, 4, 32, 16).half()}, TypeError, ("state", "Half")),
    (
        RECURRENT,
        {"state_indices": torch.tensor([0, 2])},
        TypeError,
        ("state_indices", "Long"),
    ),
    (RECURRENT, {"cu_seqlens": torch.tensor([0, 3, 5])}, TypeError, ("cu_seqlens", "Long")),
    ("chunk_gated_delta_rule", {"has_initial_state": i32([1, 0])}, TypeError, ("has_initial_state", "Bool", "Int")),
    ("packed_decode", {"a": torch.randn(2, 4).bfloat16()}, TypeError, ("a", "Float", "BFloat16")),
    ("causal_conv1d", {"weight": torch.randn(24, 4).half()}, TypeError, ("weight", "Float", "Half")),
    ("causal_conv1d_update", {"x": torch.randn(5, 24).int()}, TypeError, ("x", "Int")),
    ("gdn_gating", {"b": torch.randn(5, 4).half()}, TypeError, ("b", "Float", "Half")),
    *(
        (op, {name: torch.randn(4).half()}, TypeError, (name, "Float", "Half"))
        for op in ("gdn_gating", "packed_decode", "gdn_decode_step")
        for name in ("A_log", "dt_bias")
    ),
    ("l2_norm", {"out": torch.empty(5, 2, 16).half()}, TypeError, ("out", "Float", "Half")),
    ("rms_norm_gated", {"weight": torch.randn(32).double()}, TypeError, ("weight", "Float", "Double")),
    # shape
    (RECURRENT, {"k": torch.randn(5, 2, 9)}, ValueError, ("k", "T, H, K", "K=16 (set by q)", "9")),
    (RECURRENT, {"k": torch.randn(4, 2, 16)}, ValueError, ("k", "T=5 (set by q)", "[4, 2, 16]")),
    (RECURRENT, {"q": torch.randn(5, 32)}, ValueError, ("q", "T, H, K", "[5, 32]")),
    (RECURRENT, {"v": torch.randn(5, 3, 32)}, ValueError, ("HV", "multiple of H=2", "3")),
    (RECURRENT, {"state": torch.randn(4, 4, 16, 32)}, ValueError, ("state", "V=32 (set by v)")),
    (RECURRENT, {"state_indices": i32([0])}, ValueError, ("state_indices", "N=2", "[1]")),
    (RECURRENT, {"cu_seqlens": i32([])}, ValueError, ("cu_seqlens", "at least one entry")),
    (RECURRENT, {"out": torch.empty(5, 4, 16)}, ValueError, ("out", "V=32", "[5, 4, 16]")),
    (RECURRENT, {**VERIFY, "write_indices": i32([0, 1])}, ValueError, ("write_indices", "table")),
    ("chunk_gated_delta_rule", {"beta": torch.rand(5, 2)}, ValueError, ("beta", "HV=4 (set by v)", "[5, 2]")),
    ("packed_decode", {"mixed_qkv": torch.randn(2, 200)}, ValueError, ("mixed_qkv", "2 H K + HV V", "200")),
    ("packed_decode", {"mixed_qkv": torch.randn(2, 96 + 128)}, ValueError, ("mixed_qkv", "multiple of H", "H=3")),
    ("causal_conv1d", {"weight": torch.randn(24, 5)}, ValueError, ("weight", "2 to 4", "5")),
    ("causal_conv1d", {"conv_state": torch.randn(4, 2, 24)}, ValueError, ("conv_state", "R >= 3", "2")),
    ("causal_conv1d", {"bias": torch.randn(23)}, ValueError, ("bias", "D=24 (set by x)", "[23]")),
    ("causal_conv1d_update", {"max_len": 4}, ValueError, ("conv_state", "R >= 6", "5")),
    ("causal_conv1d_update", {"max_len": 0}, ValueError, ("max_len", "at least 1", "0")),
    ("gdn_gating", {"A_log": torch.randn(3)}, ValueError, ("A_log", "HV=4 (set by a)", "[3]")),
    ("gdn_gating", {"dt_bias": torch.randn(5)}, ValueError, ("dt_bias", "HV=4 (set by a)", "[5]")),
    ("l2_norm", {"x": torch.randn(5, 16)}, ValueError, ("x", "T, H, K", "[5, 16]")),
    ("rms_norm_gated", {"weight": torch.randn(16)}, ValueError, ("weight", "V=32 (set by x)", "[16]")),
    # replay states
    (REPLAY, {"chunk_size": 24}, NotImplementedError, ("chunk_size", "16, 32 or 64", "24")),
    (REPLAY, {"chunk_size": 32}, ValueError, ("ring_k", "C..2C", "C=32", "R=20")),
    (REPLAY, {"ring_indices": i32([0])}, ValueError, ("ring_indices", "N=2", "[1]")),
    (REPLAY, {"ring_indices": i32([0, 3])}, IndexError, ("ring_indices", "0..2", "3")),
    (REPLAY, {"ring_indices": i32([2, 2])}, IndexError, ("ring_indices", "written once", "2")),
    (REPLAY, {"ring_write_indices": i32([2, 1])}, IndexError, ("ring_indices", "no other row writes", "2")),
    (REPLAY, {"ring_write_indices": i32([1, 3])}, IndexError, ("ring_write_indices", "0..2", "3")),
    (REPLAY, {"ring_indices": i32([0, -1])}, IndexError, ("ring_indices", "exactly where state_indices", "-1")),
    (REPLAY, {"num_accepted": i32([0, 5])}, IndexError, ("num_accepted", "0..R-C=4", "5")),
    (REPLAY, {"num_accepted": i32([-1, 0])}, IndexError, ("num_accepted", "0..R-C=4", "-1")),
    (REPLAY, {"has_initial_state": i32([1, 0])}, TypeError, ("has_initial_state", "Bool", "Int")),
    (REPLAY, {"cu_seqlens": i32([0, 5, 5]), "commit": False}, IndexError, ("cu_seqlens", "R-C=4", "5")),
    (REPLAY, {"write_indices": i32([2, 1])}, IndexError, ("state_indices", "no other row writes", "2")),
    (REPLAY, {"write_indices": i32([4, 1])}, IndexError, ("write_indices", "0..3", "4")),
    (REPLAY, {"state": torch.randn(4, 4, 32, 16).half()}, TypeError, ("state", "Half")),
    (MATERIALIZE, {"lengths": i32([17, 3])}, IndexError, ("lengths", "0..C=16", "17")),
    (MATERIALIZE, {"lengths": i32([-1, 3])}, IndexError, ("lengths", "0..C=16", "-1")),
    (MATERIALIZE, {"write_indices": i32([1, 1])}, IndexError, ("write_indices", "written once", "1")),
    (MATERIALIZE, {"write_indices": i32([1, 0])}, IndexError, ("state_indices", "no other row writes", "0")),
    (MATERIALIZE, {"ring_indices": i32([3, 0])}, IndexError, ("ring_indices", "0..2", "3")),
    (MATERIALIZE, {"state": torch.randn(4, 3, 32, 16)}, ValueError, ("ring_u", "HV=3", "4")),
    (MATERIALIZE, {"chunk_size": 0}, NotImplementedError, ("chunk_size", "16, 32 or 64", "0")),
    # strides
    (RECURRENT, {"q": torch.randn(5, 16, 2).mT}, ValueError, ("q", "contiguous", "strides")),
    ("chunk_gated_delta_rule", {"state": torch.randn(4, 4, 16, 32).mT}, ValueError, ("state", "contiguous")),
    ("causal_conv1d", {"x": torch.randn(24, 5).T}, ValueError, ("x", "contiguous")),
    # device
    (RECURRENT, {"v": torch.empty(5, 4, 32, device="meta")}, ValueError, ("v", "cpu", "meta")),
    ("l2_norm", {"out": torch.empty(5, 2, 16, device="meta")}, ValueError, ("out", "cpu", "meta")),
    # the ops of a whole model
    ("rms_norm", {"x": torch.randn(5, 2, 16).double()}, TypeError, ("x", "Float", "Double")),
    ("rms_norm", {"weight": torch.randn(16).half()}, TypeError, ("weight", "Float", "Half")),
    ("rms_norm", {"residual": torch.randn(5, 2, 16).half()}, TypeError, ("residual", "Float", "Half")),
    ("rms_norm", {"out": torch.empty(5, 2, 16).bfloat16()}, TypeError, ("out", "Float", "BFloat16")),
    ("rms_norm", {"x": torch.randn(5, 32)}, ValueError, ("x", "T, H, D", "[5, 32]")),
    ("rms_norm", {"weight": torch.randn(15)}, ValueError, ("weight", "D=16 (set by x)", "[15]")),
    ("rms_norm", {"residual": torch.randn(4, 2, 16)}, ValueError, ("residual", "T=5 (set by x)", "[4, 2, 16]")),
    ("rms_norm", {"out": torch.empty(5, 1, 16)}, ValueError, ("out", "H=2 (set by x)", "[5, 1, 16]")),
    ("rms_norm", {"residual": torch.randn(5, 16, 2).mT}, ValueError, ("residual", "contiguous", "strides")),
    ("rms_norm", {"weight": torch.randn(32)[::2]}, ValueError, ("weight", "contiguous")),
    ("rms_norm", {"residual": torch.empty(5, 2, 16, device="meta")}, ValueError, ("residual", "cpu", "meta")),
    ("rms_norm", {"cos": torch.randn(5, 8).half()}, TypeError, ("cos", "Float", "Half")),
    ("rms_norm", {"sin": torch.randn(5, 6)}, ValueError, ("sin", "P=8 (set by cos)", "[5, 6]")),
    ("rms_norm", {"cos": torch.randn(4, 8)}, ValueError, ("cos", "T=5 (set by x)", "[4, 8]")),
    ("rms_norm", {"cos": torch.randn(8, 5).T}, ValueError, ("cos", "contiguous", "strides")),
    ("rms_norm", {"cos": None}, ValueError, ("cos", "both cos and sin, got one")),
    ("rms_norm", {"sin": None}, ValueError, ("sin", "both cos and sin, got one")),
    ("rms_norm", {"cos": torch.randn(5, 7), "sin": torch.randn(5, 7)}, ValueError, ("cos", "even P", "D=16, got 7")),
    ("rms_norm", {"cos": torch.randn(5, 18), "sin": torch.randn(5, 18)}, ValueError, ("cos", "even P", "D=16, got 18")),
    ("sigmoid_and_mul", {"x": torch.randn(5, 2, 16).int()}, TypeError, ("x", "Int")),
    ("sigmoid_and_mul", {"gate": torch.randn(5, 2, 16).half()}, TypeError, ("gate", "Float", "Half")),
    ("sigmoid_and_mul", {"out": torch.empty(5, 2, 16).half()}, TypeError, ("out", "Float", "Half")),
    ("sigmoid_and_mul", {"gate": torch.randn(5, 2, 15)}, ValueError, ("gate", "D=16 (set by x)", "[5, 2, 15]")),
    ("sigmoid_and_mul", {"x": torch.randn(5, 16, 2).mT}, ValueError, ("x", "contiguous")),
    ("silu_and_mul", {"gate": torch.randn(5, 24).int()}, TypeError, ("gate", "Int")),
    ("silu_and_mul", {"up": torch.randn(5, 24).half()}, TypeError, ("up", "Float", "Half")),
    ("silu_and_mul", {"out": torch.empty(5, 24).half()}, TypeError, ("out", "Float", "Half")),
    ("silu_and_mul", {"up": torch.randn(5, 23)}, ValueError, ("up", "I=24 (set by gate)", "[5, 23]")),
    ("silu_and_mul", {"out": torch.empty(4, 24)}, ValueError, ("out", "T=5 (set by gate)", "[4, 24]")),
    ("silu_and_mul", {"gate": torch.randn(24, 5).T}, ValueError, ("gate", "contiguous")),
    ("silu_and_mul", {"up": torch.empty(5, 24, device="meta")}, ValueError, ("up", "cpu", "meta")),
    ("linear", {"x": torch.randn(5, 24).double()}, TypeError, ("x", "Float", "Double")),
    ("linear", {"weight": torch.randn(16, 24).bfloat16()}, TypeError, ("weight", "Float", "BFloat16")),
    ("linear", {"bias": torch.randn(16).half()}, TypeError, ("bias", "Float", "Half")),
    ("linear", {"out": torch.empty(5, 16).half()}, TypeError, ("out", "Float", "Half")),
    ("linear", {"weight": torch.randn(24, 16)}, ValueError, ("weight", "D=24 (set by x)", "[24, 16]")),
    ("linear", {"bias": torch.randn(15)}, ValueError, ("bias", "O=16 (set by weight)", "[15]")),
    ("linear", {"out": torch.empty(5, 17)}, ValueError, ("out", "O=16 (set by weight)", "[5, 17]")),
    ("linear", {"x": torch.randn(5, 1, 24)}, ValueError, ("x", "T, D", "[5, 1, 24]")),
    ("linear", {"weight": torch.randn(24, 16).T}, ValueError, ("weight", "contiguous")),
    ("linear", {"bias": torch.empty(16, device="meta")}, ValueError, ("bias", "cpu", "meta")),
    ("linear", {"x": torch.tensor(1.0)}, ValueError, ("x", "T, D", "[]")),
    (NORM_LINEAR, {"x": torch.randn(5, 24).double()}, TypeError, ("x", "Float", "Double")),
    (NORM_LINEAR, {"norm_weight": torch.randn(24).half()}, TypeError, ("norm_weight", "Float", "Half")),
    (NORM_LINEAR, {"weight": torch.randn(16, 24).half()}, TypeError, ("weight", "Float", "Half")),
    (NORM_LINEAR, {"residual": torch.randn(5, 24).half()}, TypeError, ("residual", "Float", "Half")),
    (NORM_LINEAR, {"out": torch.empty(5, 16).half()}, TypeError, ("out", "Float", "Half")),
    (NORM_LINEAR, {"norm_weight": torch.randn(23)}, ValueError, ("norm_weight", "D=24 (set by x)", "[23]")),
    (NORM_LINEAR, {"weight": torch.randn(16, 23)}, ValueError, ("weight", "D=24 (set by x)", "[16, 23]")),
    (NORM_LINEAR, {"bias": torch.randn(8)}, ValueError, ("bias", "O=16 (set by weight)", "[8]")),
    (NORM_LINEAR, {"residual": torch.randn(4, 24)}, ValueError, ("residual", "T=5 (set by x)", "[4, 24]")),
    (NORM_LINEAR, {"residual_out": torch.randn(5, 23)}, ValueError, ("residual_out", "D=24 (set by x)", "[5, 23]")),
    (NORM_LINEAR, {"residual": None}, ValueError, ("residual", "both residual and residual_out, got one")),
    (NORM_LINEAR, {"residual_out": None}, ValueError, ("residual_out", "both residual and residual_out, got one")),
    (NORM_LINEAR, {"out": torch.empty(5, 8)}, ValueError, ("out", "O=16 (set by weight)", "[5, 8]")),
    (
        NORM_LINEAR,
        {"use_silu_and_mul": True, "out": torch.empty(5, 16)},
        ValueError,
        ("out", "O/2=8 (set by weight)", "[5, 16]"),
    ),
    (
        NORM_LINEAR,
        {"use_silu_and_mul": True, "weight": torch.randn(15, 24), "bias": None},
        ValueError,
        ("weight", "[gate | up]", "even O, got 15"),
    ),
    (ATTENTION, {"k": torch.randn(3, 4, 2, 16).half()}, TypeError, ("k", "Float", "Half")),
    (ATTENTION, {"block_table": torch.tensor([[2, 0], [1, 0]])}, TypeError, ("block_table", "Int", "Long")),
    (
        ATTENTION,
        {"block_table": i32([[2, 0], [1, 0]]).mT},
        ValueError,
        ("block_table", "contiguous dimensions from 1 on"),
    ),
    (ATTENTION, {"block_table": i32([[2, 0]])}, ValueError, ("block_table", "N=2 (set by cu_seqlens)", "[1, 2]")),
    (ATTENTION, {"context_lens": i32([7])}, ValueError, ("context_lens", "N=2 (set by cu_seqlens)", "[1]")),
    (ATTENTION, {"v": torch.randn(3, 4, 2, 8)}, ValueError, ("v", "D=16 (set by q)", "[3, 4, 2, 8]")),
    (ATTENTION, {"k": torch.randn(3, 4, 16, 2).mT}, ValueError, ("k", "contiguous")),
    (ATTENTION, {"k": int8(3, 4, 2, 16)}, ValueError, ("k", "D+4=20 (set by k)", "[3, 4, 2, 16]")),
    (ATTENTION, {"k": int8(3, 4, 2, 20)}, ValueError, ("v", "D+4=20 (set by k)", "[3, 4, 2, 16]")),
    (ATTENTION, {"k": int8(3, 4, 2, 20), "v": torch.randn(3, 4, 2, 20)}, TypeError, ("v", "Char", "Float")),
    (ATTENTION, {"v": int8(3, 4, 2, 16)}, TypeError, ("v", "Float", "Char")),
    (
        ATTENTION,
        {"q": torch.randn(5, 4, 6), "k": int8(3, 4, 2, 10), "v": int8(3, 4, 2, 10)},
        ValueError,
        ("k", "D a multiple of 4", "got 6"),
    ),
    (ATTENTION, {"q": torch.randn(5, 3, 16)}, ValueError, ("k", "HQ=3 (set by q)", "HKV=2")),
    (ATTENTION, {"out": torch.empty(5, 2, 16)}, ValueError, ("out", "HQ=4 (set by q)", "[5, 2, 16]")),
    (ATTENTION, {"cu_seqlens": i32([0, 3, 4])}, IndexError, ("cu_seqlens", "end at T=5", "got 4")),
    (ATTENTION, {"context_lens": i32([7, 1])}, IndexError, ("context_lens", "holds the 2 tokens", "got 1 at index 1")),
    (
        ATTENTION,
        {"context_lens": i32([9, 2])},
        IndexError,
        ("context_lens", "8 rows", "M=2", "B=4", "got 9 at index 0"),
    ),
    (ATTENTION, {"context_lens": i32([7, -1])}, IndexError, ("context_lens", "at least 0", "got -1 at index 1")),
    (
        ATTENTION,
        {"block_table": i32([[2, 3], [1, -1]])},
        IndexError,
        ("block_table", "0..2 in row 0", "got 3 at index 1"),
    ),
    (ATTENTION, {"context_rows": i32([0] * 8)}, ValueError, ("context_rows", "C=9 (set by context_lens)", "got 8")),
    (ATTENTION, {"cu_seqlens_cpu": i32([0, 5])}, ValueError, ("cu_seqlens_cpu", "N+1=3 (set by cu_seqlens)", "[2]")),
    (ATTENTION, {"context_lens_cpu": i32([7])}, ValueError, ("context_lens_cpu", "N=2 (set by cu_seqlens)", "[1]")),
    (ATTENTION, {"context_rows": i32([12] * 9)}, IndexError, ("context_rows", "0..11", "got 12")),
    (EXPERTS, {"weights": torch.rand(5, 2).half()}, TypeError, ("weights", "Float", "Half")),
    (EXPERTS, {"chosen": i32([[0, 1]] * 5)}, TypeError, ("chosen", "Long", "Int")),
    (EXPERTS, {"chosen": torch.zeros(5, 1).long()}, ValueError, ("chosen", "A=2 (set by weights)", "[5, 1]")),
    (EXPERTS, {"chosen": torch.arange(10).view(5, 2)}, IndexError, ("chosen", "an expert 0..2", "got 3 at index 3")),
    *(
        (EXPERTS, {name: torch.randn(shape)}, ValueError, ("gate_up", "[E, I+I, D]", str(shape)))
        for name, shape in (("gate_up", [2, 32, 24]), ("gate_up", [3, 30, 24]), ("gate_up", [96, 24]))
    ),
    (EXPERTS, {"x": torch.randn(5, 23)}, ValueError, ("down", "D=23 (set by x)", "[3, 24, 16]")),
    (EXPERTS, {"out": torch.empty(5, 48)[:, ::2]}, ValueError, ("out", "contiguous")),
    (QUANTIZED, {"x": torch.randn(5, 64).double()}, TypeError, ("x", "Float", "Double")),
    (QUANTIZED, {"codes": torch.randn(1, 16, 16, 4)}, TypeError, ("codes", "Char or Byte or Float8_e4m3fn", "Float")),
    (QUANTIZED, {"scales": torch.rand(1, 2, 16).double()}, TypeError, ("scales", "BFloat16", "Double")),
    (QUANTIZED, {"zeros": torch.zeros(1, 2, 16)}, TypeError, ("zeros", "Char", "Float")),
    (QUANTIZED, {"order": torch.arange(64)}, TypeError, ("order", "Int", "Long")),
    (QUANTIZED, {"bias": torch.randn(16).half()}, TypeError, ("bias", "Float", "Half")),
    (QUANTIZED, {"out": torch.empty(5, 16).half()}, TypeError, ("out", "Float", "Half")),
    (QUANTIZED, {"x": torch.randn(5, 48)}, ValueError, ("x", "D a multiple of 32", "48")),
    (QUANTIZED, {"x": torch.randn(5, 96)}, ValueError, ("codes", "[P, D/4, 16, 4]", "D/4=24 (set by x)", "[1, 16")),
    (QUANTIZED, {"x": torch.randn(5, 4, 16)}, ValueError, ("x", "T, D", "[5, 4, 16]")),
    (QUANTIZED, {"codes": int8(1, 16, 16, 4).view(torch.uint8)}, ValueError, ("codes", "[P, D/8, 16, 4]", "D/8=8")),
    (QUANTIZED, {"codes": int8(16, 64)}, ValueError, ("codes", "[P, D/4, 16, 4]", "[16, 64]")),
    (QUANTIZED, {"codes": int8(1, 16, 4, 16).mT}, ValueError, ("codes", "contiguous", "strides")),
    (QUANTIZED, {"scales": torch.rand(2, 2, 16)}, ValueError, ("scales", "P=1 (set by codes)", "[2, 2, 16]")),
    *(
        (QUANTIZED, {"scales": torch.rand(1, G, 16)}, ValueError, ("scales", "groups of 32, 64 or 128", f"got G={G}"))
        for G in (0, 3, 4)
    ),
    (
        QUANTIZED,
        {"x": torch.randn(5, 0), "codes": int8(1, 0, 16, 4), "scales": torch.rand(1, 0, 16)},
        ValueError,
        ("scales", "groups of 32, 64 or 128 elements of D=0", "got G=0"),
    ),
    (QUANTIZED, {"zeros": int8(1, 1, 16)}, ValueError, ("zeros", "G=2 (set by scales)", "[1, 1, 16]")),
    (
        QUANTIZED,
        {"codes": torch.zeros(1, 32, 16, 2).to(torch.float8_e4m3fn), "zeros": int8(1, 2, 16)},
        ValueError,
        ("zeros", "none", "float8"),
    ),
    (QUANTIZED, {"order": i32(range(63))}, ValueError, ("order", "D=64 (set by x)", "[63]")),
    *(
        (QUANTIZED, {"out": torch.empty(5, n)}, ValueError, ("out", "P=1 panels of 16 (set by codes)", f"got O={n}"))
        for n in (0, 17)
    ),
    (QUANTIZED, {"out": torch.empty(4, 16)}, ValueError, ("out", "T=5 (set by x)", "[4, 16]")),
    (QUANTIZED, {"bias": torch.randn(15)}, ValueError, ("out", "O=15 (set by bias)", "[5, 16]")),
    (QUANTIZED, {"scales": torch.empty(1, 2, 16, device="meta")}, ValueError, ("scales", "cpu", "meta")),
    *(
        (QUANTIZED, {"order": i32([*range(63), value])}, IndexError, ("order", "0..63", f"got {value} at index 63"))
        for value in (64, -1)
    ),
    (QUANTIZED_EXPERTS, {"chosen": i32([[0, 1]] * 5)}, TypeError, ("chosen", "Long", "Int")),
    (QUANTIZED_EXPERTS, {"weights": torch.rand(5, 2).half()}, TypeError, ("weights", "Float", "Half")),
    *(
        (QUANTIZED_EXPERTS, {f"{name}_{kind}": torch.zeros(shape).double()}, TypeError, (f"{name}_{kind}", "Double"))
        for name, P, rows, G in (("gate_up", 8, 8, 1), ("down", 2, 16, 2))
        for kind, shape in (("codes", (3, P, rows, 16, 4)), ("scales", (3, P, G, 16)), ("zeros", (3, P, G, 16)))
    ),
    (QUANTIZED_EXPERTS, {"x": torch.randn(5, 48)}, ValueError, ("x", "D a multiple of 32", "48")),
    (
        QUANTIZED_EXPERTS,
        {"x": torch.randn(5, 64)},
        ValueError,
        ("down_codes", "D/16=4 (set by x)", "[3, 2, 16, 16, 4]"),
    ),
    *(
        (QUANTIZED_EXPERTS, {"gate_up_codes": int8(*shape)}, ValueError, ("gate_up_codes", str(list(shape))))
        for shape in ((2, 8, 8, 16, 4), (3, 4, 8, 16, 4), (3, 8, 16, 16, 4), (8, 8, 16, 4))
    ),
    (
        QUANTIZED_EXPERTS,
        {"down_codes": int8(0, 2, 16, 16, 4), "down_scales": torch.rand(0, 2, 2, 16)},
        ValueError,
        ("down_codes", "at least one expert", "E=0"),
    ),
    (QUANTIZED_EXPERTS, {"down_scales": torch.rand(3, 2, 4, 16)}, ValueError, ("down_scales", "I=64", "got H=4")),
    (QUANTIZED_EXPERTS, {"gate_up_scales": torch.rand(3, 8, 2, 16)}, ValueError, ("gate_up_scales", "D=32", "got G=2")),
    (
        QUANTIZED_EXPERTS,
        {"gate_up_zeros": int8(3, 8, 2, 16)},
        ValueError,
        ("gate_up_zeros", "G=1 (set by gate_up_scales)"),
    ),
    (QUANTIZED_EXPERTS, {"down_zeros": int8(3, 2, 1, 16)}, ValueError, ("down_zeros", "H=2 (set by down_scales)")),
    (QUANTIZED_EXPERTS, {"out": torch.empty(5, 64)[:, ::2]}, ValueError, ("out", "contiguous")),
    (
        QUANTIZED_EXPERTS,
        {"chosen": torch.arange(10).view(5, 2)},
        IndexError,
        ("chosen", "an expert 0..2", "got 3 at index 3"),
    ),
    (STORE, {"k": torch.randn(5, 2, 16).double()}, TypeError, ("k", "Float", "Double")),
    *(
        (STORE, {name: good_arguments(STORE)[name].half()}, TypeError, (name, "Float", "Half"))
        for name in ("v", "k_cache", "v_cache")
    ),
    (STORE, {"slot_mapping": torch.arange(5)}, TypeError, ("slot_mapping", "Int", "Long")),
    (STORE, {"k": torch.randn(5, 32)}, ValueError, ("k", "T, HKV, D", "[5, 32]")),
    (STORE, {"v": torch.randn(4, 2, 16)}, ValueError, ("v", "T=5 (set by k)", "[4, 2, 16]")),
    (STORE, {"v": torch.randn(5, 2, 8)}, ValueError, ("v", "D=16 (set by k)", "[5, 2, 8]")),
    (STORE, {"k_cache": torch.randn(3, 4, 1, 16)}, ValueError, ("k_cache", "HKV=2 (set by k)", "[3, 4, 1, 16]")),
    (STORE, {"k_cache": int8(3, 4, 2, 16)}, ValueError, ("k_cache", "D+4=20", "[3, 4, 2, 16]")),
    (STORE, {"k_cache": int8(3, 4, 2, 20)}, ValueError, ("v_cache", "D+4=20", "[3, 4, 2, 16]")),
    (STORE, {"v_cache": int8(3, 4, 2, 16)}, TypeError, ("v_cache", "Float", "Char")),
    (STORE, {"k_cache": torch.randn(12, 2, 16)}, ValueError, ("k_cache", "P, B, HKV, D", "[12, 2, 16]")),
    (STORE, {"v_cache": torch.randn(4, 4, 2, 16)}, ValueError, ("v_cache", "P=3 (set by k_cache)", "[4, 4, 2, 16]")),
    (STORE, {"v_cache": torch.randn(3, 6, 2, 16)}, ValueError, ("v_cache", "B=4 (set by k_cache)", "[3, 6, 2, 16]")),
    (STORE, {"slot_mapping": i32([4])}, ValueError, ("slot_mapping", "T=5 (set by k)", "[1]")),
    (STORE, {"k": torch.randn(5, 16, 2).mT}, ValueError, ("k", "contiguous", "strides")),
    (STORE, {"v": torch.randn(5, 16, 2).mT}, ValueError, ("v", "contiguous", "strides")),
    (STORE, {"k_cache": torch.randn(3, 8, 2, 16)[:, ::2]}, ValueError, ("k_cache", "contiguous", "strides")),
    (STORE, {"v_cache": torch.randn(3, 4, 2, 32)[..., ::2]}, ValueError, ("v_cache", "contiguous", "strides")),
    (STORE, {"slot_mapping": torch.arange(10).int()[::2]}, ValueError, ("slot_mapping", "contiguous")),
    (STORE, {"v_cache": torch.empty(3, 4, 2, 16, device="meta")}, ValueError, ("v_cache", "cpu", "meta")),
    (STORE, {"slot_mapping": i32([4, 0, 12, -1, 7])}, IndexError, ("slot_mapping", "0..11", "-1", "got 12 at index 2")),
    (STORE, {"slot_mapping": i32([4, 0, 1, -2, 7])}, IndexError, ("slot_mapping", "0..11", "got -2 at index 3")),
    (
        STORE,
        {"slot_mapping": i32([4, -1, 7, -1, 4])},
        IndexError,
        ("slot_mapping", "once", "entry 0", "got 4 at index 4"),
    ),
    (
        STORE,
        {"may_have_padding": False},
        IndexError,
        ("slot_mapping", "may_have_padding is false", "got -1 at index 3"),
    ),
    *(
        (
            COPY,
            {"pools": [torch.randn(4, 2), torch.zeros(4).to(dtype)]},
            TypeError,
            ("pools[1]", "BFloat16", "Int", word),
        )
        for dtype, word in ((torch.float64, "Double"), (torch.bool, "Bool"), (torch.complex64, "ComplexFloat"))
    ),
    (COPY, {"from_indices": torch.tensor([0, 2])}, TypeError, ("from_indices", "Int", "Long")),
    (COPY, {"to_indices": torch.tensor([1, 3])}, TypeError, ("to_indices", "Int", "Long")),
    (COPY, {"to_indices": i32([1])}, ValueError, ("to_indices", "N=2 (set by from_indices)", "[1]")),
    (COPY, {"from_indices": i32([[0, 2]])}, ValueError, ("from_indices", "[N]", "[1, 2]")),
    (COPY, {"from_indices": i32([0, 1, 2, 3])[::2]}, ValueError, ("from_indices", "contiguous")),
    (
        COPY,
        {"pools": [torch.randn(4, 2), torch.randn(4), torch.randn(5, 4)]},
        ValueError,
        ("pools[2]", "[S, ...]", "S=4 (set by pools[0])", "[5, 4]"),
    ),
    (COPY, {"pools": [torch.tensor(1.0)]}, ValueError, ("pools[0]", "[S, ...]", "got []")),
    (COPY, {"pools": [torch.randn(4, 5, 2).mT]}, ValueError, ("pools[0]", "contiguous dimensions from 1", "strides")),
    (COPY, {"pools": [torch.empty(4, 2, device="meta")]}, ValueError, ("pools[0]", "cpu", "meta")),
    (COPY, {"from_indices": i32([0, 4])}, IndexError, ("from_indices", "0..3", "-1", "got 4 at index 1")),
    (COPY, {"to_indices": i32([-2, 3])}, IndexError, ("to_indices", "0..3", "got -2 at index 0")),
    (COPY, {"to_indices": i32([-1, 3]), "may_have_padding": False}, IndexError, ("to_indices", "0..3 (may", "got -1")),
    (COPY, {"to_indices": i32([3, 3])}, IndexError, ("to_indices", "once", "got 3 at index 1")),
    (COPY, {"to_indices": i32([2, 3])}, IndexError, ("from_indices", "no other row", "got 2 at index 1")),
    # cu_seqlens
    (RECURRENT, {"cu_seqlens": i32([1, 3, 5])}, IndexError, ("cu_seqlens", "start at 0", "1")),
    (RECURRENT, {"cu_seqlens": i32([0, 6, 5])}, IndexError, ("cu_seqlens", "never fall", "5")),
    (RECURRENT, {"cu_seqlens": i32([0, 3, 4])}, IndexError, ("cu_seqlens", "end at T=5", "4")),
    ("chunk_gated_delta_rule", {"cu_seqlens": i32([0, 3, 6])}, IndexError, ("cu_seqlens", "end at T=5", "6")),
    ("causal_conv1d", {"cu_seqlens": i32([0, -1, 5])}, IndexError, ("cu_seqlens", "never fall", "-1")),
    ("causal_conv1d_update", {"cu_seqlens": i32([2, 3, 5])}, IndexError, ("cu_seqlens", "start at 0", "2")),
    ("causal_conv1d_update", {"max_len": 2}, IndexError, ("cu_seqlens", "max_len=2", "3")),
    # slots
    (RECURRENT, {"state_indices": i32([0, 4])}, IndexError, ("state_indices", "0..3", "4")),
    (RECURRENT, {"state_indices": i32([-2, 0])}, IndexError, ("state_indices", "-1", "got -2")),
    (RECURRENT, {"state_indices": i32([1, 1])}, IndexError, ("state_indices", "once", "got 1")),
    (RECURRENT, {"write_indices": i32([3, 3])}, IndexError, ("write_indices", "once", "got 3")),
    (RECURRENT, {"write_indices": i32([1, 9])}, IndexError, ("write_indices", "0..3", "9")),
    (RECURRENT, {"write_indices": i32([2, 3])}, IndexError, ("state_indices", "no other row", "2")),
    ("chunk_gated_delta_rule", {"state_indices": i32([0, 4])}, IndexError, ("state_indices", "0..3", "4")),
    ("chunk_gated_delta_rule", {"write_indices": i32([3, 3])}, IndexError, ("write_indices", "once", "3")),
    ("packed_decode", {"state_indices": i32([-7, 0])}, IndexError, ("state_indices", "got -7")),
    ("packed_decode", {"state_indices": i32([2, 2])}, IndexError, ("state_indices", "once")),
    ("causal_conv1d", {"state_indices": i32([0, 4])}, IndexError, ("state_indices", "0..3", "4")),
    ("causal_conv1d_update", {"write_indices": i32([1, 1])}, IndexError, ("write_indices", "once", "1")),
    # verification
    (
        RECURRENT,
        {**VERIFY, "num_accepted": i32([0, 1])},
        IndexError,
        ("num_accepted", "1..L=3", "got 0"),
    ),
    (
        RECURRENT,
        {**VERIFY, "num_accepted": i32([1, 4])},
        IndexError,
        ("num_accepted", "1..L=3", "got 4"),
    ),
    (
        RECURRENT,
        {**VERIFY, "state_indices": i32([[0, 1], [2, 3]]), "num_accepted": i32([1, 1])},
        IndexError,
        ("cu_seqlens", "L=2", "3"),
    ),
    (
        RECURRENT,
        {**VERIFY, "state_indices": i32([[0, 1, 2], [3, 1, 5]])},
        IndexError,
        ("state_indices", "once", "1"),
    ),
    ("causal_conv1d_update", {"num_accepted": i32([1, 4])}, IndexError, ("num_accepted", "1..3", "4")),
    ("causal_conv1d_update", {"num_accepted": i32([0, 1])}, IndexError, ("num_accepted", "1..3", "0")),
    # the decode step
    (STEP, {"projected": torch.randn(2, 320)}, ValueError, ("projected", "D + HV V + 2 HV = 328", "320")),
    (STEP, {"conv_weight": torch.randn(192, 5)}, ValueError, ("conv_weight", "2 to 4", "5")),
    (STEP, {"conv_weight": torch.randn(200, 4)}, ValueError, ("conv_state", "200", "192")),
    (STEP, {"conv_weight": torch.randn(192, 4).half()}, TypeError, ("conv_weight", "Float", "Half")),
    (STEP, {"conv_state": torch.randn(4, 2, 192)}, ValueError, ("conv_state", "R >= 3", "2")),
    (STEP, {"norm_weight": torch.randn(16)}, ValueError, ("norm_weight", "V=32 (set by state)", "[16]")),
    (STEP, {"cu_seqlens": i32([0, 2])}, ValueError, ("cu_seqlens", "N=2 (set by projected)", "[2]")),
    (STEP, {"cu_seqlens": i32([0, 2, 2])}, IndexError, ("cu_seqlens", "one token a sequence", "got 2 at index 1")),
    (STEP, {"state_indices": i32([2, 2])}, IndexError, ("state_indices", "once")),
    (STEP, {"conv_indices": i32([3, 3])}, IndexError, ("conv_indices", "once")),
    (
        STEP,
        {"conv_indices": i32([1, 3]), "conv_write_indices": i32([3, 1])},
        IndexError,
        ("conv_indices", "no other row writes", "got 1 at index 0"),
    ),
    (STEP, {"conv_indices": i32([3, 4])}, IndexError, ("conv_indices", "0..3", "got 4")),
    (STEP, {"conv_write_indices": i32([3, 4])}, IndexError, ("conv_write_indices", "0..3", "got 4")),
    (STEP, {"conv_indices": i32([-1, 3])}, IndexError, ("conv_indices", "where state_indices has one", "got -1")),
    *(
        (STEP, {"ring": RINGS, **changes}, error, words)
        for changes, error, words in (
            ({"chunk_size": 8}, NotImplementedError, ("chunk_size", "16, 32 or 64", "8")),
            ({"chunk_size": 32}, ValueError, ("ring_k", "C..2C", "C=32", "R=20")),
            ({"ring": RINGS._replace(k=torch.randn(3, 4, 20, 16))}, ValueError, ("ring_k", "H=2", "[3, 4, 20, 16]")),
            ({"ring": RINGS._replace(u=torch.randn(3, 4, 19, 32))}, ValueError, ("ring_u", "R=20", "[3, 4, 19, 32]")),
            ({"ring": RINGS._replace(g=torch.randn(3, 4, 20).bfloat16())}, TypeError, ("ring_g", "Float", "BFloat16")),
            ({"ring": RINGS._replace(g=None)}, ValueError, ("ring_g", "B, HV, R", "no tensor")),
            ({"ring": RINGS._replace(length=i32([0, 1]))}, ValueError, ("ring_length", "B=3", "[2]")),
            ({"ring": RINGS._replace(length=i32([16, 0, 0]))}, IndexError, ("ring_length", "0..C-1=15", "16")),
            ({"ring": RINGS._replace(length=i32([0, 0, -1]))}, IndexError, ("ring_length", "0..C-1=15", "-1")),
            ({"conv_indices": i32([0, 3])}, IndexError, ("conv_indices", "0..2", "got 3")),
            ({"conv_write_indices": i32([1, 3])}, IndexError, ("conv_write_indices", "0..2", "got 3")),
            ({"state_indices": i32([0, 4])}, IndexError, ("state_indices", "0..3", "got 4")),
            # Sequence 0 folds into its checkpoint, which another one reads; into one that another one writes.
            (
                {"state_indices": i32([0, 0]), "conv_indices": i32([0, 1])},
                IndexError,
                ("state_indices", "no other row writes", "got 0"),
            ),
            (
                {"write_indices": i32([1, 1]), "conv_indices": i32([0, 1])},
                IndexError,
                ("write_indices", "once", "got 1"),
            ),
        )
    ),
    # chunk metadata
    ("chunk_gated_delta_rule", {"chunk": None}, ValueError, ("chunk_indices", "chunk metadata", "never recomputed")),
    (
        "chunk_gated_delta_rule",
        {"chunk": ops.build_chunk_metadata([5], 4)},
        ValueError,
        ("chunk_offsets", "N+1=3 (set by cu_seqlens)", "[2]"),
    ),
    (
        "chunk_gated_delta_rule",
        {"chunk": ops.build_chunk_metadata([3, 70], 4)},
        IndexError,
        ("chunk_offsets", "1 chunk", "2 tokens"),
    ),
]


def _id(row: object) -> str:
    if isinstance(row, dict):
        return "+".join(row)
    return row.__name__ if isinstance(row, type) else ("" if isinstance(row, tuple) else str(row))


@pytest.mark.parametrize(("op", "changes", "error", "words"), BAD, ids=_id)
def test_bad_input(op: str, changes: Arguments, error: type[Exception], words: tuple[str, ...]) -> None:
    arguments = {**good_arguments(op), **changes}
    names = ("state", "conv_state", "k_cache", "v_cache", *(f"pools[{i}]" for i in range(3)))
    pools = {name: t.clone() for name, t in tensors_of(arguments).items() if name in names and not t.is_meta}
    with pytest.raises(error) as caught:
        OPS[op](**arguments)
    message = str(caught.value)
    assert message.startswith(f"[{op}] "), message
    assert "\n" not in message, message
    for word in (*words, "expected"):
        assert word in message, f"{word!r} is missing in: {message}"
    for name, before in pools.items():
        assert_bits_equal(name, tensors_of(arguments)[name], before)


@pytest.mark.parametrize("op", [op for op in OPS if op not in UPDATED])
def test_a_result_that_is_made_has_the_bits_of_one_that_is_given(op: str, backend: str) -> None:
    names = ("g", "beta") if op == "gdn_gating" else ("out",)
    arguments = good_arguments(op)

    def results(**given: torch.Tensor) -> tuple[torch.Tensor, ...]:
        returned = OPS[op](**copy.deepcopy(arguments), **given, backend=backend)
        return returned if isinstance(returned, tuple) else (returned,)

    made = results()
    given = {name: torch.full_like(x, torch.nan) for name, x in zip(names, made, strict=True)}
    for name, returned, want in zip(names, results(**given), made, strict=True):
        assert returned is given[name]
        assert want.isfinite().all()
        assert_bits_equal(name, returned, want)


@pytest.mark.parametrize("op", OPS)
def test_gradients_are_refused_by_name(op: str) -> None:
    arguments = good_arguments(op)
    first, t = next(iter(tensors_of(arguments).items()))
    t.requires_grad_()
    with pytest.raises(NotImplementedError, match=rf"\[xgdn::{op}\] {re.escape(first)}: requires grad"):
        OPS[op](**arguments)
    with torch.no_grad():
        OPS[op](**arguments)


def test_a_gradient_is_refused_wherever_it_stands_in_a_list() -> None:
    arguments = good_arguments(COPY)
    arguments["pools"].append(torch.randn(4, 2, requires_grad=True))
    with pytest.raises(
        NotImplementedError, match=r"\[xgdn::copy_slots\] pools\[2\]: requires grad.*pass pools\[2\]\.det"
    ):
        ops.copy_slots(**arguments)


def test_out_of_the_convolution_may_not_be_its_input() -> None:
    arguments = good_arguments("causal_conv1d")
    with pytest.raises(ValueError, match=r"\[causal_conv1d\] out: expected memory of its own"):
        ops.causal_conv1d(**arguments, out=arguments["x"])


@pytest.mark.parametrize("op", ["recurrent_gated_delta_rule", "chunk_gated_delta_rule", "packed_decode"])
@pytest.mark.parametrize(("K", "V"), [(24, 32), (32, 24), (272, 32)])
def test_cpu_says_which_head_dims_it_serves(op: str, K: int, V: int) -> None:
    if "cpu" not in xgdn.available_backends():
        pytest.skip("this build has no cpu backend")
    arguments = good_arguments(op)
    resized = {
        "q": torch.randn(5, 2, K),
        "k": torch.randn(5, 2, K),
        "v": torch.randn(5, 4, V),
        "mixed_qkv": torch.randn(2, 4 * K + 4 * V),
        "state": torch.randn(4, 4, V, K),
    }
    arguments |= {name: value for name, value in resized.items() if name in arguments}
    with pytest.raises(NotImplementedError, match=rf"\[{op}\] backend cpu cannot serve this call: .*16"):
        OPS[op](**arguments, backend="cpu")
    # Left to itself the choice falls on the next backend, and that can be asked for.
    OPS[op](**arguments)
    assert xgdn.last_backend(op) != "cpu"


# ---- memory: what a tensor's storage holds, and who shares it --------------------------------------------------------

# Arguments that an op also takes, beside those of good_arguments.
OPTIONAL: dict[str, Arguments] = {
    RECURRENT: {"write_indices": i32([1, 3]), "cu_seqlens_cpu": i32([0, 3, 5])},
    "chunk_gated_delta_rule": {
        "write_indices": i32([1, 3]),
        "cu_seqlens_cpu": i32([0, 3, 5]),
        "has_initial_state": torch.tensor([True, False]),
    },
    REPLAY: {
        "write_indices": i32([1, 3]),
        "ring_write_indices": i32([0, 1]),
        "num_accepted": i32([1, 3]),
        "has_initial_state": torch.tensor([True, False]),
    },
    "packed_decode": {"write_indices": i32([1, 3])},
    "causal_conv1d": {
        "bias": torch.randn(24),
        "write_indices": i32([1, 3]),
        "has_initial_state": torch.tensor([True, False]),
    },
    "causal_conv1d_update": {
        "bias": torch.randn(24),
        "write_indices": i32([1, 3]),
        "num_accepted": i32([1, 3]),
    },
    ATTENTION: {
        "context_rows": i32([8, 9, 10, 11, 0, 1, 2, 4, 5]),
        "cu_seqlens_cpu": i32([0, 3, 5]),
        "context_lens_cpu": i32([7, 2]),
    },
    QUANTIZED: {"zeros": int8(1, 2, 16), "order": torch.randperm(64).int(), "bias": torch.randn(16)},
    QUANTIZED_EXPERTS: {"gate_up_zeros": int8(3, 8, 1, 16), "down_zeros": int8(3, 2, 2, 16)},
    STEP: {
        "conv_bias": torch.randn(192),
        "write_indices": i32([1, 3]),
        "conv_indices": i32([1, 2]),
        "conv_write_indices": i32([1, 0]),
        "ring": RINGS,
        "cu_seqlens": i32([0, 1, 2]),
    },
}

OUT_SHAPES = {
    RECURRENT: (5, 4, 32),
    "chunk_gated_delta_rule": (5, 4, 32),
    REPLAY: (5, 4, 32),
    "packed_decode": (2, 4, 32),
    "causal_conv1d": (5, 24),
    "causal_conv1d_update": (5, 24),
    "l2_norm": (5, 2, 16),
    "rms_norm_gated": (5, 4, 32),
    "rms_norm": (5, 2, 16),
    "sigmoid_and_mul": (5, 2, 16),
    "silu_and_mul": (5, 24),
    "linear": (5, 16),
    NORM_LINEAR: (5, 16),
    ATTENTION: (5, 4, 16),
    QUANTIZED: (5, 16),
    EXPERTS: (5, 24),
    QUANTIZED_EXPERTS: (5, 32),
    STEP: (2, 4, 32),
}


def every_argument(op: str) -> Arguments:
    """Those that good_arguments has, the optional ones and what is written, each in memory of its own."""
    arguments = copy.deepcopy({**good_arguments(op), **OPTIONAL.get(op, {})})
    if op == "gdn_gating":
        return arguments | {"g": torch.empty(5, 4), "beta": torch.empty(5, 4)}
    return arguments if op in UPDATED else arguments | {"out": torch.empty(OUT_SHAPES[op])}


def tensors(op: str) -> dict[str, torch.Tensor]:
    return tensors_of(every_argument(op))


WRITTEN = {op: ["g", "beta"] if op == "gdn_gating" else [*UPDATED.get(op, ["out"])] for op in OPS}
for _op in OPS:
    WRITTEN[_op] += [name for name in ("state", "conv_state", "residual_out") if name in tensors(_op)]
WRITTEN["rms_norm"] += ["residual"]
for _op in (REPLAY, STEP):
    WRITTEN[_op] += [f"ring_{field}" for field in ops.ReplayRing._fields]

# The inputs that an op may replace element by element.
IN_PLACE = {
    "l2_norm": ["x"],
    "rms_norm": ["x"],
    "rms_norm_gated": ["x", "z"],
    "sigmoid_and_mul": ["x", "gate"],
    "silu_and_mul": ["gate", "up"],
}


@pytest.mark.parametrize(("op", "name"), [(op, name) for op in OPS for name in tensors(op)])
@pytest.mark.parametrize("rest", [0, -1], ids=["freed", "truncated"])
def test_a_storage_that_holds_less_than_the_tensor_reaches(op: str, name: str, rest: int) -> None:
    arguments = every_argument(op)
    OPS[op](**copy.deepcopy(arguments))
    storage = tensors_of(arguments)[name].untyped_storage()
    needed = storage.nbytes()
    storage.resize_(needed + rest if rest else 0)
    pattern = (
        rf"\[{op}\] {re.escape(name)}: expected a storage of at least \d+ bytes, .* got one of {storage.nbytes()}$"
    )
    with pytest.raises(ValueError, match=pattern):
        OPS[op](**arguments)


@pytest.mark.parametrize("table", ["chunk_indices_chunk64", "chunk_offsets_chunk64"])
def test_chunk_tables_that_were_freed(table: str) -> None:
    arguments = good_arguments("chunk_gated_delta_rule")
    getattr(arguments["chunk"], table).untyped_storage().resize_(0)
    argument = table.removesuffix("_chunk64")
    with pytest.raises(ValueError, match=rf"\[chunk_gated_delta_rule\] {argument}: expected a storage of at least"):
        ops.chunk_gated_delta_rule(**arguments)


def test_a_view_may_end_where_its_storage_does() -> None:
    whole = torch.randn(7, 2, 16)
    end = whole[2:]
    assert ops.l2_norm(end).isfinite().all()
    whole.untyped_storage().resize_(6 * 2 * 16 * 4)
    assert ops.l2_norm(whole[:6]).isfinite().all()
    with pytest.raises(ValueError, match=r"x: expected a storage of at least 896 bytes, .* got one of 768"):
        ops.l2_norm(end)


@pytest.mark.parametrize(("op", "name"), [(op, name) for op in OPS for name in WRITTEN[op]])
@pytest.mark.parametrize("missing", [1, None], ids=["by_one", "expanded"])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_written_memory_may_not_share_elements(op: str, name: str, missing: int | None, device: str) -> None:
    """Rows or slots that begin before their predecessor ends; where the op wants them contiguous it says that."""
    arguments = every_argument(op)
    t = tensors_of(arguments)[name]
    stride = 0 if missing is None else t[0].numel() - missing
    if device == "meta":
        arguments = tree_map_only(torch.Tensor, lambda x: x.to("meta"), arguments)
        arguments |= {"cu_seqlens_cpu": i32([0, 3, 5])} if "cu_seqlens_cpu" in arguments else {}
    shared = torch.zeros(t.numel(), dtype=t.dtype, device=device).as_strided(t.shape, (stride, *t.stride()[1:]))
    arguments = replaced(arguments, name, shared)
    with pytest.raises(
        ValueError, match=rf"\[{op}\] {re.escape(name)}: expected (memory of its own|a contiguous).*strides"
    ):
        OPS[op](**arguments)


def test_slots_may_interleave_with_those_of_another_pool() -> None:
    """Two pools of one allocation, slot by slot; and rows of a result between those of its inputs."""
    arguments = good_arguments(STEP)
    slot, conv_slot = arguments["state"][0].numel(), arguments["conv_state"][0].numel()
    both = torch.randn(4, slot + conv_slot)
    shared = {
        "state": both[:, :slot].view(arguments["state"].shape),
        "conv_state": both[:, slot:].unflatten(1, arguments["conv_state"].shape[1:]),
    }
    apart = {name: value.contiguous() for name, value in shared.items()}
    assert_bits_equal("out", ops.gdn_decode_step(**(arguments | shared)), ops.gdn_decode_step(**(arguments | apart)))
    for name, value in shared.items():
        assert_bits_equal(name, value, apart[name])

    rows = torch.randn(5, 3, 24)
    want = ops.silu_and_mul(rows[:, 0], rows[:, 2])
    ops.silu_and_mul(rows[:, 0], rows[:, 2], out=rows[:, 1])
    assert_bits_equal("out", rows[:, 1], want)


def in_one_storage(t: torch.Tensor, other: torch.Tensor, offset: int) -> list[torch.Tensor]:
    """Both again, of 4 bytes an element, with `other` from element `offset` of `t` on."""
    memory = torch.zeros(t.numel() + other.numel() + offset)
    return [
        memory.view(x.dtype)[begin : begin + x.numel()].view(x.shape).copy_(x) for x, begin in ((t, 0), (other, offset))
    ]


@pytest.mark.parametrize(
    ("op", "name", "other"),
    [
        (op, name, other)
        for op in OPS
        for name in WRITTEN[op]
        for other, value in tensors(op).items()
        if other != name and value.element_size() == 4 and not other.endswith("_cpu")
    ],
)
def test_written_memory_may_not_be_another_arguments(op: str, name: str, other: str) -> None:
    arguments = every_argument(op)
    apart = tensors_of(arguments)
    last = apart[name].numel() - 1
    for offset in (0, last):
        one, two = in_one_storage(apart[name], apart[other], offset)
        shares = replaced(replaced(arguments, name, one), other, two)
        if offset == 0 and name == "out" and other in IN_PLACE.get(op, []):
            continue
        names = re.escape(name), re.escape(other)
        pair = "({0}: .* memory that {1} lies in|{1}: .* memory that {0} lies in)".format(*names)
        with pytest.raises(ValueError, match=rf"\[{op}\] {pair}") as caught:
            OPS[op](**shares)
        assert "expected memory of its own, got" in str(caught.value)


def test_memory_that_two_storages_hold_is_shared() -> None:
    arguments = good_arguments("linear")
    memory = torch.zeros(5 * 40).numpy()
    x = torch.from_numpy(memory[: 5 * 24]).view(5, 24)
    out = torch.from_numpy(memory[5 * 24 - 1 :][: 5 * 16]).view(5, 16)
    with pytest.raises(ValueError, match=r"\[linear\] out: expected memory of its own, got memory that x lies in"):
        ops.linear(**(arguments | {"x": x}), out=out)


@pytest.mark.parametrize(("op", "name"), [(op, name) for op in IN_PLACE for name in IN_PLACE[op]])
def test_results_that_may_replace_an_input(op: str, name: str, backend: str) -> None:
    arguments = every_argument(op)
    want = OPS[op](**copy.deepcopy(arguments), backend=backend)
    assert_bits_equal(name, OPS[op](**(arguments | {"out": arguments[name]}), backend=backend), want)
