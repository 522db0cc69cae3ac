"""Boxcar: annotations in, a grounded vision-language model out.

The functions for notebooks and other people's trainers. Each is imported when it is first used, so that `import boxcar` is instant.

    boxcar.load(shards)                    shards as a map-style dataset of samples
    boxcar.convert(...)                    annotations -> shards
    boxcar.audit(...)                      what a data set costs, what a cutoff or a resolution would lose
    boxcar.tokens(family, width, height)   what an image costs
    boxcar.parse(text, family, size)       a model's reply -> boxes in pixels of the original image
    boxcar.score(truth, predicted)         box metrics with intervals

The command `boxcar` does the rest: `boxcar --help`.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from boxcar.schemas.errors import BoxcarError
    from boxcar.tools.api.boxes import parse, score, tokens
    from boxcar.tools.api.runs import audit, convert
    from boxcar.tools.api.samples import load

__all__ = ["BoxcarError", "audit", "convert", "load", "parse", "score", "tokens"]

_MODULES = {
    "BoxcarError": "boxcar.schemas.errors",
    "audit": "boxcar.tools.api.runs",
    "convert": "boxcar.tools.api.runs",
    "load": "boxcar.tools.api.samples",
    "parse": "boxcar.tools.api.boxes",
    "score": "boxcar.tools.api.boxes",
    "tokens": "boxcar.tools.api.boxes",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'boxcar' has no attribute {name!r}")
    value = getattr(import_module(_MODULES[name]), name)
    globals()[name] = value  # the next use finds it at once
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
