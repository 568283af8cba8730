"""Masks of keys as `ops.attention` takes them best: lengths where only the ends of sequences are hidden."""

from __future__ import annotations

import torch
from torch import Tensor

from ..ops._masks import values_are_known


def lengths_of(kept: Tensor, look: bool | None = None) -> Tensor | None:
    """kept  bool [batch, keys] -> int32 [batch]: how many keys, from the first, are kept; None where others are.

    look  whether values may be looked at, which waits for a GPU; None: as ops do. Where not, the answer is None.
    """
    if not (values_are_known(kept) if look is None else look):
        return None
    lens = kept.sum(-1, dtype=torch.int32)
    ahead = torch.arange(kept.shape[-1], dtype=torch.int32, device=kept.device) < lens[:, None]
    return lens if torch.equal(ahead, kept) else None


def kept_by(additive: Tensor) -> Tensor | None:
    """additive  floating -> bool, True where it is 0, if all else is -inf; None where it says more than that."""
    if additive.requires_grad or not values_are_known(additive):
        return None
    kept = additive == 0
    return kept if bool((kept | (additive == -torch.inf)).all()) else None


def without_hidden(values: Tensor, weights: Tensor) -> Tensor:
    """values [..., keys, size] with zeros where no query has a weight [..., queries, keys]: padding may hold NaN, and 0
    times NaN is NaN."""
    return values.masked_fill(~(weights != 0).any(-2).unsqueeze(-1), 0.0)
