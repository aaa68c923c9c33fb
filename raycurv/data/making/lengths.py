"""Examples within the longest length: whole ones, their beginnings, or their pieces."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np

from raycurv.data.examples import Example, loss_terms
from raycurv.data.making.chunk import Chunk
from raycurv.data.making.reader_settings import ReaderSettings
from raycurv.errors import UserError

# Takes ids for some examples, and where they stand.
Claim = Callable[[Sequence[str], Callable[[int], str]], None]


class Lengths:
    """Fits examples into the longest length.

    Args:
        claim: takes the ids of pieces; UserError if there is one already.
    """

    def __init__(self, settings: ReaderSettings, claim: Claim) -> None:
        self._settings, self._claim = settings, claim

    def fit(self, example: Example, chunk: Chunk, i: int) -> Iterator[Example]:
        """The example of row ``i``, its beginning, or its pieces."""
        settings = self._settings
        if not self.exceeded(example.length, chunk.place(i)):
            yield example
            return
        limit = settings.limit
        assert limit is not None
        if settings.long == "truncate":
            cut = piece(example, example.id, 0, limit)
            shift, findings = settings.shift, settings.findings
            findings.truncated_examples += 1
            findings.targets_cut_off += loss_terms(cut, shift) == 0 < loss_terms(example, shift)
            yield cut
            return
        begins = range(0, example.length, limit)
        pieces = [piece(example, f"{example.id}#{k}", a, a + limit) for k, a in enumerate(begins)]
        self._claim([one.id for one in pieces], lambda k: f"piece {k} of {chunk.rows.place(i)}")
        yield from pieces

    def exceeded(self, tokens: int, where: str) -> bool:
        """Whether so many tokens are too many, and are to be cut.

        Raises:
            UserError: they are too many, which is to be an error; says ``where``.
        """
        settings, limit = self._settings, self._settings.limit
        if limit is None or tokens <= limit:
            return False
        if settings.long != "error":
            return True
        own = limit == settings.max_positions
        whose = "the model's positions" if own else "--max-length"
        remedy = "Give --long truncate" + " or --long split" * (not settings.taken_whole)
        if not own:
            most = settings.max_positions
            takes = "" if most is None else f" (the model takes {most})"
            remedy += f", or a larger --max-length{takes}"
        raise UserError(
            where, f"at most {limit} tokens ({whose})", f"{tokens} tokens", remedy + "."
        )


def piece(example: Example, id: str, begin: int, end: int) -> Example:
    """The tokens ``begin`` to ``end`` as an example, with what speaks of them."""

    def cut(values_T: np.ndarray | None) -> np.ndarray | None:
        return None if values_T is None else values_T[begin:end]

    labels = example.labels
    return Example(
        example.index,
        id,
        cut(example.input_ids),
        None,
        cut(labels) if labels is not None and labels.ndim == 1 else labels,
        cut(example.loss_mask),
        example.columns,
        {name: values[begin:end] for name, values in example.named.items()},
    )
