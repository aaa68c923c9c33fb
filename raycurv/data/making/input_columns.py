"""Which columns of the data are the inputs."""

from __future__ import annotations

from collections.abc import Sequence

from raycurv.data import beside_tokens
from raycurv.data.column_names import COLUMNS, listed
from raycurv.data.conversations import COLUMNS as CONVERSATIONS
from raycurv.data.conversations import TOOLS
from raycurv.data.labels import NAMES
from raycurv.data.making.reader_settings import ReaderSettings
from raycurv.data.parts import Part
from raycurv.data.portion import Selection
from raycurv.errors import UserError

TALKS: tuple[tuple[str, ...], ...] = tuple((name,) for name in CONVERSATIONS)
# In order of preference; each with the columns that it takes.
TOKENS: tuple[tuple[str, ...], ...] = (("input_ids",), ("prompt", "completion"), ("text",), *TALKS)
# Of a text that is read together with another one, and of two that are compared.
TWO_TEXTS = ("text", "text_pair")
PAIRS: tuple[tuple[str, ...], ...] = (("prompt", "chosen", "rejected"), ("chosen", "rejected"))
# Of a source and the target that is made of it.
SOURCES = (("input_ids", "labels"), ("prompt", "completion"), ("text", "target"))
NUMBERS: tuple[tuple[str, ...], ...] = (("inputs",),)
# Of a model of images: numbers as well, or the bytes of files.
IMAGES: tuple[tuple[str, ...], ...] = (*NUMBERS, ("pixel_values",), ("image",))
_OPTIONAL = ("id", "labels", "loss_mask")


class InputColumns:
    """Chooses the columns of each part that are read, of one nature in all parts."""

    def __init__(self, settings: ReaderSettings) -> None:
        self._settings = settings
        self._before: tuple[str, ...] = ()
        self._talks = False

    def choose(self, part: Part, found: Sequence[str]) -> tuple[str, ...]:
        """The columns of inputs that a part has, and the model takes.

        Args:
            found: names of all its columns.

        Raises:
            UserError: it has none, or not one of each that is read; or tokens come after numbers.
        """
        settings, usable = self._settings, self._usable()
        kind = next((kind for kind in usable if set(kind) <= set(found)), None)
        if kind is None:
            model = {None: "", True: ", for a model of tokens", False: ", for a model of numbers"}
            what = model[None if settings.either else settings.token_inputs]
            remedy = ", or name it, as in --text-column body" * any(k in TOKENS for k in usable)
            lacking = [name for name in usable[0] if name not in found and name in COLUMNS]
            if lacking and self._named():
                remedy = f", or name it by --{COLUMNS[lacking[0]]}-column"
            if settings.reads == "pairs":
                what = ", for --objective preference, which compares two texts"
                remedy = "; of texts with a number each as label give --objective regression"
            raise UserError(
                part.location,
                "a column " + " or ".join(" + ".join(f"`{c}`" for c in kind) for kind in usable
                                     if kind not in TALKS[1:])
                + what,
                "the columns " + listed(found),
                f"Rename the column that holds the inputs{remedy}.",
            )  # fmt: skip
        if kind in IMAGES and "loss_mask" in found:
            raise UserError(
                part.location,
                "`loss_mask` beside tokens only",
                f"`loss_mask` beside `{kind[0]}`",
                "Leave out the column: numbers have no tokens to mask.",
            )
        if self._before and (self._before in IMAGES) != (kind in IMAGES):
            raise UserError(
                part.location,
                f"inputs like those of the files before it ({' + '.join(self._before)})",
                " + ".join(kind),
                "Give tokens and numbers as data of their own.",
            )
        for name in settings.further:
            if name not in found:
                raise UserError(
                    part.location,
                    f"a column `{name}`, which the objective reads",
                    "the columns " + listed(found),
                    "Add it to the data, or choose another --objective.",
                )
        named = (*kind, *_OPTIONAL, *beside_tokens.READ, *settings.further)
        twice = [name for name in named if list(found).count(name) > 1]
        if twice:
            wanted, remedy = f"one column `{twice[0]}`", "Rename all but one."
            raise UserError(part.location, wanted, "several", remedy)
        self._before = kind
        self._talks = kind in TALKS or any(map(part.message_keys, kind))
        return kind

    def beside(self, kind: tuple[str, ...]) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """What is read beside the inputs: columns that must be there, and that may be."""
        settings = self._settings
        others = tuple(name for name in settings.further if name not in kind)
        masks: tuple[str, ...] = ()
        if kind == TOKENS[0]:
            masks = beside_tokens.READ
        if kind == SOURCES[0]:
            masks = ("attention_mask",)
        # What a column of labels may be called, where each example has one.
        labels = () if settings.per_token or settings.reads == "pairs" else NAMES[1:]
        tools = (TOOLS,) if self._talks else ()
        return others, (*_OPTIONAL, *masks, *labels, *tools)

    def _usable(self) -> tuple[tuple[str, ...], ...]:
        """The columns of inputs that the model may take and that were named, if any were, in order
        of preference; UserError if it takes none of these."""
        usable, given = self._taken(), self._named()
        named = tuple(kind for kind in usable if given <= set(kind))
        if not named:
            one = sorted(given)[0]
            raise UserError(
                f"--{one}-column", "columns that model and objective take: "
                + " or ".join(" + ".join(kind) for kind in usable),
                " + ".join(sorted(given)), f"Leave --{one}-column out.",
            )  # fmt: skip
        return named

    def _named(self) -> set[str]:
        """The columns of inputs that were named."""
        source = self._settings.source
        return source.inputs if isinstance(source, Selection) else set()

    def _taken(self) -> tuple[tuple[str, ...], ...]:
        """The columns of inputs that the model may take, in order of preference."""
        settings = self._settings
        if settings.images is not None:
            return IMAGES
        if settings.reads in ("pairs", "sources"):
            return PAIRS if settings.reads == "pairs" else SOURCES
        if settings.whole_texts:
            talks = TALKS if settings.reads == "texts" else ()
            return (TOKENS[0], TWO_TEXTS, TOKENS[2], *talks)
        if settings.token_inputs is None:
            return (*TOKENS, *NUMBERS)
        if settings.per_token and (settings.token_inputs or settings.either):
            return TOKENS
        first, second = (TOKENS, NUMBERS) if settings.token_inputs else (NUMBERS, TOKENS)
        return (*first, *second) if settings.either else first
