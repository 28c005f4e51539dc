"""Where the cache is, and who must not be able to write there."""

from __future__ import annotations

import os
import pwd
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest

from spark_compile.kernels.cache_dir import cache_dir, check_private, private_folder


def nobody(*_: object) -> None:
    raise KeyError("uid not found")


@pytest.fixture
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The path of a cache that is not there yet."""
    monkeypatch.setenv("SPARK_COMPILE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def give_away(monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], None]:
    """Makes a file or folder belong to another user."""

    def give(path: Path) -> None:
        if os.geteuid():
            owner = os.geteuid()
            monkeypatch.setattr(os, "geteuid", lambda: owner + 1)
        else:
            os.chown(path, 12345, -1, follow_symlinks=False)

    return give


def test_without_a_home_it_is_among_the_temporary_files(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SPARK_COMPILE_CACHE", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", nobody)
    assert cache_dir() == Path(tempfile.gettempdir()) / f"spark-compile-{os.getuid()}"


def test_the_home_of_nobody_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPARK_COMPILE_CACHE", "~no-such-user/cache")
    with pytest.raises(OSError, match="SPARK_COMPILE_CACHE is '~no-such-user/cache': there is no"):
        cache_dir()


def test_a_private_folder_is_for_its_user_alone(cache: Path) -> None:
    previous = os.umask(0)
    try:
        folder = private_folder("cpu")
    finally:
        os.umask(previous)
    assert folder == cache / "cpu"
    assert [path.stat().st_mode & 0o777 for path in (cache, folder)] == [0o700, 0o700]
    assert private_folder("cpu") == folder


def test_a_link_to_a_folder_of_the_user_is_followed(cache: Path, tmp_path: Path) -> None:
    (tmp_path / "scratch disk").mkdir(mode=0o700)
    cache.symlink_to(tmp_path / "scratch disk")
    assert private_folder("cpu") == tmp_path / "scratch disk" / "cpu"


@pytest.mark.parametrize("part", [".", "cpu"])
def test_a_folder_of_another_user_is_refused(
    cache: Path, part: str, give_away: Callable[[Path], None]
) -> None:
    private_folder("cpu")
    give_away(cache / part)
    with pytest.raises(PermissionError, match=r"belongs to user .* allowed is"):
        private_folder("cpu")


@pytest.mark.parametrize(
    ("part", "mode", "allowed"),
    [
        ("cpu", 0o755, True),
        ("cpu", 0o770, False),
        ("cpu", 0o702, False),
        ("cpu", 0o1777, False),
        (".", 0o770, False),
        (".", 0o777, False),
        (".", 0o1777, True),
        ("..", 0o777, False),
        ("..", 0o1777, True),
        ("..", 0o775, True),
    ],
)
def test_who_may_write_where(cache: Path, part: str, mode: int, allowed: bool) -> None:
    private_folder("cpu")
    (cache / part).chmod(mode)
    if allowed:
        private_folder("cpu")
    else:
        with pytest.raises(PermissionError, match=f"has mode {mode:04o}: others can write it"):
            private_folder("cpu")


def test_what_is_run_is_a_file_of_the_user(
    tmp_path: Path, give_away: Callable[[Path], None]
) -> None:
    file, link, pipe = (tmp_path / name for name in ("file", "link", "pipe"))
    file.touch(mode=0o644)
    check_private(file)
    link.symlink_to(file)
    os.mkfifo(pipe)
    for path in (link, pipe):
        with pytest.raises(PermissionError, match="is neither a file nor a folder"):
            check_private(path)
    file.chmod(0o664)
    with pytest.raises(PermissionError, match="has mode 0664"):
        check_private(file)
    file.chmod(0o600)
    give_away(file)
    with pytest.raises(PermissionError, match="belongs to user"):
        check_private(file)
