"""What must hold of sequences between any two calls of the scheduler."""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf

from kvpage.sched.queues import Queues
from kvpage.sched.sequence import Request, Sequence


def check_sequences(
    queues: Queues, requests: SequenceOf[Request], in_flight: SequenceOf[Sequence], num_holders: int
) -> None:
    """Every unfinished sequence is in one place; what is in flight, held and counted agrees (AssertionError)."""
    running, waiting = queues.running, queues.waiting
    flying = {id(s) for s in running if s.in_flight}
    assert flying == {id(s) for s in in_flight}, "tokens in flight"
    unborn = [child for s in (*running, *waiting) for child in s.children if child.finish_reason is None]
    live = [id(s) for s in (*running, *waiting, *unborn) if s.finish_reason is None]
    expected = [id(s) for r in requests for s in r.sequences if s.finish_reason is None]
    assert sorted(live) == sorted(expected), "an unfinished sequence is lost, or is in two places"
    holding = sum(s.blocks.num_blocks > 0 for s in running)
    assert holding == num_holders, f"{num_holders} tables are held, {holding} run"
    for request in requests:
        unfinished = sum(s.finish_reason is None for s in request.sequences)
        assert request.unfinished == unfinished > 0, f"{request} miscounts its sequences"
