"""What the examples share: numbers on a command line, a text that every Python has, a training loop with a progress
bar, and plots.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import Tensor, nn

__all__ = ["at_least", "draw", "fit", "plot", "progress", "python_text"]


def at_least(least: int, multiple: int = 1) -> Callable[[str], int]:
    """The type of a command line's whole number, of which ``multiple`` is a divisor."""

    def number(text: str) -> int:
        value = int(text)
        if value < least or value % multiple:
            kind = f"a multiple of {multiple}, {least} or more" if multiple > 1 else f"{least} or more"
            raise argparse.ArgumentTypeError(f"expected {kind}, got {value}")
        return value

    return number


def python_text() -> str:
    """Some 460,000 characters of English: Python's own help on its language, topic by topic."""
    from pydoc_data import topics

    return "\n".join(text for _, text in sorted(topics.topics.items()))


def progress(steps: Iterable, **options):
    """A tqdm bar where stderr is a terminal; without tqdm the steps alone."""
    try:
        from tqdm import tqdm
    except ImportError:
        print("for a progress bar type: pip install tqdm", file=sys.stderr)
        return steps
    return tqdm(steps, file=sys.stderr, leave=False, disable=None, **options)


def fit(model: nn.Module, loss_of: Callable[[], Tensor], steps: int, lr: float, name: str) -> list[float]:
    """Train with Adam on ``loss_of()``, which draws a batch; returns the loss of each step.

    The learning rate rises to ``lr`` in the first twentieth of the steps and then falls to nothing along a cosine.
    """
    optimizer, losses = torch.optim.Adam(model.parameters(), lr=lr), []
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps + 1, pct_start=0.05)
    model.train()
    bar = progress(range(steps), desc=name)
    for _ in bar:
        loss = loss_of()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        if hasattr(bar, "set_postfix"):
            bar.set_postfix(loss=f"{losses[-1]:.3f}", refresh=False)
    model.eval()
    tenth = max(1, len(losses) // 10)
    first, last = (sum(part) / tenth for part in (losses[:tenth], losses[-tenth:]))
    print(f"{name}: loss {first:.3f} -> {last:.3f} in {steps} steps, means of the first and the last tenth")
    return losses


def draw(path: Path, paint: Callable, rows: int = 1, columns: int = 1, size: tuple[float, float] = (8, 5)) -> bool:
    """Write the picture that ``paint(axes)`` makes, axes [rows, columns]. False: there is no matplotlib."""
    try:
        import matplotlib
    except ImportError:
        print(f"{path} was not drawn; type: pip install matplotlib", file=sys.stderr)
        return False
    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(rows, columns, figsize=size, layout="constrained", squeeze=False)
    paint(axes)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    print(f"wrote {path}")
    return True


def plot(path: Path, curves: dict[str, list[float]], x: str, y: str, title: str) -> bool:
    """Write a picture of the curves; those whose names begin with "torch" are dashed. False: there is no matplotlib."""

    def paint(axes) -> None:
        for name, values in curves.items():
            style = "--" if name.startswith("torch") else "-"
            axes[0, 0].plot(range(1, len(values) + 1), values, label=name, linestyle=style, linewidth=1.5)
        axes[0, 0].set(xlabel=x, ylabel=y, title=title)
        axes[0, 0].grid(alpha=0.3)
        axes[0, 0].legend()

    return draw(path, paint)
