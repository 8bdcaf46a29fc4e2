# SPDX-License-Identifier: Apache-2.0
"""The plugin of vLLM: `register` is the entry point `xgdn` of `vllm.general_plugins`, which vLLM calls in each process.

It registers a class in the place of vLLM's GDN layer, which differs in what runs between the projections on a CPU.
"""

import importlib
import logging
import os
import re
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from xgdn import errors
from xgdn.integrations import calls, vllm_layer

__all__ = ["WorkerExtension", "register"]

NAME = "xgdn"
LOGGER = "vllm.xgdn"  # a child of vLLM's own, which prints it
OLDEST, NEWEST = (0, 32), (0, 32)

_LAYERS = "vllm.model_executor.layers.mamba.gdn.qwen_gdn_linear_attn"
_LAYER = "QwenGatedDeltaNetAttention"
# What the class here calls of vLLM's.
_METHODS = ("forward_cpu", "fix_query_key_value_ordering", "get_state_dtype")

_log = logging.getLogger(LOGGER)


def register() -> None:
    """Have vLLM's GDN layers on a CPU computed here. A second call changes nothing.

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
        layers = importlib.import_module(_LAYERS)
    except ImportError as e:
        return f"vllm {vllm.__version__}: expected {_LAYERS}, got {e}"
    if missing := _missing(custom_op, layers):
        return f"vllm {vllm.__version__}: expected {missing}, got none"
    registered = custom_op.op_registry_oot.get(_LAYER)
    if registered is None:
        host = getattr(layers, _LAYER)
        custom_op.PluggableLayer.register_oot(type(f"Xgdn{_LAYER}", (_Layer, host), {}), name=_LAYER)
        return None
    if issubclass(registered, _Layer):
        return None
    return f"{_LAYER}: expected vLLM's own class, got {registered.__module__}.{registered.__name__} of another plugin"


def _why_not_version(version: str) -> str | None:
    found = re.match(r"(\d+)\.(\d+)", version)
    if found is not None and OLDEST <= (int(found[1]), int(found[2])) <= NEWEST:
        return None
    oldest, newest = (".".join(map(str, v)) for v in (OLDEST, NEWEST))
    supported = oldest if oldest == newest else f"{oldest} to {newest}"
    return f"vllm: expected version {supported}, got {version}"


def _missing(custom_op: ModuleType, layers: ModuleType) -> str | None:
    if not hasattr(custom_op, "op_registry_oot") or not hasattr(custom_op, "PluggableLayer"):
        return "vllm.model_executor.custom_op.op_registry_oot and PluggableLayer"
    host = getattr(layers, _LAYER, None)
    if host is None:
        return f"{_LAYERS}.{_LAYER}"
    return next((f"{_LAYER}.{name}" for name in _METHODS if not hasattr(host, name)), None)


class _Layer:
    """Comes before vLLM's class among the bases."""

    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        from vllm.model_executor.layers.mamba.mamba_utils import is_conv_state_dim_first

        self.xgdn_why_not = vllm_layer.why_not(self, is_conv_state_dim_first=is_conv_state_dim_first())
        calls.log_at_exit(vllm_layer.HOST, LOGGER)

    def forward_cpu(self: Any, hidden_states: Tensor) -> Tensor:
        if self.xgdn_why_not is not None:
            calls.count(vllm_layer.HOST, "GatedDeltaNet", self.xgdn_why_not, hidden_states.device)
            return super().forward_cpu(hidden_states)  # type: ignore[misc,no-any-return]
        qkvz, ba = vllm_layer.in_row_order(self, self.in_proj_qkvz(hidden_states)[0], self.in_proj_ba(hidden_states)[0])
        value_dim = ba.shape[1] // 2 * self.head_v_dim
        o = torch.ops.xgdn_hosts.vllm_gated_delta_net(qkvz, ba, value_dim, self.prefix)
        return self.out_proj(o)[0]  # type: ignore[no-any-return]


def _gated_delta_net(qkvz: Tensor, ba: Tensor, value_dim: int, layer: str) -> Tensor:
    from vllm.forward_context import get_forward_context

    context = get_forward_context()
    if context.attn_metadata is None:  # a run that only warms up
        return qkvz.new_zeros(qkvz.shape[0], value_dim)
    module = context.no_compile_layers[layer]
    return vllm_layer.attend(module, qkvz, ba, context.attn_metadata[module.prefix]).flatten(1)


# By a library and not as a custom_op, which would take longer for each call.
_library = torch.library.Library("xgdn_hosts", "FRAGMENT")  # type: ignore[no-untyped-call]
_library.define(  # type: ignore[no-untyped-call]
    "vllm_gated_delta_net(Tensor qkvz, Tensor ba, int value_dim, str layer) -> Tensor"
)
_library.impl("vllm_gated_delta_net", _gated_delta_net, "CPU")  # type: ignore[no-untyped-call]


@torch.library.register_fake("xgdn_hosts::vllm_gated_delta_net")  # type: ignore[untyped-decorator]
def _(qkvz: Tensor, ba: Tensor, value_dim: int, layer: str) -> Tensor:
    return qkvz.new_empty(qkvz.shape[0], value_dim)
