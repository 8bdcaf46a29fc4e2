# SPDX-License-Identifier: Apache-2.0
"""Run the adapter's tests on npu tensors, in a process where torch_npu has registered the device.

on_npu.py LIBRARY [arguments of gtest]
"""

import ctypes
import sys

import torch_npu  # noqa: F401  registers the device and its ops


def main(library: str, arguments: list[str]) -> int:
    argv = [library.encode(), *(argument.encode() for argument in arguments), None]
    run = ctypes.CDLL(library).run_xllm_adapter_tests
    return int(run(b"npu:0", len(argv) - 1, (ctypes.c_char_p * len(argv))(*argv)))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2:]))
