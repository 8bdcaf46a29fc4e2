# SPDX-License-Identifier: Apache-2.0
"""One list of the engine's arguments: C++, `xgdn.Engine`, `xgdn.EngineArgs` and the command line agree."""

from __future__ import annotations

import inspect
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import xgdn
from checkpoints import Tiny, make, qwen3_5
from xgdn import _C, cli
from xgdn.cli import app

NAMES = [field.name for field in fields(xgdn.EngineArgs)]
SIZES = ("max_batch_size", "max_cached_tokens", "kv_block_size", "max_tokens_per_step", "prefix_cache_slots")
OF_RUNNER = (*SIZES, "run_ahead")
# An option of every field with another value than its default.
OPTIONS = {
    "dtype": ("bfloat16", torch.bfloat16),
    "state_dtype": ("bfloat16", torch.bfloat16),
    "replay_states": (None, True),  # a flag
    "speculate": ("mtp", "mtp"),
    "draft_tokens": ("3", 3),
    "kv_dtype": ("int8", torch.int8),
    "quantize": ("int4", "int4"),
    "activation_bits": ("8", 8),
    "device": ("meta", "meta"),
    "tensor_parallel": ("2", 2),
    "prefill_backend": ("reference", "reference"),
    "decode_backend": ("cpu", "cpu"),
    "prefill_accuracy": ("exact", "exact"),
    "max_batch_size": ("3", 3),
    "max_cached_tokens": ("640", 640),
    "kv_block_size": ("32", 32),
    "max_tokens_per_step": ("64", 64),
    "prefix_cache_slots": ("7", 7),
    "run_ahead": (None, True),  # one of two flags
    "memory_limit": ("2 GiB", 2**31),
}
SUBSETS = {
    "generate": NAMES,
    "serve": NAMES,
    "plan": [
        "dtype",
        "state_dtype",
        "replay_states",
        "speculate",
        "draft_tokens",
        "kv_dtype",
        "quantize",
        "activation_bits",
        "tensor_parallel",
        *SIZES,
        "memory_limit",
    ],
    "bench model": [
        "dtype",
        "state_dtype",
        "replay_states",
        "kv_dtype",
        "quantize",
        "activation_bits",
        "device",
        "tensor_parallel",
        "prefill_backend",
        "decode_backend",
        "prefill_accuracy",
    ],
}
OTHER_DEFAULTS = {("serve", "prefix_cache_slots"): 32}


class Loaded(Exception):
    """Carries what a command would have loaded."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(Tiny("args", qwen3_5, {"vocab_size": 260}), tmp_path_factory.mktemp("args"))[0]


def test_the_defaults_are_those_of_the_core() -> None:
    args, sizes, options = xgdn.EngineArgs(), _C.RunnerOptions(), _C.EngineOptions()
    for name in NAMES:
        assert getattr(args, name) == getattr(sizes if name in OF_RUNNER else options, name), name
    assert all(getattr(options.runner, name) == getattr(sizes, name) for name in OF_RUNNER)


def test_no_runner_option_of_the_core_is_left_out() -> None:
    names = {name for name in dir(_C.RunnerOptions) if not name.startswith("_")}
    assert names == {*OF_RUNNER, "poison_freed_slots"}


def test_runner_options_carry_what_is_theirs() -> None:
    args = replace(xgdn.EngineArgs(), **{name: OPTIONS[name][1] for name in OF_RUNNER})
    runner = args.runner_options()
    assert {name: getattr(runner, name) for name in OF_RUNNER} == {name: OPTIONS[name][1] for name in OF_RUNNER}


def test_the_engine_has_the_same_arguments_defaults_and_docs() -> None:
    parameters = inspect.signature(xgdn.Engine.__init__).parameters
    for name in NAMES:
        if name not in OF_RUNNER:
            assert parameters[name].default == getattr(xgdn.EngineArgs(), name), name
    for field in fields(xgdn.EngineArgs):
        for owner in (xgdn.Engine, xgdn.EngineArgs):
            assert f"{field.name}: {field.metadata['doc']}" in (owner.__doc__ or "")


def test_from_args_passes_every_argument(monkeypatch: pytest.MonkeyPatch) -> None:
    given = {}
    monkeypatch.setattr(xgdn.Engine, "__init__", lambda self, model_dir, **args: given.update(args))
    xgdn.Engine.from_args("model", xgdn.EngineArgs(**{name: value for name, (_, value) in OPTIONS.items()}))
    runner = given.pop("runner")
    assert given.pop("on_layer_loaded") is None
    assert given == {name: value for name, (_, value) in OPTIONS.items() if name not in OF_RUNNER}
    assert {name: getattr(runner, name) for name in OF_RUNNER} == {name: OPTIONS[name][1] for name in OF_RUNNER}


def test_from_args_loads_a_model(model: Path) -> None:
    args = xgdn.EngineArgs(max_batch_size=2, max_cached_tokens=128, prefill_backend="reference")
    engine = xgdn.Engine.from_args(model, args)
    assert (engine.num_free_slots, engine.num_free_kv_blocks) == (2, 8)
    assert engine.generate([[1, 2, 3]]) != []
    assert xgdn.last_backend("chunk_gated_delta_rule") == "reference"


@pytest.mark.parametrize("command", SUBSETS)
def test_an_option_has_the_name_and_the_doc_of_its_field(command: str) -> None:
    result = CliRunner(env={"FORCE_COLOR": None, "COLUMNS": "200"}).invoke(app, [*command.split(), "--help"])
    text = " ".join(result.output.replace("│", " ").split())
    for field in fields(xgdn.EngineArgs):
        option = "--" + field.name.replace("_", "-")
        assert (option in text) == (field.name in SUBSETS[command]), option
        if field.name in SUBSETS[command] and field.default is not None:
            default = str(OTHER_DEFAULTS.get((command, field.name), field.default)).removeprefix("torch.")
            shown = "" if field.default is False else f" [default: {default}]"
            assert f"{field.metadata['doc']}{shown}" in text


def loaded_by(monkeypatch: pytest.MonkeyPatch, model: Path, *options: str) -> xgdn.EngineArgs:
    """What `xgdn generate` loads the engine with."""

    def load(path: Path, args: xgdn.EngineArgs) -> xgdn.Engine:
        raise Loaded(args)

    monkeypatch.setattr(cli.generate, "load_engine", load)
    result = CliRunner().invoke(app, ["generate", str(model), "--prompt-ids", "1", *options])
    assert isinstance(result.exception, Loaded), result.output
    (args,) = result.exception.args
    return args


def test_a_command_without_options_takes_the_defaults(monkeypatch: pytest.MonkeyPatch, model: Path) -> None:
    assert loaded_by(monkeypatch, model) == xgdn.EngineArgs()


@pytest.mark.parametrize("name", NAMES)
def test_an_option_sets_its_field(monkeypatch: pytest.MonkeyPatch, model: Path, name: str) -> None:
    text, value = OPTIONS[name]
    option = "--" + name.replace("_", "-")
    args = loaded_by(monkeypatch, model, option, *([] if text is None else [text]))
    assert args == replace(xgdn.EngineArgs(), **{name: value})
    assert args != xgdn.EngineArgs()


def test_an_option_that_nobody_has_set_can_be_refused(monkeypatch: pytest.MonkeyPatch, model: Path) -> None:
    assert loaded_by(monkeypatch, model, "--no-run-ahead").run_ahead is False


@pytest.mark.parametrize("text", ["8 GB", "-1", "", "1.5GiB"])
def test_a_memory_limit_that_is_none_is_wrong_usage(model: Path, text: str) -> None:
    result = CliRunner().invoke(app, ["plan", str(model), f"--memory-limit={text}"])
    assert result.exit_code == 2
    assert "--memory-limit" in result.stderr
    assert "8GiB" in result.stderr
