"""Image files: what the header says, and pixels when they are really needed.

    path --read_header--> ImageHeader                             4 KB and 6 microseconds a photograph
         --load_image---> RGB, upright, 8 bit --resize_image--> what the model sees

Both functions refuse the same files with the same words (`ImageError.reason`): missing_image, not_a_file, empty_image, not_an_image,
truncated_image, image_bomb, unreadable_image. `image_headers.py` does the parsing; where it is not sure, Pillow has the last word.

"Complete" means that the picture can be decoded to its last row, for an animation its first frame: no other is ever used. Damage in the
middle of a file of the right length is found by decoding only.
"""

import errno
import io
import os
import re
from collections.abc import Callable
from functools import partial
from typing import IO, TypeVar, cast

import msgspec
import numpy as np
import pyarrow.fs as pafs
from PIL import Image
from PIL.TiffImagePlugin import TiffImageFile
from pyarrow import NativeFile

from boxcar.pipelines import storage
from boxcar.pipelines.images import headers as image_headers
from boxcar.pipelines.images.headers import Facts, ReadAt, Source, TooManyPixels, Unsure
from boxcar.schemas.errors import ImageError

MAX_IMAGE_PIXELS = image_headers.MAX_IMAGE_PIXELS
REMOTE_BLOCK_BYTES = 65_536
MISSING_IMAGE = "missing_image"

T = TypeVar("T")


class ImageHeader(msgspec.Struct, frozen=True):
    """What is known of an image without its pixels."""

    format: str
    """"jpeg", "png", "webp", "gif", "bmp", "tiff", or Pillow's name in lower case."""
    stored_width: int
    """Pixels, as stored, before EXIF turns it."""
    stored_height: int
    orientation: int
    """EXIF 1..8; 1 where absent or invalid. From 5 on, width and height change places."""
    mode_note: str
    """"" | "cmyk" | "16bit" | "palette" | "animated": what is unusual. Of several, the last in this list."""
    num_bytes: int

    @property
    def width(self) -> int:
        """Pixels of the upright image."""
        return self.stored_height if self.orientation >= 5 else self.stored_width

    @property
    def height(self) -> int:
        """Pixels of the upright image."""
        return self.stored_width if self.orientation >= 5 else self.stored_height


def read_header(path: str, *, check_end: bool = True) -> ImageHeader:
    """Size, orientation and oddities of a local or remote image file. Raises ImageError, and nothing else.

    check_end: also refuse truncated files; costs one more small read, and a decode where that is not conclusive (bytes after the end).
    """
    return _with_file(path, partial(_header, path, check_end))


def load_image(path: str, header: ImageHeader | None = None) -> Image.Image:
    """The first frame, upright, as 8-bit RGB on white. `header`: of this file, where it was read before; must still be true."""
    return _load(path, header, _with_file(path, _read_all))


def decode_image(data: bytes, where: str) -> Image.Image:
    """`load_image` of bytes that were embedded; `where` names them in messages."""
    return _load(where, None, data)


def resize_image(image: Image.Image, size_wh: tuple[int, int]) -> Image.Image:
    """To (width, height) px, bicubic over the whole support without a reducing step: the pixels of the families' PIL processors."""
    return image.resize(size_wh, Image.Resampling.BICUBIC, reducing_gap=None)


def encode_png(image: Image.Image) -> bytes:
    """Lossless; pixels only, no metadata. Same pixels and Pillow, same bytes."""
    stream = io.BytesIO()
    image.save(stream, "PNG", icc_profile=None)
    return stream.getvalue()


# ---- opening


def _with_file(path: str, use: Callable[[ReadAt, int], T]) -> T:
    """use(read, num_bytes) of an open file. Plain descriptors: a Python file object costs as much as the whole header."""
    local = path if "://" not in path else storage.local_path(path)
    if local is None:
        return _with_remote(path, use)
    try:
        descriptor = os.open(local, os.O_RDONLY | os.O_NONBLOCK)  # not to wait for ever at a named pipe
        try:
            return use(partial(os.pread, descriptor), os.lseek(descriptor, 0, os.SEEK_END))
        finally:
            os.close(descriptor)
    except (OSError, ValueError) as error:
        raise _file_error(path, error) from error


def _with_remote(path: str, use: Callable[[ReadAt, int], T]) -> T:
    try:
        with _open_remote(path) as stream:
            num_bytes = stream.size()
            return use(partial(_read_blocks, stream, num_bytes, {}), num_bytes)
    except (OSError, ValueError, NotImplementedError) as error:
        raise _file_error(path, error) from error


def _open_remote(path: str) -> NativeFile:
    filesystem, inner = storage.resolve(path)
    try:
        return filesystem.open_input_file(inner)
    except OSError:  # only now ask what it is: another request
        if filesystem.get_file_info(inner).type == pafs.FileType.Directory:
            raise IsADirectoryError(errno.EISDIR, "a folder") from None
        raise


def _read_blocks(stream: NativeFile, num_bytes: int, blocks: dict[int, bytes], length: int, offset: int) -> bytes:
    """Small reads from blocks that are kept: every request to an object store costs tens of milliseconds."""
    stop = min(offset + length, num_bytes)
    if length > REMOTE_BLOCK_BYTES:
        return bytes(stream.read_at(stop - offset, offset))
    data = b""
    for block in range(offset // REMOTE_BLOCK_BYTES, -(-stop // REMOTE_BLOCK_BYTES)):
        start = block * REMOTE_BLOCK_BYTES
        if block not in blocks:
            blocks[block] = stream.read_at(min(REMOTE_BLOCK_BYTES, num_bytes - start), start)
        data += blocks[block][max(0, offset - start) : stop - start]
    return data


def _read_all(read: ReadAt, num_bytes: int) -> bytes:
    read(1, 0)  # a folder has a size, too; here it says what it is
    return read(num_bytes, 0)


def _slice(data: bytes, length: int, offset: int) -> bytes:
    return data[offset : offset + length]


def _file_error(path: str, error: Exception) -> ImageError:
    if isinstance(error, FileNotFoundError | NotADirectoryError):
        return _refusal(path, MISSING_IMAGE, "no such file", "Check the path; those in annotations start at the workflow's `images`.")
    if isinstance(error, IsADirectoryError) or (isinstance(error, OSError) and error.errno == errno.ESPIPE):
        return _refusal(path, "not_a_file", "a folder, pipe or device")
    return _refusal(path, "unreadable_image", f"{type(error).__name__}: {error}", "Check the path, the permissions and the mount.")


def _refusal(where: str, reason: str, found: str, fix: str = "") -> ImageError:
    return ImageError(where, reason=reason, found=found, expected="a complete image file that Pillow can decode", fix=fix)


# ---- headers


def _header(where: str, check_end: bool, read: ReadAt, num_bytes: int) -> ImageHeader:
    head = read(image_headers.FIRST_READ_BYTES, 0)
    if not head:
        raise _refusal(where, "empty_image", "0 bytes", "Fetch the file again.")
    source = Source(head, read, num_bytes, check_end)
    parser = image_headers.PARSERS.get(head[:2])
    try:
        facts = parser(source) if parser else _ask_pillow(where, source, "not_an_image")
    except Unsure as unsure:
        facts = _ask_pillow(where, source, "truncated_image" if unsure.short else "not_an_image")
    except TooManyPixels as bomb:
        raise _bomb(where, f"{bomb}") from bomb
    if check_end and not facts.complete:
        _check_by_decoding(where, source)
    return ImageHeader(facts.format, facts.width, facts.height, facts.orientation, facts.mode_note, num_bytes)


def _bomb(where: str, found: str) -> ImageError:
    return ImageError(
        where,
        reason="image_bomb",
        found=found,
        expected=f"at most {MAX_IMAGE_PIXELS} pixels",
        fix="Reduce the image if its size is intended.",
    )


# ---- Pillow

_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "DIB", "TIFF", "AVIF", "JPEG2000", "PPM", "ICO", "PCX", "PSD", "QOI", "SGI", "SUN")
"""Not all that Pillow has: EPS would start Ghostscript, TGA has no magic and takes noise for pictures, others cannot be decoded."""
_NOTES = {
    "CMYK": "cmyk",
    "I;16": "16bit",
    "I;16L": "16bit",
    "I;16B": "16bit",
    "I;16N": "16bit",
    "I": "16bit",
    "P": "palette",
    "PA": "palette",
}
_MODES = frozenset(("1", "L", "LA", "La", "RGB", "RGBA", "RGBa", "RGBX", "YCbCr", "HSV", *_NOTES))
"""Modes with a defined white. Floats and 32-bit integers have none, and LAB no conversion."""
_ORIENTATION_TAG = 0x0112
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class _Stream:
    """A Source as the little that Pillow asks of a file."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self._position = 0

    def read(self, length: int = -1) -> bytes:
        rest = max(0, self._source.num_bytes - self._position)
        data = self._source.read(rest if length < 0 else min(length, rest), self._position)
        self._position += len(data)
        return data

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._position = offset + (0, self._position, self._source.num_bytes)[whence]
        return self._position

    def tell(self) -> int:
        return self._position


_ADDRESS = re.compile(r" ?<[^<>]* object at 0x[0-9a-fA-F]+>")


def _pillow_error(where: str, error: Exception, otherwise: str) -> ImageError:
    """Pillow's plugins raise almost anything at bad bytes, so that anything is the file's fault; `otherwise` is the reason."""
    if isinstance(error, Image.DecompressionBombError | TooManyPixels):
        return _bomb(where, f"{error}")
    if isinstance(error, OSError) and error.errno is not None:
        return _file_error(where, error)
    said = _ADDRESS.sub("", str(error))  # the same file gives the same words, in every process
    fix = "Fetch the file again." if otherwise == "truncated_image" else "Convert it to JPEG or PNG, or remove it."
    return _refusal(where, otherwise, f"a file that Pillow cannot read ({type(error).__name__}: {said})", fix)


def _ask_pillow(where: str, source: Source, otherwise: str) -> Facts:
    """The header by Pillow, for files that no parser of ours is sure of."""
    try:
        with Image.open(cast(IO[bytes], _Stream(source)), formats=_FORMATS) as image:
            return _facts_by_pillow(where, image)
    except (ImageError, MemoryError):
        raise
    except Exception as error:
        raise _pillow_error(where, error, otherwise) from error


def _facts_by_pillow(where: str, image: Image.Image) -> Facts:
    name = (image.format or "").lower().replace("mpo", "jpeg")
    if image.mode not in _MODES or (image.mode == "I" and name != "ppm"):
        raise _refusal(
            where, "not_an_image", f"a {name} of mode {image.mode}, whose white is not defined", "Convert it to 8 bits a channel."
        )
    animated = getattr(image, "is_animated", False) and name not in ("tiff", "jpeg", "psd")  # those have pages and layers
    note = "animated" if animated else "palette" if name == "gif" else _NOTES.get(image.mode, "")
    try:
        orientation = image.getexif().get(_ORIENTATION_TAG, 1)  # for a PNG this decodes: the EXIF may stand behind the pixels
    except Exception:  # broken EXIF turns nothing
        orientation = 1
    width, height = image.size
    if isinstance(image, TiffImageFile):  # the one plugin whose size is that of the upright image
        width, height = image.tag_v2[256], image.tag_v2[257]
    image_headers.check_size(width, height)
    return Facts(name, width, height, int(orientation) if orientation in range(1, 9) else 1, note, False)


def _check_by_decoding(where: str, source: Source) -> None:
    try:
        with Image.open(io.BytesIO(source.read(source.num_bytes, 0)), formats=_FORMATS) as image:
            image.load()
    except MemoryError:
        raise
    except Exception as error:
        raise _pillow_error(where, error, "truncated_image") from error


# ---- pixels


def _load(where: str, header: ImageHeader | None, data: bytes) -> Image.Image:
    header = header or _header(where, False, partial(_slice, data), len(data))
    try:
        with Image.open(io.BytesIO(data), formats=_FORMATS) as image:
            image_headers.check_size(*image.size)
            image.load()
            turn = None if isinstance(image, TiffImageFile) else _TURNS.get(header.orientation)  # Pillow turns a TIFF as it loads it
            pixels = _to_rgb(image if turn is None else image.transpose(turn))
    except MemoryError:
        raise
    except Exception as error:
        raise _pillow_error(where, error, "truncated_image") from error
    if pixels.size != (header.width, header.height):
        found = f"{pixels.width} x {pixels.height} px where the header said {header.width} x {header.height}"
        raise _refusal(where, "unreadable_image", found, "The file was changed after it was converted: convert again.")
    return pixels


def _to_rgb(image: Image.Image) -> Image.Image:
    """A new RGB image without metadata, whose EXIF would have turned it a second time."""
    if image.mode.startswith("I"):
        # Pillow's own conversion clips 16 bits at 255. The high byte is what its decoders keep of 16-bit RGB.
        rgb = Image.fromarray((np.asarray(image) >> 8).clip(0, 255).astype(np.uint8)).convert("RGB")
    elif image.has_transparency_data:
        rgb = _on_white(image)
    else:
        rgb = image.convert("RGB")
    rgb.info.clear()
    return rgb


def _on_white(image: Image.Image) -> Image.Image:
    """Alpha composited on white, as qwen-vl-utils does (there for RGBA only; here a palette's alpha counts too)."""
    rgba = (image.convert("LA") if image.mode == "La" else image).convert("RGBA")
    white = Image.new("RGB", image.size, (255, 255, 255))
    white.paste(rgba, mask=rgba.getchannel("A"))
    return white
