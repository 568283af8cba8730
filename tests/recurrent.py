"""What the tests of rooms lstm, gru and rnn share: random calls (`Family.make`), torch's own op beside ours, and
`Contract`, the tests that all three pass in every lane. tests/test_lstm.py and its kin derive from it.

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

import lanes
import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

from fastdl import BackendError, explain
from fastdl._library import Op, twin_of
from fastdl.ops._recurrent import pack
from fastdl.reference import philox
from fastdl.testing import check, largest_error, poisoned

SLOW = ("emulated cuda", "triton interpreted")  # lanes in which one multiplication takes microseconds
# time, batch, input, hidden: one, odd, a multiple of nothing; more than a tile of 16 or a vector
SHAPES = [(7, 1, 3, 5), (1, 3, 4, 17), (7, 3, 6, 1), (2, 17, 9, 33), (3, 2, 4, 64), (2, 3, 1, 130), (1, 1, 1, 1)]
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

    # ---- Outputs and gradients in every lane -------------------------------------------------------------------

    def test_options(self, lane, options):
        """Each option alone, all pairs, all together: in float32 and one more dtype; float32 states too."""
        every = all_options(self.family)
        sizes, index = ((3, 3, 3, 5) if lane.name in SLOW else (4, 3, 7, 18)), every.index(options)
        alone = len(options) in (0, 1, len(self.family.options))
        dtypes = lane.dtypes if alone and lane.name not in SLOW else [lane.dtypes[0]] if index % 2 else [some(lane, 1)]
        for dtype in dtypes:
            state = torch.float32 if index % 3 == 0 and dtype != torch.float32 else None
            self.family.compare(lane, sizes, options, dtype, state=state, training=index % 4 != 3)

    @pytest.mark.parametrize("sizes", SHAPES, ids=str)
    def test_shapes(self, lane, sizes):
        index = SHAPES.index(sizes)
        # Layer norm of one element is 0, and its gradient what rounding leaves of 0, times 300.
        rich = tuple(option for option in self.family.options if option != "layer_norm" or sizes[3] > 1)
        both = [("bias", "state", "two"), rich]
        for options in both[index % 2 :][:1] if lane.name in SLOW else both:
            self.family.compare(lane, sizes, options, some(lane, index))

    @pytest.mark.parametrize("sizes", LARGE, ids=str)
    def test_large_shapes(self, lane, sizes):
        """More than one tile of everything; lanes without hardware take one step of a small batch."""
        index = LARGE.index(sizes)
        if lane.name in SLOW:
            if index:
                pytest.skip("minutes without hardware")
            self.family.compare(lane, (2, 17, 3, 66), ("bias", "state"), some(lane, 1))
            return
        for dtype in lane.dtypes if index < 2 else (some(lane, index),):
            self.family.compare(lane, sizes, ("bias", "state", "two") if index % 2 else ("bias",), dtype)

    @pytest.mark.parametrize("sizes", EMPTY, ids=str)
    def test_empty(self, lane, sizes):
        """No steps: the states pass through, and so do their gradients. No sequences: gradients of weights are 0."""
        for options in (("state", "two"), self.family.options):
            made = self.family.make(sizes, options, some(lane), lane.device)
            y, *states = self.family.ours(made, options, lane.backend)(*made.values())
            out = made["w_hh"].shape[2]
            assert y.shape == (sizes[0], sizes[1], 2 * out)
            for state, name in zip(states, ("h0", "c0"), strict=False):
                assert torch.equal(state, made[name])
            wanted = [t for t in made.values() if t.requires_grad]
            grads = torch.autograd.grad([y, *states], wanted, [torch.ones_like(t) for t in (y, *states)])
            for (name, tensor), grad in zip(made.items(), grads, strict=False):
                assert grad.shape == tensor.shape and torch.equal(
                    grad, torch.full_like(grad, float(name in ("h0", "c0")))
                ), name

    def test_strided(self, lane):
        """x as a batch-first view, expanded, or every second column; states and weights that are views."""
        sizes, options = (4, 3, 6, 5), ("bias", "state", "two")
        base = self.family.make(sizes, options, torch.float32, lane.device)
        x = base["x"].detach()
        views = [
            x.transpose(0, 1).contiguous().transpose(0, 1),
            x[:, :1].expand(4, 3, 6),
            torch.stack((x, x), -1).flatten(-2)[..., ::2],
        ]
        for view in views:
            made = {**base, "x": view.detach().requires_grad_()}
            made["h0"] = base["h0"].detach().transpose(0, 1).contiguous().transpose(0, 1).requires_grad_()
            made["w_hh"] = base["w_hh"].detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_()
            self.family.compare(lane, sizes, options, torch.float32, made=made)

    def test_strided_gradients(self, lane):
        """A gradient that is an expanded number (y.sum()), and one of which only the last step is asked for."""
        sizes, options = (4, 3, 6, 5), ("bias", "state", "two")
        made = self.family.make(sizes, options, torch.float32, lane.device)
        for pick in (lambda y: y.sum(), lambda y: y[-1].sum(), lambda y: y.transpose(0, 1)[:, ::2].sum()):
            found = []
            for function in (self.family.ours(made, options, lane.backend), self.family.theirs(made, options)):
                y, *_ = function(*made.values())
                found.append(torch.autograd.grad(pick(y), list(made.values())))
            for a, b in zip(*found, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)

    def test_each_output_alone_has_a_gradient(self, lane):
        sizes, options = (3, 2, 4, 5), ("bias", "state", "lengths", "two")
        made = self.family.make(sizes, options, torch.float32, lane.device)
        leaves = [t for t in made.values() if t.requires_grad]
        ours, exact = (self.family.ours(made, options, backend)(*made.values()) for backend in (lane.backend, "torch"))
        for a, b in zip(ours, exact, strict=True):
            weight = torch.randn(a.shape).to(a)
            for g, e in zip(
                torch.autograd.grad(a, leaves, weight, retain_graph=True, allow_unused=True),
                torch.autograd.grad(b, leaves, weight, retain_graph=True, allow_unused=True),
                strict=True,
            ):
                torch.testing.assert_close(g, e, rtol=1e-4, atol=1e-5)

    def test_inference(self, lane):
        """Without gradients another op runs, which stores nothing for a backward pass; with packed weights too."""
        wants = [("bias", "state"), self.family.options, ("bias", "two", "lengths")]
        shapes = [(3, 2, 4, 5), (2, 3, 4, 17)] if lane.name in SLOW else [(7, 1, 3, 5), (5, 17, 9, 33), (3, 2, 4, 130)]
        for index, (options, sizes) in enumerate(itertools.product(wants, shapes)):
            with torch.no_grad():
                dtype = some(lane, index)
                self.family.compare(lane, sizes, options, dtype, gradients=False, training=index % 2 == 0)
                if lane.backend != "cpu":
                    continue
                made = self.family.make(sizes, options, dtype, lane.device)
                arguments = self.family.arguments(made, options, dtype)
                packed = pack(made["w_hh"], self.family.gates)
                assert packed.dtype == torch.uint8 and packed.dim() == 1
                op = self.family.inference["native"]
                with poisoned():
                    for a, b in zip(op(*arguments, packed), op(*arguments, None), strict=True):
                        assert torch.equal(a, b)

    # ---- Lengths and zoneout -----------------------------------------------------------------------------------

    def test_lengths_are_torchs_packed_sequences(self, lane):
        """Unsorted lengths from 1 to T: what torch's op gives for a packed sequence."""
        sizes, options = (5, 4, 3, 6), ("bias", "state", "two")
        made = self.family.make(sizes, options, torch.float32, lane.device)
        made["lengths"] = torch.tensor([2, 5, 1, 3])
        order = made["lengths"].argsort(descending=True)
        back = order.argsort()

        def theirs(*tensors):
            given = dict(zip(made, tensors, strict=True))
            keys = [key for key in ("w_ih", "w_hh", "b_ih", "b_hh") if key in given]
            weights = [given[key][i] for i in range(2) for key in keys]
            packed = torch.nn.utils.rnn.pack_padded_sequence(given["x"][:, order], given["lengths"][order])
            states = [given[key][:, order] for key in ("h0", "c0") if key in given]
            flags = (True, 1, 0.0, False, True)
            y, *states = self.family.torchs(packed.data, states, weights, flags, False, packed.batch_sizes)
            y, _ = torch.nn.utils.rnn.pad_packed_sequence(packed._replace(data=y), total_length=5)
            return y[:, back], *(s[:, back] for s in states)

        check(self.family.ours(made, ("lengths", *options), lane.backend), list(made.values()), peer=theirs)

    def test_lengths(self, lane):
        """Past the end: zeros; the states are those of the last step, or the first where a sequence has none."""
        sizes, options = (4, 5, 3, 6), ("bias", "state", "two", "lengths")
        made = self.family.make(sizes, options, torch.float32, lane.device)
        made["lengths"] = torch.tensor([0, 4, 1, 3, 4], device=lane.device, dtype=torch.int32)
        y, *states = self.family.ours(made, options, lane.backend)(*made.values())
        firsts = [made[name] for name in ("h0", "c0") if name in made]
        hidden = made["w_hh"].shape[2]
        for b, length in enumerate(made["lengths"].tolist()):
            assert not y[length:, b].any() and (length == 0 or y[:length, b].all())
            if length == 0:
                assert all(torch.equal(s[:, b], f[:, b]) for s, f in zip(states, firsts, strict=True))
            else:
                assert torch.equal(states[0][0, b], y[length - 1, b, :hidden])
                assert torch.equal(states[0][1, b], y[0, b, hidden:])
        poison = made["x"].detach().clone()
        for b, length in enumerate(made["lengths"].tolist()):
            poison[length:, b] = 1e4  # what padding holds does not matter
        again = self.family.ours(made, options, lane.backend)(poison, *list(made.values())[1:])
        assert all(torch.equal(a, b) for a, b in zip((y, *states), again, strict=True))

    def test_zoneout_keeps_the_elements_that_the_seed_says(self, lane):
        """The mask is Philox of the element's index, in every back end; in evaluation its expectation is taken."""
        sizes, options = (4, 3, 3, 9), ("bias", "two", "zoneout_h")
        made = self.family.make(sizes, options, torch.float32, lane.device, grad=False)
        torch.manual_seed(7)
        seed = torch.randint(-(2**63), 2**63 - 1, (2,), device=lane.device)
        kept = ~philox.keep_mask(seed[:1], (4, 3, 2, 9), 0.3)
        assert 0.1 < kept.float().mean() < 0.5
        y = self.family.ours(made, options, lane.backend)(*made.values())[0].view(4, 3, 2, 9)
        same = lambda a, b: torch.isclose(a, b, rtol=0, atol=1e-6)  # noqa: E731
        for t in range(1, 4):
            assert torch.equal(same(y[t, :, 0], y[t - 1, :, 0]), kept[t, :, 0])
            assert torch.equal(same(y[t - 1, :, 1], y[t, :, 1]), kept[t - 1, :, 1])
        zero = torch.zeros_like(y[0, :, 0])
        assert torch.equal(same(y[0, :, 0], zero), kept[0, :, 0]) and torch.equal(same(y[3, :, 1], zero), kept[3, :, 1])
        first, second = (self.family.ours(made, options, lane.backend, False)(*made.values())[0] for _ in range(2))
        assert torch.equal(first, second) and not torch.equal(first, y.flatten(2))

    def test_saturation(self, lane):
        """Gates far from zero: no NaN, and gradients that are zero or small."""
        for options in (("bias", "state"), tuple(o for o in self.family.options if o in ("bias", "peephole", "state"))):
            made = self.family.make((3, 2, 3, 5), options, torch.float32, lane.device)
            made["x"] = (made["x"].detach() * 1e3).requires_grad_()
            results = []
            for backend in (lane.backend, "torch"):
                outputs = self.family.ours(made, options, backend)(*made.values())
                grads = torch.autograd.grad(outputs, list(made.values()), [torch.ones_like(y) for y in outputs])
                results.append((*outputs, *grads))
            for a, b in zip(*results, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5 * float(1 + b.abs().max()))

    def test_nan_stays_in_its_sequence(self, lane):
        made = self.family.make((3, 3, 4, 5), ("bias",), torch.float32, lane.device, grad=False)
        made["x"][1, 1, 2] = float("nan")
        y, *_ = self.family.ours(made, ("bias",), lane.backend)(*made.values())
        assert y[1:, 1].isnan().all() and not y[0].isnan().any() and not y[:, 0].isnan().any()
        assert not y[:, 2].isnan().any()

    # ---- torch's machinery -------------------------------------------------------------------------------------

    def test_threads_do_not_change_results(self, level):
        """Products over all steps are torch's, and may change with threads; what the ops give does not."""
        options = tuple(option for option in self.family.options if not option.startswith("zoneout"))
        for dtype, sizes in ((torch.float32, (5, 1, 7, 130)), (torch.bfloat16, (4, 37, 9, 66))):
            made = self.family.make(sizes, options, dtype, grad=False)
            arguments = self.family.arguments(made, options, dtype)
            packed = pack(made["w_hh"], self.family.gates)
            grads = self.backward_arguments(arguments, self.family.forward["native"](*arguments))
            before, results = torch.get_num_threads(), []
            for threads in (1, 2, 5):
                torch.set_num_threads(threads)
                results.append((
                    *self.family.forward["native"](*arguments),
                    *self.family.inference["native"](*arguments, None),
                    *self.family.inference["native"](*arguments, packed),
                    *self.family.backward["native"](*grads),
                ))  # fmt: skip
            torch.set_num_threads(before)
            for other in results[1:]:
                assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))

    def test_opcheck(self, lane):
        family = self.family
        # What a compiler sees is the same in every lane: the whole check in one, the op's own properties in all.
        tests = ["test_schema", "test_autograd_registration", "test_faketensor"]
        whole = {"test_utils": [*tests, "test_aot_dispatch_dynamic"] if lane.name == "reference" else tests}
        for options in (("bias", "two"), family.options):
            made = family.make((2, 2, 3, 4), options, torch.float32, lane.device, grad=False)
            forward, inference, backward = (
                lanes.op_of(op, lane) for op in (family.forward, family.inference, family.backward)
            )
            arguments = family.arguments(made, options)
            torch.library.opcheck(inference, (*arguments, None), **whole)
            outputs = forward(*arguments)
            torch.library.opcheck(backward, self.backward_arguments(arguments, outputs), **whole)
            wanted = [
                t.clone().requires_grad_() if isinstance(t, Tensor) and t.is_floating_point() and i < 4 else t
                for i, t in enumerate(arguments)
            ]
            torch.library.opcheck(forward, wanted, **whole)

    def backward_arguments(self, arguments, outputs) -> tuple:
        raise NotImplementedError

    def test_compile(self, lane):
        if lane.level not in (None, "scalar"):
            pytest.skip("a compiler sees the same op at every level")
        for options in (("bias", "state", "two", "lengths"), self.family.options):
            made = self.family.make((3, 2, 3, 4), options, torch.float32, lane.device)
            function = self.family.plain(made, options, lane.backend)
            leaves = [t for t in made.values() if t.requires_grad]
            torch._dynamo.reset()
            compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
            results = []
            for run in (function, compiled):
                torch.manual_seed(7)
                outputs = run(*made.values())
                results.append((*outputs, *torch.autograd.grad([y.sum() for y in outputs], leaves)))
            torch.manual_seed(7)
            with torch.no_grad():
                results.append((*compiled(*made.values()), *results[0][len(outputs) :]))
            for other in results[1:]:
                for a, b in zip(other, results[0], strict=True):
                    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)

    def test_double_backward(self, lane):
        """Second derivatives in every lane, against float64."""
        for options in (("bias", "state", "two"), self.family.options):
            made = self.family.make((3, 2, 3, 4), options, torch.float32, lane.device)
            exact = {
                name: t.detach().double().requires_grad_(t.requires_grad) if t.is_floating_point() else t
                for name, t in made.items()
            }
            found = []
            for given, backend in ((made, lane.backend), (exact, "torch")):
                leaves = [t for t in given.values() if t.requires_grad]
                outputs = self.family.ours(given, options, backend)(*given.values())
                grads = torch.autograd.grad(sum(y.square().sum() for y in outputs), leaves, create_graph=True)
                found.append(torch.autograd.grad(sum(g.square().sum() for g in grads), leaves))
            for a, b in zip(*found, strict=True):
                torch.testing.assert_close(a.double(), b, rtol=1e-3, atol=1e-3 * float(b.abs().max()))

    def test_autocast(self, lane):
        """x and the weights are cast to autocast's dtype, states stay what they were."""
        narrow = some(lane, 1)
        options = tuple(option for option in self.family.options if option != "relu")
        made = self.family.make((3, 2, 4, 5), options, torch.float32, lane.device)
        function = self.family.ours(made, options, lane.backend)
        with torch.autocast(lane.device, narrow):
            y, *states = function(*made.values())
        assert y.dtype == narrow and all(state.dtype == torch.float32 for state in states)
        cast = {
            name: t.to(narrow) if name in ("x", "w_ih", "w_hh", "w_hr", "b_ih", "b_hh") else t
            for name, t in made.items()
        }
        expected = function(*cast.values())
        for a, b in zip((y, *states), expected, strict=True):
            limit = 4 * torch.finfo(narrow).eps
            torch.testing.assert_close(a, b, rtol=limit, atol=limit)
        leaves = [t for t in made.values() if t.requires_grad]
        grads = torch.autograd.grad([y, *states], leaves, [torch.ones_like(t) for t in (y, *states)])
        assert all(g.dtype == t.dtype and g.isfinite().all() for g, t in zip(grads, leaves, strict=True))

    def test_gradcheck(self, few_options):
        made = self.family.make((3, 2, 2, 2), few_options, torch.float64)
        function = self.family.ours(made, few_options, "torch")
        values = list(made.values())
        assert torch.autograd.gradcheck(function, values)
        assert torch.autograd.gradgradcheck(function, values, fast_mode=bool(few_options))

    def test_gradcheck_of_the_expectation(self):
        made = self.family.make((3, 2, 2, 3), self.family.options, torch.float64)
        function = self.family.ours(made, self.family.options, "torch", training=False)
        assert torch.autograd.gradcheck(function, list(made.values()), fast_mode=True)

    def test_transforms(self):
        """torch.func and forward-mode AD run the reference."""
        made = self.family.make((3, 2, 2, 3), ("bias",), torch.float64, grad=False)
        function, rest = self.family.ours(made, ("bias",), None), list(made.values())[1:]
        jacobian = torch.func.jacrev(lambda x: function(x, *rest)[0].sum())(made["x"])
        x = made["x"].clone().requires_grad_()
        (expected,) = torch.autograd.grad(function(x, *rest)[0].sum(), x)
        torch.testing.assert_close(jacobian, expected)
        _, tangent = torch.func.jvp(lambda x: function(x, *rest)[0].sum(), (made["x"],), (torch.ones_like(x),))
        torch.testing.assert_close(tangent, expected.sum())

    def test_explain_says_which_back_end_runs(self, lane, capsys):
        x = torch.randn(2, 3, 8, device=lane.device)
        assert explain(self.family.name, x, backend=lane.backend).choice == lane.backend
        assert self.family.name in capsys.readouterr().out
        assert twin_of(lane.backend, x.device) in self.family.forward.twins()

    # ---- Bad input ---------------------------------------------------------------------------------------------

    def test_back_ends_that_cannot(self):
        made = self.family.make((2, 2, 3, 4), (), torch.float64)
        with pytest.raises(BackendError, match=rf"{self.family.name}.*CUDA device"):
            self.family.ours(made, (), "cuda")(*made.values())
        with pytest.raises(BackendError, match=r"float64|not loaded"):
            self.family.ours(made, (), "cpu")(*made.values())

    def test_bad_input(self):
        g, name = self.family.gates, self.family.name
        made = self.family.make((4, 2, 3, 5), ("bias",), torch.float32)
        x, w_ih, w_hh, b_ih, b_hh = made.values()
        good = {"x": x, "w_ih": w_ih, "w_hh": w_hh, "b_ih": b_ih, "b_hh": b_hh}
        state = torch.zeros(1, 2, 5)
        states = (lambda h: (h, torch.zeros(1, 2, 5))) if name == "lstm" else (lambda h: h)
        h_name = r"hx\[0\]" if name == "lstm" else "hx"
        zoneout = "zoneout_h" if name == "lstm" else "zoneout"
        bad = [
            ({"x": [1.0]}, TypeError, "x: expected a tensor, got list"),
            ({"x": torch.ones(4, 2, 3, dtype=torch.int64)}, TypeError, "x: expected a dense floating point"),
            ({"x": torch.ones(4, 3)}, ValueError, r"x: expected shape \[time, batch, input_size\], got \(4, 3\)"),
            ({"w_ih": None}, TypeError, "w_ih: expected a dense floating point tensor, got NoneType"),
            ({"w_ih": torch.ones(1, g * 5, 4)}, ValueError, rf"w_ih: expected shape \(1, {g * 5}, 3\)"),
            ({"w_ih": torch.ones(g * 5, 3)}, ValueError, r"w_ih: expected shape \[directions"),
            ({"w_hh": torch.ones(g * 5, 5)}, ValueError, r"w_hh: expected shape \[directions"),
            ({"w_hh": torch.ones(3, g * 5, 5)}, ValueError, r"w_hh: expected shape \[1 or 2 directions"),
            ({"w_hh": torch.ones(1, g * 5, 4)}, ValueError, rf"w_hh: expected shape \(1, {g * 5}, 5\)"),
            ({"w_hh": torch.ones(1, g * 5, 5, dtype=torch.int32)}, TypeError, "w_hh: expected a dense floating"),
            ({"w_hh": torch.ones(1, g * 5, 5, device="meta")}, ValueError, "w_hh: expected the device of x, cpu"),
            ({"b_ih": torch.ones(g * 5)}, ValueError, rf"b_ih: expected shape \(1, {g * 5}\)"),
            ({"b_hh": torch.ones(1, 4)}, ValueError, rf"b_hh: expected shape \(1, {g * 5}\)"),
            ({"b_hh": 1.0}, TypeError, "b_hh: expected a dense floating point tensor or None, got float"),
            ({"hx": states(torch.ones(2, 2, 5))}, ValueError, rf"{h_name}: expected shape \(1, 2, 5\)"),
            ({"hx": states(torch.ones(1, 3, 5))}, ValueError, rf"{h_name}: expected shape \(1, 2, 5\)"),
            ({"hx": states(state.int())}, TypeError, f"{h_name}: expected a dense floating point"),
            ({"h_mask": torch.ones(2, 5)}, ValueError, r"h_mask: expected shape \(1, 2, 5\)"),
            ({"layer_norm": torch.ones(4)}, TypeError, "layer_norm: expected (two|four) tensors"),
            ({"lengths": [1, 2]}, TypeError, "lengths: expected an int64 tensor of shape .batch., got list"),
            ({"lengths": torch.ones(2)}, TypeError, "lengths: expected an int64 tensor"),
            ({"lengths": torch.ones(3, dtype=torch.int64)}, ValueError, r"lengths: expected shape \(2,\)"),
            ({"lengths": torch.tensor([1, 5])}, ValueError, "lengths: expected values from 0 to 4.*got 1 to 5"),
            ({"lengths": torch.tensor([-1, 4])}, ValueError, "lengths: expected values from 0 to 4.*got -1 to 4"),
            ({zoneout: 1.5}, ValueError, f"{zoneout}: expected a probability from 0 to 1, got 1.5"),
            ({zoneout: -0.1}, ValueError, f"{zoneout}: expected a probability"),
            ({zoneout: float("nan")}, ValueError, f"{zoneout}: expected a probability"),
            ({zoneout: "1"}, TypeError, f"{zoneout}: expected a number, got str"),
            ({"eps": 0.0}, ValueError, "eps: expected a number > 0"),
            ({"backend": "cdua"}, BackendError, "'cdua' is no back end"),
        ]
        for change, error, message in [*bad, *self.more_bad_input(made)]:
            for gradients in (True, False):
                with torch.set_grad_enabled(gradients), pytest.raises(error, match=message):
                    self.family.function(**{**good, **change})

    def more_bad_input(self, made) -> list[tuple[dict, type, str]]:
        return []
