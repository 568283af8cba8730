"""Writes tiny Hugging Face folders: random weights, a trained tokenizer, any configuration a test may want.

    model = write_hf_model(folder, "qwen2", tie_word_embeddings=True)      # the transformers model itself

Two layers of width 64 and some 400 tokens: converting and loading one takes milliseconds.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

TEXT = (
    "The quick brown fox jumps over the lazy dog; it's 3.14159, isn't it? We'll see what they've done in 2024.\n"
    "def add(first, second):\n    return first + second  # and nothing else\n\n"
) * 4
VOCAB = 416  # rows of the embedding; the tokenizer has fewer tokens
_TAIL = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}" + _TAIL
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|"
    r"\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# pre-tokenizers as the models' own tokenizer.json have them (name of the model -> steps before the bytes)
CUTS = {
    "gpt2": [],
    "smollm": [pre_tokenizers.Digits(individual_digits=True)],
    "llama3": [pre_tokenizers.Split(Regex(_LLAMA3), "isolated")],
    "qwen2": [pre_tokenizers.Split(Regex(_QWEN2), "isolated")],
    "tekken": [pre_tokenizers.Split(Regex(_TEKKEN), "isolated")],
}


def byte_level_tokenizer(cut: str = "smollm", *, bos: bool = False, whole_tokens_first: bool = False) -> Tokenizer:
    """A trained byte-level tokenizer with <|endoftext|> (0), <|im_start|> (1), <|im_end|> (2) and <tag> (text)."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=whole_tokens_first))
    own = cut in ("gpt2", "smollm")
    steps = [*CUTS[cut], pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=own)]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps) if len(steps) > 1 else steps[0]
    tokenizer.decoder = decoders.ByteLevel()
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=specials, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([TEXT], trainer)
    tokenizer.add_tokens([AddedToken("<tag>", normalized=False)])
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<|im_start|> $A", special_tokens=[("<|im_start|>", 1)]
        )
    return tokenizer


def sentencepiece_tokenizer() -> Tokenizer:
    """A tokenizer.json of llama 2's kind: BPE over characters, blanks as U+2581, bytes as a last resort."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    specials = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=specials, show_progress=False)
    words = [("▁" + word) for word in TEXT.split()]
    tokenizer.train_from_iterator(words, trainer)
    data = json.loads(tokenizer.to_str())  # as transformers writes it: only three of them are special tokens
    data["added_tokens"] = [token for token in data["added_tokens"] if token["content"] in ("<unk>", "<s>", "</s>")]
    tokenizer = Tokenizer.from_str(json.dumps(data))
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return tokenizer


def write_tokenizer(folder: Path, tokenizer: Tokenizer) -> None:
    """tokenizer.json and tokenizer_config.json, which names BOS, EOS and a chat template."""
    tokenizer.save(str(folder / "tokenizer.json"))
    bos, eos = ("<s>", "</s>") if tokenizer.token_to_id("<s>") is not None else ("<|im_start|>", "<|im_end|>")
    config = {"bos_token": bos, "eos_token": {"content": eos}, "chat_template": "{{ messages[0].content }}"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def write_hf_model(
    folder: Path,
    kind: str = "llama",
    *,
    dtype: torch.dtype = torch.float32,
    shard: str | None = None,
    seed: int = 0,
    tokenizer: Tokenizer | None = None,
    **settings,
) -> torch.nn.Module:
    """Writes config.json, weights and tokenizer into `folder`; returns the model, in float32, with what was saved."""
    import transformers

    names = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2"}
    sizes = {
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 96,
        "vocab_size": VOCAB,
        "max_position_embeddings": 512,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    config = getattr(transformers, names[kind] + "Config")(**sizes | settings)
    model = getattr(transformers, names[kind] + "ForCausalLM")(config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            scale = 0.1 if weight.dim() == 1 else weight.shape[-1] ** -0.5
            weight.copy_(torch.randn(weight.shape, generator=generator) * scale + (weight.dim() == 1))
    for weight in model.parameters():  # not model.to: that would round the rotary frequencies too
        weight.data = weight.data.to(dtype)
    model.save_pretrained(folder, **({"max_shard_size": shard} if shard else {}))
    write_tokenizer(folder, tokenizer or byte_level_tokenizer())
    for weight in model.parameters():
        weight.data = weight.data.float()
    return model


@torch.inference_mode()
def logits(model: torch.nn.Module, ids: list[int]) -> torch.Tensor:
    """float32 [len(ids), vocab]"""
    return model(torch.tensor([ids])).logits[0]
