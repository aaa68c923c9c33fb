"""The part of ``gpu.py`` about links: two processes that send each other tensors of the device."""

from __future__ import annotations

import multiprocessing
import sys
import time
from pathlib import Path
from typing import Any

import torch
from gpu import Notes, Place

from raycurv.errors import LostPeer
from raycurv.links.links import Links
from raycurv.links.nccl import NcclCarrier, gpu_name, nccl_between

sys.path.append(str(Path(__file__).resolve().parents[1] / "tests"))
from link_process import TOKEN, bits_of, tensors

_TIMEOUT_SECONDS = 20.0
# A death is seen when it happens, not when a time is over.
_SOON_SECONDS = 2.0


def links(place: Place, notes: Notes) -> None:
    """Tensors of every kind arrive bit for bit; how fast large ones do; a death is seen at once.

    Raises:
        AssertionError: they do not, or it is not.
    """
    count = torch.cuda.device_count() if place.device == "cuda" else 0
    devices = [f"cuda:{rank % count}" if count else "cpu" for rank in range(2)]
    names = [gpu_name(torch.device(device)) for device in devices]
    backend = "NCCL" if nccl_between(*names) else "TCP"
    if count == 1:
        notes.at("NCCL, alone")
        # Two processes on one GPU are more than NCCL allows: no more than that a group is made and
        # let go can be seen.
        _alone(torch.device("cuda", 0))
        notes.row("NCCL on one GPU", what="a group is made and let go", verdict="kept")
    elif count > 1:
        assert backend == "NCCL", f"two GPUs, and {backend}"
    context: Any = multiprocessing.get_context("fork" if place.device == "cpu" else "spawn")
    pipes = [context.Pipe() for _ in range(2)]
    ranks = [
        context.Process(target=_rank, args=(r, devices[r], place.small, pipes[r][1]), daemon=True)
        for r in range(2)
    ]
    for rank in ranks:
        rank.start()
    for _, its in pipes:
        its.close()
    zero, one = (mine for mine, _ in pipes)
    notes.at("connecting")
    cards = [_hear(pipe) for pipe in (zero, one)]
    for pipe in (zero, one):
        pipe.send(cards)
    missed = []
    for source, target in ((zero, one), (one, zero)):
        # Tickets go from process to process through here, as they go through Ray's calls.
        for what in ("kinds", "large"):
            notes.at(f"{what}, from {devices[0]} to {devices[1]} or back")
            source.send(("send", what))
            target.send(("receive", (what, _hear(source))))
            found = _hear(target)
            if what == "kinds":
                missed += found
                notes.row("Tensors from process to process", by=backend, what="every kind",
                          wrong=len(found), verdict="MISSED" if found else "kept")  # fmt: skip
            else:
                notes.row("Tensors from process to process", by=backend, what="large", **found)
    notes.at("a death")
    zero.send(("send", "kinds"))
    tickets = _hear(zero)
    ranks[0].kill()
    ranks[0].join()
    one.send(("lose", tickets))
    seconds = _hear(one)
    kept = seconds < _SOON_SECONDS
    notes.row("Tensors from process to process", by=backend, what="a death is seen",
              seconds=seconds, verdict="kept" if kept else "MISSED")  # fmt: skip
    ranks[1].kill()
    ranks[1].join()
    assert not missed, f"tensors that arrived otherwise than they were sent: {missed}"
    assert kept, f"a death was seen after {seconds:.1f} s"


def _hear(pipe: Any) -> Any:
    assert pipe.poll(3 * _TIMEOUT_SECONDS), "a process of the links does not answer"
    answer = pipe.recv()
    if isinstance(answer, Exception):
        raise answer
    return answer


def _rank(rank: int, device: str, small: bool, pipe: Any) -> None:
    """What either process does."""
    try:
        _serve(rank, torch.device(device), small, pipe)
    except EOFError:
        return
    except Exception as error:
        pipe.send(RuntimeError(f"rank {rank}: {type(error).__name__}: {error}"))


def _serve(rank: int, device: torch.device, small: bool, pipe: Any) -> None:
    if device.type == "cuda":
        torch.cuda.set_device(device)
    card, server = Links.open("127.0.0.1", device)
    pipe.send(card)
    ours = Links(rank, pipe.recv(), server, "gpu", TOKEN, device, _TIMEOUT_SECONDS)
    peer = 1 - rank
    numbers = 1 << 12 if small else 1 << 26
    large = torch.arange(numbers, dtype=torch.float32, device=device)
    while True:
        what, given = pipe.recv()
        if what == "send":
            sent = [t.detach().to(device) for t in tensors()] if given == "kinds" else [large] * 3
            pipe.send([ours.send(tensor, peer) for tensor in sent])
        elif what == "lose":
            began = time.perf_counter()
            try:
                for ticket in given:
                    ours.receive(ticket)
            except LostPeer as lost:
                assert lost.rank == peer, lost
            else:
                raise AssertionError("tensors of a process that is dead")
            pipe.send(time.perf_counter() - began)
        elif given[0] == "kinds":
            arrived = [ours.receive(ticket) for ticket in given[1]]
            wrong = []
            for i, (found, sent) in enumerate(zip(arrived, tensors(), strict=True)):
                if found.device.type != device.type or bits_of(found.cpu()) != bits_of(sent):
                    wrong.append(i)
            pipe.send(wrong)
        else:
            # The first makes a backend's connection.
            assert torch.equal(ours.receive(given[1][0]), large)
            began = time.perf_counter()
            for ticket in given[1][1:]:
                last = ours.receive(ticket)
            assert float(last[-1]) == float(large[-1])
            seconds = (time.perf_counter() - began) / (len(given[1]) - 1)
            pipe.send({"MB": large.nbytes / 1e6, "seconds": seconds,
                       "GB/s": large.nbytes / 1e9 / seconds})  # fmt: skip


def _alone(device: torch.device) -> None:
    store: Any = torch.distributed.HashStore()
    carrier = NcclCarrier(store, 0, device, lambda: None, _TIMEOUT_SECONDS)
    flat, ready = carrier.pack(torch.ones(4, device=device))
    assert flat.device == device and flat.numel() == 16 and ready is not None
    carrier.abandon()
