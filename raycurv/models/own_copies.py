"""Copies of a network that belongs to somebody else, in the number type and place that are asked.

Parameters and floating-point buffers are cast; whole numbers and complex ones are not. Of a network
of transformers what ``from_pretrained(dtype=…)`` keeps in float32 is kept as well: tables that no
checkpoint holds (the frequencies of rotary embeddings), and what the class lists for half precision
(``_keep_in_fp32_modules_strict``).
"""

from __future__ import annotations

import copy
import re
import sys
from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.overrides import TorchFunctionMode

from raycurv.errors import UserError, user_errors

_AT_HAND = "Return the network as it was before, of plain modules and tensors."


def unwrapped(made: nn.Module, where: str) -> nn.Module:
    """The network inside wrappers that only run it (``torch.compile``, ``DataParallel``).

    Args:
        where: names the model, for errors.

    Raises:
        UserError: a part of it cannot be hooked, or holds no values that gradients reach.
    """
    while (inner := _wrapped(made)) is not None:
        made = inner
    for name, module in made.named_modules():
        place = f"{where}, module {name}" if name else where
        _check_module(module, place)
        for key, parameter in module.named_parameters(recurse=False):
            _check_parameter(parameter, f"{where}, parameter {f'{name}.{key}'.lstrip('.')}")
    return made


def copied(module: nn.Module, where: str) -> nn.Module:
    """A copy that shares no tensor with the module, which stays as it is.

    Raises:
        UserError: something in it cannot be copied.
    """
    wanted = "a module that copy.deepcopy copies, since the one given is not to be changed"
    remedy = (
        "Give the class that holds it a __deepcopy__ (or __getstate__) that leaves out what cannot "
        "be copied, such as a lock or an open file."
    )
    with user_errors(where, wanted, remedy, Exception), _LeavesOnly():
        return copy.deepcopy(module)


def cast_floats(module: nn.Module, dtype: torch.dtype, device: torch.device) -> None:
    """Move a module of our own, with what is in :func:`floats` cast."""
    wanted = floats(module, dtype)
    module.zero_grad(set_to_none=True)

    def moved(tensor: Tensor) -> Tensor:
        if id(tensor) not in wanted:
            return tensor.to(device)
        found = tensor.to(device, dtype)
        # A module that is there twice comes twice.
        wanted[id(found)] = found
        return found

    module._apply(moved)
    for part in module.modules():
        # Hooks are for modules that are called, which a compiled graph need not do.
        part._compiled_call_impl = None


def floats(module: nn.Module, dtype: torch.dtype) -> dict[int, Tensor]:
    """The tensors of a module that a cast to ``dtype`` is of, by identity."""
    kept = {id(tensor) for part in _of_transformers(module) for tensor in _tables(part, dtype)}
    held = {id(tensor): tensor for tensor in (*module.parameters(), *module.buffers())}
    return {i: t for i, t in held.items() if t.is_floating_point() and i not in kept}


class _LeavesOnly(TorchFunctionMode):
    """Copies what was computed from others (by ``torch.nn.utils.prune`` or ``weight_norm``, say,
    which compute it again in each forward) as the numbers that it is."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is Tensor.__deepcopy__ and not args[0].is_leaf:
            tensor, memo = args
            return memo.setdefault(id(tensor), tensor.detach().clone())
        return func(*args, **(kwargs or {}))


def _wrapped(made: nn.Module) -> nn.Module | None:
    if _is_compiled(made):
        return cast(nn.Module, made._orig_mod)
    if isinstance(made, nn.DataParallel | nn.parallel.DistributedDataParallel):
        return cast(nn.Module, made.module)
    return None


def _is_compiled(module: nn.Module) -> bool:
    # Who compiled something has imported this; nobody else need wait for it.
    dynamo = sys.modules.get("torch._dynamo.eval_frame")
    return dynamo is not None and isinstance(module, dynamo.OptimizedModule)


def _check_module(module: nn.Module, where: str) -> None:
    kind = type(module)
    got, remedy = "", _AT_HAND
    if isinstance(module, torch.jit.ScriptModule):
        got = f"a TorchScript module ({kind.__name__})"
        remedy = (
            "Return the module that was scripted or traced: hooks do not reach into TorchScript."
        )
    elif _wrapped(module) is not None or kind.__name__ == "FullyShardedDataParallel":
        got = f"a wrapper around one ({kind.__name__})"
        remedy = "Return the network without the wrapper (its `_orig_mod`, or `module`)."
    elif kind.__module__.startswith("torch.ao.nn.") and "quantized" in kind.__module__:
        got = f"a quantised one ({kind.__name__})"
        remedy = "Return the network as it was before it was quantised."
    if got:
        raise UserError(
            where, "a module of Python code, with weights that gradients reach", got, remedy
        )


def _check_parameter(parameter: Tensor, where: str) -> None:
    got, remedy = "", ""
    if is_lazy(parameter):
        got = "one without a shape (of a lazy module)"
        remedy = "Call the network with an example in the factory: it takes its shape from that."
    elif hasattr(type(parameter), "__tensor_flatten__"):
        got, remedy = f"a {type(parameter).__name__}", _AT_HAND
    elif parameter.is_meta:
        got = "one on the meta device, which has no values"
        remedy = "Load the weights in the factory: load_state_dict(…, assign=True)."
    if got:
        raise UserError(where, "a plain tensor with values", got, remedy)


def _of_transformers(module: nn.Module) -> Iterator[nn.Module]:
    # Who made a network of transformers has imported this; nobody else need wait for it.
    library = sys.modules.get("transformers.modeling_utils")
    if library is not None:
        yield from (m for m in module.modules() if isinstance(m, library.PreTrainedModel))


def _tables(model: Any, dtype: torch.dtype) -> Iterator[Tensor]:
    """Tensors of a network of transformers that it keeps in their own dtype."""
    for part in model.modules():
        for name in part._non_persistent_buffers_set:
            if part._buffers[name] is not None:
                yield part._buffers[name]
    if dtype in (torch.float16, torch.bfloat16):
        for pattern in model._keep_in_fp32_modules_strict or ():
            wanted = re.compile(pattern.replace("*", ".*"))
            yield from (p for name, p in model.named_parameters() if wanted.search(name))
