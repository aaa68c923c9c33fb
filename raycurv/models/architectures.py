"""What a model in a directory is for, by the class that its ``config.json`` names.

A model is opened as what it is: a classifier read as a language model would run, too, since its
weights fit in part, and its next-token loss would mean nothing. A class of no task that there is
(an encoder and decoder, say) is refused by its name.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import transformers
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

from raycurv.errors import UserError
from raycurv.models.model_task import CAUSAL_LM, TASKS, Task

_OWN = "give it as package.module:factory with an objective of your own"
_CLASSES = "give it as package.module:factory with --objective classification"
# Tables of classes in transformers, in the order in which they are asked: what a class of them is,
# and how it can be given.
_KINDS = (
    ("QUESTION_ANSWERING", "a model that finds answers in a text", _OWN),
    ("MULTIPLE_CHOICE", "a model that chooses among answers", _OWN),
    ("NEXT_SENTENCE_PREDICTION", "a classifier of pairs of sentences", _CLASSES),
    ("SPEECH_SEQ_2_SEQ", "an encoder of speech with a decoder", _OWN),
    ("IMAGE_TEXT_TO_TEXT", "a model of images and text", _OWN),
    ("MULTIMODAL_LM", "a model of several kinds of input", _OWN),
    ("AUDIO_CLASSIFICATION", "a classifier of sound", _CLASSES),
    ("CTC", "a model of speech", _OWN),
    ("PRETRAINING", "a model with the heads of its pretraining", _OWN),
)
# A class that transformers does not have is told by the end of its name.
_ENDINGS = (
    ("ForSequenceClassification", "a classifier", _CLASSES),
    ("ForTokenClassification", "a classifier of tokens", _OWN),
    ("ForQuestionAnswering", "a model that finds answers in a text", _OWN),
    ("ForMaskedLM", "a masked language model, whose tokens see those behind them", _OWN),
    ("ForConditionalGeneration", "an encoder with a decoder, or a model of images and text", _OWN),
    ("RewardModel", "a reward model", _CLASSES),
)
# Models of several kinds of input, whose text is a causal language model's.
_WITH_TEXT = ("IMAGE_TEXT_TO_TEXT", "MULTIMODAL_LM")


def task_of(content: Mapping[str, Any], path: str, trust_remote_code: bool) -> Task:
    """What a model is for.

    Args:
        content: of ``config.json``.
        path: of it.
        trust_remote_code: whether the class may be one of the directory's own code.

    Raises:
        UserError: the class is of no task, which names it and what it is; or there is no class for
            such a model.
    """
    kind, named = content.get("model_type"), content.get("architectures")
    if not isinstance(kind, str):
        raise UserError(
            path,
            "a model_type",
            "none" if kind is None else f"a {type(kind).__name__}",
            "Take config.json from where the model was saved: the class of a model follows from "
            "its model_type.",
        )
    named = [named] if isinstance(named, str) else named or []
    if not isinstance(named, list) or not all(isinstance(name, str) for name in named):
        got, remedy = str(named)[:80], "Take config.json from where the model was saved."
        raise UserError(path, "architectures as a list of names", got, remedy)
    # What PyTorch's FSDP puts before the name of a class that it has wrapped.
    named = [name.removeprefix("FSDP") for name in named]
    own = content.get("auto_map")
    if own and kind not in CONFIG_MAPPING_NAMES:
        return CAUSAL_LM  # nothing is known of it without the directory's own code
    if trust_remote_code and isinstance(own, dict):
        # A class of that code.
        found = next((task for task in TASKS if task.auto in own), None)
        if found is not None:
            return found
    if kind not in CONFIG_MAPPING_NAMES:
        raise UserError(
            path,
            f"a model_type that transformers {transformers.__version__} knows",
            repr(kind[:80]),
            "Open the directory with a version of transformers that has it, or give the model as "
            "package.module:factory.",
        )
    causal = _names("CAUSAL_LM", kind)
    if not named and causal:
        return CAUSAL_LM  # the weights will tell
    lower = {name.lower() for name in named}
    for task in TASKS:
        if lower & {one.lower() for one in _names(task.table, kind)}:
            return task
    if any(name in _names(table, kind) for table in _WITH_TEXT for name in named):
        return CAUSAL_LM
    name = (named[0][:80] or "model without a name") if named else f"{kind} model"
    what, how = (
        _described(name, bool(own)) if named else ("a kind without a causal language model", _OWN)
    )
    article = "an" if name.startswith(tuple("AEIO")) else "a"
    known = [one for task in TASKS for one in _names(task.table, kind)[:1]]
    raise UserError(
        path,
        f"a language model or a classifier{f', such as {known[0]}' if known else ''}",
        f"{article} {name}: {what}",
        f"raycurv opens language models and classifiers from a directory: {how}.",
    )


def _names(table: str, kind: str | None = None) -> tuple[str, ...]:
    """Names of the classes in a table of transformers, of one model type or of all."""
    found = getattr(modeling_auto, f"MODEL_FOR_{table}_MAPPING_NAMES", {})
    values = found.values() if kind is None else [found[kind]] if kind in found else []
    return tuple(_flat(values))


def _flat(values: Any) -> Iterator[str]:
    for value in values:
        yield from [value] if isinstance(value, str) else value


def _described(name: str, own_code: bool) -> tuple[str, str]:
    """What a class is that is of no task among those of its type, and how it can be given."""
    for table, what, how in _KINDS:
        if name in _names(table):
            return what, how
    if name in set(_flat(modeling_auto.MODEL_MAPPING_NAMES.values())):
        return "a bare model without a language model's head", (
            f"{_OWN}, or correct architectures in config.json if it was trained with the head that "
            "its weights have"
        )
    if any(name in _names(task.table) for task in TASKS):
        return "of another model_type than config.json names", "correct architectures or model_type"
    for ending, what, how in _ENDINGS:
        if name.endswith(ending):
            return what, how
    if own_code:
        return "a class of the directory's own code", "--trust-remote-code runs that code"
    return (
        f"a class that transformers {transformers.__version__} does not have for this model_type",
        "give it as package.module:factory, or correct architectures in config.json if the weights "
        "are such a model's",
    )
