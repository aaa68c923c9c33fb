"""A GPU that is not there: tensors in ordinary memory that say they are on ``cuda:0``.

While it is entered, ``device="cuda"`` makes such tensors, ``.cpu()`` leads back, and whatever CUDA
would refuse is refused: an operation on tensors of both devices (single numbers on the CPU aside),
a CPU tensor indexed by one on the GPU, ``.numpy()``. So code is seen to keep its devices apart
where there is no GPU; of kernels, streams and memory this says nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import return_and_correct_aliasing
from torch.utils._pytree import tree_flatten, tree_map

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
aten: Any = torch.ops.aten
# Both devices at once are their business; an index on the CPU is taken along by CUDA.
_MIXES = (aten.copy_.default, aten._to_copy.default)
_INDEXES = (aten.index.Tensor, aten.index_put_.default, aten.index_put.default,
            aten._index_put_impl_.default)  # fmt: skip


class OnGpu(Tensor):
    """A tensor that says it is on the GPU; what it holds lies in ``held``."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor, requires_grad: bool = False) -> OnGpu:
        made = Tensor._make_wrapper_subclass(
            cls, held.shape, strides=held.stride(), storage_offset=held.storage_offset(),
            dtype=held.dtype, layout=held.layout, device=CPU, requires_grad=requires_grad,
        )  # fmt: skip
        made.held = held.detach()
        return made

    def __init__(self, held: Tensor, requires_grad: bool = False) -> None:
        pass

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return GPU

    @property
    def is_cuda(self) -> bool:  # type: ignore[override]
        return True

    def __repr__(self, *, tensor_contents: object = None) -> str:
        return f"OnGpu({tuple(self.shape)}, {self.dtype})"

    def numpy(self, *, force: bool = False) -> Any:
        raise TypeError("can't convert cuda:0 device type tensor to numpy")

    def __array__(self, *args: Any, **kwargs: Any) -> Any:
        raise TypeError("can't convert cuda:0 device type tensor to numpy")

    def tolist(self) -> Any:
        return self.held.tolist()

    def cpu(self, *args: Any, **kwargs: Any) -> Tensor:
        # In threads that the mode does not see, too: they write files.
        return _moved(self, CPU, None, True)

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func not in _MIXES:
            _refuse_both(func, args, kwargs)
        to = kwargs.get("device")
        if to is not None and to.type == "cuda":
            kwargs["device"] = CPU
        inner_args, inner = tree_map(_held, args), tree_map(_held, kwargs)
        found = func(*inner_args, **inner)
        if func is aten.copy_.default:
            return args[0]
        wrapped = tree_map(lambda x: OnGpu(x) if type(x) is Tensor else x, found)
        return return_and_correct_aliasing(func, args, kwargs, wrapped)


def _held(x: Any) -> Any:
    return x.held if isinstance(x, OnGpu) else x


def _refuse_both(func: Any, args: Any, kwargs: Any) -> None:
    if func in _INDEXES:
        given = [x for x in tree_flatten(args[1])[0] if isinstance(x, Tensor)]
        if not isinstance(args[0], OnGpu) and any(isinstance(x, OnGpu) for x in given):
            raise RuntimeError("indices should be either on cpu or on the indexed tensor's device")
        args = (args[0], *args[2:])
    leaves = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, Tensor)]
    there = {isinstance(x, OnGpu) for x in leaves if isinstance(x, OnGpu) or x.ndim}
    if len(there) > 1:
        raise RuntimeError(
            f"Expected all tensors to be on the same device, but got cuda:0 and cpu: {func}"
        )


class _Mode(TorchFunctionMode):
    """Sees where things are made and moved, before torch looks for a GPU."""

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func in (Tensor.cpu,):
            return _moved(args[0], CPU, None, True)
        if func is Tensor.cuda:
            return _moved(args[0], GPU, None, True)
        if func is Tensor.to:
            return _to(*args, **kwargs)
        if func is Tensor.data.__set__ or func is Tensor.numpy:  # type: ignore[attr-defined]
            return func(*args, **kwargs)
        to = kwargs.get("device")
        if (
            to is not None
            and torch.device(to).type == "cuda"
            and func is not torch._C._nn._parse_to
        ):
            kwargs["device"] = CPU
            made = func(*args, **kwargs)
            if isinstance(made, OnGpu):
                return made
            if isinstance(made, Tensor):
                return OnGpu(made.detach(), made.requires_grad)
            return made
        return func(*args, **kwargs)


def _to(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    device, dtype, copy = kwargs.get("device"), kwargs.get("dtype"), kwargs.get("copy", False)
    for given in args:
        if isinstance(given, Tensor):
            device, dtype = given.device, given.dtype
        elif isinstance(given, torch.dtype):
            dtype = given
        elif isinstance(given, (str, torch.device, int)) and not isinstance(given, bool):
            device = given
    there = x.device if device is None else torch.device(device)
    return _moved(x, there, dtype, copy)


class _Move(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, there: torch.device, dtype: torch.dtype) -> Tensor:
        ctx.came = (x.device, x.dtype)
        held = _held(x).detach().to(CPU, dtype, copy=True)
        return OnGpu(held) if there.type == "cuda" else held

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:  # type: ignore[override]
        return _moved(g, *ctx.came, False), None, None


def _moved(x: Tensor, there: torch.device, dtype: torch.dtype | None, copy: bool) -> Tensor:
    dtype = dtype or x.dtype
    if x.device.type == "meta" or there.type == "meta":
        with torch._C.DisableTorchFunctionSubclass():
            return x.to(there, dtype)
    if x.device.type == there.type and x.dtype == dtype and not copy:
        return x
    if x.device.type == there.type == "cpu":
        with torch._C.DisableTorchFunctionSubclass():
            return Tensor.to(x, there, dtype, copy=copy)
    if x.device.type == there.type and not copy and x.requires_grad:
        return aten._to_copy.default(x, dtype=dtype)
    if torch.is_grad_enabled() and x.requires_grad:
        return _Move.apply(x, there, dtype)  # type: ignore[no-any-return,no-untyped-call]
    held = _held(x).detach()
    with torch._C.DisableTorchFunctionSubclass():
        held = held.to(CPU, dtype, copy=True)
    return OnGpu(held) if there.type == "cuda" else held


@contextmanager
def pretended_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Within it there is one GPU."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda *_: torch.get_rng_state())
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda *_: None)
    properties = SimpleNamespace(name="pretended", total_memory=2**37)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda *_: properties)
    # The mode sees one thread alone.
    monkeypatch.setenv("HF_DEACTIVATE_ASYNC_LOAD", "1")
    before = torch.__future__.get_overwrite_module_params_on_conversion()
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    try:
        with _Mode():
            yield
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(before)
