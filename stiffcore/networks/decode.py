"""One image file as RGB pixels: what is lost on the way is known, or the file is refused."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image, ImageFile, ImageOps, UnidentifiedImageError

from stiffcore.errors import InputError
from stiffcore.study import format_bytes

SUFFIXES = (
    *(".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".bmp", ".webp", ".tif", ".tiff", ".gif"),
    *(".ppm", ".pgm", ".pbm", ".pnm"),
)
"""File names that are taken for images; what they hold decides how they are read."""

OTHER_SUFFIXES = (
    *(".avif", ".heic", ".heif", ".jxl", ".jp2", ".j2k", ".svg", ".eps", ".ico", ".psd", ".tga", ".pcx", ".dng"),
    *(".cr2", ".nef", ".arw", ".raw", ".exr", ".hdr", ".dcm", ".npy", ".pt"),
    *(".dib", ".mpo", ".apng", ".pfm", ".qoi", ".npz", ".mat", ".h5", ".zip", ""),
)
"""File names of images, too, or of what holds some, which are not read."""

# No others: Pillow has a program run for some (EPS), whatever the file is called.
_FORMATS = ("PNG", "JPEG", "BMP", "WEBP", "TIFF", "GIF", "PPM")
# bytes a pixel while a file is decoded: as stored, as RGB, and the array
_PIXEL_BYTES = 12
_SIXTEEN_BITS = 65535 // 255
# tags of a TIFF, and what they say where nothing does
_BITS, _COLOUR, _SAMPLES, _WHITE_IS_ZERO, _UNSIGNED = 258, 262, 339, 0, (1, 4)


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
            (floating, 32 bits, signed) or sense (16 bits with 0 for white).
    """
    try:
        # the open file, not its name: Pillow maps a TIFF that it knows by name, and scrambles one that is to be turned
        with path.open("rb") as file, Image.open(file, formats=_FORMATS) as image:
            problem = _too_large(image, allowed) or _problem(image)
            if not problem:
                upright = ImageOps.exif_transpose(image)
                rgb = _from_sixteen_bits(upright) if _is_deep(image) else upright.convert("RGB")
                return np.asarray(rgb if prepare is None else prepare(rgb), dtype=np.uint8)
    except MemoryError as error:
        problem = f"no memory is left to decode it ({error})"
    except Exception as error:  # a damaged file raises nearly anything
        unknown = isinstance(error, UnidentifiedImageError)
        reason = f"none of {', '.join(_FORMATS)}" if unknown else str(error) or type(error).__name__
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
    tags = getattr(image, "tag_v2", {})
    # a TIFF of 12 bits is in mode I;16, too, and signed numbers of 8 bits are in mode L
    odd = _is_deep(image) and tags.get(_BITS, (16,))[0] != 16
    odd = odd or any(sample not in _UNSIGNED for sample in tags.get(_SAMPLES, ()))
    if odd or (image.mode in ("F", "I") and not _is_deep(image)):
        return (
            f"has pixels in mode {image.mode} whose range the file does not say: save it with 8 or 16 bits a colour, "
            "or give the numbers as a floating array from Python"
        )
    if _is_deep(image) and tags.get(_COLOUR) == _WHITE_IS_ZERO:
        return "has 16 bits with 0 for white, which would be read as black: save it with 0 for black"
    # Pillow compares that colour, in the file's bits, with pixels of 8
    if "transparency" in image.info and image.mode in ("L", "RGB") and _stored(image) != image.mode:
        return "names a transparent colour in other bits than 8: save it without, or with 8 bits a colour"
    if "transparency" in image.info and _is_deep(image):
        hidden = bool((np.asarray(image) == image.info["transparency"]).any())
    else:
        hidden = image.has_transparency_data and image.convert("RGBA").getchannel("A").getextrema() != (255, 255)
    if hidden:
        return "has transparent pixels, which have no colour of their own: lay it on a background and save it again"
    return ""


def _stored(image: Image.Image) -> object:
    """How the pixels lie in a PNG that is not yet decoded, such as `L;4` or `RGB;16B`; the mode, of other files."""
    return image.tile[0][3] if isinstance(image, ImageFile.ImageFile) and image.format == "PNG" else image.mode


def _is_deep(image: Image.Image) -> bool:
    """Whether its pixels are grey values of 0..65535."""
    return image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM"))


def _from_sixteen_bits(image: Image.Image) -> Image.Image:
    grey = (np.asarray(image) // _SIXTEEN_BITS).astype(np.uint8)
    return Image.fromarray(grey).convert("RGB")
