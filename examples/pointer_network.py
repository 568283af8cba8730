"""A pointer network learns convex hulls: an LSTM reads points, another one points at those of the hull, in order.

Inputs are 5 to 20 points drawn at random from the unit square, of different number within a batch; the output is the
hull, counter-clockwise from its lowest point, then a learned position that means "the end". The decoder's
answers are positions in its input, which softmax over a fixed vocabulary cannot give: PointerAttention returns
log-probabilities over the inputs. Keys are projected once; in training the true hull is fed back, so that all queries
point at once; without a teacher it takes one query at a time, and positions that were chosen are masked.

Accuracy counts hulls that are right in every position. Coverage is the mean area of the polygons over the true area,
where a polygon with edges that cross, with fewer than 3 corners or without an end counts as 0. The script fails
if the coverage on 20 points that it never saw is not above 90 %.

    python examples/pointer_network.py                       # some minutes
    python examples/pointer_network.py --hidden 256 --steps 20000 --no-chosen

After Vinyals, Fortunato and Jaitly, "Pointer Networks" (2015). Test: tests/test_examples.py
"""

from __future__ import annotations

import argparse
import random
import sys
from pathlib import Path

import torch
from common import at_least, draw, fit
from torch import Tensor, nn

import fastdl

Point = tuple[float, float]
END, NOTHING = 0, -100  # key 0 is the end, key 1 + i point i; what no query has to say


def cross(o: Point, a: Point, b: Point) -> float:
    """Twice the area of the triangle, positive where o, a, b turn to the left."""
    return (a[0] - o[0]) * (b[1] - o[1]) - (a[1] - o[1]) * (b[0] - o[0])


def convex_hull(points: list[Point]) -> list[int]:
    """Indices of the hull's corners, counter-clockwise from the lowest point (of several the leftmost).

    Andrew's monotone chain: in order of height, one chain up the right side and one down the left side.
    """
    order = sorted(range(len(points)), key=lambda i: (points[i][1], points[i][0]))

    def chain(indices) -> list[int]:
        found: list[int] = []
        for i in indices:
            while len(found) > 1 and cross(points[found[-2]], points[found[-1]], points[i]) <= 0:
                found.pop()
            found.append(i)
        return found[:-1]

    return chain(order) + chain(reversed(order)) if len(points) > 1 else order


def area(polygon: list[Point]) -> float:
    """The shoelace formula; without a sign."""
    edges = zip(polygon, polygon[1:] + polygon[:1], strict=True)
    return abs(sum(a[0] * b[1] - a[1] * b[0] for a, b in edges)) / 2


def is_simple(polygon: list[Point]) -> bool:
    """Whether there are three corners at least, and edges meet at corners alone."""
    count = len(polygon)
    edges = [(polygon[i], polygon[(i + 1) % count]) for i in range(count)]
    for i in range(count):
        for j in range(i + 1, count):
            if j == i + 1 or (i == 0 and j == count - 1):
                continue  # they share a corner
            (a, b), (c, d) = edges[i], edges[j]
            if cross(a, b, c) * cross(a, b, d) <= 0 and cross(c, d, a) * cross(c, d, b) <= 0:
                return False
    return count >= 3


def make_batch(batch: int, least: int, most: int, draws: random.Random) -> tuple[Tensor, Tensor, Tensor]:
    """points [batch, most, 2], zeros past the last; keys to point at [batch, longest], NOTHING past the end; lens"""
    points, targets, lens = torch.zeros(batch, most, 2), torch.full((batch, most + 1), NOTHING), []
    for row in range(batch):
        lens.append(draws.randint(least, most))
        drawn = [(draws.random(), draws.random()) for _ in range(lens[-1])]
        answer = [1 + i for i in convex_hull(drawn)] + [END]
        points[row, : len(drawn)] = torch.tensor(drawn)
        targets[row, : len(answer)] = torch.tensor(answer)
    longest = int((targets != NOTHING).sum(1).max())
    return points, targets[:, :longest], torch.tensor(lens)


class PointerNetwork(nn.Module):
    """Points -> log-probabilities over the end and the points, a query for each corner of the hull."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.encoder = fastdl.nn.LSTM(2, hidden // 2, batch_first=True, bidirectional=True)
        self.decoder = fastdl.nn.LSTM(2 + hidden, hidden, batch_first=True)
        self.point = fastdl.nn.PointerAttention(hidden, hidden, hidden)
        self.end = nn.Parameter(torch.randn(1, 1, hidden) / hidden**0.5)
        self.start = nn.Parameter(torch.randn(1, 1, 2 + hidden) / hidden**0.5)

    def encode(self, points: Tensor, lens: Tensor):
        """points [B, N, 2] -> what may be fed back [B, 1 + N, 2 + hidden], keys [B, 1 + N, hidden], decoder's state"""
        memory, (h, c) = self.encoder(points, lengths=lens)
        memory = torch.cat([self.end.expand(len(points), 1, -1), memory], 1)
        inputs = torch.cat([nn.functional.pad(points, (0, 0, 1, 0)), memory], 2)
        state = tuple(s.transpose(0, 1).flatten(1)[None] for s in (h, c))
        return inputs, self.point.project_keys(memory), state

    def forward(self, points: Tensor, lens: Tensor, targets: Tensor) -> Tensor:
        """With a teacher: targets [B, T] -> log-probabilities [B, T, 1 + N]."""
        inputs, keys, state = self.encode(points, lens)
        fed = inputs.gather(1, targets[:, :-1, None].clamp(min=0).expand(-1, -1, inputs.shape[2]))
        y, _ = self.decoder(torch.cat([self.start.expand(len(points), 1, -1), fed], 1), state)
        return self.point(y, None, lens + 1, projected_keys=keys)

    @torch.inference_mode()
    def solve(self, points: Tensor, lens: Tensor, mask_chosen: bool = True) -> list[list[int] | None]:
        """The most probable corner again and again, until all have ended. None: no end was found."""
        (batch, most, _), rows = points.shape, torch.arange(len(points))
        inputs, keys, state = self.encode(points, lens)
        chosen = torch.zeros(batch, 1 + most, dtype=torch.bool) if mask_chosen else None
        fed, steps, going = self.start.expand(batch, 1, -1), [], torch.ones(batch, dtype=torch.bool)
        while going.any() and len(steps) <= most:
            y, state = self.decoder(fed, state)
            best = self.point(y[:, 0], None, lens + 1, projected_keys=keys, chosen=chosen).argmax(1)
            steps.append(best)
            going &= best != END
            fed = inputs[rows, best][:, None]
            if mask_chosen:
                chosen[rows, best] = best != END
        answers = torch.stack(steps, 1).tolist()
        return [[key - 1 for key in a[: a.index(END)]] if END in a else None for a in answers]


def coverage(points: list[Point], answer: list[int] | None, truth: list[int]) -> float | None:
    """Area of the answer's polygon over that of the hull; None where the answer is no simple polygon."""
    corners = [points[i] for i in answer or ()]
    return area(corners) / area([points[i] for i in truth]) if is_simple(corners) else None


def score(model: PointerNetwork, points: Tensor, targets: Tensor, lens: Tensor, mask_chosen: bool) -> dict[str, float]:
    """Shares: hulls that are right, area covered, answers that are no simple polygon."""
    answers, found, right = model.solve(points, lens, mask_chosen), [], 0
    for row, target, answer in zip(points.tolist(), targets.tolist(), answers, strict=True):
        truth = [key - 1 for key in target if key > END]
        right += answer == truth
        found.append(coverage(row, answer, truth))
    count = len(found)
    return {
        "right": right / count,
        "coverage": sum(f or 0.0 for f in found) / count,
        "not simple": found.count(None) / count,
    }


def draw_hulls(path: Path, model: PointerNetwork, points: Tensor, targets: Tensor, lens: Tensor, mask_chosen: bool):
    """Points [8, N, 2], their hulls, and the model's."""

    def paint(axes) -> None:
        cases = zip(axes.flat, points.tolist(), targets.tolist(), answers, lens.tolist(), strict=True)
        for ax, row, target, answer, count in cases:
            ax.scatter(*zip(*row[:count], strict=True), color="black", s=12, zorder=3)
            for polygon, style in (([k - 1 for k in target if k > END], "g-"), (answer or [], "r--")):
                corners = [row[i] for i in polygon] + [row[i] for i in polygon[:1]]
                ax.plot([x for x, _ in corners], [y for _, y in corners], style, linewidth=3 if style == "g-" else 1.5)
            ax.set(xlim=(0, 1), ylim=(0, 1), aspect="equal", xticks=[], yticks=[], title=f"{count} points")
        axes[0, 0].figure.suptitle("Convex hulls: true (green), the pointer network's (red, dashed)")

    answers = model.solve(points, lens, mask_chosen)
    draw(path, paint, rows=2, columns=4, size=(11, 6))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=at_least(0), default=3000)
    parser.add_argument("--hidden", type=at_least(1), default=128)
    parser.add_argument("--batch", type=at_least(1), default=128)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--points", type=int, nargs=2, default=(5, 20), metavar=("LEAST", "MOST"), help="in training")
    parser.add_argument("--chosen", action=argparse.BooleanOptionalAction, default=True, help="mask chosen positions")
    parser.add_argument("--held-out", type=at_least(1), default=500, help="sets of points of each size to be judged by")
    parser.add_argument("--goal", type=float, default=0.9, help="least coverage on 20 points")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--plot", type=Path, default=Path("pointer_network.png"))
    options = parser.parse_args(arguments)
    least, most = options.points
    if not 3 <= least <= most:
        parser.error("--points: expected two numbers, 3 at least, the lesser first")

    torch.manual_seed(options.seed)
    model, draws = PointerNetwork(options.hidden), random.Random(options.seed)

    def loss_of() -> Tensor:
        points, targets, lens = make_batch(options.batch, least, most, draws)
        log_p = model(points, lens, targets)
        return nn.functional.nll_loss(log_p.flatten(0, 1), targets.flatten(), ignore_index=NOTHING)

    fit(model, loss_of, options.steps, options.lr, f"hulls of {least} to {most} points")
    judged, draws = {}, random.Random(f"held out {options.seed}")
    for count in (5, 10, 20):
        points, targets, lens = make_batch(options.held_out, count, count, draws)
        judged[count] = score(model, points, targets, lens, options.chosen)
        figures = ", ".join(f"{share:.1%} {name}" for name, share in judged[count].items())
        print(f"{count} points, {options.held_out} sets that it never saw: {figures}")
    draw_hulls(options.plot, model, *make_batch(8, 5, 20, draws), options.chosen)
    reached = judged[20]["coverage"] > options.goal
    print(f"coverage on 20 points {'is' if reached else 'is NOT'} above {options.goal:.0%}")
    return 0 if reached else 1


if __name__ == "__main__":
    sys.exit(main())
