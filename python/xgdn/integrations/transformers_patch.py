# SPDX-License-Identifier: Apache-2.0
"""Puts the functions and layers here in the place of transformers', and back."""

import functools
import importlib
import inspect
import threading
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from xgdn import errors
from xgdn.integrations import calls, transformers_functions, transformers_layer, transformers_modules

__all__ = ["patch_transformers", "unpatch_transformers"]

_RULES: dict[str, Callable[..., Any]] = {
    "torch_chunk_gated_delta_rule": transformers_functions.chunk_gated_delta_rule,
    "torch_recurrent_gated_delta_rule": transformers_functions.fused_recurrent_gated_delta_rule,
}
_CONVOLUTIONS: dict[str, Callable[..., Any]] = {
    "causal_conv1d_fn": transformers_functions.causal_conv1d_fn,
    "causal_conv1d_update": transformers_functions.causal_conv1d_update,
}
# By what the names of the classes end with, `forward`.
_NORMS: dict[str, Callable[..., Any]] = {"RMSNormGated": transformers_functions.rms_norm_gated}
_QWEN = ("Qwen3Next", "Qwen3_5", "Qwen3_5Moe")
_LAYERS: dict[str, Callable[..., Any]] = {
    "GatedDeltaNet": transformers_layer.forward,
    "MLP": transformers_modules.mlp_forward,
    "ForCausalLM": transformers_modules.causal_lm_forward,
    "ForConditionalGeneration": transformers_modules.causal_lm_forward,
    # Others have attention and norms of other kinds.
    **{f"{name}Attention": transformers_modules.attention_forward for name in _QWEN},
    **{f"{name}RMSNorm": transformers_modules.rms_norm_forward for name in _QWEN},
}
_PARAMETERS = {
    transformers_layer.forward: transformers_layer.PARAMETERS,
    transformers_modules.attention_forward: transformers_modules.ATTENTION_PARAMETERS,
}
_NOT_OF_THE_TEXT_MODEL = "Vision"
_OLDEST = "5.16"
_OLDEST_WITH_LAYERS = "5.21"
_WORDS = (b"chunk_gated_delta_rule", b"recurrent_gated_delta_rule")


class _Replaced(NamedTuple):
    owner: Any  # a module or a class
    name: str
    original: Any
    replacement: Any

    def __str__(self) -> str:
        owner = self.owner
        is_class = isinstance(owner, type)
        module = (owner.__module__ if is_class else owner.__name__).rpartition(".")[2].removeprefix("modeling_")
        return ".".join([module, owner.__name__, self.name] if is_class else [module, self.name])


_lock = threading.Lock()
_replaced: list[_Replaced] = []


def patch_transformers(*, layers: bool = False) -> list[str]:
    """Have transformers' Gated DeltaNet layers computed here, in models loaded before and after; return what was
    replaced.

    Replaced are the two functions of the rule, the causal convolution and the gated norm of every model that has them;
    with `layers` also the `forward` of the layers, so that a decoded token is one fused step on the cache's own
    tensors, of these models' dense MLPs, their heads, and Qwen's attention and norms. Calls that cannot be served go to
    the host's own code and are counted with the reason, see `xgdn.report`, which is logged once when the process ends.
    A second call only changes the mode.

    Raises:
        xgdn.errors.UnsupportedError: This version of transformers has none of the functions, or not by these names; or,
            with `layers`, calls its layers or caches otherwise.
    """
    with _lock:
        _undo()
        wanted = _replacements(layers)
        transformers_functions.look_up_devices()
        for one in wanted:
            setattr(one.owner, one.name, one.replacement)
        _replaced.extend(wanted)
        calls.log_at_exit(transformers_functions.HOST)
        return [str(one) for one in wanted]


def unpatch_transformers() -> None:
    """Put back what `patch_transformers` replaced; what someone else has replaced since stays as it is."""
    with _lock:
        _undo()


def _undo() -> None:
    for one in _replaced:
        if vars(one.owner).get(one.name) is one.replacement:
            setattr(one.owner, one.name, one.original)
    _replaced.clear()


def _replacements(layers: bool) -> list[_Replaced]:
    transformers = importlib.import_module("transformers")
    found: list[_Replaced] = []
    if layers:
        _check_caches(transformers)
    for module in _models(transformers):
        missing = [name for name in _RULES if not callable(vars(module).get(name))]
        if missing:
            raise _unsupported(transformers, f"{module.__name__} without {' and '.join(missing)}")
        functions = {**_RULES, **_CONVOLUTIONS}
        found += [_replace(module, name, functions[name]) for name in functions if callable(vars(module).get(name))]
        for end, function in {**_NORMS, **(_LAYERS if layers else {})}.items():
            for owner in _classes(module):
                if owner.__name__.endswith(end):
                    _check_parameters(transformers, owner, function)
                    found.append(_replace(owner, "forward", function))
    if not found:
        raise _unsupported(transformers, "no model with them")
    return found


def _check_caches(transformers: ModuleType) -> None:
    missing = [n for n in transformers_layer.CACHE_METHODS if not hasattr(transformers.cache_utils.Cache, n)]
    if missing:
        wanted = f"caches with {', '.join(transformers_layer.CACHE_METHODS)}"
        raise _unsupported_layers(transformers, wanted, f"caches without {' and '.join(missing)}")


def _check_parameters(transformers: ModuleType, owner: type, function: Callable[..., Any]) -> None:
    known = _PARAMETERS.get(function)
    if known is None:
        return
    parameters = tuple(inspect.signature(vars(owner)["forward"]).parameters)[: len(known[0])]
    if parameters not in known:
        wanted = " or ".join(f"({', '.join(names)})" for names in known)
        got = f"{owner.__name__}.forward({', '.join(parameters)}, ...)"
        raise _unsupported_layers(transformers, f"layers called with {wanted}", got)


def _models(transformers: ModuleType) -> list[ModuleType]:
    """Import the modules that say the names of the two functions, of hundreds that do not."""
    folder = Path(str(transformers.__file__)).parent / "models"
    paths = sorted(path for path in folder.glob("*/modeling_*.py") if all(w in path.read_bytes() for w in _WORDS))
    return [importlib.import_module(f"transformers.models.{path.parent.name}.{path.stem}") for path in paths]


def _classes(module: ModuleType) -> list[type]:
    own = (c for c in vars(module).values() if isinstance(c, type) and c.__module__ == module.__name__)
    return [c for c in own if "forward" in vars(c) and _NOT_OF_THE_TEXT_MODEL not in c.__name__]


def _replace(owner: Any, name: str, function: Callable[..., Any]) -> _Replaced:
    original = vars(owner)[name]

    @functools.wraps(original)
    def replacement(*args: Any, **kwargs: Any) -> Any:
        return function(original, *args, **kwargs)

    return _Replaced(owner, name, original, replacement)


def _unsupported_layers(transformers: ModuleType, wanted: str, got: str) -> errors.UnsupportedError:
    return errors.UnsupportedError(
        f"[patch_transformers] layers=True: expected {wanted} (transformers {_OLDEST_WITH_LAYERS} or newer), got "
        f"{transformers.__version__}, {got}; layers=False replaces functions alone"
    )


def _unsupported(transformers: ModuleType, got: str) -> errors.UnsupportedError:
    return errors.UnsupportedError(
        f"[patch_transformers] transformers: expected models with the functions {' and '.join(_RULES)} ({_OLDEST} or "
        f"newer), got {transformers.__version__}, {got}"
    )
