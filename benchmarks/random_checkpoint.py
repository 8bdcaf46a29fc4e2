# SPDX-License-Identifier: Apache-2.0
"""Writes a checkpoint of Qwen3.5-0.8B's text model with random weights: the shape costs what the real one does.

    python benchmarks/random_checkpoint.py FOLDER

1.5 GB in bf16. Its tokenizer has a word for every id, so that every token is text of its own, as a server streams it.
"""

import argparse
from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers

QWEN3_5_0_8B = {
    "vocab_size": 248320,
    "hidden_size": 1024,
    "intermediate_size": 3584,
    "num_hidden_layers": 24,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 256,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 16,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "max_position_embeddings": 262144,
    "tie_word_embeddings": True,
}


def write_tokenizer(folder: Path, vocab_size: int) -> None:
    tokenizer = Tokenizer(models.WordLevel({f"word{i}": i for i in range(vocab_size)}, unk_token="word0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(folder / "tokenizer.json"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    model = transformers.Qwen3_5ForCausalLM(transformers.Qwen3_5TextConfig(**QWEN3_5_0_8B, dtype="bfloat16"))
    model.save_pretrained(folder)
    write_tokenizer(folder, model.config.vocab_size)


if __name__ == "__main__":
    main()
