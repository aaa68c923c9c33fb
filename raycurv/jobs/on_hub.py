"""What settings name on the Hugging Face hub, found there and brought to this machine.

Every name is found before anything is fetched. From there on settings hold it at its commit, which
is what is recorded, and :class:`Inputs` know where that lies. What a run directory names is looked
for in the hub's cache alone: nothing is fetched because a file says so.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

from raycurv.data.hub_data import bring_split
from raycurv.data.splits import Split
from raycurv.driver.settings import OnHub, declarations, flag_of
from raycurv.errors import some_of
from raycurv.hub import COMMIT, Commit, HubName, Snapshot, cached, find, hub_name
from raycurv.jobs.inputs import Inputs
from raycurv.models.hub_files import bring

S = TypeVar("S")


def brought(
    settings: S, inputs: Inputs, say: Callable[[str], None], weights: bool = True
) -> tuple[S, Inputs]:
    """Settings and inputs with what they name on the hub at its commit, and on this machine.

    Args:
        settings: of a job.
        inputs: of the same; a model that they name on the hub becomes one of the settings.
        say: tells a person what is brought.
        weights: whether a model's are wanted.

    Raises:
        UserError: a name that is neither a path nor to be had from the hub.
    """
    if isinstance(inputs.model, str) and hub_name(inputs.model, "model"):
        settings = replace(settings, model=inputs.model)  # type: ignore[type-var]
        inputs = replace(inputs, model=None)
    found: dict[tuple[str, str, str], Commit] = {}
    asked: dict[HubName, Commit] = {}
    changes: dict[str, Any] = {}
    commits: dict[str, str] = {}
    for field, what in _fields(type(settings)).items():
        value = getattr(settings, field)
        texts = (value,) if isinstance(value, str) else tuple(value)
        at = []
        for text in texts:
            name = None if text in inputs.snapshots else hub_name(text, _kind(what))
            if name is None:
                at.append(text)
                continue
            where = f"{flag_of(field)} {text}"
            commit = asked.get(name) or find(name, where)
            asked[name] = commit
            at.append(str(commit.name))
            found[at[-1], what, field if what == "data" else ""] = commit
            if name.revision != commit.name.revision:
                commits[where] = commit.name.revision
        changes[field] = at[0] if isinstance(value, str) else tuple(at)
    code = bool(getattr(settings, "trust_remote_code", False))
    snapshots = dict(inputs.snapshots)
    files = {}
    for (text, what, field), commit in found.items():
        say(f"{what} {commit.where}")
        if what == "data":
            files[field] = bring_split(commit, *_split_of(settings, field))
            say(f"{field}: {some_of(files[field].files, 3)}")
        else:
            snapshots[text] = bring(commit, what, weights, code)
    changed: S = replace(settings, **changes)  # type: ignore[type-var]
    return changed, replace(inputs, snapshots=snapshots, files=files, commits=commits)


def data_again(named: object, split: str, where: str, unfetched: str) -> Snapshot | None:
    """The files of a split of data that a run names, or a person again; nothing for a path.

    Args:
        split: as it was asked for.
        where: what names it, for messages.
        unfetched: why what is not in the cache is not fetched; empty where it is.

    Raises:
        UserError: they are not to be had.
    """
    name = hub_name(named, "dataset") if isinstance(named, str) else None
    if name is None or not (COMMIT.fullmatch(name.revision) or not unfetched):
        return None
    commit = cached(name, where, unfetched) if unfetched else find(name, where)
    return bring_split(commit, Split.parse("split", split).name if split else "", "split")


def _split_of(settings: Any, field: str) -> tuple[str, str]:
    """The name of the split that a setting of data is asked for, and the flag that says it."""
    name = "queries_split" if field == "queries" else "split"
    split = Split.parse(flag_of(name), text) if (text := getattr(settings, name)) else None
    return "" if split is None else split.name, flag_of(name)


def on_record(text: str) -> HubName | None:
    """The repository at a commit that a run directory names; nothing for a path."""
    name = hub_name(text, "model")
    return name if name is not None and COMMIT.fullmatch(name.revision) else None


def of_record(inputs: Inputs, run: str, **named: Sequence[str]) -> Inputs:
    """Inputs that know where the repositories lie which a run names, in the hub's cache.

    Args:
        run: its directory.
        **named: models and adapters as the run has them, paths among them; what settings name has
            been brought before.

    Raises:
        UserError: the cache does not have them.
    """
    snapshots = dict(inputs.snapshots)
    for what, texts in named.items():
        for text in texts:
            name = on_record(text)
            if name is not None and text not in snapshots:
                commit = cached(
                    name, f"--run {run}, which was made with {text}",
                    f"Give --{what} {text}, which fetches it: what a run directory names is not "
                    "fetched.",
                )  # fmt: skip
                snapshots[text] = bring(commit, what)
    return replace(inputs, snapshots=snapshots)


def _kind(what: str) -> str:
    return "dataset" if what == "data" else "model"


def _fields(settings: type) -> Mapping[str, str]:
    """Which fields may name what of the hub."""
    marks = {name: marks for name, _, marks in declarations(settings)}
    return {name: m.what for name, of in marks.items() for m in of if isinstance(m, OnHub)}
