# SPDX-License-Identifier: Apache-2.0
"""What an operator chooses about the server, beside the engine's arguments."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from xgdn.sampling_defaults import SamplingDefaults


@dataclass(frozen=True)
class Settings:
    model_dir: Path
    model_name: str
    max_queue: int = 256  # waiting sequences, in addition to the running ones
    max_body_bytes: int = 4 * 2**20
    api_key: str | None = None
    allowed_origins: Sequence[str] = ()  # of web pages that may call
    sampling_defaults: SamplingDefaults = field(default_factory=SamplingDefaults)
