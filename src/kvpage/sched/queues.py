"""Where every sequence is: running on a slot, or waiting; both in the policy's order."""

from __future__ import annotations

from bisect import bisect_left, insort
from itertools import pairwise
from operator import attrgetter

from kvpage.cache.manager import BlockManager
from kvpage.sched.sequence import Sequence

by_order = attrgetter("order")


class Queues:
    """The running and the waiting sequences, and the slots.

    Attributes:
        running: sequences that hold a slot, in policy order.
        waiting: sequences that wait for one, in policy order; those that were preempted are among them.
        free_slots: slots that nobody holds; the last one is given out next.
        released: slots that were given back and that the runner was not told of yet.
    """

    __slots__ = ("_blocks", "_num_slots", "free_slots", "released", "running", "waiting")

    def __init__(self, num_slots: int, blocks: BlockManager) -> None:
        self.running: list[Sequence] = []
        self.waiting: list[Sequence] = []
        self.free_slots = list(range(num_slots - 1, -1, -1))
        self.released: list[int] = []
        self._num_slots = num_slots
        self._blocks = blocks

    def enqueue(self, sequence: Sequence) -> None:
        """``sequence`` waits, ahead of those after it in policy order."""
        sequence.queued = True
        insort(self.waiting, sequence, key=by_order)

    def dequeue(self, sequence: Sequence) -> None:
        """``sequence`` waits no more."""
        sequence.queued = False
        del self.waiting[bisect_left(self.waiting, sequence.order, key=by_order)]

    def seat(self, sequence: Sequence, slot: int) -> None:
        """``sequence`` runs on ``slot``, which was taken from ``free_slots``."""
        sequence.slot = slot
        insort(self.running, sequence, key=by_order)

    def unseat(self, sequence: Sequence) -> None:
        """Take blocks, slot and reserved slots from a running sequence."""
        del self.running[bisect_left(self.running, sequence.order, key=by_order)]
        self._blocks.free(sequence.blocks)
        self.free_slots.append(sequence.slot)
        self.free_slots.extend(sequence.reserved)
        self.released.append(sequence.slot)
        sequence.reserved = []
        sequence.slot = -1
        sequence.computed = sequence.in_flight = sequence.writable = 0

    def requeue(self, sequence: Sequence) -> None:
        """A running sequence loses blocks and slots; it waits, to be computed again from its tokens."""
        self.unseat(sequence)
        if sequence.prompt_logprobs is not None:
            sequence.prompt_logprobs = [None]
        self.enqueue(sequence)

    def check(self) -> None:
        """Orders, flags and slots are consistent, and block tables cover what was computed."""
        for queue in (self.running, self.waiting):
            orders = [sequence.order for sequence in queue]
            assert all(a < b for a, b in pairwise(orders)), f"queue out of order: {orders}"
        slots = list(self.free_slots)
        for sequence in self.running:
            slots += [sequence.slot, *sequence.reserved]
            assert not sequence.queued, f"{sequence} is running and waiting"
            length = sequence.computed + sequence.in_flight
            assert length <= len(sequence.token_ids), f"{sequence} computed tokens it does not know"
            covered = sequence.blocks.num_blocks * self._blocks.block_size
            assert covered >= max(length, sequence.writable), f"the block table of {sequence} is too short"
        assert sorted(slots) == list(range(self._num_slots)), f"slots are not held once each: {sorted(slots)}"
        for sequence in self.waiting:
            assert sequence.queued, f"{sequence} waits without its mark"
            assert sequence.slot == -1, f"{sequence} waits with a slot"
            assert sequence.blocks.num_blocks == 0, f"{sequence} waits with blocks"
            assert sequence.finish_reason is None, f"{sequence} waits after its end"
