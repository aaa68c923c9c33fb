"""Products of curvature matrices with vectors: against dense matrices, on one stage and on many."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from conftest import Fits
from dense import Truth, matrix_of, worst
from networks import CASES, EVERY, MIXTURE_3, Case, Once
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from raycurv.driver.corpus import stored_corpus
from raycurv.driver.multiplier import Multiplier
from raycurv.driver.workers import Workers
from raycurv.errors import RaycurvError, UserError
from raycurv.jobs.fitted import GivenAgain, fitted_blocks, open_fitted
from raycurv.jobs.influence.influence_settings import InfluenceSettings
from raycurv.jobs.inputs import Inputs
from raycurv.mathematics.blocks import Block
from raycurv.mathematics.exact.parameters import BlockParameters
from raycurv.mathematics.exact.product_sums import check_quadratic
from raycurv.mathematics.exact.tangents import second
from raycurv.progress.reporter import Reporter
from raycurv.stages.passes import Directions, Pass, ProductGatherer
from raycurv.stages.product_stage import Products

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
    fits: Fits, case: Case, matrix: Any = "ggn", draws: int = 1, loss: Any = None, **how: Any
) -> tuple[dict[str, Block], dict[str, Tensor], Tensor | None]:
    """The blocks of a case's fit, the products of all, and the mean of ``vᵀCv``."""
    run = fits.run(case, method="identity")
    source = fits.source(case)
    inputs = Inputs(model=source) if not isinstance(source, str) else Inputs()
    fitted = open_fitted(run.path, inputs, GivenAgain("", (), "", "--fit-objective", False))
    objective = fitted.objective if loss is None else loss
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
            settings, fitted.network, objective, blocks,
            getattr(torch, how.get("dtype") or fitted.settings["dtype"]), 0,
            Reporter(quiet=True), fitted.store,
        )
    ) as workers:  # fmt: skip
        feed = workers.feed(corpus)
        quadratic = Multiplier(workers, fitted.manifest, feed).multiply(work, "products")
    fitted.store.delete_directory("work")
    return {block.name: block for block in blocks}, kept.found, quadratic


class Jacobians:
    """The dense matrix of a case, from every example's derivatives with respect to parameters.

    Matrices of blocks are laid out as parameters by :class:`BlockParameters`, but where the truth's
    network has layers of its own in place of them.
    """

    def __init__(self, truth: Truth, blocks: Mapping[str, Block]) -> None:
        self._truth, self._names = truth, list(blocks)
        self._layout = None
        if truth.case.dense is None:
            self._layout = BlockParameters(truth.network, list(blocks.values()))
        modules = truth.blocks(self._names if self._layout is None else ())
        self._modules = modules
        self._weights = [p for m in modules.values() for p in (m.weight, m.bias) if p is not None]
        if self._layout is not None:
            self._weights = [truth.network.get_parameter(name) for name in self._layout.own]
        self.vector = flat({name: Drawn().of(block) for name, block in blocks.items()}, blocks)

    def _flat(self, found: Sequence[Tensor]) -> Tensor:
        if self._layout is not None:
            by_name = dict(zip(self._layout.own, found, strict=True))
            matrices = self._layout.matrices(by_name)
            return torch.cat([matrices[name].flatten() for name in self._names])
        ahead = iter(found)
        parts = [
            matrix_of(m, next(ahead), None if m.bias is None else next(ahead)).flatten()
            for m in self._modules.values()
        ]
        return torch.cat(parts)

    def _row(self, value: Tensor, again: bool = False) -> Tensor:
        found = torch.autograd.grad(
            value, self._weights, retain_graph=True, create_graph=again, materialize_grads=True
        )
        return self._flat(found)

    def products(self, matrix: str = "ggn") -> Tensor:
        """``[Q, P]``: of the Gauss-Newton matrix, of the Hessian, or of a Fisher of the data's own
        labels or of the first draw's."""
        total, truth = torch.zeros_like(self.vector), self._truth
        for row in truth.case.data:
            z = truth.outputs(row)
            own = truth.drawn(row, 0) if matrix == "fisher" else truth.own(row)
            value = truth.loss(row, z, own)
            if matrix == "hessian":
                # Fused attention has no second derivative.
                with sdpa_kernel(SDPBackend.MATH):
                    value = truth.loss(row, truth.outputs(row), own)
                g = self._row(value, again=True)
                total += torch.stack([self._row(g @ v) for v in self.vector])
            elif matrix != "ggn":
                g = self._row(value)
                total += (self.vector @ g)[:, None] * g
            else:
                jacobian = torch.stack([self._row(one) for one in z.flatten()])

                def loss(z: Tensor, row: Any = row, own: Any = own) -> Tensor:
                    return truth.loss(row, z, own)

                r = torch.autograd.functional.hessian(loss, z.detach()).reshape(z.numel(), -1)
                total += self.vector @ jacobian.T @ r @ jacobian
        return total / len(truth.case.data)


def flat(found: Mapping[str, Tensor], blocks: Mapping[str, Block]) -> Tensor:
    return torch.cat([found[name].flatten(1) for name in blocks], dim=1)


def named(*names: str) -> list[Case]:
    return [case for case in (*CASES, *EVERY) if case.name in names]


# Of each thing that can go wrong in a product one.
PRODUCTS = named(
    "mlp", "regression", "relu in place", "layer called twice", "llama with its head",
    "llama with two adapters", "mixture of experts", "bert of texts", "qwen2 of pairs",
    "roberta of masked words", "conv2d groups circular", "tokens, heads before positions",
    "every kind", "tied ends", "all of gpt2",
)  # fmt: skip


@pytest.mark.parametrize("case", PRODUCTS, ids=lambda case: case.name)
def test_products_are_those_of_the_dense_gauss_newton_matrix(fits: Fits, case: Case) -> None:
    blocks, found, quadratic = multiplied(fits, case)
    dense = Jacobians(fits.truth(case), blocks)
    want = dense.products()
    tolerance = IN_FLOAT32 if case.checkpoint else EXACT
    assert worst(flat(found, blocks), want) < tolerance
    assert quadratic is not None
    dots = (dense.vector * flat(found, blocks)).sum(dim=1)
    check_quadratic(quadratic, dots, torch.float64)
    with pytest.raises(RaycurvError, match="by tangents and by cotangents"):
        check_quadratic(quadratic, 1.001 * dots, torch.float64)
    assert worst(quadratic, (dense.vector * want).sum(dim=1)) < tolerance


@pytest.mark.parametrize("matrix", ("hessian", "fisher", "empirical"))
@pytest.mark.parametrize("case", named("mlp", "llama", "every kind"), ids=lambda case: case.name)
def test_products_are_those_of_the_dense_matrix_that_is_asked_for(
    fits: Fits, case: Case, matrix: str
) -> None:
    blocks, found, _ = multiplied(fits, case, matrix)
    dense = Jacobians(fits.truth(case), blocks)
    tolerance = IN_FLOAT32 if case.checkpoint else EXACT
    assert worst(flat(found, blocks), dense.products(matrix)) < tolerance
    assert worst(flat(found, blocks), dense.products()) > 1e-3  # the other matrix is another one


def test_products_in_float32_are_those_of_float64(fits: Fits) -> None:
    (case,) = named("llama with its head")
    blocks, want, _ = multiplied(fits, case)
    _, found, _ = multiplied(fits, case, dtype="float32")
    assert worst(flat(found, blocks), flat(want, blocks)) < 1e-5


@pytest.mark.parametrize(
    ("matrix", "how"),
    (
        ("ggn", {"stages": 2}),
        ("ggn", {"stages": 3, "replicas": 2}),
        ("ggn", {"stages": 3, "schedule": "swept"}),
        ("ggn", {"batch_tokens": 100, "logits_chunk": 30}),
        ("hessian", {"stages": 3, "schedule": "swept"}),
        ("empirical", {"stages": 2, "logits_chunk": 30}),
    ),
    ids=str,
)
def test_products_do_not_depend_on_stages_replicas_schedule_or_batches(
    fits: Fits, matrix: str, how: dict[str, Any]
) -> None:
    blocks, want, _ = fits.once(("products", matrix), lambda: multiplied(fits, MIXTURE_3, matrix))
    _, found, _ = multiplied(fits, MIXTURE_3, matrix, **how)
    assert worst(flat(found, blocks), flat(want, blocks)) < IN_FLOAT32


def test_what_the_model_computes_one_direction_at_a_time_is_the_same(
    fits: Fits, monkeypatch: pytest.MonkeyPatch
) -> None:
    (case,) = named("all of gpt2")
    blocks, want, _ = multiplied(fits, case)

    def one_by_one(self: Products, find: Any) -> Any:
        return find(False)

    monkeypatch.setattr(Products, "_tried", one_by_one)
    _, found, _ = multiplied(fits, case)
    assert worst(flat(found, blocks), flat(want, blocks)) < EXACT


def test_a_loss_without_a_second_derivative_is_refused_by_name(fits: Fits) -> None:
    with pytest.raises(UserError, match=r"differentiates twice.*--matrix fisher"):
        multiplied(fits, named("mlp")[0], loss=Once())


def test_padding_that_sees_nothing_leaves_second_derivatives_alone() -> None:
    """As that behind a sliding window, which is where the mask leaves a row none of the keys."""
    q, d, c = torch.randn(3, 1, 4, 2, dtype=torch.float64, generator=torch.Generator()).unbind()
    mask = torch.ones(4, 4, dtype=torch.bool).tril()
    mask[2] = False
    seen = mask.any(dim=1)

    def attended(q: Tensor, rows: Tensor) -> Tensor:
        return scaled_dot_product_attention(q[:, rows], q, q, mask[rows])

    found = second(
        lambda parameters, inputs: (attended(inputs[0], torch.ones(4, dtype=torch.bool)),),
        {}, (q,), {}, (d,), lambda y, moved: (moved[0] * c).sum(),
    )  # fmt: skip
    leaf = q.clone().requires_grad_()
    with sdpa_kernel(SDPBackend.MATH):
        value = (attended(leaf, seen) * c[:, seen]).sum()
    (g,) = torch.autograd.grad(value, leaf, create_graph=True)
    (want,) = torch.autograd.grad((g * d).sum(), leaf)
    assert worst(found.gradients[0], g.detach()) < EXACT
    assert worst(found.inputs[0], want) < EXACT
