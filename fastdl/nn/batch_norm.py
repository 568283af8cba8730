"""Drop-in modules of room batch_norm: BatchNorm1d and BatchNorm2d, with torch's signatures and state_dicts."""

from __future__ import annotations

from torch import Tensor, nn

from ..ops.batch_norm import batch_norm

__all__ = ["BatchNorm1d", "BatchNorm2d"]


class _Fused:
    """What both modules add to torch's: the residual add and the ReLU after the norm."""

    # Class attributes, so that a torch layer that was turned into one of these has them too.
    relu = False
    backend: str | None = None

    def __init__(self, *args, relu: bool = False, backend: str | None = None, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.relu, self.backend = relu, backend

    def extra_repr(self) -> str:
        more = ", relu=True" if self.relu else ""
        return super().extra_repr() + more + (f", backend={self.backend!r}" if self.backend else "")

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        x = input  # torch's name, which callers may use
        if not isinstance(x, Tensor):
            raise TypeError(f"x: expected a tensor, got {type(x).__name__}")
        self._check_input_dim(x)
        track, momentum = self.training and self.track_running_stats, self.momentum
        if track and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
            if momentum is None:  # the plain average of all batches
                momentum = self.num_batches_tracked.float().reciprocal()
        # As torch's: without statistics of its own the layer uses those of the batch in evaluation too.
        own = self.running_mean is not None and self.running_var is not None
        running = (self.running_mean, self.running_var) if own and (track or not self.training) else (None, None)
        return batch_norm(
            x,
            *running,
            self.weight,
            self.bias,
            training=self.training or not own,
            momentum=0.0 if momentum is None else momentum,
            eps=self.eps,
            residual=residual,
            relu=self.relu,
            backend=self.backend,
        )


class BatchNorm1d(_Fused, nn.BatchNorm1d):
    """``torch.nn.BatchNorm1d`` on fastdl's kernels; ``forward(x, residual)`` adds the residual after the norm.

    num_features, eps, momentum, affine, track_running_stats, device, dtype   as torch's; ``bias`` where torch has it
    relu      a ReLU at the end, after the residual
    backend   None or "auto", "cpu", "cuda", "triton", "torch"

    ``forward(x, residual=None)``: x, residual [N, C] or [N, C, L]. state_dict is that of torch's layer.

    >>> import torch, fastdl
    >>> fastdl.nn.BatchNorm1d(8)(torch.randn(4, 8)).shape
    torch.Size([4, 8])
    """


class BatchNorm2d(_Fused, nn.BatchNorm2d):
    """``torch.nn.BatchNorm2d`` on fastdl's kernels: with ``relu=True``, ``norm(x, shortcut)`` ends a ResNet block.

    The arguments are those of `BatchNorm1d`; ``forward(x, residual=None)``: x, residual [N, C, H, W].

    >>> import torch, fastdl
    >>> norm = fastdl.nn.BatchNorm2d(8, relu=True)
    >>> float(norm(torch.randn(2, 8, 5, 5), torch.randn(2, 8, 5, 5)).min())
    0.0
    """
