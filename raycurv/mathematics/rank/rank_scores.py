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
from raycurv.mathematics.capture import Captured
from raycurv.mathematics.eigen import own_axes
from raycurv.mathematics.gradients import Rotations
from raycurv.mathematics.rank.rank_inverse import RankInverses

SQUARES, PROJECTION = "self_squares", "self_projection"


class RankSelfScores:
    """Scores every example against itself.

    Args:
        blocks: of the stage.
        rows: block name -> ``G`` ``[M, O, I]``.
        inverses: of the model.
        dtype: of the model's computation.
    """

    def __init__(
        self,
        blocks: Sequence[Block],
        rows: Mapping[str, Tensor],
        inverses: RankInverses,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self._blocks, self._inverses = tuple(blocks), inverses
        self._rows = {name: r.flatten(1).double() for name, r in rows.items()}
        self._dtype = torch.float64 if dtype == torch.float64 else torch.float32
        self._bases = own_axes(blocks)

    def add(self, draws: Sequence[Captured]) -> dict[str, Tensor]:
        """``self_scores [N]``; of the whole model's inverse ``self_squares [N]`` and
        ``self_projection [N, width]`` instead, float64."""
        (captured,) = draws
        rotations = Rotations(captured, self._bases, self._blocks, self._dtype)
        count = captured.batch.size
        squares, scores = (torch.zeros(count, dtype=torch.float64) for _ in range(2))
        projection: Tensor | None = None
        for block in self._blocks:
            inverse = self._inverses.by_block[block.name]
            if inverse is None:
                continue
            for part, m_NOI in rotations.gradients(block):
                flat = m_NOI.flatten(1).double().cpu()
                here = inverse.project(self._rows[block.name], flat)
                lengths = flat.square().sum(dim=1)
                if not self._inverses.whole:
                    scores[part] += inverse.quadratic(here, lengths)
                    continue
                if projection is None:
                    projection = torch.zeros(count, inverse.width, dtype=torch.float64)
                projection[part] += here
                squares[part] += lengths
        if not self._inverses.whole:
            return {"self_scores": scores}
        if projection is None:
            known = (i.width for i in self._inverses.by_block.values() if i is not None)
            projection = torch.zeros(count, next(known, 0), dtype=torch.float64)
        return {SQUARES: squares, PROJECTION: projection}


def whole_self_scores(inverses: RankInverses, results: dict[str, Tensor]) -> dict[str, Tensor]:
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
    return found | {"self_scores": scores}
