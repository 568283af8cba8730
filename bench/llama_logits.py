"""Logits of llama.cpp through llama-cpp-python, written as .npy. Runs under the peer's own interpreter:

    python bench/llama_logits.py MODEL IDS.npy OUT.npy THREADS

It imports nothing of this project, so that the peer can live in an environment of its own.
"""

import sys

import llama_cpp
import numpy as np


def main(model: str, ids_path: str, out_path: str, threads: str) -> None:
    ids = np.load(ids_path).tolist()
    lm = llama_cpp.Llama(
        model_path=model, n_ctx=len(ids), n_batch=512, n_threads=int(threads), n_threads_batch=int(threads),
        logits_all=True, verbose=False,
    )  # fmt: skip
    lm.eval(ids)
    np.save(out_path, np.asarray(lm.scores[: len(ids)], dtype=np.float32))


if __name__ == "__main__":
    main(*sys.argv[1:])
