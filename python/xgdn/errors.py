# SPDX-License-Identifier: Apache-2.0
"""Typed errors of the layer, models, engine and doctor.

`torch.ops.xgdn.*`, and with them `xgdn.ops` and the two functions with FLA's names, raise the Python built-ins that
these derive from: `ValueError`, `TypeError`, `IndexError`, `NotImplementedError` and `RuntimeError`.
"""

from xgdn._C import (
    CheckpointError,
    DeviceError,
    DtypeError,
    Error,
    GenerationError,
    MissingMetadataError,
    NumericsError,
    OutOfBlocks,
    OutOfMemory,
    OutOfSlots,
    RangeError,
    RankError,
    RequestError,
    ShapeError,
    StaleHandleError,
    StoppedError,
    UnsupportedError,
)

__all__ = [
    "CheckpointError",
    "DeviceError",
    "DtypeError",
    "Error",
    "GenerationError",
    "MissingMetadataError",
    "NumericsError",
    "OutOfBlocks",
    "OutOfMemory",
    "OutOfSlots",
    "RangeError",
    "RankError",
    "RequestError",
    "ShapeError",
    "StaleHandleError",
    "StoppedError",
    "UnsupportedError",
]
