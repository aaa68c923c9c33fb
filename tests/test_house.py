"""What a new thing costs: a result of a fit and a column of scores, made from the outside.

Nothing of raycurv is changed for either but the one line in which it is named.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from dense import worst
from networks import LLAMA_4, MIXER, Case
from torch import Tensor

import raycurv
from raycurv.files.store import Store
from raycurv.files.tensorfile import open_tensors, write_tensors
from raycurv.jobs.influence import gatherers
from raycurv.mathematics.blocks import Block
from raycurv.mathematics.capture import Captured, of_fit
from raycurv.mathematics.gradients import example_gradients
from raycurv.mathematics.influence.scores import Column, PairwiseScores
from raycurv.mathematics.sums import SHARED, Combine, Results, RunningSum, Sums
from raycurv.planning.cost import PassCost
from raycurv.stages.passes import Gatherer
from raycurv.steps import method_steps
from raycurv.steps.step import PassStep

EXACT = 1e-10


# A result of a fit: the mean fourth power of the norms of a block's gradients


class KurtosisSums(Sums):
    def __init__(self, blocks: Sequence[Block], dtype: torch.dtype, device: torch.device) -> None:
        super().__init__([block.name for block in blocks], dtype, device)
        self._blocks = blocks
        self.sums |= {block.name: RunningSum((1,), dtype, device) for block in blocks}
        self.counts = {SHARED: [0]}

    def add(self, draws: Sequence[Captured], counts: bool = True) -> Results:
        for captured in of_fit(draws) if counts else ():
            self.count(SHARED, captured.batch.size)
            for block in self._blocks:
                g, total = captured.gradients[block.name], self.sums[block.name]
                if g is not None and isinstance(total, RunningSum):
                    m_NOI = example_gradients(captured.inputs[block.input_factor], g)
                    total.add(m_NOI.square().sum(dim=(1, 2)).square().sum()[None])
        return {}

    def result(self, name: str) -> Fourth:
        total = self.sums[name]
        assert isinstance(total, RunningSum)
        return Fourth(total.value(name), self.counts[SHARED][0])


@dataclass(frozen=True)
class Fourth:
    total: Tensor
    count: int

    def plus(self, other: Fourth) -> Fourth:
        return Fourth(self.total + other.total, self.count + other.count)


@dataclass(frozen=True)
class KurtosisGatherer(Gatherer):
    store: Store
    name = "fourth"

    def open(self, blocks: tuple[Block, ...], dtype: torch.dtype, device: torch.device) -> Sums:
        return KurtosisSums(blocks, dtype, device)

    def write(self, name: str, result: Fourth, blocks: Mapping[str, Block]) -> None:
        write_tensors(self.store, f"fourth/{name}", {"mean": result.total / result.count}, {})


class Riding(PassCost):
    phase = "fourth powers"
    rides = True


class Fourths(PassStep):
    pass_name = "fourth"
    cost = Riding()

    def sums(self, group: int) -> frozenset[str]:
        names = (block.name for block in self.fit.blocks_of(group))
        return frozenset(n for n in names if not self.fit.store.exists(f"fourth/{n}"))

    def gatherers(self, group: int) -> tuple[Gatherer, ...]:
        return (KurtosisGatherer(self.fit.store),)


HOW: dict[str, dict[str, Any]] = {
    "resident": {},
    "replicas": {"replicas": 2},
    "swept": {"stages": 2, "schedule": "swept", "commit_seconds": 1e-9},
}


@pytest.mark.parametrize("method", ["ekfac", "identity"])
@pytest.mark.parametrize("how", HOW.values(), ids=HOW)
def test_a_result_of_a_fit_is_one_step(
    fits: Any, how: dict[str, Any], method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    case: Case = LLAMA_4
    before = method_steps._steps
    monkeypatch.setattr(method_steps, "_steps", lambda *made: [*before(*made), Fourths])
    own = {"address": "none", "dtype": "float64", "batch_tokens": case.batch_tokens}
    run = raycurv.fit(
        fits.source(case), list(case.data), fits.place(), objective=case.objective, quiet=True,
        method=method, fisher="empirical", **own, **how,
    )  # fmt: skip
    plain = fits.run(case, fisher="empirical", method=method)
    network, store = case.network().double(), Store(run.path)
    modules = {name: network.get_submodule(name) for name in run.block_names()}
    powers: dict[str, list[Tensor]] = {name: [] for name in modules}
    for row in case.data:
        ids = torch.tensor([row["input_ids"]])
        loss = torch.nn.functional.cross_entropy(
            network(ids).logits[0, :-1], ids[0, 1:], reduction="sum"
        ) if ids.shape[1] > 1 else None  # fmt: skip
        for name, module in modules.items():
            parts = [module.weight] + ([] if module.bias is None else [module.bias])
            found = (
                [torch.zeros(1)] if loss is None
                else torch.autograd.grad(loss, parts, retain_graph=True)
            )  # fmt: skip
            powers[name].append(sum(p.square().sum() for p in found).square())
    for name, found in powers.items():
        got = open_tensors(store, f"fourth/{name}").read("mean")
        assert worst(got, torch.stack(found).mean()[None]) < EXACT
    # What stands beside it is as it was, bit for bit where the order of additions is.
    if not how:
        assert run.blocks()["trace"] == plain.blocks()["trace"]


# A column of scores


class Doubled(PairwiseScores):
    results: ClassVar[Mapping[str, Combine]] = {**PairwiseScores.results, "doubled": "sum"}
    columns: ClassVar[Mapping[str, Column]] = {**PairwiseScores.columns, "doubled": "number"}

    def add(self, draws: Sequence[Captured], counts: bool = True) -> Results:
        found = super().add(draws, counts)
        return found | {"doubled": 2 * found["scores"]}


@pytest.mark.parametrize("how", HOW.values(), ids=HOW)
def test_a_column_of_scores_is_declared_where_it_is_made(
    fits: Any, how: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    case = MIXER if "stages" not in how else LLAMA_4
    monkeypatch.setattr(gatherers, "PairwiseScores", Doubled)
    monkeypatch.setattr("raycurv.jobs.influence.score_rows.PairwiseScores", Doubled)
    # Which a class body read when it was made.
    declared = {**gatherers.ScoreGatherer.results, **Doubled.results}
    monkeypatch.setattr(gatherers.ScoreGatherer, "results", declared)
    scores = fits.run(case).influence(
        list(case.queries), list(case.data), fits.place(), rank="full", address="none",
        quiet=True, **how,
    )  # fmt: skip
    table = scores.table()
    assert table.column_names == ["query_id", "train_id", "score", "doubled"]
    assert table["doubled"].to_pylist() == [2 * score for score in table["score"].to_pylist()]
