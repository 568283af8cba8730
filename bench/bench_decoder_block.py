"""Room decoder_block against transformers' Llama layers in bf16 and fp32: one token behind 512, and 512 tokens at once.

    pytest bench/bench_decoder_block.py

The sizes are the demo model's: 30 layers, width 576, 9 query and 3 key/value heads of 64, feed-forward 1536, Q4_1. The
weights are random; transformers gets the same numbers, dequantized. What `bench_llm.py` adds to this is the embedding,
the head (a third of the bytes), the choice of a token, and the loop. transformers' fp32 answer is what all are checked
against; fastdl's fp32 activations, checked too, show that nothing but the rounding of activations makes the difference.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

import fastdl
from bench import limits
from bench.accuracy import IncorrectResult, relative_error
from bench.peers import MissingPeer
from bench.timing import calls_for, paired_ratio, seconds_per_call, spread, take_turns
from fastdl import ops

LAYERS, WIDTH, HEADS, KV_HEADS, HEAD_DIM, FF = 30, 576, 9, 3, 64, 1536
ROPE_BASE, EPS, BEFORE = 100_000.0, 1e-5, 512
SHAPES = {
    "q": (HEADS * HEAD_DIM, WIDTH), "k": (KV_HEADS * HEAD_DIM, WIDTH), "v": (KV_HEADS * HEAD_DIM, WIDTH),
    "o": (WIDTH, HEADS * HEAD_DIM), "gate": (FF, WIDTH), "up": (FF, WIDTH), "down": (WIDTH, FF),
}  # fmt: skip
NAMES = {
    "q": "self_attn.q_proj", "k": "self_attn.k_proj", "v": "self_attn.v_proj", "o": "self_attn.o_proj",
    "gate": "mlp.gate_proj", "up": "mlp.up_proj", "down": "mlp.down_proj",
}  # fmt: skip
# Relative error of the state after 30 layers: fp32 keeps the cache in fp16, the others round at every product.
ALLOWED = {"fp32": 2e-3, "bf16": 0.1, "int8": 0.1}


def halves(weight: torch.Tensor) -> torch.Tensor:
    """Rows of interleaved RoPE pairs (2i, 2i + 1), as fastdl takes them, in transformers' order (i, i + half)."""
    return weight.view(-1, HEAD_DIM // 2, 2, WIDTH).transpose(1, 2).reshape(weight.shape)


def make_stack() -> tuple[ops.DecoderStack, dict[str, torch.Tensor]]:
    """Random layers, and transformers' state_dict of the same numbers."""
    generator = torch.Generator().manual_seed(0)
    layers, state = [], {"norm.weight": torch.ones(WIDTH)}
    for index in range(LAYERS):
        matrices = {}
        for name, (rows, cols) in SHAPES.items():
            weight = ops.quantize(torch.randn(rows, cols, generator=generator) * cols**-0.5, "q4_1")
            plain = weight.dequantize()
            state[f"layers.{index}.{NAMES[name]}.weight"] = halves(plain) if name in "qk" else plain
            matrices[name] = weight
        norms = {name: 1 + 0.1 * torch.randn(WIDTH, generator=generator) for name in ("attn_norm", "ffn_norm")}
        state[f"layers.{index}.input_layernorm.weight"] = norms["attn_norm"]
        state[f"layers.{index}.post_attention_layernorm.weight"] = norms["ffn_norm"]
        layers.append(ops.DecoderLayer(**matrices, **norms))
    stack = ops.DecoderStack(
        layers, n_heads=HEADS, n_kv_heads=KV_HEADS, head_dim=HEAD_DIM, eps=EPS, output_norm=torch.ones(WIDTH)
    )
    return stack.pack_(), state


def transformers_model(state: dict[str, torch.Tensor], dtype: torch.dtype):
    try:
        from transformers import LlamaConfig, LlamaModel
    except ImportError as error:
        raise MissingPeer(f"transformers: {error}") from error
    config = LlamaConfig(
        vocab_size=1, hidden_size=WIDTH, intermediate_size=FF, num_hidden_layers=LAYERS, num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS, head_dim=HEAD_DIM, rms_norm_eps=EPS, max_position_embeddings=2 * BEFORE,
        bos_token_id=None, eos_token_id=None,
        rope_parameters={"rope_type": "default", "rope_theta": ROPE_BASE}, pad_token_id=None,
    )  # fmt: skip
    model = LlamaModel(config).eval()
    missing, unexpected = model.load_state_dict(state, strict=False)
    if unexpected or set(missing) - {"embed_tokens.weight"}:
        raise MissingPeer(f"transformers: its Llama layers have other names here: {missing}, {unexpected}")
    return model.to(dtype)


def transformers_side(state, dtype: torch.dtype, context: torch.Tensor, x: torch.Tensor) -> Callable[[], torch.Tensor]:
    """The state [n, width] of x behind the tokens of `context` (none: a prompt from an empty cache)."""
    from transformers import DynamicCache

    model, context, x = transformers_model(state, dtype), context[None].to(dtype), x[None].to(dtype)
    cache = DynamicCache(config=model.config)
    if context.shape[1]:
        model(inputs_embeds=context, past_key_values=cache, use_cache=True)

    def run() -> torch.Tensor:
        used = cache if context.shape[1] else DynamicCache(config=model.config)
        out = model(inputs_embeds=x, past_key_values=used, use_cache=True).last_hidden_state[0]
        if context.shape[1]:
            used.crop(-x.shape[1])
        return out

    return run


def fastdl_side(stack, activation: str, context: torch.Tensor, x: torch.Tensor) -> Callable[[], torch.Tensor]:
    before = len(context)
    k_cache, v_cache = torch.zeros(2, LAYERS, KV_HEADS, before + len(x), HEAD_DIM, dtype=torch.float16)
    rope = ops.rope_table(HEAD_DIM, ROPE_BASE, before + len(x))
    if before:
        ops.decoder_blocks(context, stack, k_cache, v_cache, rope, activation=activation)
    return lambda: ops.decoder_blocks(x, stack, k_cache, v_cache, rope, pos=before, activation=activation)


@pytest.mark.parametrize("rows", [1, BEFORE])
def test_decoder_block(benchmark, recorder, threads, rounds, rows):
    level = fastdl.backend.cpu_level()
    if level == "none":
        pytest.skip("fastdl's compiled library is not loaded: make build")
    torch.set_num_threads(threads)
    stack, state = make_stack()
    generator = torch.Generator().manual_seed(1)
    context = torch.randn(BEFORE if rows == 1 else 0, WIDTH, generator=generator)
    x = torch.randn(rows, WIDTH, generator=generator)
    chosen = ops.auto_activation(level, torch.float32, rows)
    with torch.inference_mode():
        exact = transformers_side(state, torch.float32, context, x)
        sides = {
            "fastdl auto": (fastdl_side(stack, "auto", context, x), chosen),
            "fastdl fp32": (fastdl_side(stack, "fp32", context, x), "fp32"),
            "transformers bf16": (transformers_side(state, torch.bfloat16, context, x), "bf16"),
            "transformers fp32": (exact, "fp32"),
        }
        answer, errors = exact().numpy(), {}
        for name, (run, activation) in sides.items():
            errors[name] = relative_error(answer, run().float().numpy())
            if not errors[name] <= ALLOWED[activation]:
                raise IncorrectResult(
                    f"{name}: relative error {errors[name]:.3g} above {ALLOWED[activation]}: not timed"
                )
        calls = {name: calls_for(run) for name, (run, _) in sides.items()}
        turns = {name: lambda run=run, n=calls[name]: seconds_per_call(run, n) for name, (run, _) in sides.items()}
        seconds = take_turns(turns, rounds, benchmark)
    limit, weights = recorder.limits[str(threads)], sum(rows_ * cols for rows_, cols in SHAPES.values()) * LAYERS
    record = {"level": level, "rows": rows, "missing": [], "sides": {}}
    for name, (_, activation) in sides.items():
        nbytes = stack.nbytes if name.startswith("fastdl") else weights * (2 if "bf16" in name else 4)
        typical = spread(seconds[name])
        record["sides"][name] = {
            "seconds": typical,
            "relative_error": float(f"{errors[name]:.3g}"),
            "activation": activation,
            **limits.shares(typical["median"], nbytes, 2 * rows * weights, nbytes, limit, level, activation),
            "speedup_over": {p: paired_ratio(seconds[p], seconds[name]) for p in sides if p.startswith("transformers")},
        }
    recorder.add("decoder_block", f"{level}/{rows}", record)
