"""Settings: what all jobs share, and how a dataclass of settings declares what its fields are.

The command lines are made from these classes; what a field's docstring says is its ``--help``. What
a value must be, and whether a result depends on it, stands in the field's type:

    batch_tokens: Count = 4096                 checked: at least 1
    draws: Identity[Count] = 1                 and part of what a result means
    data: InputPath = ""                       where an input lies: what it holds is compared
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from numbers import Integral, Real
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin, get_type_hints

import torch
import tyro

from raycurv.data.assistant_turns import LossOn
from raycurv.data.column_names import COLUMNS
from raycurv.data.portion import Selection
from raycurv.data.uri import check_place, shown
from raycurv.errors import UserError, shortened
from raycurv.jsonfile import misfit
from raycurv.mathematics.curvature import CHOSEN, Damping
from raycurv.models.adapter import Adapters
from raycurv.stages.failures import Limits

DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16}
DtypeName = Literal["float32", "bfloat16", "float64"]
# Stands for the path of a model or of data that a Python caller holds.
IN_MEMORY = "in memory"

# Numbers that are stored in 64 bits are below this, and have fewer digits.
_BEYOND, _DIGITS = 2**63, 19

T = TypeVar("T")


# What a field's type declares


@dataclass(frozen=True)
class Checked:
    """Beside a type: what the values must be.

    Attributes:
        check: takes the flag and a value; raises :class:`UserError` that names the flag.
    """

    check: Callable[[str, Any], object]


@dataclass(frozen=True)
class Marked:
    """Beside a type: what a field is for.

    Attributes:
        part: ``identity``, ``input`` or ``required``; see the types that declare it.
    """

    part: str


@dataclass(frozen=True)
class OnHub:
    """Beside a type: a place that may as well be a repository of the Hugging Face hub.

    Attributes:
        what: of its files are taken: those of a ``model``, an ``adapter``, a ``tokenizer``, or
            ``data``.
    """

    what: str


def bounded(expected: str, holds: Callable[[Any], bool], remedy: str = "") -> Checked:
    """A bound of numbers.

    Args:
        expected: the bound in words, for the message.
        holds: whether a number is within it.
        remedy: what to do about one that is not.
    """

    def check(flag: str, value: Any) -> None:
        if not holds(value):
            got = f"{value:g}" if isinstance(value, float) else str(value)
            raise UserError(flag, expected, got, remedy)

    return Checked(check)


def listed(what: str) -> Checked:
    """A list of several: from Python, one text alone is a mistake that is easily made."""

    def check(flag: str, value: Any) -> None:
        if isinstance(value, str):
            raise UserError(flag, f"a list of {what}", repr(value), f"Give [{value!r}].")

    return Checked(check)


def places(flag: str, value: Any) -> None:
    """A place, or several: UserError for what cannot name one, see
    :func:`raycurv.data.uri.check_place`."""
    for one in (value,) if isinstance(value, (str, os.PathLike)) else value:
        check_place(flag, os.fspath(one))


def parse_bytes(flag: str, text: str) -> int:
    """A number of bytes from ``2GiB``, ``500MB`` or ``1000000``.

    Raises:
        UserError: not a size.
    """
    units = {"": 1, "B": 1}
    for power, letter in enumerate("KMGT", start=1):
        units |= {f"{letter}B": 1000**power, f"{letter}iB": 1024**power, letter: 1024**power}
    number = text.rstrip("KMGTiB")
    try:
        value = float(number) * units[text[len(number) :]]
    except (ValueError, KeyError):
        value = math.nan
    if not 1 <= value < _BEYOND:
        raise UserError(flag, "a size such as 2GiB or 500MB", repr(text), "")
    return int(value)


def rank_number(rank: str) -> int | None:
    """A rank as a number; ``None`` for full.

    Raises:
        UserError: neither a positive number nor ``full``.
    """
    if rank == "full":
        return None
    if not rank.isdecimal() or not int(rank[:_DIGITS]) >= 1 or len(rank) >= _DIGITS:
        raise UserError("--rank", "a positive number or `full`", repr(rank), "")
    return int(rank)


IDENTITY, INPUT, REQUIRED = Marked("identity"), Marked("input"), Marked("required")
# A setting that decides what a result means: recorded, and a change on the same --out is refused.
Identity = Annotated[T, IDENTITY]
# Where an input lies: recorded in the tables; what it holds is compared, not where it lies.
InputPath = Annotated[str, INPUT, Checked(places)]
ModelPath = Annotated[InputPath, OnHub("model")]
DataPath = Annotated[InputPath, OnHub("data")]
# Where something goes, or a run lies.
Place = Annotated[str, Checked(places)]
# A field that has to be given: its default is that nothing was.
Required = Annotated[T, REQUIRED]
Small = bounded("a number below 2^63", lambda n: -_BEYOND <= n < _BEYOND)
Count = Annotated[int, bounded("a number of at least 1", lambda n: n >= 1), Small]
FromZero = Annotated[int, bounded("a number of at least 0", lambda n: n >= 0), Small]
Seed = Annotated[int, Small]
Positive = Annotated[
    float, bounded("above 0", lambda x: x > 0), bounded("at most 1e9", lambda x: x <= 1e9)
]
Size = Annotated[str, Checked(parse_bytes)]
Rank = Annotated[str, Checked(lambda flag, text: rank_number(text))]
DampingText = Annotated[str, Checked(lambda flag, text: Damping.parse(text))]
DampingChoice = Annotated[str, Checked(lambda flag, text: text in CHOSEN or Damping.parse(text))]
Globs = Annotated[tuple[str, ...], tyro.conf.UseAppendAction, listed("globs")]
Names = Annotated[tuple[str, ...], tyro.conf.UseAppendAction, listed("names")]
AdapterPaths = Annotated[
    tuple[str, ...],
    tyro.conf.UseAppendAction,
    listed("directories"),
    Checked(places),
    OnHub("adapter"),
]
Runs = Annotated[tuple[str, ...], listed("run directories"), Checked(places)]


# What all jobs share

S = TypeVar("S", bound="Execution")


@dataclass(frozen=True)
class Execution:
    """How the work is run; every field is free to change between a run and its continuation."""

    stages: Count | None = None
    """Into how many stages the model's layers are cut. Default: 1; swept: a stage for each layer
    that the model can be cut behind."""
    schedule: Literal["pipelined", "swept"] = "pipelined"
    """`pipelined`: every stage resident, an actor each, one forward, one backward. `swept`: one
    after the other, with what passes between them on disk: memory is that of one stage."""
    homes: Count = 1
    """How many stages are resident at a time in a swept run, an actor each."""
    replicas: Count = 1
    """Copies of every resident stage, each on its own part of the data."""
    spool_dir: Annotated[Place, bounded("a directory", bool)] | None = None
    """Local directory for what a swept run keeps between stages. Default: below --out."""
    batch_tokens: Count = 4096
    """Tokens of a microbatch, padding included (examples, where there is no token axis)."""
    logits_chunk: Count = 2**24
    """Logits formed at once (numbers): head and loss run on slices of positions of this size."""
    address: str | None = None
    """Ray cluster: `local` (a Ray of its own), `auto`, `HOST:PORT`, or `none` to run everything in
    this process without Ray. Default: RAY_ADDRESS when set, else `local`."""
    commit_seconds: Positive | None = None
    """Seconds between two commits of a pass: a restart repeats at most so much of it. Default: 60,
    or ten times what writing one takes."""
    cpus_per_stage: Positive | None = None
    """Cores that a stage's actor reserves in the cluster. Default: 1, or a part of one in a Ray of
    the job's own that has fewer cores than actors."""
    transport: Literal["auto", "object-store", "distributed"] = "auto"
    """How hidden states and gradients go from stage to stage: through Ray's object store, or from
    process to process (NCCL between GPUs, else TCP); `auto` takes the latter on GPUs."""
    place_seconds: Positive = 300.0
    """Seconds to wait for room in the cluster, for an autoscaler say, before that is an error."""
    hang_seconds: Positive = 1800.0
    """Seconds without any progress after which an actor counts as hung: it is ended, and built
    again."""
    max_failures: FromZero = 20
    """Actors and tasks that a run may lose; they are built or run again, from the last commit."""
    max_actor_failures: FromZero = 5
    """How often one and the same actor may be lost."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where stages compute; `auto` takes a GPU when there is one."""
    trust_remote_code: bool = False
    """Run the Python code that a model directory brings along (`auto_map` in its config.json or
    tokenizer_config.json), with all that you may do. Default: no code of a directory runs."""
    log: Literal["text", "json"] = "text"
    """What is told on stderr: `text` for a person, or `json`, one object a line."""
    force: bool = False
    """Start even what cannot fit on this machine's memory or disk."""

    def check(self) -> None:
        """Refuse what cannot work, before anything starts.

        Raises:
            UserError: naming the flag.
        """
        check_fields(self)

    def resolved(self: S) -> S:
        """With the defaults that depend on other fields filled in."""
        return self

    @property
    def cluster(self) -> str:
        """The address, defaults filled in."""
        return self.address or os.environ.get("RAY_ADDRESS") or "local"

    def limits(self) -> Limits:
        """What failures are borne."""
        return Limits(
            self.max_failures, self.max_actor_failures, self.hang_seconds, self.place_seconds
        )

    def stage_count(self, units: int) -> int:
        """How many stages there are of a model that can be cut into ``units``."""
        return self.stages or (units if self.schedule == "swept" else 1)


@dataclass(frozen=True)
class Reading:
    """How examples are read; every field is part of what a result means."""

    loss_on: Identity[LossOn | None] = None
    """Which turns of conversations carry the loss: the `assistant`'s, the `last-assistant` turn, or
    `all` tokens. Default: the assistant's; of a job that follows a fit, the fit's."""
    max_length: Identity[Count | None] = None
    """Longest example in tokens; by default the model's own limit."""
    long: Identity[Literal["error", "truncate", "split"]] = "error"
    """What becomes of a longer example: an error, its head, or pieces with ids `id#0`, `id#1`, …"""
    tokenizer: Annotated[Place, OnHub("tokenizer")] = ""
    """Directory of the tokenizer that texts go through, or its name on the hub. Default: the model
    directory's own (a `package.module:factory` has none); of a job that follows a fit, the
    fit's."""
    empty: Identity[Literal["error", "skip"]] = "error"
    """What becomes of a row without any token, or of a text of no character: an error (such a text
    may be an example of special tokens alone), or it is left out, and counted."""
    split: str = ""
    """Which split of the data, where it has several: `train`, or a part of one, `train[:1000]` or
    `train[10%:20%]`, in its order. Default: all, where nothing names a split."""
    text_column: str = ""
    """What the data calls the column of texts. Default: `text`."""
    id_column: str = ""
    """What the data calls the column of ids. Default: `id`, if there is one."""
    label_column: str = ""
    """What the data calls the column of labels. Default: `labels` or `label`, if there is one."""
    prompt_column: str = ""
    """What the data calls the column of prompts. Default: `prompt`."""
    completion_column: str = ""
    """What the data calls the column of completions. Default: `completion`."""

    def select(self, name: str, source: Any) -> Any:
        """What these settings take of a source, which is the one of a setting (`data`, say).

        Raises:
            UserError: two columns of one name.
        """
        given = {ours: getattr(self, f"{flag}_column") for ours, flag in COLUMNS.items()}
        return selected(source, self.split, {n: value for n, value in given.items() if value})


def selected(
    source: Any, split: str, columns: Mapping[str, str], flag: str = "--split", named: str = ""
) -> Any:
    """A source, or what is taken of it.

    Args:
        split: of it; empty for all.
        columns: its own name for each of raycurv's.
        flag: that names a split.
        named: the flag that names all columns, where they have none each.

    Raises:
        UserError: two columns of one name.
    """
    if isinstance(source, Selection) or not (split or columns):
        return source
    theirs = list(columns.values())
    twice = next((name for name in theirs if theirs.count(name) > 1), None)
    if twice is not None:
        ours = [name for name, value in columns.items() if value == twice]
        raise UserError(
            named or f"--{COLUMNS[ours[1]]}-column", "a column of its own",
            f"`{twice}`, which is the column of {ours[0]}", "Name another one.",
        )  # fmt: skip
    return Selection(source, split, dict(columns), flag, named or "--{}-column")


def columns_of(flag: str, text: str) -> dict[str, str]:
    """Names of columns from ``text=body,id=key``, a source's own for each of raycurv's.

    Raises:
        UserError: another text; a name that raycurv does not know.
    """
    pairs = [pair.partition("=") for pair in text.split(",") if pair]
    if any(not theirs or ours not in COLUMNS for ours, _, theirs in pairs):
        raise UserError(
            flag, "NAME=COLUMN,… of the names " + ", ".join(COLUMNS), repr(text), "",
        )  # fmt: skip
    return {ours: theirs for ours, _, theirs in pairs}


@dataclass(frozen=True)
class Adapting:
    """What jobs share that open a model, maybe with adapters."""

    adapter: AdapterPaths = ()
    """Directory of a PEFT adapter of --model (LoRA, rsLoRA, DoRA), or its name on the hub,
    repeatable: several are active together, their outputs added up. By default its matrices have
    the blocks, and the base is frozen."""
    merge_adapter: Identity[bool] = False
    """Merge each --adapter into the weights of --model, and take these as the model's. Default: its
    matrices stand beside them."""

    def adapters(self) -> Adapters:
        """The adapters that `--adapter` names, and whether they are merged into the weights."""
        return Adapters(tuple(self.adapter), self.merge_adapter)


@dataclass(frozen=True)
class Capturing:
    """What jobs share that capture the gradients of weights."""

    check_capture: bool = True
    """Hold every block's gradient, as it is made of what enters and leaves its module, against
    autograd's own for the weight: on two examples of at most 64 tokens of the first microbatch,
    which takes less than a quarter of a microbatch's time. Off: the result is what is meant only
    where no weight is used beside its module, and no layer mixes examples."""


@dataclass(frozen=True)
class Predicting:
    """What jobs share that ask a model for the loss of its predictions."""

    check_causality: bool = True
    """Try once, on two examples of at most 8 tokens (whole ones of a network from a factory),
    whether outputs change with later tokens, which a next-token loss must not see. Off: where
    looking ahead is meant, as behind a prefix."""


# What is read from the declarations


def identity(settings: Any, inputs: bool = True) -> dict[str, Any]:
    """The settings that a result depends on, ready for JSON and without credentials.

    Args:
        settings: a dataclass whose fields are declared as above.
        inputs: also where inputs lie.
    """
    return {
        name: _recorded(getattr(settings, name))
        for name, _, marks in declarations(type(settings))
        if IDENTITY in marks or (inputs and INPUT in marks)
    }


def check_fields(settings: Any) -> None:
    """Check every field as its type declares, and what the command line's parser checks of its
    strings, for values that come from Python.

    Raises:
        UserError: names the first flag that is wrong, or all that have to be given and are not.
    """
    missing = []
    for name, kinds, marks in declarations(type(settings)):
        value, flag = getattr(settings, name), flag_of(name)
        _check_value(flag, kinds, marks, value)
        if REQUIRED in marks and not value:
            missing.append(flag)
    check_given(missing)


def check_recorded(settings: type, recorded: Mapping[str, Any], marked: Sequence[str]) -> None:
    """Check settings that a run has on record: each one that results depend on, of the type and
    with the values that its field declares.

    Args:
        settings: the dataclass.
        recorded: as :func:`identity` gives them; what a later version added may be missing.
        marked: fields that are recorded as marks of other runs: texts or nothing.

    Raises:
        UserError: names the flag that is wrong, or what is no flag.
    """
    declared = {n: (k, marks) for n, k, marks in declarations(settings) if IDENTITY in marks}
    for name, value in recorded.items():
        if name not in declared:
            raise UserError("settings", "those of this job", shortened(f"also {name!r}"), "")
        kinds, marks = declared[name]
        allowed = [None, list[str]] if name in marked else [_in_json(kind) for kind in kinds]
        wrongs = [misfit(value, type(None) if kind is None else kind) for kind in allowed]
        if all(wrongs):
            raise UserError(flag_of(name), "a value of its type", wrongs[0], "")
        if name not in marked:
            given = tuple(value) if isinstance(value, list) else value
            _check_value(flag_of(name), kinds, marks, given)


def flag_of(name: str) -> str:
    """The flag of a settings field: ``batch_tokens`` is ``--batch-tokens``."""
    return f"--{name.replace('_', '-')}"


def _in_json(kind: Any) -> Any:
    """The type that a field's value has once it is recorded."""
    if get_origin(kind) is Literal:
        return str
    return list[get_args(kind)[0]] if get_origin(kind) is tuple else kind  # type: ignore[misc]


def _check_value(flag: str, kinds: Sequence[Any], marks: Sequence[Any], value: Any) -> None:
    if value is None and type(None) in kinds:
        return
    choices = [choice for k in kinds if get_origin(k) is Literal for choice in get_args(k)]
    if choices and value not in choices:
        raise UserError(flag, f"one of {', '.join(choices)}", repr(value), "")
    plain = [_PLAIN[kind] for kind in kinds if kind in _PLAIN]
    if plain and not any(
        isinstance(value, t) and isinstance(value, bool) <= (t is bool) for _, t in plain
    ):
        raise UserError(flag, plain[0][0], shortened(repr(value)), "")
    for mark in marks:
        if isinstance(mark, Checked):
            mark.check(flag, value)


# The types that a field of one may hold, and what they are called.
_PLAIN: dict[Any, tuple[str, Any]] = {
    int: ("a whole number", Integral),
    float: ("a number", Real),
    bool: ("True or False", bool),
    str: ("a text", (str, os.PathLike)),
}


def check_given(missing: Sequence[str]) -> None:
    """Refuse flags that have no value and need one, if there are any.

    Raises:
        UserError: names all of them.
    """
    if missing:
        raise UserError(", ".join(missing), "a value", "nothing", f"Give {' and '.join(missing)}.")


def declarations(settings: type) -> Iterator[tuple[str, list[Any], list[Any]]]:
    """Every field of a dataclass of settings, in order.

    Yields:
        its name, the types that its value may have, and what is declared beside them.
    """
    hints = _hints(settings)
    for field in dataclasses.fields(settings):
        kinds: list[Any] = []
        marks: list[Any] = []
        _take_apart(hints[field.name], kinds, marks)
        yield field.name, kinds, marks


@cache
def _hints(settings: Any) -> dict[str, Any]:
    """The types of a dataclass' fields, which take longer to find out than to look at."""
    return get_type_hints(settings, include_extras=True)


def _take_apart(hint: Any, kinds: list[Any], marks: list[Any]) -> None:
    if get_origin(hint) is Annotated:
        marks += hint.__metadata__
        _take_apart(hint.__origin__, kinds, marks)
    elif type(None) in get_args(hint):  # a union
        for one in get_args(hint):
            _take_apart(one, kinds, marks)
    else:
        kinds.append(hint)


def _recorded(value: Any) -> Any:
    if isinstance(value, (tuple, list)):
        return [_recorded(v) for v in value]
    return shown(value) if isinstance(value, str) else value
