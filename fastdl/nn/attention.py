"""Module of room attention: MultiheadAttention, with torch's signature, parameters and masks.

The projections are torch's products; heads are views of what they give, and the op's result lies as the output
projection wants it, so nothing is rearranged in memory. The matrix of weights exists only where it is asked for.
Layers around it: fastdl/nn/_transformer.py. Test: ``pytest tests/test_attention_modules.py``.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..backend import BACKENDS
from ..ops.attention import attention
from ._padding import kept_by, lengths_of, without_hidden

__all__ = ["MultiheadAttention"]

F = nn.functional


class MultiheadAttention(nn.MultiheadAttention):
    """``torch.nn.MultiheadAttention`` on fastdl's attention.

    embed_dim, num_heads, dropout, bias, add_bias_kv, add_zero_attn, kdim, vdim, batch_first, device, dtype: as torch's
    backend   None or "auto", "cpu", "cuda", "triton", "torch"

    ``forward(query, key, value, key_padding_mask=None, need_weights=True, attn_mask=None, average_attn_weights=True,
    is_causal=False)`` -> (output, weights or None), with torch's shapes and meaning of masks: a boolean one is True
    where a position is *hidden*, a floating one is added to the scores (and has a gradient if it requires one). What
    differs:

    - a query whose keys are all hidden gets the output projection's bias and weights 0, where torch gives NaN;
    - is_causal needs no attn_mask where there are as many queries as keys; with one it says, as in torch, that the mask
      is the causal one, which is then not read (unless weights are asked for);
    - masks of both kinds may have different types, and no matrix [batch, heads, queries, keys] is made of them;
    - nested tensors go to torch's own layer, which takes them in inference only.

    Pass ``need_weights=False`` where weights are not used: with them, memory and time grow with queries * keys again,
    head by head where they are averaged. In training with dropout they are those after dropout, as in torch.

    state_dict is that of torch's layer.

    >>> import torch, fastdl
    >>> layer = fastdl.nn.MultiheadAttention(16, 4, batch_first=True)
    >>> x = torch.randn(2, 5, 16)
    >>> padding = torch.arange(5) >= torch.tensor([[5], [3]])
    >>> y, weights = layer(x, x, x, key_padding_mask=padding)
    >>> y.shape, weights.shape, weights[1, :, 3:].any().item()
    (torch.Size([2, 5, 16]), torch.Size([2, 5, 5]), False)

    Source: Vaswani et al., "Attention Is All You Need" (2017).
    """

    # A class attribute, so that a torch layer that was turned into one of these has it too.
    backend: str | None = None

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        add_bias_kv: bool = False,
        add_zero_attn: bool = False,
        kdim: int | None = None,
        vdim: int | None = None,
        batch_first: bool = False,
        device=None,
        dtype=None,
        *,
        backend: str | None = None,
    ) -> None:
        check_backend(backend)
        if num_heads > 0 and embed_dim % num_heads:
            raise ValueError(f"num_heads: expected a divisor of embed_dim {embed_dim}, got {num_heads}")
        super().__init__(
            embed_dim, num_heads, dropout, bias, add_bias_kv, add_zero_attn, kdim, vdim, batch_first, device, dtype
        )
        self.backend = backend

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        if any(isinstance(t, Tensor) and t.is_nested for t in (query, key, value)):
            return super().forward(
                query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal
            )
        batched = self._check(query, key, value)
        q, k, v = self._heads(query, key, value, batched)
        extra = k.shape[2] - (key.shape[0] if not (batched and self.batch_first) else key.shape[1])
        rest = self._masks(attn_mask, key_padding_mask, is_causal, need_weights, (*q.shape[:3], k.shape[2]), extra)
        p = self.dropout if self.training else 0.0
        weights = None
        if need_weights and p > 0:
            weights = F.dropout(_weights(q, k, None, rest, average=False), p)
            out = (weights @ without_hidden(v, weights)).transpose(1, 2)
            weights = weights.mean(1) if average_attn_weights else weights
        elif need_weights:
            out, lse = attention(q, k, v, return_lse=True, backend=self.backend, **rest)
            weights, out = _weights(q, k, lse, rest, average=average_attn_weights), out.transpose(1, 2)
        else:
            out = attention(q, k, v, dropout_p=p, backend=self.backend, **rest).transpose(1, 2)
        out = out.flatten(2)  # [batch, queries, embed_dim]
        if not batched:
            out, weights = out[0], None if weights is None else weights[0]
        elif not self.batch_first:
            out = out.transpose(0, 1)
        return F.linear(out, self.out_proj.weight, self.out_proj.bias), weights

    def packed(self, x: Tensor, cu_seqlens: Tensor) -> Tensor:
        """Self-attention of sequences that lie one after the other: x [total, embed_dim], cu_seqlens int
        [sequences + 1] -> [total, embed_dim]. Not with add_bias_kv and add_zero_attn.

        >>> import torch, fastdl
        >>> layer = fastdl.nn.MultiheadAttention(16, 4, batch_first=True)
        >>> x = torch.randn(5, 16)
        >>> y = layer.packed(x, torch.tensor([0, 2, 5]))
        >>> alone, _ = layer(x[:2], x[:2], x[:2])
        >>> torch.allclose(y[:2], alone, atol=1e-6)
        True
        """
        if self.bias_k is not None or self.add_zero_attn:
            raise ValueError("add_bias_kv, add_zero_attn: expected neither for packed sequences; pad them instead")
        q, k, v = (t.unflatten(-1, (self.num_heads, -1)).transpose(0, 1) for t in self._project(x, x, x))
        p = self.dropout if self.training else 0.0
        out = attention(q, k, v, cu_seqlens_q=cu_seqlens, dropout_p=p, backend=self.backend)
        return F.linear(out.transpose(0, 1).flatten(1), self.out_proj.weight, self.out_proj.bias)

    def _check(self, query: Tensor, key: Tensor, value: Tensor) -> bool:
        """Whether there is a batch; raises unless the three fit each other and the layer."""
        for name, t, width in (("query", query, self.embed_dim), ("key", key, self.kdim), ("value", value, self.vdim)):
            if not isinstance(t, Tensor):
                raise TypeError(f"{name}: expected a tensor, got {type(t).__name__}")
            if t.dim() not in (2, 3) or t.dim() != query.dim() or t.shape[-1] != width:
                lead = "length" if query.dim() == 2 else "batch, length" if self.batch_first else "length, batch"
                raise ValueError(f"{name}: expected shape [{lead}, {width}], got {tuple(t.shape)}")
        batched = query.dim() == 3
        if key.shape[:-1] != value.shape[:-1]:
            raise ValueError(
                f"value: expected the length and batch of key, {tuple(key.shape[:-1])}, got {tuple(value.shape[:-1])}"
            )
        batch = 0 if self.batch_first else 1
        if batched and query.shape[batch] != key.shape[batch]:
            raise ValueError(
                f"key: expected the batch of query, {query.shape[batch]}, as dimension {batch}, got {key.shape[batch]}"
            )
        return batched

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        bias = self.in_proj_bias
        if not self._qkv_same_embed_dim:
            weights = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
        elif query is key and key is value:
            return F.linear(query, self.in_proj_weight, bias).chunk(3, -1)
        elif key is value:
            sizes = (self.embed_dim, 2 * self.embed_dim)
            w_q, w_kv = self.in_proj_weight.split(sizes)
            b_q, b_kv = (None, None) if bias is None else bias.split(sizes)
            return F.linear(query, w_q, b_q), *F.linear(key, w_kv, b_kv).chunk(2, -1)
        else:
            weights = self.in_proj_weight.chunk(3)
        biases = (None, None, None) if bias is None else bias.chunk(3)
        return tuple(F.linear(t, w, b) for t, w, b in zip((query, key, value), weights, biases, strict=True))

    def _heads(self, query: Tensor, key: Tensor, value: Tensor, batched: bool) -> list[Tensor]:
        """q [batch, heads, queries, head_dim], k and v likewise with the keys that add_bias_kv and add_zero_attn add:
        views of the projections where these add none."""
        q, k, v = self._project(query, key, value)
        sequence = 1 if batched and self.batch_first else 0
        if self.bias_k is not None:
            k, v = (_longer(t, more, sequence) for t, more in ((k, self.bias_k), (v, self.bias_v)))
        if self.add_zero_attn:
            k, v = (_longer(t, t.new_zeros(1, 1, t.shape[-1]), sequence) for t in (k, v))
        split = [t.unflatten(-1, (self.num_heads, self.head_dim)) for t in (q, k, v)]
        if not batched:
            return [t.transpose(0, 1).unsqueeze(0) for t in split]
        return [t.transpose(1, 2) if self.batch_first else t.permute(1, 2, 0, 3) for t in split]

    def _masks(
        self, attn_mask: Tensor | None, padding: Tensor | None, is_causal: bool, need_weights: bool,
        shape: tuple[int, int, int, int], extra: int,
    ) -> dict:  # fmt: skip
        """causal, bias, mask and valid_lens for `ops.attention`. shape: of the scores, with ``extra`` keys at the end
        that every query sees. Of two masks one becomes the bias, so that they are never spread out together."""
        batch, heads, n_q, n_k = shape
        options = {"causal": False, "bias": None, "mask": None, "valid_lens": None}
        if is_causal and attn_mask is None:
            if n_q != n_k or extra:
                raise ValueError(
                    f"is_causal: expected an attn_mask beside it for {n_q} queries and {n_k} keys, which says how "
                    "they are aligned (torch.nn.Transformer.generate_square_subsequent_mask makes one)"
                )
            options["causal"] = True
        elif is_causal and n_q == n_k and not extra and not need_weights:
            options["causal"], attn_mask = True, None
        for name, given in (("attn_mask", attn_mask), ("key_padding_mask", padding)):
            if given is not None:
                _check_mask(name, given)
        if attn_mask is not None:
            keys = n_k - extra
            if tuple(attn_mask.shape) not in ((n_q, keys), (batch * heads, n_q, keys)):
                raise ValueError(
                    f"attn_mask: expected shape ({n_q}, {keys}) or ({batch * heads}, {n_q}, {keys}), got "
                    f"{tuple(attn_mask.shape)}"
                )
            attn_mask = _with_extra(attn_mask, extra)
            attn_mask = attn_mask.view(batch, heads, n_q, n_k) if attn_mask.dim() == 3 else attn_mask[None, None]
        if padding is not None:
            padding = padding[None] if padding.dim() == 1 and batch == 1 else padding
            if tuple(padding.shape) != (batch, n_k - extra):
                raise ValueError(
                    f"key_padding_mask: expected shape ({batch}, {n_k - extra}), got {tuple(padding.shape)}"
                )
            padding = _with_extra(padding, extra)
            kept = ~padding if padding.dtype == torch.bool else kept_by(padding)
            lens = None if kept is None or need_weights else lengths_of(kept)
            if lens is not None:
                options["valid_lens"] = lens
            elif kept is None:
                options["bias"] = padding[:, None, None, :]
            else:
                options["mask"] = kept[:, None, None, :]
        if attn_mask is not None and attn_mask.dtype != torch.bool:
            options["bias"] = attn_mask if options["bias"] is None else options["bias"] + attn_mask
        elif attn_mask is not None:
            if (kept := options["mask"]) is not None:
                options["bias"] = torch.zeros(kept.shape, device=kept.device).masked_fill(~kept, -torch.inf)
            options["mask"] = ~attn_mask
        return options


def check_backend(backend: str | None) -> None:
    if backend not in (None, "auto", *BACKENDS):
        raise ValueError(f"backend: expected None, 'auto' or one of {', '.join(BACKENDS)}, got {backend!r}")


def _longer(t: Tensor, more: Tensor, sequence: int) -> Tensor:
    """t [.., length, .., embed_dim] with one more position, more [1, 1, embed_dim]."""
    if t.dim() == 2:
        return torch.cat([t, more[0].to(t.dtype)])
    shape = [t.shape[0], t.shape[1], t.shape[2]]
    shape[sequence] = 1
    return torch.cat([t, more.to(t.dtype).expand(shape)], sequence)


def _check_mask(name: str, mask: Tensor) -> None:
    if not isinstance(mask, Tensor) or (mask.dtype != torch.bool and not mask.is_floating_point()):
        got = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        raise TypeError(f"{name}: expected a boolean tensor, True where hidden, or a floating one, got {got}")


def _with_extra(mask: Tensor, extra: int) -> Tensor:
    """mask with ``extra`` more keys, visible ones."""
    return F.pad(mask, (0, extra)) if extra else mask


def _weights(q: Tensor, k: Tensor, lse: Tensor | None, rest: dict, average: bool) -> Tensor:
    """softmax of the scores, 0 where a query sees no key: [batch, heads, queries, keys], or its mean over the heads, in
    the dtype of q; a head at a time. lse [batch, heads, queries] as the op gave it, or None. rest: of `_masks`."""
    wide, causal, found = torch.promote_types(q.dtype, torch.float32), None, []
    if rest["causal"]:
        causal = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril()
    with torch.autocast(q.device.type, enabled=False):
        for head in range(q.shape[1]):
            scores = (q[:, head].to(wide) * q.shape[3] ** -0.5) @ k[:, head].to(wide).transpose(1, 2)
            if (bias := _of_head(rest["bias"], head)) is not None:
                scores = scores + bias
            for seen in (_of_head(rest["mask"], head), causal):
                scores = scores if seen is None else scores.masked_fill(~seen, -torch.inf)
            if lse is None:
                blind = (scores == -torch.inf).all(-1, keepdim=True)
                part = torch.softmax(scores.masked_fill(blind, 0.0), -1)
            else:
                blind = (lse[:, head] == -torch.inf).unsqueeze(-1)
                part = torch.exp(scores - lse[:, head].unsqueeze(-1).masked_fill(blind, 0.0))
            part = part.masked_fill(blind, 0.0)
            found.append(part / q.shape[1] if average else part)
            if average and head:
                found = [found[0] + found[1]]
    return (found[0] if average else torch.stack(found, 1)).to(q.dtype)


def _of_head(t: Tensor | None, head: int) -> Tensor | None:
    return None if t is None else t[:, min(head, t.shape[1] - 1)]
