# SPDX-License-Identifier: Apache-2.0
"""The tokenizer of a model directory: tokenizer.json, and the names of special tokens in the files beside it."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer


def load_tokenizer(model_dir: Path) -> Tokenizer:
    """Read tokenizer.json for whole texts: its truncation and padding are meant for training and ignored.

    Raises:
        ValueError: the file cannot be read.
    """
    path = model_dir / "tokenizer.json"
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises no narrower type
        raise ValueError(f"{path}: {error}") from None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def read_json(path: Path) -> Any:
    """Return what is in a JSON file; None if there is no such file.

    Raises:
        ValueError: it is damaged.
    """
    if not path.is_file():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: {error}") from None


def read_json_object(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file; empty if there is no such file.

    Raises:
        ValueError: it is damaged, or something else than an object.
    """
    document = {} if not path.is_file() else read_json(path)
    if not isinstance(document, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(document).__name__}")
    return document


def read_tokenizer_config(model_dir: Path) -> dict[str, Any]:
    """Return tokenizer_config.json, with the special tokens that older directories keep in special_tokens_map.json.

    Raises:
        ValueError: a file is damaged.
    """
    config = read_json_object(model_dir / "tokenizer_config.json")
    if "added_tokens_decoder" in config:
        return config
    return {**config, **read_json_object(model_dir / "special_tokens_map.json")}


def token_names(entry: object) -> list[str]:
    """Return the names in an entry of tokenizer_config.json: a name, an object with one, or a list of these."""
    if isinstance(entry, list):
        return [name for part in entry for name in token_names(part)]
    if isinstance(entry, Mapping):
        entry = entry.get("content")
    return [entry] if isinstance(entry, str) and entry else []


def eos_token_ids(model_dir: Path, tokenizer: Tokenizer) -> list[int]:
    """Return the tokens that end a text or a turn according to the tokenizer, apart from the model's own.

    Raises:
        ValueError: tokenizer_config.json is damaged.
    """
    names = token_names(read_tokenizer_config(model_dir).get("eos_token"))
    return [token for name in names if (token := tokenizer.token_to_id(name)) is not None]
