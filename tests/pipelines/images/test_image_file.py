"""Headers and pixels of image files: always what Pillow says, and never another error than ImageError."""

import contextlib
import errno
import io
import os
import struct
import warnings
import zlib
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import pyarrow.fs as pafs
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps, PngImagePlugin, features

from boxcar.pipelines import storage
from boxcar.pipelines.images import headers as image_headers
from boxcar.pipelines.images.image_file import (
    MAX_IMAGE_PIXELS,
    ImageHeader,
    decode_image,
    encode_png,
    load_image,
    read_header,
    resize_image,
)
from boxcar.schemas.errors import ImageError
from tests.places import SHARED

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::RuntimeWarning")  # Pillow's, about damaged files

SHARED_DATA = SHARED / "data"
ORIENTATIONS = tuple(range(1, 9))
TURNABLE = ("jpeg", "png", "webp", "tiff", *(["avif"] if features.check("avif") else []))
REASONS = {"missing_image", "not_a_file", "empty_image", "not_an_image", "truncated_image", "image_bomb", "unreadable_image"}

# ---- making files


def photograph(width: int = 40, height: int = 24) -> Image.Image:
    """Noise over a gradient: no two rows, columns or corners are alike, and it does not compress to nothing."""
    noise = np.random.default_rng(7).integers(0, 60, (height, width, 3))
    ramp = np.linspace(0, 150, width)[None, :, None] + np.linspace(0, 45, height)[:, None, None]
    return Image.fromarray((noise + ramp).astype(np.uint8))


def saved(image: Image.Image, format_name: str, **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, format_name, **options)
    return stream.getvalue()


def exif_of(orientation: int | bytes, order: str = "<", kind: int = 3, count: int = 1, before: bytes = b"") -> bytes:
    """Raw EXIF without its prefix: entries `before`, then the orientation, as a number or as its four bytes."""
    value = orientation if isinstance(orientation, bytes) else struct.pack(order + "HH", orientation, 0)
    entry = struct.pack(order + "HHI", 0x0112, kind, count) + value
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(order + "I", 8)
    return head + struct.pack(order + "H", len(before) // 12 + 1) + before + entry + bytes(4)


def turned(format_name: str, orientation: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    options: dict[str, object] = {"lossless": True} if format_name == "webp" else {}
    return saved(photograph(), format_name, exif=exif, **options)


def app_segments(jpeg: bytes, *payloads: tuple[int, bytes]) -> bytes:
    """The JPEG with APPn segments straight behind its start."""
    segments = b"".join(bytes((0xFF, 0xE0 + number)) + struct.pack(">H", len(data) + 2) + data for number, data in payloads)
    return jpeg[:2] + segments + jpeg[2:]


def png_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def with_chunk(png: bytes, kind: bytes, data: bytes, before: bytes) -> bytes:
    at = png.index(before) - 4
    return png[:at] + png_chunk(kind, data) + png[at:]


def png_claiming(width: int, height: int) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", header) + png_chunk(b"IDAT", zlib.compress(b"")) + png_chunk(b"IEND", b"")


def jpeg_claiming(width: int, height: int) -> bytes:
    data = saved(photograph(), "jpeg")
    at = data.index(b"\xff\xc0") + 5
    return data[:at] + struct.pack(">HH", height, width) + data[at + 4 :]


def bmp_claiming(width: int, height: int) -> bytes:
    data = saved(photograph(), "bmp")
    return data[:18] + struct.pack("<ii", width, height) + data[26:]


def gif_claiming(width: int, height: int) -> bytes:
    data = saved(photograph().convert("P"), "gif")
    return data[:6] + struct.pack("<HH", width, height) + data[10:]


def webp_claiming(width: int, height: int) -> bytes:
    data = saved(photograph(), "webp", exif=exif_of(1))
    return data[:24] + (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little") + data[30:]


def tiff_claiming(width: int, height: int) -> bytes:
    data = saved(photograph(), "tiff")
    for tag, value in ((256, width), (257, height)):
        at = data.index(struct.pack("<HHI", tag, 4, 1))
        data = data[:at] + struct.pack("<HHII", tag, 4, 1, value) + data[at + 12 :]
    return data


def frames() -> list[Image.Image]:
    return [photograph(), ImageOps.mirror(photograph()), ImageOps.flip(photograph())]


def animated(format_name: str, **options: object) -> bytes:
    first, *rest = [frame.convert("P") if format_name == "gif" else frame for frame in frames()]
    return saved(first, format_name, save_all=True, append_images=rest, duration=50, **options)


def sixteen_bit(mode: str) -> bytes:
    """A 16-bit PNG, grey ("I;16") or RGB, whose high bytes are those of the photograph."""
    if mode == "I;16":
        high = np.asarray(photograph().convert("L")).astype(np.uint16)
        return saved(Image.fromarray(high * 256 + 77), "png")
    rows = b"".join(b"\0" + (row.astype(np.uint16) * 256 + 200).astype(">u2").tobytes() for row in np.asarray(photograph()))
    header = struct.pack(">IIBBBBB", 40, 24, 16, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", header) + png_chunk(b"IDAT", zlib.compress(rows)) + png_chunk(b"IEND", b"")


XMP_6 = b'<x:xmpmeta><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
JPEG_XMP_6 = b"http://ns.adobe.com/xap/1.0/\0" + XMP_6


@cache
def samples() -> dict[str, bytes]:
    """Whole files of every kind, none of them turned or animated unless its name says so."""
    image, grey, palette = photograph(), photograph().convert("L"), photograph().convert("P")
    half = image.convert("RGBA")
    half.putalpha(grey)
    jpeg, png = saved(image, "jpeg"), saved(image, "png")
    text = PngImagePlugin.PngInfo()
    text.add_text("Comment", "x" * 6000)
    return {
        "jpeg": jpeg,
        "jpeg_progressive": saved(image, "jpeg", progressive=True),
        "jpeg_grey": saved(grey, "jpeg"),
        "jpeg_cmyk": saved(image.convert("CMYK"), "jpeg"),
        "jpeg_restart": saved(image, "jpeg", restart_marker_rows=1),
        "jpeg_big_icc": saved(image, "jpeg", icc_profile=bytes(range(256)) * 800),
        "jpeg_much_metadata": app_segments(jpeg, *[(13, b"Photoshop 3.0\0" + bytes(60_000))] * 3, (1, b"Exif\0\0" + exif_of(6))),
        "jpeg_exif_late": jpeg.replace(b"\xff\xc4", app_segments(b"\xff\xd8", (1, b"Exif\0\0" + exif_of(8)))[2:] + b"\xff\xc4", 1),
        "jpeg_fill_bytes": jpeg[:2] + b"\xff\xff" + jpeg[2:],
        "jpeg_thumbnail": app_segments(jpeg, (1, b"Exif\0\0" + exif_of(3) + saved(image.resize((8, 8)), "jpeg"))),
        "png": png,
        "png_long_text": saved(image, "png", pnginfo=text),
        "png_palette": saved(palette, "png"),
        "png_grey_alpha": saved(half.convert("LA"), "png"),
        "png_rgba": saved(half, "png"),
        "png_one_bit": saved(image.convert("1"), "png"),
        "png_16bit_grey": sixteen_bit("I;16"),
        "png_16bit_rgb": sixteen_bit("RGB"),
        "png_exif_behind": with_chunk(png, b"eXIf", exif_of(6), b"IEND"),
        "png_xmp_before": with_chunk(png, b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + XMP_6, b"IDAT"),
        "png_xmp_behind": with_chunk(png, b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + XMP_6, b"IEND"),
        "png_animated": animated("png"),
        "webp_lossy": saved(image, "webp"),
        "webp_lossless": saved(image, "webp", lossless=True),
        "webp_alpha": saved(half, "webp"),
        "webp_exif": saved(image, "webp", exif=exif_of(7)),
        "webp_animated": animated("webp"),
        "gif": saved(palette, "gif"),
        "gif_grey": saved(grey, "gif"),
        "gif_animated": animated("gif"),
        "bmp": saved(image, "bmp"),
        "bmp_rgba": saved(half, "bmp"),
        "bmp_palette": saved(palette, "bmp"),
        "bmp_grey": saved(grey, "bmp"),
        "tiff": saved(image, "tiff"),
        "tiff_turned": turned("tiff", 6),
        "tiff_lzw": saved(image, "tiff", compression="tiff_lzw"),
        "tiff_deflate": saved(image, "tiff", compression="tiff_adobe_deflate"),
        "tiff_grey": saved(grey, "tiff"),
        "tiff_16bit": saved(Image.fromarray(np.asarray(grey).astype(np.uint16) * 256), "tiff"),
        "tiff_palette": saved(palette, "tiff"),
        "tiff_cmyk": saved(image.convert("CMYK"), "tiff"),
        "tiff_rgba": saved(half, "tiff"),
        "tiff_pages": saved(image, "tiff", save_all=True, append_images=frames()),
        "tiff_big": saved(image, "tiff", big_tiff=True),
        "ppm": saved(image, "ppm"),
        "ppm_16bit": b"P5 40 24 65535\n" + (np.asarray(grey).astype(np.uint16) * 256).astype(">u2").tobytes(),
    }


def write(folder: Path, data: bytes, name: str = "image") -> str:
    path = folder / name
    path.write_bytes(data)
    return str(path)


def said_by_pillow(data: bytes) -> tuple[int, int, int]:
    """(width, height) of the upright image and the orientation, 1 where it is none of 1..8."""
    with Image.open(io.BytesIO(data)) as image:
        orientation = image.getexif().get(0x0112, 1)
        orientation = int(orientation) if orientation in ORIENTATIONS else 1
        width, height = image.size
        if image.format != "TIFF" and orientation >= 5:  # Pillow's size of a TIFF is upright already
            width, height = height, width
        return width, height, orientation


def upright(header: ImageHeader) -> tuple[int, int, int]:
    return header.width, header.height, header.orientation


def reason_of(act: Callable[[], object]) -> str:
    with pytest.raises(ImageError) as caught:
        act()
    assert caught.value.reason in REASONS
    assert caught.value.found
    assert caught.value.expected
    return caught.value.reason


# ---- headers say what Pillow says


@pytest.mark.parametrize("orientation", ORIENTATIONS)
@pytest.mark.parametrize("format_name", TURNABLE)
def test_turned_images_have_the_size_and_pixels_of_the_upright_one(format_name: str, orientation: int, tmp_path: Path) -> None:
    data = turned(format_name, orientation)
    path = write(tmp_path, data)
    header = read_header(path)
    assert header.format == format_name
    assert header.orientation == orientation
    assert (header.stored_width, header.stored_height) == (40, 24)
    assert (header.width, header.height) == ((24, 40) if orientation >= 5 else (40, 24))
    with Image.open(path) as image:
        expected = ImageOps.exif_transpose(image)
    for loaded in (load_image(path), load_image(path, header), decode_image(data, "somewhere")):
        assert loaded.size == (header.width, header.height)
        assert loaded.tobytes() == expected.tobytes()


NOTES = {"cmyk": "cmyk", "16bit": "16bit", "palette": "palette", "gif": "palette", "animated": "animated"}


@pytest.mark.parametrize("name", samples())
def test_header_equals_pillow(name: str, tmp_path: Path) -> None:
    data = samples()[name]
    header = read_header(write(tmp_path, data))
    assert header == read_header(write(tmp_path, data), check_end=False)
    assert upright(header) == said_by_pillow(data)
    assert header.format == name.partition("_")[0]
    assert header.num_bytes == len(data)
    assert header.mode_note == next((note for word, note in reversed(NOTES.items()) if word in name), "")


@pytest.mark.parametrize("format_name", ["jpeg", "png", "webp", "gif", "bmp", "tiff", "ppm"])
@pytest.mark.parametrize("size_wh", [(1, 1), (1, 300), (257, 2)])
def test_small_and_narrow_images(format_name: str, size_wh: tuple[int, int], tmp_path: Path) -> None:
    path = write(tmp_path, saved(photograph(*size_wh), format_name))
    header = read_header(path)
    assert (header.width, header.height, header.format) == (*size_wh, format_name)
    assert load_image(path, header).size == size_wh


RATIONAL_6 = struct.pack("<I", 26) + bytes(4) + struct.pack("<II", 6, 1)
EXIF_CASES = {
    "big_endian": (exif_of(6, ">"), 6),
    "long": (exif_of(struct.pack("<I", 5), kind=4), 5),
    "zero": (exif_of(0), 1),
    "nine": (exif_of(9), 1),
    "huge": (exif_of(65535), 1),
    "two_values": (exif_of(struct.pack("<HH", 6, 3), count=2), 6),
    "text": (exif_of(b"6\0\0\0", kind=2, count=2), 1),
    "byte": (exif_of(b"\6\0\0\0", kind=1), 1),
    "unknown_type": (exif_of(6, kind=99), 1),
    "rational": (exif_of(RATIONAL_6, kind=5), 6),
    "after_others": (exif_of(8, before=struct.pack("<HHII", 0x0100, 4, 1, 640)), 8),
    "after_a_value_outside": (exif_of(8, before=struct.pack("<HHII", 0x010F, 2, 9, 100_000)), 1),
    "first_of_two": (exif_of(8, before=struct.pack("<HHIHH", 0x0112, 3, 1, 3, 0)), 3),
    "prefix_twice": (b"Exif\0\0" + exif_of(6), 6),
    "not_tiff": (b"garbage, not TIFF", 1),
    "cut_in_the_tag": (exif_of(6)[:18], 1),
    "directory_outside": (b"II*\0" + struct.pack("<I", 5000), 1),
    "empty": (b"", 1),
}


@pytest.mark.parametrize("case", EXIF_CASES)
def test_exif_is_read_as_pillow_reads_it(case: str, tmp_path: Path) -> None:
    exif, orientation = EXIF_CASES[case]
    data = app_segments(samples()["jpeg"], (1, b"Exif\0\0" + exif))
    header = read_header(write(tmp_path, data))
    assert header.orientation == orientation
    assert upright(header) == said_by_pillow(data)


XMP_CASES = {
    "xmp_only": ([(1, JPEG_XMP_6)], 6),
    "exif_without_the_tag": ([(1, b"Exif\0\0" + exif_of(3, kind=99)), (1, JPEG_XMP_6)], 6),
    "exif_wins": ([(1, JPEG_XMP_6), (1, b"Exif\0\0" + exif_of(3))], 3),
    "exif_in_two_segments": ([(1, b"Exif\0\0" + exif_of(7)[:15]), (1, b"Exif\0\0" + exif_of(7)[15:])], 7),
    "xmp_of_nine": ([(1, JPEG_XMP_6.replace(b"6", b"9"))], 1),
}


@pytest.mark.parametrize("case", XMP_CASES)
def test_xmp_turns_where_exif_does_not_say(case: str, tmp_path: Path) -> None:
    segments, orientation = XMP_CASES[case]
    data = app_segments(samples()["jpeg"], *segments)
    header = read_header(write(tmp_path, data))
    assert header.orientation == orientation
    assert upright(header) == said_by_pillow(data)


def test_png_orientation_in_every_place_pillow_knows(tmp_path: Path) -> None:
    png, exif = samples()["png"], exif_of(6)
    raw_profile = b"Raw profile type exif\0" + f"\nexif\n{len(exif):8}\n{exif.hex()}\n".encode()
    cases = {
        "before": with_chunk(png, b"eXIf", exif, b"IDAT"),
        "behind": with_chunk(png, b"eXIf", exif, b"IEND"),
        "profile before": with_chunk(png, b"tEXt", raw_profile, b"IDAT"),
        "profile behind": with_chunk(png, b"tEXt", raw_profile, b"IEND"),
        "looks like a chunk": with_chunk(png, b"tEXt", b"Comment\0 eXIf and more", b"IEND"),
    }
    for name, data in cases.items():
        header = read_header(write(tmp_path, data))
        assert upright(header) == said_by_pillow(data), name
        assert header.orientation == (1 if name == "looks like a chunk" else 6), name


def test_metadata_is_stepped_over_not_read() -> None:
    data = samples()["jpeg_much_metadata"]
    num_read = 0

    def read(length: int, offset: int) -> bytes:
        nonlocal num_read
        num_read += len(data[offset : offset + length])
        return data[offset : offset + length]

    facts = image_headers.parse_jpeg(image_headers.Source(read(4096, 0), read, len(data), True))
    assert (facts.width, facts.height, facts.orientation, facts.complete) == (40, 24, 6, True)
    assert num_read < 20_000 < len(data)


@pytest.mark.parametrize("folder", ["coco_mini/images", "bccd/JPEGImages"])
def test_real_photographs_equal_pillow(folder: str) -> None:
    paths = sorted((SHARED_DATA / folder).glob("*.jpg"))
    if not paths:
        pytest.skip(f"{SHARED_DATA / folder} is not on this machine")
    for path in paths:
        assert upright(read_header(str(path))) == said_by_pillow(path.read_bytes()), path.name


# ---- where files are


def test_uri_equals_path(tmp_path: Path) -> None:
    path = write(tmp_path, samples()["jpeg_exif_late"], "with blank.jpg")
    assert read_header(f"file://{path}") == read_header(path)
    assert load_image(f"file://{path}").tobytes() == load_image(path).tobytes()


@pytest.mark.parametrize("name", ["jpeg", "jpeg_much_metadata", "png_exif_behind", "gif_animated", "tiff_big", "webp_exif"])
def test_remote_equals_local(name: str, tmp_path: Path) -> None:
    uri = f"mock://bucket/{name}.image"  # Arrow's own in-memory store
    filesystem, inner = storage.resolve(uri)
    filesystem.create_dir(os.path.dirname(inner))
    with filesystem.open_output_stream(inner) as stream:
        stream.write(samples()[name])
    path = write(tmp_path, samples()[name])
    assert read_header(uri) == read_header(path)
    assert load_image(uri).tobytes() == load_image(path).tobytes()


def test_remote_refusals() -> None:
    filesystem, inner = storage.resolve("mock://bucket/folder")
    assert isinstance(filesystem, pafs.FileSystem)
    filesystem.create_dir(inner)
    assert reason_of(lambda: read_header("mock://bucket/folder")) == "not_a_file"
    assert reason_of(lambda: read_header("mock://bucket/absent.jpg")) == "missing_image"
    assert reason_of(lambda: read_header("nosuchscheme://bucket/absent.jpg")) == "unreadable_image"


@pytest.mark.parametrize("act", [read_header, load_image], ids=["header", "pixels"])
def test_places_that_hold_no_image(act: Callable[[str], object], tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    cases = {
        str(tmp_path / "absent.jpg"): "missing_image",
        write(tmp_path, b"x", "file") + "/inside.jpg": "missing_image",
        "": "missing_image",
        str(tmp_path): "not_a_file",
        f"file://{tmp_path}": "not_a_file",
        str(pipe): "not_a_file",
        write(tmp_path, b"", "empty.jpg"): "empty_image",
        write(tmp_path, b"Not found. Try again later.\n" * 50, "text.jpg"): "not_an_image",
        write(tmp_path, b"<svg xmlns='http://www.w3.org/2000/svg'/>", "drawing.svg"): "not_an_image",
        write(tmp_path, bytes(5000), "zeros.jpg"): "not_an_image",
        "nul\0byte.jpg": "unreadable_image",
        str(tmp_path / ("x" * 300)): "unreadable_image",
    }
    for path, reason in cases.items():
        assert reason_of(lambda path=path: act(path)) == reason, path  # type: ignore[misc]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_no_permission(tmp_path: Path) -> None:
    path = write(tmp_path, samples()["jpeg"])
    os.chmod(path, 0)
    assert reason_of(lambda: read_header(path)) == "unreadable_image"


def test_an_input_error_while_pillow_reads_is_not_the_images_fault(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = write(tmp_path, samples()["ppm"])
    pread, num_calls = os.pread, 0

    def failing(descriptor: int, length: int, offset: int) -> bytes:
        nonlocal num_calls
        num_calls += 1
        if num_calls > 1:
            raise OSError(errno.EIO, "Input/output error")
        return pread(descriptor, length, offset)

    monkeypatch.setattr(os, "pread", failing)
    assert reason_of(lambda: read_header(path)) == "unreadable_image"


# ---- bombs

BOMBS = {
    "png": png_claiming(100_000, 100_000),
    "png_one_row": png_claiming(MAX_IMAGE_PIXELS + 1, 1),
    "jpeg": jpeg_claiming(65_500, 65_500),
    "gif": gif_claiming(65_535, 65_535),
    "bmp": bmp_claiming(100_000, 100_000),
    "bmp_top_down": bmp_claiming(100_000, -100_000),
    "webp": webp_claiming(100_000, 100_000),
    "tiff": tiff_claiming(100_000, 100_000),
    "ppm": b"P6 100000 100000 255\n" + bytes(100),
}


@pytest.mark.parametrize("case", BOMBS)
def test_bombs_are_refused_at_every_door(case: str, tmp_path: Path) -> None:
    path = write(tmp_path, BOMBS[case])
    believed = ImageHeader("png", 8, 8, 1, "", 100)
    assert reason_of(lambda: read_header(path)) == "image_bomb"
    assert reason_of(lambda: read_header(path, check_end=False)) == "image_bomb"
    assert reason_of(lambda: load_image(path)) == "image_bomb"
    assert reason_of(lambda: load_image(path, believed)) == "image_bomb"
    assert reason_of(lambda: decode_image(BOMBS[case], "embedded")) == "image_bomb"


def test_the_largest_image_allowed_is_no_bomb(tmp_path: Path) -> None:
    path = write(tmp_path, png_claiming(MAX_IMAGE_PIXELS, 1))
    assert read_header(path, check_end=False).width == MAX_IMAGE_PIXELS


@pytest.mark.parametrize("claim", [png_claiming, jpeg_claiming, gif_claiming, bmp_claiming, tiff_claiming])
@pytest.mark.parametrize("size_wh", [(0, 5), (5, 0), (0, 0)])
def test_an_image_without_pixels_is_none(claim: Callable[[int, int], bytes], size_wh: tuple[int, int], tmp_path: Path) -> None:
    data = claim(*size_wh)
    if claim is gif_claiming:  # the screen grows to its first image: make that one empty, too
        at = data.index(b",\0\0\0\0")
        data = data[: at + 5] + struct.pack("<HH", *size_wh) + data[at + 9 :]
    path = write(tmp_path, data)
    assert reason_of(lambda: read_header(path)) == "not_an_image"
    assert reason_of(lambda: load_image(path)) == "not_an_image"


# ---- truncated and damaged files


@pytest.mark.parametrize("name", [name for name, data in samples().items() if len(data) < 10_000])
def test_no_cut_file_passes_unless_all_its_pixels_are_there(name: str, tmp_path: Path) -> None:
    """Every length near both ends, every seventh between. What stood behind the pixels may be lost with the cut: an orientation
    there is then lost without notice (exactly as in Pillow), so pixels are compared as stored."""
    data = samples()[name]
    whole = first_frame(data)
    path = tmp_path / "cut"
    for length in range(1, len(data)):
        if length % 7 and 64 < length < len(data) - 64:
            continue
        path.write_bytes(data[:length])
        header = header_or_reason(str(path), check_end=True)
        if isinstance(header, str):
            assert header in ("truncated_image", "not_an_image"), length
            continue
        assert (header.stored_width, header.stored_height) == (40, 24), length
        assert first_frame(data[:length]) == whole, length


def header_or_reason(path: str, *, check_end: bool) -> ImageHeader | str:
    """Anything but an ImageError goes through, and fails the test."""
    try:
        return read_header(path, check_end=check_end)
    except ImageError as error:
        return error.reason


def first_frame(data: bytes) -> bytes:
    with Image.open(io.BytesIO(data)) as image:
        return image.tobytes()


@pytest.mark.parametrize("name", ["jpeg", "jpeg_progressive", "png", "png_palette", "webp_lossy", "gif", "bmp", "bmp_grey", "tiff", "ppm"])
@pytest.mark.parametrize("garbage", [b"\n", bytes(3000), b"trailing garbage" * 500, b"\xff\xd8\xff\xe0 half of another"], ids=len)
def test_bytes_behind_the_end_do_no_harm(name: str, garbage: bytes, tmp_path: Path) -> None:
    path = write(tmp_path, samples()[name] + garbage)
    assert upright(read_header(path)) == (40, 24, 1)
    assert load_image(path).size == (40, 24)


@pytest.mark.parametrize("name", ["jpeg", "png", "gif", "bmp_palette", "tiff_lzw"])
def test_a_cut_file_does_not_pass_for_its_garbage(name: str, tmp_path: Path) -> None:
    data = samples()[name]
    path = write(tmp_path, data[: len(data) * 2 // 3] + b"\xff" * 40)
    assert reason_of(lambda: load_image(path)) == "truncated_image"


def test_pixels_that_do_not_decode(tmp_path: Path) -> None:
    data = samples()["png"]
    at = data.index(b"IDAT") + 40
    path = write(tmp_path, data[:at] + bytes(200) + data[at + 200 :])
    header = read_header(path)  # right length, right end: only decoding can see it
    assert reason_of(lambda: load_image(path, header)) == "truncated_image"


# What Pillow reads of a PNG behind damaged pixels depends on whether it finds its way through them; we look at the end of the file.
DAMAGEABLE = tuple(name for name in samples() if "behind" not in name and len(samples()[name]) < 10_000)
damages = st.lists(st.tuples(st.integers(0, 400), st.booleans(), st.integers(0, 255)), min_size=1, max_size=6)


@settings(max_examples=600, deadline=None)
@given(name=st.sampled_from(DAMAGEABLE), places=damages, length=st.integers(0, 10_000))
def test_damaged_headers_are_refused_or_equal_to_pillows(name: str, places: list[tuple[int, bool, int]], length: int) -> None:
    """Bytes replaced near either end, and perhaps a cut. Where Pillow reads the header, we say the same or refuse the file. Where it
    does not, we may still find a size (we check less of what we step over); then the pixels have that size or are refused, too."""
    data = bytearray(samples()[name])
    for distance, from_end, value in places:
        at = min(distance, len(data) - 1)
        data[len(data) - 1 - at if from_end else at] = value
    damaged = bytes(data if length > len(data) * 2 else data[: max(1, length)])
    with MemoryFile(damaged) as path:
        header = header_or_reason(path, check_end=False)
        if isinstance(header, str):
            assert header in ("truncated_image", "not_an_image", "image_bomb")
            return
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with contextlib.suppress(ImageError):
                assert load_image(path).size == (header.width, header.height)
            try:
                expected = said_by_pillow(damaged)
            except Exception:
                return
        assert upright(header) == expected


class MemoryFile:
    """A file without a folder: hypothesis and tmp_path do not mix."""

    def __init__(self, data: bytes) -> None:
        self._data = data

    def __enter__(self) -> str:
        self._descriptor = os.memfd_create("image")
        os.write(self._descriptor, self._data)
        return f"/proc/self/fd/{self._descriptor}"

    def __exit__(self, *_: object) -> None:
        os.close(self._descriptor)


MAGICS = (b"", *image_headers.PARSERS, b"II*\0\x08\0\0\0", b"GIF89a", b"\xff\xd8\xff\xe1", b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR")


@settings(max_examples=300, deadline=None)
@given(noise=st.binary(max_size=300), magic=st.sampled_from(MAGICS))
def test_noise_is_refused(noise: bytes, magic: bytes) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert reason_of(lambda: decode_image(magic + noise, "noise")) in REASONS - {"missing_image", "unreadable_image"}


# ---- pixels


def test_16_bit_keeps_its_high_byte(tmp_path: Path) -> None:
    grey = load_image(write(tmp_path, samples()["png_16bit_grey"]))
    assert grey.tobytes() == photograph().convert("L").convert("RGB").tobytes()
    rgb = load_image(write(tmp_path, samples()["png_16bit_rgb"]))
    assert rgb.tobytes() == photograph().tobytes()
    portable = load_image(write(tmp_path, samples()["ppm_16bit"]))
    assert portable.tobytes() == photograph().convert("L").convert("RGB").tobytes()


def test_a_turned_16_bit_image(tmp_path: Path) -> None:
    path = write(tmp_path, with_chunk(samples()["png_16bit_grey"], b"eXIf", exif_of(6), b"IDAT"))
    expected = photograph().convert("L").convert("RGB").transpose(Image.Transpose.ROTATE_270)
    assert load_image(path).tobytes() == expected.tobytes()


@pytest.mark.parametrize("name", ["png_rgba", "webp_alpha", "tiff_rgba", "png_grey_alpha"])
def test_transparency_is_composited_on_white(name: str, tmp_path: Path) -> None:
    path = write(tmp_path, samples()[name])
    with Image.open(path) as image:
        rgba = image.convert("RGBA")
    white = Image.new("RGB", rgba.size, (255, 255, 255))  # qwen_vl_utils.vision_process.to_rgb
    white.paste(rgba, mask=rgba.split()[3])
    assert load_image(path).tobytes() == white.tobytes()


@pytest.mark.parametrize("mode", ["P", "L", "RGB", "1"])
def test_a_transparent_colour_becomes_white(mode: str, tmp_path: Path) -> None:
    image = Image.new(mode, (4, 4), 0)
    path = write(tmp_path, saved(image, "png", transparency=(0, 0, 0) if mode == "RGB" else 0))
    assert load_image(path).getpixel((1, 1)) == (255, 255, 255)


@pytest.mark.parametrize("name", ["gif_animated", "png_animated"])
def test_the_first_frame_is_loaded(name: str, tmp_path: Path) -> None:
    expected = frames()[0].convert("P").convert("RGB") if name.startswith("gif") else frames()[0]
    assert load_image(write(tmp_path, samples()[name])).tobytes() == expected.tobytes()


def test_cmyk_and_palette_become_rgb(tmp_path: Path) -> None:
    for name in ("jpeg_cmyk", "tiff_cmyk", "png_palette", "bmp_palette", "gif"):
        path = write(tmp_path, samples()[name])
        with Image.open(path) as image:
            assert load_image(path).tobytes() == image.convert("RGB").tobytes(), name


def test_floats_without_a_white_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path, saved(Image.new("F", (4, 4), 0.5), "tiff"))
    assert reason_of(lambda: read_header(path)) == "not_an_image"
    assert reason_of(lambda: load_image(path)) == "not_an_image"


def test_loaded_images_carry_no_metadata(tmp_path: Path) -> None:
    """Their EXIF would turn them a second time in whatever honours it."""
    for format_name in TURNABLE:
        loaded = load_image(write(tmp_path, turned(format_name, 6)))
        assert loaded.mode == "RGB"
        assert loaded.info == {}
        assert loaded.getexif().get(0x0112) is None


def test_a_file_changed_since_its_header_was_read(tmp_path: Path) -> None:
    path = write(tmp_path, samples()["jpeg"])
    header = read_header(path)
    write(tmp_path, saved(photograph(24, 40), "jpeg"))
    assert reason_of(lambda: load_image(path, header)) == "unreadable_image"


def test_resize_is_pillows_bicubic() -> None:
    image = photograph()
    resized = resize_image(image, (28, 56))
    assert resized.size == (28, 56)
    assert resized.tobytes() == image.resize((28, 56), Image.Resampling.BICUBIC).tobytes()


def test_png_round_trip() -> None:
    image = photograph()
    image.info["icc_profile"] = b"a profile"
    data = encode_png(image)
    assert data == encode_png(photograph())
    assert decode_image(data, "embedded").tobytes() == image.tobytes()
