"""Losses of models on the same examples, one model after the other.

The examples are read and the stages are built once. From one model to the next, where it differs in
patches alone, resident stages change the weights of these blocks: a forward through the data is all
that a model takes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from raycurv.driver.commits import last_commit, plan_mark
from raycurv.driver.corpus import Corpus
from raycurv.driver.feed import Feed
from raycurv.driver.sinks import ExampleRows, rows_by_part
from raycurv.driver.sweep import Sweep, Task, commit_directory
from raycurv.driver.workers import Workers
from raycurv.files.manifest import Manifest
from raycurv.models.model import Model
from raycurv.models.patched import parts
from raycurv.stages.passes import Pass, loss_pass

_STREAM = "examples"


@dataclass(frozen=True)
class Losses:
    """Forward passes of a corpus, each of one model.

    What a pass found lies in the directory's ``work/`` until the caller deletes that: a restart
    goes on within a pass, and does not repeat one that is finished.

    Attributes:
        workers: hold the stages, of a model that the others are patched from or are.
        manifest: of the run; tells its data and model from others.
    """

    workers: Workers
    manifest: Manifest
    corpus: Corpus

    def of(self, model: Model, label: str = "losses") -> Tensor:
        """Every example's loss under a model, summed over its targets, in nats; ``[N]`` float64.

        Args:
            model: the workers' own, or one that differs from it in patches alone.

        Raises:
            UserError: a loss is not finite (names the example), or a patch does not fit.
        """
        found = [table["loss"].to_numpy() for _, table in self.tables(model, label)]
        return torch.from_numpy(np.concatenate(found))

    def tables(self, model: Model, label: str = "losses") -> Iterator[tuple[int, pa.Table]]:
        """What a pass finds of the examples, a part of the corpus at a time, in its order.

        Yields:
            the part's number, and ``index``, ``loss`` (float64) and ``correct`` of its examples.

        Raises:
            UserError: see :meth:`of`.
        """
        mark = _mark(model)
        work = loss_pass(f"losses-{mark}" if mark else "losses")
        names = self._finished(work) or self._run(model, work, mark, label)
        return rows_by_part(self.workers.store, names)

    def _finished(self, work: Pass) -> list[str]:
        """The files of a pass that has come to its end; none of another."""
        groups = len(self.workers.groups)
        place = commit_directory(work.name, groups - 1, groups)
        commit = last_commit(self.workers.store, place, plan_mark(self._feed.plan))
        return commit.rows if commit is not None and commit.finished else []

    def _run(self, model: Model, work: Pass, mark: str, label: str) -> list[str]:
        """Take the corpus through a model; gives the files of what was found."""
        self.workers.become(model)
        # Hidden states of one model are of no use to another.
        prints = self.manifest.fingerprints | {"patches": mark}
        of_model = replace(self.manifest, fingerprints=prints)
        sweep = Sweep(self.workers, of_model, {_STREAM: self._feed})
        sweep.forward()
        sink = ExampleRows(self.workers.store, None)
        task = Task(_STREAM, self._feed, work, work, False, sink)
        names = sweep.run(sweep.last, task, label, sweep.last)
        sweep.end()
        return names

    @cached_property
    def _feed(self) -> Feed:
        # One for all models: it keeps the examples that it has read last.
        return self.workers.feed(self.corpus)


def _mark(model: Model) -> str:
    """Tells models that differ in patches apart; empty for one without."""
    patches, _ = parts(model)
    if not patches:
        return ""
    said = json.dumps({name: patch.mark for name, patch in patches.items()}, sort_keys=True)
    return hashlib.blake2b(said.encode(), digest_size=16).hexdigest()
