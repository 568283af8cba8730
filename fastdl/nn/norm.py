"""Drop-in modules of room norm: LayerNorm and RMSNorm, with torch's signatures and state_dicts."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ..backend import BACKENDS
from ..ops.norm import layer_norm, rms_norm

__all__ = ["LayerNorm", "RMSNorm"]


def _rows(x: Tensor, shape: tuple[int, ...]) -> Tensor:
    """x [..., *shape] -> [..., cols]."""
    if x.shape[x.dim() - len(shape) :] != shape:
        raise ValueError(f"x: expected shape [..., {', '.join(map(str, shape))}], got {tuple(x.shape)}")
    return x if len(shape) == 1 else x.reshape(*x.shape[: x.dim() - len(shape)], math.prod(shape))


class _Fused:
    """What both modules add to torch's: the residual add and the dropout before the norm."""

    # Class attributes, so that a torch layer that was turned into one of these has them too.
    dropout = 0.0
    backend: str | None = None

    def _configure(self, dropout: float, backend: str | None) -> None:
        if not isinstance(dropout, (int, float)) or not 0 <= dropout <= 1:
            raise ValueError(f"dropout: expected a number from 0 to 1, got {dropout!r}")
        if backend not in (None, "auto", *BACKENDS):
            raise ValueError(f"backend: expected None, 'auto' or one of {', '.join(BACKENDS)}, got {backend!r}")
        self.dropout, self.backend = dropout, backend

    def extra_repr(self) -> str:
        more = f", dropout={self.dropout}" if self.dropout else ""
        return super().extra_repr() + more + (f", backend={self.backend!r}" if self.backend else "")

    def _torchs(self, x: Tensor, residual: Tensor | None, return_sum: bool) -> bool:
        """Nested tensors have no kernels: torch's own layer takes them, unless something is asked that it cannot do."""
        if not isinstance(x, Tensor) or not x.is_nested:
            return False
        extras = residual is not None or return_sum or (self.dropout and self.training) or self.backend
        return not extras and not getattr(self, "weight_offset", 0.0)

    def _run(self, function, x: Tensor, residual: Tensor | None, return_sum: bool, *parameters, **options):
        p = options.pop("dropout_p")
        if not isinstance(x, Tensor):
            raise TypeError(f"x: expected a tensor, got {type(x).__name__}")
        shape = tuple(self.normalized_shape)
        given = x.shape
        result = function(
            _rows(x, shape),
            *(None if t is None else t.reshape(-1) for t in parameters),
            residual=None if residual is None else _rows(residual, shape),
            dropout_p=(self.dropout if self.training else 0.0) if p is None else p,
            return_sum=return_sum,
            backend=self.backend,
            **options,
        )
        if len(shape) == 1:
            return result
        return tuple(t.reshape(given) for t in result) if return_sum else result.reshape(given)


class LayerNorm(_Fused, nn.LayerNorm):
    """``torch.nn.LayerNorm`` on fastdl's kernels; ``forward(x, residual)`` adds the residual first.

    normalized_shape, eps, elementwise_affine, bias, device, dtype   as torch's
    dropout   probability, in training, of zeroing an element of input before the residual is added
    backend   None or "auto", "cpu", "cuda", "torch"

    ``forward(input, residual=None, return_sum=False, *, dropout_p=None)``: input, residual [..., *normalized_shape]
    -> y, or (y, s) with s = residual + dropout(input), which a pre-norm block adds its next branch to; dropout_p is
    used in place of the layer's dropout, in evaluation too. state_dict is that of torch's layer.

    >>> import torch, fastdl
    >>> norm = fastdl.nn.LayerNorm(8)
    >>> y, s = norm(torch.randn(2, 8), torch.randn(2, 8), return_sum=True)
    >>> y.shape, s.shape
    (torch.Size([2, 8]), torch.Size([2, 8]))
    """

    def __init__(
        self,
        normalized_shape: int | list[int] | torch.Size,
        eps: float = 1e-5,
        elementwise_affine: bool = True,
        bias: bool = True,
        device=None,
        dtype=None,
        *,
        dropout: float = 0.0,
        backend: str | None = None,
    ) -> None:
        super().__init__(normalized_shape, eps, elementwise_affine, bias, device, dtype)
        self._configure(dropout, backend)

    def forward(
        self,
        input: Tensor,
        residual: Tensor | None = None,
        return_sum: bool = False,
        *,
        dropout_p: float | None = None,
    ):
        if self._torchs(input, residual, return_sum):
            return super().forward(input)
        parameters = (self.weight, self.bias)
        return self._run(layer_norm, input, residual, return_sum, *parameters, eps=self.eps, dropout_p=dropout_p)


class RMSNorm(_Fused, nn.RMSNorm):
    """``torch.nn.RMSNorm`` on fastdl's kernels; ``forward(x, residual)`` adds the residual first.

    normalized_shape, eps, elementwise_affine, device, dtype   as torch's (eps None: the smallest step of x's dtype)
    weight_offset      1.0 for weights stored minus one (Gemma)
    dropout, backend   as in `LayerNorm`

    >>> import torch, fastdl
    >>> fastdl.nn.RMSNorm(8, eps=1e-6)(torch.randn(2, 3, 8)).shape
    torch.Size([2, 3, 8])
    """

    weight_offset = 0.0

    def __init__(
        self,
        normalized_shape: int | list[int] | torch.Size,
        eps: float | None = None,
        elementwise_affine: bool = True,
        device=None,
        dtype=None,
        *,
        weight_offset: float = 0.0,
        dropout: float = 0.0,
        backend: str | None = None,
    ) -> None:
        super().__init__(normalized_shape, eps, elementwise_affine, device, dtype)
        self._configure(dropout, backend)
        self.weight_offset = weight_offset

    def forward(
        self, x: Tensor, residual: Tensor | None = None, return_sum: bool = False, *, dropout_p: float | None = None
    ):
        if self._torchs(x, residual, return_sum):
            return super().forward(x)
        eps = self.eps
        if eps is None:  # as torch's
            eps = torch.finfo(x.dtype if isinstance(x, Tensor) and x.is_floating_point() else torch.float32).eps
        options = {"eps": eps, "weight_offset": self.weight_offset, "dropout_p": dropout_p}
        return self._run(rms_norm, x, residual, return_sum, self.weight, **options)
