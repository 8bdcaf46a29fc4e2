# SPDX-License-Identifier: Apache-2.0
"""The plugin of vLLM, in front of a stand-in for it: what a layer computes, what is counted, what is refused."""

from __future__ import annotations

import importlib
import importlib.metadata
import logging
import sys
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers.models.qwen3_5 import modeling_qwen3_5
from transformers.models.qwen3_next import modeling_qwen3_next

import xgdn
from cases import assert_bits_equal, i32
from checkpoints import MOE, SMALL, one_thread, randomize
from vllm_stand_in import (
    ATTENTION,
    BACKENDS,
    HEAD,
    HEADS,
    LAYER,
    LAYERS,
    AttentionMetadata,
    Metadata,
    Pools,
    StandIn,
    UnquantizedEmbeddingMethod,
)
from xgdn.integrations import calls, vllm_attention, vllm_layer, vllm_plugin, vllm_projections

F32_BOUND = 2e-5  # of values around one
NUM_SLOTS = 9


@pytest.fixture(autouse=True)
def counted() -> Iterator[None]:
    xgdn.report(reset=True)
    with one_thread():
        yield
    xgdn.report(reset=True)


@pytest.fixture
def vllm(monkeypatch: pytest.MonkeyPatch) -> StandIn:
    monkeypatch.delenv("VLLM_PLUGINS", raising=False)
    monkeypatch.delenv(vllm_projections.VARIABLE, raising=False)
    monkeypatch.delenv(vllm_attention.VARIABLE, raising=False)
    monkeypatch.delitem(sys.modules, "xgdn.integrations.vllm_attention_backend", raising=False)
    monkeypatch.setattr(vllm_projections, "is_faster_here", lambda: True)
    stand_in = StandIn()
    stand_in.install(monkeypatch)
    return stand_in


def source(kind: str = "qwen3_5", dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """A GDN layer of transformers, of the same weights each time."""
    torch.manual_seed(11)
    if kind == "qwen3_5":
        config = transformers.Qwen3_5TextConfig(**SMALL | changes)
        layer: Any = modeling_qwen3_5.Qwen3_5GatedDeltaNet(config, layer_idx=0)
    else:
        layer = modeling_qwen3_next.Qwen3NextGatedDeltaNet(
            transformers.Qwen3NextConfig(**SMALL | MOE | changes), layer_idx=0
        )
    torch.nn.init.normal_(layer.conv1d.weight, std=0.5)
    randomize(layer)
    torch.nn.init.uniform_(layer.A_log, -5, -1)  # states that last
    return layer.to(dtype).eval().requires_grad_(False)


def served_layer(vllm: StandIn, of: Any, **options: Any) -> Any:
    vllm_plugin.register()
    return vllm.layer_class(of, **options)


class Engine:
    """Schedules as vLLM does: decoded sequences first, then prompts, each in the slot that it has got."""

    def __init__(self, vllm: StandIn, layer: Any, sequences: list[Tensor]) -> None:
        self.vllm, self.layer, self.sequences = vllm, layer, sequences
        self.pools = Pools(layer, NUM_SLOTS)
        self.slots = torch.randperm(NUM_SLOTS, generator=torch.Generator().manual_seed(2))[: len(sequences)].tolist()
        self.done = [0] * len(sequences)
        self.out: list[list[Tensor]] = [[] for _ in sequences]

    def step(self, *counts: int, padding: int = 0) -> None:
        """Advance sequence `i` by `counts[i]` tokens."""
        rows = [i for i, count in enumerate(counts) if count]
        decodes = [i for i in rows if counts[i] == 1 and self.done[i] > 0]
        prompts = [i for i in rows if i not in decodes]
        order = decodes + prompts
        lengths = [counts[i] for i in order]
        table = torch.full((len(order), 3), -9, dtype=torch.int32)
        table[:, 0] = i32([self.slots[i] for i in order])
        self.vllm.context.attn_metadata = {
            self.layer.prefix: Metadata(
                num_prefills=len(prompts),
                num_prefill_tokens=sum(counts[i] for i in prompts),
                num_decodes=len(decodes),
                num_decode_tokens=len(decodes),
                has_initial_state=torch.tensor([self.done[i] > 0 for i in order]) if prompts else None,
                non_spec_query_start_loc=torch.tensor([0, *lengths]).cumsum(0, dtype=torch.int32),
                non_spec_state_indices_tensor=table[:, 0],
            )
        }
        x = [self.sequences[i][self.done[i] : self.done[i] + counts[i]] for i in order]
        before = self.pools.memory.clone()
        with torch.inference_mode():
            out = self.layer(torch.cat([*x, x[0].new_full((padding, x[0].shape[1]), float("nan"))]))
        for i, part in zip(order, out[: sum(lengths)].split(lengths), strict=True):
            self.out[i].append(part)
            self.done[i] += counts[i]
        assert out[sum(lengths) :].eq(0).all()
        self.check_untouched(before, order)

    def check_untouched(self, before: Tensor, order: list[int]) -> None:
        others = [slot for slot in range(NUM_SLOTS) if slot not in [self.slots[i] for i in order]]
        assert_bits_equal("other slots", self.pools.memory[others], before[others])
        assert_bits_equal("gaps", self.pools.memory[:, -Pools.GAP :], before[:, -Pools.GAP :])


def sequences(*lengths: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(4)
    return [torch.randn(length, SMALL["hidden_size"], generator=generator) for length in lengths]


def mixed_steps(engine: Engine) -> None:
    """Prompts whole and in pieces, decoded tokens beside both, a first piece of one token."""
    engine.step(70, 3, 0, 0)
    engine.step(1, 1, 64, 1)
    engine.step(1, 0, 66, 1, padding=3)
    engine.step(1, 1, 1, 1)
    engine.step(0, 1, 1, 5)


WHOLE = {
    "qwen3_5": {},
    "qwen3_next": {},
    "taps-2": {"linear_conv_kernel_dim": 2},
    "one-head": {"linear_num_key_heads": 1},
}


@pytest.mark.parametrize("name", WHOLE)
def test_steps_on_pools_give_what_transformers_computes_at_once(name: str, vllm: StandIn) -> None:
    of = source("qwen3_next" if name == "qwen3_next" else "qwen3_5", **WHOLE[name])
    engine = Engine(vllm, served_layer(vllm, of), sequences(73, 6, 132, 8))
    mixed_steps(engine)
    for x, parts in zip(engine.sequences, engine.out, strict=True):
        want = of(x.unsqueeze(0))[0]
        assert sum(len(part) for part in parts) == len(x)
        assert (torch.cat(parts) - want).abs().max() <= F32_BOUND * want.abs().max()
    served = {f.function: (f.host, f.served, f.fallbacks) for f in xgdn.report().functions}
    assert served == {vllm_layer.DECODE: ("vllm", 4, {}), vllm_layer.PREFILL: ("vllm", 4, {})}


def test_taps_that_vllm_has_packed_are_taken_from_where_it_keeps_them(vllm: StandIn) -> None:
    of = source()
    layer = served_layer(vllm, of)
    layer.conv1d._cpu_unpacked_conv_weight = layer.conv1d.weight.flatten(1)
    layer.conv1d.weight = torch.full((3,), float("nan"))
    engine = Engine(vllm, layer, sequences(6))
    engine.step(5)
    engine.step(1)
    want = of(engine.sequences[0].unsqueeze(0))[0]
    assert (torch.cat(engine.out[0]) - want).abs().max() <= F32_BOUND * want.abs().max()


def test_states_are_kept_in_the_type_of_the_pool(vllm: StandIn) -> None:
    """In bf16: what is read from there is the same up to its rounding, and not the same."""
    results = []
    for state_dtype in (torch.float32, torch.bfloat16):
        layer = served_layer(vllm, source())
        layer.state_dtypes = (torch.float32, state_dtype)
        engine = Engine(vllm, layer, sequences(9))
        engine.step(8)
        engine.step(1)
        results.append(torch.cat(engine.out[0]))
    exact, rounded = results
    assert_bits_equal("the prompt", rounded[:8], exact[:8])
    error = (rounded[8] - exact[8]).norm() / exact[8].norm()
    assert 1e-5 < error < 2**-8


def test_one_reading_of_the_metadata_serves_all_layers(vllm: StandIn) -> None:
    engine = Engine(vllm, served_layer(vllm, source()), sequences(5))
    engine.step(4)
    metadata = vllm.context.attn_metadata[engine.layer.prefix]
    assert vllm_layer._batch_of(metadata) is vllm_layer._batch_of(metadata)


def test_a_run_that_warms_up_touches_nothing_and_is_not_counted(vllm: StandIn) -> None:
    layer = served_layer(vllm, source())
    layer.kv_cache = []
    out = layer(torch.randn(3, SMALL["hidden_size"]))
    assert out.shape == (3, SMALL["hidden_size"])
    assert out.eq(0).all()
    assert xgdn.report().functions == ()


def test_a_compiled_layer_is_one_graph_and_counts_as_it_runs(vllm: StandIn) -> None:
    results = []
    for is_compiled in (False, True):
        layer = served_layer(vllm, source())
        if is_compiled:
            layer._forward_method = torch.compile(layer.forward_cpu, backend="aot_eager", fullgraph=True, dynamic=True)
        engine = Engine(vllm, layer, sequences(7, 9))
        for counts in ((4, 6), (1, 1), (1, 2)):
            engine.step(*counts)
        results.append(torch.cat([*engine.out[0], *engine.out[1]]))
        assert {f.function: f.served for f in xgdn.report(reset=True).functions} == {
            vllm_layer.DECODE: 2,
            vllm_layer.PREFILL: 2,
        }
    assert_bits_equal("compiled", results[1], results[0])


REASONS: dict[str, dict[str, Any]] = {
    "speculative decoding": {"options": {"num_spec": 2}},
    "dtype float64": {"dtype": torch.float64},
    "convolution states of [channels, rows]": {"vllm": {"is_conv_state_dim_first": True}},
    "convolution states of float16": {"state_dtypes": (torch.float16, torch.float32)},
    "states of float16": {"state_dtypes": (torch.float32, torch.float16)},
    "a convolution of 5 taps": {"changes": {"linear_conv_kernel_dim": 5}},
    "activation gelu": {"changes": {"hidden_act": "gelu"}},
    "activation sigmoid": {"norm": "sigmoid"},
}


@pytest.mark.parametrize("reason", REASONS)
def test_what_cannot_be_served_is_vllm_s_own_for_good_and_counted(
    reason: str, vllm: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    how = REASONS[reason]
    for name, value in how.get("vllm", {}).items():
        setattr(vllm, name, value)
    host_init = vllm.layer_class.__init__

    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        host_init(self, *args, **kwargs)
        self.state_dtypes = how.get("state_dtypes", self.state_dtypes)
        self.norm.activation = how.get("norm", self.norm.activation)

    monkeypatch.setattr(vllm.layer_class, "__init__", init)
    of = source(dtype=how.get("dtype", torch.float32), **how.get("changes", {}))
    layer = served_layer(vllm, of, **how.get("options", {}))
    for _ in range(2):
        assert layer(torch.randn(3, SMALL["hidden_size"])).eq(7).all()
    assert [(f.function, f.served, f.fallbacks) for f in xgdn.report().functions] == [("GatedDeltaNet", 0, {reason: 2})]


def bf16_layer(vllm: StandIn, kind: str = "qwen3_5") -> tuple[Any, Any]:
    """As vLLM has loaded it, and what it is made of in float32."""
    of = source(kind, torch.bfloat16)
    layer = served_layer(vllm, of)
    vllm.load(layer)
    return layer, of.float()


def num_own_products(layer: Any) -> list[int]:
    return [projection.num_calls for projection in (layer.in_proj_qkvz, layer.in_proj_ba, layer.out_proj)]


def assert_rows_near(got: Tensor, want: Tensor) -> None:
    """Each row, of bfloat16; some are small differences of larger numbers."""
    norms = want.norm(dim=1)
    assert norms.min() > 0.1 * norms.mean()
    assert ((got.float() - want).norm(dim=1) / norms).max() < 5e-2


@pytest.mark.parametrize("kind", ["qwen3_5", "qwen3_next"])
def test_few_tokens_are_projected_here(kind: str, vllm: StandIn) -> None:
    layer, of = bf16_layer(vllm, kind)
    engine = Engine(vllm, layer, [x.bfloat16() for x in sequences(90, 40, 7)])
    steps: tuple[tuple[tuple[int, ...], list[int]], ...] = (
        ((9, 7, 0), [0, 0, 0]),
        ((1, 15, 0), [0, 0, 0]),
        ((1, 1, 5), [0, 0, 0]),
        ((70, 10, 1), [1, 1, 1]),
        ((4, 1, 1), [1, 1, 1]),
        ((5, 6, 0), [1, 1, 1]),
    )
    for counts, own in steps:
        engine.step(*counts)
        assert num_own_products(layer) == own
    for x, parts in zip(engine.sequences, engine.out, strict=True):
        assert_rows_near(torch.cat(parts), of(x.float().unsqueeze(0))[0])
    served = {f.function: (f.served, f.fallbacks) for f in xgdn.report().functions}
    assert served[vllm_layer.PROJECTIONS] == (5, {})


def test_rows_behind_those_of_a_step_are_zero_with_projections_here(vllm: StandIn) -> None:
    layer, _ = bf16_layer(vllm)
    engine = Engine(vllm, layer, [x.bfloat16() for x in sequences(6)])
    engine.step(4, padding=3)
    assert num_own_products(layer) == [0, 0, 0]


def quantize(layer: Any) -> None:
    layer.in_proj_ba.quant_method = type("Fp8LinearMethod", (type(layer.in_proj_ba.quant_method),), {})()


def share(layer: Any) -> None:
    layer.out_proj.tp_size = 2


def add_bias(layer: Any) -> None:
    layer.out_proj.bias = torch.zeros(1)


def wrap(layer: Any) -> None:
    layer.in_proj_qkvz = torch.nn.Sequential(layer.in_proj_qkvz)


def hook(layer: Any) -> None:
    layer.out_proj.register_forward_hook(lambda *_: None)


# What happens to a layer before its weights are loaded, or behind that.
OWN_PRODUCTS: dict[str, tuple[Any, Any]] = {
    "weights of Fp8LinearMethod": (quantize, None),
    "tensor parallelism": (share, None),
    "a bias": (add_bias, None),
    "in_proj_qkvz has been replaced or has hooks": (None, wrap),
    "out_proj has been replaced or has hooks": (None, hook),
}


@pytest.mark.parametrize("reason", OWN_PRODUCTS)
def test_projections_that_are_not_plain_are_vllm_s_own_and_counted(
    reason: str, vllm: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, behind = OWN_PRODUCTS[reason]
    host_init = vllm.layer_class.__init__

    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        host_init(self, *args, **kwargs)
        if before is not None:
            before(self)

    monkeypatch.setattr(vllm.layer_class, "__init__", init)
    layer, of = bf16_layer(vllm)
    if behind is not None:
        behind(layer)
    x = sequences(3)[0].bfloat16()
    engine = Engine(vllm, layer, [x])
    engine.step(3)
    assert layer.out_proj.num_calls == 1
    assert_rows_near(engine.out[0][0], of(x.float().unsqueeze(0))[0])
    served = {f.function: (f.served, f.fallbacks) for f in xgdn.report().functions}
    assert served == {vllm_layer.PREFILL: (1, {}), vllm_layer.PROJECTIONS: (0, {reason: 1})}


def test_weights_that_vllm_has_not_loaded_are_its_own(vllm: StandIn) -> None:
    engine = Engine(vllm, served_layer(vllm, source(dtype=torch.bfloat16)), [sequences(3)[0].bfloat16()])
    engine.step(3)
    served = {f.function: f.fallbacks for f in xgdn.report().functions}
    assert served[vllm_layer.PROJECTIONS] == {"weights that vLLM has not loaded itself": 1}


@pytest.mark.parametrize("why", ["variable", "processor", "float32"])
def test_projections_that_are_not_wanted_are_vllm_s_own_and_not_counted(
    why: str, vllm: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    if why == "variable":
        monkeypatch.setenv(vllm_projections.VARIABLE, "vllm")
    elif why == "processor":
        monkeypatch.setattr(vllm_projections, "is_faster_here", lambda: False)
    dtype = torch.float32 if why == "float32" else torch.bfloat16
    layer = served_layer(vllm, source(dtype=dtype))
    vllm.load(layer)
    engine = Engine(vllm, layer, [sequences(3)[0].to(dtype)])
    engine.step(3)
    assert num_own_products(layer) == [1, 1, 1]
    assert [f.function for f in xgdn.report().functions] == [vllm_layer.PREFILL]


def head(dtype: torch.dtype = torch.bfloat16, size: int = 64) -> SimpleNamespace:
    torch.manual_seed(5)
    return SimpleNamespace(weight=torch.randn(48, size).to(dtype), quant_method=UnquantizedEmbeddingMethod())


def hidden(count: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(count, 64, generator=torch.Generator().manual_seed(6)).to(dtype)


@pytest.mark.parametrize("has_bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("count", [1, 16])
def test_a_head_multiplies_few_tokens_here(count: int, has_bias: bool, vllm: StandIn) -> None:
    served_layer(vllm, source(dtype=torch.bfloat16))
    of, x = head(), hidden(count)
    bias = torch.randn(48, generator=torch.Generator().manual_seed(7)).bfloat16() if has_bias else None
    got = vllm.head_class()(of, x, bias)
    want = torch.nn.functional.linear(x.double(), of.weight.double(), None if bias is None else bias.double())
    assert got.dtype == torch.bfloat16
    assert ((got - want).abs() <= 2**-8 * want.abs() + 1e-4).all()
    assert [(f.function, f.served, f.fallbacks) for f in xgdn.report().functions] == [(vllm_plugin.HEAD, 1, {})]


OTHER_HEADS: dict[str, dict[str, Any]] = {
    "more tokens": {"x": hidden(17)},
    "float32": {"of": head(torch.float32), "x": hidden(3, torch.float32)},
    "a head of float32": {"of": head(torch.float32)},
    "logits of float32": {"head_dtype": torch.float32},
    "quantized": {"of": SimpleNamespace(weight=head().weight, quant_method=object())},
    "packed": {"of": SimpleNamespace(weight=torch.empty(0).bfloat16(), quant_method=UnquantizedEmbeddingMethod())},
    "a bias of float32": {"bias": torch.zeros(48)},
    "three dimensions": {"x": hidden(3)[None]},
    "a model without such layers": {"layer": None},
    "a layer that is vLLM's own": {"layer": {"num_spec": 2}},
    "the variable": {"variable": "layers"},
}


@pytest.mark.parametrize("name", OTHER_HEADS)
def test_any_other_product_of_a_head_is_vllm_s_own_and_not_counted(
    name: str, vllm: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    vllm_plugin.register()
    how = OTHER_HEADS[name]
    if "variable" in how:
        monkeypatch.setenv(vllm_projections.VARIABLE, how["variable"])
    if (options := how.get("layer", {})) is not None:
        served_layer(vllm, source(dtype=torch.bfloat16), **options)
    processor = vllm.head_class(head_dtype=how.get("head_dtype"))
    assert processor(how.get("of", head()), how.get("x", hidden(3)), how.get("bias")).eq(7).all()
    assert xgdn.report().functions == ()


def test_an_error_of_an_op_is_no_fallback(vllm: StandIn) -> None:
    engine = Engine(vllm, served_layer(vllm, source()), sequences(5))
    engine.slots[0] = NUM_SLOTS
    with pytest.raises(IndexError, match=r"\[causal_conv1d\] state_indices: expected a slot 0..8"):
        engine.step(4)


def test_registering_again_changes_nothing(vllm: StandIn, caplog: pytest.LogCaptureFixture) -> None:
    vllm_plugin.register()
    first = dict(vllm.registry)
    vllm_plugin.register()
    assert vllm.registry == first
    assert first.keys() == {LAYER, HEAD}
    assert issubclass(first[LAYER], vllm.layer_class)
    assert issubclass(first[HEAD], vllm.head_class)
    assert not caplog.records


def of_another_plugin(vllm: StandIn) -> None:
    vllm.registry[LAYER] = type("TheirLayer", (vllm.layer_class,), {"__module__": "theirs"})


def a_head_of_another_plugin(vllm: StandIn) -> None:
    vllm.registry[HEAD] = type("TheirHead", (vllm.head_class,), {"__module__": "theirs"})


def without(name: str) -> Any:
    return lambda vllm: delattr(vllm.layer_class, name)


REFUSALS: dict[str, Any] = {
    "vllm: expected version 0.32, got 0.33.0rc1": lambda vllm: setattr(vllm, "version", "0.33.0rc1"),
    "vllm: expected version 0.32, got 0.9.2": lambda vllm: setattr(vllm, "version", "0.9.2"),
    "vllm: expected version 0.32, got 1.32.0": lambda vllm: setattr(vllm, "version", "1.32.0"),
    "vllm: expected version 0.32, got dev": lambda vllm: setattr(vllm, "version", "dev"),
    "platform: expected vLLM on a CPU, got cuda": lambda vllm: setattr(vllm, "is_cpu", False),
    f"vllm 0.32.0: expected {LAYER}.fix_query_key_value_ordering, got none": without("fix_query_key_value_ordering"),
    f"vllm 0.32.0: expected {HEAD}._apply_head, got none": lambda vllm: delattr(vllm.head_class, "_apply_head"),
    f"{LAYER}: expected vLLM's own class, got theirs.TheirLayer of another plugin": of_another_plugin,
    f"{HEAD}: expected vLLM's own class, got theirs.TheirHead of another plugin": a_head_of_another_plugin,
}


@pytest.mark.parametrize("named", [False, True], ids=["unnamed", "named"])
@pytest.mark.parametrize("sentence", REFUSALS)
def test_refusals(
    sentence: str, named: bool, vllm: StandIn, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    REFUSALS[sentence](vllm)
    vllm.install(monkeypatch)
    before = dict(vllm.registry)
    if named:
        monkeypatch.setenv("VLLM_PLUGINS", "other,xgdn")
        with pytest.raises(xgdn.errors.UnsupportedError) as error:
            vllm_plugin.register()
        assert str(error.value).endswith(sentence)
        assert not caplog.records
    else:
        vllm_plugin.register()
        assert [r.getMessage() for r in caplog.records if r.name == "vllm.xgdn"] == [
            f"[xgdn.integrations.vllm_plugin] {sentence}; vLLM's own layers are used"
        ]
    assert vllm.registry == before


def test_a_range_of_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm_plugin, "OLDEST", (0, 31))
    assert vllm_plugin._why_not_version("0.31.2") is None
    assert vllm_plugin._why_not_version("0.32.0+cpu") is None
    assert vllm_plugin._why_not_version("0.30.9") == "vllm: expected version 0.31 to 0.32, got 0.30.9"


def attention_of(vllm: StandIn, **changes: Any) -> Any:
    """What the class that is registered makes for a layer of 4 query and 2 key heads of 32."""
    vllm_plugin.register()
    (path,) = vllm.backends.values()
    module, name = path.rsplit(".", 1)
    backend = getattr(importlib.import_module(module), name)
    assert issubclass(backend, sys.modules[ATTENTION].CPUAttentionBackend)
    return backend.get_impl_cls()(num_heads=4, head_size=32, **changes)


def attend(
    attention: Any, lengths: list[int], before: list[int], dtype: torch.dtype = torch.bfloat16, causal: bool = True
) -> list[Tensor]:
    """Queries, keys and values of a step with sequences of so many tokens, behind so many from before, and the output,
    all with three rows of padding; the output begins as NaN.
    """
    generator = torch.Generator().manual_seed(8)
    T = sum(lengths)
    mixed = torch.randn(T + 3, 8, 32, generator=generator).to(dtype)  # one tensor, as vLLM's are
    query, key, value = mixed.split([4, 2, 2], dim=1)
    starts = torch.tensor([0, *lengths]).cumsum(0, dtype=torch.int32)
    metadata = AttentionMetadata(T, starts, i32([a + b for a, b in zip(lengths, before, strict=True)]), causal)
    output = torch.full((T + 3, 4, 32), torch.nan, dtype=dtype)
    returned = attention.forward(None, query, key, value, torch.empty(0), metadata, output)
    assert returned is output
    return [query, key, value, output]


def test_attention_of_prompts(vllm: StandIn) -> None:
    served_layer(vllm, source(dtype=torch.bfloat16))
    attention = attention_of(vllm)
    lengths = [70, 1, 33]
    query, key, value, output = attend(attention, lengths, [0, 0, 0])
    assert output[sum(lengths) :].isnan().all()
    begin = 0
    for length in lengths:
        rows = slice(begin, begin + length)
        q, k, v = (x[rows].double().transpose(0, 1) for x in (query, key, value))
        want = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        torch.testing.assert_close(output[rows].double(), want.transpose(0, 1), rtol=1e-2, atol=4e-3)
        begin += length
    served = {f.function: (f.served, f.fallbacks) for f in xgdn.report().functions}
    assert served[vllm_attention.PROMPTS] == (1, {})


OTHER_ATTENTION: dict[str, dict[str, Any]] = {
    "a window": {"sliding_window": 8},
    "slopes": {"alibi_slopes": torch.ones(4)},
    "a cap": {"logits_soft_cap": 30.0},
    "sinks": {"sinks": torch.zeros(4)},
    "an encoder": {"attn_type": "encoder"},
    "another layer's keys": {"kv_sharing_target_layer_name": "layers.0"},
}


@pytest.mark.parametrize("name", OTHER_ATTENTION)
def test_other_attention_is_vllm_s(name: str, vllm: StandIn) -> None:
    served_layer(vllm, source(dtype=torch.bfloat16))
    *_, output = attend(attention_of(vllm, **OTHER_ATTENTION[name]), [5, 6], [0, 0])
    assert output.eq(7.0).all()


@pytest.mark.parametrize("case", ["continued", "decoded", "float32", "no such layer", "warm up", "not causal"])
def test_steps_whose_attention_is_vllm_s(case: str, vllm: StandIn) -> None:
    if case != "no such layer":
        served_layer(vllm, source(dtype=torch.bfloat16))
    attention = attention_of(vllm)
    if case == "warm up":
        output = torch.zeros(3, 4, 32, dtype=torch.bfloat16)
        attention.forward(None, output, output, output, torch.empty(0), None, output)
    else:
        before = {"continued": [0, 64], "decoded": [9, 0]}.get(case, [0, 0])
        lengths = [1, 6] if case == "decoded" else [5, 6]
        dtype = torch.float32 if case == "float32" else torch.bfloat16
        *_, output = attend(attention, lengths, before, dtype, causal=case != "not causal")
    assert output.eq(7.0).all()
    assert vllm_attention.PROMPTS not in {f.function for f in xgdn.report().functions}


def test_attention_is_left_to_vllm_where_that_is_wanted(vllm: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(vllm_attention.VARIABLE, "vllm")
    vllm_plugin.register()
    assert vllm.backends == {}
    monkeypatch.delenv(vllm_attention.VARIABLE)
    theirs = sys.modules[BACKENDS].AttentionBackendEnum.CPU_ATTN
    vllm.backends[theirs] = "theirs"
    vllm_plugin.register()
    assert vllm.backends == {theirs: "theirs"}


@pytest.mark.parametrize("missing", ["layer", "head", "registry", "module", "backends"])
def test_names_that_are_gone(missing: str, vllm: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_PLUGINS", "xgdn")
    if missing == "layer":
        monkeypatch.delattr(sys.modules[LAYERS], LAYER)
    elif missing == "head":
        monkeypatch.delattr(sys.modules[HEADS], HEAD)
    elif missing == "backends":
        monkeypatch.delattr(sys.modules[BACKENDS], "register_backend")
    elif missing == "registry":
        monkeypatch.delattr(sys.modules["vllm.model_executor.custom_op"], "op_registry_oot")
    else:
        monkeypatch.setitem(sys.modules, LAYERS, None)
    words = {
        "layer": f"expected {LAYERS}.{LAYER}, got none",
        "head": f"expected {HEADS}.{HEAD}, got none",
        "registry": "expected vllm.model_executor.custom_op.op_registry_oot",
        "module": f"expected {LAYERS} and {HEADS} and {BACKENDS}, got import of {LAYERS} halted",
        "backends": f"expected {BACKENDS}.register_backend and AttentionBackendEnum.CPU_ATTN, got none",
    }[missing]
    with pytest.raises(xgdn.errors.UnsupportedError, match=words):
        vllm_plugin.register()
    assert vllm.registry == {}


def test_the_report_of_a_process_is_vllm_s_to_print(vllm: StandIn, caplog: pytest.LogCaptureFixture) -> None:
    engine = Engine(vllm, served_layer(vllm, source()), sequences(5))
    engine.step(4)
    calls.count("another", "function", "a reason", torch.device("cpu"))
    with caplog.at_level(logging.INFO, logger=vllm_plugin.LOGGER):
        calls._log_report(vllm_layer.HOST, logging.getLogger(vllm_plugin.LOGGER))
    assert [(r.levelno, r.getMessage().splitlines()) for r in caplog.records] == [
        (logging.INFO, ["xgdn served 1 of 1 calls of its hosts", "  vllm GatedDeltaNet, prefill: 1 served, 0 not"])
    ]
    assert "another function" in vllm_plugin.WorkerExtension().xgdn_report()


def test_the_entry_point_is_the_plugin() -> None:
    found = importlib.metadata.entry_points(group="vllm.general_plugins", name="xgdn")
    assert [entry.load() for entry in found] == [vllm_plugin.register]
