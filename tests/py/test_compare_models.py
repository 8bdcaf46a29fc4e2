# SPDX-License-Identifier: Apache-2.0
"""The comparison of whole models reads what its peers print, asks each for the same, and says what failed."""

from __future__ import annotations

import json
import os
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest

import compare_models
from compare_models import Case, Measured, Provider, summarise, table
from peers import model_llama_cpp, programs

# As llama-batched-bench of llama.cpp prints it on two cores, with an empty line at the end.
BATCHED_BENCH = """\
{"n_kv_max": 2048, "n_batch": 2048, "n_ubatch": 512, "flash_attn": -1, "is_pp_shared": 0, "n_gpu_layers": 0, \
"n_threads": 2, "n_threads_batch": 2, "pp": 128, "tg": 24, "pl": 1, "n_kv": 152, "t_pp": 1.400086, \
"speed_pp": 91.422951, "t_tg": 1.506867, "speed_tg": 15.927085, "t": 2.906953, "speed": 52.288425}
{"n_kv_max": 2048, "n_batch": 2048, "n_ubatch": 512, "flash_attn": -1, "is_pp_shared": 0, "n_gpu_layers": 0, \
"n_threads": 2, "n_threads_batch": 2, "pp": 128, "tg": 24, "pl": 8, "n_kv": 1216, "t_pp": 10.972681, \
"speed_pp": 93.322678, "t_tg": 4.670825, "speed_tg": 41.106228, "t": 15.643506, "speed": 77.731934}

"""

# As llama-bench prints it, without the fields that say how the program was built.
BENCH = """\
[
  {
    "backends": "CPU",
    "model_type": "qwen35 0.8B Q4_0",
    "n_threads": 2,
    "flash_attn": -1,
    "n_prompt": 64,
    "n_gen": 0,
    "n_depth": 0,
    "avg_ns": 505056983,
    "avg_ts": 126.718544,
    "samples_ns": [ 504473635, 505640332 ],
    "samples_ts": [ 126.865, 126.572 ]
  },
  {
    "backends": "CPU",
    "model_type": "qwen35 0.8B Q4_0",
    "n_threads": 2,
    "flash_attn": -1,
    "n_prompt": 128,
    "n_gen": 0,
    "n_depth": 0,
    "avg_ns": 1001028440,
    "avg_ts": 127.868497,
    "samples_ns": [ 1000900220, 1001156661 ],
    "samples_ts": [ 127.885, 127.852 ]
  }
]
"""


def arguments(**changes: Any) -> Namespace:
    defaults = {"model": Path("MODEL"), "threads": 2, "batch": [1, 8], "prompts": [64, 128]}
    return Namespace(**(defaults | {"prompt_tokens": 128, "steps": 24} | changes))


def test_times_of_llama_cpp_agree_with_the_rates_that_it_prints() -> None:
    steps = model_llama_cpp.step_times(BATCHED_BENCH)
    assert {batch: 1e3 * batch / time for batch, time in steps.items()} == pytest.approx({1: 15.927085, 8: 41.106228})
    prompts = model_llama_cpp.prompt_times(BENCH)
    rates = {length: [1e3 * length / time for time in times] for length, times in prompts.items()}
    assert rates == {64: pytest.approx([126.865, 126.572], abs=1e-3), 128: pytest.approx([127.885, 127.852], abs=1e-3)}


def test_a_round_of_llama_cpp_has_every_case(monkeypatch: pytest.MonkeyPatch) -> None:
    commands: list[list[str]] = []

    def output_of(command: list[object]) -> str:
        commands.append([str(word) for word in command])
        return BATCHED_BENCH if "batched" in str(command[0]) else BENCH

    monkeypatch.setattr(model_llama_cpp, "output_of", output_of)
    measured = compare_models.run_llama_cpp(arguments(), Path("llama"), Path("Q8_0.gguf"))
    cases = {Case("decode", 1), Case("decode", 8), Case("prompt", 64), Case("prompt", 128)}
    assert set(measured) == cases
    assert measured[Case("decode", 8)].times == [pytest.approx(1e3 * 4.670825 / 24)]
    for command in commands:
        options = dict(zip(command[1::2], command[2::2], strict=False))
        assert (options["-m"], options["-t"], options["-ngl"]) == ("Q8_0.gguf", "2", "0")
    batched = dict(zip(commands[0][1::2], commands[0][2::2], strict=False))
    assert (batched["-npl"], batched["-npp"], batched["-ntg"], batched["-tb"]) == ("1,8", "128", "24", "2")
    assert int(batched["-c"]) == 8 * 256  # 152 tokens a sequence, rounded up


def test_a_batch_that_llama_cpp_left_out_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_llama_cpp, "output_of", lambda _: BATCHED_BENCH)
    with pytest.raises(SystemExit, match=r"expected batches of \[1, 8, 32\], got none of \[32\]"):
        model_llama_cpp.decode(
            Path("llama"), Path("Q8_0.gguf"), threads=2, prompt_tokens=128, steps=24, batches=[1, 8, 32]
        )


@pytest.mark.parametrize(
    ("quantize", "passed"),
    [
        ("none", []),
        ("int4", ["--quantize", "int4"]),
        ("int8-a8", ["--quantize", "int8", "--activation-bits", "8"]),
    ],
)
def test_a_round_of_xgdn_has_every_case(monkeypatch: pytest.MonkeyPatch, quantize: str, passed: list[str]) -> None:
    def output_of(command: list[object]) -> str:
        words = [str(word) for word in command]
        assert words[words.index("--json") + 1 :] == passed
        options = dict(zip(words[4::2], words[5::2], strict=False))
        assert options["--threads"] == "2"
        length = int(options["--prompt-tokens"])
        speeds = range(100, 1000, 100)  # the first prompt of a length is the slow one
        rows = [
            {"batch": int(batch), "times": [4.0, 5.0], "roofline": 3.0, "prefill": speed if length != 128 else 1}
            for batch, speed in zip(options["--batch"].split(","), speeds, strict=False)
        ]
        return json.dumps({"rows": rows})

    monkeypatch.setattr(compare_models, "output_of", output_of)
    measured = compare_models.run_xgdn(arguments(prompts=[64, 300]), quantize)
    decode = Measured([4.0, 5.0], 3.0)
    assert measured == {
        Case("decode", 1): decode,
        Case("decode", 8): decode,
        Case("prompt", 64): Measured([320.0]),
        Case("prompt", 300): Measured([1500.0]),
    }


def test_a_line_compares_with_xgdn_at_as_many_bits() -> None:
    case = Case("decode", 8)
    times = {
        ("xgdn bf16", 16): 80.0,
        ("xgdn int8", 8): 40.0,
        ("llama.cpp BF16", 16): 200.0,
        ("llama.cpp Q8_0", 8): 100.0,
    }
    figures = []
    for (name, bits), time in times.items():
        roofline = 30.0 if name.startswith("xgdn") else None
        rounds = [Measured([time - 1, time, time + 30], roofline), Measured([time], roofline)]
        figures.append(summarise(case, Provider(name, bits, dict), rounds))
    figures.append(summarise(Case("prompt", 2048), Provider("llama.cpp Q4_0", 4, dict), [Measured([4096.0])]))
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in table(figures).splitlines()[2:]]
    assert lines == [
        ["decode, batch 8", "xgdn bf16", "79.0", "80.0", "80.0 / 80.0", "100.0", "0.38", "1.00"],
        ["decode, batch 8", "xgdn int8", "39.0", "40.0", "40.0 / 40.0", "200.0", "0.75", "1.00"],
        ["decode, batch 8", "llama.cpp BF16", "199.0", "200.0", "200.0 / 200.0", "40.0", "", "2.50"],
        ["decode, batch 8", "llama.cpp Q8_0", "99.0", "100.0", "100.0 / 100.0", "80.0", "", "2.50"],
        ["prompt, 2,048 tokens", "llama.cpp Q4_0", "4,096.0", "4,096.0", "4,096.0", "500.0", "", ""],
    ]


def test_a_build_that_fails_says_where_and_shows_its_end(tmp_path: Path) -> None:
    log = tmp_path / "build.log"
    programs.run_logged([sys.executable, "-c", "print('the command before')"], log)
    script = "import sys; [print('line', i) for i in range(50)]; sys.exit(3)"
    with pytest.raises(SystemExit) as failed:
        programs.run_logged([sys.executable, "-c", script], log)
    first, *rest = str(failed.value).splitlines()
    assert first.endswith(f"ended with status 3, see {log}:")
    assert rest == [f"line {i}" for i in range(30, 50)]
    assert log.read_text().startswith("the command before\nline 0\n")
    with pytest.raises(SystemExit) as failed:
        programs.run_logged([sys.executable, "-c", "import sys; sys.exit('nothing else')"], log)
    assert str(failed.value).splitlines()[1:] == ["nothing else"]


def test_a_program_that_fails_shows_its_errors() -> None:
    with pytest.raises(SystemExit, match=r"(?s)ended with status 1:.*no such model"):
        programs.output_of([sys.executable, "-c", "import sys; print('rows'); sys.exit('no such model')"])


def test_llama_cpp_is_not_kept_where_its_build_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def download_fails(command: list[object], log: Path) -> None:
        log.write_text("")
        sys.exit("no such version")

    monkeypatch.setattr(model_llama_cpp.shutil, "which", lambda _: "cmake")
    monkeypatch.setattr(model_llama_cpp, "run_logged", download_fails)
    for _ in range(2):  # the second call starts again
        with pytest.raises(SystemExit, match="no such version"):
            model_llama_cpp.install(tmp_path)
    monkeypatch.setattr(model_llama_cpp.shutil, "which", lambda _: None)
    with pytest.raises(SystemExit, match=r"expected cmake and a C\+\+ compiler"):
        model_llama_cpp.install(tmp_path)


def test_files_of_a_checkpoint_are_made_once_and_again_after_it_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tmp_path / "model"
    model.mkdir()
    weights = model / "model.safetensors"
    weights.write_bytes(b"weights")
    made: list[str] = []

    def run_logged(command: list[object], log: Path) -> None:
        part = next(Path(str(word)) for word in command if str(word).endswith(".part"))
        part.write_text("")
        made.append(part.stem)

    monkeypatch.setattr(model_llama_cpp, "run_logged", run_logged)
    files = model_llama_cpp.checkpoint_files(tmp_path, model, ["Q4_0"])
    assert list(files) == ["Q4_0"]
    assert files["Q4_0"].exists()
    assert made == ["BF16", "Q4_0"]
    model_llama_cpp.checkpoint_files(tmp_path, model, ["BF16", "Q4_0"])
    assert made == ["BF16", "Q4_0"]
    os.utime(weights, ns=(0, 0))
    model_llama_cpp.checkpoint_files(tmp_path, model, ["Q8_0"])
    assert made == ["BF16", "Q4_0", "BF16", "Q8_0"]
