"""``run.json``: what a directory holds, of which settings, and what of it is complete."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from functools import cache
from importlib.metadata import version
from typing import Any

import torch

from raycurv import __version__
from raycurv.errors import DamagedFile, UserError, user_errors
from raycurv.files.store import Store
from raycurv.files.tables import SCHEMA_VERSION

NAME = "run.json"

# What the jobs put into a directory. Without a run.json these names belong to somebody else.
_OURS = (
    "blocks.json", "data", "labels", "factors", "eigen", "corrected", "rows", "gradients",
    "tables", "scores", "self", "ihvp", "weights", "saliency", "model", "work",
)  # fmt: skip


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
        more = {
            "schema": SCHEMA_VERSION,
            "versions": dict(_versions()),
            "threads": torch.get_num_threads(),
        }
        store.write_json(NAME, asdict(self) | more)

    def took(self, store: Store, seconds: Mapping[str, float]) -> None:
        """Add what phases have taken, and write ``run.json``."""
        for name, more in seconds.items():
            self.seconds[name] = self.seconds.get(name, 0.0) + more
        self.write(store)

    @classmethod
    def finished(cls, store: Store, job: str, phase: str, what: str) -> Manifest:
        """The manifest of a directory in which a job has finished, which made ``what``;
        UserError if there is none, or ``phase``, the job's last, is not complete."""
        found = cls.read(store)
        if found is None or found.job != job or phase not in found.complete:
            raise UserError(
                store.root,
                f"{what} of {job}.py",
                "none",
                f"Run {job}.py, or the same command again if it was stopped.",
            )
        return found

    @classmethod
    def read(cls, store: Store) -> Manifest | None:
        """The manifest of a directory, ``None`` when there is no ``run.json``; DamagedFile if
        that is not JSON, UserError if it is another program's."""
        try:
            content = store.read_json(NAME)
        except DamagedFile as error:
            raise DamagedFile(
                error.where, error.expected, error.got,
                "Restore it, or give another directory: what it said cannot be made again.",
            ) from error  # fmt: skip
        if content is None:
            return None
        keys = [one.name for one in fields(cls)]
        if not isinstance(content, dict) or any(key not in content for key in keys):
            raise UserError(
                store.path(NAME),
                "a run.json of raycurv",
                "another file of that name",
                "Give another --out.",
            )
        return cls(**{key: content[key] for key in keys})


@cache
def _versions() -> Mapping[str, str]:
    """What this process runs on; reading the packages' metadata takes longer than a small phase."""
    # raycurv itself may be a working directory that was sent along, which is not installed.
    names = ("torch", "transformers", "pyarrow")
    others = {name: version(name) for name in names} | {"python": platform.python_version()}
    return {"raycurv": __version__} | others


def continue_or_refuse(
    store: Store, wanted: Manifest, usual: Mapping[str, Any] | None = None
) -> Manifest:
    """The directory's manifest if it is the same run, ``wanted`` if the directory is new.

    A directory in which nothing was computed yet counts as new: after a mistake in the data, say,
    the corrected data are other data.

    Args:
        usual: the values of settings that the run which is there does not know of.

    Raises:
        UserError: it holds another run (names everything that differs) or files of somebody else,
            or cannot be written.
    """

    def refuse(expected: str, got: str, remedy: str = "Give another --out.") -> UserError:
        return UserError(f"--out {store.root}", expected, got, remedy)

    there = Manifest.read(store)
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
    before = {**(usual or {}), **there.settings}
    differences = [
        f"--{key.replace('_', '-')} was {before.get(key)!r} and is now {value!r}"
        for key, value in wanted.settings.items()
        if before.get(key) != value
    ]
    for key, value in wanted.fingerprints.items():
        differences += _differences(key, there.fingerprints.get(key, {}), value)
    if differences and not _computed(store, there):
        for name in ("data", "labels", "factors", "eigen", "gradients", "work"):
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
    out, remedy = f"--out {store.root}", "Give another --out, or correct its permissions."
    with user_errors(out, "a directory that can be written", remedy, OSError, got="{error}"):
        wanted.write(store)


def _computed(store: Store, there: Manifest) -> bool:
    """Whether the directory holds more than examples, the layout and what waits for a stage."""
    passes = [
        name
        for name in store.names("work")
        if not name.startswith(("work/queries/", "work/train/", "work/layout/", "work/spool/"))
        and not name.endswith("/gathers.json")
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
