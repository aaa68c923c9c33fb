"""A finished fit, as what follows it takes it: its manifest, and the model that it was made of."""

from __future__ import annotations

from raycurv.driver.settings import IN_MEMORY
from raycurv.errors import UserError
from raycurv.files.manifest import Manifest
from raycurv.files.store import Store
from raycurv.models.model import Model


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
