"""An HF model of images: what it takes, and its one stage."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from raycurv.batch import Batch, Hidden
from raycurv.errors import UserError, users_code
from raycurv.models.anatomy import META
from raycurv.models.model import ImageInputs, Segment

# Of a configuration that names no size: what nearly all are trained with.
_EDGE = 224
# No model takes an image with a longer edge.
_LONGEST = 4096


@dataclass(frozen=True)
class _Size:
    """Of an image: channels, height, width."""

    channels: int
    height: int
    width: int

    @classmethod
    def of(cls, config: Any) -> _Size:
        """What a configuration says, of its vision part where it has several."""
        part = getattr(config, "vision_config", config)
        size = getattr(part, "image_size", None) or _EDGE
        edges = size if isinstance(size, list | tuple) else [size]
        return cls(getattr(part, "num_channels", None) or 3, edges[0], edges[-1])


def image_inputs(whole: nn.Module, config: Any, directory: Path) -> ImageInputs:
    """What a model on the meta device takes, seen in one forward.

    Raises:
        UserError: it does not take images of the size that its configuration says.
    """
    size = _Size.of(config)
    # Numbers of each layer's output for an image, and the outputs of its weight.
    outputs: list[tuple[int, int]] = []

    def watch(layer: Any, args: Any, output: Any) -> None:
        if isinstance(output, Tensor):
            outputs.append((output[0].numel(), len(layer.weight)))

    layers = (whole.get_submodule(name) for name in layers_of(whole))
    hooks = [layer.register_forward_hook(watch) for layer in layers]
    try:
        if max(size.height, size.width) > _LONGEST:
            raise ValueError(f"images of {size.height} x {size.width}")
        run_images_on_meta(whole, 1, size)
    except Exception as error:  # foreign code
        raise UserError(
            f"model {directory} ({type(whole).__name__})",
            f"a model that takes images of {size.channels} x {size.height} x {size.width}, as its "
            "configuration says",
            f"{type(error).__name__}: {error}",
            "Correct config.json, or give it as package.module:factory.",
        ) from error
    finally:
        for hook in hooks:
            hook.remove()
    largest = max((numbers for numbers, _ in outputs), default=1)
    widest = max((channels for _, channels in outputs), default=1)
    positions = math.ceil(largest / widest)
    return ImageInputs(directory, size.channels, size.height, size.width, positions)


def run_images_on_meta(whole: Any, examples: int, size: _Size | ImageInputs) -> None:
    """A model's forward without values."""
    shape = (examples, size.channels, size.height, size.width)
    dtype = next(whole.parameters()).dtype
    whole(pixel_values=torch.zeros(shape, dtype=dtype, device=META))


def layers_of(whole: nn.Module) -> tuple[str, ...]:
    """Names of the layers that have a matrix: the modules that have blocks by default. Tables of
    positions, and whatever else is looked up or added, are none."""
    return tuple(
        name
        for name, module in whole.named_modules()
        if isinstance(weight := getattr(module, "weight", None), Tensor)
        and weight.ndim > 1
        and not isinstance(module, nn.Embedding)
    )


class ImageSegment(Segment):
    """A whole HF model of images, whose outputs are what the objective takes."""

    first = last = True

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def forward(self, batch: Batch, hidden: Hidden | None) -> Hidden:
        """The outputs ``[N, V]`` of images ``[N, C, H, W]``, alone in a tuple."""
        assert hidden is None, "there is no segment before it"
        with users_code(
            f"model {type(self.module).__name__}",
            f"images that it takes, [examples, channels, height, width]; these are "
            f"{list(batch.inputs.shape)}",
            "Give images of the model's size: by preprocessor_config.json, or in `pixel_values`.",
        ):
            return (self.module(pixel_values=batch.inputs).logits,)
