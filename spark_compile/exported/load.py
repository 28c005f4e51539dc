"""``load``: what ``export`` wrote, as an object that generates."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from .decoder import ExportError
from .folder import check_files, read_manifest

if TYPE_CHECKING:
    from .model import ExportedModel


def load(folder: str | Path, *, inner: str = "inductor") -> ExportedModel:
    """Load what ``export`` wrote.

    No code of the model is run, and nothing is unpickled; but graphs and packages are programs:
    load folders of people whom you trust.

    Args:
        folder: that of the manifest.
        inner: "inductor" compiles the graphs at their first call, unless there is a package of
            AOTInductor beside them, which is then run; "eager" runs them operator by operator.

    Raises:
        ExportError: the folder is of another version, or a file in it is missing, altered or not
            what an export writes.
    """
    if inner not in ("inductor", "eager"):
        raise ExportError(f"inner is {inner!r}: allowed is 'inductor' or 'eager'")
    path = Path(folder)
    manifest = read_manifest(path)
    check_files(path, manifest)
    from .model import ExportedModel  # transformers, which takes a second to import

    model = ExportedModel(path, manifest, inner)
    model.eval()  # type: ignore[no-untyped-call]
    return model
