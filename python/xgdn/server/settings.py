# SPDX-License-Identifier: Apache-2.0
"""What an operator chooses about the server, beside the engine's arguments."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from xgdn.sampling_defaults import SamplingDefaults

if TYPE_CHECKING:
    from opentelemetry.trace import Tracer

    from xgdn.server.api_keys import ApiKey


@dataclass(frozen=True)
class Settings:
    model_dir: Path
    model_name: str
    max_queue: int = 256  # waiting sequences, in addition to the running ones
    max_body_bytes: int = 4 * 2**20
    api_keys: "Sequence[ApiKey]" = ()  # none: everybody may ask
    keep_alive_seconds: float = 15.0  # between comments in a stream that has no events; 0: none
    allowed_origins: Sequence[str] = ()  # of web pages that may call
    max_stored_responses: int = 1024  # of /v1/responses
    session_dir: Path | None = None  # for files of /v1/sessions; None: none are written or read
    max_sessions: int = 16  # open at once
    session_idle_seconds: float = 3600.0  # without a request, after which one is closed
    max_session_files: int = 64  # of a client
    tool_call_format: str = "auto"  # or a name of tool_call_formats.FORMATS
    has_reasoning: bool = True  # thoughts are told apart, if the template knows any
    sampling_defaults: SamplingDefaults = field(default_factory=SamplingDefaults)
    tracer: "Tracer | None" = None  # of OpenTelemetry
