"""The end of the network in a product: what the loss makes of tangents, and the cotangents back.

    u_q = J_head ḣ_q                       tangents of the outputs, a slice of positions at a time
    c_q = R u_q                            R = ∇²_z ℓ, the loss's Hessian with respect to outputs
    c_q = (1/D) Σ_d g_d (g_dᵀ u_q)         of a Fisher, g_d the loss's gradient for the d-th labels

``R`` comes from the objective itself by autograd, so a user's own needs no further method. For
softmax with cross-entropy it is ``diag(p) − ppᵀ``, for squared error the identity: there the
Gauss-Newton matrix is the Fisher of labels drawn from the model (Martens 2020, arXiv:1412.1193,
section 9).

Axis letters: Q directions, N examples, T positions, V outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from raycurv.batch import Batch
from raycurv.errors import UserError, user_errors
from raycurv.mathematics.exact.tangents import Rules, forward_tangents, second
from raycurv.mathematics.loss.differentiation import LOSS, Slice, check_loss_shape, slices
from raycurv.mathematics.loss.draws import uniforms
from raycurv.mathematics.loss.objective import Objective
from raycurv.mathematics.sums import Results

# (parameters, a slice of hidden states, its first position) -> outputs.
Head = Callable[[Mapping[str, Tensor], Tensor, int], Tensor]
# What a vector is multiplied by: the (generalised) Gauss-Newton matrix, the Hessian of the loss, or
# the Fisher of labels drawn from the model, or of the data's own.
Matrix = Literal["ggn", "hessian", "fisher", "empirical"]
# Of each example: u_qᵀ R u_q for every direction, [N, Q] float64, whose mean is vᵀGv.
QUADRATIC = "quadratic"
# Besides, [N, Q] float64: gᵀu_q, g the loss's gradient for the data's labels; and the widest
# max_c u_c − min_c u_c of the outputs of a target that counts.
SLOPE, REACH = "slope", "reach"


@dataclass(frozen=True)
class Ends:
    """What the last stage makes of a microbatch in a product.

    Attributes:
        hidden: cotangents of the hidden states, ``[Q, ...]``; of the Hessian ``[1 + Q, ...]``, the
            loss's gradient first.
        parameters: by direction the cotangents of the head's own parameters.
        results: numbers of each example, see :data:`QUADRATIC`; none of the Hessian.
    """

    hidden: Tensor
    parameters: list[dict[str, Tensor]]
    results: Results


@dataclass(frozen=True)
class HeadProduct:
    """Products of the end of the network.

    Attributes:
        objective: summed over an example's tokens.
        head: hidden states to outputs.
        matrix: of all but ``hessian``, which is no product of Jacobians.
        draws: of labels, for ``fisher``.
        seed: of the draws.
        slice_positions: positions at once, for a per-token objective.
        along: whether there are also the loss, :data:`SLOPE` and :data:`REACH`.
    """

    objective: Objective
    head: Head
    matrix: Matrix
    draws: int
    seed: int
    slice_positions: int
    along: bool = False

    def ends(
        self,
        parameters: Mapping[str, Tensor],
        tangents: Mapping[str, Tensor],
        hidden: Tensor,
        moved: Tensor,
        batch: Batch,
        together: bool,
    ) -> Ends:
        """Cotangents of the hidden states and of the head's parameters.

        Args:
            parameters: of the last stage, detached.
            tangents: of its parameters, ``[Q, ...]``.
            hidden: what enters the head.
            moved: its tangents, ``[Q, ...]``.
            together: see :func:`~raycurv.mathematics.exact.tangents.forward_tangents`.

        Raises:
            UserError: the head or the objective cannot be differentiated so.
        """
        if self.matrix == "hessian":
            return self._hessian(parameters, tangents, hidden, moved, batch)
        count = len(moved)
        quadratic = torch.zeros(batch.size, count, dtype=torch.float64, device=hidden.device)
        found = Ends(
            torch.zeros_like(moved), [{} for _ in range(count)], {QUADRATIC: quadratic}
        )  # fmt: skip
        parts = list(slices(self.objective, hidden, batch, self.slice_positions))

        def outputs_of(part: Slice) -> tuple[dict[str, Tensor], Tensor, Tensor, Tensor]:
            """Leaves, what enters, outputs ``[N, ...]`` and their tangents ``[Q, N, ...]``."""
            leaves = {name: p.detach().requires_grad_() for name, p in parameters.items()}
            entered = hidden[part.at].detach().requires_grad_()
            with torch.enable_grad(), Rules():
                outputs = self.head(leaves, entered, part.batch.start)

            def call(p: Mapping[str, Tensor], x: Sequence[Tensor]) -> tuple[Tensor, ...]:
                return (self.head(p, x[0], part.batch.start),)

            there = (slice(None), *part.at)
            (u,) = forward_tangents(
                call, parameters, (entered.detach(),), tangents, (moved[there],), together
            )
            return leaves, entered, outputs, u

        draws = {"fisher": self.draws, "empirical": 1}.get(self.matrix, 0)
        # g_dᵀ u_q of whole examples, before any slice can go back.
        pairs_DQN = hidden.new_zeros(draws, count, batch.size, dtype=torch.float64)
        for part in parts if draws else ():
            _, _, outputs, u = outputs_of(part)
            for draw in range(draws):
                products = _by_example(u * self._gradient(outputs, part, draw), batch)
                pairs_DQN[draw] += products.sum(dim=2, dtype=torch.float64)
        for part in parts:
            leaves, entered, outputs, u = outputs_of(part)
            if draws:
                c = torch.zeros_like(u)
                for draw in range(draws):
                    weights = (pairs_DQN[draw] / draws).to(u.dtype)[..., None]
                    g = self._gradient(outputs, part, draw)
                    c += (weights * _by_example(g[None], batch)).view_as(c)
            else:
                c = self._curved(outputs, part, u)
            quadratic.add_(_by_example(u * c, batch).sum(dim=2, dtype=torch.float64).T)
            if self.along:
                self._add_along(found.results, outputs, part, u, c)
            for q in range(count if outputs.requires_grad else 0):
                back = torch.autograd.grad(
                    outputs, [entered, *leaves.values()], c[q],
                    retain_graph=q + 1 < count, allow_unused=True,
                )  # fmt: skip
                if back[0] is not None:
                    found.hidden[q][part.at] = back[0]
                own = found.parameters[q]
                for name, g in zip(leaves, back[1:], strict=True):
                    if g is not None:
                        own[name] = own[name] + g if name in own else g
        return found

    def _hessian(
        self,
        parameters: Mapping[str, Tensor],
        tangents: Mapping[str, Tensor],
        hidden: Tensor,
        moved: Tensor,
        batch: Batch,
    ) -> Ends:
        """The loss's gradient, and how it changes along every direction."""
        count = len(moved)
        found = Ends(hidden.new_zeros(1 + count, *hidden.shape), [{} for _ in range(count)], {})
        for part in slices(self.objective, hidden, batch, self.slice_positions):

            def call(
                p: Mapping[str, Tensor], x: Sequence[Tensor], part: Slice = part
            ) -> tuple[Tensor, ...]:
                return (self.head(p, x[0], part.batch.start),)

            def back(
                outputs: tuple[Tensor, ...], moved: tuple[Tensor, ...], own: Batch = part.batch
            ) -> Tensor:
                # The loss's own tangent, which not every loss has itself.
                with _twice():
                    return (self._slope(outputs[0], own) * moved[0]).sum()

            for q, own in enumerate(found.parameters):
                made = second(
                    call, parameters, (hidden[part.at],),
                    {name: d[q] for name, d in tangents.items()}, (moved[q][part.at],),
                    back,
                )  # fmt: skip
                (found.hidden[1 + q][part.at],) = made.inputs
                (found.hidden[0][part.at],) = made.gradients
                for name, change in made.parameters.items():
                    own[name] = own[name] + change if name in own else change
        return found

    def _curved(self, outputs: Tensor, part: Slice, u: Tensor) -> Tensor:
        """``R u_q``, by going back twice through the loss alone."""
        z = outputs.detach().requires_grad_()
        labelled = self._labelled(z, part, 0) if part.batch.labels is None else part.batch
        with torch.enable_grad(), _twice():
            g = self._slope(z, labelled)
            if not g.requires_grad:
                # Linear in the outputs, or autograd takes its gradient for constant.
                moved = (z.detach() * 1.01 + 0.01).requires_grad_()
                if not torch.allclose(g, self._slope(moved, labelled)):
                    raise RuntimeError("its gradient changes with the outputs, but has no graph")
                return torch.zeros_like(u)
            found = [
                torch.autograd.grad(g, z, one, retain_graph=True, materialize_grads=True)[0]
                for one in u
            ]
        return torch.stack(found)

    def _add_along(
        self, results: Results, outputs: Tensor, part: Slice, u: Tensor, c: Tensor
    ) -> None:
        """Add a slice's part of the loss, of its slope along every direction, and of the reach."""
        batch = part.batch
        if batch.labels is None:
            raise UserError(
                f"example {batch.ids[0]!r}", "a label, whose loss the step changes", "none",
                "Add a column `labels` to the data.",
            )  # fmt: skip
        z = outputs.detach().requires_grad_()
        with torch.enable_grad():
            value = self.objective.loss(z, batch)
            check_loss_shape(value, batch, "loss")
            (g,) = torch.autograd.grad(value.sum(), z, materialize_grads=True)
        slope = _by_example(u * g, batch).sum(dim=2, dtype=torch.float64).T
        low, high = torch.aminmax(u, dim=-1)
        # Of what the loss does not depend on, the curvature is zero.
        wide = torch.where((c != 0).any(dim=-1), high - low, 0.0)
        reach = _by_example(wide, batch).amax(dim=2).T.double()
        before = results.get(REACH, torch.zeros_like(reach))
        results[LOSS] = results.get(LOSS, 0.0) + value.detach().double()
        results[SLOPE] = results.get(SLOPE, 0.0) + slope
        results[REACH] = reach.maximum(before)

    def _gradient(self, outputs: Tensor, part: Slice, draw: int) -> Tensor:
        """The loss's gradient with respect to the outputs, for labels of a draw or the data's."""
        z = outputs.detach().requires_grad_()
        labelled = part.batch if self.matrix == "empirical" else self._labelled(z, part, draw)
        with torch.enable_grad():
            return self._slope(z, labelled).detach()

    def _slope(self, outputs: Tensor, labelled: Batch) -> Tensor:
        """The loss's gradient with respect to the outputs, which can be differentiated again."""
        value = self.objective.loss(outputs, labelled)
        check_loss_shape(value, labelled, "loss")
        (g,) = torch.autograd.grad(value.sum(), outputs, create_graph=True, materialize_grads=True)
        return g

    def _labelled(self, outputs: Tensor, part: Slice, draw: int) -> Batch:
        """The slice with labels of a draw."""
        uniform = part.counted(uniforms, self.objective, self.seed, draw)
        drawn = self.objective.sample(outputs.detach(), part.batch, uniform)
        return replace(part.batch, labels=drawn)


def _twice() -> AbstractContextManager[None]:
    return user_errors(
        "the objective",
        "a loss that autograd differentiates twice with respect to the outputs",
        "Make it of operations that have second derivatives, or give --matrix fisher, which needs "
        "the first alone.",
        RuntimeError,
    )


def _by_example(values: Tensor, batch: Batch) -> Tensor:
    """``[Q, N, ...]`` as ``[Q, N, X]``, all sequences of an example in one row."""
    return values.reshape(len(values), batch.size, -1)
