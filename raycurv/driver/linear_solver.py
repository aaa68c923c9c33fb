"""Solvers through the stages, conjugate gradients and descent: a pass an iteration.

    progress/NUMBER    the scalars of every query after an iteration: it is done when they are there

Between iterations, nothing is held but these; vectors lie in files, see
:mod:`raycurv.driver.iterates`. A run that is stopped goes on with the iteration that it was at, and
within this one with the last commit of its pass.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace

import numpy as np
import torch
from torch import Tensor

from raycurv.driver.corpus import Corpus
from raycurv.driver.iterates import Descent, Iteration, IterationGatherer, System, read_grams
from raycurv.driver.multiplier import Multiplier
from raycurv.errors import UserError
from raycurv.files.tensorfile import open_tensors, write_tensors
from raycurv.mathematics.exact.conjugate_gradients import (
    OUTCOMES,
    Progress,
    curvature_along,
    iteration,
)
from raycurv.mathematics.exact.preconditioned_descent import descent_step, largest_values
from raycurv.mathematics.exact.product_sums import check_quadratic
from raycurv.stages.passes import Pass

_NEGATIVE = OUTCOMES.index("negative curvature")
# Is shown every iteration, when its scalars are there.
Shown = Callable[[int, Progress], None]


@dataclass(frozen=True)
class LinearSolver:
    """Solves a system by conjugate gradients, all right-hand sides at once.

    Attributes:
        multiplier: of the examples that C is a mean over.
        system: that is solved.
        queries: names of the right-hand sides, for messages.
        work: a pass of products without directions and gatherer: its matrix is C, and its name
            tells this system from all others of the run.
        coupled: whether the blocks are one system, or each has its own scalars.
        steps: iterations at most.
        tolerance: relative residual at which a right-hand side stops; never taken, or told, as less
            than what the dtype of the model's computation can tell.
    """

    multiplier: Multiplier
    system: System
    queries: Sequence[str]
    work: Pass
    coupled: bool
    steps: int
    tolerance: float

    def solve(self, label: str, shown: Shown = lambda number, progress: None) -> list[Progress]:
        """Iterate until every right-hand side has stopped; gives the scalars of all iterations.

        What was done before is not done again. Answers then lie with the system,
        :meth:`answered` reads them block by block.

        Args:
            label: of the phases, for a person.

        Raises:
            UserError: C + λ has negative curvature, where it may be indefinite, or before the first
                step.
            NumericalError: a product or a dot product is not finite.
        """
        history = self._history()
        while not history or history[-1].running:
            number, before = len(history) + 1, history[-1] if history else None
            current = self._iteration(number, before)
            work = replace(
                self.work,
                name=f"{self.work.name}-{number:04d}",
                directions=current,
                gatherers=(IterationGatherer.of(current),),
            )
            quadratic = self._over(number).multiply(work, label)
            grams, lams = read_grams(current)
            together = grams.sum(dim=0) if self.coupled else grams
            if quadratic is not None:
                # With λ: along a direction where C is zero both are no more than rounding.
                one, product = current.multiplied
                squares = lams[:, None] * grams[..., one, one]
                with_lam = quadratic + (squares.sum(0) if self.coupled else squares.flatten())
                bends = together[..., one, product].flatten()
                check_quadratic(with_lam, bends, self.multiplier.workers.dtype)
            # Recurrences go on below what products of this dtype can tell.
            least = torch.finfo(self.multiplier.workers.dtype).eps
            found = self._next(together, history, least)
            told = torch.where(found.norm > 0, found.residual.clamp_min(least), found.residual)
            found = replace(found, residual=told)
            self._check(found, grams, before)
            tensors = {one.name: getattr(found, one.name) for one in fields(Progress)}
            write_tensors(self.system.place, _file(number), tensors, {}, finite=False)
            self.multiplier.workers.store.delete_directory(f"work/{work.name}")
            self.system.place.delete_directory(f"{number - 1:04d}")
            history.append(found)
            shown(number, found)
        return history

    def answered(self, history: Sequence[Progress]) -> Iteration:
        """What comes after the last iteration; its ``answer(curvature)`` is a block's
        ``[Q, O, I]``."""
        return self._iteration(len(history) + 1, history[-1])

    def _iteration(self, number: int, before: Progress | None) -> Iteration:
        return Iteration.after(self.system, number, before)

    def _over(self, number: int) -> Multiplier:
        """Of the examples that an iteration's products are of."""
        return self.multiplier

    def _next(self, gram: Tensor, history: Sequence[Progress], least: float) -> Progress:
        before = history[-1] if history else None
        return iteration(gram, before, max(self.tolerance, least), self.steps)

    def _history(self) -> list[Progress]:
        place, found = self.system.place, list[Progress]()
        while place.exists(name := _file(len(found) + 1)):
            found.append(Progress(**open_tensors(place, name).read_all()))
        return found

    def _check(self, found: Progress, grams: Tensor, before: Progress | None) -> None:
        """Refuse negative curvature where it is no matter of rounding, or leaves nothing."""
        new = found.outcome == _NEGATIVE
        if before is not None:
            new &= before.outcome != _NEGATIVE
        if self.work.matrix != "hessian":
            new &= found.steps == 0
        if not new.any():
            return
        shares = curvature_along(grams, found.beta)
        query = int(new.nonzero()[0, -1])
        lowest = int(shares[:, query].argmin() if self.coupled else new[:, query].nonzero()[0, 0])
        bend = found.curvature[query] if self.coupled else found.curvature[lowest, query]
        block = list(self.system.own)[lowest]
        number = int(found.steps.max()) + 1
        safe = "a matrix whose curvature is never negative: --matrix ggn"
        raise UserError(
            f"query {self.queries[query]!r}, step {number} of conjugate gradients",
            f"positive curvature along its direction ({self.work.matrix} + λ)",
            f"{float(bend):.3g}, most of which comes from the block {block}",
            f"Give {safe if self.work.matrix == 'hessian' else '--dtype float64'}, or a larger "
            "--damping.",
        )


# Steps of conjugate gradients that tell the rate, and λ_max times it.
_TRIED, _RATE = 5, 0.5


@dataclass(frozen=True)
class DescentSolver(LinearSolver):
    """Solves a system of the whole model by descent on minibatches, preconditioned.

    Minibatches are dealt out anew in every pass over the examples, in an order of the seed alone.

    Attributes:
        corpus: of the examples.
        size: examples of a minibatch at most.
        seed: of their order.
        rate: of every right-hand side, ``[Q]``; see :meth:`rated`.
    """

    corpus: Corpus = field(kw_only=True)
    size: int = field(kw_only=True)
    seed: int = field(kw_only=True)
    rate: Tensor = field(kw_only=True)

    def rated(self, label: str) -> DescentSolver:
        """The same at half of 1 / λ_max of the first minibatch's system, of each right-hand side as
        a few steps of conjugate gradients find it."""
        system = replace(self.system, place=self.system.place.inside("rate"))
        work = replace(self.work, name=f"{self.work.name}-rate")
        found = LinearSolver(self._over(1), system, self.queries, work, True, _TRIED, 0.0)
        largest = largest_values(found.solve(label))
        return replace(self, rate=(_RATE / largest).nan_to_num(0.0))

    def _iteration(self, number: int, before: Progress | None) -> Iteration:
        # Where no minibatch is missing anything, there is no spread to be averaged away.
        whole = self.size >= len(self.corpus)
        start = self.steps + 1 if whole else (self.steps + 1) // 2 + 1
        return Descent(self.system, number, self.system.directions, rate=self.rate, start=start)

    def _over(self, number: int) -> Multiplier:
        count = len(self.corpus)
        begun, part = divmod(number - 1, parts := -(-count // self.size))
        order = np.random.default_rng([self.seed, begun]).permutation(count)
        workers, feed = self.multiplier.workers, self.multiplier.feed
        numbers = np.array_split(order, parts)[part]
        plan = self.corpus.plan(workers.settings.batch_tokens, numbers)
        return replace(self.multiplier, feed=replace(feed, plan=plan))

    def _next(self, gram: Tensor, history: Sequence[Progress], least: float) -> Progress:
        return descent_step(gram, history, self.rate, self.steps)

    def _check(self, found: Progress, grams: Tensor, before: Progress | None) -> None:
        """Nothing: a minibatch's curvature is never negative."""


def _file(number: int) -> str:
    return f"progress/{number:04d}.safetensors"
