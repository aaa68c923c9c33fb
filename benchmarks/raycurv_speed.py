"""raycurv's half of the speed comparison: one run of all phases in this process, without Ray.

``speed.py`` starts it as ``raycurv_speed.py JOB.json``. A job holds

    shape, place    the key of ``shapes.SHAPES``, and the directory that it was prepared in
    mode, threads   which arithmetic; threads of torch
    out             an .npz to write ``scores [Q, N]`` and ``self [N]`` to

and beside it comes a .json: ``phases`` (name -> costs), ``held`` (bytes in memory before the first
of them) and ``versions``. All that a job does is in one of the phases: what comes before the first
pass (reading examples, building the model, the layout) counts as covariance, tables as corrected
eigenvalues, and so on.
"""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from clock import Clock, resident
from shapes import SHAPES, SpeedShape, load_network
from torch import nn

import raycurv
from raycurv.driver.settings import IN_MEMORY
from raycurv.jobs.fit.fitting import fit
from raycurv.jobs.influence.scoring import influence
from raycurv.jobs.inputs import Inputs
from raycurv.progress.phase import PhaseProgress
from raycurv.progress.reporter import Reporter

# What the run's own phases begin.
BEGINS = {"eigendecompositions": "eigendecomposition", "second pass: Λ": "lambda"}
# "together" makes pairwise scores and self-influence in one job, as a user would; its self is
# counted with pairwise.
MODES: dict[str, dict[str, Any]] = {
    "float32": {},
    "together": {},
    "float64": {"dtype": "float64"},
    "bfloat16": {"dtype": "bfloat16"},
}


class Watched(Reporter):
    """Tells a clock which phase begins."""

    def __init__(self, clock: Clock) -> None:
        super().__init__(quiet=True)
        self._clock = clock

    def phase(
        self, name: str, total: int, unit: str, where: str = ""
    ) -> AbstractContextManager[PhaseProgress]:
        if name in BEGINS:
            self._clock.begin(BEGINS[name])
        return super().phase(name, total, unit, where)


def read_rows(shape: SpeedShape, place: Path, part: str) -> list[dict[str, Any]]:
    """Examples as raycurv takes them, their ids in order."""
    examples = np.load(place / "examples.npz")
    if shape.network == "llama":
        columns = [{"input_ids": ids.tolist()} for ids in examples[part]]
    else:
        labels = examples[{"train": "train_labels", "queries": "query_labels"}[part]]
        pairs = zip(examples[part], labels, strict=True)
        columns = [{"inputs": x.tolist(), "labels": int(y)} for x, y in pairs]
    return [{"id": f"{n:05d}"} | row for n, row in enumerate(columns)]


def main(job: dict[str, Any]) -> None:
    """Fit, score, write."""
    torch.set_num_threads(job["threads"])
    shape, place, clock = SHAPES[job["shape"]], Path(job["place"]), Clock()
    model: Callable[[], nn.Module] | None = None
    if shape.network != "llama":
        weights = place / "weights.safetensors"
        model = functools.partial(load_network, shape.network, weights)
    how = {"address": "none", "batch_tokens": shape.batch * shape.length, "device": "cpu"}
    held = resident()
    with TemporaryDirectory() as directory:
        run = f"{directory}/run"
        clock.begin("covariance")
        train, queries = (read_rows(shape, place, part) for part in ("train", "queries"))
        chosen = raycurv.FitSettings(
            model=str(place / "model") if model is None else IN_MEMORY,
            data=IN_MEMORY,
            out=run,
            fisher="empirical",
            objective="causal-lm" if model is None else "classification",
            **how,
            **MODES[job["mode"]],
        )
        fit(chosen, Inputs(model=model, data=train), Watched(clock))

        def score(name: str, asked: list[dict[str, Any]], own: bool) -> raycurv.Scores:
            settings = raycurv.InfluenceSettings(
                run=run,
                queries=IN_MEMORY,
                train=IN_MEMORY,
                out=f"{directory}/{name}",
                rank="full",
                self_influence=own,
                **how,
            )
            inputs = Inputs(queries=asked, train=train, model=model)
            influence(settings, inputs, Reporter(quiet=True))
            return raycurv.open_scores(settings.out)

        clock.begin("pairwise")
        together = job["mode"] == "together"
        found = score("pairwise", queries, together)
        scores, rows, columns = found.matrix()
        scores = scores[np.argsort(rows)][:, np.argsort(columns)]
        if not together:
            clock.begin("self")
            found = score("self", queries[:1], True)
        own = found.self_influence().sort_by("id")["score"].to_numpy()
        clock.end()
    np.savez(job["out"], scores=scores, self=own)
    clock.write(Path(job["out"]).with_suffix(".json"), held, ("raycurv", "torch", "transformers"))


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))
