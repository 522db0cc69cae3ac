"""`boxcar diff A B`: what differs between two conversions, two audits, or one of each: contracts, counts, tokens."""

from dataclasses import dataclass
from pathlib import Path

import msgspec

from boxcar.schemas import manifest as manifests
from boxcar.schemas.contract import FrameContract
from boxcar.schemas.errors import ShardError
from boxcar.schemas.manifest import MANIFEST_NAME, Counts
from boxcar.tools.auditing.result import RESULT_NAME, loads

_NOT_COUNTED = ("difficulty_histograms", "total_tokens_histogram", "visual_tokens_histogram")


@dataclass(frozen=True)
class Side:
    """One of the two: contract and counts by family."""

    name: str
    kind: str
    """manifest or audit."""
    families: dict[str, tuple[FrameContract, dict[str, object], Counts]]
    """Family -> (contract, settings, counts)."""


@dataclass(frozen=True)
class Difference:
    """A line of the answer."""

    what: str
    first: object
    second: object

    def as_dict(self) -> dict[str, object]:
        return {"what": self.what, "first": self.first, "second": self.second}

    def __str__(self) -> str:
        change = ""
        if isinstance(self.first, int) and isinstance(self.second, int) and not isinstance(self.first, bool):
            change = f"  ({self.second - self.first:+,})"
        return f"{self.what}: {_short(self.first)} -> {_short(self.second)}{change}"


def _short(value: object) -> str:
    text = f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
    return text if len(text) <= 100 else f"{text[:97]}..."


def load_side(where: str) -> Side:
    """A folder of shards or of an audit, or one of their files. Raises ShardError."""
    path = Path(where)
    if path.is_dir():
        names = [name for name in (MANIFEST_NAME, RESULT_NAME) if (path / name).is_file()]
        if not names:
            raise ShardError(where, found=f"neither {MANIFEST_NAME} nor {RESULT_NAME}", expected="a folder of shards, or of an audit")
        path = path / names[0]
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ShardError(where, found=str(error.strerror or error), expected="a manifest or an audit") from error
    if _format_of(data) == manifests.FORMAT:
        manifest = manifests.loads(data, str(path))
        settings = {key: manifest.settings.get(key) for key in ("cutoff_len", "over_length", "shrink_images", "image_storage")}
        return Side(where, "manifest", {manifest.contract.family: (manifest.contract, settings, manifest.counts)})
    audit = loads(data, str(path))
    families = {}
    for one in audit.families:
        settings = {"cutoff_len": one.cutoff_len, "over_length": one.over_length, "shrink_images": one.shrink_images}
        families[one.family] = (one.contract, settings, one.counts)
    return Side(where, "audit", families)


def _format_of(data: bytes) -> object:
    try:
        head = msgspec.json.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return None  # whoever reads it says what is wrong
    return head.get("format") if isinstance(head, dict) else None


def differences(first: Side, second: Side) -> list[Difference]:
    """Everything that differs, contracts first. Families are compared by name, or where each side has but one."""
    if len(first.families) == len(second.families) == 1:
        ((name, mine),), ((_, theirs),) = first.families.items(), second.families.items()
        return _of_family("" if name in second.families else f"{name} -> {next(iter(second.families))}: ", mine, theirs)
    found = [Difference("families", name, "not there") for name in first.families if name not in second.families]
    found += [Difference("families", "not there", name) for name in second.families if name not in first.families]
    for name, mine in first.families.items():
        if name in second.families:
            found += _of_family(f"{name}: ", mine, second.families[name])
    return found


def _of_family(
    prefix: str, mine: tuple[FrameContract, dict[str, object], Counts], theirs: tuple[FrameContract, dict[str, object], Counts]
) -> list[Difference]:
    found = []
    for name in FrameContract.__struct_fields__:
        a, b = getattr(mine[0], name), getattr(theirs[0], name)
        if name != "tokenizer" and a != b:
            found.append(Difference(f"{prefix}contract.{name}", msgspec.to_builtins(a), msgspec.to_builtins(b)))
    for key in mine[1].keys() & theirs[1].keys():
        if mine[1][key] != theirs[1][key]:
            found.append(Difference(f"{prefix}{key}", mine[1][key], theirs[1][key]))
    flat_a, flat_b = _flat(mine[2]), _flat(theirs[2])
    found += [
        Difference(f"{prefix}{key}", flat_a.get(key, 0), flat_b.get(key, 0))
        for key in sorted(flat_a.keys() | flat_b.keys())
        if flat_a.get(key, 0) != flat_b.get(key, 0)
    ]
    return found


def _flat(counts: Counts) -> dict[str, int]:
    """Every count by its path; examples and histograms left out, but for the length that the longest row has."""
    flat: dict[str, int] = {}
    for name in Counts.__struct_fields__:
        value = getattr(counts, name)
        if name in _NOT_COUNTED:
            continue
        if isinstance(value, int):
            flat[name] = value
            continue
        for key, entry in value.items():
            if isinstance(entry, int):
                flat[f"{name}.{key}"] = entry
            else:
                fields = msgspec.to_builtins(entry)
                flat |= {f"{name}.{key}.{field}": number for field, number in fields.items() if isinstance(number, int) and number}
    flat["longest row, tokens"] = max(map(int, counts.total_tokens_histogram), default=0)
    flat["total_tokens"] = counts.visual_tokens + counts.text_tokens
    return flat
