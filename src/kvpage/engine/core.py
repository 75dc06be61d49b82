"""EngineCore: the three verbs. Schedule, execute, commit; then tokens become text."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from traceback import clear_frames

from kvpage.api.events import StepStats
from kvpage.cache.manager import BlockManager
from kvpage.engine.executor import Executor
from kvpage.engine.metrics import EngineMetrics
from kvpage.engine.request import AnyState, EmbeddingState, GenerationState, with_texts
from kvpage.engine.stats import EngineStats, Listeners
from kvpage.errors import EngineDeadError, KvpageError, RequestError
from kvpage.metrics import MetricsSnapshot
from kvpage.outputs import PositionLogprobs
from kvpage.sched.plan import StepPlan
from kvpage.sched.scheduler import Scheduler
from kvpage.sched.sequence import Sequence as ScheduledSequence
from kvpage.sched.step import Commit
from kvpage.text.tokenizer import Tokenizer


@dataclass(slots=True)
class Totals:
    """Counts since the engine was made."""

    steps: int = 0
    prompt_tokens: int = 0
    generated_tokens: int = 0
    finished_requests: int = 0


class EngineCore:
    """One engine's requests, scheduler and executor. Not thread-safe: its owner calls it from one place at a time.

    An exception that one request causes ends that request; one out of the step itself ends the engine, and
    every request with it, in ``EngineDeadError``.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        blocks: BlockManager,
        executor: Executor,
        tokenizer: Tokenizer | None,
        listeners: Listeners,
        metrics: EngineMetrics,
        release: Callable[[], None],
    ) -> None:
        self.scheduler = scheduler
        self.blocks = blocks
        self.states: dict[str, AnyState] = {}
        self.dead: BaseException | None = None
        self.totals = Totals()
        self.listeners = listeners
        self._metrics = metrics
        self._executor: Executor | None = executor
        self._tokenizer = tokenizer
        self._release = release
        self._stepping = False
        self._asked_to_abort: list[AnyState] = []

    @property
    def has_work(self) -> bool:
        return self.dead is None and self.scheduler.has_work

    def submit(self, state: AnyState) -> None:
        """Accept a request, or raise RequestError / QueueFullError / EngineDeadError and keep nothing of it."""
        self.check_alive()
        try:
            self.scheduler.submit(state.request)
        except RequestError as error:
            self._metrics.rejected(error)
            raise
        request = state.request
        self.states[request.request_id] = state
        self.totals.prompt_tokens += len(request.prompt_token_ids)
        self.listeners.tell("admitted", request.request_id, len(request.prompt_token_ids))

    def step(self) -> list[AnyState]:
        """Schedule, execute, commit once; returns the requests that gained something.

        Raises:
            EngineDeadError: the step failed as a whole; every request has ended with that error.
        """
        self.check_alive()
        clock = time.perf_counter
        began = clock()
        changed: dict[str, AnyState] = {}
        plan: StepPlan | None = None
        phase = "bookkeeping"
        self._stepping = True
        try:
            for sequence in self.scheduler.expire():
                self._finish(sequence, changed)
            running = self._running_if_heard()
            plan = self.scheduler.schedule()
            if plan is not None:
                self._tell_moves(running, plan)
                assert self._executor is not None, "a closed engine has no work"
                phase = "executing"
                scheduled = clock()
                result = self._executor.submit(plan).result()
                executed = clock()
                phase = "bookkeeping"
                commit = self.scheduler.commit(plan, result)
                phase = "delivering"
                committed = clock()
                self._deliver(commit, changed)
                self._metrics.step(began, scheduled, executed, committed, clock())
        except Exception as error:
            # Nothing of a failed step can be trusted, whatever went wrong in it.
            self.die(error, plan)
            raise self._dead_error() from error
        except BaseException as interrupt:
            self._interrupted(phase, plan, interrupt)
            raise
        finally:
            self._stepping = False
        if plan is not None:
            self.totals.steps += 1
            if self.listeners.hears("step"):
                self._tell_step(plan, time.perf_counter() - began)
        self._abort_asked(changed)
        return list(changed.values())

    def abort(self, request_id: str) -> list[AnyState]:
        """End a request, in whatever state it is; unfinished choices end with "abort". Unknown ids are ignored.

        Out of a step itself (a listener, or the garbage collector closing a stream) it happens when the step is
        through.
        """
        state = self.states.get(request_id)
        if state is None:
            return []
        if self._stepping:
            self._asked_to_abort.append(state)
            return []
        changed: dict[str, AnyState] = {}
        for sequence in self.scheduler.abort(state.request):
            self._finish(sequence, changed)
        return list(changed.values())

    def close(self) -> list[AnyState]:
        """Abort what is unfinished and give the memory back. Idempotent."""
        changed = [state for request_id in list(self.states) for state in self.abort(request_id)]
        if self.dead is None:
            self.dead = EngineDeadError("the engine is closed; make a new one")
        if self._executor is not None:
            self._executor.close()
            self._executor = None
            self._release()
            # What a failed step left in its frames would keep weights and KV mapped.
            clear_frames(self.dead.__traceback__)
        return changed

    def check_alive(self) -> None:
        """Raises EngineDeadError if the engine is closed or a step failed."""
        if self.dead is not None:
            raise self._dead_error() from (None if isinstance(self.dead, EngineDeadError) else self.dead)

    def stats(self) -> EngineStats:
        """Counts of this moment."""
        scheduler, blocks, totals = self.scheduler, self.blocks, self.totals
        free, used = blocks.free_blocks, blocks.used_blocks
        return EngineStats(
            running=scheduler.num_running,
            waiting=scheduler.num_waiting,
            free_blocks=free,
            used_blocks=used,
            cached_blocks=blocks.cached_blocks,
            total_blocks=free + used,
            preemptions=scheduler.preemptions,
            forks=blocks.forks,
            copies=blocks.copies,
            prefix_queries=blocks.queries,
            prefix_hits=blocks.hits,
            steps=totals.steps,
            prompt_tokens=totals.prompt_tokens,
            generated_tokens=totals.generated_tokens,
            finished_requests=totals.finished_requests,
        )

    def metrics(self) -> MetricsSnapshot:
        """Everything that was counted and measured, and the gauges of this moment."""
        return self._metrics.snapshot(self.scheduler, self.blocks)

    def _deliver(self, commit: Commit, changed: dict[str, AnyState]) -> None:
        """Turn a commit into tokens and text of the requests' choices."""
        now = time.monotonic()
        states = self.states
        for request, found in commit.prompt_logprobs:
            if (asked := states.get(request.request_id)) is not None:
                asked.output.prompt_logprobs = [
                    None if position is None else with_texts(position, self._tokenizer) for position in found
                ]
        logprobs: Sequence[PositionLogprobs | None] | None = commit.logprobs
        for request, embedding in commit.embeddings:
            if isinstance(wanting := states.get(request.request_id), EmbeddingState):
                wanting.give(embedding, now)
                self._metrics.prompt_computed(wanting, now)
        since: dict[float, int] = {}
        tokens_are_heard = self.listeners.hears("token")
        for i, (sequence, token_id) in enumerate(zip(commit.sequences, commit.token_ids, strict=True)):
            request_id = sequence.request.request_id
            state = states.get(request_id)
            if not isinstance(
                state, GenerationState
            ):  # another choice of the request failed in this very step
                continue
            changed[request_id] = state
            if state.first_token is None:
                state.first_token = now
                self._metrics.prompt_computed(state, now)
            state.last_token = now
            choice = state.choices[sequence.index]
            since[choice.last_token] = since.get(choice.last_token, 0) + 1
            choice.last_token = now
            reported = None if logprobs is None else logprobs[i]
            if reported is not None:
                reported = with_texts(reported, self._tokenizer)
            if tokens_are_heard:
                self.listeners.tell("token", request_id, sequence.index, (token_id,))
            try:
                matched = choice.add(token_id, reported, silent=sequence.finish_reason == "stop")
            except Exception as error:
                # Text is a matter of one request: whatever its decoding raises ends that request alone.
                self._fail(state, error)
                continue
            if matched is not None:
                self.scheduler.finish(sequence, "stop", matched)
                self._finish(sequence, changed, matched=matched)
        self.totals.generated_tokens += len(commit.token_ids)
        self._metrics.tokens(since, len(commit.token_ids), now)
        for sequence in commit.finished:
            self._finish(sequence, changed)

    def _finish(
        self, sequence: ScheduledSequence, changed: dict[str, AnyState], *, matched: str | None = None
    ) -> None:
        """A sequence has its finish reason: so has its choice. A stop string goes before max_tokens, which its last
        token may have reached as well."""
        state = self.states.get(sequence.request.request_id)
        reason = sequence.finish_reason
        if state is None or reason is None:
            return
        changed[state.output.request_id] = state
        if sequence.error is not None:
            self._fail(state, RequestError(sequence.error))
            return
        if matched is None:
            state.finish(sequence.index, reason, sequence.stop_reason)
        else:
            reason = "stop"
            state.finish(sequence.index, reason, matched, flush=False)
        self._tell_finished(state, sequence.index)
        if state.done:
            self._forget(state)

    def _fail(self, state: AnyState, error: Exception) -> None:
        """One request cannot go on; its blocks are freed, the others do not notice."""
        self.scheduler.abort(state.request)
        self._end_in_error(
            state,
            error if isinstance(error, KvpageError) else RequestError(f"{type(error).__name__}: {error}"),
        )

    def _end_in_error(self, state: AnyState, error: KvpageError) -> None:
        for index in state.fail(error):
            self._tell_finished(state, index)
        self._forget(state)

    def _tell_finished(self, state: AnyState, index: int) -> None:
        reason, tokens = state.ending(index)
        if reason is not None:
            self.listeners.tell("finished", state.output.request_id, index, reason, tokens)

    def _forget(self, state: AnyState) -> None:
        self.states.pop(state.output.request_id, None)
        self.totals.finished_requests += 1
        self._metrics.finished(state)
        self.listeners.tell("completed", state.output.request_id, state.output.metrics)

    def _interrupted(self, phase: str, plan: StepPlan | None, interrupt: BaseException) -> None:
        """Ctrl-C within a step. Where the scheduler is consistent, the engine goes on."""
        if phase == "executing" and plan is not None:
            running = self._running_if_heard()
            self.scheduler.fail(plan)  # nothing was taken in: the next step computes it again
            self._tell_moves(running, plan)
        elif phase == "delivering":
            error = RequestError(
                "the request was interrupted while its tokens were delivered: submit it again"
            )
            for state in list(self.states.values()):
                self._fail(state, error)
        else:
            self.die(interrupt, plan)

    def _abort_asked(self, changed: dict[str, AnyState]) -> None:
        asked, self._asked_to_abort = self._asked_to_abort, []
        for state in asked:
            for sequence in self.scheduler.abort(state.request):
                self._finish(sequence, changed)

    def die(self, error: BaseException, plan: StepPlan | None = None) -> None:
        """Every request ends with EngineDeadError, even where the scheduler is what broke. ``plan``: of a step
        that is not committed."""
        self.dead = error
        if plan is not None:
            with suppress(Exception):
                self.scheduler.fail(plan)
        for state in list(self.states.values()):
            with suppress(Exception):
                self.scheduler.abort(state.request)
            self._end_in_error(state, self._dead_error())

    def _dead_error(self) -> EngineDeadError:
        if isinstance(self.dead, EngineDeadError):
            return EngineDeadError(str(self.dead))
        error = EngineDeadError(f"a step failed ({type(self.dead).__name__}: {self.dead}); make a new engine")
        error.__cause__ = self.dead
        return error

    def _tell_step(self, plan: StepPlan, seconds: float) -> None:
        stats = StepStats(
            step=plan.step,
            num_rows=len(plan.slots),
            num_tokens=plan.num_tokens,
            running=self.scheduler.num_running,
            waiting=self.scheduler.num_waiting,
            free_blocks=self.blocks.free_blocks,
            used_blocks=self.blocks.used_blocks,
            seconds=seconds,
        )
        self.listeners.tell("step", stats)

    def _running_if_heard(self) -> list[ScheduledSequence]:
        """Who runs now, for ``_tell_moves``; nobody where no listener wants to know."""
        wanted = self.listeners.hears("scheduled") or self.listeners.hears("preempted")
        return list(self.scheduler.running) if wanted else []

    def _tell_moves(self, before: list[ScheduledSequence], plan: StepPlan) -> None:
        """Who lost its place and who took one since ``before`` was noted."""
        for sequence in before:
            if sequence.slot < 0 and sequence.finish_reason is None:
                self.listeners.tell("preempted", sequence.request.request_id, sequence.index)
        if not self.listeners.hears("scheduled"):
            return
        known = {id(sequence) for sequence in before}
        children = {fork.child for fork in plan.forks}
        for sequence in list(self.scheduler.running):
            if id(sequence) not in known:
                shared = sequence.in_flight if sequence.slot in children else 0
                cached = sequence.computed + shared
                self.listeners.tell("scheduled", sequence.request.request_id, sequence.index, cached)
