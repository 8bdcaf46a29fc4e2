# SPDX-License-Identifier: Apache-2.0
"""Embeddings: the hidden state of a text's last token, from models that were trained for it."""

import base64
import math
import struct
from collections.abc import Sequence
from pathlib import Path

from pydantic_core import to_json

from xgdn.server.api_error import ApiError
from xgdn.server.schemas import EmbeddingBody
from xgdn.tokenizer_files import read_json, read_json_object

_MODULES = "modules.json"
_TRANSFORMER, _POOLING, _NORMALIZE = "Transformer", "Pooling", "Normalize"
_LAST_TOKEN = "pooling_mode_lasttoken"
_LEAST_NORM = 1e-12  # as torch.nn.functional.normalize


class Pooling:
    """What sentence-transformers' files in a model directory say of embeddings.

    `problem` says why the model makes none; empty where it does.

    Raises:
        ValueError: a file is damaged.
    """

    def __init__(self, model_dir: Path) -> None:
        self._normalizes = False
        self.problem = self._read(model_dir)

    def _read(self, model_dir: Path) -> str:
        modules = read_json(model_dir / _MODULES)
        if modules is None:
            return f"it has no {_MODULES}, which models for embeddings have"
        if not isinstance(modules, list) or not all(isinstance(module, dict) for module in modules):
            raise ValueError(f"{model_dir / _MODULES}: expected a list of objects")
        kinds = [str(module.get("type")).rsplit(".", 1)[-1] for module in modules]
        if kinds not in ([_TRANSFORMER, _POOLING], [_TRANSFORMER, _POOLING, _NORMALIZE]):
            return f"its {_MODULES} has {', '.join(kinds)}; served: {_TRANSFORMER}, {_POOLING} and {_NORMALIZE}"
        config = read_json_object(model_dir / str(modules[1].get("path", "")) / "config.json")
        modes = [name for name, value in config.items() if name.startswith("pooling_mode_") and value is True]
        if modes != [_LAST_TOKEN]:
            return f"it pools by {', '.join(modes) or 'nothing'}; served: {_LAST_TOKEN}"
        self._normalizes = _NORMALIZE in kinds
        return ""

    def check(self) -> None:
        """Raise ApiError where the model makes no embeddings."""
        if self.problem:
            raise ApiError(400, "no_embeddings", f"This model makes no embeddings: {self.problem}.", param="model")

    def embedding(self, hidden: Sequence[float]) -> list[float]:
        """Return the embedding of a hidden state, both `[hidden_size]`."""
        norm = math.sqrt(math.fsum(value * value for value in hidden)) if self._normalizes else 1.0
        return [value / max(norm, _LEAST_NORM) for value in hidden]

    def document(self, states: Sequence[Sequence[float]], num_tokens: int, body: EmbeddingBody) -> bytes:
        """Return the answer to a request, from a hidden state for each of its texts, which have `num_tokens`."""
        found = map(self.embedding, states)
        values = map(_base64, found) if body.encoding_format == "base64" else found
        data = [{"object": "embedding", "index": i, "embedding": value} for i, value in enumerate(values)]
        usage = {"prompt_tokens": num_tokens, "total_tokens": num_tokens}
        return to_json({"object": "list", "data": data, "model": body.model, "usage": usage})


def _base64(embedding: Sequence[float]) -> str:
    """Little-endian float32."""
    return base64.b64encode(struct.pack(f"<{len(embedding)}f", *embedding)).decode()
