# SPDX-License-Identifier: Apache-2.0
"""Includes point down only, in core/kernels too; backends do not know each other; one file knows what a build has."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LEVELS = (
    "core/kernels",
    "core/layers",
    "core/models",
    "core/checkpoint",
    "core/runtime",
    "bindings",
)  # from the bottom up
FREE_FOR_ALL = {"core/errors.h"}
# What other levels may include of the kernels.
KERNEL_API = {"core/kernels/ops_api.h", "core/kernels/chunk_metadata.h"}
BACKENDS = ("reference", "cpu", "cuda", "npu")
# Inside the kernels, from the bottom up: the contract of the ops, compositions of ATen, the backends, dispatch.
KERNEL_FOLDERS = (("", "ops"), ("aten",), BACKENDS, ("dispatch",))
# The one file that sees a backend from outside, and of a backend its header alone.
REGISTRY = "core/kernels/dispatch/registry.cpp"
BACKEND_HEADERS = {f"core/kernels/{name}/{name}_backend.h" for name in BACKENDS}

# The headers that are installed, in core/install.cmake.
PUBLIC_HEADERS = {
    f"core/{header}" for header in re.findall(r"^  (\S+\.h)$", (ROOT / "core/install.cmake").read_text(), re.MULTILINE)
}

SOURCES = sorted(
    path.relative_to(ROOT).as_posix()
    for folder in ("core", "bindings")
    for path in (ROOT / folder).rglob("*")
    if path.suffix in {".h", ".cpp", ".cu", ".cuh"}
)


def includes(source: str) -> list[str]:
    """The project's files that `source` includes, as paths from the root."""
    return re.findall(r'^\s*#\s*include\s+"((?:core|bindings)/[^"]+)"', (ROOT / source).read_text(), re.MULTILINE)


def level(path: str) -> int | None:
    return next((i for i, folder in enumerate(LEVELS) if path.startswith(folder + "/")), None)


def backend_of(path: str) -> str | None:
    return next((name for name in BACKENDS if path.startswith(f"core/kernels/{name}/")), None)


def kernel_folder(path: str) -> str | None:
    """The folder below core/kernels that `path` is in, "" for core/kernels itself, None elsewhere."""
    parts = path.split("/")
    if parts[:2] != ["core", "kernels"]:
        return None
    return parts[2] if len(parts) > 3 else ""


def kernel_rank(path: str) -> int | None:
    return next((i for i, folders in enumerate(KERNEL_FOLDERS) if kernel_folder(path) in folders), None)


def violations(source: str, included: list[str]) -> list[str]:
    found = []
    own_level, own_backend = level(source), backend_of(source)
    for path in included:
        if path in FREE_FOR_ALL:
            continue
        other = level(path)
        if own_level is None or other is None:
            found.append(f"{source} includes {path}, which belongs to no level")
            continue
        if other > own_level:
            found.append(f"{source} includes {path}, which is above it")
        if other == 0 and own_level > 0 and path not in KERNEL_API:
            found.append(f"{source} includes {path}; of the kernels only ops_api.h is for others")
        if own_level == other == 0:
            own_rank, other_rank = kernel_rank(source), kernel_rank(path)
            if own_rank is None or other_rank is None:
                found.append(f"{source} includes {path}, and one of them is in no known folder of core/kernels")
            elif other_rank > own_rank:
                found.append(f"{source} includes {path}, which is above it")
        other_backend = backend_of(path)
        is_registered = source == REGISTRY and path in BACKEND_HEADERS
        if other_backend is not None and other_backend != own_backend and not is_registered:
            found.append(f"{source} includes {path}, which belongs to the {other_backend} backend")
    return found


def test_there_is_something_to_check() -> None:
    assert {"core/kernels/ops_api.h", REGISTRY} <= set(SOURCES)
    assert any(includes(source) for source in SOURCES)
    assert {"core/errors.h", "core/runtime/engine.h"} <= PUBLIC_HEADERS


def test_includes() -> None:
    assert {source: found for source in SOURCES if (found := violations(source, includes(source)))} == {}


def public_kernel_headers() -> list[str]:
    """ops_api.h and what it includes of the kernels."""
    found = ["core/kernels/ops_api.h"]
    for header in found:
        found += [path for path in includes(header) if path not in FREE_FOR_ALL and path not in found]
    return found


# The words for devices, but for a function whose name is that of the device's own op.
DEVICE_WORDS = re.compile(r"(?<![A-Za-z_])(?:cpu|gpu|cuda|npu|ascend|nvidia|x86|arm)s?(?![A-Za-z_(])", re.IGNORECASE)


@pytest.mark.parametrize("header", public_kernel_headers())
def test_the_ops_name_no_device(header: str) -> None:
    assert header.startswith("core/kernels/")
    assert DEVICE_WORDS.findall((ROOT / header).read_text()) == []


def test_a_device_would_be_found() -> None:
    assert len(public_kernel_headers()) > 8
    assert DEVICE_WORDS.findall("on the cpu backend; spares CUDA; c10::kCPU; cu_seqlens_cpu; npu_op(p)") == [
        "cpu",
        "CUDA",
    ]


@pytest.mark.parametrize("header", sorted(PUBLIC_HEADERS))
def test_public_headers_include_public_headers_alone(header: str) -> None:
    assert set(includes(header)) <= PUBLIC_HEADERS
    assert "nlohmann" not in (ROOT / header).read_text(), "a private dependency"


def test_own_files_are_included_by_their_path_from_the_root() -> None:
    for source in SOURCES:
        quoted = re.findall(r'^\s*#\s*include\s+"([^"]+)"', (ROOT / source).read_text(), re.MULTILINE)
        wrong = [path for path in quoted if not (ROOT / path).is_file() and not path.startswith("hwy/")]
        assert wrong == [], source


def test_only_the_registry_asks_what_is_built() -> None:
    asks = re.compile(r"^\s*#\s*(?:if|ifdef|ifndef|elif).*XGDN_WITH_.*$", re.MULTILINE)
    assert [source for source in SOURCES if asks.search((ROOT / source).read_text())] in ([REGISTRY], [])


def test_the_core_knows_no_python() -> None:
    # torch keeps its process groups, which know no Python either, beside its bindings.
    python = re.compile(
        r'#\s*include\s*[<"](?:Python\.h|nanobind/|pybind11/|torch/csrc/(?!distributed/c10d/)|torch/extension|torch/all)'
    )
    core = [source for source in SOURCES if source.startswith("core/")]
    assert core
    assert [source for source in core if python.search((ROOT / source).read_text())] == []


@pytest.mark.parametrize(
    ("source", "path", "word"),
    [
        ("core/kernels/dispatch/dispatch.cpp", "core/layers/gdn_batch.h", "above"),
        ("core/layers/linear.cpp", "core/kernels/backend.h", "only ops_api.h"),
        ("core/kernels/cpu/cpu_backend.cpp", "core/kernels/reference/delta_rule_head.h", "reference backend"),
        (REGISTRY, "core/kernels/cpu/simd-inl.h", "cpu backend"),
        ("core/kernels/dispatch/doctor.cpp", "core/kernels/cpu/cpu_backend.h", "cpu backend"),
        ("core/kernels/cpu/cpu_backend.cpp", "core/kernels/dispatch/dims.h", "above"),
        ("core/kernels/aten/indexing.cpp", "core/kernels/dispatch/dims.h", "above"),
        ("core/kernels/aten/indexing.cpp", "core/kernels/cpu/cpu_backend.h", "above"),
        ("core/kernels/backend.h", "core/kernels/aten/indexing.h", "above"),
        ("core/kernels/strange/strange.cpp", "core/kernels/backend.h", "no known folder"),
        ("core/runtime/engine.cpp", "bindings/module.h", "above"),
        ("core/checkpoint/load_report.cpp", "core/runtime/engine.h", "above"),
        ("core/models/hybrid_decoder.cpp", "core/checkpoint/checkpoint.h", "above"),
        ("core/kernels/dispatch/dispatch.cpp", "core/strange.h", "no level"),
    ],
)
def test_a_violation_would_be_found(source: str, path: str, word: str) -> None:
    assert any(word in sentence for sentence in violations(source, [path]))
