"""A folder of exported graphs: its manifest, and the checks before anything in it is loaded."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
import shutil
import tempfile
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..kernels.layout import VERSION
from ..report import GraphReport, Refusal, Report, Site
from .decoder import ExportError

SCHEMA = 1
"""Version of the folder's form."""
MANIFEST = "manifest.json"
WEIGHTS = "model.safetensors"
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")
_MEMBERS = re.compile(
    r"(models/\w+\.json|data/(weights/\w+_weights|constants/\w+_constants)_config\.json"
    r"|data/constants/tensor_\d+"
    r"|data/sample_inputs/\w+\.pt|archive_format|archive_version|byteorder|\.data/\w+|version)"
)


@dataclass(frozen=True)
class StateTensor:
    """A tensor that the graphs change, zero before the first token."""

    name: str
    shape: tuple[int, ...]
    dtype: str

    def empty(self) -> Tensor:
        """The tensor before the first token."""
        return torch.zeros(self.shape, dtype=_dtype(self.dtype))


@dataclass(frozen=True)
class ProgramFile:
    """One of the graphs: called with its weights, then all states, then its inputs, flat."""

    file: str
    weights: tuple[str, ...]
    """Names in the file of the weights."""
    inputs: tuple[str, ...]
    """What changes from call to call: of input_ids, position, rows and attention_mask."""
    least: int
    """The fewest tokens that it takes."""
    package: str | None = None
    """File of the AOTInductor package of this graph, if there is one."""


def constant_names(weights: Iterable[str]) -> dict[str, str]:
    """What the weights of a program, which are in its order, are called in its package."""
    return {name: f"w{index}" for index, name in enumerate(weights)}


@dataclass(frozen=True)
class Machine:
    """What a machine has to be to run packages; torch has to be the version of the manifest."""

    system: str
    """As ``sys.platform``."""
    processor: str
    """As ``platform.machine()``."""
    cpu: tuple[str, ...]
    """Instruction sets, as torch.cpu.get_capabilities calls them."""
    kernels: str
    """Level of the operators' library, as SPARK_COMPILE_CPU has it."""


@dataclass(frozen=True)
class Manifest:
    """What ``manifest.json`` says."""

    versions: Mapping[str, str]
    """Of the packages that wrote the folder."""
    model: str
    """The class."""
    dtype: str
    """Of most weights, without "torch."."""
    max_tokens: int
    batch: int
    portable: bool
    """Whether the programs have ATen operators alone."""
    options: Mapping[str, Any]
    """Those of the backend that were given."""
    dense_token_bytes: int
    """Key and value bytes of one token of a batch entry in a dense cache, all layers."""
    stored_token_bytes: int
    """The same in a page."""
    state_bytes: int
    """All states together, whatever they hold."""
    dense_bytes: int
    """A dense cache for as many tokens."""
    special_tokens: Mapping[str, Any]
    """"bos" and "eos": ids, as the model's generation config has them."""
    states: tuple[StateTensor, ...]
    programs: Mapping[str, ProgramFile]
    report: Mapping[str, Any]
    """The match report of each graph, as ``Report.as_dict`` has it."""
    verified: Mapping[str, Any] | None
    """What the comparison with the eager model gave, if there was one."""
    files: Mapping[str, str]
    """SHA-256 of each other file of the folder."""
    machine: Machine | None = None
    """What the packages need, if there are some."""

    def save(self, folder: Path) -> None:
        """Write ``manifest.json``."""
        data = {"schema": SCHEMA, "layout": VERSION, **dataclasses.asdict(self)}
        (folder / MANIFEST).write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")

    def reported(self) -> Report:
        """The match report of the graphs."""
        graphs = []
        for graph in self.report["graphs"]:
            sites = tuple(_site(site) for site in graph["sites"])
            graphs.append(GraphReport(graph["phase"], sites, graph["left_alone"]))
        return Report(graphs)


def _site(data: Mapping[str, Any]) -> Site:
    refusal = data["refusal"] and Refusal(**data["refusal"])
    known = {field.name for field in dataclasses.fields(Site)}
    values = {name: value for name, value in data.items() if name in known}
    return Site(**{**values, "refusal": refusal, "formats": tuple(data["formats"])})


def _dtype(name: str) -> torch.dtype:
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"dtype is {name!r}: allowed is one of torch")
    return dtype


def read_manifest(folder: Path) -> Manifest:
    """Read the manifest of a folder.

    Raises:
        ExportError: there is none, it is of another version, or something in it is wrong.
    """
    path = folder / MANIFEST
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ExportError(f"{folder} has no readable {MANIFEST}: {error}") from error
    for name, version in (("schema", SCHEMA), ("layout", VERSION)):
        found = data.pop(name, None) if isinstance(data, dict) else None
        if found != version:
            raise ExportError(f"{path} has {name} {found!r}: allowed is {version}; export again")
    try:
        states = tuple(
            StateTensor(str(s["name"]), tuple(map(int, s["shape"])), str(s["dtype"]))
            for s in data.pop("states")
        )
        programs = {
            phase: ProgramFile(
                str(p["file"]),
                tuple(p["weights"]),
                tuple(p["inputs"]),
                int(p["least"]),
                p.get("package"),
            )
            for phase, p in data.pop("programs").items()
        }
        if (machine := data.pop("machine", None)) is not None:
            machine = Machine(**{**machine, "cpu": tuple(map(str, machine["cpu"]))})
        manifest = Manifest(**data, states=states, programs=programs, machine=machine)
        manifest.reported()
        for name in (manifest.dtype, *(state.dtype for state in states)):
            _dtype(name)
        if programs.keys() != {"prefill", "decode"}:
            raise ValueError(f"programs are {sorted(programs)}: allowed is prefill and decode")
        named = [p.file for p in programs.values()] + [
            p.package for p in programs.values() if p.package
        ]
        for name in (WEIGHTS, *named):
            if name not in manifest.files:
                raise ValueError(f"{name} has no checksum")
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ExportError(f"{path} cannot be read: {type(error).__name__}: {error}") from error
    return manifest


def check_files(folder: Path, manifest: Manifest) -> None:
    """Check that the folder has the files that were written, and that loading them runs no pickle.

    Raises:
        ExportError: a file is missing, altered, outside of the folder, or has something pickled.
    """
    for name, expected in manifest.files.items():
        if not _NAME.fullmatch(name) or ".." in name:
            raise ExportError(f"{folder / MANIFEST} names a file {name!r}: allowed are plain names")
        path = folder / name
        if path.is_symlink() or not path.is_file():
            raise ExportError(f"{path} is missing, or no plain file")
        if sha256(path) != expected:
            raise ExportError(f"{path} is not what was exported: its SHA-256 differs")
    for program in manifest.programs.values():
        _check_archive(folder / program.file)


def _check_archive(path: Path) -> None:
    """Raise unless a program consists of a graph and, where it is portable, of small constants that
    are written as plain bytes: torch unpickles some other members.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            for name in archive.namelist():
                member = name.partition("/")[2]
                if not _MEMBERS.fullmatch(member):
                    raise ExportError(f"{path} has a member {name!r}, which no export writes")
                if member.startswith("data/sample_inputs") and archive.getinfo(name).file_size:
                    raise ExportError(f"{path} has pickled sample inputs, which no export writes")
                if member.endswith("_config.json"):
                    own = json.loads(archive.read(name))["config"].values()
                    if not all("/constants/" in member and _is_plain(each) for each in own):
                        raise ExportError(f"{path} has tensors of its own, which no export writes")
    except (zipfile.BadZipFile, KeyError, ValueError, AttributeError) as error:
        raise ExportError(f"{path} is no program of torch.export: {error}") from error


def _is_plain(constant: Mapping[str, Any]) -> bool:
    """Whether torch reads a constant from plain bytes."""
    name = str(constant["path_name"])
    return constant["use_pickle"] is False and re.fullmatch(r"tensor_\d+", name) is not None


def sha256(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def written_beside(folder: Path, *, overwrite: bool) -> Iterator[Path]:
    """A new folder that takes the place of ``folder`` at the end, and is removed after an error.

    Raises:
        ExportError: there is something that must not be replaced.
    """
    folder = folder.absolute()
    if folder.exists() and not _replaceable(folder, overwrite):
        allowed = "a new folder" if overwrite else "a new folder, or overwrite"
        raise ExportError(f"{folder} exists and is not empty: allowed is {allowed}")
    folder.parent.mkdir(parents=True, exist_ok=True)
    beside = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    beside.chmod(0o755)
    try:
        yield beside
        if folder.exists():
            old = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
            folder.rename(old / "old")
            beside.rename(folder)
            shutil.rmtree(old)
        else:
            beside.rename(folder)
    except BaseException:
        shutil.rmtree(beside, ignore_errors=True)
        raise


def _replaceable(folder: Path, overwrite: bool) -> bool:
    if not folder.is_dir() or folder.is_symlink():
        return False
    return not any(folder.iterdir()) or (overwrite and (folder / MANIFEST).is_file())
