"""Image files as they come from outside: what they really are, whether they decode, and what goes into the tar.

Training must not find out after six hours that picture 71,204 is cut off, so every file is decoded once before anything
is written. Its bytes then go into the tar unchanged unless the format is one that stock readers do not expect, or the
user asked for smaller pictures.
"""

import glob
import io
import os
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from shards.console import UserError
from shards.files import download_problem

EXTENSIONS = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp"}  # MPO: a JPEG with a second picture behind it
TO_PNG = ("BMP", "GIF", "TIFF")
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
OPENED = ("JPEG", "PNG", "WEBP", *TO_PNG)  # Pillow finds out about MPO by itself
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
NOT_OURS = ("__MACOSX", "@eaDir")  # thumbnails and forks of macOS and network disks
PNG_MODES = ("1", "L", "LA", "P", "RGB", "RGBA", "I;16")


class BadImage(Exception):
    """The bytes are not a usable picture; the text says why."""


def is_image_name(name: str) -> bool:
    """Whether a file's name says that it is an image. Hidden ones are not: `._x.jpg` is what macOS
    notes about x.jpg."""
    file = name.rpartition("/")[2].lower()
    return file.endswith(SUFFIXES) and not file.startswith(".")


def find_images(source: str | Path) -> tuple[Path, list[str]]:
    """(folder, names below it, sorted) of the images in a folder and those below it, of a single
    file, or of what a glob such as `new/*.jpg` names.

    Left out is what a system put there by itself: hidden files and folders, and `NOT_OURS`.
    """
    path = Path(source)
    if path.is_dir():
        folder, found = path, list(_walk(path))
    elif path.exists():
        folder, found = path.parent, [path]
    else:
        folder = next(above for above in path.parents if not glob.has_magic(str(above)))
        matches = map(Path, glob.glob(str(path), recursive=True))
        found = [image for match in matches for image in _images_at(match)]
    return folder, sorted({image.relative_to(folder).as_posix() for image in found})


def _images_at(path: Path) -> Iterator[Path]:
    if path.is_dir():
        yield from _walk(path)
    elif is_image_name(path.name):
        yield path


def _walk(folder: Path) -> Iterator[Path]:
    for root, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".") and name not in NOT_OURS]
        yield from (Path(root, name) for name in files if is_image_name(name))


def check_image(data: bytes) -> None:
    """Decodes the picture, JPEG at an eighth of its size: that still reads every byte. Raises BadImage."""
    image = open_image(data)
    image.draft(None, (1, 1))
    _load(image)
    if image.format in TO_PNG and image.mode in ("F", "I"):
        raise BadImage(f"{image.format} with 32-bit pixels has no lossless PNG; convert it to 8 or 16 bits")


def packed_bytes(data: bytes, *, resize: int | None, quality: int) -> tuple[bytes, str]:
    """(bytes, ext) to put into the tar; `ext` is jpg, png or webp by content, whatever the file was called.

    With `resize`, a picture whose short side is larger becomes a JPEG of that short side, upright and RGB. BMP, GIF and
    TIFF become PNG. Everything else is returned as it is. Raises BadImage.
    """
    image = open_image(data)
    if resize and min(image.size) > resize:
        return _resized(image, resize, quality), "jpg"
    if image.format in EXTENSIONS:
        return data, EXTENSIONS[image.format]
    _load(image)
    upright = ImageOps.exif_transpose(image)
    if upright.mode not in PNG_MODES:
        upright = to_rgb(upright)
    return _encoded(upright, "PNG"), "png"


def to_rgb(image: Image.Image) -> Image.Image:
    """RGB, 8 bits: transparency over white, 16-bit grey by its high byte."""
    if image.mode.startswith("I"):
        high = np.clip(np.asarray(image).astype(np.int32) >> 8, 0, 255).astype(np.uint8)
        return Image.fromarray(high).convert("RGB")
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    return image.convert("RGB")


def read_image(path: Path) -> bytes:
    """The file's bytes. Raises BadImage where it cannot be read or is empty."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise BadImage(f"cannot be read ({error.strerror})") from None
    if not data:
        raise BadImage("the file is empty")
    return data


def pack_file(path: Path, *, resize: int | None, quality: int) -> tuple[bytes, str]:
    """`packed_bytes` of a file that was checked before. Raises UserError where it has changed since."""
    try:
        return packed_bytes(read_image(path), resize=resize, quality=quality)
    except BadImage as problem:
        raise UserError(f"{path} changed while it was packed: {problem}; run the same command again") from None


def open_image(data: bytes) -> Image.Image:
    """The picture with its header read, not yet decoded nor turned upright. Raises BadImage."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        warnings.filterwarnings("ignore", category=UserWarning)  # odd EXIF is no reason to refuse a picture
        try:
            return Image.open(io.BytesIO(data), formats=OPENED)
        except Image.UnidentifiedImageError:
            unknown = "not a picture of a known format (JPEG, PNG, WebP; BMP, GIF, TIFF)"
            raise BadImage(download_problem(data) or unknown) from None
        except (Image.DecompressionBombWarning, Image.DecompressionBombError):
            raise BadImage(
                f"more than {Image.MAX_IMAGE_PIXELS:,} pixels, Pillow's limit against decompression bombs; "
                "make the picture smaller"
            ) from None
        except Exception as error:  # foreign bytes make the decoders raise anything
            raise BadImage(f"does not open: {error}") from None


def _load(image: Image.Image) -> None:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            image.load()
    except Exception as error:  # foreign bytes make the decoders raise anything
        raise BadImage(f"does not decode: {error}") from None


def _resized(image: Image.Image, short_side: int, quality: int) -> bytes:
    scale = short_side / min(image.size)
    width, height = (max(short_side, round(side * scale)) for side in image.size)
    image.draft(None, (2 * width, 2 * height))  # libjpeg may drop detail that twice the target size does not need
    _load(image)
    upright = ImageOps.exif_transpose(image)
    if (upright.width > upright.height) != (width > height):
        width, height = height, width
    resized = to_rgb(upright).resize((width, height), Image.Resampling.LANCZOS)
    # A restart marker after each row of blocks costs about half a per cent and lets a reader decode a crop's rows only.
    return _encoded(resized, "JPEG", quality=quality, restart_marker_rows=1)


def _encoded(image: Image.Image, kind: str, **options) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()
