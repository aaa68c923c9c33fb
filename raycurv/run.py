"""Fitting a run from Python and reading it: its tables, the curvature of a block, what follows."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property
from typing import Any

import pyarrow as pa

from raycurv.data.objects import settled
from raycurv.errors import DamagedFile, UserError
from raycurv.files.artifacts import gradient_file, read_blocks, read_gradient
from raycurv.files.curvature_files import CurvatureFiles
from raycurv.files.manifest import Manifest
from raycurv.files.row_files import open_rows
from raycurv.files.store import Store, open_store
from raycurv.files.tables import read_directory
from raycurv.hub import Snapshot, hub_name
from raycurv.jobs.fit.fit_settings import FitSettings
from raycurv.jobs.fit.fitting import fit as run_fit
from raycurv.jobs.fit.parents import SHARED
from raycurv.jobs.fitted import fitted_model, fitted_objective, read_fit
from raycurv.jobs.influence.influence_settings import InfluenceSettings
from raycurv.jobs.influence.scoring import influence as run_influence
from raycurv.jobs.inputs import AnyModel, AnySource, Inputs, settings_and_inputs
from raycurv.jobs.on_hub import of_record
from raycurv.jobs.prune.prune_settings import PruneSettings
from raycurv.jobs.prune.pruning import prune as run_prune
from raycurv.mathematics.blocks import Block
from raycurv.mathematics.curvature import Curvature
from raycurv.mathematics.factors import factors_of
from raycurv.mathematics.gradient_statistics import GradientStatistics
from raycurv.mathematics.loss.objective import Objective
from raycurv.mathematics.methods import open_method
from raycurv.mathematics.rank.rank_fisher import RankFisher
from raycurv.progress.reporter import Reporter
from raycurv.pruned import Pruned
from raycurv.scored import Products, Scores
from raycurv.summary_html import summary_html


def fit(
    model: AnyModel,
    data: AnySource | None,
    out: str | os.PathLike[str],
    objective: str | Objective | None = None,
    quiet: bool = False,
    **settings: Any,
) -> Run:
    """Fit the curvature of a model on a data set; the same call continues a run that stopped.

    Args:
        model: directory with an HF checkpoint, ``package.module:factory``, or a callable that
            returns an ``nn.Module``.
        data: path or glob, or a name of the hub, as for ``--data``; a frame of pandas or polars, a
            ``pyarrow.Table``, a ``datasets.Dataset``, a list of dicts, or what gives dicts once;
            ``None`` with ``merge`` and ``subtract``, whose data is that of the runs.
        out: the run directory.
        objective: its name, or the object itself (see :class:`raycurv.Objective`); by default what
            the model was trained for, as for ``--objective``.
        quiet: show no progress.
        **settings: the fields of :class:`raycurv.FitSettings`; ``address="none"`` runs without Ray.

    Raises:
        UserError: a mistake in settings, model or data.
    """
    given = {"model": model, "data": data, "out": out, "objective": objective} | settings
    return _fit(given, quiet, {})


def _fit(given: Mapping[str, Any], quiet: bool, snapshots: Mapping[str, Snapshot]) -> Run:
    """As :func:`fit`, with what is known already of names on the hub."""
    chosen, inputs = settings_and_inputs(FitSettings, given)
    inputs = replace(inputs, snapshots=snapshots)
    made = Run(run_fit(chosen, inputs, Reporter(quiet, chosen.log)))
    named = None if hub_name(chosen.model, "model") else chosen.model
    made._inputs = Inputs(
        model=named if inputs.model is None else inputs.model,
        fit_objective=chosen.objective if inputs.objective is None else inputs.objective,
    )
    return made


def open_run(
    out: str | os.PathLike[str],
    model: AnyModel | None = None,
    objective: str | Objective | None = None,
) -> Run:
    """The run that a fit left in a directory (``raycurv.open``).

    Args:
        out: the run directory.
        model: the fit's, given again: a name or callable (a run directory names nothing that is
            imported), or where the directory of its checkpoint lies by now.
        objective: the fit's, given again, where it is one of your own.

    Raises:
        UserError: no finished fit there.
    """
    opened = Run(open_store(out, "--run"))
    path = os.fspath(model) if isinstance(model, os.PathLike) else model
    opened._inputs = Inputs(model=path, fit_objective=objective)
    return opened


class Run:
    """A finished fit.

    Attributes:
        manifest: what ``run.json`` says.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        # Model and objective of the fit, where the caller has given them.
        self._inputs = Inputs()
        self.manifest: Manifest = read_fit(store)

    def __repr__(self) -> str:
        said = self.manifest
        return (
            f"<raycurv run {self._store.root}: {said.settings['method']}, "
            f"{said.facts['examples']:,} examples>"
        )

    def _repr_html_(self) -> str:
        said, settings = self.manifest, self.manifest.settings
        return summary_html(
            "run", self._store.root,
            {
                "model": said.facts["model"],
                "data": said.facts["data"],
                "examples": f"{said.facts['examples']:,}",
                "tokens": f"{said.facts['tokens']:,}" if "tokens" in said.facts else "",
                "method": f"{settings['method']}, {settings['fisher']} Fisher, {settings['dtype']}",
                "objective": settings["objective"],
                "blocks": f"{len(self._blocks):,}",
                "seconds": f"{sum(said.seconds.values()):,.0f}",
            },
        )  # fmt: skip

    @property
    def path(self) -> str:
        """The run directory; a URI without its credentials, which ``os.fspath`` keeps."""
        return self._store.root

    def __fspath__(self) -> str:
        return self._store.uri

    def blocks(self) -> pa.Table:
        """A row for each block: shape, trace, mean eigenvalue, effective ranks, outcome."""
        return self._table("blocks", len(self._blocks))

    def spectrum(self) -> pa.Table:
        """One row an eigenvalue of a factor, largest first."""
        widths = 0
        if open_method(self.manifest.settings["method"]).factors:
            widths = sum(f.width for f in factors_of(self._blocks.values()).values())
        return self._table("spectrum", widths)

    def examples(self) -> pa.Table:
        """A row for each training example: tokens, loss, squared gradient norm."""
        return self._table("examples", self.manifest.facts["examples"])

    def _table(self, name: str, rows: int) -> pa.Table:
        """A table of so many rows; DamagedFile if a file of it is gone, or one is too many."""
        table = read_directory(self._store, f"tables/{name}")
        if len(table) != rows:
            raise DamagedFile(
                self._store.path(f"tables/{name}"), f"{rows:,} rows", f"{len(table):,}",
                "Run the fit again: it makes what is missing.",
            )  # fmt: skip
        return table

    def gradients(self) -> pa.Table:
        """A row for each block: norms, noise and signal of gradients, traces of their squares.

        Those of all blocks together are ``manifest.facts["gradients"]``.

        Raises:
            UserError: the fit was without ``gradients``.
        """
        self._check_gradients()
        return self._table("gradients", len(self._blocks))

    def gradient_norms(self) -> pa.Table:
        """A row for each training example: its squared gradient norm, that of all
        blocks together and that of each.

        Gradients are those of the loss with the data's own labels; the order of the blocks is
        ``raycurv.blocks`` of the schema's metadata.

        Raises:
            UserError: the fit was without ``gradients``.
        """
        self._check_gradients()
        return self._table("gradient_norms", self.manifest.facts["examples"])

    def gradient(self, block: str) -> GradientStatistics:
        """Mean and mean squares of one block's per-example gradients, ``[O, I]`` each.

        Raises:
            UserError: no block of that name, or the fit was without ``gradients``.
        """
        self._check_gradients()
        found = self._block(block).name
        if not self._store.exists(gradient_file(found)):
            raise DamagedFile(
                self._store.path(gradient_file(found)), "gradient statistics", "nothing",
                "Run the fit again, with --gradients: it makes what is missing.",
            )  # fmt: skip
        return read_gradient(self._store, found)

    def _check_gradients(self) -> None:
        if "gradients" not in self.manifest.complete:
            raise UserError(
                self.path, "a fit with gradient statistics", "one without",
                "Run it again with --gradients: only what is missing is made.",
            )  # fmt: skip

    def block_names(self) -> list[str]:
        """Names of the blocks, in the model's order."""
        return list(self._blocks)

    @cached_property
    def _blocks(self) -> Mapping[str, Block]:
        """The blocks by name, in the model's order: read once, as is the manifest."""
        return {block.name: block for block in read_blocks(self._store)}

    def curvature(self, block: str) -> Curvature:
        """The curvature of one block: ``apply``, ``diagonal``, ``eigenvalues``, ``dense``.

        With the method ``mfac`` it is of rank m, and the block's own (see :meth:`rank_fisher`).

        Raises:
            UserError: no block of that name.
        """
        return CurvatureFiles.of(self._store, self.manifest).open(self._block(block))

    def _block(self, name: str) -> Block:
        if name in self._blocks:
            return self._blocks[name]
        raise UserError(
            f"block {name!r}",
            "one of the run's blocks",
            "no such name",
            f"There are {', '.join(self.block_names()[:5])}, …",
        )

    def prune(self, out: str | os.PathLike[str], quiet: bool = False, **settings: Any) -> Pruned:
        """Remove weights of the fitted model and move the others to make up for them.

        Args:
            out: where the checkpoint, saliencies and masks go.
            quiet: show no progress.
            **settings: the fields of :class:`raycurv.PruneSettings`; ``model`` and ``objective``,
                the fit's, where it was opened without them, may be objects.

        Raises:
            UserError: a mistake in settings, or statistics that this run lacks.
        """
        chosen, held = settings_and_inputs(PruneSettings, {"run": self, "out": out} | settings)
        own = self._given_again(held, chosen.model, chosen.objective, held.objective)
        store, _ = run_prune(chosen, own, Reporter(quiet, chosen.log))
        return Pruned(store)

    def _given_again(self, inputs: Inputs, model: str, named: str, objective: Any) -> Inputs:
        """Inputs with the fit's model and objective, as they were given with the call or before."""
        if inputs.model is None and not model:
            inputs = replace(inputs, model=self._inputs.model)
        if objective is None and not named:
            objective = self._inputs.fit_objective
        return replace(inputs, fit_objective=objective)

    def rank_fisher(self) -> RankFisher:
        """The Fisher of a fit with ``mfac`` across all blocks, whole in memory: the inverse, any of
        its elements, and a sliding window over its gradients.

        Raises:
            UserError: another method was fitted.
        """
        method = open_method(self.manifest.settings["method"])
        if not method.ranked:
            raise UserError(
                self.path, "a fit with --method mfac", f"one with {method}", "Fit with mfac."
            )
        return RankFisher({n: open_rows(self._store, b).whole() for n, b in self._blocks.items()})

    def extend(
        self,
        data: AnySource,
        out: str | os.PathLike[str],
        quiet: bool = False,
        **settings: Any,
    ) -> Run:
        """This run and more data, in this run's bases: its Λ sums and counts, and the data's.

        Exact in these bases, which are not those that all the data would have. For the methods
        ``ekfac`` and ``diagonal``.

        Args:
            data: examples that are not in this run yet, as ``data`` of :func:`fit`.
            out: a directory for the new run.
            quiet: show no progress.
            **settings: how it is run; what the result means is as in this run.

        Raises:
            UserError: a mistake in settings or data; an example that is in this run already.
        """
        return self._follow(data, out, quiet, {"extend": self} | settings)

    def merge(
        self,
        *others: str | os.PathLike[str],
        out: str | os.PathLike[str],
        quiet: bool = False,
        **settings: Any,
    ) -> Run:
        """The run of this run's data and that of others, all with ``keep_sums``.

        A, G and their counts add up and are decomposed again, and Λ is refitted by a pass over all
        the data: what fitting them together gives, but for rounding.

        Args:
            others: runs (or their directories) of the same model and settings, of other examples.
            out: a directory for the new run.
            quiet: show no progress.
            **settings: how it is run, and ``keep_sums``.

        Raises:
            UserError: a run that does not go with this one, or has not kept its sums.
        """
        return self._follow(None, out, quiet, {"merge": (self, *others)} | settings)

    def subtract(
        self,
        *others: str | os.PathLike[str],
        out: str | os.PathLike[str],
        quiet: bool = False,
        **settings: Any,
    ) -> Run:
        """The run of this run's data without that of others, all with ``keep_sums``.

        As :meth:`merge`; eigenvalues that rounding leaves below zero are clamped, and counted in
        the blocks' ``eigh_outcome``.

        Args:
            others: runs (or their directories) of the same model and settings, of examples that
                are in this one.
            out: a directory for the new run.
            quiet: show no progress.
            **settings: how it is run, and ``keep_sums``.

        Raises:
            UserError: as for :meth:`merge`; an example that is not in this run, or no example is
                left.
        """
        return self._follow(None, out, quiet, {"subtract": (self, *others)} | settings)

    def _follow(self, data: Any, out: Any, quiet: bool, settings: dict[str, Any]) -> Run:
        """Fit what starts from this run, with its model and settings."""
        said = self.manifest.settings
        own: dict[str, Any] = {
            k: tuple(v) if isinstance(v, list) else v for k, v in said.items() if k in SHARED
        }
        model: Any = self._inputs.model or fitted_model(self.manifest, self.path)
        own["adapter"] = tuple(self.manifest.facts.get("adapter", ()))
        objective = self._inputs.fit_objective or settings.get("objective", "")
        own["objective"] = fitted_objective(self.manifest, self.path, objective, "--objective")
        known = of_record(
            Inputs(), self.path, model=[model] if isinstance(model, str) else [],
            adapter=own["adapter"],
        )  # fmt: skip
        given = {"model": model, "data": data, "out": out} | own | settings
        return _fit(given, quiet, known.snapshots)

    def influence(
        self,
        queries: AnySource,
        train: AnySource,
        out: str | os.PathLike[str],
        quiet: bool = False,
        **settings: Any,
    ) -> Scores:
        """Score every query against every training example.

        A score is positive where training on the example lowers the query's measurement.

        Args:
            queries: as ``data`` of :func:`fit`.
            train: likewise, what is scored.
            out: where the results go.
            quiet: show no progress.
            **settings: the fields of :class:`raycurv.InfluenceSettings`; ``objective``, what of a
                query is measured, may be the object itself (see :class:`raycurv.Objective`), and so
                may ``model`` and ``fit_objective``, where the run was opened without them.

        Raises:
            UserError: a mistake in settings or data.
        """
        # What gives its rows once is asked for their texts afterwards.
        queries, train = settled(queries), settled(train)
        store = self._influence(queries, train, out, quiet, settings)
        return Scores(store, *map(_unrecorded, (queries, train)))

    def ihvp(
        self,
        queries: AnySource,
        out: str | os.PathLike[str],
        quiet: bool = False,
        **settings: Any,
    ) -> Products:
        """Make the queries' inverse-Hessian-vector products, a file for each block in ``out/ihvp``.

        Args:
            queries: as ``data`` of :func:`fit`.
            out: where the results go.
            quiet: show no progress.
            **settings: as for :meth:`influence`.

        Raises:
            UserError: a mistake in settings or data.
        """
        store = self._influence(queries, None, out, quiet, settings | {"ihvp": True})
        return Products(store)

    def _influence(
        self, queries: Any, train: Any, out: Any, quiet: bool, settings: dict[str, Any]
    ) -> Store:
        given = {"run": self, "queries": queries, "train": train, "out": out} | settings
        chosen, inputs = settings_and_inputs(InfluenceSettings, given)
        inputs = self._given_again(inputs, chosen.model, chosen.fit_objective, inputs.fit_objective)
        return run_influence(chosen, inputs, Reporter(quiet, chosen.log))


def _unrecorded(source: AnySource | None) -> AnySource | None:
    """Data that a run cannot find again as it was given: what is on the hub is on record."""
    named = isinstance(source, str) and hub_name(source, "dataset") is not None
    return None if named else source
