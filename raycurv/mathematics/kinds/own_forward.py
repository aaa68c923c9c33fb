"""What a module whose forward is not its class's own really multiplies by its weight.

A convolution may pad in its own way, and a router scale its input, before torch's function takes
it. So the call of that function is caught inside the forward, with the very arguments it has.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from operator import attrgetter
from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

# Is given the function's arguments and its output; gives what the forward shall go on with.
Seen = Callable[[tuple[Any, ...], dict[str, Any], Any], Any]

# What gives the same weight in another dtype, as routers take it that compute in float32.
_CASTS = (Tensor.type, Tensor.to, Tensor.float, Tensor.double)


def catch_calls(
    module: nn.Module,
    parameter: str,
    functions: Collection[Callable[..., Any]],
    seen: Seen,
    place: int = 1,
) -> Callable[[], None]:
    """Watch the forwards of a module from now on: each call of one of ``functions`` whose argument
    at ``place`` (or ``weight``) is the module's ``parameter``, or a view of all of it, in whatever
    dtype, goes through ``seen``. Gives what ends the watching."""
    modes: list[_Calls] = []

    def enter(module: nn.Module, args: Any) -> None:
        modes.append(_Calls(attrgetter(parameter)(module), functions, seen, place))
        modes[-1].__enter__()  # type: ignore[no-untyped-call]

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        modes.pop().__exit__(None, None, None)  # type: ignore[no-untyped-call]

    hooks = (
        module.register_forward_pre_hook(enter),
        module.register_forward_hook(leave, always_call=True),
    )

    def end() -> None:
        for hook in hooks:
            hook.remove()

    return end


class _Calls(TorchFunctionMode):
    def __init__(
        self, weight: Tensor, functions: Collection[Callable[..., Any]], seen: Seen, place: int
    ) -> None:
        super().__init__()
        self._weights, self._functions, self._seen, self._place = [weight], functions, seen, place

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        if func in _CASTS and args and self._is_weight(args[0]):
            self._weights.append(output)
        if func not in self._functions:
            return output
        weight = args[self._place] if len(args) > self._place else kwargs.get("weight")
        return self._seen(args, kwargs, output) if self._is_weight(weight) else output

    def _is_weight(self, value: Any) -> bool:
        return any(
            value is one
            or (
                isinstance(value, Tensor)
                and value.untyped_storage() is one.untyped_storage()
                # Several weights may be parts of one.
                and value.storage_offset() == one.storage_offset()
                and value.numel() == one.numel()
            )
            for one in self._weights
        )
