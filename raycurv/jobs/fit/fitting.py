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
from dataclasses import asdict, replace
from typing import Any, Literal

from raycurv.data.sources import Source, fingerprint
from raycurv.data.uri import shown
from raycurv.driver.corpus import PART, Corpus
from raycurv.driver.settings import DTYPES, identity
from raycurv.driver.workers import check_address
from raycurv.errors import UserError
from raycurv.files.artifacts import BLOCKS_FILE, check_names, read_blocks
from raycurv.files.manifest import Manifest
from raycurv.files.store import Store, open_store
from raycurv.files.tables import footer
from raycurv.jobs.drafts import recipe_of
from raycurv.jobs.fit.combined import open_examples
from raycurv.jobs.fit.fit_settings import FitSettings
from raycurv.jobs.fit.parents import open_parents
from raycurv.jobs.fit.phases import FitLoop
from raycurv.jobs.fitted import read_fit
from raycurv.jobs.inputs import Inputs
from raycurv.jobs.recorded import read_run
from raycurv.jobs.shell import Shell, open_shell
from raycurv.mathematics.blocks import Block
from raycurv.mathematics.choice import choose_blocks
from raycurv.mathematics.coverage import coverage
from raycurv.mathematics.loss.objective import Objective, Signed
from raycurv.mathematics.loss.shipped import open_objective
from raycurv.mathematics.methods import open_method
from raycurv.mathematics.tiles import decomposable
from raycurv.models.model import Model
from raycurv.progress.reporter import Reporter
from raycurv.steps.step import Fit


def fit(
    settings: FitSettings, inputs: Inputs | None = None, reporter: Reporter | None = None
) -> Store:
    """Fit the curvature that the settings ask for; gives the store of the run.

    Args:
        settings: of the job.
        inputs: model, data and objective where they are in memory.
        reporter: shows progress; by default to the terminal.

    Raises:
        UserError: a mistake in settings, model or data, or another job works on the same directory;
            nothing that was computed is lost.
        NumericalError: a result that cannot be trusted; names the block or factor.
    """
    with open_shell("fit", settings, settings.out, inputs or Inputs(), reporter) as shell:
        _fit(shell)
    return shell.store


def _fit(shell: Shell[FitSettings]) -> None:
    settings, store, inputs = shell.settings, shell.store, shell.inputs
    network = inputs.open_model(
        settings.model, settings.trust_remote_code, settings.ignore_tensors, settings.adapters(),
        settings.tokenizer,
    )  # fmt: skip
    objective = shell.objective_for(network)
    settings = shell.settings
    data = inputs.source("data", settings)
    opened = open_objective(objective)
    if settings.fisher is None:
        shell.settings = settings = replace(settings, fisher=_fisher(shell, opened))
    if settings.fisher == "signs" and not isinstance(opened, Signed):
        raise UserError(
            "--fisher signs", "an objective with a method `signed` for its loss",
            f"{objective if isinstance(objective, str) else type(objective).__name__} without one",
            "Give --fisher sampled, or write the method (raycurv.mathematics.loss.objective.Signed "
            "says what it gives).",
        )  # fmt: skip
    blocks = _blocks(settings, network, store)
    check_names(blocks)
    covered = coverage(network.skeleton(), blocks, network.idle)
    if open_method(settings.method).factors:
        blocks = decomposable(blocks, settings.max_factor_dim, network.vocab_size)
        blocks = settings.factored(blocks)
    dtype = DTYPES[settings.dtype]
    with shell.workers(
        network, objective, blocks, dtype, settings.seed, check_capture=settings.check_capture
    ) as workers:
        parents = open_parents(settings, store, network)
        prints = shell.prints_of(network)
        prints["data"] = {} if parents.combined else _mark_of(data)
        places: dict[str, Any] = {"model": _lasting(settings.model), "data": shown(settings.data)}
        if settings.adapter:
            places["adapter"] = [_lasting(one) for one in settings.adapter]
        places |= parents.places() | shell.notes_of(network)
        if settings.tokenizer:
            places["tokenizer_directory"] = network.tokenizer_dir
        reads = None if parents.combined else network
        manifest = shell.begin(prints, places, parents.marks(), reads)
        manifest.facts["coverage"] = covered.facts()
        for sentence in (str(covered), *parents.read_otherwise(prints["data"])):
            shell.reporter.say(sentence)
        phases = {"tables", "gradients"} if settings.gradients else {"tables"}
        finished = phases <= set(manifest.complete)
        if not finished:
            check_address(settings)

        def examples() -> Corpus:
            if isinstance(data, Corpus):
                return data
            return open_examples(shell, parents, data, network, opened)

        (corpus,) = shell.examples(examples)
        if settings.rows is not None and settings.rows > len(corpus):
            raise UserError(
                "--rows", f"at most {len(corpus):,}, as many as there are examples",
                f"{settings.rows:,}", "Give a smaller --rows, or more --data.",
            )  # fmt: skip
        recipe = recipe_of(asdict(settings), settings.logits_chunk)
        if not finished and len(corpus):
            shell.check_plan(network, blocks, recipe, corpus.widths)
            if settings.check_causality:
                shell.check_causality(workers, opened, corpus)
        under_way = Fit(
            recipe=recipe,
            fisher="labels" if settings.fisher == "empirical" else "sampled",
            signs=settings.fisher == "signs",
            per_token=opened.per_token,
            extends=None if parents.extended is None else parents.extended.store,
            notes=footer(identity(settings)),
            corpus=corpus,
            manifest=manifest,
            workers=workers,
        )
        FitLoop(under_way, parents).run()
    shell.end(
        f"fitted {settings.method} of {len(blocks)} blocks on {manifest.facts['examples']:,} "
        f"examples, {manifest.facts['tokens']:,} tokens{_of_experts(manifest)}"
    )


def _blocks(settings: FitSettings, network: Model, store: Store) -> tuple[Block, ...]:
    """The blocks that the settings choose; as they were where an earlier version, which took a
    frozen bias for a part of its layer's block, began the run."""
    now, before = (
        choose_blocks(
            network.skeleton(), settings.blocks, network.default_scope, network.tied_head,
            network.idle, network.held, frozen_biases,
        )
        for frozen_biases in (False, True)
    )  # fmt: skip
    if now == before or not store.exists(BLOCKS_FILE):
        return now
    begun = {(block.name, block.d_in) for block in read_blocks(store)}
    return before if begun == {(block.name, block.d_in) for block in before} else now


def _fisher(shell: Shell[FitSettings], objective: Objective) -> Literal["sampled", "signs"]:
    """What a fit draws where nobody says: signs, if the objective has them; but labels where the
    run in its directory draws them, as versions did that knew no signs, or one that it starts from.
    """
    if not isinstance(objective, Signed):
        return "sampled"
    given = shell.settings
    flags = {"extend": (given.extend,), "merge": given.merge, "subtract": given.subtract}
    parents = [open_store(one, f"--{flag}") for flag, runs in flags.items() for one in runs if one]
    for store in (shell.store, *parents):
        there = read_run(store)
        if there is not None and there.settings.get("fisher") == "sampled":
            shell.reporter.say(f"labels are drawn, as for {store.root}: --fisher sampled")
            return "sampled"
    return "signs"


def fit_and_tell(settings: FitSettings, reporter: Reporter) -> tuple[Store, dict[str, Any]]:
    """As :func:`fit`; gives the store, and under ``experts`` how many blocks of experts no row
    reached, and how many few rows did, where there are any."""
    store = fit(settings, reporter=reporter)
    said = read_fit(store).facts.get("experts")
    return store, {"experts": said | {"unreached": len(said["unreached"])}} if said else {}


def _of_experts(manifest: Manifest) -> str:
    """What is to be known of blocks that share out rows, as the end of a sentence."""
    said = manifest.facts.get("experts")
    if not said or not (said["unreached"] or said["thin"]):
        return ""
    return (
        f"; of {said['blocks']:,} blocks of experts {len(said['unreached']):,} were reached by no "
        f"row, {said['thin']:,} by fewer than twice the longer of their axes"
    )


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
