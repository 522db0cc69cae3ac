"""Texts of others on a terminal: labels, file names and captions are shown, never obeyed."""

import re

_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def visible(text: str) -> str:
    """The text with control characters, but for tabs and line breaks, as their escapes: a label may hold what clears the screen."""
    return _CONTROLS.sub(lambda match: match[0].encode("unicode_escape").decode(), text)
