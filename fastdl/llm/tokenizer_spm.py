"""Llama's SentencePiece kind (`tokenizer.ggml.model` = "llama"): merges from piece scores, with byte fallback.

SentencePiece joins the pair whose result has the highest score, the leftmost first. A pair's merge rank is therefore
the rank of its result's score; every way to cut a piece into two pieces is a merge. Blanks become U+2581, and one is
put before every stretch of text (the start, and after each special token: llama.cpp's rule) if the file asks for it.
Characters that are no piece become their UTF-8 bytes, <0x0A> and so on. Only normal and user-defined pieces are joined:
typing "</s>" letter by letter never gives the control token.
Test: pytest tests/test_tokenizer.py (llama.cpp's ids, and sentencepiece itself as the oracle)
"""

from __future__ import annotations

import numpy as np

from .gguf_metadata import Metadata, ModelFileError

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
SPACE = "\u2581"
MAX_SPLIT_WORK = 1 << 26  # sum of squared piece lengths; llama 2 has 1.4 million


def build(metadata: Metadata, tokens: list[str], vocabulary: dict[str, int], types, unknown_id: int | None):
    """A `tokenizers.Tokenizer` without special tokens. `tokens` by id, `vocabulary` token -> id, `types` by id."""
    from tokenizers import Tokenizer, models, normalizers

    unknown = tokens[unknown_id] if unknown_id is not None else None
    merges = _merges(metadata, tokens, vocabulary, types)
    model = models.BPE(vocabulary, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True)
    del merges
    tokenizer = Tokenizer(model)
    steps = [normalizers.Replace(" ", SPACE)]
    if metadata.value("tokenizer.ggml.add_space_prefix", bool, True):
        steps.insert(0, normalizers.Prepend(SPACE))
    tokenizer.normalizer = normalizers.Sequence(steps)
    return tokenizer


def _merges(metadata: Metadata, tokens: list[str], vocabulary: dict[str, int], types) -> list[tuple[str, str]]:
    scores = metadata.value("tokenizer.ggml.scores", np.ndarray)
    if len(scores) != len(tokens) or scores.dtype.kind not in "fi" or not np.isfinite(scores).all():
        raise ModelFileError(
            f"{metadata.source}: tokenizer.ggml.scores: expected {len(tokens)} finite numbers, one a token, "
            f"got {len(scores)} of {scores.dtype}"
        )
    work = sum(len(token) ** 2 for token in tokens)
    if work > MAX_SPLIT_WORK:
        longest = max(map(len, tokens))
        raise ModelFileError(
            f"{metadata.source}: tokenizer.ggml.tokens: absurdly long pieces (up to {longest} characters)"
        )

    kept = (types == NORMAL) | (types == USER_DEFINED)
    own = {token: token for token, index in vocabulary.items() if kept[index]}
    merges = []
    # Best score first; among the cuts of one piece the longest left part first, as transformers orders them.
    for index in np.argsort(-scores.astype(np.float64), kind="stable").tolist():
        piece = tokens[index]
        if not kept[index] or len(piece) < 2 or vocabulary[piece] != index:
            continue
        for cut in range(len(piece) - 1, 0, -1):
            left = own.get(piece[:cut])
            if left is not None:
                right = own.get(piece[cut:])
                if right is not None:
                    merges.append((left, right))
    return merges
