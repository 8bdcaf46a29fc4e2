# SPDX-License-Identifier: Apache-2.0
"""The plugin of vLLM, in front of a stand-in for it: what a layer computes, what is counted, what is refused."""

from __future__ import annotations

import importlib.metadata
import logging
import sys
from collections.abc import Iterator
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
from vllm_stand_in import LAYER, LAYERS, Metadata, Pools, StandIn
from xgdn.integrations import calls, vllm_layer, vllm_plugin

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
            out = self.layer(torch.cat([*x, torch.full((padding, x[0].shape[1]), float("nan"))]))
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


def test_an_error_of_an_op_is_no_fallback(vllm: StandIn) -> None:
    engine = Engine(vllm, served_layer(vllm, source()), sequences(5))
    engine.slots[0] = NUM_SLOTS
    with pytest.raises(IndexError, match=r"\[causal_conv1d\] state_indices: expected a slot 0..8"):
        engine.step(4)


def test_registering_again_changes_nothing(vllm: StandIn, caplog: pytest.LogCaptureFixture) -> None:
    vllm_plugin.register()
    first = vllm.registry[LAYER]
    vllm_plugin.register()
    assert vllm.registry == {LAYER: first}
    assert issubclass(first, vllm.layer_class)
    assert not caplog.records


def of_another_plugin(vllm: StandIn) -> None:
    vllm.registry[LAYER] = type("TheirLayer", (vllm.layer_class,), {"__module__": "theirs"})


def without(name: str) -> Any:
    return lambda vllm: delattr(vllm.layer_class, name)


REFUSALS: dict[str, Any] = {
    "vllm: expected version 0.32, got 0.33.0rc1": lambda vllm: setattr(vllm, "version", "0.33.0rc1"),
    "vllm: expected version 0.32, got 0.9.2": lambda vllm: setattr(vllm, "version", "0.9.2"),
    "vllm: expected version 0.32, got 1.32.0": lambda vllm: setattr(vllm, "version", "1.32.0"),
    "vllm: expected version 0.32, got dev": lambda vllm: setattr(vllm, "version", "dev"),
    "platform: expected vLLM on a CPU, got cuda": lambda vllm: setattr(vllm, "is_cpu", False),
    f"vllm 0.32.0: expected {LAYER}.fix_query_key_value_ordering, got none": without("fix_query_key_value_ordering"),
    f"{LAYER}: expected vLLM's own class, got theirs.TheirLayer of another plugin": of_another_plugin,
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


@pytest.mark.parametrize("missing", ["layer", "registry", "module"])
def test_names_that_are_gone(missing: str, vllm: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_PLUGINS", "xgdn")
    if missing == "layer":
        monkeypatch.delattr(sys.modules[LAYERS], LAYER)
    elif missing == "registry":
        monkeypatch.delattr(sys.modules["vllm.model_executor.custom_op"], "op_registry_oot")
    else:
        monkeypatch.setitem(sys.modules, LAYERS, None)
    words = {
        "layer": f"expected {LAYERS}.{LAYER}, got none",
        "registry": "expected vllm.model_executor.custom_op.op_registry_oot",
        "module": f"expected {LAYERS}, got import of {LAYERS} halted",
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
