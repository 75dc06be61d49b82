"""Whatever happens in whatever order: every invariant holds after every operation, every row finds exactly its own
tokens' KV in its blocks, every sequence ends once, and what it says does not depend on what ran beside it."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

from fake_runner import FakeRunner
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from kvpage import SamplingParams
from kvpage.cache.manager import BlockManager, GroupConfig
from kvpage.errors import RequestError
from kvpage.sched.admission import SchedulerConfig
from kvpage.sched.plan import StepPlan
from kvpage.sched.scheduler import Scheduler
from kvpage.sched.sequence import Request, Sequence
from kvpage.sched.step import Commit

VOCABULARY = 3  # small, so that prefixes collide all the time
MAX_MODEL_LEN = 40


def draw(seed: int, position: int, stream: int, known: list[int]) -> int:
    """A token that depends on the request and its own history alone."""
    return Random(f"{seed} {position} {stream} {known}").randrange(VOCABULARY)


def group_configs(kind: str, blocks: int, block_size: int) -> list[GroupConfig]:
    """Pools of about ``blocks`` * 4 tokens."""
    count = max(2, 4 * blocks // block_size + 1)
    return {
        "full": [GroupConfig("full", count)],
        "window": [GroupConfig("window", count, 5)],
        "narrow": [GroupConfig("window", count, 1)],
        "mixed": [GroupConfig("full", count), GroupConfig("window", count // 2 + 2, 6)],
        "two windows": [GroupConfig("window", count, 3), GroupConfig("window", count + 3, 9)],
    }[kind]


@dataclass
class Clock:
    now: float = 0.0

    def __call__(self) -> float:
        return self.now


class SchedulerMachine(RuleBasedStateMachine):
    """Random submissions, steps, failures, aborts and timeouts on small pools."""

    @initialize(
        block_size=st.sampled_from([1, 2, 3, 4, 16]),
        kind=st.sampled_from(["full", "full", "window", "narrow", "mixed", "two windows"]),
        blocks=st.integers(3, 24),
        max_num_seqs=st.integers(1, 6),
        max_num_batched_tokens=st.sampled_from([1, 2, 5, 16, 64]),
        policy=st.sampled_from(["fcfs", "priority"]),
        caching=st.booleans(),
        threshold=st.sampled_from([0, 0, 4]),
    )
    def build(self, block_size: int, kind: str, blocks: int, max_num_seqs: int, max_num_batched_tokens: int,
              policy: str, caching: bool, threshold: int) -> None:
        groups = group_configs(kind, blocks, block_size)
        self.clock = Clock()
        self.blocks = BlockManager(block_size=block_size, groups=groups, enable_prefix_caching=caching)
        config = SchedulerConfig(max_num_seqs, max_num_batched_tokens, MAX_MODEL_LEN, policy,
                                 long_prefill_token_threshold=threshold)
        self.scheduler = Scheduler(config, self.blocks, clock=self.clock)
        self.runner = FakeRunner(block_size, groups, draw, max_num_batched_tokens, max_num_seqs)
        self.plan: StepPlan | None = None
        self.submitted: list[Request] = []
        self.ended: set[int] = set()
        self.prompt_logprobs: set[str] = set()

    # ---- what can happen ----

    @rule(
        prompt=st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=30),
        n=st.sampled_from([1, 1, 2, 4]),
        max_tokens=st.sampled_from([None, 1, 3, 12]),
        min_tokens=st.sampled_from([0, 0, 1]),
        salt=st.sampled_from([None, None, "tenant"]),
        priority=st.integers(0, 2),
        stops=st.sampled_from([frozenset(), frozenset([0])]),
        prompt_logprobs=st.sampled_from([None, None, 1]),
        timeout=st.sampled_from([None, None, 5.0]),
    )
    def submit(self, prompt: list[int], n: int, max_tokens: int | None, min_tokens: int, salt: str | None,
               priority: int, stops: frozenset[int], prompt_logprobs: int | None, timeout: float | None) -> None:
        number = len(self.submitted)
        request = Request(
            f"request-{number}", prompt,
            SamplingParams(n=n, max_tokens=max_tokens, min_tokens=min_tokens, prompt_logprobs=prompt_logprobs,
                           timeout=timeout),
            seed=number, arrival=self.clock.now, priority=priority, cache_salt=salt, stop_token_ids=stops)
        try:
            self.scheduler.submit(request)
        except RequestError as error:
            assert "blocks" in str(error)
            return
        self.submitted.append(request)

    @precondition(lambda self: self.plan is None)
    @rule()
    def schedule(self) -> None:
        expected = self.scheduler.has_work
        self.plan = self.scheduler.schedule()
        assert (self.plan is not None) == expected
        if self.plan is not None:
            assert self.plan.num_tokens > 0, "a step that computes nothing"
            decoding = [s for s in self.scheduler.running if len(s.token_ids) - s.computed == 1]
            assert {s.slot for s in decoding} <= set(self.plan.slots) | {f.child for f in self.plan.forks}

    @precondition(lambda self: self.plan is not None)
    @rule(failing=st.sampled_from([False, False, False, True]))
    def commit(self, failing: bool) -> None:
        assert self.plan is not None
        plan, self.plan = self.plan, None
        result = self.runner.execute(plan)
        if failing and result.token_ids:
            result.errors = {0: "logits are not finite"}
        self.take(self.scheduler.commit(plan, result))

    @precondition(lambda self: self.plan is not None)
    @rule(executed=st.booleans())
    def fail(self, executed: bool) -> None:
        assert self.plan is not None
        plan, self.plan = self.plan, None
        if executed:
            self.runner.execute_with_garbage(plan)
        self.scheduler.fail(plan)

    @rule(pick=st.randoms(use_true_random=False))
    def abort(self, pick: Random) -> None:
        if self.submitted:
            request = pick.choice(self.submitted)
            for sequence in self.scheduler.abort(request):
                assert sequence.finish_reason == "abort"
                self.end(sequence)

    @rule(pick=st.randoms(use_true_random=False))
    def finish(self, pick: Random) -> None:
        unfinished = [s for r in self.submitted for s in r.sequences if not s.finished]
        if unfinished:
            sequence = pick.choice(unfinished)
            self.scheduler.finish(sequence, "stop", "\n\n")
            self.scheduler.finish(sequence, "abort")
            assert (sequence.finish_reason, sequence.stop_reason) == ("stop", "\n\n")
            self.end(sequence)

    @rule(seconds=st.sampled_from([1.0, 4.0]))
    def expire(self, seconds: float) -> None:
        self.clock.now += seconds
        for sequence in self.scheduler.expire():
            assert (sequence.finish_reason, sequence.stop_reason) == ("length", "timeout")
            self.end(sequence)

    @rule()
    def run_some_steps(self) -> None:
        for _ in range(5):
            self.run_one_step()
            self.scheduler.check()

    @rule()
    def reset_prefix_cache(self) -> None:
        if self.blocks.reset_prefix_cache():
            assert self.blocks.cached_blocks == 0

    # ---- what must hold ----

    @invariant()
    def invariants_hold(self) -> None:
        self.scheduler.check()

    def teardown(self) -> None:
        if not hasattr(self, "scheduler"):
            return
        bound = 50 + sum(2 + 2 * len(r.sequences) * (MAX_MODEL_LEN + 2) for r in self.submitted) ** 2 // 4
        steps = 0
        while self.scheduler.has_work:
            self.run_one_step()
            steps += 1
            assert steps < bound, "the scheduler makes no progress"
        self.scheduler.check()
        assert self.blocks.used_blocks == 0
        assert self.blocks.free_blocks == self.blocks.usable_blocks
        assert self.scheduler.requests == []
        everyone = {id(s) for r in self.submitted for s in r.sequences}
        assert self.ended == everyone, "a sequence has no terminal event"
        for request in self.submitted:
            for sequence in request.sequences:
                self.expect_own_text(sequence)

    def run_one_step(self) -> None:
        if self.plan is None:
            self.schedule()
        if self.plan is not None:
            self.commit(False)

    def take(self, commit: Commit) -> None:
        assert len(commit.sequences) == len(commit.token_ids)
        for sequence, token in zip(commit.sequences, commit.token_ids, strict=True):
            assert sequence.token_ids[-1] == token
            assert id(sequence) not in self.ended
        for sequence in commit.finished:
            assert sequence.finished
            self.end(sequence)
        for request, entries in commit.prompt_logprobs:
            assert request.request_id not in self.prompt_logprobs
            self.prompt_logprobs.add(request.request_id)
            assert [None if entry is None else next(iter(entry)) for entry in entries] == [
                None, *request.prompt_token_ids[1:]]

    def end(self, sequence: Sequence) -> None:
        assert id(sequence) not in self.ended, "two terminal events"
        self.ended.add(id(sequence))

    def expect_own_text(self, sequence: Sequence) -> None:
        """The tokens are those that the request would have got alone."""
        request = sequence.request
        known = list(request.prompt_token_ids)
        reason: str | None = None
        while reason is None and len(known) < len(sequence.token_ids):
            known.append(draw(request.seed, len(known), sequence.index, known))
            if known[-1] in request.stop_token_ids and len(known) - sequence.prompt_length >= request.params.min_tokens:
                reason = "stop"
            elif len(known) == sequence.max_length:
                reason = "length"
        assert sequence.token_ids == known
        if reason is not None:
            assert sequence.finish_reason == reason
        if sequence.finish_reason == "stop" and sequence.stop_reason != "\n\n":
            assert reason == "stop"
        if request.params.prompt_logprobs is not None and sequence.index == 0 and sequence.num_output:
            assert request.request_id in self.prompt_logprobs


SchedulerMachine.TestCase.settings = settings(
    max_examples=120, stateful_step_count=30, deadline=None, database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large])
TestSchedulerUnderRandomLoad = SchedulerMachine.TestCase
