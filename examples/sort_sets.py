"""Read, process, write: a network sorts sets of numbers and does not care in which order they come.

Read: each number is embedded for itself. Process: an LSTM without inputs looks at the memories again and again through
AdditiveAttention; what it found depends on the set, not on its order. Write: an LSTM, started from there, looks once
more (a glimpse) and points at the numbers in order with PointerAttention; positions that were chosen are masked. Keys
are projected once for all steps.

The script fails where too few of the held-out sets are sorted, or where a permutation of the input changes what comes
out.

    python examples/sort_sets.py                       # some minutes
    python examples/sort_sets.py --count 15 --process 10 --steps 10000

After Vinyals, Bengio and Kudlur, "Order Matters: Sequence to Sequence for Sets" (2016). Test: tests/test_examples.py
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from common import at_least, fit, plot
from torch import Tensor, nn

import fastdl


class ReadProcessWrite(nn.Module):
    """Sets [B, N] -> log-probabilities [B, N, N]: which number comes first, second, ..."""

    def __init__(self, hidden: int, process: int) -> None:
        super().__init__()
        self.process_steps = process
        self.read = nn.Sequential(nn.Linear(1, hidden), nn.ReLU(), nn.Linear(hidden, hidden))
        self.process = fastdl.nn.LSTMCell(hidden, hidden)
        self.look = fastdl.nn.AdditiveAttention(hidden, hidden, hidden)
        self.write = fastdl.nn.LSTM(hidden, hidden, batch_first=True)
        self.glimpse = fastdl.nn.AdditiveAttention(hidden, hidden, hidden)
        self.point = fastdl.nn.PointerAttention(2 * hidden, hidden, hidden)
        self.start = nn.Parameter(torch.randn(1, 1, hidden) / hidden**0.5)

    def encode(self, numbers: Tensor):
        """numbers [B, N] -> memories [B, N, hidden], keys of glimpse and pointer, the state of the write block"""
        memories = self.read(numbers[..., None])
        look_keys = self.look.project_keys(memories)
        h = c = found = memories.new_zeros(len(numbers), memories.shape[2])
        for _ in range(self.process_steps):
            h, c = self.process(found, (h, c))  # no input but what it found itself
            found = self.look(h, None, memories, projected_keys=look_keys)
        keys = self.glimpse.project_keys(memories), self.point.project_keys(memories)
        return memories, *keys, ((h + found)[None], c[None])

    def _point(self, y: Tensor, memories: Tensor, glimpse_keys: Tensor, point_keys: Tensor, chosen: Tensor) -> Tensor:
        """y [B, Q, hidden] -> log-probabilities [B, Q, N]"""
        seen = self.glimpse(y, None, memories, mask=~chosen, projected_keys=glimpse_keys)
        return self.point(torch.cat([y, seen], 2), None, chosen=chosen, projected_keys=point_keys)

    def forward(self, numbers: Tensor, order: Tensor) -> Tensor:
        """With a teacher: order [B, N] are the positions from the least number to the greatest."""
        memories, *keys, state = self.encode(numbers)
        fed = memories.gather(1, order[:, :-1, None].expand(-1, -1, memories.shape[2]))
        y, _ = self.write(torch.cat([self.start.expand(len(numbers), 1, -1), fed], 1), state)
        before = nn.functional.one_hot(order, numbers.shape[1]).cumsum(1)
        chosen = nn.functional.pad(before, (0, 0, 1, 0))[:, :-1].bool()  # by the queries before
        return self._point(y, memories, *keys, chosen)

    @torch.inference_mode()
    def sort(self, numbers: Tensor) -> Tensor:
        """numbers [B, N] -> the same ones in the order in which the network points at them"""
        (batch, count), rows = numbers.shape, torch.arange(len(numbers))
        memories, *keys, state = self.encode(numbers)
        chosen, fed, order = torch.zeros(batch, 1, count, dtype=torch.bool), self.start.expand(batch, 1, -1), []
        for _ in range(count):
            y, state = self.write(fed, state)
            best = self._point(y, memories, *keys, chosen)[:, 0].argmax(1)
            chosen[rows, 0, best] = True
            fed = memories[rows, best][:, None]
            order.append(best)
        return numbers.gather(1, torch.stack(order, 1))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=at_least(1), default=10, help="numbers of a set")
    parser.add_argument("--process", type=at_least(0), default=5, help="steps of the process block")
    parser.add_argument("--steps", type=at_least(0), default=1500)
    parser.add_argument("--hidden", type=at_least(1), default=128)
    parser.add_argument("--batch", type=at_least(1), default=128)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--held-out", type=at_least(1), default=1000, help="sets to be judged by")
    parser.add_argument("--goal", type=float, default=0.9, help="least share of sets that are sorted")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--plot", type=Path, default=Path("sort_sets.png"))
    options = parser.parse_args(arguments)

    torch.manual_seed(options.seed)
    model = ReadProcessWrite(options.hidden, options.process)

    def loss_of() -> Tensor:
        numbers = torch.rand(options.batch, options.count)
        order = numbers.argsort(1)
        return nn.functional.nll_loss(model(numbers, order).flatten(0, 1), order.flatten())

    losses = fit(model, loss_of, options.steps, options.lr, f"sets of {options.count}")
    numbers = torch.rand(options.held_out, options.count)
    found = model.sort(numbers)
    right = found == numbers.sort(1).values
    sorted_sets = right.all(1).float().mean().item()
    print(f"{options.held_out} sets that it never saw: {right.float().mean():.1%} of the numbers are in their place, "
          f"{sorted_sets:.1%} of the sets are sorted")  # fmt: skip
    shuffled = numbers.gather(1, torch.rand(numbers.shape).argsort(1))
    apart = (model.sort(shuffled) - found).abs().max().item()
    print(f"the same sets in another order: outputs differ by {apart:.1e} at most")
    print("    ", " ".join(f"{number:.2f}" for number in shuffled[0].tolist()))
    print("  ->", " ".join(f"{number:.2f}" for number in found[0].tolist()))
    plot(options.plot, {f"sets of {options.count}": losses}, "step", "loss, nats a number", "Read, process, write")
    reached, same = sorted_sets > options.goal, apart < 1e-6
    print(f"sorted sets {'are' if reached else 'are NOT'} above {options.goal:.0%}; "
          f"the order of the input {'does not matter' if same else 'MATTERS'}")  # fmt: skip
    return 0 if reached and same else 1


if __name__ == "__main__":
    sys.exit(main())
