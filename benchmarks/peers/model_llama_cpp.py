# SPDX-License-Identifier: Apache-2.0
"""llama.cpp with its own programs: it is built here, converts and quantises the checkpoint, and measures itself.

The source distribution of llama-cpp-python carries llama.cpp with its converter and benchmarks. Only the C++ programs
are built, for the processor of this machine and without a GPU; everything else is at its default.
"""

import hashlib
import json
import os
import shutil
import sys
import tarfile
from collections.abc import Sequence
from pathlib import Path

from peers.programs import output_of, run_logged

NAME = "llama-cpp-python"
VERSION = "0.3.36"
FORMATS = {16: "BF16", 8: "Q8_0", 4: "Q4_0"}  # by bits of a weight
PROGRAMS = ("llama-bench", "llama-batched-bench", "llama-quantize")
CMAKE_OPTIONS = (
    "-DCMAKE_BUILD_TYPE=Release",
    "-DBUILD_SHARED_LIBS=OFF",
    "-DGGML_NATIVE=ON",
    "-DLLAMA_CURL=OFF",
    "-DLLAMA_OPENSSL=OFF",
)
# GCC 12 takes only 8 of the 64 bytes of a tile configuration for read and drops the rest, which ends in SIGILL on
# processors with AMX: https://github.com/ggml-org/llama.cpp/pull/26954
AMX_SOURCE = "ggml/src/ggml-cpu/amx/mmq.cpp"
LOAD_CONFIG = "_tile_loadconfig(&tc);"
KEEP_CONFIG = '__asm__ volatile("" : : "m"(tc)); '
CONVERTER = Path(__file__).with_name("convert_llama_cpp.py")
CONTEXT_MULTIPLE = 256  # the context of a sequence is rounded up to it


def install(peers: Path) -> Path:
    """Return a folder in `peers` with llama.cpp's source and programs, built at the first call (minutes)."""
    folder = peers / f"llama-cpp-{VERSION}"
    if folder.exists():
        return folder
    if shutil.which("cmake") is None:
        sys.exit("llama.cpp is built from source: expected cmake and a C++ compiler, found no cmake")
    part = folder.with_name(f"{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    log = folder.with_name(f"{folder.name}.log")
    pip = (sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary", NAME, "--dest", part)
    log.unlink(missing_ok=True)
    run_logged([*pip, f"{NAME}=={VERSION}"], log)
    (archive,) = part.glob("*.tar.gz")
    with tarfile.open(archive) as packed:
        packed.extractall(part, filter="data")
    archive.unlink()
    (unpacked,) = part.glob("*/vendor/llama.cpp")
    unpacked.rename(part / "source")
    shutil.rmtree(unpacked.parents[1])
    tiles = part / "source" / AMX_SOURCE
    tiles.write_text(tiles.read_text().replace(LOAD_CONFIG, KEEP_CONFIG + LOAD_CONFIG))
    run_logged(["cmake", "-S", part / "source", "-B", part / "build", *CMAKE_OPTIONS], log)
    build = ("cmake", "--build", part / "build", "--parallel", str(os.cpu_count() or 1))
    run_logged([*build, "--target", *PROGRAMS], log)
    programs = part / "bin"
    programs.mkdir()
    for name in PROGRAMS:
        shutil.copy2(part / "build/bin" / name, programs)
    shutil.rmtree(part / "build")
    part.rename(folder)
    return folder


def checkpoint_files(folder: Path, model: Path, names: Sequence[str]) -> dict[str, Path]:
    """Return `model` as a GGUF file of each of the named formats, converted and quantised at the first call."""
    cache = folder / f"gguf-{fingerprint(model)}"
    cache.mkdir(exist_ok=True)
    log = cache / "convert.log"
    files = {name: cache / f"{name}.gguf" for name in ("BF16", *names)}
    for name, file in files.items():
        if file.exists():
            continue
        part = file.with_suffix(".part")
        if name == "BF16":
            run_logged([sys.executable, CONVERTER, folder / "source", model, part], log)
        else:
            run_logged([folder / "bin/llama-quantize", files["BF16"], part, name], log)
        part.rename(file)
    return {name: files[name] for name in names}


def fingerprint(model: Path) -> str:
    """Return a name for the checkpoint in `model`: another one as soon as one of its files is written again."""
    files = sorted([*model.resolve().glob("*.json"), *model.resolve().glob("*.safetensors")])
    seen = [f"{file} {file.stat().st_size} {file.stat().st_mtime_ns}" for file in files]
    return hashlib.sha256("\n".join(seen).encode()).hexdigest()[:12]


def decode(
    folder: Path, file: Path, *, threads: int, prompt_tokens: int, steps: int, batches: Sequence[int]
) -> dict[int, float]:
    """Return the mean milliseconds of a step by batch size; the tokens are drawn, nothing is sampled."""
    length = -(-(prompt_tokens + steps) // CONTEXT_MULTIPLE) * CONTEXT_MULTIPLE
    sizes = ("-c", max(batches) * length, "-npp", prompt_tokens, "-ntg", steps, "-npl", ",".join(map(str, batches)))
    cpu = ("-m", file, "-t", threads, "-tb", threads, "-ngl", 0)
    output = output_of([folder / "bin/llama-batched-bench", *cpu, *sizes, "--output-format", "jsonl"])
    times = step_times(output)
    if missing := set(batches) - set(times):
        sys.exit(
            f"llama-batched-bench: expected batches of {sorted(batches)}, got none of {sorted(missing)}:\n{output}"
        )
    return times


def prompts(
    folder: Path, file: Path, *, threads: int, lengths: Sequence[int], repetitions: int
) -> dict[int, list[float]]:
    """Return the milliseconds of prompts by their length; one before them is not timed."""
    if not lengths:
        return {}
    sizes = ("-p", ",".join(map(str, lengths)), "-n", 0, "-r", repetitions)
    cpu = ("-m", file, "-t", threads, "-ngl", 0)
    return prompt_times(output_of([folder / "bin/llama-bench", *cpu, *sizes, "-o", "json"]))


def step_times(output: str) -> dict[int, float]:
    """Return the mean milliseconds of a step by batch size, from `llama-batched-bench --output-format jsonl`."""
    rows = [json.loads(line) for line in output.splitlines() if line.startswith("{")]
    return {row["pl"]: 1e3 * row["t_tg"] / row["tg"] for row in rows}


def prompt_times(output: str) -> dict[int, list[float]]:
    """Return the milliseconds by length of the prompt, from `llama-bench -o json`."""
    rows = json.loads(output)
    return {row["n_prompt"]: [1e-6 * sample for sample in row["samples_ns"]] for row in rows if row["n_gen"] == 0}
