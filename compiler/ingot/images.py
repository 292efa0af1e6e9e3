"""Images as a model's input: decoded, resized, scaled, in the model's own layout and dtype."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ingot.errors import InputError, OptionError

if TYPE_CHECKING:
    from PIL.Image import Image

    from ingot.runtime.loader import TensorSpec

    Array = np.ndarray[Any, Any]

_MODES = {1: "L", 3: "RGB", 4: "RGBA"}
#: Formats that are decoded. Others reach code of Pillow's that is rarely used and rarely tested.
_FORMATS = ("PNG", "JPEG")


@dataclass(frozen=True)
class Preprocessing:
    """What happens to a pixel value p of 0 to 255: (p * scale - mean) / std.

    `mean` and `std` have one value, or one per channel in the model's order. None throughout means the default: floats
    get p / 255, 8-bit integers the pixel itself (minus 128 if signed). `resize` is stretch, crop or pad; `layout` is
    nchw, nhwc or None to go by the shape; `bgr` swaps red and blue.
    """

    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    scale: float | None = None
    resize: str = "stretch"
    layout: str | None = None
    bgr: bool = False


def parse_numbers(option: str, text: str | None) -> tuple[float, ...] | None:
    """Read `0.5`, `1/255` or `0.485,0.456,0.406`. Raises OptionError."""
    if text is None:
        return None
    values = []
    try:
        for word in text.split(","):
            top, slash, bottom = word.partition("/")
            values.append(float(top) / float(bottom) if slash else float(top))
    except (ValueError, ZeroDivisionError):
        values = [float("nan")]
    if not all(np.isfinite(values)):
        raise OptionError(
            f"{option} cannot be read",
            where=option,
            found=repr(text[:80]),
            allowed="a number, or one for each channel, separated by commas",
            hint=f"for example: {option} 0.485,0.456,0.406",
        )
    return tuple(values)


def _layout(spec: TensorSpec, wanted: str | None) -> tuple[str, int, int, int]:
    """Layout, channels, height and width of an image input. Raises InputError for a shape no image has."""
    shape = spec.shape
    if shape[:1] == (1,) and len(shape) in (3, 4) and not (len(shape) == 3 and shape[2] in _MODES):
        shape = shape[1:]
    if len(shape) == 2:
        return "hw", 1, shape[0], shape[1]
    if len(shape) == 3:
        first, last = shape[0] in _MODES, shape[2] in _MODES
        if wanted == "nchw" or (wanted is None and first and not last):
            if first:
                return "nchw", shape[0], shape[1], shape[2]
        elif (wanted == "nhwc" or not first) and last:
            return "nhwc", shape[2], shape[0], shape[1]
        if first and last:
            hint = "say which: --layout nchw or --layout nhwc"
            raise InputError("the layout of the image input is ambiguous", where=f"input {spec!r}", hint=hint)
    raise InputError(
        "this input does not take an image",
        where=f"input {spec!r}",
        allowed="[1, C, H, W] or [1, H, W, C] with 1, 3 or 4 channels" + (f", layout {wanted}" if wanted else ""),
        hint="give the data as a .npy file",
    )


def load_image(path: Path, spec: TensorSpec, how: Preprocessing) -> Array:
    """The image in `path` as an array of the model's shape and dtype. Raises InputError or OptionError."""
    layout, channels, height, width = _layout(spec, how.layout)
    pixels = _decode(path, _MODES[channels], height, width, how.resize)
    values = np.asarray(pixels).reshape(height, width, channels)
    if how.bgr and channels >= 3:
        values = values[:, :, [2, 1, 0, *range(3, channels)]]
    array = _convert(values, spec, how)
    if layout == "nchw":
        array = array.transpose(2, 0, 1)
    return np.ascontiguousarray(array).reshape(spec.shape)


def _decode(path: Path, mode: str, height: int, width: int, resize: str) -> Image:
    try:
        from PIL import Image, UnidentifiedImageError
    except ImportError:
        hint = "install it: pip install pillow; or give the data as a .npy file"
        raise InputError("reading images needs the Pillow package", where=str(path), hint=hint) from None
    try:
        with warnings.catch_warnings():
            # A small file can claim a picture of gigabytes.
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path, formats=_FORMATS) as image:
                if image.mode.startswith("I;16"):
                    image = image.point(lambda value: value / 256).convert("L")
                decoded = image.convert(mode)
    except UnidentifiedImageError:
        allowed = ".npy, .npz, .png or .jpg"
        raise InputError("the input file is of an unknown kind", where=str(path), allowed=allowed) from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        allowed = f"{Image.MAX_IMAGE_PIXELS} pixels"
        raise InputError("the image is too large", where=str(path), allowed=allowed) from None
    except Exception as error:  # decoders raise what they like: OSError, SyntaxError, struct.error
        found = " ".join(str(error).split())[:200] or type(error).__name__
        raise InputError("the image cannot be decoded", where=str(path), found=found) from None
    return _resize(decoded, height, width, resize)


def _resize(image: Image, height: int, width: int, how: str) -> Image:
    from PIL import Image as Pillow

    if image.size == (width, height):
        return image
    bilinear = Pillow.Resampling.BILINEAR
    if how == "stretch":
        return image.resize((width, height), bilinear)
    ratios = width / image.width, height / image.height
    factor = max(ratios) if how == "crop" else min(ratios)
    inner = max(1, round(image.width * factor)), max(1, round(image.height * factor))
    scaled = image.resize(inner, bilinear)
    left, top = (inner[0] - width) // 2, (inner[1] - height) // 2
    # A box that reaches beyond the image is filled with black.
    return scaled.crop((left, top, left + width, top + height))


def _per_channel(option: str, values: tuple[float, ...] | None, default: float, channels: int) -> Array:
    values = values or (default,)
    if len(values) not in (1, channels):
        raise OptionError(
            f"{option} does not fit the image", where=option, found=f"{len(values)} values", allowed=f"1 or {channels}"
        )
    return np.asarray(values, np.float64)


def _convert(pixels: Array, spec: TensorSpec, how: Preprocessing) -> Array:
    """Pixels [H, W, C] as uint8 to the same in the model's dtype."""
    kind = spec.dtype
    plain = how.mean is None and how.std is None and how.scale is None
    if plain and spec.type in ("uint8", "int8"):
        return pixels if spec.type == "uint8" else (pixels.astype(np.int16) - 128).astype(np.int8)
    mean = _per_channel("--mean", how.mean, 0.0, pixels.shape[2])
    std = _per_channel("--std", how.std, 1.0, pixels.shape[2])
    if not np.all(std):
        raise OptionError("--std must not be 0", where="--std", found=str(how.std))
    values = (pixels * (1 / 255 if how.scale is None else how.scale) - mean) / std
    if spec.type == "bfloat16":
        bits = values.astype(np.float32).view(np.uint32)
        return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    if kind.kind == "f":
        return values.astype(kind)
    if spec.quantization is not None and len(spec.quantization["scales"]) == 1:
        values = values / spec.quantization["scales"][0] + spec.quantization["zero_points"][0]
    if kind.kind not in "iu":
        raise InputError("this input does not take an image", where=f"input {spec!r}", hint="give a .npy file")
    limits = np.iinfo(kind)
    return np.clip(np.rint(values), limits.min, limits.max).astype(kind)
