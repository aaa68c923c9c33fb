"""Claims about links: what arrives, in which order, and what happens when a process dies."""

from __future__ import annotations

import os
import pickle
import signal
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from link_process import MIB, TOKEN, Chain, Handle, bits_of, tensors

from raycurv.errors import LostPeer, OutOfOrder
from raycurv.links import nccl, tcp
from raycurv.links.links import Card, Links, Ticket

# Long enough for a machine under load, short enough to wait for.
SILENT_SECONDS = 2.0
# A death is seen when it happens, not when a time is over.
SOON_SECONDS = 1.0


@pytest.fixture(scope="module")
def spares() -> Iterator[list[Handle]]:
    """Processes, started all at once; who lets one die takes another."""
    handles = [Handle() for _ in range(6)]
    spares = list(handles)
    yield spares
    for handle in handles:
        handle.kill()


@pytest.fixture(scope="module")
def three(spares: list[Handle]) -> Chain:
    return Chain([spares.pop() for _ in range(3)])


@pytest.fixture
def chain(three: Chain) -> Iterator[Chain]:
    """Three processes with links under an epoch of their own."""
    three.timeout = 20.0
    three.connect()
    yield three
    three.all("close")


def test_tensors_arrive_bit_for_bit(chain: Chain) -> None:
    for source, target in ((0, 1), (1, 2), (2, 1), (1, 0)):
        tickets = chain.ranks[source].call("send_kinds", target)
        assert chain.ranks[target].call("receive_kinds", tickets) == []


def test_bits_tell_apart_what_equality_does_not() -> None:
    assert bits_of(torch.zeros(3)) != bits_of(-torch.zeros(3))
    assert bits_of(torch.zeros(3)) != bits_of(torch.zeros(3, 1))
    assert bits_of(torch.zeros(0)) != bits_of(torch.zeros(0, dtype=torch.bfloat16))
    assert bits_of(tensors()[0]) == bits_of(tensors()[0].clone())


def test_a_ticket_is_small(chain: Chain) -> None:
    ticket = chain.ranks[0].call("send", 1, 0.0, 4.0)
    assert ticket.nbytes == 4 * MIB
    assert len(pickle.dumps(ticket)) < 300
    assert chain.ranks[1].call("receive", ticket) == 0.0


@pytest.mark.parametrize("slow", [0, 1, 2])
def test_a_pipeline_flows_both_ways_at_once_whoever_is_slow(chain: Chain, slow: int) -> None:
    microbatches, numbers = 12, MIB  # 4 MiB forward, 8 back
    calls = [("work", (microbatches, numbers, 0.02 * (rank == slow))) for rank in range(3)]
    assert chain.each(calls) == [microbatches, 2 * microbatches, microbatches]


def test_sends_that_nobody_asks_for_yet_do_not_wait(chain: Chain) -> None:
    started = time.monotonic()
    to_1 = [chain.ranks[0].call("send", 1, float(i), 8.0) for i in range(4)]
    to_0 = [chain.ranks[1].call("send", 0, float(i), 8.0) for i in range(4)]
    assert time.monotonic() - started < SILENT_SECONDS
    assert [chain.ranks[1].call("receive", ticket) for ticket in to_1] == [0, 1, 2, 3]
    assert [chain.ranks[0].call("receive", ticket) for ticket in to_0] == [0, 1, 2, 3]


def test_a_ticket_out_of_order_is_named_and_costs_nothing(chain: Chain) -> None:
    first, second = (chain.ranks[0].call("send", 1, float(i)) for i in range(2))
    with pytest.raises(OutOfOrder, match=r"from rank 0, rank 1: expected tensor 0 .* of tensor 1"):
        chain.ranks[1].call("receive", second)
    assert chain.ranks[1].call("receive", first) == 0
    with pytest.raises(OutOfOrder, match=r"expected tensor 1 .* of tensor 0"):
        chain.ranks[1].call("receive", first)
    with pytest.raises(OutOfOrder, match="of epoch another"):
        chain.ranks[1].call("receive", replace(second, epoch="another"))
    with pytest.raises(OutOfOrder, match="to rank 1, got one from rank 0 to rank 2"):
        chain.ranks[1].call("receive", replace(second, target=2))
    assert chain.ranks[1].call("receive", second) == 1


def test_memory_of_what_was_received_is_given_back(chain: Chain) -> None:
    count, mib = 10, 40
    calls = [("stream", (count, mib, None, 1)), ("stream", (count, mib, 0, None)), ("resident", ())]
    sender, receiver, _ = chain.each(calls)
    assert sender < 2 * mib * MIB
    assert receiver < 2 * mib * MIB
    # Kept until then, and until the links are closed.
    before = chain.ranks[0].call("resident")
    for _ in range(4):
        chain.ranks[0].call("send", 1, 0.0, mib)
    assert chain.ranks[0].call("resident") - before > 3 * mib * MIB
    chain.ranks[0].call("close")
    assert chain.ranks[0].call("resident") - before < mib * MIB


def test_epochs_leave_nothing_behind(three: Chain) -> None:
    three.timeout = 20.0
    seen = []
    for _ in range(6):
        three.connect()
        three.ranks[0].call("send", 1, 0.0)  # never received
        ticket = three.ranks[2].call("send", 1, 7.0)
        assert three.ranks[1].call("receive", ticket) == 7.0
        three.all("close")
        seen.append(three.all("threads_and_files"))
    # A thread may still be on its way out when it is counted.
    assert min(seen[2:]) <= seen[1]


def test_a_peer_that_closes_is_lost_at_once(chain: Chain) -> None:
    ticket = chain.ranks[0].call("send", 1, 0.0)
    chain.ranks[0].call("close")
    error, seconds = chain.ranks[1].call("timed_receive", ticket)
    assert isinstance(error, LostPeer) and error.rank == 0 and seconds < SOON_SECONDS
    error, seconds = chain.ranks[1].call("send_until_lost", 0)
    assert isinstance(error, LostPeer) and error.rank == 0 and seconds < SOON_SECONDS
    # The others are as near as ever.
    assert chain.ranks[2].call("receive", chain.ranks[1].call("send", 2, 3.0)) == 3.0


def test_a_silent_peer_is_named_when_the_time_is_over(three: Chain) -> None:
    three.timeout = SILENT_SECONDS
    three.connect()
    ticket = three.ranks[2].call("send", 1, 0.0)
    three.ranks[2].signal(signal.SIGSTOP)
    try:
        error, seconds = three.ranks[1].call("timed_receive", ticket)
        assert isinstance(error, LostPeer)
        assert str(error).startswith("receive of tensor 0, rank 2: expected an answer, got none in")
        assert SILENT_SECONDS - 0.1 < seconds < 2 * SILENT_SECONDS
        assert three.ranks[1].call("close") < SOON_SECONDS
    finally:
        three.ranks[2].signal(signal.SIGCONT)
    three.all("close")


def test_closing_ends_a_wait_in_another_thread(chain: Chain) -> None:
    ticket = chain.ranks[2].call("send", 1, 0.0)
    chain.ranks[2].signal(signal.SIGSTOP)
    try:
        error, seconds = chain.ranks[1].call("receive_while_closing", ticket, 0.2)
    finally:
        chain.ranks[2].signal(signal.SIGCONT)
    assert isinstance(error, LostPeer) and "these links were closed" in str(error)
    assert seconds < 0.2 + SOON_SECONDS


@pytest.mark.parametrize("when", ["before it answers", "in the transfer"])
def test_a_dead_sender_is_lost_at_once_and_another_takes_its_place(
    three: Chain, spares: list[Handle], when: str
) -> None:
    three.timeout = 20.0
    three.connect()
    dying = three.ranks[2]
    ticket = dying.call("send", 1, 0.0, 400.0)
    three.ranks[1].call("send", 2, 0.0, 32.0)  # never received
    if when == "in the transfer":
        dying.call("die_in_transfer", 0.02)
    else:
        dying.signal(signal.SIGSTOP)
    three.ranks[1].begin("timed_receive", ticket)
    if when == "before it answers":
        time.sleep(0.3)
        dying.kill()
    error, seconds = three.ranks[1].end()
    assert isinstance(error, LostPeer) and error.rank == 2
    assert seconds < 0.3 + SOON_SECONDS
    replace_rank_2(three, spares, ticket)


def test_a_receiver_that_dies_in_the_transfer_is_lost_at_once(
    three: Chain, spares: list[Handle]
) -> None:
    three.timeout = 20.0
    three.connect()
    ticket = three.ranks[1].call("send", 2, 0.0, 400.0)
    three.ranks[2].call("die_in_transfer", 0.02)
    three.ranks[2].begin("timed_receive", ticket)
    error, seconds = three.ranks[1].call("send_until_lost", 2)
    assert isinstance(error, LostPeer) and error.rank == 2
    assert seconds < SOON_SECONDS
    replace_rank_2(three, spares, ticket)


def replace_rank_2(three: Chain, spares: list[Handle], old: Ticket) -> None:
    """Those who are left close, and go on with another process."""
    error, seconds = three.ranks[1].call("send_until_lost", 2)
    assert isinstance(error, LostPeer) and error.rank == 2 and seconds < SOON_SECONDS
    three.ranks[2].kill()
    three.ranks[2] = spares.pop()
    assert three.ranks[0].call("close") < SOON_SECONDS
    assert three.ranks[1].call("close") < SOON_SECONDS
    three.connect()
    assert three.all("work", 4, MIB, 0.0) == [4, 8, 4]
    with pytest.raises(OutOfOrder):
        three.ranks[1].call("receive", old)
    three.all("close")


def two(timeout: float) -> tuple[list[Card], list[Any]]:
    """Cards and makers of the links of two ranks in this process."""
    device = torch.device("cpu")
    opened = [Links.open("127.0.0.1", device) for _ in range(2)]
    cards = [card for card, _ in opened]

    def maker(rank: int) -> Any:
        return lambda token=TOKEN: Links(
            rank, cards, opened[rank][1], "epoch", token, device, timeout
        )

    return cards, [maker(rank) for rank in range(2)]


def test_who_does_not_come_is_named() -> None:
    _, (make, _) = two(0.5)
    with pytest.raises(LostPeer, match=r"connect, rank 1: expected an answer, got none in 0\.5 s"):
        make()


def test_strangers_are_turned_away_and_hold_nobody_up() -> None:
    """Rubbish, a name without its proof, and many who say nothing at all."""
    cards, makers = two(20.0)
    rubbish = [b"GET / HTTP/1.1\r\n\r\n", os.urandom(4096), b"", tcp._short("epoch/0-1")]
    strangers = []
    for card in cards:
        for content in [*rubbish, *([None] * 100)]:
            strangers.append(socket.create_connection((card.host, card.port)))
            if content is not None:
                strangers[-1].sendall(content)
        # Closed at once.
        socket.create_connection((card.host, card.port)).close()
    begun = time.monotonic()
    with ThreadPoolExecutor(2) as threads:
        one, other = threads.map(lambda make: make(), makers)
    assert time.monotonic() - begun < 2.5  # before: five seconds for each who says nothing
    ticket = one.send(torch.arange(5), 1)
    assert other.receive(ticket).tolist() == [0, 1, 2, 3, 4]
    assert one.strangers > 0 and other.strangers > 0
    for end in (*strangers, one, other):
        end.close()


def test_nobody_gets_in_without_the_token() -> None:
    """One that knows everything else is not let in, and one that answers in a rank's place is not
    believed."""
    cards, (make, _) = two(1.0)
    with ThreadPoolExecutor(1) as thread:
        rank = thread.submit(make)
        with pytest.raises(OSError):
            tcp.connect(cards[0].host, cards[0].port, "epoch/0-1", bytes(32), 0.5).receive_number()
        with pytest.raises(LostPeer):
            rank.result()
    _, makers = two(1.0)
    with ThreadPoolExecutor(2) as threads:
        ends = [
            threads.submit(make, key) for make, key in zip(makers, (TOKEN, bytes(32)), strict=True)
        ]
        for end in ends:
            with pytest.raises(LostPeer, match=r"not of this job|connection closed|none in|reset"):
                end.result()


def test_a_proof_serves_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """What one connection sent is no use to another: both ends make something up each time."""
    seen: list[bytes] = []
    send = tcp.Connection.send
    monkeypatch.setattr(
        tcp.Connection, "send", lambda self, data: (seen.append(bytes(data)), send(self, data))[1]
    )
    for _ in range(2):
        _, makers = two(20.0)
        with ThreadPoolExecutor(2) as threads:
            for links in threads.map(lambda make: make(), makers):
                links.close()
    assert len(seen) == 8 and len(set(seen)) == 8
    assert not any(TOKEN in data for data in seen)


def test_the_store_of_two_waits_at_one_address_alone() -> None:
    listening = tcp.serve("127.0.0.1")
    port, patience = listening.getsockname()[1], timedelta(seconds=20)
    store = nccl.open_store("127.0.0.1", port, listening, patience)
    nccl.open_store("127.0.0.1", port, None, patience).set("id", b"value")
    assert store.get("id") == b"value"
    waiting = [
        line.split()[1]
        for name in ("tcp", "tcp6")
        for line in Path(f"/proc/net/{name}").read_text().splitlines()[1:]
        if line.split()[3] == "0A" and line.split()[1].endswith(f":{port:04X}")
    ]
    assert waiting == [f"0100007F:{port:04X}"]


def test_a_chain_of_one_needs_nobody() -> None:
    card, server = Links.open("127.0.0.1", torch.device("cpu"))
    Links(0, [card], server, "alone", TOKEN, torch.device("cpu"), 0.5).close()


def test_errors_survive_pickling() -> None:
    lost = pickle.loads(pickle.dumps(LostPeer(3, "receive of tensor 5", "none in 2 s")))
    assert (type(lost), lost.rank, lost.operation) == (LostPeer, 3, "receive of tensor 5")
    assert str(lost).startswith("receive of tensor 5, rank 3: expected an answer, got none in 2 s.")
    error = OutOfOrder("receive", "tensor 1", "tensor 2")
    assert str(pickle.loads(pickle.dumps(error))) == str(error)


@pytest.mark.parametrize(
    ("one", "other", "by_nccl"),
    [
        ("gpu 0", "gpu 1", True),
        ("gpu 0", "gpu 0", False),  # shared: NCCL would refuse
        ("gpu 0", "", False),
        ("", "", False),
    ],
)
def test_two_gpus_use_nccl_and_everybody_else_does_not(one: str, other: str, by_nccl: bool) -> None:
    assert nccl.nccl_between(one, other) == by_nccl


class Group:
    """Stands for NCCL's group, with a transfer that is done when it is asked so many times."""

    def __init__(self, asked: int) -> None:
        self.asked, self.waited, self.aborted = asked, 0, 0

    def recv(self, *_: Any) -> Group:
        return self

    def is_completed(self) -> bool:
        self.asked -= 1
        return self.asked <= 0

    def wait(self, *_: Any) -> None:
        self.waited += 1

    def abort(self) -> None:
        self.aborted += 1
        self.asked = 0


def test_whoever_waits_for_nccl_looks_for_the_peer_meanwhile(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def gone() -> None:
        raise ConnectionResetError

    for asked, check, outcome in (
        (3, gone, None),  # done before anyone would look
        (10**9, gone, ConnectionResetError),
        (10**9, lambda: None, TimeoutError),
    ):
        group = Group(asked)
        monkeypatch.setattr(nccl, "_CHECK_SECONDS", 10.0 if outcome is None else 0.05)
        monkeypatch.setattr(nccl, "_make_group", lambda *_, group=group: group)
        carrier = nccl.NcclCarrier(None, 1, torch.device("cpu"), check, 0.2)
        if outcome is None:
            assert len(carrier.receive(8)) == 8
            assert group.waited == 1
        else:
            with pytest.raises(outcome):
                carrier.receive(8)
        carrier.abandon()
        carrier.abandon()
        assert group.aborted == 1
