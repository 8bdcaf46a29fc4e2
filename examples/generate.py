# SPDX-License-Identifier: Apache-2.0
"""Continues two prompts of token ids with the model in a Hugging Face directory: generate.py MODEL."""

import sys

import xgdn

engine = xgdn.Engine(sys.argv[1])
for result in engine.generate([[1, 2, 3], [4, 5]], max_new_tokens=16):
    print(result.tokens, result.finish_reason.name)
