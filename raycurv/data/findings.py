"""What a reader of examples met and did not take as it stands: counted, told, recorded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from raycurv.errors import shortened, some_of

# Of names at most so many are recorded, and so many told.
_RECORDED, _TOLD = 100, 8


@dataclass
class Findings:
    """Counts over all examples, and names.

    Attributes:
        unused_columns: columns of the data that nothing was read from.
        left_out_files: files of a format that is read, left out of a folder: hidden ones, caches.
        empty_examples: rows without any token, left out by ``--empty skip``.
        padded_examples: rows whose ``attention_mask`` marks padding, which was cut off.
        padding_tokens: tokens of that padding.
        targets_at_padding: of these tokens, those that ``labels`` make targets: cut off, too.
        truncated_examples: examples whose end was cut off by ``--long truncate``.
        targets_cut_off: of these, those that have no target left and had some.
        pairs_alike: pairs whose two texts are one and the same, as far as they were not cut off.
        classes_lacking: names of the model's classes that no example has.
        classes_taken_as: what numbers mean in the data and in the model, where that has no class of
            the name.
        masking: how tokens were hidden, where the data did not say.
        conversations: how the turns of conversations were told apart, where there were any.
        tools_not_written: conversations with tools, of which the chat template writes nothing.
    """

    unused_columns: set[str] = field(default_factory=set)
    left_out_files: list[str] = field(default_factory=list)
    empty_examples: int = 0
    padded_examples: int = 0
    padding_tokens: int = 0
    targets_at_padding: int = 0
    truncated_examples: int = 0
    targets_cut_off: int = 0
    pairs_alike: int = 0
    classes_lacking: list[str] = field(default_factory=list)
    classes_taken_as: list[str] = field(default_factory=list)
    masking: dict[str, Any] = field(default_factory=dict)
    conversations: dict[str, Any] = field(default_factory=dict)
    tools_not_written: int = 0

    def recorded(self) -> dict[str, Any]:
        """What there is of it, for JSON."""
        found = {name: value for name, value in asdict(self).items() if value}
        return {
            name: value if isinstance(value, int | dict) else sorted(value)[:_RECORDED]
            for name, value in found.items()
        }


def sentences(recorded: Mapping[str, Any], examples: int, without_target: int) -> list[str]:
    """What a person is told of a corpus, a line each.

    Args:
        recorded: what :meth:`Findings.recorded` gave.
        examples: how many there are.
        without_target: of them, those without a loss term.
    """
    said = []
    if without_target:
        cut = recorded.get("targets_cut_off", 0)
        behind = f", all targets of {cut:,} were cut off by --long truncate" if cut else ""
        said.append(
            f"{without_target:,} of {examples:,} examples have no loss term{behind}: "
            "loss 0, gradient 0"
        )
    if "truncated_examples" in recorded:
        said.append(f"{recorded['truncated_examples']:,} examples were cut to the longest length")
    if "pairs_alike" in recorded:
        said.append(
            f"{recorded['pairs_alike']:,} pairs have the same text twice, as far as it was not cut "
            "off: gradient 0"
        )
    if "empty_examples" in recorded:
        said.append(f"{recorded['empty_examples']:,} empty rows were left out")
    if "padded_examples" in recorded:
        said.append(
            f"{recorded['padding_tokens']:,} tokens of padding of {recorded['padded_examples']:,} "
            "examples were cut off, by their attention_mask"
        )
    if "targets_at_padding" in recorded:
        said.append(
            f"{recorded['targets_at_padding']:,} labels at padding count as no targets, though "
            "they are not -100"
        )
    if "masking" in recorded:
        said.append(
            f"of each text {recorded['masking']['targets']:.0%} of the tokens are hidden, drawn by "
            "the seed and the example's id"
        )
    if "conversations" in recorded:
        said.append(_of_conversations(recorded["conversations"]))
    if "tools_not_written" in recorded:
        said.append(
            f"{recorded['tools_not_written']:,} conversations have tools, of which the chat "
            "template writes nothing"
        )
    for name, what in (
        ("classes_lacking", "classes that no example has"),
        ("classes_taken_as", "classes by their numbers, since the model has other names"),
        ("unused_columns", "columns that were not read"),
        ("left_out_files", "hidden files and caches that were not read"),
    ):
        if name in recorded:
            said.append(f"{what}: {_named(recorded[name])}")
    return said


def _of_conversations(recorded: Mapping[str, Any]) -> str:
    carries = {
        "assistant": "what the assistant says carries the loss",
        "last-assistant": "the assistant's last turn carries the loss",
        "all": "all tokens carry the loss",
    }
    by = {"marks": ", where the template marks it", "prefixes": ", found by its beginnings"}
    said = "conversations went through the chat template"
    if "loss_on" in recorded:
        carried = carries.get(recorded["loss_on"], "some tokens carry the loss")
        said += f": {carried}{by.get(recorded.get('turns_by', ''), '')}"
    day = recorded.get("date")
    return said + (f"; the day that it asks for is taken to be {day}" if day else "")


def _named(names: list[str]) -> str:
    # Names of a stranger's: what a terminal would obey is escaped.
    return some_of(
        names, _TOLD, lambda name: shortened(name if name.isprintable() else repr(name), 60)
    )
