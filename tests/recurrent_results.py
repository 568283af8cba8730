"""Outputs and gradients of a recurrent room in every lane: `Results`, from which tests/test_lstm.py derives."""

from __future__ import annotations

import itertools

import pytest
import torch
from recurrent import EMPTY, LARGE, SHAPES, SLOW, Contract, all_options, some

from fastdl.ops._recurrent import pack
from fastdl.reference import philox
from fastdl.testing import check, poisoned


class Results(Contract):
    # ---- Outputs and gradients in every lane -------------------------------------------------------------------

    def test_options(self, lane, options):
        """Each option alone, all pairs, all together: in float32 and one more dtype; float32 states too."""
        every = all_options(self.family)
        sizes, index = ((3, 3, 3, 5) if lane.name in SLOW else (4, 3, 7, 18)), every.index(options)
        alone = len(options) in (0, 1, len(self.family.options))
        if lane.name in SLOW and not alone and index % 3:
            pytest.skip("every third pair without hardware")
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

    def test_many_rows(self, lane):
        """Steps times sequences enough for the products over all steps that are ours on the CPU."""
        if lane.name in SLOW:
            pytest.skip("minutes without hardware")
        sizes, every = (6, 33, 7, 9), self.family.options
        for options in (("bias", "state", "two"), tuple(option for option in every if option != "layer_norm")):
            self.family.compare(lane, sizes, options, torch.float32)
        # Layer norm makes large errors of small ones, as chance has it: held to the reference's error, norm over norm.
        made = self.family.make(sizes, every, torch.float32, lane.device)
        exact = {
            name: t.detach().double().requires_grad_(t.requires_grad) if t.is_floating_point() else t
            for name, t in made.items()
        }
        found = []
        for given, backend in ((exact, "torch"), (made, "torch"), (made, lane.backend)):
            outputs = self.family.ours(given, every, backend)(*given.values())
            leaves = [t for t in given.values() if t.requires_grad]
            grads = torch.autograd.grad(outputs, leaves, [torch.ones_like(y) for y in outputs])
            found.append((*outputs, *grads))
        for right, reference, mine in zip(*found, strict=True):
            limit = 2 * float((reference - right).norm()) + 4 * torch.finfo(torch.float32).eps * float(right.norm())
            assert float((mine - right).norm()) <= limit

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
