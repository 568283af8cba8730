"""fastdl.accelerate on GroupNorm, BatchNorm1d and BatchNorm2d: swapped, trained, and given back."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

import fastdl

X = torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def small() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(inplace=True),
        nn.Conv2d(8, 8, 3, stride=2),
        nn.GroupNorm(4, 8),
        nn.Flatten(),
        nn.Linear(72, 10),
        nn.BatchNorm1d(10, momentum=None),
    )


def state(model: nn.Module) -> list:
    return [(name, type(module), dict(vars(module))) for name, module in model.named_modules()]


def test_swap_and_restore(native):
    model = small().eval()
    before, expected = state(model), model(X)
    report = fastdl.accelerate(model)
    assert [layer.name for layer in report.swapped] == ["1", "4", "7"] and not report.left
    kinds = (fastdl.nn.BatchNorm2d, fastdl.nn.GroupNorm, fastdl.nn.BatchNorm1d)
    assert tuple(type(model[i]) for i in (1, 4, 7)) == kinds and isinstance(model[1], nn.BatchNorm2d)
    torch.testing.assert_close(model(X), expected, rtol=1e-4, atol=1e-5)
    assert [layer.reason for layer in fastdl.accelerate(model).left] == ["swapped already"] * 3
    fastdl.restore(model)
    assert state(model) == before and torch.equal(model(X), expected)


@pytest.mark.parametrize("backend", [None, "torch"])
def test_training_follows_the_unswapped_run(native, backend):
    """20 steps: the same losses, and the same running statistics at the end, which evaluation uses."""

    def train(swapped):
        model = small()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        if swapped:
            fastdl.accelerate(model, backend=backend)
        losses = []
        for step in range(20):
            loss = (model(X.roll(step, 0)) - X.flatten(1)[:, :10]).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return torch.tensor(losses), model.eval()

    (plain, theirs), (fused, ours) = train(False), train(True)
    assert plain[-1] < 0.9 * plain[0]
    torch.testing.assert_close(fused, plain, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(ours(X), theirs(X), rtol=1e-2, atol=1e-2)
    for (name, a), b in zip(ours.state_dict().items(), theirs.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-2, msg=lambda m, name=name: f"{name}: {m}")


def test_copies_and_pickles(native):
    model = small().eval()
    fastdl.accelerate(model)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        torch.testing.assert_close(other(X), model(X))
        fastdl.restore(other)
        assert type(other[1]) is nn.BatchNorm2d and type(other[4]) is nn.GroupNorm
    assert list(model.state_dict()) == list(small().state_dict())


def test_channels_last_models(native):
    model, images = small().to(memory_format=torch.channels_last), X.contiguous(memory_format=torch.channels_last)
    plain = copy.deepcopy(model)
    fastdl.accelerate(model)
    torch.testing.assert_close(model(images), plain(images), rtol=1e-4, atol=1e-4)
    assert model[1](model[0](images)).is_contiguous(memory_format=torch.channels_last)


def test_fused_and_lazy_layers_are_left(native):
    model = nn.Sequential(fastdl.nn.BatchNorm2d(3), nn.LazyBatchNorm2d(), fastdl.nn.GroupNorm(1, 3))
    report = fastdl.accelerate(model)
    assert [layer.reason for layer in report.left] == ["is a fused layer"] * 2
    assert report.others == {"LazyBatchNorm2d": 1}
