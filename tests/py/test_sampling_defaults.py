# SPDX-License-Identifier: Apache-2.0
"""What generation_config.json recommends counts where nothing else is said: in requests and on the command line."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from live_server import (
    CHECKPOINT,
    GOOD,
    KEY,
    PROMPT,
    TOKENIZER,
    engine,
    http_get,
    live,
    post,
    single,
    want,
)
from xgdn import SamplingParams
from xgdn.cli import app as cli_app
from xgdn.sampling_defaults import SamplingDefaults, read_sampling_defaults
from xgdn.server import serve

GREEDY = {"do_sample": True, "temperature": 1.9, "top_k": 1, "top_p": 0.9}


def model_dir(folder: Path, generation_config: Any) -> Path:
    for file in CHECKPOINT.iterdir():
        if file.name != "generation_config.json":
            (folder / file.name).symlink_to(file)
    (folder / "generation_config.json").write_text(json.dumps(generation_config))
    return folder


@pytest.fixture(scope="module")
def greedy_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose generation_config.json asks for the likeliest token."""
    return model_dir(tmp_path_factory.mktemp("greedy"), GREEDY)


@pytest.fixture(scope="module")
def greedy_url(greedy_dir: Path) -> Iterator[str]:
    defaults = read_sampling_defaults("auto", greedy_dir)
    with live(engine(greedy_dir), greedy_dir, sampling_defaults=defaults) as url:
        yield url


def test_they_count_where_a_request_leaves_them_out(greedy_url: str) -> None:
    body = GOOD | {"prompt": PROMPT, "ignore_eos": True, "seed": 3}

    def text(**options: Any) -> str:
        return str(post(greedy_url, body | options).json()["choices"][0]["text"])

    greedy = want(PROMPT)
    assert text() == greedy
    assert text(temperature=None, top_k=None, top_p=None, stop_token_ids=None, stream_options=None) == greedy
    assert text(top_k=-1) == want(PROMPT, temperature=1.9, top_p=0.9, seed=3) != greedy
    assert text(top_k=0, top_p=1) == want(PROMPT, temperature=1.9, seed=3)
    assert text(top_k=5, temperature=1) == want(PROMPT, temperature=1, top_k=5, top_p=0.9, seed=3)
    assert text(top_k=5, temperature=0) == greedy


def test_the_models_page_shows_them(greedy_url: str) -> None:
    headers = {"Authorization": f"Bearer {KEY}"}
    (card,) = http_get(f"{greedy_url}/v1/models", headers=headers).json()["data"]
    assert card["default_sampling_params"] == {"temperature": 1.9, "top_k": 1, "top_p": 0.9}


def generate(folder: Path, *options: str) -> Result:
    command = ["generate", str(folder), "--prompt", PROMPT, "--max-new-tokens", "12", "--ignore-eos", "--json"]
    result = CliRunner().invoke(cli_app, [*command, *options])
    assert result.exit_code == 0, result.output
    return result


def ids(result: Result) -> Any:
    return json.loads(result.stdout)["ids"]


def test_they_count_on_the_command_line(tmp_path: Path) -> None:
    model_dir(tmp_path, {"temperature": 1.9, "top_k": 9})

    def sampled(**options: Any) -> list[int]:
        (result,) = single().generate(
            [TOKENIZER.encode(PROMPT).ids], max_new_tokens=12, sampling=SamplingParams(**options), ignore_eos=True
        )
        tokens: list[int] = result.tokens
        return tokens

    result = generate(tmp_path, "--dtype", "float32")
    assert ids(result) == sampled(temperature=1.9, top_k=9)
    assert result.stderr == "xgdn: temperature 1.9, top_k 9, as the model's generation_config.json says\n"
    result = generate(tmp_path, "--dtype", "float32", "--top-k", "0", "--seed", "2")
    assert ids(result) == sampled(temperature=1.9, seed=2)
    assert "top_k" not in result.stderr
    result = generate(tmp_path, "--dtype", "float32", "--generation-config", "none")
    assert (ids(result), result.stderr) == (sampled(), "")
    other = tmp_path / "other.json"
    other.write_text('{"temperature": 0.7}')
    assert ids(generate(tmp_path, "--dtype", "float32", "--generation-config", str(other))) == sampled(temperature=0.7)


@pytest.mark.parametrize(("options", "is_told"), [([], True), (["--generation-config", "none"], False)])
def test_a_server_tells_them_at_start(
    greedy_dir: Path, options: list[str], is_told: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    cards = []

    def read_card(app: Any, *_: Any, **__: Any) -> None:
        (route,) = [route for route in app.routes if getattr(route, "path", "") == "/stats"]
        cards.append(route.endpoint.__self__.models()["data"][0])

    monkeypatch.setattr(serve, "serve", read_card)
    result = CliRunner().invoke(cli_app, ["serve", str(greedy_dir), "--port", "0", *options])
    assert result.exit_code == 0, result.output
    assert ("temperature 1.9, top_k 1, top_p 0.9" in result.stderr) == is_told
    assert bool(cards[0]["default_sampling_params"]) == is_told


@pytest.mark.parametrize(
    ("document", "values"),
    [
        ({"do_sample": False, "temperature": 0.6}, {"temperature": 0.6}),  # as vLLM and SGLang do
        ({"temperature": 0, "top_k": -1, "top_p": 1}, {"temperature": 0, "top_k": 0, "top_p": 1}),
        ({"temperature": None, "top_k": None}, {}),
        ({"eos_token_id": 3}, {}),
    ],
    ids=str,
)
def test_values_are_taken_as_they_are(document: dict[str, Any], values: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text(json.dumps(document))
    defaults = read_sampling_defaults("auto", tmp_path)
    assert (defaults.values(), defaults.problems) == (values, ())
    assert read_sampling_defaults("none", tmp_path) == SamplingDefaults()


@pytest.mark.parametrize(
    "odd", [{"temperature": -1}, {"temperature": "0.6"}, {"top_k": 0.5}, {"top_k": True}, {"top_p": 0}, {"top_p": 2}]
)
def test_a_value_that_cannot_be_is_told_and_left_out(odd: dict[str, Any], tmp_path: Path) -> None:
    model_dir(tmp_path, {"temperature": 0.5, "top_k": 3, "top_p": 0.5} | odd)
    defaults = read_sampling_defaults("auto", tmp_path)
    ((name, value),) = odd.items()
    assert set(defaults.values()) == {"temperature", "top_k", "top_p"} - {name}
    (problem,) = defaults.problems
    assert f"generation_config.json: {name}: expected" in problem
    assert repr(value) in problem
    assert problem in generate(tmp_path).stderr


def test_a_missing_or_damaged_file_is_told(tmp_path: Path) -> None:
    assert read_sampling_defaults("auto", tmp_path) == SamplingDefaults()
    (tmp_path / "damaged.json").write_text("[")
    for source, words in (("absent.json", "no such file"), ("damaged.json", "damaged.json")):
        command = ["generate", str(CHECKPOINT), "--prompt", "a", "--generation-config", str(tmp_path / source)]
        result = CliRunner().invoke(cli_app, command)
        assert (result.exit_code, result.stderr.count("\n")) == (1, 1)
        assert words in result.stderr
