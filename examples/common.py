"""What the examples share: a text that every Python has, a progress bar, and plots."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path

__all__ = ["plot", "progress", "python_text"]


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


def plot(path: Path, curves: dict[str, list[float]], x: str, y: str, title: str) -> bool:
    """Write a picture of the curves; those whose names begin with "torch" are dashed. False: there is no matplotlib."""
    try:
        import matplotlib
    except ImportError:
        print(f"{path} was not drawn; type: pip install matplotlib", file=sys.stderr)
        return False
    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 5), layout="constrained")
    for name, values in curves.items():
        theirs = name.startswith("torch")
        axes.plot(range(1, len(values) + 1), values, label=name, linestyle="--" if theirs else "-", linewidth=1.5)
    axes.set(xlabel=x, ylabel=y, title=title)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    print(f"wrote {path}")
    return True
