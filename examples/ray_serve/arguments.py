# SPDX-License-Identifier: Apache-2.0
"""What `serve run` takes behind the name of the application, as NAME=VALUE."""

from pathlib import Path
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from xgdn.engine import EngineArgs
from xgdn.sampling_defaults import read_sampling_defaults
from xgdn.server.api_keys import read_api_keys
from xgdn.server.settings import Settings


class Arguments(BaseModel):
    """All but `model` have defaults. A path must be the same on every node."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: Path  # directory with config.json, safetensors and tokenizer.json
    model_name: str | None = None  # for clients; None: the directory's name
    dtype: Literal["float32", "bfloat16", "float16"] | None = None  # None: the checkpoint's
    threads: int = Field(1, ge=1)  # of a replica, which is also how many CPUs Ray sets aside for it
    max_batch_size: int = Field(32, ge=1)  # sequences of a replica at once; further requests wait in the gateway
    max_cached_tokens: int = Field(EngineArgs().max_cached_tokens, ge=1)  # of a replica
    prefix_cache_slots: int = Field(32, ge=0)  # of a replica
    api_keys_file: Path | None = None  # as --api-keys-file of `xgdn serve`; limits count for each replica
    max_body_bytes: int = Field(Settings.max_body_bytes, ge=1)

    min_replicas: int = Field(1, ge=1)
    max_replicas: int = Field(2, ge=1)
    target_requests: float = Field(8, gt=0)  # of a replica at once, to which Ray Serve scales
    upscale_seconds: float = Field(10, ge=0)  # of more requests before a replica is added
    downscale_seconds: float = Field(600, ge=0)  # of fewer before one, and what it has cached, is given up
    shutdown_seconds: float = Field(30, ge=0)  # for running requests of a replica that is given up

    routing: Literal["prefix", "load"] = "prefix"  # load: Ray Serve's own, which knows nothing of prompts
    max_imbalance: int = Field(4, ge=1)  # requests by which a replica may be busier and still be sent its own
    max_queue: int = Field(Settings.max_queue, ge=1)  # requests that wait for a replica
    wait_seconds: float = Field(60, gt=0)  # that a request waits for a replica
    scrape_seconds: float = Field(5, gt=0)  # that /metrics waits for replicas

    @field_validator("model", "api_keys_file")
    @classmethod
    def _absolute(cls, path: Path | None) -> Path | None:
        return None if path is None else path.resolve()  # processes of Ray have other working directories

    @model_validator(mode="after")
    def _check(self) -> "Arguments":
        if self.max_replicas < self.min_replicas:
            raise ValueError(
                f"max_replicas: expected at least min_replicas, {self.min_replicas}, got {self.max_replicas}"
            )
        return self

    def engine_args(self) -> EngineArgs:
        return EngineArgs(
            dtype=None if self.dtype is None else getattr(torch, self.dtype),
            max_batch_size=self.max_batch_size,
            max_cached_tokens=self.max_cached_tokens,
            prefix_cache_slots=self.prefix_cache_slots,
        )

    def settings(self) -> Settings:
        """Raises ValueError or OSError for a file that cannot be read."""
        return Settings(
            model_dir=self.model,
            model_name=self.model_name or self.model.name,
            max_body_bytes=self.max_body_bytes,
            api_keys=[] if self.api_keys_file is None else read_api_keys(self.api_keys_file),
            sampling_defaults=read_sampling_defaults("auto", self.model),
        )
