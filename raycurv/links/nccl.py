"""NCCL between two GPUs: a process group of two neighbours that carries bytes one way.

One group for each direction: NCCL knows no tags, so what it carries is told apart by order alone.

The groups are made straight from a store, not with ``init_process_group``: that one is the
process's only default group, and to end it needs the others, while these must go away, and come
again, after the other process has died.
"""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, wait
from datetime import timedelta
from typing import Any, TypeAlias

import torch
import torch.distributed
from torch import Tensor

# How often a transfer's caller looks whether the other end lives.
_CHECK_SECONDS = 0.05
# How often NCCL is asked: much at first, since most tensors take less than a millisecond.
_SHORTEST_POLL, _LONGEST_POLL = 2e-5, 1e-3

# Bytes ``[n]`` on a device, and the event after which another stream may touch them.
_Packed: TypeAlias = tuple[Tensor, Any]


def gpu_name(device: torch.device) -> str:
    """What tells a GPU that NCCL can use from all others; empty for any other device."""
    if device.type != "cuda" or not torch.distributed.is_nccl_available():
        return ""
    index = torch.cuda.current_device() if device.index is None else device.index
    properties = torch.cuda.get_device_properties(index)
    # Numbers are the process's own: two processes may call two GPUs by the same one.
    seen = f"{socket.gethostname()}/{os.environ.get('CUDA_VISIBLE_DEVICES', '')}/{index}"
    return str(getattr(properties, "uuid", seen))


def nccl_between(one: str, other: str) -> bool:
    """Whether two processes with these GPUs (see :func:`gpu_name`) have NCCL between them.

    Not those that share a GPU, which NCCL refuses.
    """
    return bool(one and other and one != other)


def open_store(host: str, port: int, listening: socket.socket | None, timeout: timedelta) -> Any:
    """A store in which two processes' groups find each other; RuntimeError if it does not come.

    It asks nobody who they are, and so waits at one address alone, and only where NCCL is used,
    whose own connections ask nobody either.

    Args:
        listening: where it waits, for the one that opens it; ``None`` for the other.
    """
    distributed: Any = torch.distributed
    return distributed.TCPStore(
        host, port, None, listening is not None, timeout, wait_for_workers=False,
        master_listen_fd=None if listening is None else listening.detach(),
    )  # fmt: skip


class NcclCarrier:
    """One direction between two processes by NCCL. Only one thread at a time may use it.

    Both ends make theirs at once, and wait for each other.

    Args:
        store: that only these two use.
        place: 0 for the end that sends, 1 for the one that receives.
        check: raises ``OSError`` when the other process is gone; called now and then in a transfer.
        timeout_seconds: for anything that waits for the other end.

    Raises:
        RuntimeError: of torch's, when the other end does not come.
    """

    def __init__(
        self,
        store: Any,
        place: int,
        device: torch.device,
        check: Callable[[], None],
        timeout_seconds: float,
    ) -> None:
        self._device, self._check, self._timeout = device, check, timeout_seconds
        self._group: Any = _make_group(store, place, timedelta(seconds=timeout_seconds))
        self._stream: Any = None

    def pack(self, tensor: Tensor) -> _Packed:
        """A tensor's bytes, in the thread that made it; the tensor's own memory where it can be."""
        return _packed(tensor.detach().contiguous().reshape(-1).view(torch.uint8))

    def send(self, packed: _Packed) -> None:
        """Send what :meth:`pack` gave, and return when the bytes have left; torch's RuntimeError if
        that fails, OSError if the other end is gone, or silent (``TimeoutError``)."""
        flat, ready = packed
        self._watch(lambda group: group.send([flat], 1, 0), ready)

    def receive(self, count: int) -> Tensor:
        """The ``count`` bytes that were sent next, on the device; see :meth:`send`."""
        flat, ready = _packed(torch.empty(count, dtype=torch.uint8, device=self._device))
        self._watch(lambda group: group.recv([flat], 0, 0), ready)
        return flat

    def abandon(self) -> None:
        """Let the group go, whatever is under way. Does not wait for the other end."""
        group, self._group = self._group, None
        if group is not None:
            # Kernels that wait for a dead process would hold the GPU for ever. Before torch 2.6
            # what aborts was called by another name.
            with contextlib.suppress(RuntimeError):
                (getattr(group, "abort", None) or group._shutdown)()

    def _watch(self, begin: Callable[[Any], Any], ready: Any) -> None:
        """Run a transfer in a thread of its own, and look for the other end meanwhile.

        When the other process dies NCCL may leave its caller waiting until the time is over. So it
        is left to wait by itself, in a thread that may outlive the interest in it.
        """
        transfer: Future[None] = Future()

        def run() -> None:
            try:
                self._transfer(begin, ready)
                transfer.set_result(None)
            except Exception as error:
                transfer.set_exception(error)

        threading.Thread(target=run, name="transfer", daemon=True).start()
        until = time.monotonic() + self._timeout
        while not wait([transfer], _CHECK_SECONDS).done:
            self._check()
            if time.monotonic() > until:
                raise TimeoutError
        transfer.result()

    def _transfer(self, begin: Callable[[Any], Any], ready: Any) -> None:
        if ready is not None:
            # On a stream that waits for this alone, not for what was launched since.
            self._stream = self._stream or torch.cuda.Stream(self._device)
            self._stream.wait_event(ready)
        with torch.cuda.stream(self._stream):
            work = begin(self._group)
            # Its own wait looks every 10 ms only, in some versions.
            pause, until = _SHORTEST_POLL, time.monotonic() + self._timeout
            while not work.is_completed():
                if time.monotonic() > until:
                    raise TimeoutError
                time.sleep(pause)
                pause = min(2 * pause, _LONGEST_POLL)
            work.wait(timedelta(seconds=self._timeout))


def _packed(flat: Tensor) -> _Packed:
    ready = torch.cuda.current_stream(flat.device).record_event() if flat.is_cuda else None
    return flat, ready


def _make_group(store: Any, place: int, timeout: timedelta) -> Any:
    groups: Any = torch.distributed
    options = groups.ProcessGroupNCCL.Options()
    options._timeout = timeout
    # Else an error, or a timeout, ends this process; so it is raised where the work is waited for.
    # Read when a group is made, and there is no other way to say it.
    os.environ.update(TORCH_NCCL_BLOCKING_WAIT="1", TORCH_NCCL_ENABLE_MONITORING="0")
    return groups.ProcessGroupNCCL(store, place, 2, options)
