"""What of a model's configuration its numbers depend on, as a run records it: value by value.

Recorded is the configuration as transformers reads it, so that a file that was saved again says the
same, and what the file leaves to transformers is there as well.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any

from raycurv.errors import shortened
from raycurv.jsonfile import checksum

# By which values that only one side has are told from those that another version has, or has not.
_VERSION = "transformers_version"
# Names of values (the last part) that change no number of a forward in evaluation mode.
_WITHOUT_EFFECT = re.compile(
    r"_.*|(torch_)?dtype|use_cache|return_dict|output_(attentions|hidden_states|router_logits)"
    r"|torchscript|gradient_checkpointing|initializer_(range|factor)|chunk_size_feed_forward"
    r"|(.*_)?(dropout|dropout_rate|dropout_prob|pdrop|layerdrop)|router_aux_loss_coef"
    r"|router_jitter_noise|transformers_version"
)
# Tables of the classes stand as one value; what is longer than a line stands as its hash.
_AS_ONE = ("id2label", "label2id")
_LONGEST, _NAMED = 200, 3


def config_print(
    config: Any, quantised: Mapping[str, Any] = MappingProxyType({})
) -> dict[str, Any]:
    """The values of a configuration by their dotted names, and the version of transformers that
    read it.

    Args:
        config: transformers'.
        quantised: how the weights are stored, as the file has it.
    """
    said = config.to_dict()
    values = {**said, "quantization_config": quantised}
    return {_VERSION: str(said.get(_VERSION)), **dict(_flat(values, ""))}


def config_changes(there: Mapping[str, Any], here: Mapping[str, Any]) -> list[str]:
    """What differs between two configurations, in words, at most three values by name.

    Of those that another version of transformers read, what only one of them has is no difference:
    options come and go, and have their defaults meanwhile. Nothing differs from an empty one, which
    is that of a model without any, or of a run that did not record it.
    """
    alike = there.get(_VERSION) == here.get(_VERSION)
    names = there.keys() | here.keys() if alike else there.keys() & here.keys()
    said = [
        f"{shortened(name)} {_was(there, name)} and {_is(here, name)}"
        for name in sorted(names - {_VERSION})
        if there.get(name, there) != here.get(name, here)
    ]
    more = [f"{len(said) - _NAMED} more"] if len(said) > _NAMED else []
    return [*said[:_NAMED], *more]


def _was(there: Mapping[str, Any], name: str) -> str:
    return f"was {shortened(repr(there[name]))}" if name in there else "was not there"


def _is(here: Mapping[str, Any], name: str) -> str:
    return f"is now {shortened(repr(here[name]))}" if name in here else "is gone"


def _flat(values: Mapping[Any, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if _WITHOUT_EFFECT.fullmatch(str(name)):
            continue
        if isinstance(value, Mapping) and name not in _AS_ONE:
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", _recorded(value)


def _recorded(value: Any) -> Any:
    """A value as JSON has it, or its hash."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    text = json.dumps(value, default=str)
    return json.loads(text) if len(text) <= _LONGEST else checksum(json.loads(text))
