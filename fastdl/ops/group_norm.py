"""Room group_norm: group norm, with the scale and shift of every sample that diffusion models add to it (AdaGN).

    h = (x - mean) / sqrt(var + eps)         mean, var: over a sample's group of channels and all their positions
    y = scale * (h * weight + bias) + shift  rounded to the dtype of x; statistics and products are float32

dtypes of x: float32, bfloat16, float16, and float64 on the torch back end. The other tensors may have another dtype.
Gradients to all five; twice (statistics are recomputed from x in the double backward).

Back ends: cpu (csrc/cpu/group_norm*.cpp), cuda (csrc/cuda/group_norm*.cuh), triton (kernels/group_norm.py), torch
(fastdl/reference/group_norm.py). What they refuse, and what they copy:

    | back end          | what          |                                                                             |
    | cpu, cuda, triton | float64       | refused: their kernels accumulate in float32                                |
    | cpu, cuda, triton | strides       | taken, channels last too; x is copied to one piece first, y is contiguous |

Under CUDA autocast it computes in float32, as torch's does. Test: ``pytest tests/test_group_norm.py``; benchmark:
``pytest bench/bench_group_norm.py``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import backend as backends
from .._library import Op, gradient_of, triton_twin, twin_of
from ..reference import group_norm as reference
from ..reference.norm import compute_dtype
from ._channels import check_images, check_parameter, readable
from ._checks import check_eps

__all__ = ["group_norm"]


def _fake_forward(x, weight, bias, scale, shift, groups, eps):
    wide = compute_dtype(x.dtype)
    rows = (x.shape[0], groups)
    return x.new_empty(x.shape), x.new_empty(rows, dtype=wide), x.new_empty(rows, dtype=wide)


def _fake_backward(
    grad, x, weight, bias, scale, mean, rstd, groups, eps, need_weight, need_bias, need_scale, need_shift
):  # fmt: skip
    wide, (n, c) = compute_dtype(x.dtype), x.shape[:2]
    return (
        x.new_empty(x.shape),
        x.new_empty(c if need_weight else 0, dtype=wide),
        x.new_empty(c if need_bias else 0, dtype=wide),
        x.new_empty((n, c) if need_scale else 0, dtype=wide),
        x.new_empty((n, c) if need_shift else 0, dtype=wide),
    )


FORWARD = Op(
    "group_norm_forward(Tensor x, Tensor? weight, Tensor? bias, Tensor? scale, Tensor? shift, int groups, float eps) "
    "-> (Tensor y, Tensor mean, Tensor rstd)",
    fake=_fake_forward,
    reference=reference.group_norm_forward,
    triton=triton_twin("group_norm", "group_norm_forward"),
)
BACKWARD = Op(
    "group_norm_backward(Tensor grad, Tensor x, Tensor? weight, Tensor? bias, Tensor? scale, Tensor mean, Tensor rstd, "
    "int groups, float eps, bool need_weight, bool need_bias, bool need_scale, bool need_shift) "
    "-> (Tensor dx, Tensor dweight, Tensor dbias, Tensor dscale, Tensor dshift)",
    fake=_fake_backward,
    reference=reference.group_norm_backward,
    triton=triton_twin("group_norm", "group_norm_backward"),
)


def _setup(ctx, inputs, output):
    x, weight, bias, scale, shift, ctx.groups, ctx.eps = inputs
    _, mean, rstd = output
    ctx.save_for_backward(x, weight, bias, scale, mean, rstd)
    ctx.dtypes = tuple(None if t is None else t.dtype for t in (weight, bias, scale, shift))
    ctx.mark_non_differentiable(mean, rstd)
    ctx.set_materialize_grads(False)


def _backward(twin, ctx, grad, _mean, _rstd):
    need = ctx.needs_input_grad
    if grad is None:
        return (None,) * 7
    dx, *rest = BACKWARD[twin](grad, *ctx.saved_tensors, ctx.groups, ctx.eps, *need[1:5])
    gradients = (g.to(dtype) if needed else None for g, dtype, needed in zip(rest, ctx.dtypes, need[1:5], strict=True))
    return dx if need[0] else None, *gradients, None, None


FORWARD.autograd(_setup, _backward)
BACKWARD.autograd(*gradient_of(reference.group_norm_backward))


def _refuse(*, dtype: torch.dtype, **facts) -> str | None:
    if dtype == torch.float64:
        return "float64: its kernels accumulate in float32; use backend='torch' or another dtype"
    return None


backends.register_room("group_norm", {"cpu": _refuse, "cuda": _refuse, "triton": _refuse})


def group_norm(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    eps: float = 1e-5,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Group norm over ``num_groups`` groups of channels, with the scale and shift a sample of AdaGN:

        y = scale * ((x - mean) / sqrt(var + eps) * weight + bias) + shift

    x             [N, C, *], float32, bfloat16, float16 (float64: torch back end); any strides
    num_groups    divides C; mean and var are those of C / num_groups channels of one sample
    weight, bias  [C], floating, or None (ones, zeros)
    eps           > 0
    scale, shift  [N, C], floating, or None (ones, zeros)
    backend       None or "auto", "cpu", "cuda", "triton", "torch"

    Returns y [N, C, *] in the dtype of x, contiguous. Zero rows give zero rows. Differentiable twice in all
    five tensors. Raises TypeError or ValueError naming the argument; fastdl.BackendError if ``backend`` cannot.

    >>> import torch, fastdl
    >>> x, scale, shift = torch.randn(2, 8, 4, 4), torch.randn(2, 8), torch.randn(2, 8)
    >>> y = fastdl.ops.group_norm(x, 4, torch.ones(8), torch.zeros(8), scale=scale, shift=shift)
    >>> h = torch.nn.functional.group_norm(x, 4)
    >>> torch.allclose(y, scale[..., None, None] * h + shift[..., None, None], atol=1e-5)
    True

    Source: Wu and He, "Group Normalization" (2018); scale and shift: Dhariwal and Nichol, "Diffusion Models Beat
    GANs on Image Synthesis" (2021).
    """
    _check(x, num_groups, weight, bias, eps, scale, shift)
    if x.device.type == "cuda" and torch.is_autocast_enabled("cuda"):
        x = x.to(torch.promote_types(x.dtype, torch.float32))  # what autocast does to torch's group_norm
    refusals = backends.in_a_transform()
    chosen = backends.choose("group_norm", backend, device=x.device, dtype=x.dtype, refusals=refusals)
    given = (weight, bias, scale, shift)
    if chosen != "torch":
        given = tuple(readable(x, t) for t in given)
    return FORWARD[twin_of(chosen, x.device)](x, *given, num_groups, eps)[0]


def _check(x, num_groups, weight, bias, eps, scale, shift) -> None:
    check_images(x)
    n, c = x.shape[:2]
    if not isinstance(num_groups, (int, torch.SymInt)) or isinstance(num_groups, bool):
        raise TypeError(f"num_groups: expected an int, got {type(num_groups).__name__}")
    if num_groups < 1 or c % num_groups:
        raise ValueError(f"num_groups: expected a divisor of the {c} channels of x, got {num_groups}")
    for name, value, expected in (
        ("weight", weight, (c,)),
        ("bias", bias, (c,)),
        ("scale", scale, (n, c)),
        ("shift", shift, (n, c)),
    ):
        check_parameter(name, value, x, expected)
    check_eps(eps)
