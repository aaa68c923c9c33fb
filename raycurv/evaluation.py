"""Evaluating a model from Python, and reading what an evaluation left."""

from __future__ import annotations

import os
from typing import Any

import pyarrow as pa

from raycurv.files.store import Store
from raycurv.files.tables import read_directory
from raycurv.jobs.evaluate.evaluate_settings import EvaluateSettings
from raycurv.jobs.evaluate.evaluating import evaluate as run_evaluate
from raycurv.jobs.inputs import AnyModel, AnySource, settings_and_inputs
from raycurv.mathematics.loss.objective import Objective
from raycurv.progress.reporter import Reporter
from raycurv.summary_html import summary_html


def evaluate(
    model: AnyModel,
    data: AnySource,
    out: str | os.PathLike[str],
    objective: str | Objective | None = None,
    quiet: bool = False,
    **settings: Any,
) -> Evaluation:
    """Loss, perplexity and accuracy of a model; the same call continues one that stopped.

    Args:
        model: as for :func:`raycurv.fit`, as are the data.
        data: see there.
        out: where the results go.
        objective: its name, or the object itself (see :class:`raycurv.Objective`); by default what
            the model was trained for, as for ``--objective``.
        quiet: show no progress.
        **settings: the fields of :class:`raycurv.EvaluateSettings`; ``address="none"`` runs without
            Ray.

    Raises:
        UserError: a mistake in settings, model or data.
    """
    given = {"model": model, "data": data, "out": out, "objective": objective} | settings
    chosen, inputs = settings_and_inputs(EvaluateSettings, given)
    return Evaluation(*run_evaluate(chosen, inputs, Reporter(quiet, chosen.log)))


class Evaluation:
    """What a model's loss on a data set is; ``len()`` is the number of examples.

    Attributes:
        loss: mean over examples, each summed over its targets, in nats.
        loss_per_target: mean over targets.
        perplexity: its exponential; ``None`` where the objective is not called on tokens.
        accuracy: share of the targets that the model predicts; ``None`` where nobody counts them.
        tokens: of all examples.
        targets: of all examples.
    """

    def __init__(self, store: Store, numbers: dict[str, Any]) -> None:
        self._store, self._count = store, int(numbers["examples"])
        self.loss: float = numbers["loss"]
        self.loss_per_target: float = numbers["loss_per_target"]
        self.perplexity: float | None = numbers.get("perplexity")
        self.accuracy: float | None = numbers.get("accuracy")
        self.tokens: int = numbers["tokens"]
        self.targets: int = numbers["targets"]

    def __len__(self) -> int:
        return self._count

    def __repr__(self) -> str:
        return (
            f"<raycurv evaluation {self._store.root}: loss {self.loss:.6g}, {len(self):,} examples>"
        )

    def _repr_html_(self) -> str:
        named = {
            "loss of an example, nats": self.loss, "of a target": self.loss_per_target,
            "perplexity": self.perplexity, "accuracy": self.accuracy,
        }  # fmt: skip
        facts = {name: "" if number is None else f"{number:.6g}" for name, number in named.items()}
        counts = {"examples": len(self), "tokens": self.tokens, "targets": self.targets}
        facts |= {name: f"{count:,}" for name, count in counts.items()}
        return summary_html("evaluation", self._store.root, facts)

    @property
    def path(self) -> str:
        """The directory of the evaluation, as an absolute path or a URI."""
        return self._store.root

    def examples(self) -> pa.Table:
        """A row for each example: ``id``, ``tokens``, ``targets``, ``loss``, ``correct``."""
        return read_directory(self._store, "tables/examples")
