"""Products of curvature matrices with vectors: against dense matrices, on one stage and on many."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from conftest import Fits
from dense import Truth, matrix_of, worst
from networks import CASES, LLAMA_4, MIXTURE_3, Case
from torch import Tensor

from raycurv.driver.corpus import stored_corpus
from raycurv.driver.multiplier import Multiplier
from raycurv.driver.workers import Workers
from raycurv.jobs.fitted import GivenAgain, fitted_blocks, open_fitted
from raycurv.jobs.influence.influence_settings import InfluenceSettings
from raycurv.jobs.inputs import Inputs
from raycurv.mathematics.blocks import Block
from raycurv.progress.reporter import Reporter
from raycurv.stages.passes import Directions, Pass, ProductGatherer

# float64 beside the dense matrix; HF computes some norms and softmaxes in float32.
EXACT, IN_FLOAT32 = 1e-10, 5e-7


@dataclass(frozen=True)
class Drawn(Directions):
    """Gaussian vectors that depend on their block alone."""

    count: int = 3

    def open(
        self, blocks: tuple[Block, ...], dtype: torch.dtype, device: torch.device
    ) -> dict[str, Tensor]:
        return {block.name: self.of(block).to(device, dtype) for block in blocks}

    def of(self, block: Block) -> Tensor:
        generator = torch.Generator().manual_seed(sum(block.name.encode()))
        shape = (self.count, block.d_out, block.d_in)
        return torch.randn(shape, generator=generator, dtype=torch.float64)


@dataclass(frozen=True)
class Kept(ProductGatherer):
    """Keeps the products in this process."""

    found: dict[str, Tensor] = field(default_factory=dict)

    def write(self, name: str, result: Any, blocks: Mapping[str, Block]) -> None:
        self.found[name] = result.mean


def multiplied(
    fits: Fits, case: Case, matrix: Any = "ggn", draws: int = 1, fit: Any = None, **how: Any
) -> tuple[dict[str, Block], dict[str, Tensor], Tensor | None]:
    """The blocks of a case's fit, the products of all, and the mean of ``vᵀCv``."""
    run = fits.run(case, **(fit or {"method": "identity"}))
    source = fits.source(case)
    inputs = Inputs(model=source) if not isinstance(source, str) else Inputs()
    fitted = open_fitted(run.path, inputs, GivenAgain("", (), "", "--fit-objective", False))
    settings = InfluenceSettings(
        **{"address": "none", "batch_tokens": case.batch_tokens, **how}
    ).resolved()
    blocks = fitted_blocks(fitted.store, fitted.network)
    corpus = stored_corpus(fitted.store, "data")
    assert corpus is not None
    kept = Kept(Drawn.count)
    work = Pass("products", "product", draws, (kept,), directions=Drawn(), matrix=matrix)
    with closing(
        Workers(
            settings, fitted.network, fitted.objective, blocks,
            getattr(torch, how.get("dtype") or fitted.settings["dtype"]), 0,
            Reporter(quiet=True), fitted.store,
        )
    ) as workers:  # fmt: skip
        feed = workers.feed(corpus)
        quadratic = Multiplier(workers, fitted.manifest, feed).multiply(work, "products")
    fitted.store.delete_directory("work")
    return {block.name: block for block in blocks}, kept.found, quadratic


class Jacobians:
    """The dense matrix of a case, from every example's Jacobian."""

    def __init__(self, truth: Truth, blocks: Mapping[str, Block]) -> None:
        self._truth, self._names = truth, list(blocks)
        self._modules = truth.blocks(self._names)
        self.vector = torch.cat(
            [Drawn().of(blocks[name]).flatten(1) for name in self._names], dim=1
        )

    def _row(self, value: Tensor) -> Tensor:
        weights = [p for m in self._modules.values() for p in (m.weight, m.bias) if p is not None]
        found = iter(torch.autograd.grad(value, weights, retain_graph=True, materialize_grads=True))
        parts = [
            matrix_of(m, next(found), None if m.bias is None else next(found)).flatten()
            for m in self._modules.values()
        ]
        return torch.cat(parts)

    def products(self, matrix: str = "ggn") -> Tensor:
        """``[Q, P]``: of the Gauss-Newton matrix, or of the data's own labels' Fisher."""
        total = torch.zeros_like(self.vector)
        for row in self._truth.case.data:
            z = self._truth.outputs(row)
            own = self._truth.own(row)
            if matrix == "empirical":
                g = self._row(self._truth.loss(row, z, own))
                total += (self.vector @ g)[:, None] * g
                continue
            jacobian = torch.stack([self._row(one) for one in z.flatten()])

            def loss(z: Tensor, row: Any = row, own: Any = own) -> Tensor:
                return self._truth.loss(row, z, own)

            r = torch.autograd.functional.hessian(loss, z.detach()).reshape(z.numel(), -1)
            total += self.vector @ jacobian.T @ r @ jacobian
        return total / len(self._truth.case.data)


def flat(found: Mapping[str, Tensor], blocks: Mapping[str, Block]) -> Tensor:
    return torch.cat([found[name].flatten(1) for name in blocks], dim=1)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_products_are_those_of_the_dense_gauss_newton_matrix(fits: Fits, case: Case) -> None:
    blocks, found, quadratic = multiplied(fits, case)
    dense = Jacobians(fits.truth(case), blocks)
    want = dense.products()
    tolerance = IN_FLOAT32 if case.checkpoint else EXACT
    assert worst(flat(found, blocks), want) < tolerance
    assert quadratic is not None
    assert worst(quadratic, (dense.vector * want).sum(dim=1)) < tolerance


@pytest.mark.parametrize(
    "how",
    [
        {"stages": 1},
        {"stages": 2},
        {"stages": 4},
        {"stages": 4, "replicas": 2},
        {"stages": 4, "schedule": "swept"},
        {"stages": 2, "batch_tokens": 100},
    ],
    ids=str,
)
@pytest.mark.parametrize("case", (LLAMA_4, MIXTURE_3), ids=lambda case: case.name)
@pytest.mark.parametrize("matrix", ("ggn", "hessian"))
def test_products_do_not_depend_on_stages_replicas_or_schedule(
    fits: Fits, case: Case, how: dict[str, Any], matrix: str
) -> None:
    blocks, want, _ = multiplied(fits, case, matrix)
    if case is MIXTURE_3 and how["stages"] == 4:
        how = how | {"stages": 3}
    _, found, _ = multiplied(fits, case, matrix, **how)
    assert worst(flat(found, blocks), flat(want, blocks)) < IN_FLOAT32
