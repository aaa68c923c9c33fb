"""The runs that a fit starts from, where it does: opened, and refused unless they fit together.

    extend     one run, whose bases stay: Λ sums and counts of new data are added to its own
    merge      A, G and counts of several runs, added; Λ is refitted by a pass over all their data
    subtract   those of the first run less those of the others; Λ is refitted on what is left

Any orthonormal basis is valid for EK-FAC, since Λ is fitted in it: an extended run is exact in the
bases that it took over, which are not those of all its data.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, get_args

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from raycurv.driver.corpus import Corpus, corpus_of_run, described_alike, one_array
from raycurv.driver.settings import identity
from raycurv.errors import UserError
from raycurv.files.artifacts import factor_file, keeps_sum, read_blocks
from raycurv.files.manifest import Manifest
from raycurv.files.store import Store, open_store
from raycurv.files.tables import IDS, read_directory
from raycurv.files.tensorfile import is_complete
from raycurv.jobs.fit.fit_settings import REPEATED, FitSettings
from raycurv.jobs.fitted import check_model, columns_given, read_fit
from raycurv.jobs.recorded import fit_settings
from raycurv.mathematics.blocks import Block
from raycurv.mathematics.factors import factors_of
from raycurv.mathematics.methods import Method, methods_with, open_method
from raycurv.models.model import Model

Array = np.ndarray[Any, Any]
How = Literal["extend", "merge", "subtract"]

# What runs that are put together must share, or their sums mean different things.
SHARED = tuple(
    name
    for name in identity(FitSettings(), inputs=False)
    if name not in ("max_examples", "extend", "merge", "subtract")
)


@dataclass(frozen=True)
class Parent:
    """A finished run that another starts from.

    Attributes:
        flag: how it was asked for, for errors.
        blocks: with their input factors.
    """

    flag: str
    store: Store
    fit: Manifest
    blocks: tuple[Block, ...]

    @property
    def mark(self) -> str:
        """Tells this run from others by what it was made of, wherever it lies."""
        said = json.dumps([fit_settings(self.fit), self.fit.fingerprints], sort_keys=True)
        return hashlib.blake2b(said.encode(), digest_size=8).hexdigest()

    @property
    def factors(self) -> list[str]:
        """Names of all its factors."""
        return sorted(factors_of(self.blocks))

    @cached_property
    def corpus(self) -> Corpus:
        """The examples in its directory; of an extended run only those that it was extended by; see
        :func:`corpus_of_run`."""
        return corpus_of_run(self.store)

    @cached_property
    def ids(self) -> pa.LargeStringArray:
        """Ids of all examples that entered its curvature."""
        return one_array(read_directory(self.store, "tables/examples", IDS, needed=True)["id"])


@dataclass(frozen=True)
class Parents:
    """What a fit starts from.

    Attributes:
        how: ``None`` for a fit that starts from nothing.
        runs: one to extend; two or more to merge, or to subtract from the first.
    """

    how: How | None = None
    runs: tuple[Parent, ...] = ()

    def __str__(self) -> str:
        first, *others = (run.store.root for run in self.runs)
        if self.extended is not None:
            count = self.extended.fit.facts["examples"]
            return f"extending {first}, whose bases stay, by these: it is of {count:,} examples"
        return f"{first} {'and' if self.how == 'merge' else 'without'} {', '.join(others)}"

    def marks(self) -> dict[str, Any]:
        """For ``run.json``: the marks of the runs, as part of what the result means."""
        mine = [run.mark for run in self.runs]
        return {how: mine if how == self.how else None for how in get_args(How)}

    def places(self) -> dict[str, list[str]]:
        """For ``run.json``: where the runs lay."""
        return {} if self.how is None else {self.how: [run.store.root for run in self.runs]}

    def facts(self, corpus: Corpus) -> dict[str, Any]:
        """For ``run.json``: counts of all examples, those of an extended run with them."""
        base = {} if self.extended is None else self.extended.fit.facts
        return {
            "examples": base.get("examples", 0) + len(corpus),
            "tokens": base.get("tokens", 0) + corpus.tokens,
            "tokenizer": corpus.tokenizer or base.get("tokenizer", {}),
            "examples_without_loss": base.get("examples_without_loss", 0)
            + len(corpus) - corpus.terms,
        }  # fmt: skip

    def tokenizer(self) -> dict[str, Any]:
        """What an extended run says of its tokenizer; empty for none."""
        found: dict[str, Any] = {}
        return found if self.extended is None else self.extended.fit.facts.get("tokenizer", found)

    @property
    def extended(self) -> Parent | None:
        """The run that is extended, if one is."""
        return self.runs[0] if self.how == "extend" else None

    def read_otherwise(self, data: Mapping[str, Any]) -> list[str]:
        """What an extended run was told of how its data is read, and this one was not: in words.

        Args:
            data: fingerprint of this one's.
        """
        fit = None if self.extended is None else self.extended.fit
        flags = "" if fit is None else columns_given(fit.fingerprints["data"])
        if not flags or columns_given(data):
            return []
        return [f"the extended run read its data with {flags}, which is not given here"]

    @property
    def combined(self) -> bool:
        """Whether data and factors come from the runs alone."""
        return self.how in ("merge", "subtract")

    @cached_property
    def kept(self) -> list[tuple[Parent, Array]]:
        """Of each run the numbers of the examples that the combined run has, in order."""
        if self.how == "merge":
            return [(run, np.arange(len(run.corpus))) for run in self.runs]
        first, *others = self.runs
        gone = pa.concat_arrays([run.corpus.ids for run in others])
        return [(first, np.flatnonzero(places(first.corpus.ids, gone) < 0))]


def open_parents(settings: FitSettings, out: Store, network: Model) -> Parents:
    """The runs that the settings name.

    Raises:
        UserError: a run is not finished, of another model or of other settings, has not kept what
            is needed, is the output directory, or its examples do not go with the others'.
        DamagedFile: its files are not what its fit wrote.
    """
    how: How | None = next((h for h in get_args(How) if getattr(settings, h)), None)
    if how is None:
        return Parents()
    named = getattr(settings, how)
    runs = tuple(_open(how, name, out) for name in ((named,) if how == "extend" else named))
    for run in runs:
        check_model(run.fit, network, run.store.root)
    for run in runs[1:]:
        _check_settings(run, runs[0])
    _check_own_settings(runs[0], settings)
    parents = Parents(how, runs)
    if how == "extend":
        _check_corrected_sums(runs[0])
    else:
        _check_together(runs)
        (_check_merged if how == "merge" else _check_subtracted)(runs)
    return parents


def places(ids: pa.LargeStringArray, among: pa.LargeStringArray) -> Array:
    """Where each id stands among others, -1 where it does not; int32."""
    found: Array = pc.index_in(ids, value_set=among).fill_null(-1).to_numpy()
    return found


def check_new(parents: Parents, corpus: Corpus) -> None:
    """Refuse examples that the run which they extend has already; the error names the first."""
    if parents.extended is not None:
        twice = np.flatnonzero(places(corpus.ids, parents.extended.ids) >= 0)
        if len(twice):
            raise _twice(corpus.ids[int(twice[0])].as_py(), parents.extended.flag, "--data")


def _open(how: str, name: str, out: Store) -> Parent:
    flag = f"--{how}"
    store = open_store(name, flag)
    flag = f"{flag} {store.root}"
    if store == out:
        raise UserError(
            f"--out {out.root}", "a directory of its own", f"that of {flag}",
            "Give another --out: the runs that it starts from stay as they are.",
        )  # fmt: skip
    fit = read_fit(store, flag)
    method = open_method(fit.settings["method"])

    def fitting(method: Method) -> bool:
        return method.corrected if how == "extend" else method.factors

    if not fitting(method):
        raise UserError(
            flag, f"a run of --method {methods_with(fitting)}", f"one of {method}",
            "It has no corrected eigenvalues to add to: fit all the data together."
            if how == "extend" else "It has no factors to add: fit the data anew, or --extend it.",
        )  # fmt: skip
    if how != "extend" and fit.settings.get("extend"):
        raise UserError(
            flag, "a run whose factors are those of all its data", "one that was extended",
            "Its bases are those of the run before; fit its data anew with --keep-sums.",
        )  # fmt: skip
    return Parent(flag, store, fit, read_blocks(store))


def _differences(run: Parent, wanted: dict[str, Any]) -> list[str]:
    """Which of the shared settings differ; the seed counts where something was drawn by it."""
    own = _shared(run.fit)
    drawn = own["fisher"] != "empirical"
    return [key for key in SHARED if own[key] != wanted[key] and (key != "seed" or drawn)]


def _shared(fit: Manifest) -> dict[str, Any]:
    """Settings of a fit, with the defaults of those that its version did not have."""
    return identity(FitSettings(), inputs=False) | fit.settings


def _check_settings(run: Parent, first: Parent) -> None:
    own, wanted = _shared(run.fit), _shared(first.fit)
    differing = _differences(run, wanted)
    if differing:
        raise UserError(
            run.flag, f"the settings of {first.store.root}",
            "; ".join(f"{_flag(k)} {own[k]!r} against {wanted[k]!r}" for k in differing),
            "Fit one of the two again, into another directory, with the other's settings.",
        )  # fmt: skip


def _check_own_settings(run: Parent, settings: FitSettings) -> None:
    there, mine = _shared(run.fit), identity(settings, inputs=False)
    differing = _differences(run, mine)
    if differing:
        raise UserError(
            run.flag, "a run of the settings given",
            "; ".join(f"{_flag(k)} {there[k]!r}, and not {mine[k]!r}" for k in differing),
            f"Give {' '.join(_given(k, there[k]) for k in differing)}, as its fit was.",
        )  # fmt: skip


def _flag(key: str) -> str:
    return f"--{key.replace('_', '-')}"


def _given(key: str, value: Any) -> str:
    """A setting as it stands on a command line."""
    if value is None or value == []:
        return f"no {_flag(key)}"
    values = value if isinstance(value, list) else [value]
    return " ".join(
        f"{_flag(key)} {v!r}" if key in REPEATED else f"{_flag(key)} {v}" for v in values
    )


def _check_corrected_sums(run: Parent) -> None:
    """A mean rounded to bfloat16 times its count is no sum to go on from."""
    if run.fit.settings["store_dtype"] == "bfloat16":
        for block in run.blocks:
            if not keeps_sum(run.store, block):
                raise UserError(
                    run.flag, "corrected eigenvalues as sums (--keep-sums), or stored in float32",
                    f"block {block.name} in bfloat16 alone",
                    "Run its fit again with --keep-sums: it makes what is missing.",
                )  # fmt: skip


def _check_together(runs: Sequence[Parent]) -> None:
    first = runs[0]
    for run in runs:
        if run.blocks != first.blocks:
            raise UserError(
                run.flag, f"blocks that share their inputs as in {first.store.root}", "others",
                "Fit both again with the same model.",
            )  # fmt: skip
        tokenizers = (first.corpus.tokenizer, run.corpus.tokenizer)
        if not described_alike(*tokenizers):
            raise UserError(
                run.flag, f"the tokenizer of {first.store.root} ({tokenizers[0]})",
                str(tokenizers[1]), "Fit one of the two again with the other's tokenizer.",
            )  # fmt: skip
        gone = [f for f in run.factors if not is_complete(run.store, factor_file(f))]
        if gone:
            raise UserError(
                run.flag, "a run that has kept its factors' sums",
                f"none of {len(gone)} factors, the first {gone[0]}",
                "Run its fit again with --keep-sums: it makes what is missing.",
            )  # fmt: skip


def _check_merged(runs: Sequence[Parent]) -> None:
    for number, run in enumerate(runs[1:], start=1):
        ids = run.corpus.ids
        there = places(ids, pa.concat_arrays([other.corpus.ids for other in runs[:number]]))
        twice = np.flatnonzero(there >= 0)
        if len(twice):
            ends = np.cumsum([len(other.corpus) for other in runs[:number]])
            other = runs[int(np.searchsorted(ends, there[twice[0]], side="right"))]
            raise _twice(ids[int(twice[0])].as_py(), other.flag, run.flag)


def _check_subtracted(runs: Sequence[Parent]) -> None:
    first, *others = runs
    left = np.ones(len(first.corpus), bool)
    for run in others:
        there = places(run.corpus.ids, first.corpus.ids)
        wrong = np.flatnonzero((there < 0) | ~left[there])
        if len(wrong):
            n = int(wrong[0])
            raise UserError(
                f"example {run.corpus.ids[n].as_py()!r} of {run.flag}",
                f"one of the examples of {first.store.root}",
                "one that is subtracted already" if there[n] >= 0 else "none of that id",
                "Only what has entered a run once can be taken out of it, once.",
            )
        left[there] = False
    if not left.any():
        raise UserError(
            "--subtract", f"examples of {first.store.root} that are left", "none",
            "A run of nothing has no curvature.",
        )  # fmt: skip


def _twice(id: str, one: str, other: str) -> UserError:
    return UserError(
        f"example {id!r}", "an id of its own: every example counts once",
        f"the same id in {one} and in {other}",
        "Leave the example out of one of the two; if they are different ones, give the data a "
        "column `id`, or its files other names.",
    )  # fmt: skip
