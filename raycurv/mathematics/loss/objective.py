"""Objectives: what is differentiated, and what is drawn from the model's own distribution.

Every method is summed over an example's tokens, never averaged, and returns one number an example.

Axis letters: N examples, T positions, V classes, D outputs.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import ClassVar, Literal, Protocol, TypeAlias, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor

from raycurv.batch import NOT_A_TARGET, Batch
from raycurv.errors import UserError
from raycurv.mathematics.loss.draws import draw_categorical
from raycurv.mathematics.loss.signs import signed_softmax

# Numbers by the counter: so many for each target. Uniform ones in (0, 1), and signs, 1 or -1.
Uniform = Callable[[int], Tensor]
Signs = Callable[[int], Tensor]
# What of the data an objective is of, see Objective.reads.
Reads: TypeAlias = Literal["texts", "masked", "pairs", "sources"]

# What the sum of probabilities may be from 1: as much as ten bits round it.
_ROUNDED = 1e-3


@runtime_checkable
class Objective(Protocol):
    """What is differentiated: a loss, a way to draw labels from the model, and a measurement.

    An object of your own needs no base class. A fit takes ``loss`` and ``sample``; the queries of a
    scoring take ``measurement``, or where there is none ``loss``. For example, how much more likely
    the right answer is than the wrong one, behind the last token of a prompt::

        class LogitDifference:
            per_token = True
            columns = ("right", "wrong")        # token ids, columns of the queries' data

            def measurement(self, outputs, batch):
                logits, here = batch.at_last(outputs)          # [N, V], [N]
                n = torch.arange(batch.size)
                right, wrong = batch.columns["right"], batch.columns["wrong"]
                return torch.where(here, logits[n, right] - logits[n, wrong], 0.0)

    Every method gives one number for each example, ``[N]``, summed over its tokens and never
    averaged.

    Attributes:
        per_token: whether the methods are called on slices of positions, so that a long vocabulary
            never makes whole logits; what slices give is added up. They then see
            ``batch.labels[n, t]`` as the target that ``outputs[n, t]`` predicts (already moved by
            ``shift`` from the data's alignment) and ``batch.loss_mask[n, t]`` as whether that
            target counts; padding never counts. ``batch.start`` is the slice's first position, and
            ``batch.at_last`` finds last tokens. With ``False`` the methods are called once, on
            whole outputs ``[N, T, V]``: ``--batch-tokens`` times the vocabulary of memory.
        shift: of an objective that is called on positions, how far behind a position its target
            stands: 1 for the next token, 0 for a label of the token itself.
        causal: whether outputs must not depend on later tokens, as where each predicts the next:
            tried once a job.
        reads: of which texts an example is: ``texts`` for one; ``masked`` for one of whose tokens
            some are hidden, by the data's ``labels`` or drawn; ``pairs`` for two, the ``chosen``
            and the ``rejected``, which go through the model as two rows: ``outputs [2 N, ...]``,
            with ``batch.labels`` the number of the better one, 0; ``sources`` for a target that
            is made of a source, which a model's encoder reads (``batch.source``).
        columns: names of further columns of the data that the methods read, as
            ``batch.columns[name]``: numbers as a tensor ``[N, ...]``, of one shape in all examples,
            text as a list of strings. They speak of an example, not of its tokens: with ``--long
            truncate`` it keeps them, with ``--long split`` each of its pieces has them.
    """

    per_token: bool = False
    shift: int = 1
    causal: bool = False
    reads: Reads = "texts"
    columns: tuple[str, ...] = ()

    def loss(self, outputs: Tensor, batch: Batch) -> Tensor:
        """The loss of each example, summed over its tokens, ``[N]``."""

    def measurement(self, outputs: Tensor, batch: Batch) -> Tensor:
        """The function of a query whose change is asked for, ``[N]``; by default the loss."""
        return self.loss(outputs, batch)

    def sample(self, outputs: Tensor, batch: Batch, uniform: Uniform) -> Tensor:
        """Labels drawn from the model's predictive distribution, shaped as ``batch.labels``.

        ``uniform(k)`` gives float64 numbers in (0, 1), ``[N, k]`` (``[N, T, k]`` when per token).
        """


@runtime_checkable
class Signed(Protocol):
    """What an objective may have besides: random signs in place of drawn labels (``--fisher
    signs``)."""

    def signed(self, outputs: Tensor, batch: Batch, signs: Signs) -> Tensor:
        """Numbers ``[N]`` whose gradients in the outputs have mean zero over the signs, and as
        their covariance the Hessian of the loss: over each target's own outputs, and zero between
        targets. For a softmax see :func:`raycurv.mathematics.loss.signs.signed_softmax`.

        ``signs(k)`` gives 1 or -1, float32 ``[N, k]`` (``[N, T, k]`` when per token). ``batch`` is
        as it is for ``sample``: it may have no labels.
        """


@runtime_checkable
class Judging(Protocol):
    """What an objective may have besides: a way to count what the model gets right."""

    def correct(self, outputs: Tensor, batch: Batch) -> Tensor:
        """How many of each example's targets are the most probable outcome, ``[N]``."""


class TokenLabels(Objective):
    """Cross-entropy in nats of a label a position, summed over an example's targets.

    Takes ``outputs [N, T, V]``, one row of logits a position; labels are numbers below V.
    """

    per_token = True
    name: ClassVar[str]

    def loss(self, outputs: Tensor, batch: Batch) -> Tensor:
        labels, counts = self._targets(outputs, batch)
        logits = outputs if outputs.dtype == torch.float64 else outputs.float()
        nll = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")
        return torch.where(counts, nll.view_as(labels), 0.0).sum(dim=1)

    def sample(self, outputs: Tensor, batch: Batch, uniform: Uniform) -> Tensor:
        self._targets(outputs, batch)
        drawn = draw_categorical(outputs.flatten(0, 1), uniform(1).flatten())
        return drawn.view(outputs.shape[:2])

    def signed(self, outputs: Tensor, batch: Batch, signs: Signs) -> Tensor:
        _, counts = self._targets(outputs, batch)
        logits = outputs if outputs.dtype == torch.float64 else outputs.float()
        found = signed_softmax(logits, signs(logits.shape[2]))
        return torch.where(counts, found, 0.0).sum(dim=1)

    def correct(self, outputs: Tensor, batch: Batch) -> Tensor:
        labels, counts = self._targets(outputs, batch)
        return ((outputs.argmax(dim=2) == labels) & counts).sum(dim=1)

    def _targets(self, outputs: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """The targets ``[N, T]``, 0 where there is none, and whether there is one.

        Raises:
            UserError: outputs of another shape, or a label that is no token of theirs.
        """
        labels, counts = batch.labels, batch.loss_mask
        assert labels is not None and counts is not None
        check_numbers(self.name, outputs)
        if outputs.ndim != 3 or outputs.shape[:2] != labels.shape:
            raise UserError(
                self.name,
                f"outputs of shape [examples, positions, vocabulary], here {list(labels.shape)} "
                "and the vocabulary",
                f"{list(outputs.shape)}",
                "Let the model return one row of logits for each position, examples first, or "
                "choose another --objective.",
            )
        outside = counts & ((labels < 0) | (labels >= outputs.shape[2]))
        if outside.any():
            n, t = outside.nonzero()[0].tolist()
            raise UserError(
                f"example {batch.ids[n]!r}",
                f"labels from 0 to {outputs.shape[2] - 1}, the words of the model's outputs",
                f"{int(labels[n, t])} at position {batch.start + t + self.shift}",
                "Correct the label, or write -100 where a token is no target.",
            )
        return torch.where(counts, labels, 0), counts


class CausalLM(TokenLabels):
    """Next-token cross-entropy in nats, summed over an example's targets."""

    causal = True
    name = "causal-lm"


class TokenClassification(TokenLabels):
    """Cross-entropy in nats of the class of each token, summed over those that have one."""

    shift = 0
    name = "token-classification"


class MaskedLM(TokenLabels):
    """Cross-entropy in nats of the tokens that were hidden, summed over these.

    Devlin et al., BERT: Pre-training of Deep Bidirectional Transformers (2019), section 3.1.
    """

    shift = 0
    reads = "masked"
    name = "masked-lm"


class Seq2SeqLM(TokenLabels):
    """Cross-entropy in nats of a target's tokens, each given its source and the tokens before it,
    summed over them."""

    shift = 0
    reads = "sources"
    name = "seq2seq-lm"


class Classification(Objective):
    """Cross-entropy in nats over ``outputs [N, V]``.

    Labels are class numbers, ``[N]`` or ``[N, 1]``, whole and from 0 to V - 1, or probabilities of
    the classes (one-hot or soft), ``[N, V]``, whose cross-entropy is ``-Σ p log q``.
    """

    def loss(self, outputs: Tensor, batch: Batch) -> Tensor:
        logits = self._logits(outputs, batch)
        labels = self._targets(logits, batch)
        logits = logits if logits.dtype == torch.float64 else logits.float()
        if labels.ndim == 2:
            labels = labels.to(logits.dtype)
        return F.cross_entropy(logits, labels, reduction="none")

    def sample(self, outputs: Tensor, batch: Batch, uniform: Uniform) -> Tensor:
        return draw_categorical(self._logits(outputs, batch), uniform(1)[:, 0])

    def signed(self, outputs: Tensor, batch: Batch, signs: Signs) -> Tensor:
        logits = self._logits(outputs, batch)
        logits = logits if logits.dtype == torch.float64 else logits.float()
        return signed_softmax(logits, signs(logits.shape[1]))

    def correct(self, outputs: Tensor, batch: Batch) -> Tensor:
        logits = self._logits(outputs, batch)
        labels = self._targets(logits, batch)
        likeliest = labels if labels.ndim == 1 else labels.argmax(dim=1)
        return logits.argmax(dim=1) == likeliest

    def _logits(self, outputs: Tensor, batch: Batch) -> Tensor:
        """The outputs, once it is known that they are one row of logits an example."""
        check_numbers("classification", outputs)
        n = batch.size
        if outputs.shape == (n,) or outputs.shape == (n, 1):
            raise UserError(
                "classification",
                "outputs of shape [examples, classes], of two classes or more",
                f"{list(outputs.shape)}, one number an example",
                "Of a logit z for class 1 against class 0, let the model return "
                "torch.stack([torch.zeros_like(z), z], dim=-1) instead, [examples, 2]; of a number "
                "to be predicted, choose --objective regression.",
            )
        if outputs.ndim != 2 or len(outputs) != n:
            raise UserError(
                "classification",
                f"outputs of shape [examples, classes], here [{n}, …]",
                f"{list(outputs.shape)}",
                "Let the model return one row of logits an example; for labels of pixels or "
                "positions give an objective of your own, as package.module:Name, whose loss sums "
                "over them.",
            )
        return outputs

    def _targets(self, outputs: Tensor, batch: Batch) -> Tensor:
        """Class numbers ``[N]``, int64, or probabilities ``[N, V]``.

        Raises:
            UserError: neither; names the example.
        """
        labels, classes = labels_of(batch, "a class number an example"), outputs.shape[1]
        if labels.shape == (batch.size, 1):
            labels = labels[:, 0]
        if labels.ndim == 1:
            return _class_numbers(labels, classes, batch)
        if labels.shape != outputs.shape:
            raise UserError(
                f"example {batch.ids[0]!r}",
                f"a class number as label, or the probabilities of {classes} classes",
                f"a label of shape {list(labels.shape[1:])}",
                "Correct the labels, or choose another --objective.",
            )
        sums = labels.sum(dim=1, dtype=torch.float64)
        wrong = (labels < 0).any(dim=1) | ~((sums - 1).abs() <= _ROUNDED)
        if wrong.any():
            n = int(wrong.nonzero()[0])
            least = float(labels[n].min())
            got = f"{least:g} among them" if least < 0 else f"a sum of {float(sums[n]):g}"
            raise UserError(
                f"example {batch.ids[n]!r}",
                f"probabilities of {classes} classes as label, none below 0, that sum to 1",
                got,
                "Divide them by their sum; where several classes hold at once, give an objective "
                "of your own, as package.module:Name, with a binary cross-entropy for each.",
            )
        return labels


def _class_numbers(labels: Tensor, classes: int, batch: Batch) -> Tensor:
    """Labels ``[N]`` of any dtype as int64; UserError for one that is no class."""
    numbers = labels.long()
    # A fraction, or a number that int64 does not hold, is not what it becomes.
    wrong = (numbers < 0) | (numbers >= classes) | (numbers != labels)
    if wrong.any():
        n = int(wrong.nonzero()[0])
        label = float(labels[n])
        got, remedy = f"label {label:.0f}", "Correct the label, or give the model that class."
        if label == NOT_A_TARGET:
            remedy = "Leave out the examples that have no label."
        elif not label.is_integer():
            got = f"label {label:g}, which is no whole number"
            remedy = "Correct the label; for numbers to be predicted choose --objective regression."
        expected = f"a class from 0 to {classes - 1}"
        raise UserError(f"example {batch.ids[n]!r}", expected, got, remedy)
    return numbers


class Regression(Objective):
    """``½‖y − f‖²`` with ``outputs`` and labels ``[N, D]``: a Gaussian of unit variance.

    Labels have the shape of the outputs, but for axes of length 1; where either is a flat list, its
    numbers are those of the other in order, the last axis fastest.
    """

    def loss(self, outputs: Tensor, batch: Batch) -> Tensor:
        labels = labels_of(batch, "a number or a list of numbers an example")
        f, n = self._numbers(outputs, batch), batch.size
        here, there = _sizes(labels), _sizes(outputs)
        flat = min(len(here), len(there)) == 1 and math.prod(here) == math.prod(there)
        if len(labels) != n or not (here == there or flat):
            raise UserError(
                f"regression, example {batch.ids[0]!r}",
                f"labels of shape {tuple(outputs.shape)}, as the outputs",
                f"{tuple(labels.shape)}",
                "Make labels and outputs of one shape.",
            )
        f = f if f.dtype == torch.float64 else f.float()
        return 0.5 * (labels.reshape(n, -1).to(f.dtype) - f).square().sum(dim=1)

    def sample(self, outputs: Tensor, batch: Batch, uniform: Uniform) -> Tensor:
        f = self._numbers(outputs, batch)
        noise = torch.special.ndtri(uniform(f.shape[1]))
        drawn: Tensor = (f.double() + noise).reshape(outputs.shape)
        return drawn

    def signed(self, outputs: Tensor, batch: Batch, signs: Signs) -> Tensor:
        f = self._numbers(outputs, batch)
        f = f if f.dtype == torch.float64 else f.float()
        return (signs(f.shape[1]) * f).sum(dim=1)

    def _numbers(self, outputs: Tensor, batch: Batch) -> Tensor:
        """The outputs as ``[N, D]``."""
        check_numbers("regression", outputs)
        if outputs.ndim == 0 or len(outputs) != batch.size:
            raise UserError(
                "regression",
                f"outputs with examples first, [{batch.size}, …]",
                f"{list(outputs.shape)}",
                "Let the model return the numbers of each example, examples on the first axis.",
            )
        return outputs.reshape(batch.size, -1)


def _sizes(values: Tensor) -> list[int]:
    """The lengths of an example's axes, without those of length 1; of a single number ``[1]``."""
    return [size for size in values.shape[1:] if size != 1] or [1]


def check_numbers(objective: str, outputs: Tensor) -> None:
    """Refuse outputs that have no gradient."""
    if not outputs.is_floating_point():
        raise UserError(
            objective,
            "outputs of floating point",
            f"{str(outputs.dtype).removeprefix('torch.')}",
            "Let the model return what its predictions are made of (logits), not the predictions.",
        )


def labels_of(batch: Batch, wanted: str) -> Tensor:
    if batch.labels is None:
        raise UserError(
            f"example {batch.ids[0]!r}",
            f"a label ({wanted})",
            "none",
            "Add a column `labels` to the data.",
        )
    return batch.labels
