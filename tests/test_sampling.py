"""Sampling: each step against transformers' own, reproducibility, distributions, and bad options."""

from __future__ import annotations

import pytest
import torch

from fastdl.llm.sampling import Sampler, Sampling, candidates, penalize


def kept(logits, **options):
    return set(candidates(logits, **({"top_k": 0, "top_p": 1.0, "min_p": 0.0} | options))[1].tolist())


def warped(logits, *warpers):
    scores = logits[None].clone()
    for warper in warpers:
        scores = warper(torch.zeros(1, 1, dtype=torch.long), scores)
    return set(scores[0].isfinite().nonzero().flatten().tolist())


@pytest.mark.parametrize("scale", [0.01, 1.0, 6.0], ids=["flat", "usual", "peaked"])
@pytest.mark.parametrize("vocab", [3, 300, 5000])
def test_truncation_is_transformers(vocab, scale):
    process = pytest.importorskip("transformers.generation.logits_process")
    logits = torch.randn(vocab) * scale
    for top_k in (1, 2, 40, 2999):
        assert kept(logits, top_k=top_k) == warped(logits, process.TopKLogitsWarper(top_k))
    for top_p in (0.1, 0.5, 0.9, 0.999):
        assert kept(logits, top_p=top_p) == warped(logits, process.TopPLogitsWarper(top_p))
        both = warped(logits, process.TopKLogitsWarper(50), process.TopPLogitsWarper(top_p))
        assert kept(logits, top_k=50, top_p=top_p) == both
    for min_p in (0.01, 0.3, 1.0):
        assert kept(logits, min_p=min_p) == warped(logits, process.MinPLogitsWarper(min_p))


def test_repeat_penalty_is_transformers():
    process = pytest.importorskip("transformers.generation.logits_process")
    logits, ids = torch.randn(50), [3, 7, 3, 49]
    expected = process.RepetitionPenaltyLogitsProcessor(1.3)(torch.tensor([ids]), logits[None].clone())[0]
    before = logits.clone()
    torch.testing.assert_close(penalize(logits, ids, 1.3), expected)
    torch.testing.assert_close(logits, before, rtol=0, atol=0)
    torch.testing.assert_close(penalize(logits, [9, 9, *ids], 1.3, last=4), expected)
    torch.testing.assert_close(penalize(logits, ids, 1.3, last=0), logits, rtol=0, atol=0)


def test_greedy():
    logits = torch.tensor([0.0, 3.0, 3.0, -1.0])
    assert Sampler(Sampling()).choose(logits, []) == 1
    assert Sampler(Sampling(temperature=5.0, top_k=1)).choose(logits, []) == 1
    assert Sampler(Sampling(repeat_penalty=2.0)).choose(logits, [1]) == 2
    assert Sampler(Sampling(temperature=1e-300, seed=1)).choose(torch.tensor([0.0, 3.0, 2.0]), []) == 1


@pytest.mark.parametrize("options", [{}, {"top_k": 3}, {"top_p": 0.8}, {"min_p": 0.2}], ids=str)
def test_draws_follow_the_distribution(options):
    logits = torch.tensor([1.0, 0.0, 2.0, -3.0, 1.5])
    temperature = 0.7
    ids = sorted(kept(logits, **options))
    expected = torch.zeros(5)
    expected[ids] = (logits[ids] / temperature).softmax(0)
    sampler = Sampler(Sampling(temperature=temperature, seed=3, **options))
    draws = torch.bincount(torch.tensor([sampler.choose(logits, []) for _ in range(4000)]), minlength=5) / 4000
    assert (draws - expected).abs().max() < 0.035  # 4 standard deviations
    assert set(draws.nonzero().flatten().tolist()) <= set(ids)


def test_seed():
    logits = torch.randn(1000)

    def draws(seed):
        sampler = Sampler(Sampling(temperature=1.0, seed=seed))
        return [sampler.choose(logits, []) for _ in range(20)]

    assert draws(7) == draws(7) != draws(8)
    assert draws(None) != draws(None)


def test_masked_logits_are_never_drawn():
    logits = torch.full((600,), float("-inf"))
    logits[[5, 77]] = torch.tensor([0.0, 1.0])
    for options in ({}, {"top_k": 500}, {"top_p": 0.99}, {"min_p": 0.001}):
        sampler = Sampler(Sampling(temperature=1.0, seed=0, **options))
        assert {sampler.choose(logits, []) for _ in range(50)} <= {5, 77}


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"temperature": -1.0}, ValueError),
        ({"temperature": float("inf")}, ValueError),
        ({"temperature": float("nan")}, ValueError),
        ({"temperature": "hot"}, TypeError),
        ({"top_k": -1}, ValueError),
        ({"top_k": 1.5}, TypeError),
        ({"top_p": 1.1}, ValueError),
        ({"min_p": -0.1}, ValueError),
        ({"repeat_penalty": 0.0}, ValueError),
        ({"repeat_last": -2}, ValueError),
        ({"seed": -1}, ValueError),
        ({"seed": 1.0}, TypeError),
    ],
)
def test_bad_options(options, error):
    with pytest.raises(error, match=next(iter(options))):
        Sampling(**options)
