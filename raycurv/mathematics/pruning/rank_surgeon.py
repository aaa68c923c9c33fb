"""Pruning under a rank-m Fisher ``F = λ + GᵀG / m`` (M-FAC), exactly, some columns at a time.

Sets of weights, by the Schur complement of the weights that stay (P),

    ([F⁻¹]_QQ)⁻¹ = λ + λ G_Qᵀ (λ m + G_P G_Pᵀ)⁻¹ G_Q

whose terms are all positive: the way by F⁻¹ takes 1/λ less nearly 1/λ. The joint step of what
remains, by the Woodbury identity,

    δ_P = G_Pᵀ z − g_P / λ
    z   = (λ m + G_P G_Pᵀ)⁻¹ (G_Q w_Q + G_P g_P / λ)       P stays, Q goes; g only if not converged

which is ``F_PP δ_P = F_PQ w_Q − g_P``. G_P G_Pᵀ ``[M, M]`` and the bracket ``[M]`` are sums over
parts of the weights: each is formed where the part's columns of G are, and nothing larger travels.
The sums go over the whole model, or over one block where blocks stand alone. Frantar et al. 2021
(arXiv:2107.03356); Kurtic et al. 2022 (arXiv:2203.07259).

A row of G is √B times a mean gradient of B examples, so F has Λ's scale. Axis letters: M rows, N
weights of a part, flattened, O outputs, I inputs. Everything is computed in float64, whatever G is
kept in.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import combinations_with_replacement

import torch
from torch import Tensor

from raycurv.errors import UserError
from raycurv.mathematics.blocks import Block
from raycurv.mathematics.cholesky import cholesky
from raycurv.mathematics.pruning.pattern import Entries, Pattern, joint_pattern, summed_pattern
from raycurv.mathematics.pruning.saliency import obd, obs
from raycurv.mathematics.pruning.structures import NofM
from raycurv.mathematics.pruning.surgeon import Increase
from raycurv.mathematics.pruning.update import Solver, Update
from raycurv.mathematics.rank.rank_inverse import RankInverse

# Runs of outputs and the rows of a rank-m Fisher there, ``[M, o, I]``.
Runs = Callable[[], Iterator[tuple[slice, Tensor]]]


@dataclass(frozen=True)
class _Part:
    """Some outputs of the block: their weights, their columns of G ``[M, N]``, their gradient."""

    outputs: slice
    w_OI: Tensor
    rows_MN: Tensor
    gradient_OI: Tensor | None


@dataclass(frozen=True)
class RankSurgeon:
    """Of a rank-m Fisher that the block is a part of, or all of.

    Attributes:
        block: the part.
        w_OI: its weights.
        runs: gives the rows of G there, a run of outputs at a time.
        inverse: of the Fisher, at the block's first column; ``None`` where its rows are all zero.
        gradient_OI: mean gradient over examples, for a model that has not converged.
        gradient_projection: of that, over all columns of the inverse.
    """

    block: Block
    w_OI: Tensor
    runs: Runs
    inverse: RankInverse | None
    gradient_OI: Tensor | None = None
    gradient_projection: Tensor | None = None

    def obd(self) -> Tensor:
        # F_kk = mean_i g_ik², without λ.
        return torch.cat(
            [
                obd(
                    part.w_OI,
                    part.rows_MN.double().square().mean(dim=0).view(part.w_OI.shape),
                    part.gradient_OI,
                )
                for part in self._parts()
            ]
        )

    def obs(self) -> Tensor:
        if self.inverse is None:
            return torch.zeros(self.w_OI.shape, dtype=torch.float32)
        found = []
        for part in self._parts():
            diagonal = self._at(part).diagonal(part.rows_MN)
            found.append(obs(self._u_OI(part), diagonal.view(part.w_OI.shape)))
        return torch.cat(found)

    def pattern(self, pattern: NofM, keep_OI: Tensor | None = None) -> Pattern:
        if self.inverse is None:
            return summed_pattern(pattern, self.block, self.obs(), keep_OI)
        found = []
        for part in self._parts():
            keep = None if keep_OI is None else keep_OI[part.outputs]
            found.append(self._pattern(pattern, part, keep))
        return Pattern(
            torch.cat([p.keep_OI for p in found]), torch.cat([p.saliency_OB for p in found])
        )

    def _pattern(self, pattern: NofM, part: _Part, keep_OI: Tensor | None) -> Pattern:
        groups, (count, width) = pattern.groups(self.block), part.w_OI.shape
        inverse, rows_MN = self._at(part), part.rows_MN
        device = part.w_OI.device
        places_IM = torch.arange(groups * pattern.of, device=device).view(groups, pattern.of)

        def entries(rows: slice) -> Entries:
            outputs = torch.arange(rows.start, min(rows.stop, count), device=device)
            index_SM = (outputs[:, None, None] * width + places_IM).flatten(0, 1)
            found = inverse.submatrices(rows_MN, index_SM).double()
            found_OBMM = found.unflatten(0, (len(outputs), groups))
            pairs = combinations_with_replacement(range(pattern.of), 2)
            return {(a, b): found_OBMM[..., a, b] for a, b in pairs}

        block = replace(self.block, d_out=count)
        # A row of G for every weight that is looked at.
        return joint_pattern(pattern, block, self._u_OI(part), entries, keep_OI, len(rows_MN))

    def outputs(self) -> Tensor:
        if self.inverse is None:
            return torch.zeros(len(self.w_OI), dtype=torch.float32)

        def sets() -> Iterator[tuple[Tensor, Tensor]]:
            for part in self._parts():
                u_OI = self._u_OI(part)
                yield from zip(part.rows_MN.split(u_OI.shape[1], dim=1), u_OI, strict=True)

        return self._set_saliencies(sets())

    def columns(self, columns: tuple[range, ...]) -> Tensor:
        if self.inverse is None:
            return torch.zeros(len(columns), dtype=torch.float32)
        u_OI = torch.cat([self._u_OI(part) for part in self._parts()])
        rows_MOI = torch.cat([rows for _, rows in self.runs()], dim=1)
        cuts = (slice(run.start, run.stop) for run in columns)
        return self._set_saliencies(
            (rows_MOI[..., cut].flatten(1), u_OI[:, cut].flatten()) for cut in cuts
        )

    def _set_saliencies(self, sets: Iterable[tuple[Tensor, Tensor]]) -> Tensor:
        """Of sets of weights, given as their columns of G and their u.

        Raises:
            NumericalError: λ is lost beside the Gram matrix.
        """
        # ½ λ (u_Qᵀ u_Q + yᵀ (λ m + G_P G_Pᵀ)⁻¹ y),   y = G_Q u_Q
        lam = self._inverse.damping
        damped_MM = _damped(self._inverse.gram, lam)
        found = []
        for rows, u in sets:
            rows, u = rows.double(), u.double()
            root = _kept_root(torch.addmm(damped_MM, rows, rows.T, alpha=-1))
            half = torch.linalg.solve_triangular(root, (rows @ u)[:, None], upper=False)
            found.append(0.5 * lam * (u.square().sum() + half.square().sum()))
        return torch.stack(found).float()

    def share(self, keep_OI: Tensor) -> tuple[Tensor, Tensor]:
        """The block's share of the equations of what remains: ``G_P G_Pᵀ`` ``[M, M]`` and the
        bracket ``[M]``, float64."""
        gram = torch.zeros(self._inverse.gram.shape, dtype=torch.float64)
        bracket = torch.zeros(len(gram), dtype=torch.float64)
        for part in self._parts():
            keep = keep_OI[part.outputs]
            kept = part.rows_MN[:, keep.flatten()].double()
            gram += kept @ kept.T
            chosen = torch.where(keep, 0, part.w_OI.double())
            if part.gradient_OI is not None:
                chosen = torch.where(
                    keep, part.gradient_OI.double() / self._inverse.damping, chosen
                )
            bracket += part.rows_MN.double() @ chosen.flatten()
        return gram, bracket

    def remaining(self, keep_OI: Tensor, solver: Solver, z_M: Tensor | None = None) -> Update:
        """As :meth:`Surgeon.remaining`; without ``z_M`` the block is all of its Fisher.

        Raises:
            NumericalError: λ is lost beside G.
        """
        if self.inverse is None:
            return Update(torch.where(keep_OI, self.w_OI, 0), 0, 0.0, "zero")
        if z_M is None and int(keep_OI.sum()) < len(self.inverse.gram):
            return Update(self._by_weights(keep_OI), 0, 0.0, "ok")
        if z_M is None:
            z_M = solve_kept(*self.share(keep_OI), self._inverse.damping)
        found = []
        for part in self._parts():
            step = (part.rows_MN.double().T @ z_M).view(part.w_OI.shape)
            if part.gradient_OI is not None:
                step -= part.gradient_OI.double() / self._inverse.damping
            moved = torch.where(keep_OI[part.outputs], part.w_OI.double() + step, 0)
            found.append(moved.to(self.w_OI.dtype))
        return Update(torch.cat(found), 0, 0.0, "ok")

    def _by_weights(self, keep_OI: Tensor) -> Tensor:
        """The weights of a block that stands alone, where fewer of them stay than G has rows.

        Their own equations are the smaller ones then, and of the better condition: z would be large
        in directions that G_Pᵀ does not see.
        """
        # (λ + G_PᵀG_P / m) δ_P = G_Pᵀ(G_Q w_Q) / m − g_P
        count, some, removed = len(self._inverse.gram), [], torch.zeros((), dtype=torch.float64)
        for part in self._parts():
            keep = keep_OI[part.outputs]
            some.append(part.rows_MN[:, keep.flatten()].double())
            gone = torch.where(keep, 0, part.w_OI.double())
            removed = removed + part.rows_MN.double() @ gone.flatten()
        kept = torch.cat(some, dim=1)
        right = kept.T @ removed / count
        if self.gradient_OI is not None:
            right -= self.gradient_OI[keep_OI].double()
        matrix = kept.T @ kept / count
        matrix.diagonal().add_(self._inverse.damping)
        root = cholesky(matrix, "the rank-m Fisher of the weights that stay")
        step = torch.cholesky_solve(right[:, None], root)[:, 0]
        new = torch.zeros_like(self.w_OI)
        new[keep_OI] = (self.w_OI[keep_OI].double() + step).to(new.dtype)
        return new

    def increase(self, step_OI: Tensor) -> Increase:
        seen = torch.zeros((), dtype=torch.float64)
        for part in self._parts():
            seen = seen + part.rows_MN.double() @ step_OI[part.outputs].flatten().double()
        first = 0.0
        if self.gradient_OI is not None:
            first = float((self.gradient_OI.double() * step_OI.double()).sum())
        return Increase(rank_increase(seen) + first, seen, first)

    def _parts(self) -> Iterator[_Part]:
        for outputs, rows in self.runs():
            gradient = None if self.gradient_OI is None else self.gradient_OI[outputs]
            yield _Part(outputs, self.w_OI[outputs], rows.flatten(1), gradient)

    @property
    def _inverse(self) -> RankInverse:
        assert self.inverse is not None
        return self.inverse

    def _at(self, part: _Part) -> RankInverse:
        return self._inverse.at(part.outputs.start * self.block.d_in)

    def _u_OI(self, part: _Part) -> Tensor:
        """``w − F⁻¹g`` of a part, float64."""
        w = part.w_OI.double()
        if part.gradient_OI is None:
            return w
        assert self.gradient_projection is not None
        gradient = part.gradient_OI.flatten()[None]
        step = self._at(part).apply(part.rows_MN, gradient, self.gradient_projection)
        return w - step.view(w.shape)


def solve_kept(gram_MM: Tensor, bracket_M: Tensor, lam: float) -> Tensor:
    """``z``, float64 ``[M]``, of the sums over all parts that :meth:`RankSurgeon.share` gives.

    Raises:
        UserError: λ is not above 0.
        NumericalError: λ is lost beside the Gram matrix.
    """
    if not lam > 0:
        raise UserError(
            "the damping of a rank-m Fisher",
            "a number above 0",
            f"{lam:g}",
            "Beyond its m rows the Fisher is λ alone: give --damping a positive value.",
        )
    root = _kept_root(_damped(gram_MM, lam))
    return torch.cholesky_solve(bracket_M.double()[:, None], root)[:, 0]


def rank_increase(seen_M: Tensor) -> float:
    """``½ δᵀFδ`` without λ, ``|Gδ|² / 2m``: the predicted rise of the mean loss per example.

    Args:
        seen_M: ``Gδ``, the sum over all parts. A first-order term is ``gᵀδ`` more, also a sum over
            parts.
    """
    return float(seen_M.double().square().sum()) / (2 * len(seen_M))


def _damped(gram_MM: Tensor, lam: float) -> Tensor:
    """``λ m + GGᵀ``, float64."""
    damped = gram_MM.double().clone()
    damped.diagonal().add_(lam * len(damped))
    return damped


def _kept_root(kept_MM: Tensor) -> Tensor:
    return cholesky(kept_MM, "the Gram matrix of the weights that stay")
