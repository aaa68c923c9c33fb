"""What ``run.json`` of a directory says, with the settings of its job checked."""

from __future__ import annotations

from typing import Any

from raycurv.driver.settings import check_recorded, identity
from raycurv.errors import DamagedFile, UserError, shortened
from raycurv.files.manifest import NAME, Manifest
from raycurv.files.store import Store
from raycurv.jobs.registry import JOBS
from raycurv.jsonfile import misfit

# Facts and fingerprints that a job has written down by the time that its last phase is complete.
_WRITTEN: dict[str, tuple[str, dict[str, Any], tuple[str, ...]]] = {
    "fit": ("tables", {"model": str, "data": str, "examples": int}, ("model", "data")),
    "influence": ("scores", {"files": dict[str, dict[str, int]]}, ("fit", "queries")),
    "prune": ("tables", {"files": dict[str, int], "sparsity": float}, ("fit",)),
    "evaluate": ("tables", {"examples": int, "tokens": int, "targets": int}, ("model", "data")),
    "spectrum": ("tables", {"spectrum": dict[str, Any]}, ("model",)),
}
# Fingerprints of data, and what they may say that was taken of it.
_SELECTED, _TAKEN = ("data", "queries", "train"), {"split": str, "columns": dict[str, str]}
# Settings that name other runs are recorded by what these are of.
_MARKED = ("extend", "merge", "subtract")
# Settings of a fit that its first version did not know, and what stands for how that went about it.
_LATER: dict[str, Any] = {
    "basis": "kfac",
    "basis_passes": None,
    "empty": "error",
    "ignore_tensors": [],
    "loss_on": None,
    "merge_adapter": False,
    "share_output_factor": False,
}


def read_run(store: Store) -> Manifest | None:
    """The manifest of a directory, ``None`` when there is none; settings that came with a later
    version have the value that they had before there were any.

    Raises:
        DamagedFile: ``run.json`` is not what a job wrote.
        UserError: it is another program's, or a newer version's.
    """
    found = Manifest.read(store)
    if found is None:
        return None
    place = store.path(NAME)
    if found.job not in JOBS or not JOBS[found.job].leaves:
        raise UserError(
            place, f"results of {', '.join(j.name for j in JOBS.values() if j.leaves)}",
            f"those of {shortened(repr(found.job))}", "Use the version of raycurv that made them.",
        )  # fmt: skip
    settings = JOBS[found.job].load_settings()
    try:
        check_recorded(settings, found.settings, _MARKED)
    except UserError as error:
        raise DamagedFile(
            place, f"{error.where} of the {found.job} as {error.expected}", error.got,
            "Restore the file, or use the version of raycurv that wrote it.",
        ) from error  # fmt: skip
    last, facts, prints = _WRITTEN[found.job]
    if last in found.complete:
        wrong = [
            n for n, kind in facts.items() if n not in found.facts or misfit(found.facts[n], kind)
        ]
        prints = (*prints, *(name for name in ("train",) if name in found.fingerprints))
        wrong += [name for name in prints if not isinstance(found.fingerprints.get(name), dict)]
        wrong += [
            f"{name}, {what}" for name in _SELECTED for what, kind in _TAKEN.items()
            if isinstance(said := found.fingerprints.get(name), dict)
            and what in said and misfit(said[what], kind)
        ]  # fmt: skip
        if wrong:
            raise DamagedFile(
                place, f"what a finished {found.job} wrote down", f"nothing as {', '.join(wrong)}",
                "Restore the file, or run the job again into another directory.",
            )  # fmt: skip
    before: dict[str, Any] = identity(settings(), inputs=False)
    before |= {name: None for name in _MARKED if name in before}
    found.settings = before | found.settings
    return found


def fit_settings(fit: Manifest) -> dict[str, Any]:
    """The settings of a fit as what follows it has them on record: later ones only where they are
    not as in the first version, so that results on a run of that version are known again."""
    said = fit.settings.items()
    return {name: value for name, value in said if (name, value) not in _LATER.items()}


def fit_prints(fit: Manifest) -> dict[str, Any]:
    """Fingerprints that tell a fit from others, as what follows it has them on record."""
    mark = {"settings": fit_settings(fit), "data": fit.fingerprints["data"]}
    own = {name: fit.fingerprints[name] for name in ("model", "config") if name in fit.fingerprints}
    return {"fit": mark} | own


def is_of_fit(followed: Manifest, fit: Manifest) -> bool:
    """Whether results came from a fit, as far as they say; earlier versions did not name models."""
    said = followed.fingerprints
    return all(said.get(name, value) == value for name, value in fit_prints(fit).items())


def finished(store: Store, job: str, phase: str, what: str) -> Manifest:
    """The manifest of a directory in which a job has finished.

    Args:
        store: of the directory.
        job: its name.
        phase: its last one.
        what: it made, for the message.

    Raises:
        UserError: there is none, or ``phase`` is not complete.
        DamagedFile: see :func:`read_run`.
    """
    found = read_run(store)
    if found is None or found.job != job or phase not in found.complete:
        got = "none"
        if found is not None:
            got = f"those of {found.job}" if found.job != job else "ones that are not finished"
        raise UserError(
            store.root,
            f"{what} of {job}.py",
            got,
            f"Run {job}.py, or the same command again if it was stopped.",
        )
    return found
