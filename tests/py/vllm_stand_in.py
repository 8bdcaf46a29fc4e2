# SPDX-License-Identifier: Apache-2.0
"""As much of vLLM as the plugin meets: its registries, its GDN layer, what multiplies with a head, attention, pools and
a step's metadata, a few lines each.

The real one has tests of its own (tests/vllm). Its names and signatures are those of 0.32.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

VERSION = "0.32.0"
LAYERS = "vllm.model_executor.layers.mamba.gdn.qwen_gdn_linear_attn"
LAYER = "QwenGatedDeltaNetAttention"
HEADS = "vllm.model_executor.layers.logits_processor"
HEAD = "LogitsProcessor"
BACKENDS = "vllm.v1.attention.backends.registry"
ATTENTION = "vllm.v1.attention.backends.cpu_attn"


@dataclass
class Metadata:
    num_prefills: int
    num_prefill_tokens: int
    num_decodes: int
    num_decode_tokens: int
    has_initial_state: Tensor | None
    non_spec_query_start_loc: Tensor
    non_spec_state_indices_tensor: Tensor


class UnquantizedLinearMethod:
    """Keeps a weight that has been loaded in an order of its own alone."""

    def process_weights_after_loading(self, layer: Any) -> None:
        layer.packed = layer.weight.data.T.contiguous()
        layer.weight = nn.Parameter(torch.empty(0), requires_grad=False)


class Linear(nn.Module):
    """Returns its bias beside the result, as vLLM's do."""

    def __init__(self, *weights: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.cat(weights), requires_grad=False)
        self.packed: Tensor | None = None
        self.bias: Tensor | None = None
        self.tp_size = 1
        self.quant_method: Any = UnquantizedLinearMethod()
        self.num_calls = 0

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        self.num_calls += 1
        return x @ (self.weight.T if self.packed is None else self.packed), None


@dataclass
class AttentionMetadata:
    num_actual_tokens: int
    query_start_loc: Tensor
    seq_lens: Tensor
    causal: bool = True
    dynamic_causal: Tensor | None = None


class CPUAttentionBackendImpl:
    def __init__(self, num_heads: int, head_size: int, **changes: Any) -> None:
        self.num_heads, self.head_size, self.scale = num_heads, head_size, head_size**-0.5
        self.attn_type, self.sliding_window, self.logits_soft_cap = "decoder", -1, 0.0
        self.kv_sharing_target_layer_name = self.alibi_slopes = self.sinks = None
        vars(self).update(changes)

    def forward(
        self,
        layer: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: AttentionMetadata | None,
        output: Tensor,
        output_scale: Tensor | None = None,
        output_block_scale: Tensor | None = None,
    ) -> Tensor:
        return output.fill_(7.0)  # the host's own result


class CPUAttentionBackend:
    @staticmethod
    def get_impl_cls() -> type[CPUAttentionBackendImpl]:
        return CPUAttentionBackendImpl


class UnquantizedEmbeddingMethod:
    """Of weights as they were loaded."""


class Backend:
    """A member of the enumeration of backends of attention."""

    def __init__(self, overrides: dict[Any, str]) -> None:
        self._overrides = overrides

    def is_overridden(self) -> bool:
        return self in self._overrides


class StandIn:
    """A vLLM with a state of its own: what is registered, and the context of the forward that runs."""

    def __init__(self) -> None:
        self.version = VERSION
        self.is_cpu = True
        self.is_conv_state_dim_first = False
        self.registry: dict[str, type] = {}
        self.backends: dict[Any, str] = {}  # that others have been put in the place of
        layers: dict[str, Any] = {}
        self.context = SimpleNamespace(no_compile_layers=layers, static_forward_context=layers, attn_metadata=None)
        self.layer_class = self._layer_class()
        self.head_class = self._head_class()

    def install(self, monkeypatch: Any) -> None:
        custom_op = "vllm.model_executor.custom_op"
        modules: dict[str, dict[str, Any]] = {
            "vllm": {"__version__": self.version},
            "vllm.platforms": {"current_platform": SimpleNamespace(is_cpu=lambda: self.is_cpu, device_type="cuda")},
            "vllm.config": {"get_current_vllm_config": lambda: SimpleNamespace(compilation_config=self.context)},
            "vllm.forward_context": {"get_forward_context": lambda: self.context},
            custom_op: {"op_registry_oot": self.registry, "PluggableLayer": self.layer_class.__bases__[0]},
            LAYERS: {LAYER: self.layer_class},
            HEADS: {HEAD: self.head_class},
            BACKENDS: {
                "AttentionBackendEnum": SimpleNamespace(CPU_ATTN=Backend(self.backends)),
                "register_backend": self.backends.__setitem__,
            },
            ATTENTION: {
                "CPUAttentionBackend": CPUAttentionBackend,
                "CPUAttentionBackendImpl": CPUAttentionBackendImpl,
            },
            "vllm.model_executor.layers.mamba.mamba_utils": {
                "is_conv_state_dim_first": lambda: self.is_conv_state_dim_first
            },
        }
        for name in list(modules):
            while name := name.rpartition(".")[0]:
                modules.setdefault(name, {}).setdefault("__path__", [])
        for name, names in modules.items():
            module = ModuleType(name)
            vars(module).update(names)
            monkeypatch.setitem(sys.modules, name, module)

    @staticmethod
    def load(layer: Any) -> None:
        """What follows the loading of weights."""
        for projection in (layer.in_proj_qkvz, layer.in_proj_ba, layer.out_proj):
            projection.quant_method.process_weights_after_loading(projection)

    def _layer_class(self) -> type:
        registry, context = self.registry, self.context

        class PluggableLayer(nn.Module):
            def __new__(cls, *args: Any, **kwargs: Any) -> Any:
                return super().__new__(registry.get(cls.__name__, cls))

            @classmethod
            def register_oot(cls, layer: type, name: str) -> None:
                assert name not in registry
                registry[name] = layer

        class QwenGatedDeltaNetAttention(PluggableLayer):
            def __init__(self, source: Any, prefix: str = "layers.0.linear_attn", num_spec: int = 0) -> None:
                """Of a layer of transformers, whose weights it shares."""
                super().__init__()
                self.prefix, self.num_spec, self.activation = prefix, num_spec, source.activation
                self.gqa_interleaved_layout = hasattr(source, "in_proj_qkvz")
                self.num_k_heads, self.num_v_heads = source.num_k_heads, source.num_v_heads
                self.head_k_dim, self.head_v_dim = source.head_k_dim, source.head_v_dim
                self.conv_kernel_size = source.conv_kernel_size
                self.model_config = SimpleNamespace(dtype=source.out_proj.weight.dtype)
                self.state_dtypes = (self.model_config.dtype, torch.float32)
                if self.gqa_interleaved_layout:
                    self.in_proj_qkvz = Linear(source.in_proj_qkvz.weight)
                    self.in_proj_ba = Linear(source.in_proj_ba.weight)
                else:
                    self.in_proj_qkvz = Linear(source.in_proj_qkv.weight, source.in_proj_z.weight)
                    self.in_proj_ba = Linear(source.in_proj_b.weight, source.in_proj_a.weight)
                self.out_proj = Linear(source.out_proj.weight)
                self.conv1d = SimpleNamespace(weight=source.conv1d.weight.detach(), bias=None)
                self.A_log, self.dt_bias = source.A_log.detach().float(), source.dt_bias.detach()
                norm = source.norm
                self.norm = SimpleNamespace(weight=norm.weight.detach(), eps=norm.variance_epsilon, activation="silu")
                self._forward_method = self.forward_cpu
                context.no_compile_layers[prefix] = self

            def get_state_dtype(self) -> tuple[torch.dtype, torch.dtype]:
                return self.state_dtypes

            def forward(self, hidden_states: Tensor) -> Tensor:
                return self._forward_method(hidden_states)

            def forward_cpu(self, hidden_states: Tensor) -> Tensor:
                return torch.full_like(hidden_states, 7.0)  # the host's own result

            def fix_query_key_value_ordering(self, mixed_qkvz: Tensor, mixed_ba: Tensor) -> tuple[Tensor, ...]:
                H, K, V = self.num_k_heads, self.head_k_dim, self.head_v_dim
                group = self.num_v_heads // H
                q, k, v, z = mixed_qkvz.unflatten(1, (H, -1)).split([K, K, group * V, group * V], dim=2)
                b, a = mixed_ba.unflatten(1, (H, -1)).split([group, group], dim=2)
                T = mixed_qkvz.shape[0]
                return q, k, v.reshape(T, -1, V), z.reshape(T, -1, V), b.reshape(T, -1), a.reshape(T, -1)

        return QwenGatedDeltaNetAttention

    def _head_class(self) -> type:
        pluggable: Any = self.layer_class.__bases__[0]

        class LogitsProcessor(pluggable):  # type: ignore[misc]
            def __init__(self, head_dtype: torch.dtype | None = None) -> None:
                super().__init__()
                self.head_dtype = head_dtype

            def forward(self, lm_head: Any, hidden_states: Tensor, embedding_bias: Tensor | None = None) -> Tensor:
                return self._apply_head(lm_head, hidden_states, embedding_bias)  # type: ignore[no-any-return]

            def _apply_head(self, lm_head: Any, hidden_states: Tensor, embedding_bias: Tensor | None) -> Tensor:
                return hidden_states.new_full((len(hidden_states), 1), 7.0)  # the host's own result

        return LogitsProcessor


class Pools:
    """The slots of one layer: pages of both states and a gap in one piece of memory, all NaN."""

    GAP = 64

    def __init__(self, layer: Any, num_slots: int) -> None:
        channels = 2 * layer.num_k_heads * layer.head_k_dim + layer.num_v_heads * layer.head_v_dim
        shapes = (
            (layer.conv_kernel_size - 1, channels),
            (layer.num_v_heads, layer.head_v_dim, layer.head_k_dim),
        )
        sizes = [torch.Size(s).numel() * d.itemsize for s, d in zip(shapes, layer.state_dtypes, strict=True)]
        self.page = sum(sizes) + self.GAP
        self.memory = torch.full((num_slots, self.page), 0xFF, dtype=torch.uint8)
        layer.kv_cache = []
        begin = 0
        for shape, dtype, size in zip(shapes, layer.state_dtypes, sizes, strict=True):
            slots = self.memory.view(dtype)
            first = begin // dtype.itemsize
            layer.kv_cache.append(slots[:, first : first + size // dtype.itemsize].unflatten(1, shape))
            begin += size
