"""``run.json``: what a directory holds, of which settings, and what of it is complete."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from functools import cache
from importlib.metadata import version
from typing import Any

import torch

from raycurv import __version__
from raycurv.errors import DamagedFile, DiskError, NoSpace, UserError, shortened
from raycurv.files.store import Store
from raycurv.jsonfile import made_of, misfit
from raycurv.models.config_print import config_changes

NAME = "run.json"

_LOST = "Restore it, or give another directory: what it said cannot be made again."
# What jobs write down as facts, by name; whole numbers are counts.
_FACTS: dict[str, Any] = {
    "model": str, "adapter": list[str], "data": str, "run": str, "queries": str, "train": str,
    "extend": list[str], "merge": list[str], "subtract": list[str],
    "examples": int, "tokens": int, "examples_without_loss": int, "queries_scored": int,
    "passes": int, "weights": int, "subtracted_with_other_labels": int,
    "tokenizer": dict[str, Any], "tokenizer_directory": str, "longest": int | None,
    "gradients": dict[str, Any], "reading": dict[str, dict[str, Any]], "model_notes": list[str],
    "coverage": dict[str, Any], "unreached_shares": dict[str, float],
    "files": dict[str, int | dict[str, int]], "steps": list[dict[str, Any]],
    "candidates": dict[str, int | dict[str, float | None]], "residual": float, "sparsity": float,
    "damping": dict[str, str | float], "solver": dict[str, Any],
    "loss": float, "loss_per_target": float,
    "perplexity": float, "accuracy": float, "predicted": float | None, "measured": float | None,
    "correlation": float | None, "pruned_loss": float | None,
}  # fmt: skip

_COVERAGE: dict[str, Any] = {"trainable": int, "covered": int}

# What the jobs put into a directory. Without a run.json these names belong to somebody else.
_OURS = (
    "blocks.json", "data", "labels", "factors", "eigen", "corrected", "rows", "gradients",
    "tables", "scores", "candidates", "check", "self", "ihvp", "weights", "saliency", "model",
    "work",
)  # fmt: skip

# Of what lies in work/, what is made before anything is computed.
_PREPARED = tuple(f"work/{name}/" for name in ("queries", "train", "candidates", "layout", "spool"))

# Fingerprints of what need not be given: where it is not any more, something else is meant.
_NOT_ALWAYS = ("tokenizer", "candidates", "removals")
# Fingerprints that earlier versions did not write down of every job.
_LATER = ("model", "config")
# Of names on the hub that may mean another commit some day, by their flags: which they meant.
COMMITS = "commits"


@dataclass
class Manifest:
    """What ``run.json`` says.

    Attributes:
        settings: those that the result depends on.
        fingerprints: of model and data.
        facts: counts and the like, filled in as they are known.
        complete: names of finished phases.
        seconds: of each phase, added up over restarts.
    """

    job: str
    settings: dict[str, Any]
    fingerprints: dict[str, Any]
    facts: dict[str, Any] = field(default_factory=dict)
    complete: list[str] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)

    def write(self, store: Store) -> None:
        """Write ``run.json``, atomically."""
        more = {"versions": dict(_versions()), "threads": torch.get_num_threads()}
        store.write_json(NAME, asdict(self) | more)

    def took(self, store: Store, seconds: Mapping[str, float]) -> None:
        """Add what phases have taken, and write ``run.json``."""
        for name, more in seconds.items():
            self.seconds[name] = self.seconds.get(name, 0.0) + more
        self.write(store)

    @classmethod
    def read(cls, store: Store) -> Manifest | None:
        """The manifest of a directory, ``None`` when there is no ``run.json``.

        Raises:
            DamagedFile: that is no JSON, not what was written, or holds what no job writes.
            UserError: it is another program's, or a newer version's.
        """
        content = store.read_json(NAME, _LOST)
        if content is None:
            return None
        if not content.keys() >= _KEYS:
            raise UserError(
                store.path(NAME),
                "a run.json of raycurv",
                "another file of that name",
                "Give another --out.",
            )
        try:
            found = made_of(cls, {key: content[key] for key in _KEYS})
            _check(found)
        except ValueError as error:
            raise DamagedFile(
                store.path(NAME), "what a job wrote down", str(error), _LOST
            ) from error
        return found


_KEYS = {one.name for one in fields(Manifest)}


def _check(found: Manifest) -> None:
    """Refuse, with a ValueError, what no job writes."""
    if len(set(found.complete)) < len(found.complete):
        raise ValueError(f"a phase is complete twice: {', '.join(found.complete)}")
    if any(seconds < 0 for seconds in found.seconds.values()):
        raise ValueError("a phase took less than no time")
    for name, value in found.facts.items():
        kind = _FACTS.get(name, Any)
        wrong = misfit(value, kind)
        if not wrong and kind is int and value < 0:
            wrong = str(value)
        if wrong:
            raise ValueError(f"{shortened(name)!r} is {wrong}")
    for name, counts in found.facts.get("coverage", {}).items():
        wrong = misfit(counts, _COVERAGE.get(name, dict[str, int]))
        if wrong:
            raise ValueError(f"{shortened(name)!r} of the coverage is {wrong}")


@cache
def _versions() -> Mapping[str, str]:
    """What this process runs on; reading the packages' metadata takes longer than a small phase."""
    # raycurv itself may be a working directory that was sent along, which is not installed.
    names = ("torch", "transformers", "pyarrow")
    others = {name: version(name) for name in names} | {"python": platform.python_version()}
    return {"raycurv": __version__} | others


def continue_or_refuse(
    store: Store, there: Manifest | None, wanted: Manifest, otherwise: Sequence[str] = ()
) -> Manifest:
    """The directory's manifest if it is the same run, ``wanted`` if the directory is new.

    A directory in which nothing was computed yet counts as new: after a mistake in the data, say,
    the corrected data are other data.

    Args:
        store: of the directory.
        there: what its ``run.json`` says, with the usual values of settings that it does not know.
        wanted: the run that is to be.
        otherwise: what else is known to differ, in words.

    Raises:
        UserError: it holds another run (names everything that differs) or files of somebody else,
            or cannot be written.
    """

    def refuse(expected: str, got: str, remedy: str = "Give another --out.") -> UserError:
        return UserError(f"--out {store.root}", expected, got, remedy)

    if there is None:
        others = [name for name in _OURS if store.there(name)]
        if others:
            got = f"one that holds {', '.join(others)} and no {NAME}"
            raise refuse(f"a new directory, or one with a {NAME}", got)
        _begin(store, wanted)
        return wanted
    if there.job != wanted.job:
        expected = f"a new directory, or one of this job ({wanted.job})"
        raise refuse(expected, f"one of the job {there.job}")
    differences = [
        f"--{key.replace('_', '-')} was {there.settings.get(key)!r} and is now {value!r}"
        for key, value in wanted.settings.items()
        if there.settings.get(key) != value
    ]
    none: dict[str, Any] = {key: {} for key in _NOT_ALWAYS if key in there.fingerprints}
    prints = none | wanted.fingerprints
    # The same files may have been given by another name, or by where they lie.
    then, now = there.fingerprints.get(COMMITS), prints.pop(COMMITS, {})
    differences += [
        f"{name} was the commit {then[name]} and is now {commit} (@{then[name]} goes on with it)"
        for name, commit in now.items()
        if isinstance(then, Mapping) and then.get(name, commit) != commit
    ]
    for key, value in prints.items():
        if key in _LATER and key not in there.fingerprints:
            continue
        said = there.fingerprints.get(key, {})
        if key != "config":
            differences += _differences(key, said, value)
        elif changes := config_changes(said, value):
            differences.append(f"the configuration is another one ({'; '.join(changes)})")
    differences += otherwise
    if differences and not _computed(store, there):
        for name in ("data", "labels", "factors", "eigen", "gradients", "candidates", "work"):
            store.delete_directory(name)
        store.delete("blocks.json")
        _begin(store, wanted)
        return wanted
    if differences:
        raise refuse(
            "a new directory, or the run that it holds",
            "; ".join(differences),
            "Give another --out, or the settings of the run that is there.",
        )
    # The same model and data may lie elsewhere by now.
    there.facts |= wanted.facts
    return there


def _begin(store: Store, wanted: Manifest) -> None:
    try:
        wanted.write(store)
    except NoSpace:
        raise
    except (OSError, DiskError) as error:
        got = error.got if isinstance(error, DiskError) else str(error)
        raise UserError(
            f"--out {store.root}", "a directory that can be written", got,
            "Give another --out, or correct its permissions.",
        ) from error  # fmt: skip


def _computed(store: Store, there: Manifest) -> bool:
    """Whether the directory holds more than examples, the layout and what waits for a stage."""
    passes = [
        name
        for name in store.names("work")
        if not name.startswith(_PREPARED) and not name.endswith("/gathers.json")
    ]
    return bool(passes) or any(phase != "layout" for phase in there.complete)


def _differences(what: str, there: Any, here: Any) -> list[str]:
    if there == here:
        return []
    if isinstance(there, Mapping) and isinstance(here, Mapping):
        gone = sorted(set(there) - set(here))
        new = sorted(set(here) - set(there))
        changed = sorted(k for k in set(there) & set(here) if there[k] != here[k])
        named = [f"{k} changed" for k in changed[:2]]
        named += [f"{k} is gone" for k in gone[:2]] + [f"{k} is new" for k in new[:2]]
        count = len(gone) + len(new) + len(changed)
        more = "" if count <= len(named) else f" and {count - len(named)} more"
        return [f"the {what} is another one ({', '.join(named)}{more})"]
    return [f"the {what} is another one"]
