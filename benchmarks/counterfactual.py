"""What methods find, put to use: removing a query's most influential examples, and wrong labels.

Removal: a method's k most helpful training examples of a query are left out, and the network is
trained again. The better the method, the more the query's loss rises (Park et al. 2023,
arXiv:2303.14186, section 5.2; Bae et al. 2024, arXiv:2405.12186, section 5).

Wrong labels: some of the training labels are another example's or flipped, and the network is
trained on them. A wrong label influences its own loss most (Koh & Liang 2017, arXiv:1703.04730,
section 5.4): examples are looked at in order of self-influence.

Axis letters: Q queries, N examples, M methods.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from retraining import retrain
from tasks import Examples, Task
from torch import Tensor


def removal_rises(
    task: Task, scores: Mapping[str, Tensor], queries: int, count: int, seeds: int
) -> dict[str, Tensor]:
    """How much each query's loss rises without its most helpful examples, ``[Q]`` a method.

    Args:
        scores: method -> ``[Q, N]``; ``random`` is added to them.
        queries: the first so many.
        count: examples that are removed.
        seeds: of retraining, averaged; before and after are of the same seed.
    """
    examples = len(task.train)
    chance_QN = torch.rand(queries, examples, generator=torch.Generator().manual_seed(0))
    ranked = {"random": chance_QN.double(), **scores}
    weights = [torch.ones(1, examples)]
    for scores_QN in ranked.values():
        gone_QK = scores_QN[:queries].topk(count).indices
        weights.append(torch.ones(queries, examples).scatter(1, gone_QK, 0.0))
    rises = torch.zeros(len(ranked), queries, dtype=torch.float64)
    which = torch.arange(queries)
    for seed in range(seeds):
        losses = retrain(task, torch.cat(weights), seed).losses(task, task.queries)[:, :queries]
        after_MQ = losses[1:].view(len(ranked), queries, queries)[:, which, which]
        rises += (after_MQ - losses[0]) / seeds
    return dict(zip(ranked, rises, strict=True))


@dataclass(frozen=True)
class Mislabelled:
    """A task with wrong labels.

    Attributes:
        task: its training labels are partly wrong.
        wrong_N: which.
    """

    task: Task
    wrong_N: Tensor

    @classmethod
    def of(cls, task: Task, share: float, seed: int = 0) -> Mislabelled:
        """Classes become the other class; numbers go round among those that are made wrong."""
        targets = task.train.targets.clone()
        generator = torch.Generator().manual_seed(seed)
        chosen = torch.randperm(len(targets), generator=generator)[: round(share * len(targets))]
        if targets.is_floating_point():
            targets[chosen] = targets[chosen.roll(1)]
        else:
            targets[chosen] = 1 - targets[chosen]
        wrong_N = torch.zeros(len(targets), dtype=torch.bool)
        wrong_N[chosen] = True
        train = Examples(task.train.inputs, targets)
        return cls(dataclasses.replace(task, train=train), wrong_N)

    def found(self, order_by_N: Tensor, share: float) -> float:
        """Part of the wrong labels among the highest ``share`` of all examples."""
        looked = order_by_N.topk(round(share * len(order_by_N))).indices
        return float(self.wrong_N[looked].sum() / self.wrong_N.sum())

    def separation(self, order_by_N: Tensor) -> float:
        """Chance that a wrong label stands above a right one (the area under the ROC curve)."""
        wrong, right = order_by_N[self.wrong_N], order_by_N[~self.wrong_N]
        above = wrong[:, None] > right
        return float(above.double().mean() + 0.5 * (wrong[:, None] == right).double().mean())
