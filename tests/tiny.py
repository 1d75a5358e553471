"""A folder with a tiny model and tokenizer, as `from_pretrained` reads it, and small data files."""

from __future__ import annotations

import json
import random
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    GPTJConfig,
    GPTJForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)


def tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {t: i for i, t in enumerate(["<pad>", "<s>", "</s>", *letters])}
    inner = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", bos_token="<s>", eos_token="</s>",
        model_input_names=["input_ids", "attention_mask"],
    )  # fmt: skip


def write_model(folder: Path, architecture: str = "llama", seed: int = 0, width: int = 16) -> Path:
    torch.manual_seed(seed)
    words = tokenizer()
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    if architecture == "gptj":
        model = GPTJForCausalLM(
            GPTJConfig(
                vocab_size=len(words), n_embd=16, n_layer=2, n_head=2, rotary_dim=4,
                n_positions=256, **ids,
            )
        )  # fmt: skip
    else:
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=len(words), hidden_size=width, intermediate_size=width * 3 // 2,
                num_hidden_layers=2,
                num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256, **ids,
            )
        )  # fmt: skip
    model.save_pretrained(folder)
    words.save_pretrained(folder)
    return folder


def write_text(path: Path, words: str = "the cat sat on a mat and saw the rat", count: int = 600):
    draw = random.Random(str(path.name))
    path.write_text(" ".join(draw.choice(words.split()) for _ in range(count)), "utf-8")
    return path


def write_rows(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(r) + "\n" for r in rows), "utf-8")
    return path


def questions(count: int = 24) -> list[dict]:
    """Rows of the format `choices`."""
    draw = random.Random(0)
    rows = []
    for _ in range(count):
        a, b = draw.randint(0, 9), draw.randint(0, 9)
        rows.append({"prompt": f"{a}, {b}:", "choices": ["odd", "even"], "answer": 1 - (a + b) % 2})
    return rows
