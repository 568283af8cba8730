"""Language models from GGUF files: load, generate, chat, perplexity.

    from fastdl import llm
    lm = llm.load("model.gguf")
    print(lm.generate("The capital of France is", max_new_tokens=8))

`load` makes an `LM` (fastdl/llm/model.py); the file is read by gguf.py, its settings by config.py, its weights by
weights.py; generate.py holds the loop, sampling.py the choice of a token. Needs the extra "llm" (tokenizers, jinja2,
tqdm, gguf, safetensors).
"""

from __future__ import annotations

from .gguf import ModelFileError
from .load import load

__all__ = ["ModelFileError", "load"]
