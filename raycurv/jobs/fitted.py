"""A finished fit, as what follows it takes it: its manifest, and the model that it was made of."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from typing import Any

from raycurv.driver.settings import IN_MEMORY
from raycurv.errors import UserError
from raycurv.files.manifest import Manifest
from raycurv.files.store import Store, open_store
from raycurv.jobs.fit.fit_settings import FitSettings
from raycurv.jobs.inputs import Inputs
from raycurv.mathematics.loss.objective import Objective
from raycurv.models.model import Model


@dataclass(frozen=True)
class Fitted:
    """A finished fit, with the model that it was made of.

    Attributes:
        store: of its run.
        manifest: of its run.
        network: the model, checked to be the one that was fitted.
        objective: whose loss was fitted: its name, or itself.
    """

    store: Store
    manifest: Manifest
    network: Model
    objective: str | Objective

    @property
    def settings(self) -> dict[str, Any]:
        """What the fit depends on, by name."""
        return self.manifest.settings


def open_fitted(run: str, inputs: Inputs) -> Fitted:
    """The fit that a job follows.

    Args:
        run: its directory.
        inputs: may hold its model and its objective.

    Raises:
        UserError: no finished fit there, or its model is not there or has changed since.
    """
    store = open_store(run, "--run")
    fit = read_fit(store)
    held = inputs.model is not None or inputs.network is not None
    network = inputs.open_model("" if held else fitted_model(fit, store.root))
    check_model(fit, network, store.root)
    objective = inputs.fit_objective
    return Fitted(
        store, fit, network, fit.settings["objective"] if objective is None else objective
    )


def read_fit(store: Store, flag: str = "") -> Manifest:
    """The manifest of a finished fit.

    Args:
        store: of the run.
        flag: what named it, for errors; ``--run`` by default.

    Raises:
        UserError: no run there, another job's, or one that is not finished.
    """
    flag = flag or f"--run {store.root}"
    fit = Manifest.read(store)
    if fit is None or fit.job != "fit":
        raise UserError(
            flag,
            "a directory that fit.py made",
            "no run.json" if fit is None else f"results of {fit.job}",
            "Fit first: python jobs/fit.py --model … --data … --out RUN.",
        )
    if "tables" not in fit.complete:
        raise UserError(
            flag,
            "a finished fit",
            f"one that got as far as {', '.join(fit.complete) or 'its settings'}",
            "Run the same fit again: it goes on where it stopped.",
        )
    return fit


def check_model(fit: Manifest, network: Model, run: str) -> None:
    """Refuse a model that is not the one that was fitted.

    Raises:
        UserError: a tensor differs.
    """
    here, there = network.fingerprint(), fit.fingerprints["model"]
    changed = sorted(k for k in here.keys() | there.keys() if here.get(k) != there.get(k))
    if changed:
        raise UserError(
            f"the model {network.name}",
            f"the one that {run} was fitted on",
            f"{len(changed)} other tensors, the first {changed[0]}",
            "Restore the checkpoint, or fit again into another directory.",
        )


def fitted_model(fit: Manifest, run: str) -> str:
    """Where the model of a fit lies; a callable that :func:`raycurv.fit` was given lies nowhere."""
    model: str = fit.facts["model"]
    if model == IN_MEMORY:
        raise UserError(
            f"--run {run}", "a fit whose model has a path or a name", "one of a callable in memory",
            "Call raycurv.fit with the same arguments again: its run knows the model.",
        )  # fmt: skip
    return model


def fit_command(fit: Manifest, out: str, **other: Any) -> str:
    """The command that makes a fit again, for a remedy.

    Args:
        fit: which.
        out: its run directory, or another one.
        **other: settings that the new fit has instead of this one's.
    """
    said = fit.settings | {"model": fit.facts["model"], "data": fit.facts["data"]} | other
    # Runs that it started from are recorded by what they are of; where they lay is a fact.
    said |= {how: fit.facts[how] for how in ("extend", "merge", "subtract") if how in fit.facts}
    if IN_MEMORY in (said["model"], said["data"]):
        given = ", ".join(f"{key}={value!r}" for key, value in other.items())
        return f"raycurv.fit(…, out={out!r}, {given})"
    # What follows from other flags need not be said; these two always are.
    usual = FitSettings(method=said["method"], dtype=said["dtype"]).resolved()
    words = ["python", "jobs/fit.py"]
    for key, value in {**said, "out": out}.items():
        known = key not in ("method", "dtype") and value == _plain(getattr(usual, key))
        if value is None or known:
            continue
        flag = f"--{key.replace('_', '-')}"
        if value is True:
            words.append(flag)
        elif key == "blocks":
            words += [word for glob in value for word in (flag, glob)]
        else:
            words += [flag, *map(str, value if isinstance(value, list) else [value])]
    return shlex.join(words)


def _plain(value: Any) -> Any:
    """As JSON has it."""
    return list(value) if isinstance(value, tuple) else value
