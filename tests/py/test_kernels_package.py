# SPDX-License-Identifier: Apache-2.0
"""The repository of layers for the package `kernels`, loaded as that package does; tests/kernels_package runs it in
the package itself."""

from __future__ import annotations

import enum
import importlib.util
import inspect
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import MethodType, ModuleType
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from transformers.models.qwen3_5 import modeling_qwen3_5 as modeling

import xgdn
from cases import assert_bits_equal
from checkpoints import CHECKPOINTS, SMALL, one_thread, randomize
from xgdn.integrations import transformers_layer
from xgdn.integrations.kernels_package import LAYER_REPOSITORY

BUILD = LAYER_REPOSITORY / "build/torch-universal"
HOSTS: dict[str, Callable[..., Any]] = {  # what each layer stands for, as the host declares it
    "ChunkGatedDeltaRule": modeling.torch_chunk_gated_delta_rule,
    "FusedRecurrentGatedDeltaRule": modeling.torch_recurrent_gated_delta_rule,
    "CausalConv1d": modeling.causal_conv1d_fn,
    "CausalConv1dUpdate": modeling.causal_conv1d_update,
    "RMSNormGated": modeling.Qwen3_5RMSNormGated.forward,
    "GatedDeltaNet": modeling.Qwen3_5GatedDeltaNet.forward,
}


class Mode(enum.Flag):
    INFERENCE = enum.auto()
    TRAINING = enum.auto()
    TORCH_COMPILE = enum.auto()


class LocalLayerRepository(NamedTuple):
    repo_path: Path
    layer_name: str


def package(repository: Any = LocalLayerRepository) -> ModuleType:
    """What `kernel_mapping` uses of the package."""
    module = ModuleType("kernels")
    module.__dict__.update(Mode=Mode, LocalLayerRepository=repository, __version__="0.17.2")
    return module


@pytest.fixture(scope="module")
def layers() -> Iterator[ModuleType]:
    name = json.loads((BUILD / "metadata.json").read_text())["id"]
    spec = importlib.util.spec_from_file_location(name, BUILD / "__init__.py")
    assert spec is not None
    assert spec.loader is not None
    repository = importlib.util.module_from_spec(spec)
    sys.modules[name] = repository
    spec.loader.exec_module(repository)
    yield repository.layers
    for loaded in [name, f"{name}.layers"]:
        del sys.modules[loaded]


@pytest.fixture(autouse=True)
def counted() -> Iterator[None]:
    xgdn.report(reset=True)
    with one_thread():
        yield
    xgdn.report(reset=True)


class HostFunction(nn.Module):
    """A function of the host as the package makes it replaceable."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(*args, **kwargs)


def replace(module: nn.Module, layer: type[nn.Module]) -> nn.Module:
    module.forward = MethodType(layer.forward, module)  # type: ignore[method-assign]
    return module


def counts() -> dict[str, tuple[int, dict[str, int]]]:
    return {f.function: (f.served, f.fallbacks) for f in xgdn.report(reset=True).functions}


def rule_inputs(requires_grad: bool = False) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(2, 9, 4, 16, generator=generator) for _ in range(3))
    g = -torch.rand(2, 9, 4, generator=generator)
    beta = torch.rand(2, 9, 4, generator=generator)
    state = torch.randn(2, 4, 16, 16, generator=generator)
    q.requires_grad_(requires_grad)
    options = {"initial_state": state, "output_final_state": True, "use_qk_l2norm_in_kernel": True}
    return {"query": q, "key": k, "value": v, "g": g, "beta": beta, **options}


def test_the_mapping_names_what_the_host_names(monkeypatch: pytest.MonkeyPatch, layers: ModuleType) -> None:
    monkeypatch.setitem(sys.modules, "kernels", package())
    functions, whole = xgdn.kernel_mapping(), xgdn.kernel_mapping(layers=True)
    assert set(functions) == {
        "chunk_gated_delta_rule",
        "fused_recurrent_gated_delta_rule",
        "causal_conv1d_fn",
        "causal_conv1d_update",
        "RMSNormGated",
    }
    assert set(whole) - set(functions) == {"Qwen3_5GatedDeltaNet"}
    assert sorted(it["cpu"][Mode.INFERENCE | Mode.TORCH_COMPILE].layer_name for it in whole.values()) == sorted(HOSTS)
    for devices in whole.values():
        assert set(devices) == {"cpu"} | ({"cuda"} & set(xgdn.available_backends()))
        for modes in devices.values():
            (repository,) = modes.values()
            assert repository.repo_path == LAYER_REPOSITORY


def test_the_mapping_refuses_a_package_with_other_repositories(monkeypatch: pytest.MonkeyPatch) -> None:
    def older(repo_path: Path, package_name: str, layer_name: str) -> None: ...

    monkeypatch.setitem(sys.modules, "kernels", package(older))
    with pytest.raises(xgdn.errors.UnsupportedError, match=r"kernels: .*0\.17 or newer.*got 0\.17\.2.*package_name"):
        xgdn.kernel_mapping()


def test_the_mapping_needs_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "kernels", None)
    with pytest.raises(ImportError, match="kernels"):
        xgdn.kernel_mapping()


@pytest.mark.parametrize("name", HOSTS)
def test_a_layer_is_what_the_package_accepts(layers: ModuleType, name: str) -> None:
    layer = getattr(layers, name)
    assert issubclass(layer, nn.Module)
    assert layer.__init__ is nn.Module.__init__
    own = {member for member, _ in inspect.getmembers(layer)} - {member for member, _ in inspect.getmembers(nn.Module)}
    assert own == {"can_torch_compile", "has_backward"}
    assert (layer.can_torch_compile, layer.has_backward) == (True, False)
    ours = list(inspect.signature(layer.forward).parameters.values())
    host = list(inspect.signature(HOSTS[name]).parameters.values())
    if host[0].name != "self":  # the package gives a function one
        ours = ours[1:]
    assert [p.kind for p in ours] == [p.kind for p in host]
    of_cache = {"cache", "cache_params"}  # the name differs between versions of the host
    for got, want in zip(ours, host, strict=True):
        assert got.name == want.name or {got.name, want.name} == of_cache
        assert got.default == want.default


@pytest.mark.parametrize("name", ["ChunkGatedDeltaRule", "FusedRecurrentGatedDeltaRule"])
def test_a_rule_is_the_host_s_or_its_own_for_gradients(layers: ModuleType, name: str) -> None:
    function = HostFunction(HOSTS[name])
    inputs = rule_inputs()
    want, want_state = function(**inputs)
    replace(function, getattr(layers, name))
    got, got_state = function(**inputs)
    torch.testing.assert_close(got, want, rtol=2e-5, atol=2e-5)
    torch.testing.assert_close(got_state, want_state, rtol=2e-5, atol=2e-5)
    function(**rule_inputs(requires_grad=True))[0].sum().backward()
    ((_, counted),) = counts().items()
    assert counted == (1, {"a gradient is required": 1})


def test_convolutions_are_the_host_s(layers: ModuleType) -> None:
    generator = torch.Generator().manual_seed(2)
    x, weight = torch.randn(2, 24, 7, generator=generator), torch.randn(24, 4, generator=generator)
    bias, states = torch.randn(24, generator=generator), torch.randn(2, 24, 4, generator=generator)
    for name, arguments in {
        "CausalConv1d": lambda: (x, weight, bias, "silu"),
        "CausalConv1dUpdate": lambda: (x[:, :, :1], states.clone(), weight, bias, "silu"),
    }.items():
        function, of_host, of_layer = HostFunction(HOSTS[name]), arguments(), arguments()
        want = function(*of_host)
        got = replace(function, getattr(layers, name))(*of_layer)
        torch.testing.assert_close(got, want, rtol=2e-5, atol=2e-5)
        for ours, host in zip(of_layer[:2], of_host[:2], strict=True):
            assert_bits_equal(name, ours, host)  # the state has moved on, the rest is as it was
    assert counts() == {"causal_conv1d_fn": (1, {}), "causal_conv1d_update": (1, {})}


@pytest.mark.parametrize("whole", [False, True], ids=["norms", "layers"])
def test_a_model_gives_its_tokens(layers: ModuleType, whole: bool) -> None:
    torch.manual_seed(5)
    tiny = CHECKPOINTS[0]
    model: Any = tiny.build(**tiny.changes)
    randomize(model)
    model = model.float().eval()
    ids = torch.randint(1, SMALL["vocab_size"], (2, 19), generator=torch.Generator().manual_seed(3))
    options: dict[str, Any] = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "pad_token_id": 0}

    def generate() -> Tensor:
        tokens: Tensor = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options)
        return tokens

    want = generate()
    kind = modeling.Qwen3_5GatedDeltaNet if whole else modeling.Qwen3_5RMSNormGated
    replaced = [m for m in model.modules() if isinstance(m, kind)]
    for module in replaced:
        replace(module, layers.GatedDeltaNet if whole else layers.RMSNormGated)
    assert torch.equal(generate(), want)
    steps = len(replaced) * 7
    if whole:
        assert counts() == {"GatedDeltaNet": (len(replaced), {}), "GatedDeltaNet, one token": (steps, {})}
    else:
        assert counts() == {"RMSNormGated": (len(replaced) + steps, {})}


def test_a_layer_hands_its_cache_on_by_either_name(layers: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[Any] = []

    def forward(original: Any, module: nn.Module, x: Tensor, cache: Any = None, mask: Any = None, **kwargs: Any) -> Any:
        given.append((kwargs.get("cache_params", cache), mask))

    monkeypatch.setattr(transformers_layer, "forward", forward)
    layer, x, cache, mask = layers.GatedDeltaNet(), torch.ones(1, 1, 4), object(), torch.ones(1, 1)
    layer(hidden_states=x, cache=cache, attention_mask=mask)
    layer(hidden_states=x, cache_params=cache, attention_mask=mask)
    assert given == [(cache, mask)] * 2
