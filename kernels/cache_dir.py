"""The folder of what is made or downloaded once: native kernels, tuning results, demo models."""

from __future__ import annotations

import os
import stat
import tempfile
from pathlib import Path

from platformdirs import user_cache_path

_BY_GROUP, _BY_OTHERS = stat.S_IWGRP, stat.S_IWOTH


def cache_dir() -> Path:
    """$SPARK_COMPILE_CACHE, else spark-compile in the user's folder of caches.

    A user without a home folder has one of their own among the temporary files. Nothing is made.

    Raises:
        OSError: the variable begins with the home folder of nobody, or there is no folder at all.
    """
    own = os.environ.get("SPARK_COMPILE_CACHE")
    try:
        if own:
            return Path(own).expanduser()
        path = user_cache_path("spark-compile", appauthor=False)
    except RuntimeError as error:
        if own:
            raise OSError(
                f"SPARK_COMPILE_CACHE is {own!r}: there is no such home folder"
            ) from error
        path = Path()
    # Without a home folder platformdirs raises, or (before version 4.10) leaves "~" as it is.
    if path.is_absolute():
        return path
    return Path(tempfile.gettempdir()) / f"spark-compile-{os.getuid()}"


def private_folder(name: str) -> Path:
    """The folder of this name in the cache, for code that is going to be run.

    It is made with mode 0700 if it is not there. Its path is without links.

    Raises:
        OSError: it cannot be made.
        PermissionError: another user could change what is in it.
    """
    cache = Path(os.path.realpath(cache_dir()))
    folder = cache / name
    cache.mkdir(mode=0o700, parents=True, exist_ok=True)
    # Who may rename a folder can put another one in its place. In a folder that is sticky, as /tmp
    # is, only its owner may. Many systems have a group for each user, which may write in the home.
    for path in cache.parents:
        _check_writers(path, _BY_OTHERS, unless_sticky=True)
    _check_owner(cache)
    _check_writers(cache, _BY_GROUP | _BY_OTHERS, unless_sticky=True)
    folder.mkdir(mode=0o700, exist_ok=True)
    check_private(folder)
    return folder


def check_private(path: Path) -> None:
    """Nobody but this user and root can write a file or folder; links are not followed.

    Raises:
        OSError: it is not there.
        PermissionError: it belongs to another user, others can write it, or it is a link or a pipe.
    """
    mode = path.lstat().st_mode
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        raise PermissionError(f"{path} is neither a file nor a folder")
    _check_owner(path)
    _check_writers(path, _BY_GROUP | _BY_OTHERS)


def _check_owner(path: Path) -> None:
    owner, user = path.lstat().st_uid, os.geteuid()
    if owner not in (user, 0):
        raise PermissionError(f"{path} belongs to user {owner}: allowed is {user} or root")


def _check_writers(path: Path, writers: int, *, unless_sticky: bool = False) -> None:
    mode = path.lstat().st_mode
    if mode & writers and not (unless_sticky and mode & stat.S_ISVTX):
        raise PermissionError(
            f"{path} has mode {stat.S_IMODE(mode):04o}: others can write it (chmod go-w ends that)"
        )
