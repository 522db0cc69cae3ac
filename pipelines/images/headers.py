"""What the first bytes of an image file say: size, orientation, oddities. Pure parsing over `read(num_bytes, offset)`, without Pillow.

    Source --PARSERS[head[:2]]--> Facts          all is as the format's book says
                                  Unsure         anything odd: `images.py` asks Pillow, which has the last word
                                  TooManyPixels  refused before anybody allocates

A parser claims only kinds of files that Pillow can decode, and answers as Pillow 13 does (`Image.size`, `getexif()`); rare kinds (12-bit
JPEG, BigTIFF, palette BMP) are Unsure. Damage inside segments that are skipped is not seen here: only decoding sees it.
"""

import re
import struct
import zlib
from collections.abc import Callable, Iterator

import msgspec

MAX_IMAGE_PIXELS = 178_956_970
"""Twice Pillow's warning limit: the size at which Pillow itself refuses (512 MiB as RGB)."""
FIRST_READ_BYTES = 4096
"""Holds the whole header of 7 in 8 COCO photographs; the others go on by seeking."""
PNG_TAIL_BYTES = 65_536
"""Where a PNG is searched for metadata behind its pixels. A photograph's EXIF is at most 64 KiB by JPEG's rules."""

ReadAt = Callable[[int, int], bytes]
"""read(num_bytes, offset), as os.pread: fewer bytes only at the end of the file."""


class Source(msgspec.Struct):
    """An open file."""

    head: bytes
    """Its first FIRST_READ_BYTES, or all of it."""
    read: ReadAt
    num_bytes: int
    check_end: bool
    """Whether `Facts.complete` is worth another read."""


class Facts(msgspec.Struct, frozen=True):
    """What a parser found. Sizes in px as stored; orientation 1..8; mode_note as in ImageHeader."""

    format: str
    width: int
    height: int
    orientation: int
    mode_note: str
    complete: bool
    """True: the file surely holds all of its (first) picture. False: only decoding can tell, or nobody asked."""


class Unsure(Exception):
    """Not a file that this module understands. `short`: it ended where more had to come."""

    def __init__(self, *, short: bool = False) -> None:
        super().__init__(short)
        self.short = short


class TooManyPixels(Exception):
    """The header claims more than MAX_IMAGE_PIXELS."""

    def __init__(self, width: int, height: int) -> None:
        super().__init__(f"{width} x {height} px")


def check_size(width: int, height: int) -> None:
    """Raise TooManyPixels, or Unsure where there is no picture at all."""
    if width * height > MAX_IMAGE_PIXELS:
        raise TooManyPixels(width, height)
    if width <= 0 or height <= 0:
        raise Unsure


class _Window:
    """The bytes around the place where a parser stands; moves by reading again. Never asks for more bytes than the file has."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self._data = source.head
        self._start = 0

    def take(self, position: int, length: int) -> bytes:
        at = position - self._start
        if at < 0 or at + length > len(self._data):
            if position + length > self._source.num_bytes:
                raise Unsure(short=True)
            self._data, self._start, at = self._source.read(max(length, FIRST_READ_BYTES), position), position, 0
            if len(self._data) < length:
                raise Unsure(short=True)
        return self._data[at : at + length]


# ---- JPEG: markers FF xx, each with a length, up to the start of the scan

_JPEG_SEGMENT = struct.Struct(">HH")
_JPEG_FRAME = struct.Struct(">BHHB")
_JPEG_FRAMES = frozenset((0xFFC0, 0xFFC1, 0xFFC2))  # baseline, extended, progressive; of lossless and arithmetic ones Pillow is the judge
_JPEG_APP1 = 0xFFE1
_JPEG_SCAN = 0xFFDA
_JPEG_SKIPPED = frozenset((0xFFC4, 0xFFCC, 0xFFDB, 0xFFDC, 0xFFDD, 0xFFDF, 0xFFE0, *range(0xFFE2, 0xFFF0), 0xFFFE))
_XMP_PREFIX = b"http://ns.adobe.com/xap/1.0/\0"


def parse_jpeg(source: Source) -> Facts:
    """Goes on behind the frame header, because Pillow honours an EXIF segment anywhere before the scan."""
    width = height = components = 0
    exif = xmp = b""
    for marker, payload in _jpeg_segments(source):
        if marker != _JPEG_APP1:
            if components or len(payload) < 6:
                raise Unsure
            precision, height, width, components = _JPEG_FRAME.unpack_from(payload)
            check_size(width, height)
            if precision != 8 or components not in (1, 3, 4) or len(payload) != 6 + 3 * components:
                raise Unsure
        elif payload.startswith(b"Exif\0\0"):
            exif += payload[6:] if exif else payload  # long EXIF comes in several segments
        elif payload.startswith(_XMP_PREFIX):
            xmp = payload
    if not components:
        raise Unsure
    orientation = _orientation(exif, xmp) if exif or xmp else 1
    return Facts("jpeg", width, height, orientation, "cmyk" if components == 4 else "", source.check_end and _jpeg_ends(source))


def _jpeg_segments(source: Source) -> Iterator[tuple[int, bytes]]:
    """(marker, payload) of the frame header and the APP1 segments before the scan; all others are stepped over without being read."""
    window, start, position = source.head, 0, 2
    while True:
        at = position - start
        if at + 4 > len(window):
            window, start, at = source.read(FIRST_READ_BYTES, position), position, 0
            if len(window) < 4:
                raise Unsure(short=True)
        marker, length = _JPEG_SEGMENT.unpack_from(window, at)
        if marker in _JPEG_SKIPPED and length >= 2:
            position += 2 + length
        elif marker == _JPEG_APP1 or marker in _JPEG_FRAMES:
            stop = at + 2 + length
            payload = window[at + 4 : stop] if stop <= len(window) else source.read(max(0, length - 2), position + 4)
            if len(payload) != length - 2:
                raise Unsure(short=True)
            yield marker, payload
            position += 2 + length
        elif marker == 0xFFFF:  # a fill byte
            position += 1
        elif marker == _JPEG_SCAN:
            return
        else:
            raise Unsure


def _jpeg_ends(source: Source) -> bool:
    """FF D9 cannot occur inside the coded pixels (there FF is followed by 00), so at the very end it is the end. Zeros are padding."""
    return source.read(32, max(0, source.num_bytes - 32)).rstrip(b"\0").endswith(b"\xff\xd9")


# ---- EXIF and XMP

_TYPE_BYTES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4, 16: 8}
_BYTE_ORDERS = {b"II*\0": "<", b"MM\0*": ">"}
_ODD_TIFF_HEADS = (b"MM*\0", b"II\0*", b"MM\0+", b"II+\0")  # swapped magic and BigTIFF: Pillow reads them
_XMP_ORIENTATION = re.compile(rb'tiff:Orientation(?:="|>)([0-9])')


def _orientation(exif: bytes, xmp: bytes) -> int:
    """1..8. EXIF first, then XMP's tiff:Orientation, as Pillow does; whatever is not 1..8 counts as 1."""
    value = _exif_orientation(exif.removeprefix(b"Exif\0\0").removeprefix(b"Exif\0\0"))
    if value is None and (match := _XMP_ORIENTATION.search(xmp)):
        value = int(match[1])
    return value if value is not None and 1 <= value <= 8 else 1


def _exif_orientation(tiff: bytes) -> int | None:
    """Tag 0x0112 of the first directory; None where it is absent; 0 where it or all of the EXIF is garbage."""
    if not tiff:
        return None
    if tiff.startswith(_ODD_TIFF_HEADS):
        raise Unsure
    order = _BYTE_ORDERS.get(tiff[:4])
    if order is None or len(tiff) < 8:
        return 0
    directory = struct.unpack_from(order + "I", tiff, 4)[0]
    for tag, kind, count, value in _entries(tiff[directory:], order, len(tiff)):
        if tag == 0x0112:
            return _inline_number(kind, count, value, order)
    return None


def _inline_number(kind: int, count: int, value: bytes, order: str) -> int:
    """One SHORT or LONG. Pillow makes something of other types (a rational 6/1 turns the picture), so let it."""
    if count != 1 or kind not in (3, 4):
        raise Unsure
    number: int = struct.unpack_from(order + ("H" if kind == 3 else "I"), value)[0]
    return number


def _entries(directory: bytes, order: str, num_bytes: int) -> Iterator[tuple[int, int, int, bytes]]:
    """(tag, type, count, 4 bytes of value or offset) of a TIFF directory, in order, as far as Pillow would read them.

    Pillow passes over unknown types and values larger than the file, and stops at the first value that lies outside the file.
    """
    if len(directory) < 2:
        return
    entry = struct.Struct(order + "HHI4s")
    num_entries = min(struct.unpack_from(order + "H", directory)[0], (len(directory) - 2) // entry.size)
    total = 0
    for tag, kind, count, value in entry.iter_unpack(directory[2 : 2 + num_entries * entry.size]):
        size = count * _TYPE_BYTES.get(kind, 0)
        if size > 4:
            total += size
            if total > num_bytes:
                continue
            if struct.unpack(order + "I", value)[0] + size > num_bytes:
                return
        if size > 0:
            yield tag, kind, count, value


# ---- PNG: chunks of length, type, data, checksum

_PNG_END = b"\0\0\0\0IEND\xaeB`\x82"
_PNG_START = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR"
_PNG_DEPTHS = {0: (1, 2, 4, 8, 16), 2: (8, 16), 3: (1, 2, 4, 8), 4: (8, 16), 6: (8, 16)}  # by colour type
_PNG_TEXTS = (b"tEXt", b"zTXt", b"iTXt")
_PNG_EXIF_KEYS = (b"Raw profile type exif\0", b"exif\0", b"XML:com.adobe.xmp\0", b"xmp\0")
_PNG_TAIL_KEYS = (b"Raw profile type exif\0", b"XML:com.adobe.xmp\0")


def parse_png(source: Source) -> Facts:
    """Reads all chunks before the pixels. Metadata behind the pixels is looked for in the last 64 KiB of the file only: walking
    there chunk by chunk would read a remote file from end to end."""
    head, num_bytes = source.head, source.num_bytes
    if len(head) < 33:
        raise Unsure(short=True)
    width, height, depth, colour, _, filtering, _, checksum = struct.unpack(">IIBBBBBI", head[16:33])
    if head[:16] != _PNG_START or depth not in _PNG_DEPTHS.get(colour, ()) or filtering or zlib.crc32(head[12:29]) != checksum:
        raise Unsure
    check_size(width, height)
    exif, xmp, animated, pixels_at = _png_metadata(_Window(source))
    tail_at = max(pixels_at, num_bytes - PNG_TAIL_BYTES)
    tail = source.read(num_bytes - tail_at, tail_at)
    if not exif:
        exif = _png_tail_exif(tail)
    note = "animated" if animated else "palette" if colour == 3 else "16bit" if depth == 16 else ""
    return Facts("png", width, height, _orientation(exif, xmp), note, tail.endswith(_PNG_END))


def _png_metadata(window: _Window) -> tuple[bytes, bytes, bool, int]:
    """(EXIF, XMP, whether animated, where the pixels begin) of the chunks between the header and the pixels."""
    exif = xmp = b""
    num_frames, first_is_frame, position = 0, 0, 33
    while True:
        length, kind = struct.unpack(">I4s", window.take(position, 8))
        if kind == b"IDAT":
            # A picture without its own frame control stands outside the animation, and Pillow counts it on top.
            return exif, xmp, num_frames > 0 and num_frames + 1 - first_is_frame > 1, position
        if kind == b"eXIf":
            exif = _checked(window.take(position + 4, length + 8))
        elif kind in _PNG_TEXTS:
            key = window.take(position + 8, min(length, 24))
            if key.startswith(b"XML:com.adobe.xmp\0\0") and kind == b"iTXt":
                xmp = window.take(position + 8, length)
            elif key.startswith(_PNG_EXIF_KEYS):
                raise Unsure
        elif kind == b"acTL" and not num_frames and length == 8:
            num_frames = int.from_bytes(window.take(position + 8, 4))
        elif kind == b"fcTL":
            first_is_frame = 1
        elif kind in (b"acTL", b"fdAT", b"IEND", b"IHDR"):
            raise Unsure
        position += 12 + length


def _checked(chunk: bytes) -> bytes:
    """The data of a chunk given as type, data, checksum."""
    if zlib.crc32(chunk[:-4]) != int.from_bytes(chunk[-4:]):
        raise Unsure
    return chunk[4:-4]


def _png_tail_exif(tail: bytes) -> bytes:
    """EXIF behind the pixels; b"" where there is none. Text forms, and four pixel bytes that only look like a chunk: Pillow decides.

    Plain searches for the few names: one regular expression for all of them is 20 times slower.
    """
    if any(key in tail for key in _PNG_TAIL_KEYS):
        raise Unsure
    at = tail.rfind(b"eXIf")
    if at < 0:
        return b""
    stop = at + 8 + int.from_bytes(tail[max(0, at - 4) : at])
    if stop > len(tail):
        raise Unsure
    return _checked(tail[at:stop])


# ---- WebP: a RIFF of chunks


def parse_webp(source: Source) -> Facts:
    """Plain lossy (VP8), plain lossless (VP8L), or extended (VP8X: canvas, flags, then chunks in any number)."""
    head = source.head
    if len(head) < 30:
        raise Unsure(short=True)
    riff, riff_bytes, webp, kind, chunk_bytes = struct.unpack("<4sI4s4sI", head[:20])
    if riff != b"RIFF" or webp != b"WEBP" or chunk_bytes + 12 > riff_bytes:
        raise Unsure
    orientation, note = 1, ""
    if kind == b"VP8 " and head[23:26] == b"\x9d\x01\x2a":
        width, height = (side & 0x3FFF for side in struct.unpack("<HH", head[26:30]))
    elif kind == b"VP8L" and head[20] == 0x2F:
        bits = int.from_bytes(head[21:25], "little")
        width, height = (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    elif kind == b"VP8X":
        width, height = (int.from_bytes(head[at : at + 3], "little") + 1 for at in (24, 27))
        check_size(width, height)
        note = "animated" if head[20] & 0x02 else ""
        if head[20] & 0x0C:
            orientation = _webp_orientation(head[20], _Window(source), 20 + chunk_bytes, riff_bytes + 8)
    else:
        raise Unsure
    check_size(width, height)
    return Facts("webp", width, height, orientation, note, riff_bytes + 8 <= source.num_bytes)


def _webp_orientation(flags: int, window: _Window, position: int, stop: int) -> int:
    """From the first EXIF and XMP chunks that the flags announce (0x08, 0x04); they stand behind the pixels."""
    found = {b"EXIF": b"", b"XMP ": b""}
    while position + 8 <= stop:
        kind, length = struct.unpack("<4sI", window.take(position, 8))
        if kind in found and not found[kind]:
            found[kind] = window.take(position + 8, length)
        position += 8 + length + (length & 1)
    return _orientation(found[b"EXIF"] if flags & 0x08 else b"", found[b"XMP "] if flags & 0x04 else b"")


# ---- GIF: a screen, then extensions and images made of sub-blocks of at most 255 bytes


def parse_gif(source: Source) -> Facts:
    """The screen, grown to its first image as Pillow does. A walk through the first image's sub-blocks shows whether it is whole; what
    follows it, whether the file is animated."""
    if len(source.head) < 13:
        raise Unsure(short=True)
    magic, width, height, flags = struct.unpack("<6sHHB", source.head[:11])
    if magic not in (b"GIF87a", b"GIF89a"):
        raise Unsure
    check_size(width, height)
    window = _Window(source)
    position = _gif_next_image(window, 13 + _palette_bytes(flags))
    if not position:
        raise Unsure
    left, top, image_width, image_height, flags = struct.unpack("<HHHHB", window.take(position + 1, 9))
    width, height = max(width, left + image_width), max(height, top + image_height)
    check_size(width, height)
    complete = animated = False
    try:
        position = _skip_sub_blocks(window, position + 11 + _palette_bytes(flags))
        complete = True
        animated = _gif_next_image(window, position) > 0
    except Unsure as unsure:
        if not unsure.short:
            raise
    return Facts("gif", width, height, 1, "animated" if animated else "palette", complete)


def _palette_bytes(flags: int) -> int:
    return 3 << (flags & 7) + 1 if flags & 0x80 else 0


def _skip_sub_blocks(window: _Window, position: int) -> int:
    while length := window.take(position, 1)[0]:
        position += 1 + length
    return position + 1


def _gif_next_image(window: _Window, position: int) -> int:
    """Where the next image descriptor stands; 0 where the trailer comes first."""
    while (block := window.take(position, 1)) != b",":
        if block == b";":
            return 0
        if block != b"!" or window.take(position + 2, 1) == b"\0":
            raise Unsure  # junk between blocks, and extensions without data, which Pillow reads in a way of its own
        position = _skip_sub_blocks(window, position + 2)
    return position


# ---- BMP


def parse_bmp(source: Source) -> Facts:
    """Uncompressed colour only. Palettes (which Pillow calls grey where they are), run lengths and bit masks are left to Pillow."""
    if len(source.head) < 54:
        raise Unsure(short=True)
    pixels_at, header_bytes, width, height, _, bits, compression = struct.unpack("<IIIIHHI", source.head[10:34])
    if header_bytes not in (40, 52, 56, 64, 108, 124) or bits not in (16, 24, 32) or compression or pixels_at < 14 + header_bytes:
        raise Unsure
    if height >> 24 == 0xFF:
        height = (1 << 32) - height  # negative: rows from the top down
    check_size(width, height)
    row_bytes = (width * bits + 31) // 32 * 4
    return Facts("bmp", width, height, 1, "", pixels_at + row_bytes * height <= source.num_bytes)


# ---- TIFF

_TIFF_KINDS = {
    # photometric interpretation, bits per sample -> note
    (0, (8,)): "",
    (1, (8,)): "",
    (1, (16,)): "16bit",
    (2, (8, 8, 8)): "",
    (2, (8, 8, 8, 8)): "",
    (2, (16, 16, 16)): "16bit",
    (3, (8,)): "palette",
    (5, (8, 8, 8, 8)): "cmyk",
}
_TIFF_COMPRESSIONS = ((1,), (5,), (8,), (32773,), (32946,))  # none, LZW, deflate, PackBits, old deflate
_TIFF_ODD_TAGS = frozenset((266, 284, 339, 0xBC01))  # fill order, planes, sample format, JPEG XR
_TIFF_TAGS = _TIFF_ODD_TAGS | {256, 257, 258, 259, 262, 273, 274, 277, 279, 324, 325, 338, 700}


def parse_tiff(source: Source) -> Facts:
    """The first page of plain files: whole samples of 8 or 16 bits, common compressions. All else is left to Pillow."""
    order = _BYTE_ORDERS.get(source.head[:4])
    if order is None or len(source.head) < 8:
        raise Unsure(short=len(source.head) < 8)
    tags = _tiff_tags(_Window(source), order, source.num_bytes)
    bits, compression = tags.get(258, (1,)), tags.get(259, (1,))
    if tags.get(277, (1,)) != (len(bits),) or compression not in _TIFF_COMPRESSIONS or _odd_tiff(tags):
        raise Unsure
    try:
        (width,), (height,), (photometric,), (orientation,) = tags[256], tags[257], tags[262], tags.get(274, (1,))
        note = _TIFF_KINDS[photometric, bits]
        offsets, counts = (tags[273], tags[279]) if 273 in tags else (tags[324], tags[325])
    except (KeyError, ValueError):
        raise Unsure from None
    check_size(width, height)
    complete = len(offsets) == len(counts) and all(start + count <= source.num_bytes for start, count in zip(offsets, counts, strict=True))
    if compression == (1,):  # Pillow reads whole rows from each offset, whatever the counts say
        complete = complete and sum(counts) * 8 >= width * height * sum(bits)
    return Facts("tiff", width, height, orientation if 1 <= orientation <= 8 else 1, note, complete)


def _odd_tiff(tags: dict[int, tuple[int, ...]]) -> bool:
    """Whether a tag says something that only Pillow's tables can judge."""
    plain = {266: (1,), 284: (1,), 339: (1,) * len(tags.get(258, (1,)))}
    if any(tag in tags and tags[tag] != plain.get(tag) for tag in _TIFF_ODD_TAGS):
        return True
    extra_wanted = tags.get(262) == (2,) and len(tags.get(258, ())) == 4
    extra_fits = tags.get(338) in ((0,), (1,), (2,)) if extra_wanted else 338 not in tags
    xmp_only = 700 in tags and 274 not in tags
    return not extra_fits or xmp_only


def _tiff_tags(window: _Window, order: str, num_bytes: int) -> dict[int, tuple[int, ...]]:
    """Tag -> its numbers, SHORT or LONG; () where it has another type. The first of a kind counts, as in Pillow."""
    (directory_at,) = struct.unpack(order + "I", window.take(4, 4))
    (num_entries,) = struct.unpack(order + "H", window.take(directory_at, 2))
    directory = window.take(directory_at, 2 + 12 * num_entries)
    tags: dict[int, tuple[int, ...]] = {}
    for tag, kind, count, value in _entries(directory, order, num_bytes):
        if tag not in _TIFF_TAGS or tag in tags:
            continue
        if kind not in (3, 4):
            tags[tag] = ()
            continue
        code, size = ("H", 2) if kind == 3 else ("I", 4)
        if count > 1 << 20:
            raise Unsure
        data = value if count * size <= 4 else window.take(struct.unpack(order + "I", value)[0], count * size)
        tags[tag] = struct.unpack_from(f"{order}{count}{code}", data)
    return tags


PARSERS: dict[bytes, Callable[[Source], Facts]] = {
    b"\xff\xd8": parse_jpeg,
    b"\x89P": parse_png,
    b"RI": parse_webp,
    b"GI": parse_gif,
    b"BM": parse_bmp,
    b"II": parse_tiff,
    b"MM": parse_tiff,
}
"""By the first two bytes of the file; each parser checks the rest of its magic."""
