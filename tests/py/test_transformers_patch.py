# SPDX-License-Identifier: Apache-2.0
"""transformers with and without the patch: the same tokens, the same states, every call accounted for."""

from __future__ import annotations

import atexit
import copy
import logging
import sys
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers.models.qwen3_5 import modeling_qwen3_5 as modeling
from transformers.models.qwen4_exp import modeling_qwen4_exp as qwen4_exp

import reference
import xgdn
from cases import assert_bits_equal
from checkpoints import CHECKPOINTS, SMALL, Tiny, make, one_thread, randomize
from xgdn import _C, ops
from xgdn.integrations import calls

MODES = ("functions", "layers")
LENGTHS = (1, 2, 3, 4, 5, 9, 17, 31, 40, 64, 65, 70)
NEW_TOKENS = 8
TYPES = ["linear_attention", "full_attention"] * 2
F32_BOUND = 2e-5  # of values around one


def olmo_hybrid(**changes: Any) -> nn.Module:
    sizes = {**SMALL, "layer_types": TYPES, "linear_allow_neg_eigval": False}
    sizes |= {"linear_num_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    return transformers.OlmoHybridForCausalLM(transformers.OlmoHybridConfig(**sizes | changes))


OTHERS = [Tiny("olmo_hybrid", olmo_hybrid)]


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    xgdn.report(reset=True)
    with one_thread():
        yield
    xgdn.unpatch_transformers()
    xgdn.report(reset=True)


def patch(mode: str) -> list[str]:
    return xgdn.patch_transformers(layers=mode == "layers")


def build(tiny: Tiny) -> Any:
    torch.manual_seed(11)
    model = tiny.build(**tiny.changes)
    randomize(model)
    return model.float().eval()


def prompts(side: str) -> dict[str, Tensor]:
    """A batch of twelve, padded on one side."""
    generator = torch.Generator().manual_seed(3)
    ids, mask = torch.zeros(2, len(LENGTHS), max(LENGTHS), dtype=torch.long)
    for row, length in enumerate(LENGTHS):
        where = slice(-length, None) if side == "left" else slice(length)
        ids[row, where] = torch.randint(1, SMALL["vocab_size"], (length,), generator=generator)
        mask[row, where] = 1
    return {"input_ids": ids, "attention_mask": mask}


def generate(model: Any, inputs: dict[str, Tensor], **options: Any) -> Tensor:
    count = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS, "pad_token_id": 0}
    return model.generate(**inputs, do_sample=False, **count, **options)[:, inputs["input_ids"].shape[1] :]


def counts() -> dict[str, int]:
    """Served calls by function; none may have been left to the host."""
    report = xgdn.report(reset=True)
    assert report.fallbacks == 0, str(report)
    return {f.function: f.served for f in report.functions}


def fallbacks() -> dict[str, dict[str, int]]:
    return {f.function: f.fallbacks for f in xgdn.report(reset=True).functions if f.fallbacks}


def number_of(model: Any, end: str) -> int:
    """Of layers whose class's name ends so, without those of the vision part."""
    names = [type(module).__name__ for module in model.modules()]
    return sum(name.endswith(end) and "Vision" not in name for name in names)


@pytest.mark.parametrize("tiny", [*CHECKPOINTS, *OTHERS], ids=str)
def test_tokens_are_the_same_and_every_call_is_counted(tiny: Tiny) -> None:
    model = build(tiny)
    L, A = number_of(model, "GatedDeltaNet"), number_of(model, "Attention")
    norms = number_of(model, "RMSNorm") - 2 * A  # those of q and k are the attention's
    for side in ("left", "right"):
        want = generate(model, prompts(side))
        assert xgdn.report().functions == ()
        patch("functions")
        assert torch.equal(generate(model, prompts(side)), want)
        steps = L * (NEW_TOKENS - 1)
        rules = {"chunk_gated_delta_rule": L, "fused_recurrent_gated_delta_rule": steps}
        convolutions = {"causal_conv1d_fn": L, "causal_conv1d_update": steps}
        assert counts() == {**rules, **convolutions, "RMSNormGated": L + steps}
        patch("layers")
        assert torch.equal(generate(model, prompts(side)), want)
        served = counts()
        served.pop("MLP", None)
        beside = {} if tiny in OTHERS else {"Attention": A * NEW_TOKENS, "RMSNorm": norms * NEW_TOKENS}
        assert served == {"GatedDeltaNet": L, "GatedDeltaNet, one token": steps, "head": NEW_TOKENS, **beside}
        xgdn.unpatch_transformers()


@pytest.mark.parametrize("mode", MODES)
def test_hidden_states_and_caches_are_those_of_the_host(mode: str) -> None:
    """A prompt, more of it behind the cache, a token, and a token after the batch was put into another order."""
    model, generator = build(CHECKPOINTS[0]).model, torch.Generator().manual_seed(5)
    pieces = [torch.randint(1, 128, (3, length), generator=generator) for length in (2, 70, 1, 1)]
    order = torch.tensor([2, 2, 0])

    def run() -> list[Tensor]:
        cache = transformers.DynamicCache(config=model.config)
        out = []
        for i, piece in enumerate(pieces):
            if i == 3:
                cache.reorder_cache(order)
            out.append(model(piece, past_key_values=cache).last_hidden_state)
            for layer in cache.layers:
                if hasattr(layer, "recurrent_states"):
                    out += [layer.recurrent_states[0].clone(), layer.conv_states[0].clone()]
        return out

    with torch.no_grad():
        want = run()
        patch(mode)
        got = run()
    assert xgdn.report().fallbacks == 0
    for a, b in zip(got, want, strict=True):
        assert a.shape == b.shape
        assert a.dtype == b.dtype
        assert (a - b).norm() < F32_BOUND * b.norm()  # a few elements are ill conditioned in float32


@pytest.mark.parametrize("mode", MODES)
def test_beams_and_static_caches(mode: str) -> None:
    model, inputs = build(CHECKPOINTS[0]), prompts("left")
    inputs = {name: t[:3] for name, t in inputs.items()}
    options: list[dict[str, Any]] = [{"num_beams": 3}, {"cache_implementation": "static"}, {"use_cache": False}]
    wants = [generate(model, inputs, **o) for o in options]
    patch(mode)
    for option, want in zip(options, wants, strict=True):
        assert torch.equal(generate(model, inputs, **option), want), option
    counts()


@pytest.mark.parametrize("mode", MODES)
def test_a_compiled_layer_with_a_static_cache(mode: str) -> None:
    """One graph, compiled once, of which every call is counted."""
    model = build(CHECKPOINTS[0])
    layer = model.model.layers[0].linear_attn
    torch.manual_seed(2)
    prompt, tokens = torch.randn(2, 9, SMALL["hidden_size"]), torch.randn(3, 2, 1, SMALL["hidden_size"])

    def run(step: Any) -> list[Tensor]:
        cache = transformers.StaticCache(config=model.config, max_cache_len=16)
        outs = [layer(prompt, cache_params=cache), *(step(x, cache_params=cache) for x in tokens)]
        return [*outs, cache.get_conv_state(0), cache.get_recurrent_state(0)]

    with torch.no_grad():
        want = run(layer)
        patch(mode)
        run(layer)
        eager = counts()
        torch._dynamo.reset()
        with torch._dynamo.config.patch(error_on_recompile=True):
            got = run(torch.compile(layer, backend="aot_eager", fullgraph=True))
    assert counts() == eager
    torch._dynamo.reset()
    for a, b in zip(got, want, strict=True):
        assert (a - b).norm() < F32_BOUND * b.norm()


def outs_and_states(layer: nn.Module, cache: transformers.Cache, pieces: list[Tensor], name: str) -> list[Tensor]:
    """What a layer makes of the pieces, one behind the other, with the cache by that name, and leaves in it."""
    outs = [layer(piece, **{name: cache}) for piece in pieces]
    return [*outs, cache.get_conv_state(0), cache.get_recurrent_state(0)]


@pytest.mark.parametrize("recording", [False, True])
@pytest.mark.parametrize("gate", ["silu", "sigmoid"])
def test_a_layer_of_qwen4_exp(gate: str, recording: bool) -> None:
    """Alone, with both of its gates, and with a cache that could be rolled back."""
    sizes = {name: SMALL[name] for name in SMALL if name.startswith(("linear", "hidden", "num"))}
    sizes |= {"layer_types": TYPES, "output_gate_type": gate}
    config = transformers.Qwen4ExpTextConfig(**sizes)
    torch.manual_seed(3)
    layer = qwen4_exp.Qwen4ExpTextGatedDeltaNet(config, layer_idx=0).eval()
    randomize(layer)
    pieces = [torch.randn(2, length, SMALL["hidden_size"]) for length in (5, 3, 1, 1)]

    def run() -> list[Tensor]:
        cache = transformers.DynamicCache(config=config)
        if recording:
            cache.layers[0].activate_past_recording()
        return outs_and_states(layer, cache, pieces, "cache_params")

    with torch.no_grad():
        want = run()
        xgdn.patch_transformers(layers=True)
        got = run()
    for a, b in zip(got, want, strict=True):
        assert a.shape == b.shape
        assert (a - b).norm() < F32_BOUND * b.norm()
    if gate == "silu":
        steps = {} if recording else {"GatedDeltaNet, one token": 2}
        assert counts() == {"GatedDeltaNet": 4 - len(steps) * 2, **steps}
    else:
        assert fallbacks()["RMSNormGated"] == {"activation sigmoid": 4}


@pytest.mark.parametrize("when", ["before", "after"])
def test_before_and_after_loading(when: str, tmp_path: Any) -> None:
    folder, model = make(CHECKPOINTS[0], tmp_path)
    inputs = {name: t[:2] for name, t in prompts("left").items()}
    want = generate(model, inputs)
    if when == "before":
        xgdn.patch_transformers(layers=True)
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    else:
        xgdn.patch_transformers(layers=True)
    assert torch.equal(generate(model, inputs), want)
    assert counts()["GatedDeltaNet, one token"] == 3 * (NEW_TOKENS - 1)


def test_bfloat16_is_as_close_to_float32_as_the_host() -> None:
    model, inputs = build(CHECKPOINTS[0]), prompts("left")
    half = copy.deepcopy(model).to(torch.bfloat16)

    def states(m: Any) -> Tensor:
        return m.model(**inputs).last_hidden_state.float()[inputs["attention_mask"].bool()]

    with torch.no_grad():
        truth = states(model)
        host = (states(half) - truth).norm()
        for mode in MODES:
            patch(mode)
            assert (states(half) - truth).norm() < 1.1 * host
            counts()


def test_gradients_are_those_of_the_host_and_counted() -> None:
    model, inputs = build(CHECKPOINTS[0]), prompts("right")

    def gradients() -> list[Tensor]:
        model.zero_grad()
        model(**inputs, labels=inputs["input_ids"]).loss.backward()
        return [p.grad.clone() for p in model.parameters()]

    want = gradients()
    xgdn.patch_transformers(layers=True)
    for got, expected in zip(gradients(), want, strict=True):
        assert_bits_equal("gradient", got, expected)
    reasons = fallbacks()
    functions = {"chunk_gated_delta_rule", "causal_conv1d_fn", "RMSNormGated"}
    assert set(reasons) == {"GatedDeltaNet", "MLP", "Attention", "RMSNorm", "head", *functions}
    assert all(set(r) == {"a gradient is required"} for r in reasons.values())


@pytest.mark.parametrize("trained", ["linear_attn.in_proj_qkv", "linear_attn.out_proj", "mlp.down_proj"])
def test_training_of_a_few_projections(trained: str) -> None:
    model, inputs = build(CHECKPOINTS[0]).requires_grad_(False), prompts("right")
    weight = model.model.layers[0].get_submodule(trained).weight.requires_grad_()

    def gradient() -> Tensor:
        weight.grad = None
        model(**inputs, labels=inputs["input_ids"]).loss.backward()
        return weight.grad.clone()

    want = gradient()
    xgdn.patch_transformers(layers=True)
    assert (gradient() - want).norm() < 5 * F32_BOUND * want.norm()  # the backward pass magnifies what layers round
    assert "a gradient is required" in fallbacks()["MLP" if "mlp" in trained else "GatedDeltaNet"]


def rule_inputs(T: int, dtype: torch.dtype = torch.float32) -> tuple[list[Tensor], Tensor]:
    """Query, key, value, g, beta of two sequences, and their states, in the host's layout."""
    torch.manual_seed(T)
    q, k, v = (torch.randn(2, T, heads, 16).to(dtype) for heads in (2, 2, 4))
    return [q, k, v, -torch.rand(2, T, 4), torch.rand(2, T, 4).to(dtype)], torch.randn(2, 4, 16, 16)


@pytest.mark.parametrize("initial", ["none", "host", "kernels"])
@pytest.mark.parametrize(("name", "T"), [("torch_chunk_gated_delta_rule", 70), ("torch_recurrent_gated_delta_rule", 2)])
def test_the_rule_is_pure_and_right(name: str, T: int, initial: str) -> None:
    """With the memory of the state as the host lays it out, and as the kernels do."""
    tokens, state = rule_inputs(T)
    if initial == "kernels":
        state = state.transpose(-1, -2).contiguous().transpose(-1, -2)
    before = state.clone()
    xgdn.patch_transformers()
    given = None if initial == "none" else state
    options = {"initial_state": given, "use_qk_l2norm_in_kernel": True, "unknown_to_all": 1}
    o, final = getattr(modeling, name)(*tokens, output_final_state=True, **options)
    for n in range(2):
        S = (torch.zeros_like(state) if given is None else state)[n].transpose(-1, -2)
        want, states = reference.gated_delta_rule(*(t[n] for t in tokens), S)
        torch.testing.assert_close(o[n].double(), want, atol=F32_BOUND, rtol=0)
        torch.testing.assert_close(final[n].double(), states[-1].transpose(-1, -2), atol=F32_BOUND, rtol=0)
    assert final.dtype == torch.float32
    assert_bits_equal("initial_state", state, before)
    assert getattr(modeling, name)(*tokens, output_final_state=False, **options)[1] is None
    counts()


@pytest.mark.parametrize("laid_out", [False, True])
@pytest.mark.parametrize("spare", [0, 1, 2])
def test_the_convolution_of_a_token_moves_the_state_as_the_host_does(laid_out: bool, spare: int) -> None:
    torch.manual_seed(spare)
    D, W = 48, 4
    x, taps, bias = torch.randn(3, D, 1), torch.randn(D, W), torch.randn(D)
    state = torch.randn(3, D, W - 1 + spare)
    if laid_out:
        state = state.transpose(1, 2).contiguous().transpose(1, 2)
    host = state.clone()
    modeling.causal_conv1d_update(x, host, taps, bias, "silu")
    xgdn.patch_transformers()
    history = state[:, :, spare:].clone()
    out = modeling.causal_conv1d_update(x, state, taps, bias, "silu")
    for n in range(3):
        want = reference.causal_conv1d(x[n].T, taps, bias, history[n].T)
        torch.testing.assert_close(out[n].T.double(), want, atol=F32_BOUND, rtol=0)
    assert_bits_equal("conv_state", state, host)
    counts()


def test_the_convolution_of_prompts_and_the_norm() -> None:
    torch.manual_seed(0)
    x, taps, weight = torch.randn(2, 48, 9), torch.randn(48, 3), torch.randn(16)
    norm = modeling.Qwen3_5RMSNormGated(16)
    norm.weight.data.copy_(weight)
    rows, gate = torch.randn(2, 6, 16)
    xgdn.patch_transformers()
    with torch.no_grad():
        out, normed = modeling.causal_conv1d_fn(x, taps), norm(rows, gate)
    for n in range(2):
        want = reference.causal_conv1d(x[n].T, taps, None, torch.zeros(2, 48), silu=False)
        torch.testing.assert_close(out[n].T.double(), want, atol=F32_BOUND, rtol=0)
    want = reference.rms_norm_gated(rows, gate, weight, norm.variance_epsilon)
    torch.testing.assert_close(normed.double(), want, atol=F32_BOUND, rtol=0)
    assert counts() == {"causal_conv1d_fn": 1, "RMSNormGated": 1}


class Marked(Tensor):
    """A tensor that is more than its values."""


CHUNK, CONV, UPDATE = "torch_chunk_gated_delta_rule", "causal_conv1d_fn", "causal_conv1d_update"


def refused() -> list[tuple[str, str, tuple[Any, ...], dict[str, Any]]]:
    """What the functions cannot serve: the reason, the function, its arguments."""
    (q, k, v, g, beta), state = rule_inputs(5)
    x, taps, history = torch.randn(2, 48, 3), torch.randn(48, 4), torch.randn(2, 48, 4)
    doubles = [t.double() for t in (q, k, v, g, beta)]
    meta = [t.to("meta") for t in (q, k, v, g, beta)]
    return [
        ("dtype float64", CHUNK, tuple(doubles), {}),
        ("device meta", CHUNK, tuple(meta), {}),
        ("mixed dtypes", CHUNK, (q.bfloat16(), k, v, g, beta), {}),
        ("a gradient is required", CHUNK, (q, k, v, g, beta), {"initial_state": state.requires_grad_()}),
        ("a subclass of torch.Tensor", CHUNK, (q.as_subclass(Marked), k, v, g, beta), {}),
        ("argument state_v_first", CHUNK, (q, k, v, g, beta), {"state_v_first": True}),
        ("argument scale", "torch_recurrent_gated_delta_rule", (q, k, v, g, beta), {"scale": 0.5}),
        ("a convolution of 5 taps", CONV, (x, torch.randn(48, 5)), {}),
        ("activation gelu", CONV, (x, taps), {"activation": "gelu"}),
        ("mixed dtypes", CONV, (x.bfloat16(), taps), {}),
        ("more than one token", UPDATE, (x, history, taps), {}),
    ]


@pytest.mark.parametrize("case", range(len(refused())), ids=[f"{r[1]}-{r[0]}" for r in refused()])
def test_what_is_not_served_is_the_hosts_own_and_counted(case: int) -> None:
    torch.manual_seed(0)
    reason, name, args, options = refused()[case]
    want = getattr(modeling, name)(*(a.detach().clone() for a in args), **options)
    xgdn.patch_transformers()
    got = getattr(modeling, name)(*args, **options)
    for a, b in zip(*((x if isinstance(x, tuple) else (x,)) for x in (got, want)), strict=True):
        assert (a is None) == (b is None)
        if a is not None and a.device.type != "meta":
            assert_bits_equal(name, a.detach(), b.detach())
    (reasons,) = fallbacks().values()
    assert reasons == {reason: 1}


def test_packed_sequences_end_as_in_the_host() -> None:
    tokens, _ = rule_inputs(5)
    xgdn.patch_transformers()
    with pytest.raises(ValueError, match="packed sequences"):
        modeling.torch_chunk_gated_delta_rule(*tokens, cu_seqlens=torch.tensor([0, 5]))
    assert fallbacks() == {"chunk_gated_delta_rule": {"argument cu_seqlens": 1}}


def half_states(layer: Any, cache: Any) -> None:
    cache.layers[0].recurrent_states[0] = cache.get_recurrent_state(0).bfloat16()


def hooked(layer: Any, cache: Any) -> None:
    hook = SimpleNamespace(pre_forward=lambda module, *a, **k: (a, k), post_forward=lambda module, out: out)
    layer.conv1d._hf_hook = hook


CHANGES: dict[str, Any] = {
    "activation gelu": lambda layer, cache: setattr(layer, "activation", "gelu"),
    "activation sigmoid": lambda layer, cache: setattr(layer.norm, "activation", "sigmoid"),
    "mixed dtypes": lambda layer, cache: layer.conv1d.bfloat16(),
    "states that are not float32": half_states,
    "weights offloaded by accelerate": hooked,
    "autocast": lambda layer, cache: None,
    "argument cu_seq_lens_q": lambda layer, cache: None,
    "a convolution of 5 taps": lambda layer, cache: None,
    "a sharded layer": lambda layer, cache: setattr(layer, "conv_dim", 1),
}


@pytest.mark.parametrize("reason", CHANGES)
def test_a_layer_that_is_not_served_whole_is_the_hosts_own(reason: str) -> None:
    taps = {"linear_conv_kernel_dim": 5} if "taps" in reason else {}
    config = transformers.Qwen3_5TextConfig(**SMALL | taps)
    kwargs: dict[str, Any] = {"cu_seq_lens_q": torch.tensor([0, 1])} if "argument" in reason else {}
    torch.manual_seed(4)
    original = modeling.Qwen3_5GatedDeltaNet(config, layer_idx=0).eval()
    prompt, token = torch.randn(2, 4, SMALL["hidden_size"]), torch.randn(2, 1, SMALL["hidden_size"])

    def run() -> list[Tensor]:
        layer, cache = copy.deepcopy(original), transformers.DynamicCache(config=config)
        layer(prompt, cache_params=cache)
        xgdn.report(reset=True)
        CHANGES[reason](layer, cache)
        try:
            with torch.autocast("cpu", torch.bfloat16, enabled=reason == "autocast"):
                out = layer(token, cache_params=cache, **kwargs)
        except ValueError:  # the host has no sequences of several lengths
            return []
        return [out, cache.get_conv_state(0), cache.get_recurrent_state(0)]

    with torch.no_grad():
        want = run()
        xgdn.patch_transformers(layers=True)
        got = run()
    assert fallbacks()["GatedDeltaNet, one token"] == {reason: 1}
    for a, b in zip(got, want, strict=True):
        assert a.dtype == b.dtype
        assert (a - b).norm() < (F32_BOUND if a.dtype == torch.float32 else 1e-2) * b.norm()


@pytest.mark.parametrize("reason", ["activation GELUActivation", "autocast"])
def test_an_mlp_that_is_not_served_is_the_hosts_own(reason: str) -> None:
    act = {"hidden_act": "gelu"} if "activation" in reason else {}
    mlp = modeling.Qwen3_5MLP(transformers.Qwen3_5TextConfig(**SMALL | act), SMALL["intermediate_size"])
    x = torch.randn(2, 3, SMALL["hidden_size"])
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=reason == "autocast"):
        want = mlp(x)
        xgdn.patch_transformers(layers=True)
        assert_bits_equal("mlp", mlp(x), want)
    assert fallbacks() == {"MLP": {reason: 1}}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_norms(dtype: torch.dtype, weight_dtype: torch.dtype) -> None:
    norm = modeling.Qwen3_5RMSNorm(48, eps=1e-3).to(weight_dtype)
    x = torch.randn(2, 3, 48).to(dtype)
    with torch.no_grad():
        norm.weight.copy_(torch.randn(48))
        want = norm(x)
        truth = x.double() * (x.double().square().mean(-1, keepdim=True) + 1e-3).rsqrt() * (1 + norm.weight.double())
        xgdn.patch_transformers(layers=True)
        got = norm(x)
    assert (got.dtype, got.shape) == (want.dtype, want.shape)
    is_served = weight_dtype in (dtype, torch.float32)
    if is_served:
        assert counts() == {"RMSNorm": 1}
    else:
        assert fallbacks() == {"RMSNorm": {"mixed dtypes": 1}}
    assert (got - truth).norm() < (1e-6 if got.dtype == torch.float32 else 4e-3) * truth.norm()


def test_layers_of_a_forward_pass_share_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """And a cache keeps what it was given, whatever later passes compute."""
    model, ids = build(CHECKPOINTS[0]), prompts("left")["input_ids"]
    allocated: set[int] = set()
    results: set[int] = set()
    allocate, linear = _C.allocate_temporary, ops.linear

    def allocating(*args: Any) -> Tensor:
        memory = allocate(*args)
        allocated.add(memory.data_ptr())
        return memory

    def multiplying(*args: Any, **kwargs: Any) -> Tensor:
        out = linear(*args, **kwargs)
        results.add(out.data_ptr())
        return out

    monkeypatch.setattr(_C, "allocate_temporary", allocating)
    monkeypatch.setattr(ops, "linear", multiplying)
    xgdn.patch_transformers(layers=True)
    with torch.no_grad():
        cache = model(ids, use_cache=True).past_key_values
        tensors = [t for layer in cache.layers for t in vars(layer).values() if type(t) is Tensor]
        kept = [t.clone() for t in tensors]
        model(ids.flip(1), use_cache=True)
    assert len(results & allocated) > number_of(model, "MLP")
    for tensor, copy_of_it in zip(tensors, kept, strict=True):
        assert_bits_equal("cache", tensor, copy_of_it)


def attention_of(**changes: Any) -> tuple[Any, transformers.Qwen3_5TextConfig]:
    config = transformers.Qwen3_5TextConfig(**SMALL | changes)
    config._attn_implementation = "sdpa"
    torch.manual_seed(6)
    attention = modeling.Qwen3_5Attention(config, layer_idx=3).eval()
    randomize(attention)
    return attention, config


def positions(config: Any, x: Tensor, begin: int = 0) -> tuple[Tensor, Tensor]:
    ids = torch.arange(begin, begin + x.shape[1]).expand(x.shape[0], -1)
    return modeling.Qwen3_5TextRotaryEmbedding(config)(x, ids)


def test_attention_with_and_without_a_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    """A prompt that begins, more of it and a token behind the cache; and a prompt in which every token sees all."""
    attention, config = attention_of()
    attention.scaling *= 2
    pieces = torch.randn(3, 75, SMALL["hidden_size"]).split([70, 4, 1], dim=1)
    softmax, begun = modeling.ALL_ATTENTION_FUNCTIONS["sdpa"], []
    monkeypatch.setitem(
        modeling.ALL_ATTENTION_FUNCTIONS, "sdpa", lambda *a, **k: begun.append(a[1].shape[2]) or softmax(*a, **k)
    )

    def run() -> list[Tensor]:
        cache, out, begin = transformers.DynamicCache(config=config), [], 0
        for x in pieces:
            T = x.shape[1]
            mask = torch.ones(T, begin + T).tril(begin).bool().expand(3, 1, -1, -1) if begin else None
            out.append(attention(x, positions(config, x, begin), mask, past_key_values=cache)[0])
            begin += T
        out += [cache.layers[3].keys, cache.layers[3].values]
        return [*out, attention(pieces[0], positions(config, pieces[0]), None, is_causal=False)[0]]

    with torch.no_grad():
        want = run()
        assert begun == [70, 4, 1, 70]
        begun.clear()
        xgdn.patch_transformers(layers=True)
        got = run()
    assert begun == [4, 1, 70]
    assert counts() == {"Attention": 4}
    for a, b in zip(got, want, strict=True):
        assert (a - b).norm() < F32_BOUND * b.norm()
    assert (got[-1] - got[0]).norm() > 0.1 * got[0].norm()


@pytest.mark.parametrize(
    "reason", ["attention by eager", "autocast", "dropout", "mixed dtypes", "a gradient is required"]
)
def test_attention_that_is_not_served_is_the_hosts_own(reason: str) -> None:
    attention, config = attention_of(attention_dropout=0.1)
    x = torch.randn(2, 5, SMALL["hidden_size"])
    cos, sin = positions(config, x)
    attention.train(reason == "dropout").requires_grad_(False)
    attention.o_proj.requires_grad_("gradient" in reason)
    if reason == "attention by eager":
        config._attn_implementation = "eager"
    if reason == "mixed dtypes":
        cos, sin = cos.bfloat16(), sin.bfloat16()

    def run() -> Tensor:
        torch.manual_seed(1)
        with torch.autocast("cpu", torch.bfloat16, enabled=reason == "autocast"):
            return attention(x, (cos, sin), None)[0].detach()

    with torch.set_grad_enabled("gradient" in reason):
        want = run()
        xgdn.patch_transformers(layers=True)
        assert (run() - want).norm() < F32_BOUND * want.norm()  # its norms of q and k are served
    assert fallbacks()["Attention"] == {reason: 1}


@pytest.mark.parametrize("kind", ["plain", "bias", "hook", "16 bits", "error"])
def test_a_head_is_the_module_that_it_was(kind: str) -> None:
    model, heard = build(CHECKPOINTS[0]), []
    head, ids = model.lm_head, prompts("left")["input_ids"][:2, -8:]
    if kind == "bias":
        head.bias = nn.Parameter(torch.randn(head.weight.shape[0]))
    if kind == "hook":
        head.register_forward_hook(lambda module, args, out: heard.append(out) or out * 2)
    if kind == "16 bits":
        head.bfloat16()
        model.model.norm.register_forward_hook(lambda module, args, out: out.bfloat16())
    before = dict(vars(head))

    def run() -> Tensor:
        return model(ids[:, : 0 if kind == "error" else None], logits_to_keep=3).logits

    with torch.no_grad():
        if kind == "error":
            xgdn.patch_transformers(layers=True)
            with pytest.raises((ValueError, RuntimeError, IndexError)):
                run()
        else:
            want = run()
            xgdn.patch_transformers(layers=True)
            got = run()
            assert got.dtype == want.dtype
            assert (got - want).norm() < (1e-2 if kind == "16 bits" else F32_BOUND) * want.norm()
            assert counts().get("head", 0) == (kind != "hook")
            assert len(heard) == (2 if kind == "hook" else 0)
    assert vars(head) == before
    assert copy.deepcopy(model).lm_head.forward.__func__ is nn.Linear.forward


def test_a_compiled_model_with_a_static_cache() -> None:
    """One graph of all that is served, the head too."""
    sizes = {**SMALL, "num_hidden_layers": 2, "layer_types": TYPES[:2]}
    model = transformers.Qwen3_5ForCausalLM(transformers.Qwen3_5TextConfig(**sizes)).eval()
    randomize(model)
    ids = prompts("left")["input_ids"][:2, -9:]

    def run(call: Any) -> Tensor:
        cache = transformers.StaticCache(config=model.config, max_cache_len=16)
        model(ids, past_key_values=cache)
        return call(ids[:, :1], past_key_values=cache).logits

    with torch.no_grad():
        want = run(model)
        xgdn.patch_transformers(layers=True)
        torch._dynamo.reset()
        got = run(torch.compile(model, fullgraph=True, backend="aot_eager"))
    served = counts()
    assert (served["head"], served["Attention"], served["GatedDeltaNet, one token"]) == (2, 2, 1)
    assert (got - want).norm() < F32_BOUND * want.norm()


def test_layers_that_cannot_be_served_whole_are_served_in_parts() -> None:
    model = olmo_hybrid(linear_allow_neg_eigval=True).eval()
    inputs = {name: t[:2] for name, t in prompts("left").items()}
    want = generate(model, inputs)
    xgdn.patch_transformers(layers=True)
    assert torch.equal(generate(model, inputs), want)
    report = {f.function: f for f in xgdn.report().functions}
    assert report["GatedDeltaNet, one token"].fallbacks == {"negative eigenvalues": 2 * (NEW_TOKENS - 1)}
    assert report["fused_recurrent_gated_delta_rule"].served == 2 * (NEW_TOKENS - 1)
    assert report["fused_recurrent_gated_delta_rule"].fallbacks == {}


def test_projections_of_other_kinds_are_called() -> None:
    """Adapters and quantised weights put modules of their own there; hooks are called."""
    model, calls_ = build(CHECKPOINTS[0]), []
    layer = model.model.layers[0].linear_attn
    layer.in_proj_z = nn.Sequential(layer.in_proj_z)
    layer.out_proj.register_forward_hook(lambda module, args, out: calls_.append(out) or out * 2)
    inputs = {name: t[:2] for name, t in prompts("left").items()}
    want = generate(model, inputs)
    expected = len(calls_)
    calls_.clear()
    xgdn.patch_transformers(layers=True)
    assert torch.equal(generate(model, inputs), want)
    assert len(calls_) == expected
    counts()


def test_again_and_back() -> None:
    owners = (modeling, modeling.Qwen3_5GatedDeltaNet, modeling.Qwen3_5RMSNormGated, modeling.Qwen3_5MLP)
    owners += (modeling.Qwen3_5Attention, modeling.Qwen3_5ForCausalLM)
    before = [dict(vars(owner)) for owner in owners]
    functions = xgdn.patch_transformers()
    patched = dict(vars(modeling))
    layers = xgdn.patch_transformers(layers=True)
    assert set(functions) < set(layers)
    assert {"qwen3_5.torch_chunk_gated_delta_rule", "qwen3_next.causal_conv1d_update"} < set(functions)
    assert "qwen3_next.Qwen3NextGatedDeltaNet.forward" in layers
    assert not any("Vision" in name for name in layers)
    assert patched["torch_chunk_gated_delta_rule"] is not before[0]["torch_chunk_gated_delta_rule"]
    assert xgdn.patch_transformers() == functions
    assert vars(modeling.Qwen3_5GatedDeltaNet)["forward"] is before[1]["forward"]
    for _ in range(2):
        xgdn.unpatch_transformers()
        for owner, variables in zip(owners, before, strict=True):
            assert all(vars(owner)[name] is value for name, value in variables.items())


def test_the_cache_by_the_name_of_newer_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = modeling.Qwen3_5GatedDeltaNet
    by_old_name = layer.forward

    def forward(
        self: Any, hidden_states: Tensor, cache: Any = None, attention_mask: Any = None, **kwargs: Any
    ) -> Tensor:
        return by_old_name(self, hidden_states, cache, attention_mask, **kwargs)

    monkeypatch.setattr(layer, "forward", forward)
    config = transformers.Qwen3_5TextConfig(**SMALL)
    one, x = layer(config, layer_idx=0).eval(), torch.randn(2, 5, SMALL["hidden_size"])

    def run() -> list[Tensor]:
        return outs_and_states(one, transformers.DynamicCache(config=config), [x[:, :4], x[:, 4:]], "cache")

    with torch.no_grad():
        want = run()
        xgdn.patch_transformers(layers=True)
        got = run()
    for a, b in zip(got, want, strict=True):
        assert (a - b).norm() < F32_BOUND * b.norm()
    counts()
    xgdn.unpatch_transformers()


@pytest.mark.parametrize("changed", ["parameters", "cache"])
def test_layers_and_caches_of_an_unknown_kind(changed: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if changed == "parameters":
        monkeypatch.setattr(modeling.Qwen3_5GatedDeltaNet, "forward", lambda self, hidden_states, memory=None: memory)
    else:
        monkeypatch.delattr(transformers.cache_utils.Cache, "get_recurrent_state")
    expected = "memory" if changed == "parameters" else "get_recurrent_state"
    with pytest.raises(xgdn.errors.UnsupportedError, match=f"layers=True.* got {transformers.__version__}.*{expected}"):
        xgdn.patch_transformers(layers=True)
    assert vars(modeling)["torch_chunk_gated_delta_rule"].__module__ == modeling.__name__
    assert xgdn.patch_transformers()


def test_what_another_put_there_since_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(modeling, CONV, getattr(modeling, CONV))  # what is put back in the end
    xgdn.patch_transformers()
    monkeypatch.setattr(modeling, CONV, len)
    xgdn.unpatch_transformers()
    assert getattr(modeling, CONV) is len
    monkeypatch.undo()


@pytest.mark.parametrize("module", ["qwen3_5", "all"])
def test_names_that_are_gone(module: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    conv = modeling.causal_conv1d_fn
    if module == "all":
        monkeypatch.setattr(sys.modules["transformers"], "__file__", str(tmp_path / "__init__.py"))
    else:
        monkeypatch.delattr(modeling, CHUNK)
    words = "no model with them" if module == "all" else "modeling_qwen3_5 without torch_chunk_gated_delta_rule"
    with pytest.raises(xgdn.errors.UnsupportedError, match=words) as error:
        xgdn.patch_transformers()
    assert transformers.__version__ in str(error.value)
    assert modeling.causal_conv1d_fn is conv


def log_report() -> None:
    calls._log_report("transformers", logging.getLogger("xgdn"))


def test_the_report_in_words(caplog: pytest.LogCaptureFixture) -> None:
    assert str(xgdn.report()) == "xgdn served no call of a host"
    tokens, _ = rule_inputs(3)
    xgdn.patch_transformers()
    modeling.torch_chunk_gated_delta_rule(*tokens)
    with caplog.at_level(logging.INFO, logger="xgdn"):
        log_report()
    assert caplog.records[-1].levelno == logging.INFO
    modeling.torch_chunk_gated_delta_rule(*tokens, scale=1.0)
    assert str(xgdn.report()).splitlines() == [
        "xgdn served 1 of 2 calls of its hosts",
        "  transformers chunk_gated_delta_rule: 1 served, 1 not",
        "    1 not: argument scale",
    ]
    log_report()
    assert caplog.records[-1].levelno == logging.WARNING
    assert caplog.records[-1].getMessage() == str(xgdn.report())


def test_the_report_is_logged_once_at_exit(monkeypatch: pytest.MonkeyPatch) -> None:
    registered: list[Any] = []
    monkeypatch.setattr(atexit, "register", lambda *call: registered.append(call))
    calls.log_at_exit.cache_clear()
    xgdn.patch_transformers()
    xgdn.patch_transformers(layers=True)
    assert registered == [(calls._log_report, "transformers", logging.getLogger("xgdn"))]
