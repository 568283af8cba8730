"""What the tests of rooms lstm, gru and rnn share: random calls (`Family.make`), torch's own op beside ours, and the
base of the tests that all three pass in every lane, which are in recurrent_results.py and recurrent_machinery.py.

Where torch has an option its own op is the peer of fastdl.testing.check. Where it has none (layer norm, peepholes,
zoneout, masks, lengths) the peer is what plain torch gives in the same dtype: the reference, differentiated by its own
formulas and by autograd. The exact answer is the reference in float64.
"""

from __future__ import annotations

import functools
import itertools
import zlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd import forward_ad

from fastdl._library import Op
from fastdl.testing import check, largest_error

SLOW = ("emulated cuda", "triton interpreted")  # lanes in which one multiplication takes microseconds
# time, batch, input, hidden: one, odd, a multiple of nothing; more than a tile of 16 or a vector
SHAPES = [(7, 1, 3, 5), (1, 3, 4, 17), (7, 3, 6, 1), (2, 17, 9, 33), (3, 2, 4, 64), (2, 3, 1, 130), (1, 1, 5, 9)]
LARGE = [(7, 17, 40, 130), (7, 3, 33, 64), (20, 16, 8, 48), (5, 33, 16, 32), (3, 1, 70, 257)]
EMPTY = [(0, 3, 4, 5), (7, 0, 4, 5), (0, 0, 4, 5)]
TORCHS = {"bias", "state", "two", "projection", "relu"}  # options that torch's op has


@dataclass(frozen=True)
class Family:
    """A room: its public function, ops, gates, options, and torch's op (x, states, weights, flags) -> outputs."""

    name: str
    function: Callable
    forward: Op
    inference: Op
    backward: Op
    gates: int
    options: tuple[str, ...]
    torchs: Callable[..., tuple[Tensor, ...]]

    def make(self, sizes, options, dtype=torch.float32, device="cpu", *, grad=True, state=None) -> dict[str, Tensor]:
        """Tensors by name. state: dtype of h0 and c0, that of x by default."""
        count, batch, size, hidden = sizes
        d, rows, out = 2 if "two" in options else 1, self.gates * hidden, hidden
        if "projection" in options:
            out = max(1, hidden // 2)

        def random(*shape, scale=1.0, mean=0.0, dtype=dtype):
            return (mean + scale * torch.randn(shape, device=device)).to(dtype).requires_grad_(grad)

        made = {
            "x": random(count, batch, size),
            "w_ih": random(d, rows, size, scale=size**-0.5),
            "w_hh": random(d, rows, out, scale=out**-0.5),
        }
        if "bias" in options:
            made |= {"b_ih": random(d, rows, scale=0.3), "b_hh": random(d, rows, scale=0.3)}
        if "state" in options:
            made["h0"] = random(d, batch, out, scale=0.5, dtype=state or dtype)
            if self.name == "lstm":
                made["c0"] = random(d, batch, hidden, dtype=state or dtype)
        if "projection" in options:
            made["w_hr"] = random(d, out, hidden, scale=hidden**-0.5)
        if "peephole" in options:
            made["peephole"] = random(d, 3, hidden, scale=0.5)
        if "layer_norm" in options:
            made |= {name: random(d, rows, scale=0.2, mean=1.0) for name in ("ln_ih", "ln_hh")}
            if self.name == "lstm":
                made |= {"ln_c": random(d, hidden, scale=0.2, mean=1.0), "ln_b": random(d, hidden, scale=0.2)}
        if "mask" in options:
            keep = torch.rand(d, batch, out, device=device) < 0.7
            made["h_mask"] = (keep / 0.7).to(dtype)
        if "lengths" in options:
            lengths = torch.randint(0, count + 1, (batch,))
            if batch > 1:
                lengths[0], lengths[-1] = 0, count
            made["lengths"] = lengths.to(device)
        return made

    def ours(self, made, options, backend, training=True) -> Callable[..., tuple[Tensor, ...]]:
        """`plain` with the same seed at every call."""
        function = self.plain(made, options, backend, training)

        def call(*tensors):
            torch.manual_seed(7)  # zoneout draws its seed
            return function(*tensors)

        return call

    def plain(self, made, options, backend, training=True) -> Callable[..., tuple[Tensor, ...]]:
        """The public function of the tensors in ``made``, in their order."""

        def call(*tensors):
            given = dict(zip(made, tensors, strict=True))
            named = {key: given[key] for key in ("lengths", "peephole", "h_mask", "w_hr") if key in given}
            if "layer_norm" in options:
                named["layer_norm"] = tuple(given[key] for key in ("ln_ih", "ln_hh", "ln_c", "ln_b") if key in given)
            if "zoneout_h" in options:
                named["zoneout_h" if self.name == "lstm" else "zoneout"] = 0.3
            if "zoneout_c" in options:
                named["zoneout_c"] = 0.2
            if "relu" in options:
                named["nonlinearity"] = "relu"
            hx = None
            if "state" in options:
                hx = (given["h0"], given["c0"]) if self.name == "lstm" else given["h0"]
            y, last = self.function(
                given["x"], given["w_ih"], given["w_hh"], given.get("b_ih"), given.get("b_hh"), hx,
                training=training, backend=backend, **named,
            )  # fmt: skip
            return (y, *last) if isinstance(last, tuple) else (y, last)

        return call

    def theirs(self, made, options) -> Callable[..., tuple[Tensor, ...]]:
        """torch's own op."""

        def call(*tensors):
            given = dict(zip(made, tensors, strict=True))
            d, (_, batch, _) = given["w_hh"].shape[0], given["x"].shape
            keys = [key for key in ("w_ih", "w_hh", "b_ih", "b_hh", "w_hr") if key in given]
            weights = [given[key][i] for i in range(d) for key in keys]
            h0 = given["h0"] if "h0" in given else given["x"].new_zeros(d, batch, given["w_hh"].shape[2])
            states = [h0]
            if self.name == "lstm":
                hidden = given["w_hh"].shape[1] // 4
                states.append(given["c0"] if "c0" in given else given["x"].new_zeros(d, batch, hidden))
            flags = ("bias" in options, 1, 0.0, False, d == 2, False)
            return self.torchs(given["x"], states, weights, flags, "relu" in options)

        return call

    def compare(self, lane, sizes, options, dtype, *, training=True, state=None, made=None, **more) -> None:
        """The rule of fastdl.testing for one call: outputs and every gradient."""
        normed = "layer_norm" in options and dtype == torch.float32 and made is None
        if normed:
            made = self.well_conditioned(sizes, options, training, state, lane.device)
        elif made is None:
            made = self.make(sizes, options, dtype, lane.device, state=state)
        torchs = TORCHS.issuperset(options) and sizes[0] > 0 and ("h0" not in made or made["h0"].dtype == dtype)
        reference = self.ours(made, options, "torch", training)
        peers = [self.theirs(made, options)] if torchs else [reference, self.by_autograd(reference)]
        if normed:
            peers += [self.reordered(made, reference, seed) for seed in range(2)]
        ours = self.ours(made, options, lane.backend, training)
        check(ours, list(made.values()), peer=peers, exact=reference, **more)

    @functools.cache  # noqa: B019
    @torch.enable_grad()
    def well_conditioned(self, sizes, options, training, state, device) -> dict[str, Tensor]:
        """Layer norm of a few small numbers makes large errors of small ones, as chance has it and in any
        implementation: of some calls, the one whose exact answer plain torch comes closest to."""
        found = []
        torch.manual_seed(zlib.crc32(repr((self.name, sizes, options, training)).encode()))  # the same in every lane
        for _ in range(8):
            made = self.make(sizes, options, torch.float32, "cpu", state=state)
            function = self.ours(made, options, "torch", training)
            exact = [
                t.detach().double().requires_grad_(t.requires_grad) if t.is_floating_point() else t
                for t in made.values()
            ]
            results = []
            for tensors in (exact, list(made.values())):
                outputs, leaves = function(*tensors), [t for t in tensors if t.requires_grad]
                grads = torch.autograd.grad(outputs, leaves, [torch.ones_like(y) for y in outputs])
                results.append([*outputs, *grads])
            pairs = [(a, b) for a, b in zip(*results, strict=True) if a.numel() and a.any()]
            error = max((largest_error(b, a) / float(a.detach().abs().max()) for a, b in pairs), default=0.0)
            found.append((error, len(found), made))
        best = min(found)[2]
        return {name: t.detach().to(device).requires_grad_(t.requires_grad) for name, t in best.items()}

    def reordered(self, made, function, seed) -> Callable[..., tuple[Tensor, ...]]:
        """The same with the columns of x and w_ih in another order, which rounds otherwise."""
        order = torch.randperm(made["x"].shape[2], generator=torch.Generator().manual_seed(seed))

        def call(*tensors):
            given = dict(zip(made, tensors, strict=True))
            columns = order.to(given["x"].device)
            return function(*(t[..., columns] if name in ("x", "w_ih") else t for name, t in given.items()))

        return call

    def by_autograd(self, reference) -> Callable[..., tuple[Tensor, ...]]:
        """The reference as a chain of torch's operations, as which it runs in transforms."""

        def call(*tensors):
            with forward_ad.dual_level():
                return reference(*tensors)

        return call

    def arguments(self, made, options, dtype=torch.float32) -> list:
        """The tensors of ``made`` as the forward op takes them, seed and numbers at the end."""
        x, w_hh = made["x"], made["w_hh"].detach()
        d, (count, batch, _), hidden = w_hh.shape[0], x.shape, w_hh.shape[1] // self.gates
        gates_x = torch.randn(count, batch, d, self.gates * hidden, device=x.device).to(dtype)
        states = [torch.randn(d, batch, w_hh.shape[2], device=x.device)]
        if self.name == "lstm":
            states.append(torch.randn(d, batch, hidden, device=x.device))
        zoneouts = [0.3 if "zoneout_h" in options else 0.0]
        rest = {
            "lstm": ("ln_hh", "peephole", "ln_c", "ln_b", "w_hr"),
            "gru": ("bias_n", "ln_hh"),
            "rnn": ("ln_hh",),
        }[self.name]
        if self.name == "lstm":
            zoneouts.append(0.2 if "zoneout_c" in options else 0.0)
        narrow = ("w_hr", "lengths")
        given = {key: t.detach() if key in narrow else t.detach().float() for key, t in made.items()}
        if "b_hh" in given:
            given["bias_n"] = given["b_hh"][:, 2 * hidden :]
        zoned = any(option.startswith("zoneout") for option in options)
        seed = torch.tensor([5, -9], device=x.device) if zoned else None
        flags = ("relu" in options,) if self.name == "rnn" else ()
        return [
            gates_x, *states, w_hh, *(given.get(key) for key in rest), given.get("h_mask"), given.get("lengths"), seed,
            *zoneouts, 1e-5, *flags,
        ]  # fmt: skip


def all_options(family: Family) -> list[tuple[str, ...]]:
    """None, each alone, all pairs, all together."""
    pairs = itertools.combinations(family.options, 2)
    return [(), *((option,) for option in family.options), *pairs, family.options]


def some(lane, index: int = 0) -> torch.dtype:
    """One of the lane's dtypes, another for another index."""
    return lane.dtypes[index % len(lane.dtypes)]


class Contract:
    """Tests of one room; ``family`` says which."""

    family: Family

    def pytest_generate_tests(self, metafunc):
        every = all_options(self.family)
        few = [options for options in every if len(options) != 2]
        for name, values in (("options", every), ("few_options", few)):
            if name in metafunc.fixturenames:
                metafunc.parametrize(name, values, ids=lambda options: "-".join(options) or "plain")

    def backward_arguments(self, arguments, outputs) -> tuple:
        """What the backward op takes after a forward with these arguments and outputs; gradients are random."""
        raise NotImplementedError

    def more_bad_input(self, made) -> list[tuple[dict, type, str]]:
        return []
