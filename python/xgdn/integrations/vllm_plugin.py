# SPDX-License-Identifier: Apache-2.0
"""The plugin of vLLM: `register` is the entry point `xgdn` of `vllm.general_plugins`, which vLLM calls in each process.

It registers classes in the place of vLLM's: the GDN layer, which differs in what it runs on a CPU, the layer that
multiplies with a model's head, which differs for the few tokens of a decode step of models with such layers, and the
attention on a CPU, which differs for prompts of such models.
"""

import importlib
import logging
import os
import re
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from xgdn import errors
from xgdn.integrations import calls, vllm_attention, vllm_layer, vllm_projections

__all__ = ["WorkerExtension", "register"]

NAME = "xgdn"
LOGGER = "vllm.xgdn"  # a child of vLLM's own, which prints it
HEAD = "lm_head"
OLDEST, NEWEST = (0, 32), (0, 32)

_BACKENDS = "vllm.v1.attention.backends.registry"
_ATTENTION = "xgdn.integrations.vllm_attention_backend.XgdnAttentionBackend"

_log = logging.getLogger(LOGGER)


def register() -> None:
    """Have vLLM's GDN layers on a CPU, and the heads of their models in decode steps, computed here.

    A second call changes nothing.

    Where that cannot be, vLLM keeps its own layers and a warning says why.

    Raises:
        xgdn.errors.UnsupportedError: It cannot be, and `VLLM_PLUGINS` names this plugin.
    """
    if (reason := _install()) is None:
        return
    message = f"[xgdn.integrations.vllm_plugin] {reason}"
    if NAME in os.environ.get("VLLM_PLUGINS", "").split(","):
        raise errors.UnsupportedError(message)
    _log.warning("%s; vLLM's own layers are used", message)


class WorkerExtension:
    """An engine's `worker_extension_cls`, for reports by `LLM.collective_rpc("xgdn_report")`."""

    def xgdn_report(self) -> str:
        return str(calls.report())


def _install() -> str | None:
    """Register the class; return why not."""
    vllm = importlib.import_module("vllm")
    if reason := _why_not_version(str(vllm.__version__)):
        return reason
    platform = importlib.import_module("vllm.platforms").current_platform
    if not platform.is_cpu():
        return f"platform: expected vLLM on a CPU, got {platform.device_type}"
    try:
        custom_op = importlib.import_module("vllm.model_executor.custom_op")
        modules = [importlib.import_module(replaced.module) for replaced in _REPLACED]
        backends = importlib.import_module(_BACKENDS)
    except ImportError as e:
        return f"vllm {vllm.__version__}: expected {' and '.join(r.module for r in _REPLACED)} and {_BACKENDS}, got {e}"
    if missing := _missing(custom_op, modules, backends):
        return f"vllm {vllm.__version__}: expected {missing}, got none"
    registry = custom_op.op_registry_oot
    for replaced in _REPLACED:
        registered = registry.get(replaced.name)
        if registered is not None and not issubclass(registered, replaced.ours):
            theirs = f"{registered.__module__}.{registered.__name__}"
            return f"{replaced.name}: expected vLLM's own class, got {theirs} of another plugin"
    for replaced, module in zip(_REPLACED, modules, strict=True):
        if replaced.name not in registry:
            bases = (replaced.ours, getattr(module, replaced.name))
            custom_op.PluggableLayer.register_oot(type(f"Xgdn{replaced.name}", bases, {}), name=replaced.name)
    attention = backends.AttentionBackendEnum.CPU_ATTN
    if vllm_attention.is_wanted() and not attention.is_overridden():  # by another plugin, which knows more about it
        backends.register_backend(attention, _ATTENTION)
    return None


def _why_not_version(version: str) -> str | None:
    found = re.match(r"(\d+)\.(\d+)", version)
    if found is not None and OLDEST <= (int(found[1]), int(found[2])) <= NEWEST:
        return None
    oldest, newest = (".".join(map(str, v)) for v in (OLDEST, NEWEST))
    supported = oldest if oldest == newest else f"{oldest} to {newest}"
    return f"vllm: expected version {supported}, got {version}"


def _missing(custom_op: ModuleType, modules: list[ModuleType], backends: ModuleType) -> str | None:
    if not hasattr(custom_op, "op_registry_oot") or not hasattr(custom_op, "PluggableLayer"):
        return "vllm.model_executor.custom_op.op_registry_oot and PluggableLayer"
    for replaced, module in zip(_REPLACED, modules, strict=True):
        host = getattr(module, replaced.name, None)
        if host is None:
            return f"{replaced.module}.{replaced.name}"
        for name in replaced.methods:
            if not hasattr(host, name):
                return f"{replaced.name}.{name}"
    known = getattr(backends, "AttentionBackendEnum", None)
    if not hasattr(backends, "register_backend") or not hasattr(known, "CPU_ATTN"):
        return f"{_BACKENDS}.register_backend and AttentionBackendEnum.CPU_ATTN"
    return None


class _Layer:
    """Comes before vLLM's class among the bases."""

    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        from vllm.model_executor.layers.mamba.mamba_utils import is_conv_state_dim_first

        self.xgdn_why_not = vllm_layer.why_not(self, is_conv_state_dim_first=is_conv_state_dim_first())
        self.xgdn_projections = None if self.xgdn_why_not else vllm_projections.Projections.of(self)
        calls.log_at_exit(vllm_layer.HOST, LOGGER)

    def forward_cpu(self: Any, hidden_states: Tensor) -> Tensor:
        if self.xgdn_why_not is not None:
            calls.count(vllm_layer.HOST, "GatedDeltaNet", self.xgdn_why_not, hidden_states.device)
            return super().forward_cpu(hidden_states)  # type: ignore[misc,no-any-return]
        return torch.ops.xgdn_hosts.vllm_gated_delta_net(hidden_states, self.prefix)  # type: ignore[no-any-return]


class _Head:
    """Comes before vLLM's class among the bases."""

    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        from vllm.config import get_current_vllm_config

        layers = get_current_vllm_config().compilation_config.static_forward_context
        self.xgdn_serves = vllm_projections.serves_heads(layers.values())

    def _apply_head(self: Any, lm_head: Any, hidden_states: Tensor, embedding_bias: Tensor | None) -> Tensor:
        takes = vllm_projections.can_multiply_head
        if not self.xgdn_serves or not takes(lm_head, hidden_states, self.head_dtype, embedding_bias):
            return super()._apply_head(lm_head, hidden_states, embedding_bias)  # type: ignore[misc,no-any-return]
        calls.count(vllm_layer.HOST, HEAD, None, hidden_states.device)
        return vllm_projections.multiply_head(lm_head, hidden_states, embedding_bias)


class _Replaced(NamedTuple):
    """A class of vLLM's, the methods that are called or replaced, and what comes before it."""

    module: str
    name: str
    methods: tuple[str, ...]
    ours: type


_REPLACED = (
    _Replaced(
        "vllm.model_executor.layers.mamba.gdn.qwen_gdn_linear_attn",
        "QwenGatedDeltaNetAttention",
        ("forward_cpu", "fix_query_key_value_ordering", "get_state_dtype"),
        _Layer,
    ),
    _Replaced("vllm.model_executor.layers.logits_processor", "LogitsProcessor", ("_apply_head",), _Head),
)


def _gated_delta_net(hidden_states: Tensor, layer: str) -> Tensor:
    from vllm.forward_context import get_forward_context

    context = get_forward_context()
    if context.attn_metadata is None:  # a run that only warms up
        return torch.zeros_like(hidden_states)
    module = context.no_compile_layers[layer]
    return vllm_layer.forward(module, hidden_states, context.attn_metadata[module.prefix])


# By a library and not as a custom_op, which would take longer for each call.
_library = torch.library.Library("xgdn_hosts", "FRAGMENT")  # type: ignore[no-untyped-call]
_library.define(  # type: ignore[no-untyped-call]
    "vllm_gated_delta_net(Tensor hidden_states, str layer) -> Tensor"
)
_library.impl("vllm_gated_delta_net", _gated_delta_net, "CPU")  # type: ignore[no-untyped-call]


@torch.library.register_fake("xgdn_hosts::vllm_gated_delta_net")  # type: ignore[untyped-decorator]
def _(hidden_states: Tensor, layer: str) -> Tensor:
    return torch.empty_like(hidden_states)
