# SPDX-License-Identifier: Apache-2.0
"""Writes a checkpoint as a GGUF file in bf16 by llama.cpp's own converter; run by model_llama_cpp.py.

    python convert_llama_cpp.py LLAMA_CPP_SOURCE MODEL OUT

The file has no vocabulary, only its size: the converter refuses tokenizers that it does not know, and the benchmarks
draw token ids.
"""

import sys
from typing import Any


def without_vocabulary(model_class: Any) -> Any:
    def set_vocab(self: Any) -> None:
        self.gguf_writer.add_tokenizer_model("none")
        self.gguf_writer.add_vocab_size(self.hparams["vocab_size"])

    model_class.set_vocab = set_vocab
    return model_class


def main() -> None:
    source, model, out = sys.argv[1:]
    sys.path.insert(0, source)  # which has a `gguf` of its own
    import convert_hf_to_gguf as converter

    get_model_class = converter.get_model_class
    converter.get_model_class = lambda *args, **kwargs: without_vocabulary(get_model_class(*args, **kwargs))
    sys.argv = ["convert_hf_to_gguf.py", model, "--outfile", out, "--outtype", "bf16", "--no-mtp"]
    converter.main()


if __name__ == "__main__":
    main()
