"""An exported folder as an object that generates, like a model of transformers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GenerationConfig,
    GenerationMixin,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_outputs import CausalLMOutputWithPast

from ..kernels.spec import DTYPES
from ..report import warn_once
from ..transformers_names import cache_argument
from .decoder import PHASES, RECURRENT, Phase
from .folder import WEIGHTS, Manifest
from .running import Runner, runner

GAIN = 8
"""A token of a prefill takes less than this part of a step's time: with one thread a 25th of it,
measured with SmolLM2-135M, and it is arithmetic where a step waits for the weights."""


class ExportedCache:
    """The states of one generation, and which tokens are in them.

    It belongs to the model that made it. ``generate(..., cache=cache)`` goes on with it.
    """

    is_compileable = False
    is_linear = (False,)

    def __init__(self, manifest: Manifest) -> None:
        self.states = [state.empty() for state in manifest.states]
        self.ids = torch.zeros(manifest.batch, manifest.max_tokens, dtype=torch.int64)
        """[B, max_tokens], of which the first ``get_seq_length()`` are in the states."""
        self._tokens = 0
        self._recurrent = any(word in s.name for s in manifest.states for word in RECURRENT)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """The number of tokens."""
        return self._tokens

    def crop(self, max_length: int) -> None:
        """Forget the tokens from ``max_length`` on; a negative number forgets that many.

        Raises:
            ValueError: there are no so many tokens, or a state of linear attention has taken them
                in for good.
        """
        kept = max_length if max_length >= 0 else self._tokens + max_length
        if not 0 <= kept <= self._tokens:
            raise ValueError(f"max_length is {max_length}: allowed is up to {self._tokens}")
        if self._recurrent and kept != self._tokens:
            raise ValueError(
                f"max_length is {max_length}: allowed is {self._tokens} with linear attention, "
                "which cannot step back"
            )
        self._tokens = kept  # the next step rewinds to its position

    def reset(self) -> None:
        """Forget all tokens."""
        for state in self.states:
            state.zero_()
        self._tokens = 0

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Let batch entry i be what entry ``beam_idx[i]`` is, for beam search."""
        self.states = [state.index_select(0, beam_idx) for state in self.states]
        self.ids = self.ids.index_select(0, beam_idx)


class ExportedConfig(PreTrainedConfig):
    """That of a decoder which has none of its own."""

    model_type = "spark-exported"


class ExportedModel(PreTrainedModel, GenerationMixin):
    """A decoder whose graphs come from a folder; ``generate`` and ``forward`` as transformers has
    them, for the batch size that was exported.
    """

    config_class = ExportedConfig
    main_input_name = "input_ids"
    _is_stateful = True  # assisted and contrastive decoding step back and forth

    def __init__(self, folder: Path, manifest: Manifest, inner: str) -> None:
        super().__init__(_config(folder))
        self.folder, self.manifest, self._inner = folder, manifest, inner
        for config in (self.config, self.config.get_text_config()):
            # What generate and others take for the most tokens.
            config.max_position_embeddings = manifest.max_tokens
        has_own = (folder / "generation_config.json").is_file()
        self.generation_config = (
            GenerationConfig.from_pretrained(folder)
            if has_own
            else GenerationConfig.from_model_config(self.config)
        )
        with safe_open(folder / WEIGHTS, framework="pt") as file:
            self._weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        self._runners: dict[Phase, Runner] = {}
        self.cache_name: str = cache_argument(GenerationMixin.prepare_inputs_for_generation)

    @property
    def device(self) -> torch.device:
        """Where the graphs run."""
        return torch.device("cpu")

    @property
    def _masked(self) -> bool:
        """Whether the graphs take a mask."""
        return "attention_mask" in self.manifest.programs["decode"].inputs

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights."""
        return DTYPES[self.manifest.dtype]

    @classmethod
    def can_generate(cls) -> bool:
        """Always."""
        return True

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False  # ``forward`` makes the cache

    def tie_weights(self, *_args: Any, **_kwargs: Any) -> None:
        """Nothing to do: what was tied is stored once."""

    def prepare_inputs_for_generation(
        self, input_ids: Tensor, next_sequence_length: int | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        """What ``forward`` gets: the tokens that the cache has not, and the mask."""
        cache = kwargs.get(self.cache_name)
        if cache is not None and input_ids.shape[1] > cache.get_seq_length():
            new = input_ids[:, cache.get_seq_length() :]
        else:
            new = (
                input_ids if next_sequence_length is None else input_ids[:, -next_sequence_length:]
            )
        mask = kwargs.get("attention_mask")
        return {"input_ids": new, "attention_mask": mask, self.cache_name: cache, "last": True}

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        last: bool = False,
        use_cache: bool = True,
        cache: ExportedCache | None = None,
        past_key_values: ExportedCache | None = None,
        **_kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits after the tokens, and the cache with them.

        Args:
            input_ids: [B, L] of the exported batch size; the tokens that the cache has not.
            attention_mask: [B, tokens in all], 0 at padding, which is on the left.
            last: logits of the last token alone, [B, 1, V], in place of [B, L, V].
            cache: of an earlier call; before transformers 5.24 it is ``past_key_values``. Other
                arguments are ignored, as transformers' own models do.

        Raises:
            ValueError: the tokens do not fit the exported batch size or capacity, or there is
                padding and the graphs take no mask.
        """
        cache = cache or past_key_values or ExportedCache(self.manifest)
        past = cache.get_seq_length()
        whole = past + input_ids.shape[1]
        self._check(input_ids, past, attention_mask)
        mask = self._mask(attention_mask, whole)
        cache.ids[:, past:whole] = input_ids
        first = whole - 1 if last else past  # of the logits
        parts = []
        for phase, start, end in self._calls(cache, past, whole):
            rows = torch.arange(min(max(start, first), end - 1), end) - start
            parts.append(self._run(phase, cache, cache.ids[:, start:end], start, rows, mask))
            cache._tokens = end
        logits = parts[-1] if last else torch.cat(parts, 1)
        kept: dict[str, Any] = {self.cache_name: cache if use_cache else None}
        return CausalLMOutputWithPast(logits=logits, **kept)

    def prepare(self) -> Self:
        """Compile the graphs now, not when each is first called; returns the model itself."""
        for phase in PHASES:
            self._runner(phase)
        return self

    def _calls(
        self, cache: ExportedCache, past: int, whole: int
    ) -> Iterator[tuple[Phase, int, int]]:
        """Which graph reads which tokens, so that there are ``whole`` of them in the cache.

        The prefill begins with the first token: many that are added are read once more with those
        before them, few go one at a time.
        """
        new, most = whole - past, self.manifest.max_tokens - 1
        if new > 1 and self.manifest.programs["prefill"].least <= whole <= GAIN * new:
            cache.reset()
            past = min(whole, most)
            yield "prefill", 0, past
        elif new > 1 and past:
            warn_once(
                f"{new} tokens are added one at a time to an exported cache of {past}, since the "
                "prefill begins with the first token"
            )
        for position in range(past, whole):
            yield "decode", position, position + 1

    def _runner(self, phase: Phase) -> Runner:
        if phase not in self._runners:
            self._runners[phase] = runner(
                self.folder, self.manifest, phase, self._weights, self._inner
            )
        return self._runners[phase]

    def _run(
        self, phase: Phase, cache: ExportedCache, ids: Tensor, position: int, rows: Tensor,
        mask: Tensor | None,
    ) -> Tensor:  # fmt: skip
        # Compiled code reads tokens as if they lay one after another, whatever the strides.
        inputs = [ids.contiguous(), torch.tensor([position]), rows]
        inputs += [] if mask is None else [mask]
        return self._runner(phase)(cache.states, inputs)

    def _check(self, input_ids: Tensor, past: int, mask: Tensor | None) -> None:
        batch, most = self.manifest.batch, self.manifest.max_tokens
        if input_ids.dim() != 2 or input_ids.shape[0] != batch or input_ids.shape[1] == 0:
            raise ValueError(
                f"input_ids are {list(input_ids.shape)}: allowed is [{batch}, tokens], the batch "
                "size that was exported"
            )
        if past + input_ids.shape[1] > most:
            raise ValueError(
                f"{past + input_ids.shape[1]} tokens do not fit: allowed are {most}, the capacity "
                "that was exported"
            )
        if mask is not None and not self._masked and (mask.dim() != 2 or not bool(mask.all())):
            raise ValueError(
                "attention_mask has zeros: allowed is none of them with graphs for a batch of 1"
            )

    def _mask(self, mask: Tensor | None, count: int) -> Tensor | None:
        """The mask [B, max_tokens] that the graphs take, if they take one."""
        if not self._masked:
            return None
        whole = torch.ones(self.manifest.batch, self.manifest.max_tokens, dtype=torch.int64)
        if mask is not None:
            allowed = (self.manifest.batch, count)
            if mask.shape != allowed:
                raise ValueError(f"attention_mask is {tuple(mask.shape)}: allowed is {allowed}")
            whole[:, :count] = mask
        return whole


# For transformers' pipelines, which take models of classes that are registered.
AutoModelForCausalLM.register(ExportedConfig, ExportedModel)


def _config(folder: Path) -> PreTrainedConfig:
    """The model's config; a bare one for a model that has none."""
    if (folder / "config.json").is_file():
        return AutoConfig.from_pretrained(folder)  # type: ignore[no-any-return]
    return ExportedConfig()
