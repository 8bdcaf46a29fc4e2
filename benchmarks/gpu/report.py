# SPDX-License-Identifier: Apache-2.0
"""What is said of the machine, and the file that keeps the figures."""

import datetime
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch

from xgdn.bench.report import machine


class _Row(Protocol):
    def document(self) -> dict[str, Any]: ...


def device_facts() -> dict[str, str | int]:
    """Return the card, the day, and the versions that decide speed."""
    return {
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda or "none",
    }


def write_json(path: Path, rows: Sequence[_Row], **more: object) -> None:
    document = {"machine": {**machine(), **device_facts()}, **more, "rows": [row.document() for row in rows]}
    path.write_text(json.dumps(document, indent=1) + "\n")
