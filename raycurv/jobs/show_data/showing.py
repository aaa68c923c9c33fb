"""The job of show-data.py: examples as a fit would read them, on the terminal.

in colours      tokens that carry the loss are on green
elsewhere       > stands before a line of them, and \\n where the text has an end of a line
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

from rich.console import Console
from rich.text import Text

from raycurv.data.examples import Example, loss_terms
from raycurv.data.findings import sentences
from raycurv.data.shown import elided, sequences_of
from raycurv.data.tokenizer import LazyTokenizer
from raycurv.driver.corpus import reader_for
from raycurv.jobs.inputs import Inputs
from raycurv.jobs.objectives import objective_for
from raycurv.jobs.on_hub import brought
from raycurv.jobs.shell import check_loss_on
from raycurv.jobs.show_data.show_data_settings import ShowDataSettings
from raycurv.mathematics.loss.shipped import open_objective
from raycurv.models.opening import open_outline
from raycurv.progress.reporter import Reporter
from raycurv.progress.streams import printable, results

# White space that carries the loss is seen on a ground of its own.
_STYLE = "black on green"


def show_data(settings: ShowDataSettings) -> dict[str, Any]:
    """Print what the first examples become; gives their numbers for the last line.

    Raises:
        UserError: a mistake in settings, model or data, as a fit would meet it in these examples.
    """
    settings.check()
    settings, inputs = brought(settings, Inputs(), Reporter(log="text").say, weights=False)
    outline = open_outline(
        inputs.at(settings.model), settings.trust_remote_code, inputs.placed(settings.adapters())
    )
    directory = inputs.at(settings.tokenizer) or outline.tokenizer_dir
    tokenizer = None if directory is None else LazyTokenizer(directory, settings.trust_remote_code)
    objective = open_objective(objective_for(outline, settings.objective))
    reader = reader_for(
        inputs.source("data", settings), outline, tokenizer, settings, objective,
        settings.max_examples, settings.seed, settings.seed,
    )  # fmt: skip
    view = _View(settings.characters)
    marks = False
    shown: list[dict[str, Any]] = []
    cut, without = 0, 0
    for example in islice(reader.examples(), settings.rows):
        before, cut = cut, reader.findings.truncated_examples
        if reader.whole_texts:  # which are cut many at a time
            before = cut - (cut > 0 and example.length == reader.limit)
        targets = loss_terms(example, objective.shift)
        without += not targets
        shown.append({"id": example.id, "tokens": example.length, "targets": targets})
        shown[-1] |= {"truncated": True} if cut > before else {}
        view.heading(example, targets, cut > before)
        for own in sequences_of(example, objective.shift):
            ids, carries = own.ids.tolist(), own.carries.tolist()
            texts = [] if tokenizer is None else tokenizer.texts(ids, carries)
            view.sequence(own.name, texts, ids)
            marks |= any(carries) and bool(texts)
    recorded = reader.findings.recorded()
    check_loss_on(settings.loss_on, "conversations" in recorded)
    read = sorted(reader.columns_read)
    unused = recorded.get("unused_columns", [])
    if marks:
        view.line(view.legend)
    view.line(f"columns that were read: {', '.join(read)}")
    for sentence in sentences(recorded, len(shown), without):
        view.line(sentence)
    return {"examples": shown, "columns": read, "unused_columns": unused}


class _View:
    """What is printed.

    Args:
        characters: of a long text that are shown at either end.
    """

    def __init__(self, characters: int) -> None:
        self._console = Console(file=results(), highlight=False, markup=False)
        self._characters = characters
        console = self._console
        self._colours = console.is_terminal and bool(console.color_system) and not console.no_color

    @property
    def legend(self) -> str:
        """How tokens that carry the loss are to be seen."""
        how = "on green" if self._colours else "in lines behind a >, in which \\n ends a line"
        return f"tokens that carry the loss are {how}"

    def line(self, text: str) -> None:
        """Print a text as one line, which is never wrapped, without control characters."""
        self._console.print(printable(text), soft_wrap=True)

    def heading(self, example: Example, targets: int, cut: bool) -> None:
        """What is to be known of an example before its text."""
        said = f"example {example.id!r}: {example.length:,} tokens, {targets:,} carry the loss"
        if example.input_ids is None:
            assert example.inputs is not None
            said = f"example {example.id!r}: numbers of shape {list(example.inputs.shape)}"
        elif example.sequences or (example.labels is not None and example.labels.ndim != 1):
            said = f"example {example.id!r}: {example.length:,} tokens"
        label = example.labels
        if label is not None and label.ndim != 1 and not example.sequences:
            said += f", label {elided(str(label.tolist()), 40)}"
        self.line(said + (", cut to the longest length" if cut else ""))

    def sequence(self, name: str, texts: Sequence[tuple[str, Any]], ids: Sequence[int]) -> None:
        """The texts of a sequence, each with whether its tokens carry the loss; of one that no
        tokenizer made, its ids."""
        if name:
            self.line(f"  {name}:")
        if not texts:
            self.line("    " + elided(" ".join(map(str, ids)), self._characters))
            return
        shown = [(elided(text, self._characters), carries) for text, carries in texts]
        if self._colours:
            parts = [(printable(text), _STYLE if carries else "") for text, carries in shown]
            self._console.print(Text.assemble(*parts), soft_wrap=True)
        else:
            for mark, line in _lines(shown):
                self._console.print(printable(f"  {mark} {line}"), soft_wrap=True)
        self.line("")


def _lines(texts: Sequence[tuple[str, Any]]) -> Iterator[tuple[str, str]]:
    """Lines of texts, each text in lines of its own, with what marks them."""
    for text, carries in texts:
        lines = text.split("\n")
        for line, end in zip(lines, ["\\n"] * (len(lines) - 1) + [""], strict=True):
            if line or end:
                yield (">" if carries else " "), line + end
