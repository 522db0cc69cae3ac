"""`boxcar tokens`: what an image costs, and the lists of families and formats."""

import re
import sys
from collections.abc import Iterable, Sequence
from typing import Annotated, Any, TextIO

import msgspec
import numpy as np

from boxcar.pipelines.families.catalog import FAMILIES, find_family
from boxcar.pipelines.families.family import Family
from boxcar.pipelines.families.patches import PixelLimits, ResizedSizes
from boxcar.pipelines.readers.catalog import READERS
from boxcar.pipelines.tokens.frame import resolve_limits
from boxcar.schemas.errors import ConfigError
from boxcar.tools.tables import Table, result_console

_SIZE = re.compile(r"(\d{1,7})[xX*](\d{1,7})")
LINES_AT_ONCE = 65_536


def _arguments(arguments: Sequence[str]) -> tuple[list[tuple[int, int]], dict[str, int]]:
    sizes: list[tuple[int, int]] = []
    limits: dict[str, int] = {}
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if equals and key in ("image_max_pixels", "image_min_pixels") and value.isdigit() and int(value) > 0:
            limits[key] = int(value)
        elif match := _SIZE.fullmatch(argument):
            sizes.append((int(match[1]), int(match[2])))
        else:
            raise ConfigError(
                "command line", found=repr(argument), expected="WIDTHxHEIGHT such as 1920x1080, image_max_pixels=N or image_min_pixels=N"
            )
    return sizes, limits


def _limits(family: Family, limits: dict[str, int]) -> PixelLimits:
    return resolve_limits(family, limits.get("image_min_pixels"), limits.get("image_max_pixels"))


def _refusal(width: int, height: int) -> str:
    if min(width, height) <= 0:
        return f"{width}x{height}: found a side without pixels, expected at least 1x1"
    return f"{width}x{height}: found an aspect ratio of {max(width, height) / min(width, height):.2f}, expected at most 200"


def print_table(family_name: str, arguments: Sequence[str]) -> None:
    """A line for each size. Raises ConfigError for an argument that is none, or where no size is given."""
    family = find_family(family_name)
    sizes, given = _arguments(arguments)
    if not sizes:
        raise ConfigError("command line", found="no size", expected="WIDTHxHEIGHT such as 1920x1080")
    limits = _limits(family, given)
    result = _resize(family, sizes, limits.min_pixels, limits.max_pixels)
    pixels = f"{limits.min_pixels:,}..{limits.max_pixels:,} px"
    table = Table(title=f"{family.title}: {family.resize.description}, {pixels}", title_justify="left")
    for column in ("image", "resized", "grid t,h,w", "visual tokens", "with boundaries", "positions"):
        table.add_column(column, justify="right")
    refusals = []
    for row, (width, height) in enumerate(sizes):
        if result.refused[row]:
            refusals.append(_refusal(width, height))
            continue
        count = int(result.visual_tokens[row])
        table.add_row(
            f"{width}x{height}",
            f"{result.width[row]}x{result.height[row]}",
            f"1,{result.grid_h[row]},{result.grid_w[row]}",
            f"{count:,}",
            f"{count + family.chat.boundary_tokens:,}",
            f"{result.position_span[row]:,}",
        )
    if table.row_count:
        result_console().print(table)
    if refusals:
        raise ConfigError(family.name, found="; ".join(refusals), expected="images that the family takes")


def _resize(family: Family, sizes: Sequence[tuple[int, int]], low: Any, high: Any) -> ResizedSizes:
    columns = np.array(sizes, np.int64).reshape(-1, 2)
    return family.resize(columns[:, 0], columns[:, 1], low, high)


_Pixels = Annotated[int, msgspec.Meta(gt=0)]


class _Request(msgspec.Struct):
    width: int
    height: int
    min_pixels: _Pixels | None = None
    max_pixels: _Pixels | None = None


def print_json_lines(family_name: str, arguments: Sequence[str], source: Iterable[bytes], target: TextIO) -> None:
    """A line out for each line in that is not blank, in order: the sizes, or the error. A bad line never stops the rest."""
    family = find_family(family_name)
    sizes, given = _arguments(arguments)
    if sizes:
        raise ConfigError("command line", found="sizes together with --json", expected="sizes on standard input")
    _limits(family, given)
    pending: list[bytes] = []
    for line in source:
        if line.strip():
            pending.append(line)
        if len(pending) == LINES_AT_ONCE:
            _answer(family, given, pending, target)
            pending = []
    _answer(family, given, pending, target)


def _answer(family: Family, given: dict[str, int], lines: Sequence[bytes], target: TextIO) -> None:
    decoder = msgspec.json.Decoder(_Request)
    usual = _limits(family, given)
    requests: list[_Request | str] = []
    limits: list[PixelLimits] = []
    for line in lines:
        try:
            request = decoder.decode(line)
            limits.append(_limits_of(request, family, given, usual))
            requests.append(request)
        except (msgspec.DecodeError, ConfigError, UnicodeDecodeError) as error:
            requests.append(str(error))
    good = [request for request in requests if isinstance(request, _Request)]
    low = np.array([limit.min_pixels for limit in limits], np.int64)
    high = np.array([limit.max_pixels for limit in limits], np.int64)
    result = _resize(family, [(request.width, request.height) for request in good], low, high)
    row = 0
    for entry in requests:
        if isinstance(entry, str):
            answer: dict[str, object] = {"error": entry}
        else:
            answer = _sizes(result, row, entry)
            row += 1
        target.write(msgspec.json.encode(answer).decode() + "\n")


def _limits_of(request: _Request, family: Family, given: dict[str, int], usual: PixelLimits) -> PixelLimits:
    """The limits of one line: its own, else those of the command."""
    if max(request.width, request.height) > 10**7:
        raise ConfigError("line", found=f"{request.width}x{request.height}", expected="at most 10,000,000 pixels a side")
    own = {"image_min_pixels": request.min_pixels, "image_max_pixels": request.max_pixels}
    changes = {name: value for name, value in own.items() if value is not None}
    return _limits(family, {**given, **changes}) if changes else usual


def _sizes(result: ResizedSizes, row: int, request: _Request) -> dict[str, object]:
    if result.refused[row]:
        return {"error": _refusal(request.width, request.height)}
    return {
        "resized_width": int(result.width[row]),
        "resized_height": int(result.height[row]),
        "grid_thw": [1, int(result.grid_h[row]), int(result.grid_w[row])],
        "visual_tokens": int(result.visual_tokens[row]),
    }


def print_families() -> None:
    """A line for each family."""
    table = Table(title="Model families (family: in workflows.yaml)", title_justify="left")
    for column in ("family", "models", "resize", "boxes", "published pixels"):
        table.add_column(column, overflow="fold")
    for family in FAMILIES.values():
        limits = family.resize.published_limits
        pixels = f"{limits.min_pixels:,}..{limits.max_pixels:,}" if family.resize.limits_matter else "one size"
        table.add_row(family.name, family.title, family.resize.description, family.grid.description, pixels)
    result_console().print(table)


def print_formats() -> None:
    """A line for each annotation format."""
    table = Table(title="Annotation formats (reader: in workflows.yaml)", title_justify="left")
    for column in ("reader", "format", "keys beside the common ones"):
        table.add_column(column, overflow="fold")
    common = frozenset.intersection(*(reader.uses for reader in READERS.values()))
    for name, reader in READERS.items():
        about = (type(reader).__doc__ or sys.modules[type(reader).__module__].__doc__ or "").strip().partition("\n")[0]
        table.add_row(name, about, ", ".join(sorted(reader.uses - common)) or "none")
    result_console().print(table)
    result_console().print(f"common keys: {', '.join(sorted(common))}", soft_wrap=True)
