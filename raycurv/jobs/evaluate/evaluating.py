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
from raycurv.data.sources import fingerprint
from raycurv.data.uri import shown
from raycurv.driver.corpus import Corpus, open_corpus, part_file
from raycurv.driver.settings import DTYPES, identity
from raycurv.errors import DamagedFile, UserError, not_finite
from raycurv.files.manifest import Manifest
from raycurv.files.store import Store
from raycurv.files.tables import evaluation_schema, footer, read_rows, write_table
from raycurv.jobs.drafts import recipe_of
from raycurv.jobs.evaluate.evaluate_settings import EvaluateSettings
from raycurv.jobs.inputs import Inputs
from raycurv.jobs.losses import Losses
from raycurv.jobs.shell import Shell, open_shell
from raycurv.mathematics.loss.shipped import open_objective
from raycurv.models.model import Model
from raycurv.progress.reporter import Reporter

# What the last line of the job says of the model.
NUMBERS = (
    "loss", "loss_per_target", "perplexity", "accuracy", "examples", "tokens", "targets",
)  # fmt: skip
_LARGEST_EXPONENT = math.log(1.7e308)

Numbers = dict[str, Any]
Array = np.ndarray[Any, Any]


def evaluate(
    settings: EvaluateSettings, inputs: Inputs | None = None, reporter: Reporter | None = None
) -> tuple[Store, Numbers]:
    """Evaluate a model; gives the store of the results, and the numbers.

    Args:
        settings: of the job.
        inputs: model, data and objective where they are in memory.
        reporter: shows progress; by default to the terminal.

    Returns:
        the store, and the numbers: ``loss``, a mean over examples in nats; ``loss_per_target``;
        ``perplexity``, the exponential of that, of an objective that is called on tokens;
        ``accuracy``, the share of targets that the model predicts, where the objective says so;
        ``examples``, ``tokens``, ``targets``.

    Raises:
        UserError: a mistake in settings, model or data, or another job works on the same directory;
            nothing that was computed is lost.
    """
    with open_shell("evaluate", settings, settings.out, inputs or Inputs(), reporter) as shell:
        return shell.store, _evaluate(shell)


def _evaluate(shell: Shell[EvaluateSettings]) -> Numbers:
    settings, store, inputs = shell.settings, shell.store, shell.inputs
    network = inputs.open_model(
        settings.model, settings.trust_remote_code, settings.ignore_tensors, settings.adapters(),
        settings.tokenizer,
    )  # fmt: skip
    objective = shell.objective_for(network)
    settings = shell.settings
    source = inputs.source("data", settings)
    opened = open_objective(objective)
    per_token = opened.per_token
    places: dict[str, Any] = {"model": shown(settings.model), "data": shown(settings.data)}
    if settings.adapter:
        places["adapter"] = [*map(shown, settings.adapter)]
    manifest = shell.begin(
        shell.prints_of(network) | {"data": fingerprint(source)},
        places | shell.notes_of(network),
        reads=network,
    )
    if shell.is_complete(
        "tables",
        lambda: _forget_damaged(store, manifest),
        "the table of examples is gone or damaged: making it again",
    ):
        return _numbers(manifest)
    most, seed = settings.max_examples, settings.seed
    (corpus,) = shell.examples(
        lambda: open_corpus(
            store, "data", source, "--data", network, settings, most, seed, opened, masks=seed,
        )
    )  # fmt: skip
    if not per_token:
        _refuse_unlabelled(corpus)
    dtype = DTYPES[settings.dtype]
    # What an identity fit does, which is to compute the losses.
    fit = {"method": "identity", "dtype": settings.dtype, "store_dtype": settings.dtype}
    shell.check_plan(network, (), recipe_of(fit, settings.logits_chunk), corpus.widths)
    with shell.workers(network, objective, (), dtype, settings.seed) as workers:
        if settings.check_causality:
            shell.check_causality(workers, opened, corpus)
        losses = Losses(workers, manifest, corpus)
        manifest.facts |= _write_tables(losses, network, footer(identity(settings)), per_token)
    for directory in ("work", "data"):
        store.delete_directory(directory)
    manifest.complete.append("tables")
    shell.end(_sentence(manifest.facts))
    return _numbers(manifest)


def _forget_damaged(store: Store, manifest: Manifest) -> bool:
    """Take back that the table of the examples is finished, unless it is whole."""
    names = store.names("tables/examples", ".parquet")
    try:
        if sum(read_rows(store, n) for n in names) == int(manifest.facts["examples"]):
            return False
    except DamagedFile:
        pass
    manifest.complete.remove("tables")
    manifest.write(store)
    return True


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
    store, corpus = losses.workers.store, losses.corpus
    found = losses.tables(network)
    store.delete_directory("tables/examples")
    schema = evaluation_schema(losses.workers.dtype == torch.float64)
    examples = corpus.examples()
    all_losses: list[Array] = []
    targets = correct = 0
    known = True
    for part, table in found:
        index = table["index"].to_numpy()
        own = [loss_terms(next(examples), corpus.shift) if per_token else 1 for _ in index]
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
        write_table(store, part_file("tables/examples", part), rows, notes)
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
    """The numbers of a model; sums do not depend on an order, for they are exact.

    Raises:
        NumericalError: the losses add up to more than a float holds.
    """
    try:
        total = math.fsum(losses_N)
    except OverflowError:
        raise not_finite("the losses of all examples", "their sum", "an overflow") from None
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
