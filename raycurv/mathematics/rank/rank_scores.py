"""Self-influence with a rank-m Fisher: ``∇Lᵀ F⁻¹ ∇L`` of every example.

    |∇L|²/λ − |L⁻¹ G∇L|²/λ²      (rank_inverse.py)

Of a block's own inverse a stage finds it alone. Of the whole model's, each stage gives its share of
``|∇L|²`` and ``G∇L``, which add up over stages: M numbers an example travel.

Axis letters: N examples, M rows, O and I a block's axes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from raycurv.mathematics.blocks import Block
from raycurv.mathematics.eigen import own_axes
from raycurv.mathematics.gradients import Rotations, spread
from raycurv.mathematics.influence.scores import SELF_SCORES
from raycurv.mathematics.rank.rank_inverse import RankInverses
from raycurv.mathematics.sums import Combine

SQUARES, PROJECTION = "self_squares", "self_projection"
RESULTS: dict[str, Combine] = {SQUARES: "sum", PROJECTION: "sum"}


class RankSelfScores:
    """Scores examples against themselves with a rank-m Fisher.

    With each block's own inverse they are ``self_scores [N]``; with the whole model's a stage gives
    ``self_squares [N]`` and ``self_projection [N, width]`` instead, for :func:`joint_self_scores`.
    All are float64.

    Args:
        blocks: of the stage.
        rows: block name -> ``G`` ``[M, O, I]``.
        inverses: of the model.
    """

    def __init__(
        self, blocks: Sequence[Block], rows: Mapping[str, Tensor], inverses: RankInverses
    ) -> None:
        self._inverses = inverses
        self._rows = {name: r.flatten(1).double() for name, r in rows.items()}
        self.bases = own_axes(blocks)

    def start(self, examples: int, device: torch.device) -> dict[str, Tensor]:
        # The inverses are on the CPU.
        zeros = torch.zeros(examples, dtype=torch.float64)
        if not self._inverses.joint:
            return {SELF_SCORES: zeros}
        known = (i.width for i in self._inverses.by_block.values() if i is not None)
        projection = torch.zeros(examples, next(known, 0), dtype=torch.float64)
        return {SQUARES: zeros, PROJECTION: projection}

    def add(self, block: Block, rotations: Rotations, results: dict[str, Tensor]) -> None:
        inverse = self._inverses.by_block[block.name]
        if inverse is None:
            return
        for part, m_NOI in rotations.gradients(block):
            whole = spread(m_NOI, rotations.columns(block), block.d_in)
            flat = whole.flatten(1).double().cpu()
            here = inverse.project(self._rows[block.name], flat)
            lengths = flat.square().sum(dim=1)
            if self._inverses.joint:
                results[PROJECTION][part] += here
                results[SQUARES][part] += lengths
            else:
                results[SELF_SCORES][part] += inverse.quadratic(here, lengths)


def joint_self_scores(inverses: RankInverses, results: dict[str, Tensor]) -> dict[str, Tensor]:
    """What all stages found, with ``self_scores [N]`` in place of their shares."""
    if SQUARES not in results:
        return results
    found = {k: v for k, v in results.items() if k not in (SQUARES, PROJECTION)}
    inverse = next(iter(inverses.by_block.values()))
    squares = results[SQUARES]
    scores = (
        torch.zeros_like(squares)
        if inverse is None
        else inverse.quadratic(results[PROJECTION], squares)
    )
    return found | {SELF_SCORES: scores}
