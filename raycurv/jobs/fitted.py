"""A finished fit, as what follows it takes it: its manifest, and the model that it was made of.

A run directory may come from somebody else, so what it names is looked up as data and never
imported: an HF directory is opened where the run says that it lies, but a model or an objective
from Python must be given again, and is compared with what is on record.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from raycurv.data.column_names import COLUMNS
from raycurv.data.tokenizer import tokenizer_print
from raycurv.driver.settings import IN_MEMORY
from raycurv.errors import DamagedFile, UserError, shortened
from raycurv.files.artifacts import BLOCKS_FILE, read_blocks
from raycurv.files.manifest import Manifest
from raycurv.files.store import Store, open_store
from raycurv.jobs.fit.fit_settings import REPEATED, FitSettings
from raycurv.jobs.inputs import Inputs
from raycurv.jobs.on_hub import of_record, on_record
from raycurv.jobs.recorded import read_run
from raycurv.mathematics.blocks import Block
from raycurv.mathematics.choice import Globs, frozen_parameters, trained_part
from raycurv.mathematics.kinds.catalogue import FREE, describe
from raycurv.mathematics.loss.objective import Objective
from raycurv.mathematics.loss.shipped import is_shipped
from raycurv.models.adapter import Adapters
from raycurv.models.config_print import config_changes
from raycurv.models.model import Model
from raycurv.named_objects import is_named_object


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


@dataclass(frozen=True)
class GivenAgain:
    """What a job that follows a fit was given of what the fit was made of.

    Attributes:
        model: a path or a name; empty for nothing.
        adapter: directories of its adapters; empty for nothing.
        objective: the name of the fit's objective; empty for nothing.
        objective_flag: how that is given, for errors.
        trust_remote_code: whether the code of a model directory may run.
        tokenizer: directory of one; empty for the fit's own.
    """

    model: str
    adapter: tuple[str, ...]
    objective: str
    objective_flag: str
    trust_remote_code: bool
    tokenizer: str = ""


def open_fitted(run: str, inputs: Inputs, given: GivenAgain) -> Fitted:
    """The fit that a job follows.

    Args:
        run: its directory.
        inputs: may hold its model and its objective.
        given: by flags.

    Raises:
        UserError: no finished fit there; its model or its objective must be given again, or is
            another one; the model is not there or has changed since.
    """
    store = open_store(run, "--run")
    fit = read_fit(store)
    network = _network(fit, store.root, inputs, given)
    _take_tokenizer(fit, network, store.root, inputs.at(given.tokenizer))
    check_model(fit, network, store.root)
    held, flag = inputs.fit_objective, given.objective_flag
    objective = fitted_objective(fit, store.root, given.objective if held is None else held, flag)
    return Fitted(store, fit, network, objective)


def _network(fit: Manifest, run: str, inputs: Inputs, given: GivenAgain) -> Model:
    held = inputs.network is not None or inputs.model is not None
    ignored = fit.settings.get("ignore_tensors", ())
    if not (held or given.model):
        if given.trust_remote_code:
            raise UserError(
                "--trust-remote-code", "the directory whose code is trusted, by --model",
                f"only what {run} says of it", f"Give --model {fit.facts['model']}, too, if it is "
                "that one whose code you have read.",
            )  # fmt: skip
        model = fitted_model(fit, run)
        adapters = _adapters(fit, run, given)
        inputs = of_record(inputs, run, model=(model,), adapter=adapters.directories)
        return inputs.open_recorded(model, ignored, adapters)
    recorded, named = str(fit.facts["model"]), inputs.model if held else given.model
    names = isinstance(named, str) and is_named_object(named) and is_named_object(recorded)
    if names and named != recorded:
        raise UserError(
            f"--model {named}", f"{recorded}, which {run} was fitted on", "another name",
            f"Give --model {recorded}, or fit again into another directory.",
        )  # fmt: skip
    adapters = _adapters(fit, run, given)
    inputs = of_record(inputs, run, adapter=adapters.directories)
    return inputs.open_model(given.model, given.trust_remote_code, ignored, adapters)


def _adapters(fit: Manifest, run: str, given: GivenAgain) -> Adapters:
    """The fit's adapters: where they are given, else where the run says that they lie."""
    recorded: list[str] = fit.facts.get("adapter", [])
    gone = [place for place in recorded if not (on_record(place) or Path(place).is_dir())]
    if gone and not given.adapter:
        raise UserError(
            f"--run {run}", f"the adapter that it was fitted with, in {gone[0]}",
            "no such directory", "Give --adapter with where it lies by now.",
        )  # fmt: skip
    places = given.adapter or tuple(recorded)
    return Adapters(places, bool(fit.settings.get("merge_adapter", False)))


def _take_tokenizer(fit: Manifest, network: Model, run: str, given: str) -> None:
    """Let texts go through the fit's tokenizer, which may lie elsewhere by now; UserError for
    another one."""
    place = given or str(fit.facts.get("tokenizer_directory", ""))
    if not place:
        return
    here, there = tokenizer_print(place), fit.fingerprints.get("tokenizer")
    if there is not None and here != there:
        raise UserError(
            f"the tokenizer in {place}", f"the one that {run} was fitted with", "another one",
            "Give the fit's by --tokenizer, or fit again into another directory.",
        )  # fmt: skip
    network.tokenizer_dir = str(Path(place).absolute())


def fitted_objective(fit: Manifest, run: str, given: str | Objective, flag: str) -> str | Objective:
    """Whose loss was fitted.

    Args:
        fit: of the run.
        run: its directory.
        given: by the caller; empty for nothing.
        flag: how that is given, for errors.

    Raises:
        UserError: it must be given again, or is another one.
    """
    recorded = str(fit.settings["objective"])
    if not given:
        if is_shipped(recorded):
            return recorded
        raise _not_imported(run, "an objective", recorded, flag)
    name, wanted = given, recorded
    if not isinstance(given, str):
        # Of an object only the name of its class is on record.
        name, wanted = type(given).__name__, recorded.rpartition(":")[2]
    if name != wanted:
        raise UserError(
            f"{flag} {name}", f"{recorded}, whose loss {run} was fitted with", "another name",
            f"Give {flag} {recorded}, or fit again into another directory.",
        )  # fmt: skip
    return given


def columns_given(prints: Mapping[str, Any]) -> str:
    """The flags that said which columns of data are read, as a fingerprint of the data has them;
    empty for none."""
    taken = prints.get("columns", {}).items()
    return " ".join(f"--{COLUMNS[ours]}-column {theirs}" for ours, theirs in taken)


def read_fit(store: Store, flag: str = "") -> Manifest:
    """The manifest of a finished fit.

    Args:
        store: of the run.
        flag: what named it, for errors; ``--run`` by default.

    Raises:
        UserError: no run there, another job's, or one that is not finished.
    """
    flag = flag or f"--run {store.root}"
    fit = read_run(store)
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
        UserError: a tensor, or a value of the configuration, differs.
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
    values = config_changes(fit.fingerprints.get("config", {}), network.configuration())
    if values:
        raise UserError(
            f"the configuration of the model {network.name}",
            f"the one that {run} was fitted with",
            "; ".join(values),
            "Restore it (config.json), or fit again into another directory.",
        )


def fitted_blocks(store: Store, network: Model) -> tuple[Block, ...]:
    """The blocks of a finished fit.

    Args:
        store: of the fit.
        network: its model.

    Raises:
        DamagedFile: they are not what a fit wrote, or none of this model's.
    """
    blocks = read_blocks(store)
    modules = dict(network.skeleton().named_modules())
    frozen = frozen_parameters(network.skeleton())

    @cache
    def there(name: str, weights_alone: bool) -> frozenset[Block]:
        # The bias of a layer whose weight is shared is by itself.
        module = modules[name]
        found = (*describe(name, module, network.held), *FREE.describe(name, module))
        # Earlier fits took a bias that is frozen for a part of its layer's block.
        trained = (trained_part(block, modules[block.module], frozen) for block in found)
        return frozenset(_as_described(block, weights_alone) for block in (*found, *trained))

    for block in blocks:
        names, shared = {block.module, block.owner} & modules.keys(), bool(block.shared)
        known, wanted = set(block.shared) <= modules.keys(), _as_described(block, shared)
        if not known or not any(wanted in there(name, shared) for name in names):
            raise DamagedFile(
                store.path(BLOCKS_FILE), f"the blocks of the model {network.name}",
                f"{shortened(repr(block.name))}, which is none of them as it is described there",
                "Fit again into another directory.",
            )  # fmt: skip
    return blocks


def chosen_blocks(blocks: Sequence[Block], patterns: Sequence[str]) -> tuple[Block, ...]:
    """Those of a fit's blocks that ``--blocks`` names; UserError where these are none."""
    globs, names = Globs.of(patterns), [b.name for b in blocks]
    known = f"There are {', '.join(names[:5])}, …"
    globs.refuse_strangers(names, "a glob that matches a block of the fit", known)
    chosen = tuple(b for b in blocks if globs.take(b.name))
    if not chosen:
        raise UserError("--blocks", "at least one block of the fit", "none", "Widen the globs.")
    return chosen


def _as_described(block: Block, weight_alone: bool) -> Block:
    """What of a block its module decides: not what it shares, nor the form of its factors; without
    the bias where the weight is shared, and so stands alone."""
    if weight_alone:
        block = replace(block, d_in=block.d_in - block.bias, bias=False)
    return replace(
        block, input_factor="", shared=(), input_diagonal=False, output_diagonal=False,
        one_output="",
    )  # fmt: skip


def fitted_model(fit: Manifest, run: str) -> str:
    """The directory of a fit's model, or its name on the hub; UserError for a model from Python,
    which a run directory names but nobody imports because of that."""
    model = str(fit.facts["model"])
    if model == IN_MEMORY or (is_named_object(model) and not Path(model).is_dir()):
        raise _not_imported(run, "a model", model, "--model")
    if not (on_record(model) or Path(model).is_dir()):
        raise UserError(
            f"--run {run}", f"the model that it was fitted on, in {model}", "no such directory",
            "Give --model with where it lies by now (in Python model=).",
        )  # fmt: skip
    return model


def _not_imported(run: str, what: str, recorded: str, flag: str) -> UserError:
    """The mistake of a run that is followed without what it was fitted with."""
    argument = flag.removeprefix("--").replace("-", "_")
    remedy = f"Give {flag} {recorded} (in Python {argument}=), if you know what that is."
    if not is_named_object(recorded):
        remedy = (
            f"In Python, give it again as {argument}=, or call raycurv.fit with the same arguments "
            "again: its run knows it."
        )
    return UserError(
        f"--run {run}", f"{what} that is given again: a run directory names nothing that is "
        "imported", f"{recorded!r} on record", remedy,
    )  # fmt: skip


def fit_command(fit: Manifest, out: str, **other: Any) -> str:
    """The command that makes a fit again, for a remedy.

    Args:
        fit: which.
        out: its run directory, or another one.
        **other: settings that the new fit has instead of this one's.
    """
    said = fit.settings | {"model": fit.facts["model"], "data": fit.facts["data"]} | other
    said |= {"adapter": fit.facts["adapter"]} if "adapter" in fit.facts else {}
    if "tokenizer_directory" in fit.facts:
        said |= {"tokenizer": fit.facts["tokenizer_directory"]}
    taken = fit.fingerprints.get("data", {})
    said |= {"split": taken["split"]} if "split" in taken else {}
    said |= {
        f"{COLUMNS[ours]}_column": own
        for ours, own in taken.get("columns", {}).items()
        if ours in COLUMNS
    }
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
        elif key in REPEATED:
            words += [word for glob in value for word in (flag, glob)]
        else:
            words += [flag, *map(str, value if isinstance(value, list) else [value])]
    return shlex.join(words)


def _plain(value: Any) -> Any:
    """As JSON has it."""
    return list(value) if isinstance(value, tuple) else value
