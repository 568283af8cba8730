"""fastdl.testing: what passes and, above all, what must not."""

from __future__ import annotations

import pytest
import torch

from fastdl import testing


def test_poisoned_memory_is_seen():
    def forgets(x):
        y = torch.empty_like(x)
        y[1:] = x[1:]
        return y

    x = torch.ones(8, 8)
    with pytest.raises(AssertionError, match="output 0: error inf"):
        testing.check(forgets, (x,), peer=lambda a: a.clone())
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.parametrize(
    ("op", "message"),
    [
        (lambda x: x.exp() * 1.001, "output 0: error"),
        (lambda x: x.detach().exp() + 0 * x, "gradient of argument 0: error"),
        (lambda x: x.exp()[1:], r"shape \(3, 5\), expected \(4, 5\)"),
        (lambda x: x.exp() + torch.rand(()) * 1e-3, "two runs differ"),
    ],
    ids=["value", "gradient", "shape", "random"],
)
def test_wrong_ops_fail(op, message):
    x = torch.randn(4, 5, requires_grad=True)
    with pytest.raises(AssertionError, match=message):
        testing.check(op, (x,), peer=torch.exp)


def test_aliases_and_writes_fail():
    with pytest.raises(AssertionError, match="shares memory with argument 0"):
        testing.check(lambda x: x, (torch.ones(3),), peer=torch.clone)
    with pytest.raises(AssertionError, match="argument 0 was written to"):
        testing.check(lambda x: x.fill_(1).clone(), (torch.zeros(3),), peer=torch.ones_like)


def test_infinities_and_empty():
    inf = torch.tensor([float("inf"), 1.0])
    assert testing.largest_error(inf, inf) == 0
    assert testing.largest_error(-inf, inf) == float("inf")
    assert testing.largest_error(torch.empty(0), torch.empty(0)) == 0
    assert testing.check(torch.exp, (torch.empty(0, 3),), peer=torch.exp) == {"output 0": 0.0}
    with pytest.raises(ValueError, match="exact: expected a function"):
        testing.check(torch.exp, (inf,), peer=None)
