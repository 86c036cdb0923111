"""One image file as RGB pixels: what is lost on the way is known, or the file is refused."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from stiffcore.errors import InputError
from stiffcore.study import format_bytes

SUFFIXES = (".png", ".jpg", ".jpeg", ".jfif", ".bmp", ".webp", ".tif", ".tiff", ".gif", ".ppm", ".pgm")
"""File names that are taken for images; what they hold decides how they are read."""

OTHER_SUFFIXES = (
    *(".avif", ".heic", ".heif", ".jxl", ".jp2", ".j2k", ".svg", ".eps", ".ico", ".psd", ".tga", ".pcx", ".dng"),
    *(".cr2", ".nef", ".arw", ".raw", ".exr", ".hdr", ".dcm", ".npy", ".pt"),
)
"""File names of images, too, which are not read."""

# No others: Pillow has a program run for some (EPS), whatever the file is called.
_FORMATS = ("PNG", "JPEG", "BMP", "WEBP", "TIFF", "GIF", "PPM")
# bytes a pixel while a file is decoded: as stored, as RGB, and the array
_PIXEL_BYTES = 12
_SIXTEEN_BITS = 65535 // 255


def read_image(path: Path, allowed: int, prepare: Callable[[Image.Image], Image.Image] | None = None) -> np.ndarray:
    """The pixels of an image file, upright as its EXIF orientation says.

    Grey images of 16 bits are scaled to 8 (`v // 257`); of colours with 16 bits the high byte is taken. Palettes, grey,
    CMYK and YCbCr become RGB as Pillow converts them; colour profiles are not applied.

    Args:
        path: the file; its content, not its name, decides how it is read.
        allowed: bytes that it may take while it is decoded.
        prepare: what is done to the RGB image, if anything.

    Returns:
        (H, W, 3) uint8.

    Raises:
        InputError: what is no image of a known format or is damaged; more pixels than `allowed` bytes hold, which are
            counted before any is decoded; several frames; pixels that are transparent; or numbers of unknown range
            (floating, 32 bits).
    """
    try:
        with Image.open(path, formats=_FORMATS) as image:
            problem = _too_large(image, allowed) or _problem(image)
            if not problem:
                upright = ImageOps.exif_transpose(image)
                rgb = _from_sixteen_bits(upright) if _is_deep(image) else upright.convert("RGB")
                return np.asarray(rgb if prepare is None else prepare(rgb), dtype=np.uint8)
    except MemoryError as error:
        problem = f"no memory is left to decode it ({error})"
    except Exception as error:  # a damaged file raises nearly anything
        reason = str(error) or type(error).__name__
        raise InputError(f"{path} cannot be read as an image ({reason}): replace or remove it") from error
    raise InputError(f"{path} {problem}")


def _too_large(image: Image.Image, allowed: int) -> str:
    pixels = image.width * image.height
    needed = pixels * _PIXEL_BYTES
    if needed <= allowed:
        return ""
    return (
        f"has {image.width} x {image.height} pixels: to decode it takes {format_bytes(needed)}, "
        f"{format_bytes(allowed)} are allowed: make it smaller, or give more --memory"
    )


def _problem(image: Image.Image) -> str:
    """Why an image has no RGB pixels that are sure to be the ones meant; empty where it has."""
    frames = getattr(image, "n_frames", 1)
    if frames > 1 and image.format != "MPO":  # whose first frame is the photograph, the others are previews
        return f"holds {frames} frames: save the one that is meant as an image of its own"
    # a TIFF of 12 bits is in mode I;16, too
    bits = getattr(image, "tag_v2", {}).get(258, (16,))[0]
    if (image.mode in ("F", "I") and not _is_deep(image)) or (_is_deep(image) and bits != 16):
        return (
            f"has pixels in mode {image.mode} whose range the file does not say: save it with 8 or 16 bits a colour, "
            "or give the numbers as a floating array from Python"
        )
    if "transparency" in image.info and _is_deep(image):
        hidden = bool((np.asarray(image) == image.info["transparency"]).any())
    else:
        hidden = image.has_transparency_data and image.convert("RGBA").getchannel("A").getextrema() != (255, 255)
    if hidden:
        return "has transparent pixels, which have no colour of their own: lay it on a background and save it again"
    return ""


def _is_deep(image: Image.Image) -> bool:
    """Whether its pixels are grey values of 0..65535."""
    return image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM"))


def _from_sixteen_bits(image: Image.Image) -> Image.Image:
    grey = (np.asarray(image) // _SIXTEEN_BITS).astype(np.uint8)
    return Image.fromarray(grey).convert("RGB")
