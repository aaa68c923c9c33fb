"""Examples of numbers: of a network of your own, or of images."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np

from raycurv.data import columns
from raycurv.data.examples import Example
from raycurv.data.making.chunk import Chunk
from raycurv.data.making.tools import Tools
from raycurv.errors import UserError


class NumberExamples:
    """Makes examples of ``inputs``, ``pixel_values`` or ``image``, of one shape in all of them."""

    def __init__(self, tools: Tools) -> None:
        self._tools = tools
        self._shape: tuple[int, ...] | None = None
        # Rows of an embedding that looks inputs up; 0 if they are no more than numbers.
        self._vocabulary: int | None = None

    def make(self, chunk: Chunk) -> Iterator[Example]:
        """See :class:`raycurv.data.making.tools.Maker`."""
        inputs: Iterable[np.ndarray]
        if chunk.kind == ("image",):
            inputs = self._pixels(chunk)
        else:
            inputs = given = self._inputs(chunk)
            if given.ndim == 1:
                raise UserError(
                    chunk.place(0),
                    f"a list of numbers in `{chunk.kind[0]}`",
                    f"one number ({given[0]})",
                    "Write it as a list of one.",
                )
            self._shape = given.shape[1:]
        labels = self._tools.labels.read(chunk.rows, chunk.place)
        further = self._tools.further.read(chunk)
        for i, (id, values) in enumerate(zip(chunk.ids, inputs, strict=True)):
            # A view would keep its whole chunk alive as long as any of its examples.
            own = None if labels is None else labels[i].copy()
            yield Example(0, id, inputs=values.copy(), labels=own, columns=further[i])

    def _pixels(self, chunk: Chunk) -> Iterator[np.ndarray]:
        """The numbers of images, one at a time: they take far more memory than their files."""
        images = self._tools.settings.images
        assert images is not None
        files = columns.image_files("image", chunk.columns["image"], chunk.place)
        for i, file in enumerate(files):
            pixels = images.pixels(file, chunk.place(i))
            if self._shape not in (None, pixels.shape):
                raise UserError(
                    chunk.place(i),
                    f"an image that becomes {list(self._shape or ())}, as those before it",
                    f"one that becomes {list(pixels.shape)}",
                    "Let the processor resize or crop images to one size (do_resize with a height "
                    "and a width, do_center_crop in preprocessor_config.json).",
                )
            self._shape = pixels.shape
            yield pixels

    def _inputs(self, chunk: Chunk) -> np.ndarray:
        """Numbers as floats, or as int64 where the model's embedding looks them up."""
        (name,), place, looks_up = chunk.kind, chunk.place, self._tools.settings.looks_up
        column = chunk.columns[name]
        if self._tools.settings.images is not None:
            values = columns.numbers(name, column, place, self._shape, exact_integers=True)
            if values.dtype == np.int64:
                raise UserError(
                    place(0),
                    f"`{name}` as the model takes them, which its processor scales and normalises",
                    f"whole numbers from {values.min()} to {values.max()}, as images have them",
                    "Give the images' files as `image`, or what the processor makes of them; "
                    "numbers that are meant as they are, write as floats.",
                )
            return values
        if self._vocabulary != 0 and looks_up is not None:
            inputs = columns.numbers(name, column, place, self._shape, exact_integers=True)
            whole = inputs.dtype == np.int64
            if self._vocabulary is None:
                self._vocabulary = (looks_up(inputs[0]) if whole else None) or 0
            elif not whole:
                raise UserError(
                    place(0),
                    "whole numbers in `inputs`, as in the examples before it",
                    "a fraction",
                    "The model looks them up in an embedding: give whole numbers everywhere.",
                )
            if self._vocabulary:
                wrong = (inputs < 0) | (inputs >= self._vocabulary)
                if wrong.any():
                    at = int(wrong.reshape(len(inputs), -1).any(axis=1).argmax())
                    raise UserError(
                        place(at),
                        f"whole numbers from 0 to {self._vocabulary - 1} in `inputs` (the model's "
                        f"embedding has {self._vocabulary} rows)",
                        str(inputs[at][wrong[at]].flat[0]),
                        "Tokenise the data as the model's were.",
                    )
                return inputs
        if self._tools.settings.token_inputs:
            raise UserError(
                place(0),
                "whole numbers in `inputs`, which the model's embedding looks up",
                f"{columns.type_name(column)}, which it does not",
                "Give token ids, as many in every row, as the model's forward takes them.",
            )
        return columns.numbers(name, column, place, self._shape, exact_integers=False)
