"""Rows of a source, found again by the ids that its examples were given."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

import numpy as np

from raycurv.data.column_names import listed
from raycurv.data.conversations import as_python
from raycurv.data.reading import ids_of, told
from raycurv.data.sources import Source, open_parts
from raycurv.errors import UserError


def rows_by_id(
    source: Source,
    ids: Collection[str],
    columns: Sequence[str] = (),
    more: Callable[[Sequence[str]], Sequence[str]] = lambda found: (),
) -> dict[str, dict[str, Any]]:
    """Some rows of a source, by id: of each the columns that were asked for, as Python's values.

    Streams: ids are looked at chunk by chunk until all have been found; other columns are read of
    those parts alone that hold some of the rows. Ids that are of no row are left out.

    Args:
        source: see :func:`raycurv.data.sources.find_parts`.
        ids: of rows; pieces of ``--long split`` have none.
        columns: that each of these rows must have.
        more: picks further columns of those that a part has; a row may be without them.

    Raises:
        UserError: a source or a value that cannot be read; one of ``columns`` is missing: names
            the columns that there are.
    """
    missing, found = set(ids), dict[str, dict[str, Any]]()
    for part in open_parts(source):
        with told(part):
            there = part.columns() if missing else None
            if there is None:
                continue
            here: dict[int, str] = {}
            for rows in part.read((), ("id",)):
                named = zip(ids_of(part, rows), rows.numbers.tolist(), strict=True)
                here |= {number: id for id, number in named if id in missing}
                if len(here) == len(missing):
                    break
            if not here:
                continue
            missing -= set(here.values())
            wanted = np.array(sorted(here))
            for rows in part.read((), tuple(dict.fromkeys((*columns, *more(there))))):
                own = rows.take(np.flatnonzero(np.isin(rows.numbers, wanted)))
                values = {name: as_python(column) for name, column in own.columns.items()}
                for i, number in enumerate(own.numbers.tolist()):
                    row = {name: of[i] for name, of in values.items() if of[i] is not None}
                    for name in columns:
                        if name not in row:
                            theirs = part.names.theirs
                            names = [theirs.get(n, n) for n in (*values, *sorted(own.others))]
                            raise UserError(
                                own.place(i), f"a column `{theirs.get(name, name)}`",
                                f"the columns {listed(names)}",
                                "Name one of these, or add it to the data and score again.",
                            )  # fmt: skip
                    found[here[number]] = row
                if rows.numbers[-1] >= wanted[-1]:
                    break
    return found
