"""Zaremba's language model: dropout on the non-recurrent connections alone lets a word-level LSTM generalize.

Two layers of 200 units read Python's documentation, 20 words at a time with carried state, once without dropout and
once with it: on the embedding, between the layers and before the scores, never from one step to the next. Both see the
same text in the same order; each counts with its best epoch on the same held-out part. The script fails if dropout does
not win.

    python examples/zaremba_lstm.py                   # some minutes
    python examples/zaremba_lstm.py --hidden 650 --dropout 0.65 --epochs 30

After Zaremba, Sutskever and Vinyals, "Recurrent Neural Network Regularization" (2014). Test: tests/test_examples.py
"""

from __future__ import annotations

import argparse
import math
import re
import sys
from collections import Counter
from pathlib import Path

import torch
from common import plot, progress, python_text
from torch import Tensor, nn

import fastdl


class WordModel(nn.Module):
    """Words [T, B] -> scores of the next ones [T, B, vocabulary]."""

    def __init__(self, vocabulary: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, hidden)
        self.layers = fastdl.nn.LSTM(hidden, hidden, num_layers=2, dropout=dropout)
        self.scores = nn.Linear(hidden, vocabulary)
        self.drop = nn.Dropout(dropout)
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -0.1, 0.1)

    def forward(self, words: Tensor, state=None):
        y, state = self.layers(self.drop(self.embedding(words)), state)
        return self.scores(self.drop(y)), state


def words_of(text: str, most: int) -> tuple[Tensor, list[str]]:
    """The text as numbers, and the vocabulary: words that occur twice at least, the ``most`` most frequent."""
    words = re.findall(r"[a-z_]+|[0-9]+|[^\sa-z0-9_]", text.lower())
    known = ["<unk>", *(word for word, count in Counter(words).most_common(most - 1) if count > 1)]
    number = {word: index for index, word in enumerate(known)}
    return torch.tensor([number.get(word, 0) for word in words]), known


def batches(words: Tensor, batch: int, length: int) -> list[tuple[Tensor, Tensor]]:
    """Texts that are read side by side, and what comes next: [length, batch] each."""
    columns = words[: len(words) // batch * batch].view(batch, -1).t()
    return [
        (columns[at : at + length], columns[at + 1 : at + 1 + length])
        for at in range(0, len(columns) - length - 1, length)
    ]


@torch.inference_mode()
def perplexity(model: WordModel, parts: list[tuple[Tensor, Tensor]]) -> float:
    model.eval()
    total, state = 0.0, None
    for words, following in parts:
        scores, state = model(words, state)
        total += nn.functional.cross_entropy(scores.flatten(0, 1), following.flatten()).item()
    return math.exp(total / len(parts))


def train(model: WordModel, train_parts, valid_parts, options: argparse.Namespace, name: str) -> list[float]:
    """Validation perplexity after each epoch."""
    optimizer, found = torch.optim.Adam(model.parameters(), lr=options.lr), []
    for epoch in range(options.epochs):
        model.train()
        state = None
        for words, following in progress(train_parts, desc=f"{name}, epoch {epoch + 1} of {options.epochs}"):
            state = state and tuple(s.detach() for s in state)
            scores, state = model(words, state)
            loss = nn.functional.cross_entropy(scores.flatten(0, 1), following.flatten())
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 5.0)
            optimizer.step()
        found.append(perplexity(model, valid_parts))
        print(f"{name}: epoch {epoch + 1}, validation perplexity {found[-1]:.1f}", flush=True)
    return found


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dropout", type=float, default=0.5)
    parser.add_argument("--hidden", type=int, default=200)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--batch", type=int, default=20, help="texts that are read side by side")
    parser.add_argument("--length", type=int, default=20, help="words a step")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--vocabulary", type=int, default=5000)
    parser.add_argument("--words", type=int, help="of the text; all by default")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--plot", type=Path, default=Path("zaremba_lstm.png"))
    options = parser.parse_args(arguments)

    words, known = words_of(python_text(), options.vocabulary)
    words = words[: options.words]
    cut = len(words) * 9 // 10
    parts = [batches(part, options.batch, options.length) for part in (words[:cut], words[cut:])]
    if not all(parts):
        parser.error("--words, --batch, --length: nothing is left to train or to validate on")
    print(f"{len(words)} words, {len(known)} different ones; the last tenth is held out")

    curves = {}
    for name, dropout in (("without dropout", 0.0), (f"dropout {options.dropout}", options.dropout)):
        torch.manual_seed(options.seed)
        curves[name] = train(WordModel(len(known), options.hidden, dropout), *parts, options, name)
    plain, dropped = (min(curve) for curve in curves.values())
    won = dropped < plain
    claim = "as claimed" if won else "NOT as claimed"
    print(f"best validation perplexity: {plain:.1f} without dropout, {dropped:.1f} with it: {claim}")
    plot(options.plot, curves, "epoch", "validation perplexity", "Dropout on non-recurrent connections")
    return 0 if won else 1


if __name__ == "__main__":
    sys.exit(main())
