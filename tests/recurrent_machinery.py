"""A recurrent room under torch's machinery, and its error messages: `Machinery`, from which tests/test_lstm.py and
its kin derive."""

from __future__ import annotations

import lanes
import pytest
import torch
from recurrent import Contract, some
from torch import Tensor

from fastdl import BackendError, explain
from fastdl._library import twin_of
from fastdl.ops._recurrent import pack


class Machinery(Contract):
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
