"""Options that are one text, or texts by patterns of layers, of which the first match counts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from fnmatch import fnmatchcase

from .report import wrong_option

Formats = str | Mapping[str, str] | tuple[tuple[str, str], ...] | None


def text_for(formats: Formats, layer: str) -> str | None:
    """The text of the first pattern that a layer matches."""
    return next((text for pattern, text in _pairs(formats) if fnmatchcase(layer, pattern)), None)


def checked(name: str, formats: Formats, what: str, read: Callable[[str], None]) -> Formats:
    """The same as a value that can be hashed, every text read once.

    Args:
        name: of the option.
        what: a text is.
        read: raises TypeError or ValueError for a text that is wrong.

    Raises:
        OptionError: a text is wrong, or it is none.
    """
    try:
        pairs = _pairs(formats)
        for _, text in pairs:
            read(text)
    except (TypeError, ValueError) as error:
        raise wrong_option(name, formats, f"{what}, or texts by layer: {error}") from error
    return formats if formats is None or isinstance(formats, str) else pairs


def _pairs(formats: Formats) -> tuple[tuple[str, str], ...]:
    """Patterns of layers and the texts for them."""
    if formats is None or isinstance(formats, str):
        return () if formats is None else (("*", formats),)
    pairs = formats.items() if isinstance(formats, Mapping) else formats
    return tuple((str(pattern), str(text)) for pattern, text in pairs)
