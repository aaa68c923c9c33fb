"""The pool of a job: made when the first phase needs it, given its stages when one needs them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from raycurv.driver.settings import Execution
from raycurv.errors import UserError
from raycurv.mathematics.blocks import Block
from raycurv.models.model import Model
from raycurv.stages.pool import InProcess, Pool
from raycurv.stages.stage import StageSpec, stage_specs


class Workers:
    """Holds the pool of one job.

    A rerun of a finished job never starts Ray, and one that lacks a single decomposition never
    loads the model.

    Args:
        settings: address, device, logits chunk.
        model: what the stages build.
        objective: name, or the objective itself.
        cuts: layers of each stage.
        dtype: of the model's computation.
        seed: of drawn labels.
    """

    def __init__(
        self,
        settings: Execution,
        model: Model,
        objective: Any,
        cuts: Sequence[range],
        dtype: torch.dtype,
        seed: int,
    ) -> None:
        self._settings, self._model, self._objective = settings, model, objective
        self._cuts, self._dtype, self._seed = cuts, dtype, seed
        self._pool: Pool | None = None
        self._assigned: tuple[Block, ...] | None = None

    @property
    def device(self) -> str:
        """Where stages and decompositions compute."""
        wanted = self._settings.device
        if wanted == "cpu":
            return wanted
        there = "cuda" if self._gpus() else "cpu"
        if wanted == "cuda" and there != wanted:
            raise UserError(
                "--device cuda", "a GPU", "none",
                "Leave --device out, or choose a cluster that has GPUs.",
            )  # fmt: skip
        return there

    def _gpus(self) -> int:
        if self._settings.address == "none":
            return torch.cuda.device_count()
        self.tasks()
        from raycurv.stages.actors import cluster_gpus

        return cluster_gpus()

    def tasks(self) -> Pool:
        """The pool, with or without stages."""
        if self._pool is None:
            if self._settings.address == "none":
                self._pool = InProcess()
            else:
                # Ray takes a second to import, which a job without it need not wait for.
                from raycurv.stages.actors import OnRay

                self._pool = OnRay(self._settings.address)
        return self._pool

    def stages(self, blocks: Sequence[Block]) -> Pool:
        """The pool with its stages built, holding these blocks."""
        pool = self.tasks()
        if not pool.stages:
            base = StageSpec(
                index=0,
                model=self._model,
                units=range(0),
                blocks=(),
                objective=self._objective,
                dtype=self._dtype,
                seed=self._seed,
                logits_chunk=self._settings.logits_chunk,
                device=self.device,
                threads=self._threads(),
            )
            pool.start(stage_specs(base, self._cuts, blocks))
        if self._assigned is not None:
            for stage, units in enumerate(self._cuts):
                mine = tuple(b for b in self._assigned if self._model.unit_of(b.name) in units)
                pool.get(pool.call(stage, "assign", mine))
            self._assigned = None
        return pool

    def assign(self, blocks: tuple[Block, ...]) -> None:
        """Tell stages, now or when they are built, which blocks share input factors."""
        self._assigned = blocks

    def close(self) -> None:
        """Let go of everything."""
        if self._pool is not None:
            self._pool.close()
            self._pool = None

    def _threads(self) -> int | None:
        if self._settings.address == "none":
            return None
        from raycurv.stages.actors import cluster_cores, smallest_node_cores

        # All actors together never have more threads than there are cores.
        return max(1, min(cluster_cores() // len(self._cuts), smallest_node_cores()))
