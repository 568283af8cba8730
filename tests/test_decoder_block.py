"""Room decoder_block: reference against transformers, CPU kernels against the reference, and bad input."""

from __future__ import annotations

import pytest
import torch

from fastdl import BackendError, ops
from fastdl.ops import DecoderLayer, DecoderStack

SIZES = {  # width, heads, kv heads, head_dim, ff_dim, rope_dim, layers
    "grouped": (64, 4, 2, 16, 96, 16, 2),
    "one-head": (32, 1, 1, 32, 32, 32, 1),
    "narrow-rope": (96, 3, 3, 32, 160, 16, 2),
    "wide-heads": (64, 2, 1, 64, 128, 64, 1),
    "demo-like": (192, 9, 3, 64, 256, 64, 1),
}


def make_stack(size, fmt="q8_0", biases=False, output_norm=True, seed=0):
    width, heads, kv_heads, head_dim, ff, _, layers = SIZES[size]
    generator = torch.Generator().manual_seed(seed)

    def matrix(rows, cols):
        return ops.quantize(torch.randn(rows, cols, generator=generator) / cols**0.5, fmt)

    def vector(n, low=0.5):
        return torch.rand(n, generator=generator) + low

    made = []
    for _ in range(layers):
        q, kv = heads * head_dim, kv_heads * head_dim
        made.append(
            DecoderLayer(
                attn_norm=vector(width),
                q=matrix(q, width),
                k=matrix(kv, width),
                v=matrix(kv, width),
                o=matrix(width, q),
                ffn_norm=vector(width),
                gate=matrix(ff, width),
                up=matrix(ff, width),
                down=matrix(width, ff),
                **(
                    {"bias_q": vector(q, -0.5), "bias_k": vector(kv, -0.5), "bias_v": vector(kv, -0.5)}
                    if biases
                    else {}
                ),
            )
        )
    norm = vector(width) if output_norm else None
    return DecoderStack(made, n_heads=heads, n_kv_heads=kv_heads, head_dim=head_dim, eps=1e-5, output_norm=norm)


def caches(size, length, dtype=torch.float16, fill=float("nan")):
    _, _, kv_heads, head_dim, _, _, layers = SIZES[size]
    return torch.full((2, layers, kv_heads, length, head_dim), fill, dtype=dtype).unbind(0)


def run(size, stack, x, length, cuts, backend, activation="fp32", dtype=torch.float16):
    """The stack over x, cut into calls at `cuts`; poisoned caches. Returns outputs and caches."""
    k, v = caches(size, length, dtype)
    rope = ops.rope_table(SIZES[size][5], 10000.0, length)
    out, pos = [], 0
    for end in [*cuts, x.shape[0]]:
        out.append(ops.decoder_blocks(x[pos:end], stack, k, v, rope, pos=pos, activation=activation, backend=backend))
        pos = end
    return torch.cat(out), k, v


def relative(got, expected):
    return float((got.double() - expected.double()).norm() / expected.double().norm())


def test_reference_is_transformers():
    modeling = pytest.importorskip("transformers.models.llama.modeling_llama")
    transformers = pytest.importorskip("transformers")
    width, heads, kv_heads, head_dim, ff, _, layers = SIZES["grouped"]
    config = transformers.LlamaConfig(
        hidden_size=width,
        intermediate_size=ff,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        rms_norm_eps=1e-5,
        vocab_size=8,
        attn_implementation="eager",
    )
    model = modeling.LlamaModel(config).eval()
    stack = make_stack("grouped", "f32")
    order = torch.arange(head_dim).view(-1, 2).T.reshape(-1)  # interleaved pairs -> halves
    with torch.no_grad():
        for theirs, ours in zip(model.layers, stack.layers, strict=True):
            attention, mlp = theirs.self_attn, theirs.mlp
            for linear, weight in (
                (attention.v_proj, ours.v),
                (attention.o_proj, ours.o),
                (mlp.gate_proj, ours.gate),
                (mlp.up_proj, ours.up),
                (mlp.down_proj, ours.down),
            ):
                linear.weight.copy_(weight.dequantize())
            for linear, weight in ((attention.q_proj, ours.q), (attention.k_proj, ours.k)):
                linear.weight.copy_(weight.dequantize().view(-1, head_dim, width)[:, order].reshape(-1, width))
            theirs.input_layernorm.weight.copy_(ours.attn_norm)
            theirs.post_attention_layernorm.weight.copy_(ours.ffn_norm)
        model.norm.weight.copy_(stack.output_norm)
        x = torch.randn(7, width)
        expected = model(inputs_embeds=x[None]).last_hidden_state[0]
    got, _, _ = run("grouped", stack, x, 9, [4, 5], "torch", dtype=torch.float32)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("size", SIZES)
def test_reference_in_pieces_is_the_whole(size):
    """float32 caches: in float16 a product that sums in another order may round a key to the other side."""
    stack, x = make_stack(size, biases=True), torch.randn(6, SIZES[size][0])
    whole, k, _ = run(size, stack, x, 6, [], "torch", dtype=torch.float32)
    pieces, k2, _ = run(size, stack, x, 8, [1, 4], "torch", dtype=torch.float32)
    assert relative(pieces, whole) < 1e-5
    assert relative(k2[:, :, :6], k) < 1e-5
    assert k2[:, :, 6:].isnan().all()


@pytest.mark.parametrize("fmt", ["q4_1", "q8_0", "f16", "f32"])
@pytest.mark.parametrize("size", SIZES)
def test_cpu_fp32(level, size, fmt):
    stack, x = make_stack(size, fmt, biases=size != "one-head"), torch.randn(21, SIZES[size][0])
    cuts = [1, 2, 5, 20]  # one row, a few, many, at odd positions
    expected, ek, ev = run(size, stack, x, 23, cuts, "torch")
    stack.pack_()
    got, k, v = run(size, stack, x, 23, cuts, "cpu")
    assert relative(got, expected) < 2e-3  # the cache is float16: its rounding may fall on the other side
    for ours, theirs in ((k, ek), (v, ev)):
        assert relative(ours[:, :, :21], theirs[:, :, :21]) < 2e-3
        assert ours[:, :, 21:].isnan().all()


@pytest.mark.parametrize(("activation", "limit"), [("int8", 0.02), ("bf16", 0.02)])
@pytest.mark.parametrize("size", ["grouped", "demo-like"])
def test_cpu_rounded_activations(level, size, activation, limit):
    stack, x = make_stack(size, "q4_1"), torch.randn(40, SIZES[size][0])
    expected, *_ = run(size, stack, x, 40, [33], "torch", activation)
    stack.pack_()
    got, *_ = run(size, stack, x, 40, [33], "cpu", activation)
    assert relative(got, expected) < limit


def test_cpu_long_prompt(level):
    stack, x = make_stack("demo-like", "q8_0"), torch.randn(300, 192)
    expected, *_ = run("demo-like", stack, x, 300, [], "torch")
    stack.pack_()
    got, *_ = run("demo-like", stack, x, 300, [], "cpu")
    assert relative(got, expected) < 2e-3


def test_cpu_does_not_depend_on_threads(native):
    stack, x = make_stack("demo-like", "q4_1").pack_(), torch.randn(70, 192)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(run("demo-like", stack, x, 70, [64, 69], "cpu", "auto")[0])
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


def test_cpu_zero_tokens_and_no_output_norm(native):
    stack = make_stack("grouped", output_norm=False).pack_()
    k, v = caches("grouped", 4, fill=0.0)
    rope = ops.rope_table(16, 10000.0, 4)
    assert ops.decoder_blocks(torch.empty(0, 64), stack, k, v, rope, backend="cpu").shape == (0, 64)
    x = torch.randn(3, 64)
    got = ops.decoder_blocks(x, stack, k, v, rope, activation="fp32", backend="cpu")
    expected = ops.decoder_blocks(x, stack, k, v, rope, activation="fp32", backend="torch")
    assert relative(got, expected) < 2e-3


@pytest.mark.parametrize("transposed", [False, True])
def test_opcheck(native, transposed):
    x = torch.randn(64, 3).T if transposed else torch.randn(3, 64)
    stack = make_stack("grouped").pack_()
    k, v = caches("grouped", 8, fill=0.0)
    arguments = (x, *stack.native_arguments(), k.clone(), v.clone(), ops.rope_table(16, 1e4, 8), None)
    torch.library.opcheck(torch.ops.fastdl.decoder_blocks, (*arguments, 2, 4, 2, 16, 96, 1e-5, 0))


@pytest.mark.parametrize(("pos", "n_heads"), [(6, 4), (2**63 - 1, 4), (0, 2**60 + 4)])
def test_memory_safety_behind_the_public_function(native, pos, n_heads):
    """The raw op refuses what leaves its memory, overflowing numbers included."""
    stack = make_stack("grouped").pack_()
    arguments = (torch.randn(3, 64), *stack.native_arguments(), *caches("grouped", 8), ops.rope_table(16, 1e4, 8), None)
    with pytest.raises(RuntimeError, match=r"fastdl: (pos|n_heads)"):
        torch.ops.fastdl.decoder_blocks(*arguments, pos, n_heads, 2, 16, 96, 1e-5, 0)


def test_strided_vectors(native):
    """Norms and biases may be views with a stride."""
    dense = make_stack("grouped", biases=True)
    vectors = ("attn_norm", "ffn_norm", "bias_q", "bias_k", "bias_v")

    def strided(vector):
        return torch.stack([vector, vector], 1)[:, 0]

    layers = [
        DecoderLayer(**{**vars(a), **{name: strided(getattr(a, name)) for name in vectors}}) for a in dense.layers
    ]
    stack = DecoderStack(layers, n_heads=4, n_kv_heads=2, head_dim=16, eps=1e-5, output_norm=strided(dense.output_norm))
    x = torch.randn(3, 64)
    results = [run("grouped", s.pack_(), x, 3, [], "cpu")[0] for s in (dense, stack)]
    assert torch.equal(*results)


@pytest.mark.parametrize("head_dim", [24, 528])
def test_heads_that_the_kernels_do_not_take(native, head_dim):
    def matrix(rows, cols):
        return ops.quantize(torch.randn(rows, cols) / cols**0.5, "f32")

    layer = DecoderLayer(
        attn_norm=torch.ones(32), q=matrix(head_dim, 32), k=matrix(head_dim, 32), v=matrix(head_dim, 32),
        o=matrix(32, head_dim), ffn_norm=torch.ones(32), gate=matrix(64, 32), up=matrix(64, 32), down=matrix(32, 64),
    )  # fmt: skip
    stack = DecoderStack([layer], n_heads=1, n_kv_heads=1, head_dim=head_dim, eps=1e-5).pack_()
    k, v = torch.zeros(2, 1, 1, 4, head_dim, dtype=torch.float16)
    arguments = (torch.randn(3, 32), stack, k, v, ops.rope_table(head_dim, 1e4, 4))
    automatic = ops.decoder_blocks(*arguments, activation="fp32")
    assert torch.equal(automatic, ops.decoder_blocks(*arguments, activation="fp32", backend="torch"))
    with pytest.raises(BackendError, match=f"head_dim is {head_dim}"):
        ops.decoder_blocks(*arguments, backend="cpu")


def test_choice_and_refusals():
    stack = make_stack("grouped")
    rope, x = ops.rope_table(16, 10000.0, 4), torch.randn(2, 64)
    with pytest.raises(BackendError, match=r"GGUF layout|not loaded"):
        ops.decoder_blocks(x, stack, *caches("grouped", 4), rope, backend="cpu")
    stack.pack_()
    with pytest.raises(BackendError, match=r"float16|not loaded"):
        ops.decoder_blocks(x, stack, *caches("grouped", 4, torch.float32), rope, backend="cpu")
    with pytest.raises(BackendError, match="cuda"):
        ops.decoder_blocks(x, stack, *caches("grouped", 4), rope, backend="cuda")


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.ones(2, 64).double()}, TypeError, "x: expected float32"),
        ({"x": torch.ones(2, 63)}, ValueError, "x: expected"),
        ({"x": torch.ones(64)}, ValueError, "x: expected"),
        ({"pos": 3}, ValueError, "pos"),
        ({"pos": -1}, ValueError, "pos"),
        ({"k_cache": torch.zeros(2, 2, 4, 8).half()}, ValueError, "k_cache: expected"),
        ({"v_cache": torch.zeros(2, 2, 5, 16).half()}, ValueError, "v_cache: expected"),
        ({"v_cache": torch.zeros(2, 2, 4, 16).bfloat16()}, TypeError, "v_cache"),
        ({"rope": torch.zeros(1, 16)}, ValueError, "rope: expected"),
        ({"rope": torch.zeros(4, 18)}, ValueError, "rope: expected"),
        ({"rope": torch.zeros(4, 16).half()}, TypeError, "rope: expected"),
        ({"activation": "int4"}, ValueError, "activation"),
        ({"stack": None}, TypeError, "stack"),
    ],
)
def test_bad_call(change, error, message):
    k, v = caches("grouped", 4)
    arguments = {"x": torch.ones(2, 64), "stack": make_stack("grouped"), "k_cache": k, "v_cache": v}
    arguments |= {"rope": ops.rope_table(16, 10000.0, 4)} | change
    with pytest.raises(error, match=message):
        ops.decoder_blocks(**arguments)


def test_bad_stack():
    layer = make_stack("grouped").layers[0]
    sizes = {"n_heads": 4, "n_kv_heads": 2, "head_dim": 16, "eps": 1e-5}
    with pytest.raises(ValueError, match="layers"):
        DecoderStack([], **sizes)
    with pytest.raises(ValueError, match="n_heads"):
        DecoderStack([layer], **{**sizes, "n_kv_heads": 3})
    with pytest.raises(ValueError, match="head_dim"):
        DecoderStack([layer], **{**sizes, "head_dim": 15})
    with pytest.raises(ValueError, match=r"layers\[0\]\.q: expected shape"):
        DecoderStack([layer], **{**sizes, "n_heads": 2})
    wrong = {
        "q": (torch.ones(64, 64), TypeError),
        "attn_norm": (torch.ones(63), ValueError),
        "ffn_norm": (None, TypeError),
        "bias_q": (torch.ones(64).half(), TypeError),
    }
    for name, (value, error) in wrong.items():
        fields = {**vars(layer), name: value}
        with pytest.raises(error, match=rf"layers\[0\]\.{name}"):
            DecoderStack([DecoderLayer(**fields)], **sizes)
