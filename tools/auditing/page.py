"""One self-contained page of an audit: opens from file://, asks the network for nothing.

    AuditResult ──> page.html (jinja2, escaped) + plotly.js + the result as JSON + thumbnails of the worst samples

Whatever the page shows of numbers is the JSON of `--json`: the sliders choose a point of the grid. Labels, paths and messages are
untrusted: the template escapes them, and the script writes them as text alone.
"""

import base64
import io
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

import msgspec

from boxcar.pipelines import storage
from boxcar.pipelines.audit.portrait import Example
from boxcar.pipelines.images.image_file import load_image
from boxcar.pipelines.turns.lint import ABOUT
from boxcar.schemas.errors import ConfigError, ImageError
from boxcar.schemas.manifest import Finding
from boxcar.tools.auditing.grid import MORE_BLUR
from boxcar.tools.auditing.result import AuditResult
from boxcar.tools.auditing.tables import headline
from boxcar.tools.plain import visible

THUMBNAIL_PX = 360
JPEG_QUALITY = 78


@dataclass(frozen=True)
class Thumbnail:
    """A worst sample with its picture."""

    example: Example
    picture: str
    """A data: URI; "" where the picture cannot be shown."""
    why_not: str


def write_page(path: Path, result: AuditResult) -> None:
    """Write the page. Raises ConfigError where plotly or jinja2 are missing, BoxcarError where the folder cannot be written."""
    try:
        import jinja2  # noqa: PLC0415  (extras)
        import plotly.offline  # noqa: PLC0415
    except ImportError as error:
        raise ConfigError("--html", found=f"no {error.name}", expected="plotly and jinja2", fix="pip install 'boxcar-vl[audit]'") from error
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["plain"] = visible
    environment.filters["count"] = lambda number: f"{number:,}"
    template = environment.from_string(files("boxcar.tools.auditing").joinpath("page.html").read_text(encoding="utf-8"))
    thumbnails = {
        one.family: {"longest": _thumbnails(one.longest, result), "smallest": _thumbnails(one.smallest, result)} for one in result.families
    }
    text = template.render(
        result=result,
        headlines={one.family: headline(one) for one in result.families},
        thumbnails=thumbnails,
        rules=_rules(result),
        about=ABOUT,
        more_blur=f"{MORE_BLUR:.0%}",
        data=_as_script(msgspec.json.encode(result)),
        plotly=plotly.offline.get_plotlyjs(),
    )
    with storage.atomic_write(path) as stream:
        stream.write(text.encode())


def _as_script(data: bytes) -> str:
    """JSON that may stand inside <script>: no "<" of a label ends the element, no line separator ends the line."""
    text = data.decode()
    for sign in "<>&\u2028\u2029":
        text = text.replace(sign, f"\\u{ord(sign):04x}")
    return text


def _rules(result: AuditResult) -> dict[str, Finding]:
    own = result.families[0].counts.rules.get("under_one_token")
    rules = {**result.rules, **({"under_one_token": own} if own is not None else {})}
    return dict(sorted(rules.items(), key=lambda item: -item[1].found))


def _thumbnails(examples: list[Example], result: AuditResult) -> list[Thumbnail]:
    shown = []
    for example in examples:
        picture, why_not = "", ""
        if result.sizes_trusted:
            why_not = "sizes were trusted: no image was opened"
        elif not example.path:
            why_not = "no image, or one that is embedded in shards"
        else:
            try:
                picture = _data_uri(storage.join(result.images_root, example.path))
            except ImageError as error:
                why_not = str(error)
        shown.append(Thumbnail(example, picture, why_not))
    return shown


def _data_uri(path: str) -> str:
    image = load_image(path)
    image.thumbnail((THUMBNAIL_PX, THUMBNAIL_PX))
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=JPEG_QUALITY)
    return f"data:image/jpeg;base64,{base64.b64encode(stream.getvalue()).decode()}"
