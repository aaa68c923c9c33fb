"""What a network makes of an example does not depend on padding, nor on what else is there."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from networks import VOCAB, sentences, vectors
from torch import Tensor, nn

import raycurv
from raycurv.batch import Batch
from raycurv.errors import UserError
from raycurv.mathematics.loss.differentiation import LossGradients
from raycurv.stages.independence import check_independence, check_objective


def seeded(make: Callable[[], nn.Module]) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return make()


def fit(make: Callable[[], nn.Module], data: Any, out: Path, **settings: Any) -> raycurv.Run:
    given = {"objective": "classification", "batch_tokens": 16, "fisher": "empirical"} | settings
    return raycurv.fit(
        partial(seeded, make),
        data,
        out,
        address="none",
        dtype="float64",
        quiet=True,
        gradients=True,
        **given,
    )


def refused(match: str) -> Any:
    return pytest.raises(UserError, match=match)


class OfTexts:
    """The class of a whole text."""

    columns = ("kind",)

    def loss(self, outputs: Tensor, batch: Any) -> Tensor:
        return F.cross_entropy(outputs, batch.columns["kind"], reduction="none")

    def sample(self, outputs: Tensor, batch: Any, uniform: Any) -> Tensor:
        return batch.columns["kind"]


class OfLast(OfTexts):
    """The class at the last position of the microbatch, or at each text's own last."""

    def __init__(self, own: bool) -> None:
        self.own = own

    def loss(self, outputs: Tensor, batch: Any) -> Tensor:
        return super().loss(batch.at_last(outputs)[0] if self.own else outputs[:, -1], batch)


class Pooling(nn.Module):
    """Queries attend to tokens; a layer on what each of them finds."""

    def __init__(self, queries: int = 1, follows: bool = True) -> None:
        super().__init__()
        self.e = nn.Embedding(VOCAB, 6)
        self.q = nn.Parameter(torch.randn(queries, 1))
        self.a, self.out, self.follows = nn.Linear(6, 6), nn.Linear(6, 3), follows

    def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
        h = self.e(x)
        w = self.q * h[:, None, :, 0]
        if self.follows:
            w = w.masked_fill(attention_mask[:, None] == 0, -1e9)
        return self.out(torch.tanh(self.a(w.softmax(dim=2) @ h)).mean(dim=1))


class Each(nn.Module):
    """A row of classes for each token, of the tokens so far."""

    def __init__(self) -> None:
        super().__init__()
        self.e, self.a, self.out = nn.Embedding(VOCAB, 6), nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.tanh(self.a(self.e(x))).cumsum(dim=1))


class Together(nn.Module):
    """A layer that is passed where all examples of a microbatch say so."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.out = nn.Linear(5, 6), nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.a(x))
        return self.out(torch.tanh(self.b(h)) if bool((x[:, 0] > 0).all()) else h)


class Noisy(nn.Module):
    """Dropout that is always on."""

    def __init__(self, on: bool = True) -> None:
        super().__init__()
        self.a, self.out, self.on = nn.Linear(5, 6), nn.Linear(6, 3), on

    def forward(self, x: Tensor) -> Tensor:
        return self.out(F.dropout(self.a(x), 0.5, training=self.on))


def texts(*lengths: int) -> list[dict[str, Any]]:
    return [row | {"kind": n % 3} for n, row in enumerate(sentences(lengths, False))]


def norms(run: raycurv.Run) -> np.ndarray:
    found = run.gradient_norms()
    rows = sorted(zip(found["id"].to_pylist(), found["block_sq_norms"].to_pylist(), strict=True))
    return np.array([squares for _, squares in rows])


MIXED = texts(8, 8, 3, 2, 5, 4, 2, 3)


def test_a_network_that_sees_padding_is_refused_and_goes_by_the_remedy(tmp_path: Path) -> None:
    how = {"objective": OfTexts(), "blocks": ("a", "out")}
    deaf = partial(Pooling, follows=False)
    with refused(r"example 'sentence 2': .*that are its own.*padding behind its 3 tokens"):
        fit(deaf, MIXED, tmp_path / "deaf", **how)
    labelled = [row | {"labels": row["input_ids"]} for row in MIXED]
    with refused("padding"):
        raycurv.evaluate(
            deaf, labelled, tmp_path / "e", objective=OfTexts(), address="none", batch_tokens=16,
            quiet=True,
        )  # fmt: skip
    fit(deaf, MIXED, tmp_path / "remedy", **how | {"batch_tokens": 1})
    # Control: what follows the mask has the gradients that it has without padding.
    padded = fit(Pooling, MIXED, tmp_path / "padded", **how)
    alone = fit(Pooling, MIXED, tmp_path / "alone", **how | {"batch_tokens": 1})
    np.testing.assert_allclose(norms(padded), norms(alone), rtol=1e-6)


def test_padding_is_looked_at_when_it_comes(tmp_path: Path) -> None:
    data = texts(8, 8, 2, 3)
    how = {"objective": OfTexts(), "blocks": ("a", "out")}
    with refused("padding behind its 2 tokens"):
        fit(partial(Pooling, follows=False), data, tmp_path / "o", **how)
    fit(partial(Pooling, follows=False), data[:2], tmp_path / "control", **how)


def test_an_axis_that_is_as_long_as_the_texts_is_not_taken_for_them(tmp_path: Path) -> None:
    """The microbatch of 4 positions is neither the first nor the first padded one."""
    data = texts(8, 7, 4, 4, 4, 3)
    how = {"objective": OfTexts(), "blocks": ("a", "out")}
    with refused(r"block a, example 'sentence 5': .*no gradient at padding.*as the 4 positions"):
        fit(partial(Pooling, 4), data, tmp_path / "four", **how)
    five = fit(partial(Pooling, 5), data, tmp_path / "five", **how)
    alone = fit(partial(Pooling, 5), data, tmp_path / "alone", **how | {"batch_tokens": 1})
    np.testing.assert_allclose(norms(five), norms(alone), rtol=1e-6)


def test_an_objective_that_reads_padding_is_refused(tmp_path: Path) -> None:
    how = {"blocks": ("a", "out")}
    with refused(r"the objective, example .*batch\.at_last"):
        fit(Each, MIXED, tmp_path / "last", objective=OfLast(False), **how)
    last = fit(Each, MIXED, tmp_path / "own", objective=OfLast(True), **how)
    alone = fit(Each, MIXED, tmp_path / "one", objective=OfLast(False), batch_tokens=1, **how)
    np.testing.assert_allclose(norms(last), norms(alone), rtol=1e-6)


class OfBatch:
    """A class's loss with something of the microbatch in it."""

    def __init__(self, part: Callable[[Tensor], Tensor]) -> None:
        self.part = part

    def loss(self, outputs: Tensor, batch: Any) -> Tensor:
        return F.cross_entropy(self.part(outputs), batch.labels, reduction="none")

    def sample(self, outputs: Tensor, batch: Any, uniform: Any) -> Tensor:
        return (uniform(1)[:, 0] * outputs.shape[1]).long()


PARTS: dict[str, Callable[[Tensor], Tensor]] = {
    "a mean": lambda z: z - z.mean(dim=0),
    "its size": lambda z: z / len(z),
    "the others": lambda z: z @ z.T @ z,
}


@pytest.mark.parametrize("fisher", ["empirical", "sampled"])
@pytest.mark.parametrize("part", PARTS)
def test_an_objective_of_the_whole_microbatch_is_refused(
    tmp_path: Path, part: str, fisher: str
) -> None:
    data = vectors(9, 5, "classes")
    with refused("the objective, example 'row 0': .*where the example is alone"):
        fit(
            partial(Noisy, False),
            data,
            tmp_path / "o",
            objective=OfBatch(PARTS[part]),
            fisher=fisher,
        )


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
def test_an_objective_of_ones_own_is_not_refused(tmp_path: Path, dtype: str) -> None:
    given = {"address": "none", "quiet": True, "batch_tokens": 16}
    raycurv.fit(
        partial(Noisy, False), vectors(9, 5, "classes"), tmp_path / "o", dtype=dtype,
        objective=OfBatch(lambda z: z.float() if dtype == "bfloat16" else z), **given,
    )  # fmt: skip
    texts_, how = texts(8, 8, 3, 2), given | {"blocks": ("a", "out"), "fisher": "empirical"}
    network = partial(seeded, lambda: Each().to(getattr(torch, dtype)))
    raycurv.fit(network, texts_, tmp_path / "t", dtype=dtype, objective=OfLast(True), **how)


def test_losses_are_looked_at_where_nothing_is_differentiated(tmp_path: Path) -> None:
    labelled = [row | {"labels": row["input_ids"]} for row in MIXED]
    for own in (False, True):
        evaluated = partial(
            raycurv.evaluate, partial(seeded, Each), labelled, tmp_path / f"{own}",
            objective=OfLast(own), address="none", batch_tokens=16, quiet=True,
        )  # fmt: skip
        if own:
            evaluated()
        else:
            with refused("the objective, example"):
                evaluated()


def test_what_a_microbatch_decides_together_is_refused(tmp_path: Path) -> None:
    data = vectors(16, 5, "classes")
    with refused("whatever is in the microbatch with it"):
        fit(Together, data, tmp_path / "o")
    fit(Together, data, tmp_path / "remedy", batch_tokens=1)


# What leaves for an example in a microbatch, and for it alone; whether that is refused.
NOT_FINITE = {
    "NaN together": ([math.nan, 1.0], [2.0, 1.0], True),
    "NaN alone": ([2.0, 1.0], [math.nan, 1.0], True),
    "infinity together": ([math.inf, 1.0], [2.0, 1.0], True),
    "other signs": ([-math.inf, 1.0], [math.inf, 1.0], True),
    "beside infinity": ([math.inf, 1.0], [math.inf, 2.0], True),
    "NaN in both": ([math.nan, 1.0], [math.nan, 1.0], False),
    "infinity in both": ([-math.inf, 1.0], [-math.inf, 1.0], False),
}


@pytest.mark.parametrize("name", NOT_FINITE)
def test_what_is_not_finite_agrees_with_itself_alone(name: str) -> None:
    together, alone, wrong = NOT_FINITE[name]
    batch = Batch(0, ("one", "two"), torch.zeros(2, 5), None)
    left = torch.tensor([together, [1.0, 1.0]])

    def forward(part: Batch, entered: Any) -> Any:
        return (torch.tensor([alone if part.ids == ("one",) else [1.0, 1.0]]),)

    def again(part: Batch, hidden: Tensor) -> LossGradients:
        return LossGradients(forward(part, None))

    with refused("example 'one'") if wrong else nullcontext():
        check_independence(forward, batch, None, (left,), "model m")
    with refused("example 'one'") if wrong else nullcontext():
        check_objective(again, batch, left, LossGradients((left,)))


def test_random_numbers_in_a_forward_are_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = vectors(16, 5, "classes")
    for on in (True, False):
        raycurv.fit(
            partial(Noisy, on), data, tmp_path / f"{on}", objective="classification",
            address="none", check_capture=on,
        )  # fmt: skip
        assert ("takes random numbers" in capsys.readouterr().err) == on
