"""Images, as the bytes of files, to the numbers that a model takes, by its directory's processor.

What is decoded is bounded before it is decoded: an image file says in its first bytes how large it
is, and a few hundred of them can stand for any number of pixels.
"""

from __future__ import annotations

import importlib.util
import io
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from raycurv.data.tokenizer import FILES, hashes
from raycurv.errors import UserError, user_errors
from raycurv.models.foreign_code import nothing_from_outside
from raycurv.names import regular_file

PROCESSOR = "preprocessor_config.json"
# Of a file of an image; of what it decodes to and is resized to; of an edge that it is resized to.
IMAGE_BYTES, PIXELS, EDGE = 32 << 20, 64 << 20, 4096
_CONFIG_BYTES = 1 << 20
# Formats whose decoders run no other program and read one image.
_FORMATS = ("JPEG", "PNG", "WEBP", "BMP")
# Pillow's names of what has at most 8 bits a channel, and of what a model may have as channels.
_MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr")
_CHANNELS = {1: "L", 3: "RGB"}


class Images(Protocol):
    """What reading examples needs to take images."""

    def pixels(self, file: bytes, place: str) -> np.ndarray:
        """The numbers of an image, float32 ``[C, H, W]``; UserError, which says the ``place``, for
        one that cannot be taken."""

    def describe(self) -> dict[str, Any]:
        """What a run records of it; empty when no image was met."""


class LazyImages:
    """The image processor of a model's directory, as transformers loads it when the first image is
    met: its variant for Pillow, whatever else is installed. No code of the directory runs.

    Args:
        channels: of the images that the model takes, 1 or 3.
    """

    def __init__(self, directory: str | Path, channels: int) -> None:
        self._directory, self._channels = Path(directory), channels
        self._loaded: Any = None

    def pixels(self, file: bytes, place: str) -> np.ndarray:
        if self._loaded is None:
            _need_pillow()
            self._loaded = _load(self._directory, self._channels)
        image = _decoded(file, _CHANNELS[self._channels], place)
        longest, shortest = max(image.size), min(image.size)
        _check_pixels(place, round(_edge(self._loaded) ** 2 * longest / shortest), "resized to")
        with user_errors(
            place,
            f"an image that the processor of {self._directory} takes",
            f"Try it on the image, correct {PROCESSOR}, or give the data as `pixel_values`.",
            Exception,  # whatever transformers meets
        ):
            prepared = self._loaded(images=[image], return_tensors="np")
            pixels = np.asarray(prepared["pixel_values"])
        if pixels.ndim != 4 or pixels.shape[:2] != (1, self._channels):
            raise UserError(
                str(self._directory / PROCESSOR),
                f"a processor that makes [1, {self._channels}, height, width] of an image",
                f"{type(self._loaded).__name__}, which makes {list(pixels.shape)}",
                "Give the data as `pixel_values`, as the model takes them.",
            )
        if not np.isfinite(pixels).all():
            raise UserError(
                place,
                "finite numbers of an image",
                f"NaN or infinity, of {PROCESSOR}",
                "Correct its image_mean, image_std and rescale_factor.",
            )
        found: np.ndarray = pixels[0].astype(np.float32)
        return found

    def describe(self) -> dict[str, Any]:
        """The processor's class and settings."""
        if self._loaded is None:
            return {}
        settings = self._loaded.to_dict().items()
        known = {name: value for name, value in settings if value is not None}
        return {"class": type(self._loaded).__name__, "settings": known, FILES: self.files()}

    def describe_as(self, recorded: Mapping[str, Any]) -> dict[str, Any]:
        """What :meth:`describe` gives once an image was met; UserError where none can be taken."""
        self._loaded = self._loaded or _load(self._directory, self._channels)
        return self.describe()

    def files(self) -> dict[str, str]:
        """A hash of each of its files; empty where there is no image processor."""
        return hashes(self._directory, [PROCESSOR])


def _need_pillow() -> None:
    if importlib.util.find_spec("PIL") is None:
        raise UserError(
            "data",
            "Pillow, which decodes images",
            "none in this environment",
            "Install it (pip install 'raycurv[images]'), or give the data as `pixel_values`.",
        )


def _decoded(file: bytes, mode: str, place: str) -> Any:
    """An image as Pillow has it, upright, in one of its modes."""
    from PIL import Image, ImageOps

    if len(file) > IMAGE_BYTES:
        got = f"{len(file):,} bytes"
        raise UserError(place, f"an image of at most {IMAGE_BYTES >> 20} MiB", got, _SMALLER)
    with user_errors(
        place,
        f"the whole bytes of an image file ({', '.join(_FORMATS)})",
        "Write the image again as PNG, or leave the example out of the data.",
        Exception,  # a decoder raises whatever it meets
    ):
        with warnings.catch_warnings():
            # Of what Pillow only warns of, below.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(file), formats=_FORMATS)
        _check_pixels(place, image.width * image.height, "of")
        if image.mode not in _MODES:
            raise UserError(
                place,
                "an image of 8 bits a channel",
                f"one of mode {image.mode}",
                "Write it with 8 bits a channel, or give the data as `pixel_values`.",
            )
        image.load()
        return ImageOps.exif_transpose(image).convert(mode)


_SMALLER = "Make it smaller, or give the data as `pixel_values`, as the model takes them."


def _check_pixels(place: str, count: int, what: str) -> None:
    if not 0 < count <= PIXELS:
        got = f"one {what} {count:,}"
        raise UserError(place, f"an image of at most {PIXELS:,} pixels", got, _SMALLER)


def _load(directory: Path, channels: int) -> Any:
    path = directory / PROCESSOR
    as_numbers = "or give the data as `pixel_values`."
    if channels not in _CHANNELS:
        raise UserError(
            f"model {directory}", "a model of 1 or 3 channels, since the data is images",
            f"{channels} channels", f"Make numbers of the images, {as_numbers[3:]}",
        )  # fmt: skip
    if not path.exists() and not path.is_symlink():
        raise UserError(
            str(directory),
            f"an image processor ({PROCESSOR}), since the data is images",
            "none",
            f"Save the model's processor beside the model, {as_numbers}",
        )
    size = regular_file(directory, PROCESSOR, f"the image processor of {directory}").stat().st_size
    if size > _CONFIG_BYTES:
        remedy = "No processor is that large: check what the file is."
        raise UserError(str(path), f"at most {_CONFIG_BYTES:,} bytes", f"{size:,}", remedy)
    from transformers import AutoImageProcessor
    from transformers.image_processing_backends import PilBackend

    with (
        user_errors(
            str(path),
            "an image processor that transformers can load with Pillow",
            f"Try transformers.AutoImageProcessor.from_pretrained(…, backend='pil'), {as_numbers}",
            Exception,  # transformers raises whatever it meets
        ),
        nothing_from_outside(path, False),
    ):
        loaded = AutoImageProcessor.from_pretrained(
            str(directory), backend="pil", local_files_only=True, trust_remote_code=False
        )
        if not isinstance(loaded, PilBackend):
            raise TypeError(f"{type(loaded).__name__} has no variant for Pillow")
        edge = _edge(loaded)
    if not 1 <= edge <= EDGE:
        remedy = f"Correct it, {as_numbers}"
        raise UserError(str(path), f"sizes from 1 to {EDGE:,} pixels", f"{edge:,.0f}", remedy)
    return loaded


def _edge(processor: Any) -> float:
    """The longest shorter edge that a processor may resize an image to, or crop and pad it to."""
    sizes = [getattr(processor, name, None) for name in ("size", "crop_size", "pad_size")]
    edges = [int(edge) for size in sizes if size for _, edge in size]
    # Some enlarge an image by a share that they then crop.
    share = float(getattr(processor, "crop_pct", None) or 1)
    return max(edges, default=1) / min(share, 1)
