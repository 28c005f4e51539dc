"""Tiny random models of real architectures."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as t

from spark_compile.transformers_names import cache_argument

CACHE = cache_argument(t.LlamaForCausalLM.forward)
"""What transformers calls the cache, as an argument and in outputs."""

_COMMON = {
    "vocab_size": 96, "num_hidden_layers": 2, "max_position_embeddings": 256,
    "initializer_range": 0.2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 95,
}  # fmt: skip
_WIDTHS = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4}
_GROUPED = {**_COMMON, **_WIDTHS, "num_key_value_heads": 2}

ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", _GROUPED),
    "qwen3": ("Qwen3Config", {**_GROUPED, "head_dim": 16}),
    "mistral": ("MistralConfig", {**_GROUPED, "sliding_window": None}),
    "mistral_sliding": ("MistralConfig", {**_GROUPED, "sliding_window": 17}),
    "gemma3_sliding": ("Gemma3TextConfig", {**_GROUPED, "head_dim": 16, "sliding_window": 24,
                                            "layer_types": ["sliding_attention",
                                                            "full_attention"]}),
    "gpt2": ("GPT2Config", {**_COMMON, "n_embd": 64, "n_head": 4, "n_layer": 2,
                            "n_positions": 256}),
    "gpt_neox": ("GPTNeoXConfig", {**_COMMON, **_WIDTHS}),
    "gemma3": ("Gemma3TextConfig", {**_GROUPED, "head_dim": 16, "sliding_window": 512,
                                    "layer_types": ["full_attention"] * 2}),
    "phi3": ("Phi3Config", _GROUPED),
    "falcon": ("FalconConfig", {**_COMMON, "hidden_size": 64, "num_attention_heads": 4,
                                "multi_query": True, "new_decoder_architecture": False}),
}  # fmt: skip


WITHOUT_ORACLE: dict[str, tuple[str, dict[str, Any]]] = {
    "gemma4_shared": ("Gemma4TextConfig", {
        **_GROUPED, "num_hidden_layers": 4, "head_dim": 16, "global_head_dim": 16,
        "num_kv_shared_layers": 2, "sliding_window": 12, "hidden_size_per_layer_input": 16,
        "vocab_size_per_layer_input": 96,
        "layer_types": ["sliding_attention", "full_attention"] * 2}),
}  # fmt: skip
"""The oracle of the tests knows no layers that read the cache of others."""


def tiny(name: str, attention: str, layers: int | None = None) -> Any:
    """A model of the architecture in eval mode; the same weights at every call.

    Args:
        layers: number of its first layers that it has; None is all. Compiling takes most of the
            time of a test, and half of that with one.
    """
    kind, fields = (ARCHITECTURES | WITHOUT_ORACLE)[name]
    if not hasattr(t, kind):
        pytest.skip(f"transformers {t.__version__} has no {kind}")
    config = getattr(t, kind)(**fields)
    if layers is not None:
        config.num_hidden_layers = layers
        if getattr(config, "layer_types", None) is not None:
            config.layer_types = config.layer_types[:layers]
    config._attn_implementation = attention
    torch.manual_seed(7)
    return t.AutoModelForCausalLM.from_config(config).eval()


def heads(model: Any) -> tuple[int, int]:
    """Hq and Hkv of a model's attentions."""
    config = model.config
    queries = config.num_attention_heads
    if getattr(config, "multi_query", False):
        return queries, 1
    return queries, getattr(config, "num_key_value_heads", None) or queries
