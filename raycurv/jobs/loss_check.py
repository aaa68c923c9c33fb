"""Proof that model and objective compute what a fit computed: the loss of one of its examples.

Tensors, configurations and files have fingerprints. Code of the user's has none: a factory may give
the same weights to another forward, and an objective of the same name may be another one. So one
example of the fit's goes through once more, and its loss is held against the one on record.
"""

from __future__ import annotations

import math

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor

from raycurv.batch import Hidden
from raycurv.driver.corpus import Corpus, stored_corpus
from raycurv.driver.feed import Ends, Feed
from raycurv.driver.line import Passage
from raycurv.driver.pipeline import Pipeline
from raycurv.driver.settings import DTYPES
from raycurv.driver.workers import Workers
from raycurv.errors import UserError
from raycurv.files.manifest import Manifest
from raycurv.files.store import Store
from raycurv.files.tables import read_table
from raycurv.jobs.fitted import Fitted
from raycurv.mathematics.loss.shipped import is_ours, open_objective
from raycurv.mathematics.sums import Results
from raycurv.models.factory import FactoryModel
from raycurv.stages.passes import loss_pass

# Relative to the loss, or to the mean of all losses where that is larger: other microbatches and
# stages round differently, other code differs by far more.
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3, torch.bfloat16: 5e-2}


class _Caught(Ends):
    """Keeps what a pass finds of its microbatches."""

    def __init__(self) -> None:
        self.losses: list[Tensor] = []

    def leave(self, microbatch: int, leaving: Hidden | None, results: Results) -> None:
        if "loss" in results:
            self.losses.append(results["loss"])


def check_loss(workers: Workers, manifest: Manifest, fitted: Fitted) -> None:
    """Hold the loss of one of a fit's examples against what it was, where model or objective is
    code of the user's and all stages are resident; the difference is a fact of the run.

    Nothing is held where the fit's examples or their losses are not there, or where a forward takes
    random numbers. A model that may look ahead is not to be given: it sees padding as well, and its
    losses depend on the microbatch.

    Args:
        workers: of the job that follows the fit.
        manifest: of that job.
        fitted: the fit, with the model and the objective that were given again.

    Raises:
        UserError: it is another loss; by how much.
    """
    own = isinstance(fitted.network, FactoryModel) or not is_ours(open_objective(fitted.objective))
    if len(workers.groups) > 1 or not own:
        return
    corpus = stored_corpus(fitted.store, "data")
    chosen = None if corpus is None else _recorded(fitted.store, corpus)
    if corpus is None or chosen is None:
        return
    number, before, scale = chosen
    feed = workers.feed(corpus)
    feed = Feed(feed.plan.only(range(number, number + 1)), feed.read, feed.lengths)
    caught = _Caught()
    workers.load(0)
    passage = Passage(workers, loss_pass("fitted-loss"), feed, caught)
    Pipeline(passage, "a loss of the fit").take([0])
    pool = workers.pool
    proofs = [pool.get(pool.at(stage).proof()) for stage in range(pool.stages)]
    if not caught.losses or any(proof.random for proof in proofs):
        return
    now = float(caught.losses[0])
    dtypes = (workers.dtype, DTYPES[fitted.settings["dtype"]])
    tolerance = max(TOLERANCE[dtype] for dtype in dtypes)
    difference = abs(now - before) / max(abs(before), scale)
    if not difference <= tolerance:
        (name,) = corpus.named(range(number, number + 1)).to_pylist()
        raise UserError(
            f"the loss of {name!r}, an example of {fitted.store.root}",
            f"{before:.6g}, as its fit found it",
            f"{now:.6g}: the model's code, or the objective's, is another one by now",
            "Restore it, or fit again into another directory.",
        )
    manifest.facts["loss_check"] = {"difference": difference, "tolerance": tolerance}
    manifest.write(workers.store)


def _recorded(store: Store, corpus: Corpus) -> tuple[int, float, float] | None:
    """The number of a short example of which the loss is on record, that loss, and the mean size of
    losses."""
    # The first file may be of what a run extends, whose examples lie elsewhere.
    for name in store.names("tables/examples", ".parquet"):
        table = read_table(store, name).select(["id", "tokens", "loss"])
        at = pc.index_in(table["id"].cast(pa.large_string()), value_set=corpus.ids)
        table = table.append_column("number", at).drop_null()
        if len(table):
            break
    else:
        return None
    losses = table["loss"].to_numpy().astype(np.float64)
    if not math.isfinite(scale := float(np.abs(losses).mean())) or scale == 0:
        return None
    # One that weighs, so that the floor of the scale hides nothing.
    heavy = np.flatnonzero(np.abs(losses) >= np.median(np.abs(losses)))
    row = int(heavy[table["tokens"].to_numpy()[heavy].argmin()])
    return table["number"][row].as_py(), float(losses[row]), scale
