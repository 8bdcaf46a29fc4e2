# SPDX-License-Identifier: Apache-2.0
"""Saves a small random Qwen3.5 model to a folder and prints what transformers generates: tiny_model.py DIR TOKEN..."""

import sys

import torch
from transformers import Qwen3_5ForCausalLM, Qwen3_5TextConfig


def main(folder: str, prompt: list[int]) -> None:
    torch.manual_seed(0)
    config = Qwen3_5TextConfig(
        vocab_size=128,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        linear_key_head_dim=16,
        linear_value_head_dim=16,
    )
    model = Qwen3_5ForCausalLM(config).eval()
    model.save_pretrained(folder)
    ids = model.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=16, min_new_tokens=16)
    print(*ids[0, len(prompt) :].tolist())


if __name__ == "__main__":
    main(sys.argv[1], [int(token) for token in sys.argv[2:]])
