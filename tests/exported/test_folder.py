"""What is checked before anything in an exported folder is loaded."""

from __future__ import annotations

import json
import pickle
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import spark_compile
from spark_compile.cli import app
from spark_compile.exported.decoder import ExportError
from spark_compile.exported.folder import sha256


@pytest.fixture
def copy(folder: Path, tmp_path: Path) -> Path:
    return shutil.copytree(folder, tmp_path / "copy")


def _refused(folder: Path, message: str) -> None:
    with pytest.raises(ExportError, match=message):
        spark_compile.load(folder)


def _manifest(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    path = folder / "manifest.json"
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


def _resealed(folder: Path, name: str) -> None:
    _manifest(folder, lambda data: data["files"].update({name: sha256(folder / name)}))


@pytest.mark.parametrize("field", ["schema", "layout"])
def test_other_versions(copy: Path, field: str) -> None:
    _manifest(copy, lambda data: data.update({field: 999}))
    _refused(copy, f"has {field} 999: allowed is .*; export again")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: data.pop("states"), "KeyError: 'states'"),
        (lambda data: data.update(more=1), "unexpected keyword argument 'more'"),
        (lambda data: data["programs"].pop("decode"), "allowed is prefill and decode"),
        (lambda data: data["states"][0].update(dtype="load"), "dtype is 'load'"),
        (lambda data: data["files"].pop("decode.pt2"), "decode.pt2 has no checksum"),
        (lambda data: data["report"].clear(), "KeyError: 'graphs'"),
    ],
)
def test_damaged_manifests(
    copy: Path, change: Callable[[dict[str, Any]], Any], message: str
) -> None:
    _manifest(copy, change)
    _refused(copy, message)


def test_no_manifest(tmp_path: Path) -> None:
    _refused(tmp_path, "has no readable manifest.json")


@pytest.mark.parametrize("name", ["decode.pt2", "model.safetensors", "config.json", "report.html"])
def test_altered_and_missing_files(copy: Path, name: str) -> None:
    with (copy / name).open("ab") as file:
        file.write(b" ")
    _refused(copy, f"{name} is not what was exported")
    (copy / name).unlink()
    _refused(copy, f"{name} is missing")


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "a/b", "..", ".hidden"])
def test_names_stay_in_the_folder(copy: Path, name: str) -> None:
    _manifest(copy, lambda data: data["files"].update({name: "0" * 64}))
    _refused(copy, "names a file .*: allowed are plain names")


def test_links_are_not_followed(copy: Path, tmp_path: Path) -> None:
    (copy / "config.json").rename(tmp_path / "elsewhere.json")
    (copy / "config.json").symlink_to(tmp_path / "elsewhere.json")
    _refused(copy, "config.json is missing, or no plain file")


class _Planted:
    ran = False

    def __reduce__(self) -> Any:
        return setattr, (_Planted, "ran", True)


@pytest.mark.parametrize(
    "member", ["data/sample_inputs/model.pt", "data/weights/weight_0", "extra"]
)
def test_nothing_is_unpickled(copy: Path, member: str) -> None:
    path = copy / "decode.pt2"
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    members[f"decode/{member}"] = pickle.dumps(_Planted())
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    _resealed(copy, "decode.pt2")
    _refused(copy, "which no export writes")
    assert not _Planted.ran


def test_inspect_prints_the_table_and_json(folder: Path) -> None:
    runner = CliRunner()
    result = runner.invoke(app, ["inspect", str(folder)], env={"COLUMNS": "200"})
    assert result.exit_code == 0
    for text in ("prefill", "decode", "rewritten", "200 tokens, batch 1", "decode.pt2"):
        assert text in result.output
    found = runner.invoke(app, ["inspect", str(folder), "--json"])
    assert json.loads(found.output)["max_tokens"] == 200


def test_inspect_refuses_in_one_line(copy: Path) -> None:
    (copy / "decode.pt2").unlink()
    result = CliRunner().invoke(app, ["inspect", str(copy)])
    assert result.exit_code == 2
    assert result.output.count("\n") == 1
    assert "decode.pt2 is missing" in result.output
