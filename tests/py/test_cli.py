# SPDX-License-Identifier: Apache-2.0
"""The command line: what goes to stdout, what to stderr, exit codes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner, Result

import forked
import xgdn
from checkpoints import Tiny, make, qwen3_5
from tiny_tokenizers import byte_tokenizer
from xgdn.cli import app

NO_COLOR = {"NO_COLOR": "1", "TERM": "dumb"}
VOCAB_SIZE = 260  # every byte, and some ids without text


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint without tokenizer."""
    tiny = Tiny("cli", qwen3_5, {"vocab_size": VOCAB_SIZE})
    return make(tiny, tmp_path_factory.mktemp("cli"))[0]


@pytest.fixture(scope="module")
def model_with_tokenizer(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("with_tokenizer")
    for file in model.iterdir():
        (folder / file.name).symlink_to(file)
    byte_tokenizer().save(str(folder / "tokenizer.json"))
    return folder


def run(*args: object) -> Result:
    return CliRunner(env={"FORCE_COLOR": None}).invoke(app, [str(arg) for arg in args])


def expect_success(*args: object) -> Result:
    result = run(*args)
    assert result.exit_code == 0, result.output
    assert result.stderr == ""
    return result


def want(model: Path, *prompts: list[int], count: int = 8) -> list[list[int]]:
    return [result.tokens for result in xgdn.Engine(model).generate(prompts, max_new_tokens=count)]


def test_one_prompt_of_ids_prints_ids(model: Path) -> None:
    result = expect_success("generate", model, "--prompt-ids", "5, 6,7", "--max-new-tokens", 8)
    assert result.stdout == " ".join(map(str, want(model, [5, 6, 7])[0])) + "\n"


def test_several_prompts_print_a_numbered_line_each(model: Path) -> None:
    result = expect_success("generate", model, "--prompt-ids", "5,6,7", "--prompt-ids", "8", "--max-new-tokens", 8)
    tokens = want(model, [5, 6, 7], [8])
    assert sorted(result.stdout.splitlines()) == [f"[{i}] " + " ".join(map(str, ids)) for i, ids in enumerate(tokens)]


def test_a_text_prompt_prints_text(model_with_tokenizer: Path) -> None:
    tokenizer = byte_tokenizer()
    result = expect_success("generate", model_with_tokenizer, "--prompt", "héllo 😀", "--max-new-tokens", 8)
    (tokens,) = want(model_with_tokenizer, tokenizer.encode("héllo 😀").ids)
    assert result.stdout == tokenizer.decode(tokens) + "\n"


def test_json_is_one_document_per_prompt(model_with_tokenizer: Path) -> None:
    tokenizer = byte_tokenizer()
    prompts = ["a long prompt " * 20, "b"]
    result = expect_success(
        "generate", model_with_tokenizer, "--prompt", prompts[0], "--prompt", prompts[1], "--json",
        "--max-new-tokens", 8, "--max-tokens-per-step", 64,
    )  # fmt: skip
    documents = sorted((json.loads(line) for line in result.stdout.splitlines()), key=lambda d: d["index"])
    ids = [tokenizer.encode(prompt).ids for prompt in prompts]
    assert [d["prompt_ids"] for d in documents] == ids
    assert [d["ids"] for d in documents] == want(model_with_tokenizer, *ids)
    for document in documents:
        assert document["text"] == tokenizer.decode(document["ids"])
        assert document["finish_reason"] == "length"
        assert document["error"] is None
        assert document["seconds_to_first_token"] > 0
        assert document["tokens_per_second"] > 0


def test_json_without_tokenizer_has_no_text(model: Path) -> None:
    result = expect_success("generate", model, "--prompt-ids", "5", "--max-new-tokens", 1, "--json")
    document = json.loads(result.stdout)
    assert document["text"] is None
    assert document["tokens_per_second"] is None


def test_n_replies_to_each_prompt(model: Path) -> None:
    options = ["--prompt-ids", "5,6,7", "--prompt-ids", "8", "-n", 3, "--temperature", 2, "--seed", 4]
    sampling = xgdn.SamplingParams(temperature=2, seed=4)
    results = xgdn.Engine(model).generate([[5, 6, 7], [8]], max_new_tokens=6, sampling=sampling, n=3)
    want = {(i // 3, i % 3): result.tokens for i, result in enumerate(results)}
    assert len({tuple(tokens) for tokens in want.values()}) == 6

    lines = expect_success("generate", model, "--max-new-tokens", 6, *options).stdout.splitlines()
    assert sorted(lines) == sorted(f"[{i}.{b}] " + " ".join(map(str, ids)) for (i, b), ids in want.items())
    lines = expect_success("generate", model, "--max-new-tokens", 6, "--json", *options).stdout.splitlines()
    documents = [json.loads(line) for line in lines]
    assert {(d["index"], d["branch"]): d["ids"] for d in documents} == want
    assert all(d["prompt_ids"] == [[5, 6, 7], [8]][d["index"]] and d["logprobs"] is None for d in documents)


def test_logprobs_in_json(model: Path) -> None:
    options = ["--prompt-ids", "5,6,7", "--max-new-tokens", 4, "--temperature", 2, "--logprobs", 2, "--json"]
    document = json.loads(expect_success("generate", model, *options).stdout)
    sampling = xgdn.SamplingParams(temperature=2, logprobs=2)
    (result,) = xgdn.Engine(model).generate([[5, 6, 7]], max_new_tokens=4, sampling=sampling)
    assert document["ids"] == result.tokens
    for got, want in zip(document["logprobs"], result.logprobs, strict=True):
        assert got["logprob"] == pytest.approx(want.chosen, abs=1e-4)
        assert [it["id"] for it in got["top"]] == [it.token for it in want.top]
        assert [it["logprob"] for it in got["top"]] == pytest.approx([it.logprob for it in want.top], abs=1e-4)


def test_options_reach_the_engine(model: Path) -> None:
    def ids(*options: object) -> list[int]:
        return json.loads(expect_success("generate", model, "--prompt-ids", "5,6", "--json", *options).stdout)["ids"]

    greedy = ids("--max-new-tokens", 6)
    assert len(greedy) == 6
    assert ids("--stop-token-ids", f"259,{greedy[2]}") == greedy[: greedy.index(greedy[2]) + 1]
    assert ids("--max-new-tokens", 6, "--temperature", 5, "--top-k", 1) == greedy
    assert ids("--max-new-tokens", 6, "--temperature", 5, "--top-p", 1e-9) == greedy
    sampled = ids("--max-new-tokens", 6, "--temperature", 5, "--seed", 1)
    assert sampled == ids("--max-new-tokens", 6, "--temperature", 5, "--seed", 1)
    assert sampled != ids("--max-new-tokens", 6, "--temperature", 5, "--seed", 2)


def test_backends_are_chosen_per_phase(model: Path) -> None:
    expect_success(
        "generate", model, "--prompt-ids", "5,6", "--max-new-tokens", 2, "--dtype", "bfloat16",
        "--state-dtype", "bfloat16", "--prefill-backend", "reference", "--decode-backend", "cpu",
    )  # fmt: skip
    assert xgdn.last_backend("chunk_gated_delta_rule") == "reference"
    assert xgdn.last_backend("gdn_decode_step") == "cpu"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--prompt-ids", ""], ["prompt", "at least one token"]),
        (["--prompt-ids", "1,260"], ["0..259", "260", "index 1"]),
        (["--prompt-ids", "-1"], ["0..259", "-1"]),
        (["--prompt", "hi"], ["tokenizer.json is missing", "--prompt-ids"]),
        (["--prompt-ids", "1", "--temperature", "-1"], ["temperature", "-1"]),
        (["--prompt-ids", "1", "--max-cached-tokens", "16"], ["16", "64"]),
        (["--prompt-ids", "1", "--max-batch-size", "0"], ["max_batch_size", "0"]),
        (["--prompt-ids", "1", "--max-batch-size", "2", "-n", "3"], ["n:", "at most 2 branches", "got 3"]),
        (["--prompt-ids", "1", "--json", "--logprobs", "21"], ["logprobs", "0..20", "got 21"]),
        (["--prompt-ids", "1", "--decode-backend", "cuda"], ["cuda"]),
        (["--prompt-ids", "1", "--decode-backend", "none"], ["none", "cpu, reference"]),
    ],
    ids=lambda value: " ".join(value) if value and value[0].startswith("--") else "",
)
def test_a_refusal_is_one_line_and_exit_code_1(model: Path, options: list[str], words: list[str]) -> None:
    result = run("generate", model, *options)
    assert result.exit_code == 1
    assert result.stdout == ""
    assert result.stderr.startswith("xgdn: ")
    assert result.stderr.count("\n") == 1
    assert all(word in result.stderr for word in words), result.stderr


def test_a_folder_without_checkpoint_is_refused_in_one_line(tmp_path: Path) -> None:
    result = run("generate", tmp_path, "--prompt-ids", "1")
    assert result.exit_code == 1
    assert "config.json" in result.stderr
    assert result.stderr.count("\n") == 1


def test_a_broken_tokenizer_is_refused_in_one_line(model: Path, tmp_path: Path) -> None:
    for file in model.iterdir():
        (tmp_path / file.name).symlink_to(file)
    (tmp_path / "tokenizer.json").write_text("{")
    result = run("generate", tmp_path, "--prompt", "hi")
    assert result.exit_code == 1
    assert "tokenizer.json" in result.stderr
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize(
    "options",
    [
        [],
        ["--prompt", "a", "--prompt-ids", "1"],
        ["--prompt-ids", "1,b"],
        ["--prompt-ids", str(2**31)],
        ["--prompt-ids", "1", "--stop-token-ids", "x"],
        ["--prompt-ids", "1", "--max-new-tokens", str(2**63)],
        ["--prompt-ids", "1", "--dtype", "int8"],
        ["--prompt-ids", "1", "-n", "0"],
        ["--prompt-ids", "1", "--logprobs", "1"],
        ["--prompt-ids", "1", "--json", "--logprobs", "-1"],
        ["--prompt-ids", "1", "--no-such-option"],
    ],
    ids=" ".join,
)
def test_wrong_usage_is_exit_code_2(model: Path, options: list[str]) -> None:
    result = run("generate", model, *options)
    assert result.exit_code == 2
    assert result.stdout == ""


def test_logprobs_without_json_say_what_they_need(model: Path) -> None:
    result = run("generate", model, "--prompt-ids", "1", "--logprobs", "1")
    assert "--logprobs: expected --json" in " ".join(result.stderr.replace("│", " ").split())


@pytest.mark.parametrize("command", ["generate", "serve", "plan", "doctor", "bench model", "bench serving"])
def test_every_command_has_json(command: str) -> None:
    assert "--json" in expect_success(*command.split(), "--help").stdout


def test_a_missing_folder_is_wrong_usage(tmp_path: Path) -> None:
    result = run("generate", tmp_path / "missing", "--prompt-ids", "1")
    assert result.exit_code == 2
    assert "does not exist" in " ".join(result.stderr.replace("│", " ").split())


def test_progress_goes_to_a_terminal_s_stderr(model: Path) -> None:
    program = "import sys; from xgdn.cli import app; app(sys.argv[1:])"
    ids = ",".join(["3"] * 200)
    args = ["generate", str(model), "--prompt-ids", ids, "--max-tokens-per-step", "64", "--max-new-tokens", "4"]
    result = subprocess.run(
        [sys.executable, "-c", program, *args],
        env=os.environ | {"FORCE_COLOR": "1", "COLUMNS": "100"},  # rich takes stderr for a terminal
        capture_output=True,
        text=True,
        check=True,
    )
    assert "loading layers" in result.stderr
    assert "prefill" in result.stderr
    assert result.stdout == " ".join(map(str, want(model, [3] * 200, count=4)[0])) + "\n"


def test_doctor_lists_every_op_and_backend() -> None:
    lines = expect_success("doctor").stdout.splitlines()
    assert torch.__version__ in lines[0]
    assert torch.backends.cpu.get_cpu_capability() in lines[0]
    reports = xgdn.doctor()
    for report in reports:
        row = next(line for line in lines if line.split()[1:2] == [report.op])
        cells = [cell.strip() for cell in row.strip("│").split("│")]
        backends = [other.backend for other in reports if other.op == report.op]
        cell = cells[1 + backends.index(report.backend)]
        assert cell == ("selected" if report.is_selected else "-" if report.why_not else "yes")
        assert report.why_not is None or f"{report.backend}: {report.why_not}" in lines
        promises = next((line for line in lines if line.startswith(f"{report.backend}: batch-invariant: ")), "")
        assert report.is_batch_invariant == (report.op in promises.replace(",", "").split())


def test_doctor_json() -> None:
    document = json.loads(expect_success("doctor", "--json").stdout)
    assert document["torch"] == torch.__version__
    assert [tuple(report.values()) for report in document["backends"]] == [tuple(report) for report in xgdn.doctor()]


def test_version() -> None:
    assert expect_success("--version").stdout.startswith("xgdn 0.")


def test_transformers_is_not_imported() -> None:
    (ended,) = forked.run([("import sys, xgdn.cli; sys.exit('transformers' in sys.modules)", {})])
    assert ended.status == 0


def test_the_package_is_the_program() -> None:
    command = [sys.executable, "-m", "xgdn", "doctor", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env={**os.environ, **NO_COLOR})
    assert json.loads(done.stdout)
