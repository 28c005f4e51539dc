"""Where the compiled CPU kernels are kept, and what is done where they cannot be."""

from __future__ import annotations

import errno
import hashlib
import os
import pwd
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest
from fake_compiler import FAKE, compilations, ended, files, obtain


def test_two_processes_build_once(folder: Path, fake: Path) -> None:
    fake.write_text(FAKE.replace("sleep 0", "sleep 2"))
    code = (
        "from spark_compile.kernels.cpu.build import library\n"
        "with library('plain') as path: print(path, path.read_text())"
    )
    command, environment = [sys.executable, "-c", code], {**os.environ, "CXX": str(fake)}
    both = [
        subprocess.Popen(command, env=environment, stdout=-1, stderr=-1, text=True)
        for _ in range(2)
    ]
    (first, first_log), (second, second_log) = (process.communicate() for process in both)
    assert first == second
    assert first.strip().endswith(".so the library")
    assert (first_log + second_log).count("building the CPU kernels (plain), once") == 1


def test_a_library_is_kept_for_its_user_alone(folder: Path, fake: Path) -> None:
    (path, kept), (again, _) = obtain(), obtain()
    assert path == again
    assert kept
    assert path.stat().st_mode & 0o777 == 0o600
    assert (path.parent, path.parent.stat().st_mode & 0o777) == (folder / "cpu", 0o700)
    assert path.stem.endswith(hashlib.sha256(b"the library").hexdigest())
    assert compilations(fake) == 1


def test_a_damaged_library_is_built_again(folder: Path, fake: Path) -> None:
    path, _ = obtain()
    path.write_text("the lib")
    assert obtain() == (path, True)
    assert path.read_text() == "the library"
    assert files(folder) == [path]
    assert compilations(fake) == 2


@pytest.mark.parametrize("what", ["library", "lock", "folder"])
@pytest.mark.parametrize("how", ["writable", "foreign", "link"])
def test_what_others_could_have_planted_is_not_loaded(
    folder: Path, fake: Path, what: str, how: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path, _ = obtain()
    lock = next(iter(folder.rglob("*.lock")), path.with_name(f"{path.stem[:-65]}.lock"))
    target = {"library": path, "lock": lock, "folder": path.parent}[what]
    if what == "lock":  # it is used for building alone
        path.unlink()
        lock.touch(mode=0o600)
    if how == "writable":
        target.chmod(0o777)
    elif how == "foreign":
        if os.geteuid():
            pytest.skip("only root gives files away")
        os.chown(target, 12345, -1)
    else:
        target.rename(tmp_path / "elsewhere")
        target.symlink_to(tmp_path / "elsewhere")
    with pytest.warns(RuntimeWarning, match=f"cannot be kept.*: .*{target.name} (has|is|belongs)"):
        own, kept = obtain()
    assert own != path
    assert not kept


def test_a_cache_that_cannot_be_made_is_a_warning(
    fake: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    for cache, why in (
        (tmp_path / "file", "File exists"),
        (tmp_path / "file" / "below", "Not a directory"),
        (tmp_path / ("long" * 100), "File name too long"),
        (Path("~no-such-user"), "there is no such home folder"),
    ):
        monkeypatch.setenv("SPARK_COMPILE_CACHE", str(cache))
        with pytest.warns(RuntimeWarning, match=f"cannot be kept.*{why}"):
            assert not obtain()[1]


@pytest.mark.parametrize("call", ["replace", "open", "mkdir"])
def test_a_full_or_read_only_disk_is_a_warning(
    folder: Path, fake: Path, call: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = getattr(os, call)

    def full(path: object, *args: Any, **options: Any) -> Any:
        if str(path).startswith(str(folder)):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(path, *args, **options)

    monkeypatch.setattr(os, call, full)
    with pytest.warns(RuntimeWarning, match="cannot be kept.*No space left on device"):
        assert not obtain()[1]
    assert compilations(fake) == 1
    assert files(folder) == []


def test_an_interrupted_build_leaves_nothing(folder: Path, fake: Path, tmp_path: Path) -> None:
    child, temporary = folder / "child", tmp_path / "temporary"
    temporary.mkdir()
    fake.write_text(FAKE.replace("sleep 0", f'sleep 600 & echo $! > "{child}"; wait'))
    code = (
        "import signal\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # may be off in the background
        "from spark_compile.kernels import cpu\n"
        "cpu.load()"
    )
    environment = {**os.environ, "CXX": str(fake), "TMPDIR": str(temporary)}
    command = [sys.executable, "-W", "always::ResourceWarning", "-c", code]
    process = subprocess.Popen(command, env=environment, stderr=-1, text=True)
    while not (child.exists() and child.read_text()):
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    said = process.communicate(timeout=20)[1]
    assert "KeyboardInterrupt" in said
    assert "still running" not in said
    assert ended(int(child.read_text()))
    assert files(folder) == [child]
    assert not any(temporary.iterdir())
    fake.write_text(FAKE)
    assert obtain()[1]


@pytest.mark.parametrize("name", ["with space", "quotes ' \"", "-o", "*[a]", "\udcff"])
def test_a_cache_may_have_any_name(
    fake: Path, name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("SPARK_COMPILE_CACHE", str(tmp_path / name))
    assert obtain() == obtain()
    assert compilations(fake) == 1


def test_a_user_without_home_or_name_has_a_cache(
    fake: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def nobody(*_: object) -> None:
        raise KeyError("uid not found")

    for variable in ("SPARK_COMPILE_CACHE", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", nobody)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    path, kept = obtain()
    assert kept
    assert path.parents[1] == tmp_path / f"spark-compile-{os.getuid()}"
    assert files(tmp_path) == [path]
