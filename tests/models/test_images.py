"""Models that put images between their tokens: the graph of the prompt ends where they do so."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from compiled import is_compressed
from torch import Tensor
from zoo import CACHE

from spark_compile import optimize

IMAGE = 100
"""The token in whose place a part of an image comes."""
VISION: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
    "image_size": 32, "patch_size": 8,
}  # fmt: skip
QWEN_VISION: dict[str, Any] = {
    "depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "patch_size": 8,
    "out_hidden_size": 64, "deepstack_visual_indexes": [0], "num_position_embeddings": 16,
}  # fmt: skip
TEXT: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 128, "initializer_range": 0.2,
}  # fmt: skip
ROTATED = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [3, 3, 2]}


def tokens(*image: int) -> Tensor:
    """A prompt with the tokens of an image in it."""
    before, after = torch.randint(3, 90, (2, 1, 8))
    return torch.cat([before, torch.tensor([image]), after], 1)


def llava() -> tuple[Any, dict[str, Tensor]]:
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**VISION), vision_feature_layer=-1,
        text_config=transformers.LlamaConfig(**TEXT), image_token_index=IMAGE,
    )  # fmt: skip
    model = transformers.LlavaForConditionalGeneration(config)
    return model, {"input_ids": tokens(*[IMAGE] * 16), "pixel_values": torch.randn(1, 3, 32, 32)}


def gemma3() -> tuple[Any, dict[str, Tensor]]:
    """The tokens of an image see each other; one layer slides."""
    layers = {"sliding_window": 12, "layer_types": ["sliding_attention", "full_attention"]}
    config = transformers.Gemma3Config(
        vision_config=transformers.SiglipVisionConfig(**VISION), image_token_index=IMAGE,
        text_config=transformers.Gemma3TextConfig(**TEXT, **layers), mm_tokens_per_image=4,
    )  # fmt: skip
    ids = tokens(*[IMAGE] * 4)
    inputs = {"token_type_ids": (ids == IMAGE).long(), "pixel_values": torch.randn(1, 3, 32, 32)}
    return transformers.Gemma3ForConditionalGeneration(config), {"input_ids": ids, **inputs}


def qwen3_vl() -> tuple[Any, dict[str, Tensor]]:
    """What images add between layers breaks each layer's graph; positions have three axes."""
    config = transformers.Qwen3VLConfig(
        vision_config=QWEN_VISION, text_config={**TEXT, "rope_parameters": ROTATED},
        image_token_id=IMAGE, vision_start_token_id=101, vision_end_token_id=102,
    )  # fmt: skip
    ids = tokens(101, *[IMAGE] * 4, 102)
    inputs = {
        "mm_token_type_ids": (ids == IMAGE).int(), "pixel_values": torch.randn(16, 3 * 2 * 8 * 8),
        "image_grid_thw": torch.tensor([[1, 4, 4]]),
    }  # fmt: skip
    return transformers.Qwen3VLForConditionalGeneration(config), {"input_ids": ids, **inputs}


def generated(model: Any, inputs: dict[str, Tensor], **how: Any) -> Any:
    return model.generate(
        **inputs, attention_mask=torch.ones_like(inputs["input_ids"]), max_new_tokens=24,
        eos_token_id=None, do_sample=False, output_logits=True, return_dict_in_generate=True,
        disable_compile=True, pad_token_id=0, **how,
    )  # fmt: skip


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize(
    "make",
    [
        llava,
        pytest.param(gemma3, marks=pytest.mark.slow),
        pytest.param(qwen3_vl, marks=pytest.mark.slow),
    ],
)
def test_a_prompt_with_an_image(make: Callable[[], Any], cache: str) -> None:
    """Under ``strict``: that parts of the model have no attention is no failure."""
    how = {} if cache == "dynamic" else {"cache_implementation": "static"}
    torch.manual_seed(7)
    model, inputs = make()
    for parameter in model.eval().parameters():
        if not parameter.any():  # as Gemma's projection of images is before training
            torch.nn.init.normal_(parameter, std=0.2)
    expected = generated(model, inputs, **how)
    blank = {**inputs, "pixel_values": torch.zeros_like(inputs["pixel_values"])}
    assert not torch.equal(generated(model, blank, **how).logits[0], expected.logits[0])
    options = {"key_ratio": 0.0, "window": 4, "inner": "eager", "strict": True}
    actual = generated(optimize(copy.deepcopy(model), **options), inputs, **how)
    torch.testing.assert_close(actual.logits, expected.logits, atol=2e-5, rtol=2e-5)
    layers = [(layer.keys, layer.values) for layer in actual[CACHE].layers]
    assert len(layers) == 2
    assert is_compressed(layers)
