"""Model shapes, with random weights: the cost of a step does not depend on their values."""

from __future__ import annotations

import torch
from torch import nn
from transformers import AutoModelForCausalLM, GPTJConfig, LlamaConfig

NARROW = "llama-3.2-3b, narrow"
"""As many matrices as llama-3.2-3b, and next to nothing in them: the host's work is left."""

SHAPES: dict[str, LlamaConfig | GPTJConfig] = {
    "tiny": LlamaConfig(
        vocab_size=512, hidden_size=128, intermediate_size=256, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=2,
    ),
    "smollm2": LlamaConfig(
        vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30,
        num_attention_heads=9, num_key_value_heads=3, tie_word_embeddings=True,
    ),
    "llama-3.2-3b": LlamaConfig(
        vocab_size=128256, hidden_size=3072, intermediate_size=8192, num_hidden_layers=28,
        num_attention_heads=24, num_key_value_heads=8, head_dim=128, tie_word_embeddings=True,
    ),
    "gpt-j-6b": GPTJConfig(),
    NARROW: LlamaConfig(
        vocab_size=512, hidden_size=96, intermediate_size=128, num_hidden_layers=28,
        num_attention_heads=24, num_key_value_heads=8, head_dim=4, tie_word_embeddings=True,
    ),
    "llama-3.1-8b": LlamaConfig(
        vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
        num_attention_heads=32, num_key_value_heads=8,
    ),
}  # fmt: skip

WHOLE = [name for name in SHAPES if name != NARROW]
"""The shapes of whole models."""

TARGETS: dict[str, list[str] | str] = {"q,v": ["q_proj", "v_proj"], "all-linear": "all-linear"}


def lora_model(shape: str, targets: str, rank: int, device: torch.device) -> nn.Module:
    """The model of a shape in bf16 on a GPU and float32 elsewhere, with float32 LoRA factors."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            model = AutoModelForCausalLM.from_config(SHAPES[shape])
    finally:
        torch.set_default_dtype(default)
    model.config.use_cache = False
    config = LoraConfig(
        r=rank, lora_alpha=4 * rank, target_modules=TARGETS[targets], task_type="CAUSAL_LM"
    )
    model = get_peft_model(model.requires_grad_(False), config)
    for name, p in model.named_parameters():
        if "lora_B" in name:  # B = 0 would make half of the work trivial
            torch.nn.init.normal_(p, std=0.01)
    return model.to(device)
