"""Karpathy's character model: an RNN, an LSTM and a LayerNorm-LSTM learn to write Python's documentation.

Each is trained twice from the same seed on the same batches, once with fastdl's layer and once with torch's (torch has
no LayerNorm-LSTM: there a loop over time in plain torch). The loss curves must agree; the script fails where they do
not. Then fastdl's model writes a text of its own, and a plot of the losses is drawn.

    python examples/char_rnn.py                       # 200 steps each, about a minute
    python examples/char_rnn.py --steps 2000 --kinds lstm --temperature 0.7

After Karpathy, "The Unreasonable Effectiveness of Recurrent Neural Networks" (2015). Test: tests/test_examples.py
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from common import plot, progress, python_text
from torch import Tensor, nn

import fastdl


class PlainLayerNormLSTM(nn.Module):
    """What fastdl.nn.LSTM(layer_norm=True) computes, a step at a time in plain torch, with the same parameters."""

    def __init__(self, input_size: int, hidden_size: int) -> None:
        super().__init__()
        for name, parameter in fastdl.nn.LSTM(input_size, hidden_size, layer_norm=True).named_parameters():
            setattr(self, name, nn.Parameter(parameter.detach().clone()))

    def forward(self, x: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """x [T, B, I], state: two of [1, B, H]"""

        def norm(u: Tensor, weight: Tensor) -> Tensor:
            return nn.functional.layer_norm(u, u.shape[-1:], weight)

        h, c, outputs = state[0][0], state[1][0], []
        products = norm(x @ self.weight_ih_l0.t(), self.weight_ln_ih_l0) + self.bias_ih_l0 + self.bias_hh_l0
        for now in products:
            i, f, g, o = (now + norm(h @ self.weight_hh_l0.t(), self.weight_ln_hh_l0)).chunk(4, -1)
            c = f.sigmoid() * c + i.sigmoid() * g.tanh()
            h = o.sigmoid() * (norm(c, self.weight_ln_c_l0) + self.bias_ln_c_l0).tanh()
            outputs.append(h)
        return torch.stack(outputs), (h[None], c[None])


KINDS = {
    # name: fastdl's layer, torch's layer
    "rnn": (fastdl.nn.RNN, nn.RNN),
    "lstm": (fastdl.nn.LSTM, nn.LSTM),
    "layernorm-lstm": (lambda *sizes: fastdl.nn.LSTM(*sizes, layer_norm=True), PlainLayerNormLSTM),
}


class CharacterModel(nn.Module):
    """Characters [T, B] -> scores of the next ones [T, B, vocabulary]; the state goes in and comes out."""

    def __init__(self, make, vocabulary: int, hidden: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, hidden)
        self.layer = make(hidden, hidden)
        self.scores = nn.Linear(hidden, vocabulary)
        self.hidden, self.pair = hidden, not isinstance(self.layer, (nn.RNN, fastdl.nn.RNN))

    def start(self, batch: int):
        zeros = torch.zeros(1, batch, self.hidden)
        return (zeros, zeros) if self.pair else zeros

    def forward(self, characters: Tensor, state):
        y, state = self.layer(self.embedding(characters), state)
        return self.scores(y), state


def train(model: CharacterModel, streams: Tensor, options: argparse.Namespace, name: str) -> list[float]:
    """streams [B, characters]: each row is read on and on, its state carried over. Returns the loss of each step."""
    optimizer = torch.optim.Adam(model.parameters(), lr=options.lr)
    state, losses, span = model.start(len(streams)), [], streams.shape[1] - 1
    bar = progress(range(options.steps), desc=name)
    for step in bar:
        at = step * options.length % max(1, span - options.length)
        text = streams[:, at : at + options.length + 1].t()
        state = tuple(s.detach() for s in state) if model.pair else state.detach()
        scores, state = model(text[:-1], state)
        loss = nn.functional.cross_entropy(scores.flatten(0, 1), text[1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
        if hasattr(bar, "set_postfix"):
            bar.set_postfix(loss=f"{losses[-1]:.3f}", refresh=False)
    return losses


@torch.inference_mode()
def write(model: CharacterModel, characters: list[str], count: int, temperature: float) -> str:
    """A text of ``count`` characters, one at a time."""
    model.eval()
    state, at, written = model.start(1), torch.zeros(1, 1, dtype=torch.int64), []
    for _ in range(count):
        scores, state = model(at, state)
        at = torch.multinomial((scores[0] / temperature).softmax(-1), 1)
        written.append(characters[int(at)])
    return "".join(written)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--batch", type=int, default=16, help="texts that are read side by side")
    parser.add_argument("--length", type=int, default=32, help="characters a step")
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--tolerance", type=float, default=0.02, help="how far losses may differ, as a share")
    parser.add_argument("--sample", type=int, default=300, help="characters to write")
    parser.add_argument("--temperature", type=float, default=0.8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--plot", type=Path, default=Path("char_rnn.png"))
    options = parser.parse_args(arguments)

    text = python_text()
    characters = sorted(set(text))
    codes = {character: code for code, character in enumerate(characters)}
    data = torch.tensor([codes[character] for character in text])
    streams = data[: len(data) // options.batch * options.batch].view(options.batch, -1)
    print(f"{len(text)} characters, {len(characters)} different ones")

    curves, agree = {}, True
    for kind in options.kinds:
        models = []
        for library, make in zip(("fastdl", "torch"), KINDS[kind], strict=True):
            torch.manual_seed(options.seed)
            models.append(CharacterModel(make, len(characters), options.hidden))
            curves[f"{library} {kind}"] = train(models[-1], streams, options, f"{library} {kind}")
        ours, theirs = (torch.tensor(curves[f"{library} {kind}"]) for library in ("fastdl", "torch"))
        apart = ((ours - theirs).abs() / theirs).max().item()
        agree = agree and apart <= options.tolerance
        verdict = "agree" if apart <= options.tolerance else "DIFFER"
        print(
            f"{kind}: loss {ours[0]:.3f} -> {ours[-1]:.3f} (torch's {theirs[-1]:.3f}), {apart:.2%} apart: curves {verdict}"
        )
        if options.sample:
            torch.manual_seed(options.seed)
            print("-" * 80, write(models[0], characters, options.sample, options.temperature), "-" * 80, sep="\n")
    plot(options.plot, curves, "step", "loss, nats a character", "Character models on Python's documentation")
    return 0 if agree else 1


if __name__ == "__main__":
    sys.exit(main())
