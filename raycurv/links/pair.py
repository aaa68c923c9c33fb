"""A pair: a process group of two neighbours that carries bytes one way.

One group for each direction: NCCL knows no tags, so what it carries is told apart by order alone.

The groups are made straight from a store, not with ``init_process_group``: that one is the
process's only default group, and to end it needs the others, while a pair must go away, and come
again, after the other process has died.

Two stages may share a GPU, which NCCL refuses: they, and stages without a GPU, use gloo, through
the CPU's memory.
"""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal

import torch
import torch.distributed
from torch import Tensor

Backend = Literal["gloo", "nccl"]

# How often a transfer's caller looks whether the other end lives.
_CHECK_SECONDS = 0.05
# How often NCCL is asked: much at first, since most tensors take less than a millisecond.
_SHORTEST_POLL, _LONGEST_POLL = 2e-5, 1e-3


def gpu_name(device: torch.device) -> str:
    """What tells a GPU that NCCL can use from all others; empty for any other device."""
    if device.type != "cuda" or not torch.distributed.is_nccl_available():
        return ""
    index = torch.cuda.current_device() if device.index is None else device.index
    properties = torch.cuda.get_device_properties(index)
    # Numbers are the process's own: two processes may call two GPUs by the same one.
    seen = f"{socket.gethostname()}/{os.environ.get('CUDA_VISIBLE_DEVICES', '')}/{index}"
    return str(getattr(properties, "uuid", seen))


def backend_between(one: str, other: str) -> Backend:
    """The backend for two processes with these GPUs (see :func:`gpu_name`)."""
    return "nccl" if one and other and one != other else "gloo"


@dataclass(frozen=True)
class Parcel:
    """A tensor's bytes ``[n]``, and the event after which a device may touch them."""

    flat: Tensor
    ready: Any = None


class Pair:
    """One direction between two processes. Only one thread at a time may use it.

    Both ends call this at once, and wait for each other.

    Args:
        backend: the same at both ends.
        store: that only these two use.
        place: 0 for the end that sends, 1 for the one that receives.
        address: of this process, as the other reaches it.
        device: where tensors are.
        timeout_seconds: for anything that waits for the other end.

    Raises:
        RuntimeError: of torch's, when the other end does not come.
    """

    def __init__(
        self,
        backend: Backend,
        store: Any,
        place: int,
        address: str,
        device: torch.device,
        timeout_seconds: float,
    ) -> None:
        self.backend = backend
        self._device = device
        self._timeout = timedelta(seconds=timeout_seconds)
        make = _nccl if backend == "nccl" else _gloo
        self._group: Any = make(store, place, address, self._timeout)
        self._stream: Any = None

    def pack(self, tensor: Tensor) -> Parcel:
        """A tensor's bytes, in the thread that made it; the tensor's own memory where it can be."""
        tensor = tensor.detach()
        if self.backend == "gloo":
            tensor = tensor.cpu()
        return _parcel(tensor.contiguous().reshape(-1).view(torch.uint8))

    def send(self, parcel: Parcel, check: Callable[[], None]) -> None:
        """Send, and return when the bytes have left.

        Args:
            parcel: from :meth:`pack`.
            check: called now and then; what it raises ends the wait.

        Raises:
            RuntimeError: of torch's, when it fails.
            TimeoutError: the other end is silent.
        """
        self._watch(lambda group: group.send([parcel.flat], 1, 0), parcel.ready, check)

    def room(self, count: int) -> Parcel:
        """Memory for ``count`` bytes to be received."""
        device = torch.device("cpu") if self.backend == "gloo" else self._device
        return _parcel(torch.empty(count, dtype=torch.uint8, device=device))

    def receive(self, room: Parcel, check: Callable[[], None]) -> None:
        """Fill ``room`` with what was sent next, and return when it is there; see :meth:`send`."""
        self._watch(lambda group: group.recv([room.flat], 0, 0), room.ready, check)

    def unpack(self, room: Parcel) -> Tensor:
        """The bytes received, on the device."""
        return room.flat.to(self._device)

    def abandon(self) -> None:
        """Let the group go, whatever is under way. Does not wait for the other end."""
        group, self._group = self._group, None
        if group is not None and self.backend == "nccl":
            # Kernels that wait for a dead process would hold the GPU for ever. Before torch 2.6
            # what aborts was called by another name.
            with contextlib.suppress(RuntimeError):
                (getattr(group, "abort", None) or group._shutdown)()

    @contextlib.contextmanager
    def _after(self, ready: Any) -> Iterator[None]:
        """On a stream that waits for ``ready`` alone, not for what was launched since."""
        if ready is None:
            yield
            return
        if self._stream is None:
            self._stream = torch.cuda.Stream(self._device)
        self._stream.wait_event(ready)
        with torch.cuda.stream(self._stream):
            yield

    def _watch(self, begin: Callable[[Any], Any], ready: Any, check: Callable[[], None]) -> None:
        """Run a transfer in a thread of its own, and ``check`` meanwhile.

        When the other process dies, either backend may leave its caller waiting until the time is
        over: gloo when some of the bytes were through, NCCL also while it makes its connection. So
        it is left to wait by itself.
        """
        transfer = _Transfer(lambda: self._transfer(begin, ready))
        until = time.monotonic() + self._timeout.total_seconds()
        while not transfer.over.wait(_CHECK_SECONDS):
            check()
            if time.monotonic() > until:
                raise TimeoutError
        if transfer.error is not None:
            raise transfer.error

    def _transfer(self, begin: Callable[[Any], Any], ready: Any) -> None:
        with self._after(ready):
            work = begin(self._group)
            if self.backend == "nccl":
                # Its own wait looks every 10 ms only, in some versions.
                pause, until = _SHORTEST_POLL, time.monotonic() + self._timeout.total_seconds()
                while not work.is_completed():
                    if time.monotonic() > until:
                        raise TimeoutError
                    time.sleep(pause)
                    pause = min(2 * pause, _LONGEST_POLL)
            work.wait(self._timeout)


class _Transfer:
    """Something that runs in a thread, which may outlive the interest in it."""

    def __init__(self, run: Callable[[], None]) -> None:
        self.over = threading.Event()
        self.error: Exception | None = None
        threading.Thread(target=self._run, args=(run,), name="transfer", daemon=True).start()

    def _run(self, run: Callable[[], None]) -> None:
        try:
            run()
        except Exception as error:
            self.error = error
        finally:
            del run  # it holds the tensor
            self.over.set()


def _parcel(flat: Tensor) -> Parcel:
    if not flat.is_cuda:
        return Parcel(flat)
    return Parcel(flat, torch.cuda.current_stream(flat.device).record_event())


def _gloo(store: Any, place: int, address: str, timeout: timedelta) -> Any:
    groups: Any = torch.distributed
    options = groups.ProcessGroupGloo._Options()
    # By name the machine may be one that others cannot reach.
    options._devices = [groups.ProcessGroupGloo.create_device(hostname=address)]
    options._timeout = timeout
    options._threads = 1
    return groups.ProcessGroupGloo(store, place, 2, options)


def _nccl(store: Any, place: int, address: str, timeout: timedelta) -> Any:
    groups: Any = torch.distributed
    options = groups.ProcessGroupNCCL.Options()
    options._timeout = timeout
    # Else an error, or a timeout, ends this process; so it is raised where the work is waited for.
    # Read when a group is made, and there is no other way to say it.
    with _environment(TORCH_NCCL_BLOCKING_WAIT="1", TORCH_NCCL_ENABLE_MONITORING="0"):
        return groups.ProcessGroupNCCL(store, place, 2, options)


@contextlib.contextmanager
def _environment(**values: str) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
