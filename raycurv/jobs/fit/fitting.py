"""Fit: curvature of a model on a data set, into a run directory.

    examples -> data/              tokenised once
    forward  -> work/spool/        where not all stages are resident: what enters each group of them
    layout   -> blocks.json        which blocks read the same tensor
    and back, group by group of stages:
      pass 1 -> factors/ labels/   A and G; the labels that were drawn
      eigen  -> eigen/             one task a factor, longest first
      pass 2 -> corrected/         Λ; losses and gradient norms of the examples
    tables   -> tables/

With ``--gradients`` the first of the passes gathers gradient statistics as well (gradients.py).
A fit that starts from other runs (parents.py) takes over a part of these from them (combined.py).
Every arrow leaves finished files, and a phase computes only those that are missing: so the same
command continues a run that stopped anywhere, and mends one that lost a file.
"""

from __future__ import annotations

import hashlib
import os
from typing import Any

from raycurv.data.sources import Source, fingerprint
from raycurv.data.uri import shown
from raycurv.driver.corpus import PART, Corpus
from raycurv.driver.settings import DTYPES, FitSettings, identity
from raycurv.driver.workers import Workers, check_address
from raycurv.errors import UserError
from raycurv.files.lock import hold
from raycurv.files.manifest import Manifest, continue_or_refuse
from raycurv.files.store import Store, open_store
from raycurv.files.tables import footer
from raycurv.jobs.check import check_fit
from raycurv.jobs.fit.combined import (
    open_examples,
)
from raycurv.jobs.fit.parents import open_parents
from raycurv.jobs.fit.phases import FitLoop
from raycurv.mathematics.choice import choose_blocks
from raycurv.mathematics.loss.objective import Objective, open_objective
from raycurv.mathematics.methods import open_method
from raycurv.mathematics.tiles import check_axes
from raycurv.models.model import Model
from raycurv.models.opening import ModelSource, open_model
from raycurv.progress.reporter import Reporter
from raycurv.steps.step import Fit


def fit(
    settings: FitSettings,
    model: ModelSource | None = None,
    data: Source | None = None,
    objective: Objective | None = None,
    reporter: Reporter | None = None,
) -> Store:
    """Fit the curvature that the settings ask for; gives the store of the run.

    Args:
        settings: of the job.
        model: instead of ``settings.model``, a callable that makes the module.
        data: instead of ``settings.data``, a table or rows in memory.
        objective: instead of ``settings.objective``, the objective itself.
        reporter: shows progress; by default to the terminal.

    Raises:
        UserError: a mistake in settings, model or data, or another job works on the same directory;
            nothing that was computed is lost.
        NumericalError: a result that cannot be trusted; names the block or factor.
    """
    settings.check(in_memory=model is not None or data is not None)
    settings = settings.resolved()
    reporter = reporter or Reporter(log=settings.log)
    store = open_store(settings.out, "--out")
    source: Source = data if data is not None else settings.data
    named = objective if objective is not None else settings.objective
    with hold(store, "fit.py", reporter.say):
        network = open_model(model if model is not None else settings.model)
        return _fit_held(settings, store, network, source, named, reporter)


def refit(
    settings: FitSettings,
    network: Model,
    corpus: Corpus,
    objective: str | Objective,
    reporter: Reporter,
) -> Store:
    """Fit another model on examples that are stored already; gives the store of the run.

    Args:
        settings: of the job.
        network: the model.
        corpus: the examples, wherever they lie.
        objective: its name, or itself.
        reporter: shows progress.

    Raises:
        UserError, NumericalError: see :func:`fit`.
    """
    settings.check(in_memory=True)
    settings = settings.resolved()
    store = open_store(settings.out, "--out")
    with hold(store, "fit.py", reporter.say):
        return _fit_held(settings, store, network, corpus, objective, reporter)


def _fit_held(
    settings: FitSettings,
    store: Store,
    network: Model,
    data: Source | Corpus,
    named: str | Objective,
    reporter: Reporter,
) -> Store:
    """The fit, while no other job writes to its directory."""
    per_token = open_objective(named).per_token
    blocks = choose_blocks(
        network.skeleton(), settings.blocks, network.default_scope, network.tied_head
    )
    if open_method(settings.method).factors:
        check_axes(blocks, settings.max_factor_dim)
    workers = Workers(
        settings, network, named, blocks, DTYPES[settings.dtype], settings.seed, reporter, store
    )
    parents = open_parents(settings, store, network)
    manifest = continue_or_refuse(
        store,
        Manifest(
            "fit",
            _settings_of_result(settings) | parents.marks(),
            {
                "model": network.fingerprint(),
                "data": {} if parents.combined else _mark_of(data),
            },
            {"model": _lasting(settings.model), "data": shown(settings.data)} | parents.places(),
        ),
    )
    phases = {"tables", "gradients"} if settings.gradients else {"tables"}
    finished = phases <= set(manifest.complete)
    if not finished:
        check_address(settings)
    with reporter.phase("examples", 1, "sources") as phase:
        corpus = (
            data
            if isinstance(data, Corpus)
            else open_examples(store, parents, data, network, settings, manifest.facts, reporter)
        )
        phase.advance(1)
    if settings.rows is not None and settings.rows > len(corpus):
        raise UserError(
            "--rows", f"at most {len(corpus):,}, as many as there are examples",
            f"{settings.rows:,}", "Give a smaller --rows, or more --data.",
        )  # fmt: skip
    if not finished and len(corpus):
        check_fit(settings, network, blocks, corpus.lengths, store)
    assert settings.store_dtype is not None
    under_way = Fit(
        store=store,
        method=open_method(settings.method),
        fisher="sampled" if settings.fisher == "sampled" else "labels",
        draws=settings.draws,
        rows=settings.rows or 0,
        dtype=DTYPES[settings.dtype],
        store_dtype=DTYPES[settings.store_dtype],
        max_factor_dim=settings.max_factor_dim,
        keep_sums=settings.keep_sums,
        gradients=settings.gradients,
        per_token=per_token,
        batch_tokens=settings.batch_tokens,
        extends=None if parents.extended is None else parents.extended.store,
        notes=footer(identity(settings)),
        corpus=corpus,
        manifest=manifest,
        workers=workers,
        reporter=reporter,
        blocks=blocks,
    )
    try:
        FitLoop(under_way, parents, settings).run()
    finally:
        workers.close(store)
    manifest.took(store, reporter.seconds)
    reporter.summary(
        f"fitted {settings.method} of {len(blocks)} blocks on {manifest.facts['examples']:,} "
        f"examples, {manifest.facts['tokens']:,} tokens",
        {"results": store.root},
    )
    return store


def _settings_of_result(settings: FitSettings) -> dict[str, Any]:
    # Model and data are compared by what they hold, not by where they lie.
    return {k: v for k, v in identity(settings).items() if k not in ("model", "data")}


def _mark_of(data: Source | Corpus) -> dict[str, Any]:
    """Tells the data from others."""
    if not isinstance(data, Corpus):
        return fingerprint(data)
    # The hash of all ids with zeros between them, some at a time.
    digest = hashlib.blake2b(digest_size=16)
    for start in range(0, len(data), PART):
        some = data.named(range(start, min(start + PART, len(data)))).to_pylist()
        digest.update(("\0" * (start > 0) + "\0".join(some)).encode())
    return {"examples": digest.hexdigest(), "tokens": data.tokens}


def _lasting(model: str) -> str:
    # Who reads the run later may stand in another directory.
    return os.path.abspath(os.path.expanduser(model)) if os.path.isdir(model) else model
