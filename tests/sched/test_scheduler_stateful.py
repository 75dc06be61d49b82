"""Whatever happens in whatever order: every invariant holds after every operation, every row finds exactly its own
tokens' KV in its blocks, every sequence ends once, and neither its tokens nor its vector depend on what ran beside it."""

from __future__ import annotations

from array import array
from dataclasses import dataclass
from random import Random

from fake_runner import FakeRunner, vector_of
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from kvpage import SamplingParams
from kvpage.api.scheduling import SchedulingPolicy
from kvpage.cache.manager import BlockManager
from kvpage.cache.tables import GroupConfig
from kvpage.errors import RequestError
from kvpage.params import Pooling, PoolingParams
from kvpage.sched.admission import SchedulerConfig
from kvpage.sched.plan import StepPlan
from kvpage.sched.policy import FirstComeFirstServed, PriorityFirst
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


@dataclass(frozen=True)
class RequestSpec:
    prompt: list[int]
    n: int
    max_tokens: int | None
    min_tokens: int
    salt: str | None
    priority: int
    stops: frozenset[int]
    prompt_logprobs: int | None
    timeout: float | None
    pooling: Pooling | None

    def params(self) -> SamplingParams | PoolingParams:
        if self.pooling is not None:
            return PoolingParams(pooling=self.pooling, timeout=self.timeout)
        return SamplingParams(
            n=self.n,
            max_tokens=self.max_tokens,
            min_tokens=min(self.min_tokens, self.max_tokens or MAX_MODEL_LEN),
            prompt_logprobs=self.prompt_logprobs,
            timeout=self.timeout,
        )


PROMPTS = st.builds(
    lambda pattern, length, tail: (pattern * 30)[:length] + tail,
    st.sampled_from([[0], [0, 1], [2]]),
    st.integers(0, 24),
    st.lists(st.integers(0, VOCABULARY - 1), max_size=4),
).filter(bool)
REQUESTS = st.builds(
    RequestSpec,
    prompt=PROMPTS,
    n=st.sampled_from([1, 1, 2, 4]),
    max_tokens=st.sampled_from([None, 1, 3, 12, 12]),
    min_tokens=st.sampled_from([0, 0, 4]),
    salt=st.sampled_from([None, None, "tenant"]),
    priority=st.integers(0, 2),
    stops=st.sampled_from([frozenset(), frozenset([0])]),
    prompt_logprobs=st.sampled_from([None, None, None, 1]),
    timeout=st.sampled_from([None, None, None, 5.0]),
    pooling=st.sampled_from([None, None, None, None, "mean", "last"]),
)
OUTCOMES = st.sampled_from(["commit"] * 8 + ["error", "lost", "garbage", "abort", "finish", "expire"])


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
        blocks=st.integers(3, 12),
        max_num_seqs=st.sampled_from([1, 3, 4, 6, 8]),
        max_num_batched_tokens=st.sampled_from([1, 5, 16, 64, 64]),
        policy=st.sampled_from([FirstComeFirstServed(), PriorityFirst()]),
        caching=st.sampled_from([True, True, True, False]),
        threshold=st.sampled_from([0, 0, 4]),
        rope_switch=st.sampled_from([None, None, 1, 8, 20]),
    )
    def build(
        self,
        block_size: int,
        kind: str,
        blocks: int,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        policy: SchedulingPolicy,
        caching: bool,
        threshold: int,
        rope_switch: int | None,
    ) -> None:
        groups = group_configs(kind, blocks, block_size)
        self.clock = Clock()
        self.blocks = BlockManager(block_size=block_size, groups=groups, enable_prefix_caching=caching)
        config = SchedulerConfig(
            max_num_seqs,
            max_num_batched_tokens,
            MAX_MODEL_LEN,
            policy,
            long_prefill_token_threshold=threshold,
            rope_switch=rope_switch,
        )
        self.scheduler = Scheduler(config, self.blocks, clock=self.clock)
        self.runner = FakeRunner(block_size, groups, draw, max_num_batched_tokens, max_num_seqs, rope_switch)
        self.submitted: list[Request] = []
        self.ended: set[int] = set()
        self.prompt_logprobs: set[str] = set()
        self.embeddings: dict[str, array[float]] = {}
        self.under_way = False

    # ---- what can happen ----

    @rule(specs=st.lists(REQUESTS, min_size=1, max_size=4))
    def submit(self, specs: list[RequestSpec]) -> None:
        for spec in specs:
            number = len(self.submitted)
            request = Request(
                f"request-{number}",
                spec.prompt,
                spec.params(),
                seed=number,
                arrival=self.clock.now,
                priority=spec.priority,
                cache_salt=spec.salt,
                stop_token_ids=spec.stops,
            )
            try:
                self.scheduler.submit(request)
            except RequestError as error:
                assert "blocks" in str(error)
            else:
                self.submitted.append(request)

    @rule(outcomes=st.lists(OUTCOMES, min_size=1, max_size=10), pick=st.randoms(use_true_random=False))
    def steps(self, outcomes: list[str], pick: Random) -> None:
        for outcome in outcomes:
            self.step(outcome, pick)
            self.scheduler.check()

    @rule(pick=st.randoms(use_true_random=False))
    def abort(self, pick: Random) -> None:
        if self.submitted:
            for sequence in self.scheduler.abort(pick.choice(self.submitted)):
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
    def reset_prefix_cache(self) -> None:
        assert self.blocks.reset_prefix_cache() == (self.blocks.used_blocks == 0)

    def step(self, outcome: str, pick: Random) -> None:
        expected = self.scheduler.has_work
        plan = self.scheduler.schedule()
        self.under_way = True  # and stays so if an assertion fails in between
        assert (plan is not None) == expected
        if plan is not None:
            self.bring_to_end(plan, outcome, pick)
        self.under_way = False

    def bring_to_end(self, plan: StepPlan, outcome: str, pick: Random) -> None:
        assert plan.num_tokens > 0, "a step that computes nothing"
        decoding = {s.slot for s in self.scheduler.running if len(s.token_ids) - s.computed == 1}
        assert decoding <= set(plan.slots) | {fork.child for fork in plan.forks}, (
            "a decoding sequence gets no token"
        )
        self.scheduler.check()
        if outcome == "lost":
            self.scheduler.fail(plan)
            return
        if outcome == "garbage":
            self.runner.execute_with_garbage(plan)
            self.scheduler.fail(plan)
            return
        result = self.runner.execute(plan)
        outputs = len(result.token_ids) + len(result.embeddings)
        if outcome == "error" and outputs:
            result.errors = {pick.randrange(outputs): "logits are not finite"}
        if outcome == "abort":
            self.abort(pick)
        if outcome == "finish":
            self.finish(pick)
        if outcome == "expire":
            self.expire(1.0)
        self.scheduler.check()
        self.take(self.scheduler.commit(plan, result))

    # ---- what must hold ----

    @invariant()
    def invariants_hold(self) -> None:
        self.scheduler.check()

    def teardown(self) -> None:
        if not hasattr(self, "scheduler") or self.under_way:
            return
        bound = 50 + sum(2 + 2 * len(r.sequences) * (MAX_MODEL_LEN + 2) for r in self.submitted) ** 2 // 4
        steps = 0
        while self.scheduler.has_work:
            self.step("commit", Random(0))
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

    def take(self, commit: Commit) -> None:
        assert len(commit.sequences) == len(commit.token_ids)
        for sequence, token in zip(commit.sequences, commit.token_ids, strict=True):
            assert sequence.token_ids[-1] == token
            assert id(sequence) not in self.ended
        for sequence in commit.finished:
            assert sequence.finished
            self.end(sequence)
        for request, embedding in commit.embeddings:
            assert request.request_id not in self.embeddings
            assert request.sequences[0] in commit.finished
            self.embeddings[request.request_id] = embedding
        for request, entries in commit.prompt_logprobs:
            assert request.request_id not in self.prompt_logprobs
            self.prompt_logprobs.add(request.request_id)
            assert [None if entry is None else next(iter(entry)) for entry in entries] == [
                None,
                *request.prompt_token_ids[1:],
            ]

    def end(self, sequence: Sequence) -> None:
        assert id(sequence) not in self.ended, "two terminal events"
        self.ended.add(id(sequence))

    def expect_own_text(self, sequence: Sequence) -> None:
        """The tokens, or the vector, are those that the request would have got alone."""
        request = sequence.request
        if isinstance(request.params, PoolingParams):
            self.expect_own_vector(sequence, request.params)
            return
        known = list(request.prompt_token_ids)
        reason: str | None = None
        while reason is None and len(known) < len(sequence.token_ids):
            known.append(draw(request.seed, len(known), sequence.index, known))
            if (
                known[-1] in request.stop_token_ids
                and len(known) - sequence.prompt_length >= request.params.min_tokens
            ):
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

    def expect_own_vector(self, sequence: Sequence, params: PoolingParams) -> None:
        prompt = list(sequence.request.prompt_token_ids)
        assert sequence.token_ids == prompt, "a prompt that becomes a vector gained a token"
        found = self.embeddings.get(sequence.request.request_id)
        if (sequence.finish_reason, sequence.stop_reason) == ("stop", None):
            assert found == vector_of(params.pooling, prompt)
        else:
            assert found is None, "a request that did not end well has a vector"


SchedulerMachine.TestCase.settings = settings(
    max_examples=150,
    stateful_step_count=20,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large],
)
TestSchedulerUnderRandomLoad = SchedulerMachine.TestCase
