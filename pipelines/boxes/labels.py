"""Labels and phrases with line breaks or other control characters: which there are, and the same records with clean ones."""

import re
from collections.abc import Sequence

import msgspec
import numpy as np
import numpy.typing as npt

from boxcar.schemas.record import Record, Region

_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")
"""Unicode's category Cc, and its separators of lines and paragraphs."""


def clean(text: str) -> str:
    """Without control characters; white space collapsed where there was one. "traffic\\nlight" -> "traffic light"."""
    return " ".join(_CONTROL.sub(" ", text).split()) if _CONTROL.search(text) else text


def dirty_names(records: Sequence[Record]) -> dict[str, str]:
    """Label or phrase with control characters -> the clean one, over the regions and vocabularies of some records."""
    names: set[str] = set()
    for record in records:
        for region in record.regions:
            names.add(region.label)
            names.update(region.phrases)
        names.update(record.absent)
        names.update(record.not_exhaustive)
    for vocabulary in {id(record.vocabulary): record.vocabulary for record in records}.values():  # most records share one
        names.update(vocabulary)
    return {name: cleaned for name in names if (cleaned := clean(name)) != name}


def has_control_characters(labels: Sequence[str]) -> npt.NDArray[np.bool_]:
    """(N,) which of N labels do."""
    dirty = {label for label in set(labels) if clean(label) != label}
    return np.fromiter((label in dirty for label in labels), np.bool_, len(labels)) if dirty else np.zeros(len(labels), np.bool_)


def renamed(record: Record, names: dict[str, str]) -> Record:
    """The record with each of these names replaced in its regions and vocabularies. The same object where it holds none."""
    regions = tuple(_renamed_region(region, names) for region in record.regions)
    changed = {
        name: new for name in ("absent", "vocabulary", "not_exhaustive") if (new := _replaced(getattr(record, name), names)) is not None
    }
    if all(new is old for new, old in zip(regions, record.regions, strict=True)) and not changed:
        return record
    return msgspec.structs.replace(record, regions=regions, **changed)


def without_phrases(record: Record, names: dict[str, str]) -> Record:
    """The record without these phrases and vocabulary entries; labels of regions stay."""
    regions = tuple(
        msgspec.structs.replace(region, phrases=tuple(phrase for phrase in region.phrases if phrase not in names))
        if not names.keys().isdisjoint(region.phrases)
        else region
        for region in record.regions
    )
    lists = {name: tuple(entry for entry in getattr(record, name) if entry not in names) for name in ("absent", "vocabulary")}
    return msgspec.structs.replace(record, regions=regions, **lists)


def _renamed_region(region: Region, names: dict[str, str]) -> Region:
    if region.label not in names and names.keys().isdisjoint(region.phrases):
        return region
    phrases = _replaced(region.phrases, names)
    return msgspec.structs.replace(
        region, label=names.get(region.label, region.label), phrases=region.phrases if phrases is None else phrases
    )


def _replaced(entries: tuple[str, ...], names: dict[str, str]) -> tuple[str, ...] | None:
    """The entries with clean names, each once; None where nothing changes."""
    if names.keys().isdisjoint(entries):
        return None
    return tuple(dict.fromkeys(names.get(entry, entry) for entry in entries))
