"""Evaluation: loss, perplexity and accuracy of a model on a data set, into a directory of results.

examples -> data/              tokenised once, deleted at the end
forward  -> work/              losses, and what was predicted right, committed as they come
tables   -> tables/examples    and their sums in run.json
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from raycurv.data.examples import loss_terms
from raycurv.data.sources import Source, fingerprint
from raycurv.data.uri import shown
from raycurv.driver.corpus import Corpus, open_corpus
from raycurv.driver.settings import DTYPES, EvaluateSettings, identity
from raycurv.driver.workers import Workers, check_address
from raycurv.errors import DamagedFile, UserError
from raycurv.files.lock import hold
from raycurv.files.manifest import Manifest, continue_or_refuse
from raycurv.files.store import Store, open_store
from raycurv.files.tables import evaluation_schema, footer, read_rows, write_table
from raycurv.jobs.check import check_evaluate
from raycurv.jobs.losses import Losses
from raycurv.mathematics.loss.objective import Objective, open_objective
from raycurv.models.model import Model
from raycurv.models.opening import ModelSource, open_model
from raycurv.progress.reporter import Reporter

# What the last line of the job says of the model.
NUMBERS = (
    "loss", "loss_per_target", "perplexity", "accuracy", "examples", "tokens", "targets",
)  # fmt: skip
_LARGEST_EXPONENT = math.log(1.7e308)

Numbers = dict[str, Any]
Array = np.ndarray[Any, Any]


def evaluate(
    settings: EvaluateSettings,
    model: ModelSource | None = None,
    data: Source | None = None,
    objective: Objective | None = None,
    reporter: Reporter | None = None,
    network: Model | None = None,
) -> tuple[Store, Numbers]:
    """Evaluate a model; gives the store of the results, and the numbers.

    Args:
        settings: of the job.
        model: instead of ``settings.model``, a callable that makes the module.
        data: instead of ``settings.data``, a table or rows in memory.
        objective: instead of ``settings.objective``, the objective itself.
        reporter: shows progress; by default to the terminal.
        network: instead of ``model``, one that is opened already, such as a patched one.

    Returns:
        the store, and the numbers: ``loss``, a mean over examples in nats; ``loss_per_target``;
        ``perplexity``, the exponential of that, of an objective that is called on tokens;
        ``accuracy``, the share of targets that the model predicts, where the objective says so;
        ``examples``, ``tokens``, ``targets``.

    Raises:
        UserError: a mistake in settings, model or data, or another job works on the same directory;
            nothing that was computed is lost.
    """
    settings.check(has_model=model is not None or network is not None, has_data=data is not None)
    reporter = reporter or Reporter(log=settings.log)
    store = open_store(settings.out, "--out")
    with hold(store, "evaluate.py", reporter.say):
        if network is None:
            network = open_model(model if model is not None else settings.model)
        source: Source = data if data is not None else settings.data
        named = objective if objective is not None else settings.objective
        return store, _evaluate_held(settings, store, network, source, named, reporter)


def _evaluate_held(
    settings: EvaluateSettings,
    store: Store,
    network: Model,
    source: Source,
    objective: str | Objective,
    reporter: Reporter,
) -> Numbers:
    """The evaluation, while no other job writes to its directory."""
    per_token = open_objective(objective).per_token
    said = {k: v for k, v in identity(settings).items() if k not in ("model", "data")}
    manifest = continue_or_refuse(
        store,
        Manifest(
            "evaluate",
            said,
            {"model": network.fingerprint(), "data": fingerprint(source)},
            {"model": shown(settings.model or network.name), "data": shown(settings.data)},
        ),
    )
    if "tables" in manifest.complete:
        if _there(store, manifest):
            reporter.say(f"complete: {store.root}")
            return _numbers(manifest)
        reporter.say("the table of examples is gone or damaged: making it again")
        manifest.complete.remove("tables")
        manifest.write(store)
    check_address(settings)
    with reporter.phase("examples", 1, "sources") as phase:
        corpus = open_corpus(
            store, "data", source, "--data", network, settings, settings.max_examples, settings.seed
        )
        phase.advance(1)
    if not per_token:
        _refuse_unlabelled(corpus)
    check_evaluate(settings, network, corpus.lengths, store)
    dtype = DTYPES[settings.dtype]
    workers = Workers(settings, network, objective, (), dtype, settings.seed, reporter, store)
    try:
        losses = Losses(settings, store, manifest, corpus, dtype, workers, reporter)
        manifest.facts |= _write_tables(losses, network, footer(identity(settings)), per_token)
    finally:
        workers.close(store)
    for directory in ("work", "data"):
        store.delete_directory(directory)
    manifest.complete.append("tables")
    manifest.took(store, reporter.seconds)
    reporter.summary(_sentence(manifest.facts), {"results": store.root})
    return _numbers(manifest)


def _there(store: Store, manifest: Manifest) -> bool:
    """Whether the table of the examples is whole."""
    names = store.names("tables/examples", ".parquet")
    try:
        return sum(read_rows(store, n) for n in names) == int(manifest.facts["examples"])
    except DamagedFile:
        return False


def _refuse_unlabelled(corpus: Corpus) -> None:
    """Refuse examples without the labels that a loss is of; tokens are their own."""
    # All have labels, or none has.
    first = next(corpus.examples())
    if first.labels is None:
        raise UserError(
            f"example {first.id!r}", "a label", "none", "Add a column `labels` to the data."
        )


def _write_tables(
    losses: Losses, network: Model, notes: dict[str, str], per_token: bool
) -> Numbers:
    """``tables/examples``, one file a part of the data; gives the numbers."""
    store, corpus = losses.store, losses.corpus
    found = losses.tables(network)
    store.delete_directory("tables/examples")
    schema = evaluation_schema(losses.dtype == torch.float64)
    examples = corpus.examples()
    all_losses: list[Array] = []
    targets = correct = 0
    known = True
    for part, table in found:
        index = table["index"].to_numpy()
        own = [loss_terms(next(examples)) if per_token else 1 for _ in index]
        rows = pa.table(
            {
                "id": corpus.named(index),
                "tokens": corpus.lengths[index],
                "targets": pa.array(own, pa.int32()),
                "loss": table["loss"].cast(schema.field("loss").type),
                "correct": table["correct"],
            },
            schema=schema,
        )
        write_table(store, f"tables/examples/part-{part:05d}.parquet", rows, notes)
        all_losses.append(table["loss"].to_numpy())
        known = known and not table["correct"].null_count
        correct += pc.sum(table["correct"]).as_py() or 0
        targets += sum(own)
    losses_N = np.concatenate(all_losses)
    return _summed(losses_N, targets, correct if known else None, corpus.tokens, per_token)


def _summed(
    losses_N: Array,
    targets: int,
    correct: int | None,
    tokens: int,
    per_token: bool,
) -> Numbers:
    """The numbers of a model; sums do not depend on an order, for they are exact."""
    total = math.fsum(losses_N)
    found: Numbers = {
        "loss": total / len(losses_N),
        "loss_per_target": total / targets,
        "examples": len(losses_N),
        "tokens": tokens,
        "targets": targets,
    }
    # Beyond it, a perplexity is no number that a float or JSON could hold.
    if per_token and total / targets < _LARGEST_EXPONENT:
        found["perplexity"] = math.exp(total / targets)
    if correct is not None:
        found["accuracy"] = correct / targets
    return found


def _numbers(manifest: Manifest) -> Numbers:
    return {name: manifest.facts[name] for name in NUMBERS if name in manifest.facts}


def _sentence(facts: Numbers) -> str:
    """What was found, in one line."""
    said = [f"loss {facts['loss']:.6g} an example, {facts['loss_per_target']:.6g} a target"]
    if "perplexity" in facts:
        said.append(f"perplexity {facts['perplexity']:.6g}")
    if "accuracy" in facts:
        said.append(f"accuracy {facts['accuracy']:.2%}")
    counts = ", ".join(f"{facts[name]:,} {name}" for name in ("examples", "tokens", "targets"))
    return f"{'; '.join(said)}; {counts}"
