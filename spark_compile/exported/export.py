"""``export``: a decoder becomes a folder of graphs that run without its Python code."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from ..config import SparkConfig
from ..plan import Plan, loaded
from ..report import Report, SparkError, warn_once
from .aot import native_level, package_file, write_packages
from .decoder import PHASES, Decoder, ExportError, decoder_of
from .folder import WEIGHTS, Machine, Manifest, ProgramFile, StateTensor, sha256, written_beside
from .graph import Graph
from .picture import report_page
from .tracing import trace
from .verify import TEXT, verify

PAGE = "report.html"
MOST_TOKENS = 8192
"""Capacity of the caches, if the model does not allow less."""


def export(
    model: nn.Module,
    folder: str | Path,
    *,
    max_tokens: int | None = None,
    batch: int = 1,
    plan: Plan | str | Path | None = None,
    tokenizer: Any = None,
    tokens: Tensor | None = None,
    check: bool = True,
    overwrite: bool = False,
    portable: bool = False,
    aot: bool = False,
    told: Callable[[str], None] = lambda step: None,
    seen: Callable[[Mapping[str, Graph]], object] = lambda graphs: None,
    **options: Any,
) -> Manifest:
    """Write a decoder's prefill and decode as programs of torch.export, with the cache compressed.

    The folder gets ``prefill.pt2`` and ``decode.pt2``, the weights once, a manifest, and what the
    model has of config, generation config and tokenizer. ``spark_compile.load`` runs it.

    Args:
        model: a causal language model of transformers, or a module that is called with tokens
            [B, L] and positions [L], returns logits [B, L, V] and has its caches in buffers that
            are zero at first and have room for ``max_tokens``; on the CPU. It is put into eval mode
            and otherwise not changed.
        folder: to write; it is complete or not there at all.
        max_tokens: capacity of the caches; if not given, 8,192, or what the model's config allows.
        batch: number of sequences. With more than one, the programs take an attention mask.
        plan: formats by layer, or the path of a plan.
        tokenizer: of transformers, saved beside the model.
        tokens: ids of text to check the graphs with, [1, S]; if not given, a text of ours, or
            random ones without a tokenizer.
        check: compare the graphs with the model before the folder is put in its place.
        overwrite: replace a folder that an export wrote.
        portable: write programs of ATen operators alone, which plain torch loads and runs without
            this library, more slowly. What evicts tokens is not portable.
        aot: also compile the programs, for machines like this one: AOTInductor's packages
            ``prefill.aoti.pt2`` and ``decode.aoti.pt2``, which ``load`` then runs, and the
            operators that they call, ``libspark.so``, for C++.
        told: called with a word on each step.
        seen: called with the graph of each phase, before anything is written.
        options: fields of :class:`SparkConfig`.

    Raises:
        OptionError: an option or the plan is wrong.
        ExportError: the model cannot be exported, the check failed, or the folder cannot be
            replaced. It is a SparkError.
        SparkError: under ``strict=True``, a site is refused; else it stays dense, with a warning.
        OSError: the folder cannot be written.
    """
    if plan is not None:
        options = loaded(plan).options_for(model, options)
    config = SparkConfig.from_options(options)
    max_tokens = _capacity(model, max_tokens)
    if not isinstance(batch, int) or batch < 1:
        raise ExportError(f"batch is {batch!r}: allowed is a number from 1 on")
    if aot:
        native_level()  # raises now rather than after the tracing
    with written_beside(Path(folder), overwrite=overwrite) as beside:
        decoder = decoder_of(model, max_tokens, batch)
        graphs = _graphs(decoder, config, max_tokens, batch, told)
        seen(graphs)
        verified = None
        if check:
            told("checking the graphs against the model")
            text = _text(decoder, tokenizer, batch) if tokens is None else tokens
            verified = verify(decoder, graphs, text, max_tokens)
        for phase, graph in graphs.items():
            told(f"writing the {phase}")
            torch.export.save(graph.program(portable=portable), beside / f"{phase}.pt2")
        machine = write_packages(graphs, beside, told) if aot else None
        told("writing the weights")
        weights = {name: w for graph in graphs.values() for name, w in graph.weights.items()}
        save_file({name: _own(weight) for name, weight in weights.items()}, beside / WEIGHTS)
        (beside / WEIGHTS).chmod(0o644)  # as the other files
        _save_beside(model, tokenizer, beside)
        facts = _facts(model, graphs, max_tokens, batch)
        page = report_page(type(model).__name__, list(graphs.values()), None, facts)
        (beside / PAGE).write_text(page, encoding="utf-8")
        manifest = _manifest(
            model,
            graphs,
            options,
            max_tokens,
            batch,
            verified,
            machine,
            beside,
            portable=portable,
        )
        manifest.save(beside)
    return manifest


def _capacity(model: nn.Module, max_tokens: int | None) -> int:
    config: Any = getattr(model, "config", None)
    if hasattr(config, "get_text_config"):
        config = config.get_text_config()
    allowed = getattr(config, "max_position_embeddings", None)
    most = allowed if isinstance(allowed, int) and allowed > 0 else None
    if max_tokens is None:
        return min(MOST_TOKENS, most or MOST_TOKENS)
    if not isinstance(max_tokens, int) or not 4 <= max_tokens <= (most or max_tokens):
        limit = "a number from 4 on" if most is None else f"4 to {most}, the model's positions"
        raise ExportError(f"max_tokens is {max_tokens!r}: allowed is {limit}")
    return max_tokens


def _graphs(
    decoder: Decoder, config: SparkConfig, max_tokens: int, batch: int, told: Callable[[str], None]
) -> dict[str, Graph]:
    """Both phases with the same states; dense ones where they cannot be had compressed."""

    def traced(chosen: SparkConfig | None) -> dict[str, Graph]:
        graphs: dict[str, Graph] = {}
        for phase in PHASES:
            told(f"tracing the {phase}")
            graphs[phase] = trace(decoder, phase, chosen, max_tokens, batch)
        return graphs

    reason = None
    try:
        graphs = traced(config)
    except ExportError as error:
        reason = str(error)
    else:
        shapes = [{n: tuple(s.shape) for n, s in g.states.items()} for g in graphs.values()]
        if shapes[0] != shapes[1]:
            only = sorted(shapes[0].keys() ^ shapes[1].keys())
            reason = f"one graph stores what the other does not: {', '.join(only[:4])}"
        refused = [graph.report for graph in graphs.values() if graph.report.refusals()]
        if refused and config.strict:
            raise SparkError(f"spark refused sites: {refused[0].refusals()}")
        for report in refused:
            warn_once(f"the exported {report.phase} keeps sites dense: {report.refusals()}")
    if reason is not None:
        if config.strict:
            raise ExportError(reason)
        dense = traced(None)  # raises if it is the model that cannot be traced
        warn_once(f"the exported graphs are dense: {reason}")
        return dense
    return graphs


def _text(decoder: Decoder, tokenizer: Any, batch: int) -> Tensor:
    """Tokens to check the graphs with, [1, S]."""
    if tokenizer is not None:
        return tokenizer(TEXT, return_tensors="pt").input_ids  # type: ignore[no-any-return]
    vocabulary = decoder.reference(torch.zeros(batch, 1, dtype=torch.int64)).shape[-1]
    return torch.randint(0, vocabulary, (1, 160), generator=torch.Generator().manual_seed(0))


def _own(tensor: Tensor) -> Tensor:
    """A tensor whose storage is its own, as safetensors wants it."""
    tensor = tensor.cpu().contiguous()
    own = tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
    return tensor if own else tensor.clone()


def _save_beside(model: nn.Module, tokenizer: Any, folder: Path) -> None:
    """What transformers has of a model besides weights."""
    parts: tuple[Any, ...] = (
        getattr(model, "config", None),
        getattr(model, "generation_config", None),
        tokenizer,
    )
    for part in parts:
        if hasattr(part, "save_pretrained"):
            part.save_pretrained(folder)


def _manifest(
    model: nn.Module, graphs: Mapping[str, Graph], options: Mapping[str, Any], max_tokens: int,
    batch: int, verified: Mapping[str, Any] | None, machine: Machine | None, folder: Path, *,
    portable: bool,
) -> Manifest:  # fmt: skip
    decode = graphs["decode"]
    sites = decode.report.sites
    dense = sum(site.dense_token_bytes for site in sites)
    stored = sum(
        site.stored_token_bytes if site.refusal is None else site.dense_token_bytes
        for site in sites
    )
    names = _special(model)
    packages = ("spark-compile", "torch", "transformers")
    return Manifest(
        versions={name: version(name) for name in packages},
        model=type(model).__name__,
        dtype=str(_dtype(graphs["decode"])).removeprefix("torch."),
        max_tokens=max_tokens,
        batch=batch,
        portable=portable,
        options=dict(options),
        dense_token_bytes=dense,
        stored_token_bytes=stored,
        state_bytes=sum(s.numel() * s.element_size() for s in decode.states.values()),
        dense_bytes=dense * max_tokens * batch,
        special_tokens=names,
        states=tuple(
            StateTensor(name, tuple(map(int, s.shape)), str(s.dtype).removeprefix("torch."))
            for name, s in decode.states.items()
        ),
        programs={
            phase: ProgramFile(
                f"{phase}.pt2",
                tuple(graph.weights),
                tuple(graph.dynamic),
                graph.least,
                None if machine is None else package_file(phase),
            )
            for phase, graph in graphs.items()
        },
        report=Report([graph.report for graph in graphs.values()]).as_dict(),
        verified=verified,
        files={path.name: sha256(path) for path in sorted(folder.iterdir())},
        machine=machine,
    )


def _facts(
    model: nn.Module, graphs: Mapping[str, Graph], max_tokens: int, batch: int
) -> dict[str, str]:
    """What the page says above the pictures."""
    sites = graphs["decode"].report.sites
    formats = dict.fromkeys(
        " and ".join(dict.fromkeys(site.formats)) for site in sites if site.refusal is None
    )
    return {
        "Weights": str(_dtype(graphs["decode"])).removeprefix("torch."),
        "Cache": f"{max_tokens:,} tokens, batch {batch}",
        "Formats": "; ".join(formats) or "dense",
        "Written by": f"spark-compile {version('spark-compile')}, torch {version('torch')}",
    }


def _dtype(graph: Graph) -> torch.dtype:
    """That of the largest weight."""
    return max(graph.weights.values(), key=Tensor.numel, default=torch.empty(0)).dtype


def _special(model: nn.Module) -> dict[str, Any]:
    config = getattr(model, "generation_config", None) or getattr(model, "config", None)
    return {name: getattr(config, f"{name}_token_id", None) for name in ("bos", "eos")}
