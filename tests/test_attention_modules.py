"""fastdl.nn.MultiheadAttention: torch's layer, every option and mask, outputs, weights and all gradients."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from torch import nn

import fastdl
from fastdl.testing import check

B, H, L, S, E = 3, 4, 7, 9, 32
LAYERS = {
    "plain": {},
    "no bias": {"bias": False},
    "widths": {"kdim": 20, "vdim": 12},
    "bias_k": {"add_bias_kv": True},
    "zero key": {"add_zero_attn": True},
    "all": {"add_bias_kv": True, "add_zero_attn": True, "kdim": 20, "vdim": 12, "bias": False},
}
MASKS = ["none", "bool", "bool of heads", "float", "float of heads", "causal", "causal hint"]
PADDINGS = ["none", "right", "left", "float", "additive"]


def layers(**options) -> tuple[nn.Module, nn.Module]:
    """torch's layer with parameters away from their start, and ours with the same."""
    theirs = nn.MultiheadAttention(E, H, **options)
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, std=0.3)
    ours = fastdl.nn.MultiheadAttention(E, H, **options)
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


def inputs(layer, alike="none", grad=True):
    """query, key, value; alike: which of them are one tensor."""
    sizes = [(B, L, E), (B, S, layer.kdim), (B, S, layer.vdim)]
    sizes = [n if layer.batch_first else (n[1], n[0], n[2]) for n in sizes]
    q, k, v = (torch.randn(n, requires_grad=grad) for n in sizes)
    return {"none": (q, k, v), "key and value": (q, k, k), "all": (q, q, q)}[alike]


def masks(mask, padding, keys):
    """Keyword arguments for forward; every query sees the first or the last key."""
    given = {}
    seen = torch.rand(B * H, L, keys) < 0.6
    seen[..., 0] = seen[..., -1] = True
    if mask == "bool":
        given["attn_mask"] = ~seen[0]
    elif mask == "bool of heads":
        given["attn_mask"] = ~seen
    elif mask.startswith("float"):
        given["attn_mask"] = torch.randn(B * H, L, keys) if mask.endswith("heads") else torch.randn(L, keys)
    elif mask.startswith("causal"):
        given["attn_mask"] = torch.ones(L, keys, dtype=torch.bool).triu(1)
        given["is_causal"] = mask.endswith("hint")
    length = torch.tensor([keys, keys - 3, 1])[:, None]
    hidden = torch.arange(keys) >= length
    if padding == "right":
        given["key_padding_mask"] = hidden
    elif padding == "left":
        given["key_padding_mask"] = torch.arange(keys) < 2
        given["key_padding_mask"] = given["key_padding_mask"].expand(B, keys) if mask == "none" else hidden.roll(1, 1)
        given["key_padding_mask"] = given["key_padding_mask"].clone()
        given["key_padding_mask"][:, 0] = mask == "none"
    elif padding == "float":
        given["key_padding_mask"] = torch.zeros(B, keys).masked_fill(hidden, -torch.inf)
    elif padding == "additive":
        given["key_padding_mask"] = torch.randn(B, keys)
    return given


def call(layer, names, alike, options):
    """A function of query, key, value (those that differ), floating masks and parameters."""
    floats = [name for name, t in options.items() if isinstance(t, torch.Tensor) and t.is_floating_point()]

    def function(*tensors):
        count = {"none": 3, "key and value": 2, "all": 1}[alike]
        given, rest = tensors[:count], tensors[count:]
        q, k, v = {3: given, 2: (*given, given[-1]), 1: given * 3}[count]
        more = {**options, **dict(zip(floats, rest, strict=False))}
        parameters = dict(zip(names, rest[len(floats) :], strict=True))
        out = torch.func.functional_call(layer, parameters, (q, k, v), more)
        return tuple(t for t in out if t is not None)

    return function, floats


@pytest.mark.filterwarnings("ignore:Support for mismatched")
@pytest.mark.parametrize("weights", [False, True], ids=["", "weights"])
@pytest.mark.parametrize(
    ("layer", "mask", "padding", "alike"),
    [
        *((layer, "none", "none", "none") for layer in LAYERS),
        *(("plain", mask, padding, "key and value") for mask, padding in itertools.product(MASKS, PADDINGS)),
        *((layer, mask, "right", "none") for layer, mask in itertools.product(LAYERS, MASKS)),
        *(("plain", mask, "left", "all") for mask in MASKS),
    ],
)
def test_follows_torchs_layer(native, layer, mask, padding, alike, weights):
    options = LAYERS[layer] | {"batch_first": (len(mask) + len(padding)) % 2 == 0}
    ours, theirs = layers(**options)
    given = inputs(ours, alike)
    more = masks(mask, padding, L if alike == "all" else S) | {"need_weights": weights}
    more["average_attn_weights"] = len(mask) % 2 == 0
    names = [name for name, _ in ours.named_parameters()]
    function, floats = call(ours, names, alike, more)
    peer, _ = call(theirs, names, alike, more)
    tensors = list(dict.fromkeys(given)) + [more[name].requires_grad_(False) for name in floats]
    tensors += [p.detach().clone().requires_grad_() for p in ours.parameters()]
    check(function, tensors, peer=peer, norm=True)


def test_gradient_of_a_floating_mask(native):
    ours, theirs = layers(batch_first=True)
    bias = torch.randn(L, S, requires_grad=True)

    def of(layer):
        return lambda q, k, v, bias: layer.to(q.dtype)(q, k, v, attn_mask=bias, need_weights=False)[0]

    check(of(ours), (*inputs(ours), bias), peer=of(theirs), norm=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(native, dtype):
    ours, theirs = layers(batch_first=True)
    names = [name for name, _ in ours.named_parameters()]
    tensors = [t.detach().to(dtype).requires_grad_() for t in (*inputs(ours), *ours.parameters())]
    for options in ({"need_weights": False}, {"average_attn_weights": False}):
        function, peer = (call(layer, names, "none", options)[0] for layer in (ours, theirs))
        check(function, tensors, peer=peer, norm=True)
        assert all(t.dtype == dtype for t in function(*tensors))


@pytest.mark.parametrize("batch_first", [False, True])
def test_without_batch(native, batch_first):
    ours, theirs = layers(batch_first=batch_first, add_bias_kv=True, add_zero_attn=True)
    q, k = torch.randn(L, E), torch.randn(S, E)
    for options in (
        {},
        {"need_weights": False},
        {"key_padding_mask": torch.arange(S) > 5},
        {"average_attn_weights": False, "attn_mask": torch.randn(H, L, S)},
    ):
        for a, b in zip(ours(q, k, k, **options), theirs(q, k, k, **options), strict=True):
            assert (a is None) == (b is None)
            if a is not None:
                torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_a_query_that_sees_nothing(native):
    """torch gives NaN; here the output is the projection of zeros, the weights are 0, and gradients are finite."""
    ours, _ = layers(batch_first=True)
    for p in (0.0, 0.5):
        ours.dropout = p
        for options in ({}, {"need_weights": False}):
            q, k, v = inputs(ours)
            padding = torch.zeros(B, S, dtype=torch.bool)
            padding[1] = True
            y, weights = ours(q, k, v, key_padding_mask=padding, **options)
            torch.testing.assert_close(y[1], ours.out_proj.bias.expand(L, E))
            assert weights is None or not weights[1].any()
            (y.sum() if weights is None else y.sum() + weights.sum()).backward()
            assert all(t.grad.isfinite().all() for t in (q, k, v, *ours.parameters()))
            assert not q.grad[1].any()


def test_causal_without_a_mask(native):
    ours, theirs = layers(batch_first=True)
    x = torch.randn(B, L, E)
    mask = nn.Transformer.generate_square_subsequent_mask(L)
    padding = torch.arange(L) >= torch.tensor([L, 4, 1])[:, None]
    for weights in (False, True):
        for more in ({}, {"key_padding_mask": padding}):
            expected = theirs(x, x, x, attn_mask=mask.isinf(), need_weights=weights, **more)
            for given in ({}, {"attn_mask": mask}, {"attn_mask": mask.isinf()}):
                got = ours(x, x, x, is_causal=True, need_weights=weights, **given, **more)
                for a, b in zip(got, expected, strict=True):
                    if a is not None:
                        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="is_causal: expected an attn_mask beside it for 7 queries and 9 keys"):
        ours(*inputs(ours), is_causal=True)


def test_dropout(native):
    """Of weights, in training only; the output is that of the weights that are returned."""
    ours, theirs = layers(batch_first=True, dropout=0.5)
    given = inputs(ours, grad=False)
    torch.manual_seed(1)
    y, weights = ours(*given, average_attn_weights=False)
    torch.manual_seed(1)
    expected, theirs_weights = theirs(*given, average_attn_weights=False)
    torch.testing.assert_close(weights, theirs_weights, rtol=1e-4, atol=1e-5)  # torch's own numbers
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)
    for _ in range(2):
        torch.manual_seed(2)
        again = ours(*given, need_weights=False)[0]
    torch.manual_seed(2)
    assert torch.equal(again, ours(*given, need_weights=False)[0])
    mean = torch.stack([ours(*given, need_weights=False)[0] for _ in range(400)]).mean(0)
    ours.eval()
    plain = ours(*given, need_weights=False)[0]
    assert not torch.equal(plain, again)
    torch.testing.assert_close(mean, plain, rtol=0.2, atol=0.5)


def test_memory_of_the_weights(native):
    """Without weights nothing as large as queries * keys is made, whatever the masks."""

    class Largest(torch.utils._python_dispatch.TorchDispatchMode):
        size = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            for t in torch.utils._pytree.tree_leaves(out):
                if isinstance(t, torch.Tensor) and t.dtype.is_floating_point:
                    self.size = max(self.size, t.untyped_storage().nbytes() // t.element_size())
            return out

    n = 300
    ours = fastdl.nn.MultiheadAttention(8, 2, batch_first=True)
    x = torch.randn(2, n, 8)
    padding = torch.rand(2, n) < 0.2
    for options in (
        {"key_padding_mask": padding},
        {"attn_mask": torch.ones(n, n, dtype=torch.bool).triu(1), "key_padding_mask": padding},
        {"attn_mask": torch.ones(n, n, dtype=torch.bool).triu(1), "is_causal": True},
    ):
        with Largest() as largest:
            ours(x, x, x, need_weights=False, **options)
        assert largest.size < n * n


def test_is_torchs_layer():
    for options in LAYERS.values():
        torch.manual_seed(0)
        ours = fastdl.nn.MultiheadAttention(E, H, **options)
        torch.manual_seed(0)
        theirs = nn.MultiheadAttention(E, H, **options)
        assert isinstance(ours, nn.MultiheadAttention) and list(ours.state_dict()) == list(theirs.state_dict())
        for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
            assert torch.equal(a, b)
        again = copy.deepcopy(ours).eval()
        q, k, v = inputs(ours)
        assert torch.equal(again(q, k, v)[0], ours(q, k, v)[0])


def test_compile_and_autocast(native):
    ours, _ = layers(batch_first=True)
    x = torch.randn(B, L, E)
    padding = torch.arange(L) >= torch.tensor([L, 4, 1])[:, None]
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    for options in ({"need_weights": False}, {"key_padding_mask": padding}, {"is_causal": True}):
        for a, b in zip(compiled(x, x, x, **options), ours(x, x, x, **options), strict=True):
            if a is not None:
                torch.testing.assert_close(a, b)
    with torch.autocast("cpu", torch.bfloat16):
        y, weights = ours(x, x, x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(weights.float().sum(-1), torch.ones(B, L), rtol=0, atol=2e-2)


def test_packed(native):
    ours, _ = layers(batch_first=True)
    x, cu = torch.randn(12, E), torch.tensor([0, 5, 5, 12])
    y = ours.packed(x, cu)
    for start, end in ((0, 5), (5, 12)):
        part = x[start:end]
        torch.testing.assert_close(y[start:end], ours(part, part, part)[0], rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="add_bias_kv, add_zero_attn: expected neither"):
        layers(add_zero_attn=True)[0].packed(x, cu)


def test_nested_tensors_are_torchs(native):
    ours, theirs = (layer.eval() for layer in layers(batch_first=True))
    x = torch.nested.nested_tensor([torch.randn(3, E), torch.randn(5, E)])
    with torch.inference_mode():
        y, expected = ours(x, x, x, need_weights=False)[0], theirs(x, x, x, need_weights=False)[0]
    for a, b in zip(y.unbind(), expected.unbind(), strict=True):
        assert torch.equal(a, b)


def test_bad_input():
    ours = fastdl.nn.MultiheadAttention(E, H, kdim=20, batch_first=True)
    q, k, v = torch.randn(B, L, E), torch.randn(B, S, 20), torch.randn(B, S, E)
    cases = [
        (TypeError, "query: expected a tensor, got list", ([1], k, v), {}),
        (ValueError, r"key: expected shape \[batch, length, 20\], got \(3, 7, 32\)", (q, q, v), {}),
        (ValueError, r"value: expected the length and batch of key", (q, k, v[:, :-1]), {}),
        (ValueError, r"key: expected the batch of query, 3, as dimension 0, got 2", (q, k[:2], v[:2]), {}),
        (ValueError, r"attn_mask: expected shape \(7, 9\) or \(12, 7, 9\), got \(7, 8\)", (q, k, v),
         {"attn_mask": torch.zeros(7, 8)}),
        (TypeError, "attn_mask: expected a boolean tensor, True where hidden, or a floating one, got torch.int64",
         (q, k, v), {"attn_mask": torch.zeros(7, 9, dtype=torch.int64)}),
        (ValueError, r"key_padding_mask: expected shape \(3, 9\), got \(3, 7\)", (q, k, v),
         {"key_padding_mask": torch.zeros(3, 7, dtype=torch.bool)}),
    ]  # fmt: skip
    for kind, message, given, options in cases:
        with pytest.raises(kind, match=message):
            ours(*given, **options)
    with pytest.raises(ValueError, match="num_heads: expected a divisor of embed_dim 32, got 5"):
        fastdl.nn.MultiheadAttention(E, 5)
    with pytest.raises(ValueError, match="backend: expected None, 'auto' or one of cpu"):
        fastdl.nn.MultiheadAttention(E, H, backend="cdua")
    with pytest.raises(fastdl.BackendError, match="attention"):
        fastdl.nn.MultiheadAttention(E, H, backend="cuda")(torch.randn(L, E), *[torch.randn(S, E)] * 2)
