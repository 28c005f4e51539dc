"""Packages of AOTInductor beside the programs: which weights they get, and when they run."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner
from zoo import tiny

import spark_compile
from spark_compile import SparkWarning
from spark_compile.cli import app
from spark_compile.exported import aot, commands, running
from spark_compile.exported.decoder import ExportError
from spark_compile.exported.folder import MANIFEST, Manifest
from spark_compile.exported.model import ExportedCache, ExportedModel

CAPACITY, PROMPT, NEW = 200, 70, 40
OPTIONS = {"key_ratio": 0.5, "sink_tokens": 0}


class FakePackage:
    """Runs the program that was to be compiled, with the constants that it is given."""

    programs: dict[str, Any] = {}  # noqa: RUF012 - by the file's name

    def __init__(self, path: Path) -> None:
        self._module = self.programs[path.name].module()
        self.loader = self

    def get_constant_fqns(self) -> list[str]:
        return [name for name, _ in self._module.named_buffers() if name.startswith("w")]

    def load_constants(self, constants: dict[str, Tensor], **how: bool) -> None:
        assert how == {"check_full_update": True, "user_managed": True}
        for name, value in constants.items():
            self._module.register_buffer(name, value)

    def boxed_run(self, flat: list[Tensor]) -> list[Tensor]:
        given = self._module._in_spec.child(0).child(0)
        count = given.num_children
        states = dict(zip(given.context, flat[:count], strict=True))
        return [self._module(states, *flat[count:])]


def _fake_compile(program: Any, *, package_path: str, inductor_configs: dict[str, Any]) -> None:
    assert inductor_configs["aot_inductor.package_constants_in_so"] is False
    for name, buffer in program.state_dict.items():
        program.state_dict[name] = torch.zeros_like(buffer)  # no package may rely on those
    FakePackage.programs[Path(package_path).name] = program
    Path(package_path).write_bytes(b"native code")


@contextmanager
def _fake_library(level: str, *, standalone: bool) -> Iterator[Path]:
    assert standalone
    assert level in aot.supported()
    yield Path(__file__)


@pytest.fixture(scope="module")
def faked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder whose packages are fakes."""
    folder = tmp_path_factory.mktemp("fake") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch._inductor, "aoti_compile_and_package", _fake_compile)
        patch.setattr(aot, "library", _fake_library)
        patch.setattr(aot, "_load", FakePackage)
        spark_compile.export(
            tiny("llama", "sdpa"), folder, max_tokens=CAPACITY, aot=True, check=False, **OPTIONS
        )
    return folder


@pytest.fixture
def fake(faked: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The same, which can be loaded."""
    monkeypatch.setattr(aot, "_load", FakePackage)
    return faked


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with compiled packages."""
    folder = tmp_path_factory.mktemp("real") / "out"
    model = tiny("llama", "sdpa")
    spark_compile.export(model, folder, max_tokens=CAPACITY, aot=True, check=False, **OPTIONS)
    return folder


def _prompt() -> Tensor:
    return torch.randint(2, 90, (1, PROMPT), generator=torch.Generator().manual_seed(3))


def _generated(model: ExportedModel) -> list[int]:
    """The most probable tokens, whether or not they are the end."""
    model.generation_config.eos_token_id = None
    ids = model.generate(_prompt(), do_sample=False, max_new_tokens=NEW)
    return ids[0].tolist()  # type: ignore[no-any-return]


def test_packages_get_the_weights_of_the_file(fake: Path) -> None:
    loaded = spark_compile.load(fake)
    assert _generated(loaded) == _generated(spark_compile.load(fake, inner="eager"))
    packages = list(loaded._runners.values())
    assert [type(package) for package in packages] == [aot.Package, aot.Package]
    for package, program in zip(packages, loaded.manifest.programs.values(), strict=True):
        for index, name in enumerate(program.weights):
            assert package._constants[f"w{index}"] is loaded._weights[name]


def test_the_manifest_says_what_packages_need(fake: Path) -> None:
    manifest = spark_compile.load(fake).manifest
    assert manifest.machine == aot.this_machine(aot.level())
    assert aot.misfit(manifest) is None
    assert {"prefill.aoti.pt2", "decode.aoti.pt2", "libspark.so"} <= manifest.files.keys()
    (fake / "libspark.so").write_bytes(b"else")
    with pytest.raises(ExportError, match=r"libspark\.so is not what was exported"):
        spark_compile.load(fake)
    (fake / "libspark.so").write_bytes(Path(__file__).read_bytes())


def _other_torch(manifest: Manifest) -> Manifest:
    return dataclasses.replace(manifest, versions={**manifest.versions, "torch": "2.10.7"})


def _other_cpu(manifest: Manifest) -> Manifest:
    machine = aot.this_machine("plain")
    return dataclasses.replace(
        manifest, machine=dataclasses.replace(machine, cpu=(*machine.cpu, "avx4096"))
    )


def _other_processor(manifest: Manifest) -> Manifest:
    machine = dataclasses.replace(aot.this_machine("plain"), processor="vax")
    return dataclasses.replace(manifest, machine=machine)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        pytest.param(
            _other_torch,
            f"torch is '{aot.version('torch')}', allowed is '2.10.7'",
            marks=pytest.mark.slow,
        ),
        (_other_cpu, "this CPU has no avx4096"),
        pytest.param(_other_processor, "allowed is 'vax'", marks=pytest.mark.slow),
    ],
)
def test_elsewhere_graphs_are_compiled(
    changed: Any, message: str, fake: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled = []

    def compiler(module: Any, _inputs: Any) -> Any:
        compiled.append(module)
        return module

    monkeypatch.setattr(running, "lookup_backend", {"inductor": compiler}.__getitem__)
    loaded = spark_compile.load(fake)
    loaded.manifest = changed(loaded.manifest)
    with pytest.warns(SparkWarning) as given:
        ids = _generated(loaded)
    assert [message in str(warning.message) for warning in given] == [True]
    assert len(compiled) == 2
    assert ids == _generated(spark_compile.load(fake, inner="eager"))


def test_a_package_that_cannot_be_loaded_is_compiled(
    fake: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(_path: Path) -> None:
        raise RuntimeError("GLIBC_9 not found")

    monkeypatch.setattr(aot, "_load", fails)
    monkeypatch.setattr(running, "lookup_backend", lambda _inner: lambda module, _inputs: module)
    with pytest.warns(SparkWarning, match="packages cannot run here, .*GLIBC_9 not found"):
        _generated(spark_compile.load(fake))


def test_packages_need_native_kernels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPARK_COMPILE_CPU", "off")
    with pytest.raises(ExportError, match="SPARK_COMPILE_CPU is 'off': allowed with aot is "):
        spark_compile.export(
            tiny("llama", "sdpa"), tmp_path / "out", max_tokens=CAPACITY, aot=True, check=False
        )
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("words", "wanted"), [(["--aot"], True), ([], False)])
def test_the_command_line_asks_for_packages(
    words: list[str], wanted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def stopped(*_args: Any, **options: Any) -> None:
        asked.append(options["aot"])
        raise ExportError("enough")

    monkeypatch.setattr(commands, "_loaded", lambda *_args: (None, None))
    monkeypatch.setattr("spark_compile.exported.export.export", stopped)
    result = CliRunner().invoke(app, ["module:factory", "-o", "out", *words])
    assert asked == [wanted]
    assert "enough" in result.output


@pytest.mark.slow
def test_packages_generate_what_the_programs_do(real: Path) -> None:
    loaded = spark_compile.load(real)
    assert _generated(loaded) == _generated(spark_compile.load(real, inner="eager"))
    assert {type(package) for package in loaded._runners.values()} == {aot.Package}
    assert (real / "decode.aoti.pt2").stat().st_size < 4e6
    # Both packages read the loaded weights themselves.
    loaded._weights["lm_head.weight"].zero_()
    assert not loaded(_prompt()).logits.any()
    cache = ExportedCache(loaded.manifest)
    assert not loaded(_prompt()[:, :1], cache=cache).logits.any()


@pytest.mark.slow
def test_states_are_changed_in_place(real: Path) -> None:
    with zipfile.ZipFile(real / "decode.aoti.pt2") as archive:
        name = next(name for name in archive.namelist() if name.endswith(".wrapper.json"))
        calls = [node["node"] for node in json.loads(archive.read(name))["nodes"]]
    manifest = json.loads((real / MANIFEST).read_text())
    assert [call["target"] for call in calls] == ["spark::step"] * (len(manifest["states"]) // 4)
    wanted = {"key_pages", "key_head", "value_pages", "value_head"}
    given = [
        argument["arg"]["as_tensor"]["name"]
        for call in calls
        for argument in call["inputs"]
        if argument["name"] in wanted
    ]
    # Arguments of the graph itself, each once, and no copies of them.
    assert len({name for name in given if name.startswith("arg")}) == len(manifest["states"])


@pytest.mark.slow
def test_a_package_checks_where_a_prefill_begins(real: Path) -> None:
    loaded = spark_compile.load(real)
    cache = ExportedCache(loaded.manifest)
    with pytest.raises(RuntimeError, match="must write them to position 0"):
        loaded._run("prefill", cache, _prompt(), 3, torch.tensor([PROMPT - 1]), None)
    assert not any(state.any() for state in cache.states)


@pytest.mark.slow
def test_the_cpp_example_generates_the_same(real: Path, tmp_path: Path) -> None:
    if missing := [tool for tool in ("cmake", "c++") if shutil.which(tool) is None]:
        pytest.skip(f"there is no {' and no '.join(missing)}")
    source = Path(__file__).resolve().parents[2] / "examples" / "cpp"
    torch_files = f"-DCMAKE_PREFIX_PATH={torch.utils.cmake_prefix_path}"
    for command in (
        ["cmake", "-S", str(source), "-B", str(tmp_path), torch_files],
        ["cmake", "--build", str(tmp_path)],
    ):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    prompt = [str(token) for token in _prompt()[0].tolist()]
    run = [str(tmp_path / "generate"), str(real)]
    done = subprocess.run(
        [*run, str(NEW), *prompt], capture_output=True, text=True, check=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    wanted = _generated(spark_compile.load(real, inner="eager"))[PROMPT:]
    assert [int(token) for token in done.stdout.split()] == wanted
    many = subprocess.run([*run, "999", *prompt], capture_output=True, text=True, check=False)
    assert (many.returncode, many.stderr) == (
        1, f"so many tokens do not fit: allowed are {CAPACITY}\n",
    )  # fmt: skip
