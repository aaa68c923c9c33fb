"""Labels fit the objective and the outputs, or are named; so are networks that cannot take them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from commands import classified, classifier, failure_in, flags_of, run_here, write_rows
from torch import Tensor, nn

import raycurv
from raycurv import CausalLM, Classification, Regression, UserError
from raycurv.batch import Batch
from raycurv.mathematics.loss.differentiation import differentiate

IDS = ("ada", "bob", "cyd")
HERE: dict[str, Any] = {"address": "none", "quiet": True, "dtype": "float64"}
ROWS = classified(5)
TARGETS = ("sampled", "labels", "both", "measurement", "nothing")


def batch_of(labels: Any, mask: Tensor | None = None) -> Batch:
    labels = None if labels is None else torch.as_tensor(labels)
    return Batch(0, IDS, torch.zeros(3, 4), mask=mask, labels=labels)


def found(objective: Any, outputs: Any, labels: Any, target: Any = "labels") -> Any:
    """Losses and gradients where the hidden states are the outputs themselves."""
    hidden = torch.as_tensor(outputs, dtype=torch.float64)
    mask = torch.ones(3, 4, dtype=torch.bool) if objective.per_token else None
    return differentiate(
        objective, lambda part, start: part, hidden, batch_of(labels, mask), target, 1, 0, 2,
        lambda draw: None,
    )  # fmt: skip


LOGITS = torch.tensor([[2.0, -1.0, 0.5], [0.0, 0.3, 1.0], [-1.0, 4.0, 0.0]], dtype=torch.float64)
CLASSES = [2, 0, 1]
ONE_HOT = nn.functional.one_hot(torch.tensor(CLASSES), 3)


@pytest.mark.parametrize(
    "labels",
    [[[2], [0], [1]], [2.0, 0.0, 1.0], np.array([2, 0, 1], np.uint8), ONE_HOT, ONE_HOT.double()],
    ids=["column", "floats", "bytes", "one-hot", "one-hot floats"],
)
@pytest.mark.parametrize("target", TARGETS)
def test_labels_of_any_shape_and_dtype_that_say_the_same_give_the_same(
    labels: Any, target: Any
) -> None:
    want, got = (found(Classification(), LOGITS, y, target) for y in (CLASSES, labels))
    for a, b in zip(want.gradients, got.gradients, strict=True):
        assert torch.allclose(a, b, rtol=0, atol=1e-15)
    assert want.results.keys() == got.results.keys()
    assert all(torch.allclose(v, got.results[k], atol=1e-15) for k, v in want.results.items())
    if target == "labels":
        others = found(Classification(), LOGITS, [0, 0, 1], target)
        assert not torch.allclose(others.results["loss"], got.results["loss"])


def test_soft_labels_have_the_cross_entropy_with_probabilities() -> None:
    soft = torch.tensor([[0.2, 0.5, 0.3], [0.0, 0.25, 0.75], [1.0, 0.0, 0.0]])
    got = found(Classification(), LOGITS, soft)
    p = soft.double()
    assert torch.allclose(got.results["loss"], -(p * LOGITS.log_softmax(1)).sum(1), atol=1e-8)
    assert torch.allclose(got.gradients[0], LOGITS.softmax(1) - p, atol=1e-8)
    judged = found(Classification(), LOGITS, soft, "nothing").results["correct"]
    assert judged.tolist() == [False, True, False]


@pytest.mark.parametrize("squeezed", [True, False])
def test_a_regression_pairs_each_label_with_its_own_output(squeezed: bool) -> None:
    """One number an example, with or without an axis of its own: never all pairs of examples."""
    f, y = torch.tensor([1.0, 2.0, 4.0]), torch.tensor([0.0, 4.0, 4.0])
    for outputs, labels in ((f, y[:, None]), (f[:, None], y), (f, y), (f[:, None], y[:, None])):
        got = found(Regression(), outputs, labels if squeezed else labels.long())
        assert got.results["loss"].tolist() == [0.5, 2.0, 0.0]
        assert got.gradients[0].flatten().tolist() == [1.0, -2.0, 0.0]
        assert found(Regression(), outputs, None, "sampled").gradients[0].shape == outputs.shape


V4 = torch.zeros(3, 4, 5)
# What is given: the objective, outputs, labels; and what the message says.
WRONG: dict[str, tuple[Any, Any, Any, Sequence[str]]] = {
    "a fraction": (
        Classification(), LOGITS, [1.0, 1.9, 0.5],
        ("example 'bob'", "a class from 0 to 2", "1.9", "--objective regression"),
    ),
    "negative": (Classification(), LOGITS, [0, 1, -3], ("example 'cyd'", "label -3")),
    "no target": (Classification(), LOGITS, [0, -100, 1], ("'bob'", "label -100", "Leave out")),
    "too large": (Classification(), LOGITS, [3, 0, 1], ("'ada'", "label 3", "that class")),
    "far too large": (Classification(), LOGITS, [0.0, 1e30, 1.0], ("'bob'", "a class from 0")),
    "NaN": (Classification(), LOGITS, [0.0, 1.0, math.nan], ("'cyd'", "nan")),
    "several classes": (
        Classification(), LOGITS, [[0, 1, 0], [1, 1, 0], [0, 0, 1]],
        ("'bob'", "sum to 1", "a sum of 2", "binary cross-entropy"),
    ),
    "a negative probability": (
        Classification(), LOGITS, [[0, 1, 0], [1.5, -0.5, 0], [0, 0, 1]],
        ("'bob'", "none below 0", "-0.5"),
    ),
    "probabilities of other classes": (
        Classification(), LOGITS, [[0, 1]] * 3, ("probabilities of 3 classes", "shape [2]"),
    ),
    "one logit": (Classification(), [1.0, 2.0, 3.0], [0, 1, 1], ("[3]", "torch.stack")),
    "one class": (Classification(), [[1.0]] * 3, [0, 0, 0], ("[3, 1]", "torch.stack")),
    "pixels": (
        Classification(), torch.zeros(3, 2, 4, 4), [0, 1, 1],
        ("[3, 2, 4, 4]", "package.module:Name"),
    ),
    "positions": (Classification(), V4, [0, 1, 1], ("[3, 4, 5]", "one row of logits an example")),
    "examples that became one": (Classification(), LOGITS[:1], CLASSES, ("here [3, …]", "[1, 3]")),
    "labels transposed": (
        Regression(), torch.zeros(3, 2, 4), torch.zeros(3, 4, 2),
        ("regression, example 'ada'", "(3, 2, 4)", "(3, 4, 2)"),
    ),
    "numbers of other examples": (Regression(), torch.zeros(6, 2), torch.zeros(3, 4), ("[3, …]",)),
    "one position short": (
        CausalLM(), V4[:, :3], torch.zeros(3, 4).long(),
        ("outputs for [3, 4]", "got [3, 3]", "examples 'ada'"),
    ),
    "a table a position": (
        CausalLM(), torch.zeros(3, 4, 5, 2), torch.zeros(3, 4).long(),
        ("causal-lm", "here [3, 2]", "[3, 2, 5, 2]"),
    ),
    "a word that the model has not": (
        CausalLM(), V4, [[0, 1, 2, 3], [0, 1, 2, 5], [0, 0, 0, 0]],
        ("example 'bob'", "labels from 0 to 4", "5 at position 3", "-100"),
    ),
    "a row an example": (CausalLM(), LOGITS, CLASSES, ("a token axis", "choose another")),
}  # fmt: skip


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("what", WRONG)
def test_what_does_not_fit_is_named_whatever_is_differentiated(what: str, target: Any) -> None:
    objective, outputs, labels, says = WRONG[what]
    with pytest.raises(UserError) as caught:
        found(objective, outputs, labels, target)
    for piece in says:
        assert piece in str(caught.value)


def test_the_remedy_for_one_logit_is_the_binary_cross_entropy() -> None:
    z = torch.tensor([0.3, -2.0, 1.0], dtype=torch.float64)
    y = torch.tensor([1, 0, 1])
    two = torch.stack([torch.zeros_like(z), z], dim=-1)
    want = nn.functional.binary_cross_entropy_with_logits(z, y.double(), reduction="none")
    assert torch.allclose(found(Classification(), two, y).results["loss"], want, atol=1e-12)


def test_a_label_that_is_no_target_may_be_any_number() -> None:
    labels, mask = torch.tensor([[0, 1, 9, 3]] * 3), torch.ones(3, 4, dtype=torch.bool)
    batch = replace(batch_of(labels, mask), loss_mask=torch.tensor([[True, True, False, True]] * 3))
    got = differentiate(
        CausalLM(), lambda part, start: part, V4.double(), batch, "labels", 1, 0, 2,
        lambda draw: None,
    )  # fmt: skip
    assert torch.allclose(got.results["loss"], torch.tensor(2 * math.log(5)).double())


# Of whole jobs


class Predicting(nn.Module):
    """A network whose outputs a function of the logits makes."""

    def __init__(self, made: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.made, self.inner = made, nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.made(self.inner(x))


ODD: dict[str, tuple[Callable[[Tensor], Tensor], str, str]] = {
    "predictions": (lambda z: z.argmax(dim=1), "classification", "outputs of floating point"),
    "complex": (lambda z: torch.complex(z, z), "classification", "outputs of floating point"),
    "one for all": (
        lambda z: z.mean(),
        "regression",
        "examples first, [5, …], got []",
    ),
    "of all in one": (lambda z: z.flatten(), "regression", "outputs with examples first"),
    "NaN": (lambda z: (z - 100).log(), "classification", "'row 0': expected a finite loss"),
}


@pytest.mark.parametrize("labelled", [True, False])
@pytest.mark.parametrize("what", ODD)
def test_outputs_that_no_objective_takes_are_named(
    what: str, labelled: bool, tmp_path: Path
) -> None:
    made, objective, says = ODD[what]
    rows = [{k: v for k, v in row.items() if labelled or k != "labels"} for row in ROWS]
    with pytest.raises(UserError) as caught:
        raycurv.fit(lambda: Predicting(made), rows, tmp_path, objective=objective, **HERE)
    assert says in str(caught.value)


@pytest.mark.filterwarnings("ignore:Initializing zero-element")
def test_a_layer_without_weights_is_named(tmp_path: Path) -> None:
    def network() -> nn.Module:
        return nn.Sequential(nn.Linear(5, 0), nn.Linear(0, 3))

    made = network()
    for flags, says in (
        ({}, "block 0 and 1 more: .*got one of shape"),
        ({"blocks": ["1"]}, "block 1: "),
    ):
        with pytest.raises(UserError, match=says):
            raycurv.fit(lambda: made, ROWS, tmp_path, objective="classification", **flags, **HERE)


class Wide(nn.Module):
    """A network that reshapes what it gets."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.inner(x.view(len(x), 4))
        return found


def reshaping() -> nn.Module:
    """A :class:`Wide` network."""
    torch.manual_seed(0)
    return Wide()


def images() -> nn.Module:
    """A network of images of one channel."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(8, 3))


class Unfit:
    """An objective that wants other labels than there are."""

    def loss(self, outputs: Tensor, batch: Any) -> Tensor:
        return (outputs @ batch.labels).sum(dim=1)

    def sample(self, outputs: Tensor, batch: Any, uniform: Any) -> Tensor:
        return outputs.argmax(dim=1)


NETWORKS: dict[str, tuple[str, list[dict[str, Any]], dict[str, Any], Sequence[str]]] = {
    "columns that the network has not": (
        "commands:classifier", [{**row, "inputs": [0.0] * 7} for row in ROWS], {},
        ("model commands:classifier, child 0", "[1, 7]", "'row 0'", "mat1 and mat2"),
    ),
    "a forward that raises": (
        "test_labels:reshaping", ROWS, {},
        ("model test_labels:reshaping", "[1, 5]", "is invalid", "test_labels.py, line"),
    ),
    "an image without its channel": (
        "test_labels:images", [{**row, "inputs": np.zeros((2, 4, 4)).tolist()} for row in ROWS], {},
        ("child 0", "[1, 2, 4, 4]", "expected input"),
    ),
    "an objective that raises": (
        "commands:classifier", ROWS, {"objective": "test_labels:Unfit"},
        ("--objective test_labels:Unfit, loss", "outputs [5, 3] and labels [5]", "test_labels.py"),
    ),
}  # fmt: skip


CUT = [(what, n) for what in NETWORKS for n in (1, 2) if n == 1 or "forward" not in what]


@pytest.mark.parametrize(("what", "stages"), CUT)
def test_what_network_and_objective_raise_of_the_data_is_a_mistake(
    what: str, stages: int, tmp_path: Path
) -> None:
    model, rows, settings, says = NETWORKS[what]
    flags = {
        "model": model, "data": write_rows(tmp_path / "rows.parquet", rows), "stages": stages,
        "out": tmp_path / "run", "objective": "classification", "address": "none",
    }  # fmt: skip
    outcome = run_here("fit.py", flags_of(flags | settings))
    assert outcome.code == 2 and "Traceback" not in outcome.err, outcome.err
    said = failure_in(outcome)
    assert said["error"]["kind"] == "UserError"
    for piece in says:
        assert piece in said["message"], said["message"]


@pytest.mark.parametrize("method", ["ekfac", "identity", "mfac"])
@pytest.mark.parametrize("fisher", ["sampled", "empirical"])
def test_a_fraction_for_a_class_ends_every_job_with_its_name(
    method: str, fisher: str, tmp_path: Path
) -> None:
    rows = classified(6)
    wrong = [*rows[:4], {**rows[4], "labels": 1.5}, rows[5]]
    floats = [{**row, "labels": float(row["labels"])} for row in rows]
    own = {"objective": "classification", "fisher": fisher, "method": method, **HERE}
    own |= {"rows": 3} if method == "mfac" else {}
    fitted = raycurv.fit(classifier, floats, tmp_path / "run", **own)
    calls = {
        "fit": lambda: raycurv.fit(classifier, wrong, tmp_path / "wrong", **own),
        "queries": lambda: fitted.influence(wrong, floats, tmp_path / "q", **HERE),
        "train": lambda: fitted.influence(floats, wrong, tmp_path / "t", **HERE),
        "evaluate": lambda: raycurv.evaluate(
            classifier, wrong, tmp_path / "e", objective="classification", **HERE
        ),
    }
    for name, call in calls.items():
        with pytest.raises(UserError, match="example 'row 4': expected a class from 0 to 2"):
            call()
        assert not list((tmp_path).glob(f"{name[0]}/scores/*")), "scores of a wrong label"
    # Numbers that say the same classes, written as fractions are: bit for bit the same.
    plain = raycurv.fit(classifier, rows, tmp_path / "plain", **own)
    assert plain.examples().equals(fitted.examples())
