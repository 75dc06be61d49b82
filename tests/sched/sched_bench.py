"""A scheduler with its pool and a fake runner, in one object."""

from __future__ import annotations

from array import array
from collections.abc import Sequence

from fake_runner import Draw, FakeRunner

from kvpage import SamplingParams
from kvpage.api.scheduling import SchedulingPolicy
from kvpage.cache.manager import BlockManager
from kvpage.cache.tables import GroupConfig
from kvpage.params import Pooling, PoolingParams
from kvpage.sched.admission import SchedulerConfig
from kvpage.sched.plan import StepPlan
from kvpage.sched.policy import FirstComeFirstServed
from kvpage.sched.scheduler import Scheduler
from kvpage.sched.sequence import Request
from kvpage.sched.sequence import Sequence as Choice
from kvpage.sched.step import Commit

Rows = list[tuple[int, int, int]]


class Bench:
    """Submits, steps and remembers; ``check()`` after everything."""

    def __init__(
        self,
        *,
        blocks: int = 64,
        block_size: int = 4,
        groups: Sequence[GroupConfig] | None = None,
        seqs: int = 8,
        tokens: int = 64,
        length: int = 128,
        policy: SchedulingPolicy | None = None,
        draw: Draw = lambda seed, position, stream, known: 1000 + position,
        caching: bool = True,
        queued_reqs: int | None = None,
        queued_tokens: int | None = None,
        threshold: int = 0,
    ) -> None:
        groups = groups or [GroupConfig("full", blocks + 1)]
        self.now = 0.0
        self.blocks = BlockManager(block_size=block_size, groups=groups, enable_prefix_caching=caching)
        self.scheduler = Scheduler(
            SchedulerConfig(
                seqs, tokens, length, policy or FirstComeFirstServed(), queued_reqs, queued_tokens, threshold
            ),
            self.blocks,
            clock=lambda: self.now,
        )
        self.runner = FakeRunner(block_size, groups, draw, tokens, seqs)
        self.finished: list[Choice] = []
        self.embeddings: dict[str, array[float]] = {}
        self.submitted = 0

    def submit(
        self,
        prompt: int | list[int],
        *,
        name: str | None = None,
        priority: int = 0,
        salt: str | None = None,
        stops: Sequence[int] = (),
        eos: Sequence[int] = (),
        pooling: Pooling | None = None,
        **params: object,
    ) -> Request:
        """``prompt``: token ids, or how many different ones, not shared with any other request. ``pooling``: it is to
        become a vector, by PoolingParams; else ``params`` are those of SamplingParams."""
        self.submitted += 1
        if isinstance(prompt, int):
            prompt = [10_000 * self.submitted + position for position in range(prompt)]
        request = Request(
            name or f"request-{self.submitted}",
            prompt,
            SamplingParams(**params)  # type: ignore[arg-type]
            if pooling is None
            else PoolingParams(pooling=pooling, **params),  # type: ignore[arg-type]
            seed=self.submitted,
            arrival=self.now,
            priority=priority,
            cache_salt=salt,
            stop_token_ids=frozenset((*stops, *eos)),
            eos_token_ids=frozenset(eos),
        )
        self.scheduler.submit(request)
        self.scheduler.check()
        return request

    def schedule(self) -> StepPlan:
        plan = self.scheduler.schedule()
        self.scheduler.check()
        assert plan is not None
        return plan

    def commit(self, plan: StepPlan) -> Commit:
        commit = self.scheduler.commit(plan, self.runner.execute(plan))
        self.scheduler.check()
        self.finished += commit.finished
        self.embeddings |= {request.request_id: vector for request, vector in commit.embeddings}
        return commit

    def step(self) -> StepPlan:
        plan = self.schedule()
        self.commit(plan)
        return plan

    def drain(self, limit: int = 1000) -> None:
        for _ in range(limit):
            if not self.scheduler.has_work:
                return
            self.step()
        raise AssertionError(f"still at work after {limit} steps")


def rows(plan: StepPlan) -> Rows:
    """(slot, start, count) of every row."""
    return list(zip(plan.slots, plan.starts, plan.counts, strict=True))
