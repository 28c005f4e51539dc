"""Fields that single architectures need besides the general shrinking of their configurations."""

from __future__ import annotations

from typing import Any

FULL, SLIDING, LINEAR = "full_attention", "sliding_attention", "linear_attention"
_MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 16}
_SHARED = {  # the last two layers read the caches of the first two
    "num_hidden_layers": 4, "layer_types": [SLIDING, FULL] * 2, "num_kv_shared_layers": 2,
}  # fmt: skip
_GEMMA4 = {**_SHARED, "global_head_dim": 32, "hidden_size_per_layer_input": 16}
_GEMMA4_ASSISTANT = {"text_config": {**_SHARED, "hidden_size_per_layer_input": 0}}
_QWEN4 = {
    "indexer_n_heads": 4, "indexer_kv_heads": 1, "indexer_head_dim": 16, "indexer_budget": 8,
    "indexer_compress_ratio": 4, "ngram_vocab_size_base": 96,
}  # fmt: skip
_DOTS3 = {
    "swa_num_attention_heads": 4, "swa_num_key_value_heads": 4, "swa_q_lora_rank": 32,
    "swa_kv_lora_rank": 32, "swa_head_dim": 24, "swa_qk_nope_head_dim": 16, "swa_v_head_dim": 16,
}  # fmt: skip
_THREE_AXES = ("glm4v", "glm46v", "glm_ocr", "glmga", "paddleocr_vl", "qwen2_vl", "qwen2_5_vl")


def _axes(*channels: int) -> dict[str, Any]:
    """Positions of several axes, of each of which so many pairs of channels are turned."""
    rotation = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [*channels]}
    return {"text_config": {"rope_parameters": rotation}}


SPECIAL: dict[str, dict[str, Any]] = {
    "bamba": {**_MAMBA, "attn_layer_indices": [1]},
    "cohere_compass_text": {
        "layer_types": [SLIDING, FULL],
        "rope_parameters": {SLIDING: {"rope_type": "default", "rope_theta": 1e4}, FULL: None},
    },
    "blt": {"num_hidden_layers": 2},
    "dbrx": {"attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 1e4}},
    "dots3_note": {"text_config": _DOTS3},
    "dots3_note_text": _DOTS3,
    "dots1": {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1},
    "falcon_h1": {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_ssm": 64},
    "gemma3n_text": {**_SHARED, "intermediate_size": 96, "activation_sparsity_pattern": [0.0] * 4,
                     "hidden_size_per_layer_input": 16},
    "gemma4": {"text_config": _GEMMA4},
    "gemma4_assistant": _GEMMA4_ASSISTANT,
    "gemma4_text": _GEMMA4,
    "gemma4_unified": {"text_config": _GEMMA4},
    "gemma4_unified_assistant": _GEMMA4_ASSISTANT,
    "gemma4_unified_text": _GEMMA4,
    "granitemoehybrid": {**_MAMBA, "layer_types": [LINEAR, FULL]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "use_mamba_kernels": False},
    "laguna": {"layer_types": [FULL, SLIDING], "sliding_window": 12},
    "lfm2": {"layer_types": ["conv", FULL]},
    "lfm2_moe": {"layer_types": ["conv", FULL]},
    "musicgen": {"decoder": {"num_codebooks": 1, "initializer_factor": 0.2}},
    "musicgen_melody": {"decoder": {"num_codebooks": 1, "initializer_factor": 0.2}},
    "xlstm": {"qk_dim_factor": 1.0},
    "xmod": {"default_language": "en_XX"},
    "zamba2": {"mamba_headdim": 32},
    "mamba2": {"num_heads": 8, "head_dim": 16},
    "qwen4_exp": {"text_config": _QWEN4},
    "qwen4_exp_text": _QWEN4,
    **dict.fromkeys(_THREE_AXES, _axes(2, 3, 3)),
    "cosmos3_edge": _axes(3, 3, 2),
    "glm4v_moe": _axes(1, 1, 2),
    "kosmos-2.5": {"text_config": {"layers": 2}},
    "recurrent_gemma": {"num_hidden_layers": 3},
    "reformer": {"axial_pos_embds": False, "is_decoder": True},
    "zamba": {"num_hidden_layers": 4, "layers_block_type": [LINEAR, "hybrid"] * 2},
}  # fmt: skip
"""By architecture; a dict for a nested configuration holds that one's fields."""
