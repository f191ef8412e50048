"""Tiny random transformers models for the adapter tests, built in well under a second."""

import functools

import pytest
import small
import torch

transformers = pytest.importorskip("transformers", reason="the adapters' tests need transformers (extra: hf)")

VERSION = tuple(int(x) for x in transformers.__version__.split(".")[:2])
VOCAB = 128
_BASE = dict(
    vocab_size=VOCAB,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=512,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
_GDN = dict(
    head_dim=16,
    linear_num_key_heads=2,
    linear_num_value_heads=4,
    linear_key_head_dim=16,
    linear_value_head_dim=16,
    linear_conv_kernel_dim=4,
)
_MOE = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32, shared_expert_intermediate_size=32)


def config(family: str, **changes):
    """The configuration of a tiny model: four layers, the last of which is attention (olmo_hybrid: see layer_types)."""
    build = {
        "qwen3_5": lambda **c: transformers.Qwen3_5TextConfig(**_BASE | _GDN | c),
        "qwen3_5_moe": lambda **c: transformers.Qwen3_5MoeTextConfig(**_BASE | _GDN | _MOE | c),
        "olmo_hybrid": lambda **c: transformers.OlmoHybridConfig(**_BASE | c),
        "qwen3_next": lambda **c: transformers.Qwen3NextConfig(**_BASE | _GDN | {"num_experts": 0} | c),
        "qwen3_next_moe": lambda **c: transformers.Qwen3NextConfig(**_BASE | _GDN | _MOE | c),
        "llama": lambda **c: transformers.LlamaConfig(**_BASE | c),
        "mistral": lambda **c: transformers.MistralConfig(**_BASE | {"sliding_window": None} | c),
        "qwen2": lambda **c: transformers.Qwen2Config(**_BASE | c),
        "qwen3": lambda **c: transformers.Qwen3Config(**_BASE | {"head_dim": 16} | c),
        "olmo2": lambda **c: transformers.Olmo2Config(**_BASE | c),
    }
    return build[family](**changes)


HYBRIDS = ("qwen3_5", "qwen3_5_moe", "olmo_hybrid", "qwen3_next", "qwen3_next_moe")
ATTENTION_ONLY = ("llama", "mistral", "qwen2", "qwen3", "olmo2")


def build(family: str, *, seed: int = 0, dtype: torch.dtype = torch.float32, **changes):
    """A tiny model in evaluation mode; larger weights would make its passes chaotic, and rounding errors grow."""
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config(family, **changes)).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.04)
    return model.to(dtype)


def rotations(model, h: torch.Tensor, positions: torch.Tensor):
    """What layers take as position_embeddings at positions [B, T]; None of a model without rotary ones."""
    rotary = getattr(model.model, "rotary_emb", None)
    if hasattr(rotary, "mrope_section"):  # three positions of each token, the same for text
        positions = positions.expand(3, -1, -1)
    return None if rotary is None else rotary(h, position_ids=positions)


def needs_cache(family: str) -> None:
    """Skips where transformers' own forward pass with a cache fails, whatever the mixer."""
    if family == "olmo_hybrid" and VERSION == (5, 14):
        pytest.skip("transformers 5.14: OlmoHybridDynamicCache lacks get_query_offset, which attention masks call")


tokens = functools.partial(small.tokens, first=3, vocab=VOCAB)
