"""The queries and the training examples of finished scores, read again from where their data lies.

Scores name examples by their ids alone. What ``run.json`` says of the place of a file on this
machine is opened as data; a URI, and data that was in memory, must be given again. In each case it
is held against the fingerprint of what was scored.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, Literal

import pyarrow as pa

from raycurv.data import beside_tokens
from raycurv.data.conversations import TOOLS
from raycurv.data.making.input_columns import TOKENS
from raycurv.data.portion import Selection, as_recorded
from raycurv.data.reading import ExampleReader
from raycurv.data.row_text import row_text, text_columns
from raycurv.data.rows_by_id import rows_by_id
from raycurv.data.sources import Source, fingerprint
from raycurv.data.tokenizer import LazyTokenizer, has_tokenizer
from raycurv.data.uri import is_uri, recorded_place, shown
from raycurv.driver.settings import IN_MEMORY
from raycurv.errors import UserError, user_errors
from raycurv.files.manifest import Manifest
from raycurv.jobs.influence.influence_settings import InfluenceSettings
from raycurv.jobs.inputs import Inputs
from raycurv.jobs.on_hub import data_again
from raycurv.models.model import Model

_TOKENIZER, _LONGEST = "tokenizer_directory", "longest"
# What the tokens of an example are made of.
_READ = tuple(dict.fromkeys([*(n for kind in TOKENS for n in kind), *beside_tokens.READ, TOOLS]))


def recorded_data(settings: InfluenceSettings, inputs: Inputs, network: Model) -> dict[str, Any]:
    """The facts by which the data of a scoring is found again: where it lies, the directory of what
    makes tokens of it, and the tokens of the longest example that is taken (``None`` for any)."""
    limits = [n for n in (settings.max_length, network.max_positions) if n is not None]
    facts: dict[str, Any] = {
        name: IN_MEMORY if getattr(inputs, name) is not None
        else getattr(settings, name) if name in inputs.files
        else recorded_place(getattr(settings, name))
        for name in ("queries", "train")
    }  # fmt: skip
    if network.tokenizer_dir is not None:
        facts[_TOKENIZER] = network.tokenizer_dir
    return facts | {_LONGEST: min(limits, default=None)}


@dataclass(frozen=True)
class ScoredData:
    """The queries, or the training examples, of finished scores.

    Attributes:
        name: which.
        scores: the directory of the scores, for errors.
        manifest: of the scores.
        given: where the data lies by now, or itself; ``None`` for where the manifest says.
    """

    name: Literal["queries", "train"]
    scores: str
    manifest: Manifest
    given: Source | None = None

    def rows(self, ids: Sequence[str], columns: Sequence[str] = (), text: bool = True) -> pa.Table:
        """A row for each of some examples, in their order: ``id``, ``text`` and further columns.

        The text of an example is that of its row: ``text``, or a prompt with what follows it, or
        the messages of a conversation, or, where there are but token ids, what the scoring's
        tokenizer makes of them (null without one, and for numbers and images). That of a piece
        (``--long split``) is made of its own tokens. Of a truncated example it is the whole.

        Args:
            ids: of examples.
            columns: of the data, by its own names; whatever they hold, pieces have those of their
                row.
            text: whether there is a column of texts.

        Raises:
            UserError: the data is gone or another one; no example of that id, no such column.
        """
        taken, objective = self._taken(None), self._objective
        named, ours = taken.inputs, {theirs: own for own, theirs in taken.columns.items()}
        more = partial(text_columns, named=named, objective=objective) if text else lambda _: ()
        row_of, found = self._found(ids, [ours.get(name, name) for name in columns], more)
        table: dict[str, Any] = {"id": list(ids)}
        if text:
            pieces = self._tokenised([id for id, row in row_of.items() if row != id])
            texts = [
                self._decoded(pieces[id])
                if id in pieces
                else row_text(found[id], self._decoded, named, objective)
                for id in ids
            ]
            table["text"] = pa.array(texts, pa.large_string())
        for name in columns:
            with user_errors(
                f"column `{name}` of {self._what}", "values of one type", "Correct it.",
                pa.ArrowException, TypeError, OverflowError,
            ):  # fmt: skip
                own = ours.get(name, name)
                table[name] = pa.array([found[row_of[id]][own] for id in ids])
        return pa.table(table)

    def tokens(self, ids: Sequence[str]) -> list[list[str]]:
        """The text of each token of some examples, as they were scored; of several tokens that make
        one character the last one has it.

        Raises:
            UserError: as for :meth:`rows`; or the model takes no tokens, or has no tokenizer.
        """
        if self._tokenizer is None:
            raise UserError(
                f"the tokens of {self._what}", "a tokenizer in the directory of the fit's model",
                "none on record there", "Score again, with --tokenizer DIR.",
            )  # fmt: skip
        found = self._tokenised(ids)
        return [self._tokenizer.pieces(found[id]) for id in ids]

    def _found(
        self,
        ids: Sequence[str],
        columns: Sequence[str],
        more: Callable[[Sequence[str]], Sequence[str]],
    ) -> tuple[dict[str, str], dict[str, dict[str, Any]]]:
        """Of each example the id of its row, and these rows; see :func:`rows_by_id`."""
        split = self.manifest.settings["long"] == "split"
        # A row's own id comes first: a scoring has seen that it is no piece's as well.
        whole = {id: id.rpartition("#")[0] if split else id for id in ids}
        found = rows_by_id(self._source(), {*whole, *whole.values()}, columns, more)
        row_of = {id: id if id in found else row for id, row in whole.items()}
        for id, row in row_of.items():
            if row not in found:
                raise self._no_such(id)
        return row_of, found

    def _tokenised(self, ids: Sequence[str]) -> dict[str, Sequence[int]]:
        """The token ids of some examples, cut as they were for the scoring."""
        facts, long = self.manifest.facts, self.manifest.settings["long"]
        if not ids:
            return {}
        if long != "error" and _LONGEST not in facts:
            raise UserError(
                self._what, "the longest example on record, at which longer ones were cut",
                "scores of an earlier version", "Score again into another directory.",
            )  # fmt: skip
        row_of, found = self._found(ids, (), lambda there: [n for n in _READ if n in there])
        rows = [{"id": id} | found[id] for id in dict.fromkeys(row_of.values())]
        # As they were read, columns have our names by now.
        names = {name: name for name in self._taken(None).inputs}
        reader = ExampleReader(
            Selection(rows, columns=names), self._tokenizer,
            vocab_size=None, max_positions=None, max_length=facts.get(_LONGEST), long=long,
            token_inputs=True, per_token=True, empty="skip", loss_on=None,
        )  # fmt: skip
        made = {
            e.id: [] if e.input_ids is None else e.input_ids.tolist() for e in reader.examples()
        }
        for id in ids:
            if id not in made:
                raise self._no_such(id)
        return {id: made[id] for id in ids}

    def _no_such(self, id: str) -> UserError:
        remedy = "See table() of the scores for the ids that there are."
        return UserError(f"example {id!r}", f"one of {self._what}", "no such id", remedy)

    @property
    def _objective(self) -> str:
        """The name of the objective whose columns were read."""
        fitted: str = self.manifest.fingerprints["fit"].get("settings", {}).get("objective", "")
        measured: str = self.manifest.settings["objective"] if self.name == "queries" else ""
        return measured or fitted

    @property
    def _what(self) -> str:
        return f"the {self.name} of {self.scores}"

    def _source(self) -> Source:
        """The data, seen to be what was scored."""
        recorded = self.manifest.facts.get(self.name, "")
        again = f"Give it again: raycurv.open_scores({self.scores!r}, {self.name}=…)"
        if self.given is None and (recorded in ("", IN_MEMORY) or is_uri(recorded)):
            got = {"": "none was scored", IN_MEMORY: "it was in memory"}.get(recorded, recorded)
            raise UserError(self._what, "data in a file of this machine", got, f"{again}.")
        source = recorded if self.given is None else self.given
        split = self.manifest.fingerprints[self.name].get("split", "")
        kept = f"What a run names is not fetched. {again}." if self.given is None else ""
        source = data_again(source, split, self._what, kept) or source
        place = shown(source) if isinstance(source, str) else "what was given"
        taken = self._taken(source)
        remedy = f"Put the data back that was scored. Or has it moved? {again}."
        try:
            here = fingerprint(taken)
        except UserError as error:
            got = f"{error.where}: {error.got}"
            raise UserError(self._what, f"data in {place}", got, remedy) from error
        if here != self.manifest.fingerprints[self.name]:
            got = f"other data in {place} (its files have other names or contents)"
            if not isinstance(source, str):
                got = "other data"
            raise UserError(self._what, "the data that was scored", got, remedy)
        return taken

    def _taken(self, source: Source | None) -> Selection:
        """What the scoring took of a source."""
        return as_recorded(source, self.manifest.fingerprints[self.name])

    @cached_property
    def _tokenizer(self) -> LazyTokenizer | None:
        directory = self.manifest.facts.get(_TOKENIZER, "")
        return LazyTokenizer(directory) if has_tokenizer(directory) else None

    def _decoded(self, ids: Any) -> str | None:
        return None if self._tokenizer is None else self._tokenizer.decode(ids)
