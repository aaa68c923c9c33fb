"""Names of columns: those that a source gives them, and raycurv's own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from raycurv.errors import UserError, some_of

# The columns that a flag may name, each with the flag's word for it, which is another name of it.
COLUMNS = {
    "text": "text", "id": "id", "labels": "label", "prompt": "prompt", "completion": "completion",
}  # fmt: skip


def listed(found: Sequence[str]) -> str:
    """Names of columns, for messages."""
    return some_of(found, 20, "`{}`".format)


@dataclass(frozen=True)
class ColumnNames:
    """What a source calls the columns that raycurv reads.

    Attributes:
        theirs: the source's name for each of raycurv's; others keep their names.
        flag: that gives one, with ``{}`` for raycurv's name of it.
    """

    theirs: Mapping[str, str] = field(default_factory=dict)
    flag: str = "--{}-column"

    def ours(self, found: Sequence[str], where: str) -> list[str]:
        """Raycurv's names for columns: a column that another takes the name of is called otherwise.

        Raises:
            UserError: a column that was named is not there; says ``where``.
        """
        if not self.theirs:
            return list(found)
        for ours, theirs in self.theirs.items():
            if theirs not in found:
                remedy = "Correct the name, or give every file and row the column."
                if "{}" not in self.flag:
                    remedy = f"Name those that there are by {self.flag}, such as text=COLUMN."
                raise UserError(
                    where, f"a column `{theirs}` ({self.flag.format(COLUMNS.get(ours, ours))})",
                    "the columns " + listed(found), remedy,
                )  # fmt: skip
        back = {theirs: ours for ours, theirs in self.theirs.items()}
        kept = {
            name: f"{name} (another is read as it)"
            for ours in self.theirs
            for name in (ours, COLUMNS.get(ours, ours))
        }
        return [back.get(name, kept.get(name, name)) for name in found]

    def record(self, record: Mapping[str, Any], where: str) -> Mapping[str, Any]:
        """A row under raycurv's names; UserError as :meth:`ours`."""
        names = self.ours(list(record), where)
        return dict(zip(names, record.values(), strict=True))


PLAIN = ColumnNames()
