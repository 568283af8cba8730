"""Drop-in module of room group_norm: GroupNorm, with torch's signature and state_dict."""

from __future__ import annotations

from torch import Tensor, nn

from ..ops.group_norm import group_norm

__all__ = ["GroupNorm"]


class GroupNorm(nn.GroupNorm):
    """``torch.nn.GroupNorm`` on fastdl's kernels; ``forward(x, scale, shift)`` is AdaGN.

    num_groups, num_channels, eps, affine, device, dtype   as torch's, and its ``bias`` where torch has it
    backend   None or "auto", "cpu", "cuda", "triton", "torch"

    ``forward(x, scale=None, shift=None)``: x [N, C, *]; scale, shift [N, C] -> scale * GroupNorm(x) + shift.
    state_dict is that of torch's layer.

    >>> import torch, fastdl
    >>> norm = fastdl.nn.GroupNorm(4, 8)
    >>> norm(torch.randn(2, 8, 5, 5), torch.randn(2, 8), torch.randn(2, 8)).shape
    torch.Size([2, 8, 5, 5])
    """

    # A class attribute, so that a torch layer that was turned into this one has it too.
    backend: str | None = None

    def __init__(self, *args, backend: str | None = None, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.backend = backend

    def extra_repr(self) -> str:
        return super().extra_repr() + (f", backend={self.backend!r}" if self.backend else "")

    def forward(self, input: Tensor, scale: Tensor | None = None, shift: Tensor | None = None) -> Tensor:
        x = input  # torch's name, which callers may use
        if isinstance(x, Tensor) and x.dim() > 1 and x.shape[1] != self.num_channels:
            raise ValueError(f"x: expected {self.num_channels} channels, [N, C, *], got shape {tuple(x.shape)}")
        return group_norm(
            x,
            self.num_groups,
            self.weight,
            self.bias,
            eps=self.eps,
            scale=scale,
            shift=shift,
            backend=self.backend,
        )
