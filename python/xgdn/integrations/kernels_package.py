# SPDX-License-Identifier: Apache-2.0
"""The layers here as the package `kernels` wants them: a repository of layers, and a mapping of a host's names."""

import importlib
import inspect
from pathlib import Path
from typing import Any

from xgdn import errors
from xgdn.backends import available_backends

__all__ = ["LAYER_REPOSITORY", "kernel_mapping"]

LAYER_REPOSITORY = Path(__file__).with_name("layer_repository")  # in the layout of a repository of the Hub

# transformers' names of what may be replaced, and the layers that do.
_FUNCTIONS = {
    "chunk_gated_delta_rule": "ChunkGatedDeltaRule",
    "fused_recurrent_gated_delta_rule": "FusedRecurrentGatedDeltaRule",
    "causal_conv1d_fn": "CausalConv1d",
    "causal_conv1d_update": "CausalConv1dUpdate",
    "RMSNormGated": "RMSNormGated",
}
_LAYERS = {"Qwen3_5GatedDeltaNet": "GatedDeltaNet"}
_OLDEST = "0.17"


def kernel_mapping(*, layers: bool = False) -> dict[str, Any]:
    """Return a mapping for `kernels.use_kernel_mapping` or `register_kernel_mapping`, for inference on every device
    that a backend here serves.

    It names the functions of the rule, the causal convolution and the gated norm; with `layers` whole GDN layers too,
    where the host has a name for them. Calls are counted as those of `patch_transformers`, see `xgdn.report`.

    Raises:
        ImportError: There is no package `kernels`.
        xgdn.errors.UnsupportedError: It is one whose local repositories are made otherwise.
    """
    kernels = importlib.import_module("kernels")
    parameters = tuple(inspect.signature(kernels.LocalLayerRepository).parameters)
    if parameters != ("repo_path", "layer_name"):
        raise errors.UnsupportedError(
            f"[kernel_mapping] kernels: expected a version with LocalLayerRepository(repo_path, layer_name) ({_OLDEST} "
            f"or newer), got {kernels.__version__} with LocalLayerRepository({', '.join(parameters)})"
        )
    devices = {"cpu", *(name for name in available_backends() if name == "cuda")}
    mode = kernels.Mode.INFERENCE | kernels.Mode.TORCH_COMPILE
    names = {**_FUNCTIONS, **(_LAYERS if layers else {})}
    repositories = {
        name: kernels.LocalLayerRepository(LAYER_REPOSITORY, layer_name=layer) for name, layer in names.items()
    }
    return {name: {device: {mode: it} for device in devices} for name, it in repositories.items()}
