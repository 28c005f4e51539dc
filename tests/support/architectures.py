"""Architectures chosen for how differently they write attention, masks and caches."""

from __future__ import annotations

BOTH = (
    "bart", "bert", "biogpt", "cohere2", "ctrl", "deepseek_v2", "diffllama", "doge",
    "falcon", "falcon_h1", "gemma3_text", "gemma4_text", "gpt2", "gpt_bigcode", "gpt_neox",
    "granite", "jamba", "lfm2", "llama", "llama4_text", "mistral",
    "opt", "phi", "phi3", "qwen3", "qwen3_next", "recurrent_gemma", "stablelm", "whisper", "zamba2",
)  # fmt: skip
"""Those with two implementations of attention take turns."""
EAGER = (
    "bloom", "codegen", "gemma2", "gpt_neo", "gpt_oss", "gptj", "granite_swa", "mpt", "roformer",
    "xglm",
)  # fmt: skip
"""Those whose attention is written out in the model alone."""
LEFT_ALONE = {
    "deepseek_v2": "latent attention",
    "diffllama": "other heads",
    "doge": "the cache is also read by",
}
"""Architectures with sites that may be left as they were, and what the reasons may say."""
