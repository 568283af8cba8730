"""An encoder and a decoder with additive attention learn to reverse words and to write dates in ISO form.

    reverse   "pqzzaf" -> "fazzqp": 5 to 12 letters drawn at random
    dates     "May 3rd, 1979", "Thursday 3 may 1979", "03/05/79" (day first), ... -> "1979-05-03": days of 1950 to 2049

A bidirectional LSTM reads characters, an LSTM writes them; each of its outputs asks AdditiveAttention what to read.
Keys are projected once. Attention reads the decoder's output and feeds nothing back into it, so that in training, where
the right characters are fed in, all queries are answered in one call; in use they come one at a time. A tenth of
all answers is held out: no training step sees them in any wording. The script fails where too few of those come out
right in every character. The attention map of one example of each is drawn.

    python examples/seq2seq.py                            # some minutes
    python examples/seq2seq.py --tasks dates --ask "Monday, 21 July 1969"

After Bahdanau, Cho and Bengio, "Neural Machine Translation by Jointly Learning to Align and Translate" (2014), with the
attention behind the decoder as in Luong, Pham and Manning (2015). Test: tests/test_examples.py
"""

from __future__ import annotations

import argparse
import random
import string
import sys
from collections.abc import Callable
from datetime import date, timedelta
from pathlib import Path
from zlib import crc32

import torch
from common import at_least, draw, fit
from torch import Tensor, nn

import fastdl

CHARACTERS = string.ascii_letters + string.digits + " ,./-"
END, UNKNOWN, FIRST = 0, 1, 2  # codes: the end (and the beginning of answers), what is no character of ours, the others
CODES = {character: code for code, character in enumerate(CHARACTERS, FIRST)}
NOTHING = -100  # what the loss leaves out

FIRST_DAY, LAST_DAY = date(1950, 1, 1), date(2049, 12, 31)  # two digits of a year are enough
FORMATS = (
    "{d} {B} {Y}", "{d:02} {B} {Y}", "{d} {b} {Y}", "{d} {b} {y:02}", "{o} of {B} {Y}", "{o} {B} {Y}", "{d}-{b}-{Y}",
    "{B} {d}, {Y}", "{B} {d:02}, {Y}", "{b} {d:02}, {Y}", "{b} {d} {Y}", "{B} {o}, {Y}", "{b} {o} {y:02}",
    "{A} {d} {B} {Y}", "{A}, {d} {B} {Y}", "{A}, {B} {o}, {Y}", "{a} {d} {b} {Y}", "{a}, {d:02} {b} {y:02}",
    "{d:02}/{m:02}/{Y}", "{d:02}/{m:02}/{y:02}", "{d}/{m}/{Y}", "{d}.{m}.{Y}", "{d:02}.{m:02}.{y:02}",
    "{Y}/{m:02}/{d:02}",
)  # fmt: skip
MONTHS = (
    "January", "February", "March", "April", "May", "June", "July", "August", "September", "October", "November",
    "December",
)  # fmt: skip
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")


def ordinal(number: int) -> str:
    """1st, 2nd, 3rd, 4th, ... 11th, ... 21st"""
    ending = "th" if number // 10 % 10 == 1 else {1: "st", 2: "nd", 3: "rd"}.get(number % 10, "th")
    return f"{number}{ending}"


def written(day: date, wording: str) -> str:
    """A date as a person might write it; letters as in strftime, o: 1st, 2nd, ..."""
    month, weekday = MONTHS[day.month - 1], DAYS[day.weekday()]
    return wording.format(
        d=day.day, o=ordinal(day.day), m=day.month, y=day.year % 100, Y=day.year,
        B=month, b=month[:3], A=weekday, a=weekday[:3],
    )  # fmt: skip


def make_date(draws: random.Random) -> tuple[str, str]:
    day = FIRST_DAY + timedelta(draws.randrange((LAST_DAY - FIRST_DAY).days + 1))
    text = written(day, draws.choice(FORMATS))
    return draws.choice((text, text, text.lower(), text.upper())), day.isoformat()


def make_word(draws: random.Random) -> tuple[str, str]:
    word = "".join(draws.choices(string.ascii_lowercase, k=draws.randint(5, 12)))
    return word, word[::-1]


# name: how an example is drawn
TASKS: dict[str, Callable[[random.Random], tuple[str, str]]] = {"reverse": make_word, "dates": make_date}


def is_held_out(answer: str) -> bool:
    return crc32(answer.encode()) % 10 == 0


def examples(task: str, count: int, held_out: bool, draws: random.Random) -> list[tuple[str, str]]:
    """Questions and answers."""
    found = []
    while len(found) < count:
        question, answer = TASKS[task](draws)
        if is_held_out(answer) == held_out:
            found.append((question, answer))
    return found


def encoded(texts: list[str]) -> tuple[Tensor, Tensor]:
    """Codes [B, longest], END past the end; lens [B]"""
    rows = [torch.tensor([CODES.get(c, UNKNOWN) for c in text] or [UNKNOWN]) for text in texts]
    return nn.utils.rnn.pad_sequence(rows, batch_first=True), torch.tensor([len(row) for row in rows])


def decoded(codes: list[int]) -> str:
    """The text before the end."""
    codes = codes[: codes.index(END)] if END in codes else codes
    return "".join("?" if code == UNKNOWN else CHARACTERS[code - FIRST] for code in codes)


class Translator(nn.Module):
    """Codes [B, S] and their lens -> scores of the answer's codes [B, T, codes]."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        codes = FIRST + len(CHARACTERS)
        self.embedding = nn.Embedding(codes, hidden // 2)
        self.encoder = fastdl.nn.LSTM(hidden // 2, hidden // 2, batch_first=True, bidirectional=True)
        self.decoder = fastdl.nn.LSTM(hidden // 2, hidden, batch_first=True)
        self.attention = fastdl.nn.AdditiveAttention(hidden, hidden, hidden)
        self.mix = nn.Linear(2 * hidden, hidden)
        self.scores = nn.Linear(hidden, codes)

    def encode(self, questions: Tensor, lens: Tensor):
        """values [B, S, hidden], keys [B, S, hidden], the decoder's first state"""
        values, (h, c) = self.encoder(self.embedding(questions), lengths=lens)
        return values, self.attention.project_keys(values), tuple(s.transpose(0, 1).flatten(1)[None] for s in (h, c))

    def forward(self, questions: Tensor, lens: Tensor, answers: Tensor) -> Tensor:
        """With a teacher: answers [B, T] -> scores [B, T, codes]"""
        values, keys, state = self.encode(questions, lens)
        fed = nn.functional.pad(answers[:, :-1], (1, 0), value=END)
        y, _ = self.decoder(self.embedding(fed), state)
        return self._answer(y, self.attention(y, None, values, lens, projected_keys=keys))

    def _answer(self, y: Tensor, read: Tensor) -> Tensor:
        return self.scores(self.mix(torch.cat([y, read], 2)).tanh())

    @torch.inference_mode()
    def translate(self, texts: list[str], most: int = 24) -> tuple[list[str], Tensor]:
        """Answers, the most probable character after the other, and the attention [B, T, S] they were written with."""
        questions, lens = encoded(texts)
        values, keys, state = self.encode(questions, lens)
        code, codes, maps = torch.full((len(texts), 1), END), [], []
        while len(codes) < most and not (codes and bool((torch.cat(codes, 1) == END).any(1).all())):
            y, state = self.decoder(self.embedding(code), state)
            read, weights = self.attention(y, None, values, lens, projected_keys=keys, return_weights=True)
            code = self._answer(y, read).argmax(2)
            codes.append(code)
            maps.append(weights)
        return [decoded(row) for row in torch.cat(codes, 1).tolist()], torch.cat(maps, 1)


def train(task: str, options: argparse.Namespace, draws: random.Random) -> Translator:
    """A model of the task, after ``options.steps`` batches."""
    torch.manual_seed(options.seed)
    model = Translator(options.hidden)

    def loss_of() -> Tensor:
        questions, answers = zip(*examples(task, options.batch, False, draws), strict=True)
        codes, lens = encoded(answers)
        codes = nn.functional.pad(codes, (0, 1), value=END)
        past = torch.arange(codes.shape[1]) > lens[:, None]  # the end itself is to be learned
        scores = model(*encoded(questions), codes)
        return nn.functional.cross_entropy(scores.flatten(0, 1), codes.masked_fill(past, NOTHING).flatten())

    fit(model, loss_of, options.steps, options.lr, task)
    return model


def draw_maps(path: Path, cases: list[tuple[str, str, Tensor]]) -> None:
    """cases: question, answer, attention [T, S]"""

    def paint(axes) -> None:
        for ax, (question, answer, weights) in zip(axes.flat, cases, strict=True):
            ax.imshow(weights[: len(answer), : len(question)], cmap="gray", vmin=0, vmax=1, aspect="auto")
            ax.set_xticks(range(len(question)), question.replace(" ", "␣"))
            ax.set_yticks(range(len(answer)), answer)
            ax.set(xlabel="read", ylabel="written")
        axes[0, 0].figure.suptitle("Where the decoder looks (white: 1)")

    draw(path, paint, columns=len(cases), size=(6 * len(cases), 4.5))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--steps", type=at_least(0), default=1200)
    parser.add_argument("--hidden", type=at_least(2, 2), default=128)
    parser.add_argument("--batch", type=at_least(1), default=64)
    parser.add_argument("--lr", type=float, default=4e-3)
    parser.add_argument("--held-out", type=at_least(1), default=1000, help="examples of each task to be judged by")
    parser.add_argument("--goal", type=float, default=0.95, help="least share of answers that are right")
    parser.add_argument("--ask", nargs="*", default=[], help="questions of your own to the last of the tasks")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--plot", type=Path, default=Path("seq2seq.png"))
    options = parser.parse_args(arguments)

    reached, cases = True, []
    for task in options.tasks:
        draws = random.Random(options.seed)
        model = train(task, options, draws)
        questions, answers = zip(*examples(task, options.held_out, True, draws), strict=True)
        found, maps = model.translate(questions)
        right = sum(a == b for a, b in zip(found, answers, strict=True)) / len(answers)
        enough = right > options.goal
        reached = reached and enough
        verdict = f"{'is' if enough else 'is NOT'} above {options.goal:.0%}"
        print(f"{task}: {right:.1%} of {len(answers)} held-out answers are right in every character, which {verdict}")
        for question, answer in zip(questions[:5], found[:5], strict=True):
            print(f"    {question!r} -> {answer!r}")
        cases.append((questions[0], found[0], maps[0]))
    for question, answer in zip(options.ask, model.translate(options.ask)[0] if options.ask else (), strict=True):
        print(f"you asked: {question!r} -> {answer!r}")
    draw_maps(options.plot, cases)
    return 0 if reached else 1


if __name__ == "__main__":
    sys.exit(main())
