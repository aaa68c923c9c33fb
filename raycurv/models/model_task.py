"""What a model is for: which class of transformers opens it, and which objectives fit it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any


@dataclass(frozen=True)
class Task:
    """What models of a kind are for.

    Attributes:
        name: as messages and ``run.json`` say it.
        what: such a model, in words.
        table: of transformers, which names its class for each type of model
            (``MODEL_FOR_{table}_MAPPING_NAMES``).
        auto: transformers' class that opens it.
        objectives: those of raycurv's that fit; the first is the default.
    """

    name: str
    what: str
    table: str
    auto: str
    objectives: tuple[str, ...]

    @property
    def causal(self) -> bool:
        """Whether outputs at a token are of those before it alone."""
        return self.name == "causal-lm"

    @property
    def pooled(self) -> bool:
        """Whether outputs are of whole texts, or images."""
        return self.auto == "AutoModelForSequenceClassification" or self.of_images

    @property
    def of_images(self) -> bool:
        """Whether inputs are images."""
        return self.auto == "AutoModelForImageClassification"


CAUSAL_LM = Task(
    "causal-lm", "a causal language model", "CAUSAL_LM", "AutoModelForCausalLM", ("causal-lm",)
)
SEQUENCE_CLASSIFICATION = Task(
    "sequence-classification", "a classifier", "SEQUENCE_CLASSIFICATION",
    "AutoModelForSequenceClassification", ("classification", "multi-label", "regression"),
)  # fmt: skip
# A class of transformers' with one output, which gives a text a number.
REWARD = replace(
    SEQUENCE_CLASSIFICATION,
    name="reward",
    what="a model of one number for a text, such as a reward",
    objectives=("preference", "regression"),
)
TOKEN_CLASSIFICATION = Task(
    "token-classification", "a classifier of tokens", "TOKEN_CLASSIFICATION",
    "AutoModelForTokenClassification", ("token-classification",),
)  # fmt: skip
MASKED_LM = Task(
    "masked-lm", "a masked language model, whose tokens see those behind them", "MASKED_LM",
    "AutoModelForMaskedLM", ("masked-lm",),
)  # fmt: skip
SEQ2SEQ = Task(
    "seq2seq", "an encoder with a decoder", "SEQ_TO_SEQ_CAUSAL_LM", "AutoModelForSeq2SeqLM",
    ("seq2seq-lm",),
)  # fmt: skip
IMAGE_CLASSIFICATION = replace(
    SEQUENCE_CLASSIFICATION,
    name="image-classification",
    what="a classifier of images",
    table="IMAGE_CLASSIFICATION",
    auto="AutoModelForImageClassification",
)
# In the order in which a class is looked for: some tables of encoders name what has a decoder, too.
TASKS = (
    CAUSAL_LM, SEQ2SEQ, SEQUENCE_CLASSIFICATION, TOKEN_CLASSIFICATION, MASKED_LM,
    IMAGE_CLASSIFICATION,
)  # fmt: skip

_PROBLEMS = {"regression": "regression", "multi_label_classification": "multi-label"}


def refined(task: Task, config: Any) -> Task:
    """The task of a model whose class says no more than ``task``: what its configuration says of
    the number of its outputs, and of what they are trained for."""
    if task not in (SEQUENCE_CLASSIFICATION, IMAGE_CLASSIFICATION):
        return task
    problem = getattr(config, "problem_type", None)
    if config.num_labels == 1 and task.of_images:
        return replace(task, objectives=("regression",))
    if config.num_labels == 1 and problem is None:
        return REWARD
    if config.num_labels == 1:
        return replace(task, objectives=("regression", "preference"))
    if problem not in _PROBLEMS:
        return task
    first = _PROBLEMS[problem]
    return replace(task, objectives=(first, *(o for o in task.objectives if o != first)))


def class_names(config: Any) -> Mapping[str, int]:
    """The number of each class by its name, as a configuration has them in either of its tables;
    without a name of two classes, or of one that there is not."""
    numbers: dict[str, set[str]] = {}
    for field, swapped in (("label2id", False), ("id2label", True)):
        named = getattr(config, field, None)
        for pair in named.items() if isinstance(named, Mapping) else ():
            name, number = map(str, reversed(pair) if swapped else pair)
            numbers.setdefault(name, set()).add(number)
    classes = {str(number): number for number in range(config.num_labels)}
    return {
        name: classes[own]
        for name, (own, *others) in numbers.items()
        if own in classes and not others
    }
