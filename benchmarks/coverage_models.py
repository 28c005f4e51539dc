"""Tiny models with random weights of every architecture of transformers that writes text.

Those are its causal language models and the models that take images as well.
"""

from __future__ import annotations

import re
from typing import Any

import torch
import transformers
from transformers import PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

from .coverage_fields import SPECIAL

MAPPINGS = (MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES)
"""Classes by architecture; of one that is in both, the first counts."""
MOST_LAYERS = 6
VOCABULARY = 96
WINDOW = 12
"""Of sliding attention: shorter than the prompt, so that a sliding cache has slid, and long enough
for a packed token to be seen."""

AT_MOST: tuple[tuple[str, int], ...] = (
    (r"(pad|bos|eos|sep|cls|decoder_start)_token_id", 1),
    (r"type_vocab_size|n_langs", 2),
    (r"(\w+_)?vocab_size(_\w+)?|n_tokens|\w+_vocab", VOCABULARY),
    (r"max_(position_embeddings|seq_len|sequence_length|(target|source)_positions)"
     r"|n_positions|n_ctx|\w*max_length", 256),
    (r"sliding_window(_size)?|(attention_)?window_size|local_attention|attention_chunk_size",
     WINDOW),
    (r"((out|text)_)?hidden_size|hidden_size_global|d_model|n_embd|(word_)?embed(_proj)?_dim"
     r"|emb_dim|lru_width|dim(_model)?|embedding_size|adapter_(input_size|in_dim|out_dim)"
     r"|mamba_d_ssm", 64),
    (r"\w*(intermediate_size|ffn_dim|ffn_hidden_size|n_inner|dim_ff|dff|d_ff|ffn_embed_dim)\w*",
     96),
    (r"(\w+_)?((num_)?(\w+_)?attention_heads|n_heads?|num_heads|linear_num_value_heads"
     r"|n_mamba_heads|mamba_num_heads|index_n_heads)", 4),
    (r"(\w+_)?(num_(key_value|kv)_heads|linear_num_key_heads|kv_n_heads)", 2),
    (r"(?!qk_head_dim)(\w+_)?(head_dim|d_head|headdim|kv_channels|d_kv)", 16),
    (r"(\w+_)?(num|n)_(\w+_)?experts", 4),
    (r"num_experts_per_tok(en)?|moe_(topk|top_k|k)|top_k(_experts)?|n_activated_experts", 2),
    (r"n_groups?|topk_group|num_expert_group|n_shared_experts|num_shared_experts", 1),
    (r"first_k_dense_replace|num_dense_layers|moe_layer_start_index", 1),
    (r"[qkov]+_lora_rank", 32),
    (r"rotary_dim", 8),
    (r"(mamba_)?(d_state|state_size|ssm_state_size|chunk_size)", 8),
    (r"num_nextn_predict_layers|num_mem_blocks", 1),
)  # fmt: skip
"""Upper limit of a configuration's field, by the first pattern that matches its whole name."""

DEPTHS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers",
          "encoder_layers", "num_decoder_layers", "num_encoder_layers", "depth")  # fmt: skip
UNSET: dict[str, Any] = {"num_key_value_heads": 2, "head_dim": 16, "num_experts_per_tok": 2}
"""Fields that are set although their default is None."""
ALWAYS: dict[str, Any] = {
    "initializer_range": 0.2, "init_std": 0.2, "use_cache": True,
}  # fmt: skip
ALONE: dict[str, Any] = {"is_decoder": True, "add_cross_attention": False}
"""Fields of decoders that can be parts of others."""


def architectures() -> list[str]:
    """Names of all architectures, as transformers' automatic classes know them."""
    return sorted({name for mapping in MAPPINGS for name in mapping})


def class_name(name: str) -> str:
    """The model class of an architecture; the causal language model where there are two."""
    found = next(mapping[name] for mapping in MAPPINGS if name in mapping)
    return found if isinstance(found, str) else found[0]


def tiny_config(name: str, least_layers: int = 2) -> PreTrainedConfig:
    """The architecture's default configuration with few layers, heads, channels and experts."""
    # Special fields are written for models of two layers or more.
    least = 2 if name in SPECIAL else least_layers
    always = ALWAYS | (ALONE if name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES else {})
    config = shrunk(CONFIG_MAPPING[name](), SPECIAL.get(name, {}), always, least)
    wanted = getattr(transformers, class_name(name)).config_class
    parts = [part for part in vars(config).values() if isinstance(part, PreTrainedConfig)]
    # A decoder registered under its whole model's name has a part of that model's configuration.
    inside = [part for part in parts if type(part) is wanted]
    return inside[0] if inside and not isinstance(config, wanted) else config


def shrunk(
    config: PreTrainedConfig, special: dict[str, Any], always: dict[str, Any], least_layers: int
) -> PreTrainedConfig:
    """A small configuration of the same class.

    Args:
        special: fields that win, nested ones as dicts.
        always: fields that are set wherever a configuration has them.
    """
    defaults = {name: value for name, value in vars(config).items() if name[0] != "_"}
    small = {name: value for name, value in always.items() if name in defaults}
    layers = chosen_layers(defaults, least_layers)
    for name, default in defaults.items():
        if isinstance(default, PreTrainedConfig):
            small[name] = shrunk(default, special.get(name, {}), always, least_layers)
        elif default is None and name in UNSET:
            small[name] = UNSET[name]
        elif isinstance(default, int) and not isinstance(default, bool):
            small |= _smaller(name, default, len(layers))
        elif isinstance(default, (list, tuple)) and len(default) == depth(defaults):
            small[name] = [default[index] for index in layers]
    if "kv_lora_rank" in defaults and small.get("num_key_value_heads"):
        small["num_key_value_heads"] = 4  # latent attention has a key head for each query head
    small |= {name: value for name, value in special.items() if not isinstance(value, dict)
              or not isinstance(defaults.get(name), PreTrainedConfig)}  # fmt: skip
    return type(config)(**small)


def _smaller(name: str, default: int, layers: int) -> dict[str, int]:
    """The field if it is to be changed."""
    if name in DEPTHS:
        return {name: min(default, layers)}
    for pattern, most in AT_MOST:
        if re.fullmatch(pattern, name):
            return {name: min(default, most)}
    return {}


def depth(defaults: dict[str, Any]) -> int:
    """The number of layers of a configuration; 2 where it does not say."""
    return next((defaults[name] for name in DEPTHS if isinstance(defaults.get(name), int)), 2)


def chosen_layers(defaults: dict[str, Any], least: int = 2) -> list[int]:
    """Which of the default's layers show every kind of layer; at most MOST_LAYERS."""
    count = depth(defaults)
    kinds = [
        value for name, value in defaults.items()
        if isinstance(value, (list, tuple)) and len(value) == count and isinstance(value[0], str)
    ]  # fmt: skip
    first: dict[Any, int] = {}
    for index in range(count):
        first.setdefault(tuple(kind[index] for kind in kinds), index)
    chosen = list(first.values())[:MOST_LAYERS]
    spare = [index for index in range(max(count, least)) if index not in chosen]
    return sorted(chosen + spare[: max(0, least - len(chosen))])


def tiny_model(name: str, attention: str, least_layers: int = 2) -> Any:
    """A model in eval mode and float32; the same weights at every call.

    Raises:
        ValueError: the architecture has no such attention.
    """
    config = tiny_config(name, least_layers)
    torch.manual_seed(7)
    kind = getattr(transformers, class_name(name))
    model = kind._from_config(config, attn_implementation=attention, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():  # it would make errors in the other operand invisible
                parameter.normal_(std=0.2)
    model.generation_config = transformers.GenerationConfig(pad_token_id=0)
    return model.eval()
