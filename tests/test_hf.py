"""attn_implementation="fastdl": small models of many kinds against transformers' own eager attention."""

from __future__ import annotations

import doctest
import subprocess
import sys

import pytest
import torch

transformers = pytest.importorskip("transformers")
hf = pytest.importorskip("fastdl.hf")

V, N = 60, 11
RIGHT = (torch.arange(N) < torch.tensor([N, 6, 3])[:, None]).long()
LEFT = RIGHT.flip(1)
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": V,
         "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}  # fmt: skip
GROUPED = {**SIZES, "num_key_value_heads": 2}
EXPERTS = {"num_experts_per_tok": 1, "num_local_experts": 2}
DECODERS = {
    "Llama": GROUPED,
    "Mistral": {**GROUPED, "sliding_window": 4},
    "Gemma2": {**GROUPED, "sliding_window": 4, "head_dim": 8, "attn_logit_softcapping": 2.0},
    "Gemma3": {**GROUPED, "sliding_window": 4, "head_dim": 8},
    "Phimoe": {**GROUPED, "sliding_window": 4, **EXPERTS},  # its layers do not say which window they have
    "GptOss": {**GROUPED, "head_dim": 8, "sliding_window": 4, **EXPERTS},  # attention sinks
    "Llama4": {**GROUPED, "num_hidden_layers": 4, "intermediate_size_mlp": 48, "head_dim": 8,
               "attention_chunk_size": 4, **EXPERTS},
    "DeepseekV3": {**SIZES, "num_key_value_heads": 4, "moe_intermediate_size": 16, "n_routed_experts": 4, "n_group": 2,
                   "topk_group": 1, "num_experts_per_tok": 2, "q_lora_rank": 16, "kv_lora_rank": 16,
                   "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 12, "first_k_dense_replace": 1},
}  # fmt: skip
CONFIGS = {"Gemma3": "Gemma3TextConfig", "Llama4": "Llama4TextConfig"}
ENCODERS = {
    "Bert": SIZES,
    "ModernBert": {**SIZES, "local_attention": 4, "global_attn_every_n_layers": 2, "cls_token_id": 1,
                   "sep_token_id": 2},
}  # fmt: skip
BART = {"vocab_size": V, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
        "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "pad_token_id": 0,
        "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}  # fmt: skip
T5 = {"vocab_size": V, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "pad_token_id": 0,
      "decoder_start_token_id": 0}  # fmt: skip
GREEDY = {"do_sample": False, "max_new_tokens": 8, "min_new_tokens": 8, "pad_token_id": 0}


def made(name: str, options: dict, suffix: str):
    if not hasattr(transformers, name + suffix):
        pytest.skip(f"transformers {transformers.__version__} has no {name}{suffix}")
    config = getattr(transformers, CONFIGS.get(name, f"{name}Config"))(**options)
    torch.manual_seed(0)
    return getattr(transformers, name + suffix)(config).eval()


def ids_of(batch: int = 3, length: int = N) -> torch.Tensor:
    return torch.randint(3, V, (batch, length), generator=torch.Generator().manual_seed(1))


def same(model, run, limit: float = 1e-5) -> None:
    """run(model) with eager attention and with fastdl's."""
    results = []
    for name in ("eager", "fastdl"):
        model.set_attn_implementation(name)
        results.append(run(model))
    for ours, theirs in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=limit, atol=limit)


@pytest.mark.parametrize("name", DECODERS)
def test_decoders(native, name):
    """Logits without padding, with padding on either side, of tokens that follow a cache, and packed sequences."""

    @torch.no_grad()
    def run(model):
        ids = ids_of()
        found = [model(ids).logits]
        found += [model(ids, attention_mask=mask).logits[mask.bool()] for mask in (RIGHT, LEFT)]
        cache = model(ids[:, :5]).past_key_values
        found.append(model(ids[:, 5:], past_key_values=cache).logits)
        positions = torch.tensor([[0, 1, 2, 3, 4, 0, 1, 0, 1, 2, 3]])
        found.append(model(ids[:1], position_ids=positions, use_cache=False).logits)
        return found

    same(made(name, DECODERS[name], "ForCausalLM"), run)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("name", ["Llama", "Mistral", "Gemma2", "GptOss"])
def test_generation(native, name, cache):
    options = {"cache_implementation": "static", "disable_compile": True} if cache == "static" else {}

    def run(model):
        return [model.generate(ids_of(), attention_mask=mask, **GREEDY, **options) for mask in (LEFT, LEFT**0)]

    same(made(name, DECODERS[name], "ForCausalLM"), run)


@pytest.mark.parametrize("name", ENCODERS)
def test_encoders(native, name):
    @torch.no_grad()
    def run(model):
        ids = ids_of()
        found = [model(ids).last_hidden_state]
        return found + [model(ids, attention_mask=mask).last_hidden_state[mask.bool()] for mask in (RIGHT, LEFT)]

    same(made(name, ENCODERS[name], "Model"), run)


@pytest.mark.parametrize(("name", "options"), [("Bart", BART), ("T5", T5)])
def test_encoder_decoders(native, name, options):
    """Cross-attention to padded inputs; T5 adds a bias of positions to the scores."""

    @torch.no_grad()
    def run(model):
        ids, mask = ids_of(), RIGHT[:, :7]
        given = {"attention_mask": RIGHT, "decoder_input_ids": ids[:, :7]}
        found = [model(ids, **given).logits, model(ids, **given, decoder_attention_mask=mask).logits[mask.bool()]]
        return [*found, model.generate(ids, attention_mask=RIGHT, **GREEDY)]

    same(made(name, options, "ForConditionalGeneration"), run)


@pytest.mark.parametrize("name", ["Llama", "Gemma2", "GptOss"])
def test_gradients(native, name):
    def run(model):
        model.zero_grad()
        ids = ids_of()
        model(ids, attention_mask=RIGHT, labels=ids.masked_fill(RIGHT == 0, -100)).loss.backward()
        return [p.grad for p in model.parameters() if p.grad is not None]

    same(made(name, DECODERS[name], "ForCausalLM").train(), run)


def test_masks_of_a_user(native):
    """Of four dimensions: boolean, or floating and added."""
    boolean = torch.rand(3, 1, N, N, generator=torch.Generator().manual_seed(2)) < 0.5
    boolean |= torch.eye(N, dtype=torch.bool)

    @torch.no_grad()
    def run(model):
        floating = torch.zeros(boolean.shape).masked_fill(~boolean, torch.finfo(torch.float32).min)
        name = model.config._attn_implementation
        return [model(ids_of(), attention_mask=boolean if name == "fastdl" else floating).logits,
                model(ids_of(), attention_mask=floating).logits]  # fmt: skip

    same(made("Llama", GROUPED, "ForCausalLM"), run)


def test_lengths_of_packed_sequences(native):
    """cu_seq_lens as flash attention takes them, without position ids that say the same."""
    model = made("Llama", GROUPED, "ForCausalLM")
    model.set_attn_implementation("fastdl")
    ids, cu = ids_of(1), torch.tensor([0, 5, 7, N], dtype=torch.int32)
    positions = torch.tensor([[0, 1, 2, 3, 4, 0, 1, 0, 1, 2, 3]])
    with torch.no_grad():
        y = model(ids, position_ids=positions, use_cache=False, cu_seq_lens_q=cu, cu_seq_lens_k=cu).logits
        for start, end in ((0, 5), (5, 7), (7, N)):
            alone = model(ids[:, start:end]).logits
            torch.testing.assert_close(y[:, start:end], alone, rtol=1e-5, atol=1e-5)
    q = torch.randn(1, 4, N, 8)
    y, _ = hf.attend(model, q, q, q, None, is_causal=False, cu_seq_lens_q=cu, cu_seq_lens_k=cu)
    part = q[:, :, 5:7]
    alone = torch.nn.functional.scaled_dot_product_attention(part, part, part).transpose(1, 2)
    torch.testing.assert_close(y[:, 5:7], alone, rtol=1e-5, atol=1e-5)


def masks_of(name, options, **given):
    """What `key_mask` makes in a forward pass."""
    model, seen = made(name, options, "ForCausalLM" if name in DECODERS else "Model"), []

    def recorded(*args, **more):
        seen.append(hf.key_mask(*args, **more))
        return seen[-1]

    transformers.AttentionMaskInterface.register("fastdl", recorded)
    try:
        model.set_attn_implementation("fastdl")
        with torch.no_grad():
            model(ids_of(1 if "position_ids" in given else 3), **given)
    finally:
        hf.register()
    return seen


def test_masks_say_no_more_than_they_must(native):
    """No matrix of queries by keys, and no mask where lengths, a window or "causal" say it."""
    assert masks_of("Llama", GROUPED) == [None] and masks_of("Bert", SIZES) == [None]
    (mask,) = masks_of("Llama", GROUPED, attention_mask=RIGHT)
    assert mask.causal and mask.lens.tolist() == [N, 6, 3] and mask.keys is mask.window is mask.packed is None
    (mask,) = masks_of("Llama", GROUPED, attention_mask=LEFT)
    assert mask.causal and mask.keys.shape == (3, 1, 1, N) and mask.lens is None
    (mask,) = masks_of("Bert", SIZES, attention_mask=RIGHT)
    assert not mask.causal and mask.lens.tolist() == [N, 6, 3]
    (mask,) = masks_of("Mistral", DECODERS["Mistral"])
    assert mask.causal and mask.window == (3, -1) and mask.lens is mask.keys is None
    positions = torch.tensor([[0, 1, 2, 3, 4, 0, 1, 0, 1, 2, 3]])
    (mask,) = masks_of("Llama", GROUPED, position_ids=positions, use_cache=False)
    assert mask.causal and mask.packed.tolist() == [0, 5, 7, N]
    moved = masks_of("Llama", GROUPED, attention_mask=LEFT)[0].to("cpu")
    assert isinstance(moved, hf.KeyMask) and moved.causal


def test_dropout(native):
    options = {**GROUPED, "attention_dropout": 0.5}
    model = made("Llama", options, "ForCausalLM").train()
    model.set_attn_implementation("fastdl")
    runs = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        runs.append(model(ids_of()).logits)
    assert torch.equal(runs[0], runs[1]) and not torch.equal(runs[0], runs[2])


def test_compile(native):
    model = made("Llama", GROUPED, "ForCausalLM")
    model.set_attn_implementation("fastdl")
    compiled = torch.compile(model, backend="aot_eager")
    with torch.no_grad():
        for given in ({}, {"attention_mask": RIGHT}):
            expected = model(ids_of(), use_cache=False, **given).logits
            torch.testing.assert_close(compiled(ids_of(), use_cache=False, **given).logits, expected)


def test_what_is_refused(native):
    q = torch.randn(1, 4, N, 8)
    with pytest.raises(ValueError, match="output_attentions: the weights are never formed"):
        hf.attend(torch.nn.Module(), q, q, q, None, output_attentions=True)
    with pytest.raises(ValueError, match="head_mask: the weights are never formed; use attn_implementation='eager'"):
        hf.attend(torch.nn.Module(), q, q, q, None, head_mask=torch.ones(4))
    with pytest.raises(ValueError, match="cache: continuous batching"):
        hf.attend(torch.nn.Module(), q, q, q, None, cache=object())
    with pytest.raises(TypeError, match=r"attention_mask: expected a boolean or floating tensor of four dim.*int64"):
        hf.attend(torch.nn.Module(), q, q, q, torch.ones(1, 1, N, N, dtype=torch.int64))


def test_import_of_fastdl_alone():
    code = "import sys, fastdl; assert 'transformers' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_examples_run():
    result = doctest.testmod(hf)
    assert result.attempted > 0 and result.failed == 0
