"""The scheduler: which sequence computes how many tokens in the next step, and what became of the last one."""

from __future__ import annotations

import time
from collections.abc import Callable
from collections.abc import Sequence as SequenceOf

from kvpage.cache.manager import BlockManager
from kvpage.errors import RequestError
from kvpage.outputs import FinishReason
from kvpage.sched.admission import PolicyKeys, QueueLimits, SchedulerConfig, longest_length
from kvpage.sched.deadlines import Deadlines
from kvpage.sched.invariants import check_sequences
from kvpage.sched.plan import Admission, Fork, StepPlan, StepResult
from kvpage.sched.queues import Queues
from kvpage.sched.sequence import Request, Sequence, open_sequences
from kvpage.sched.snapshot import SchedulerSnapshot, sequence_states
from kvpage.sched.step import Commit, Step


class Scheduler:
    """Phase-free: every sequence has known and computed tokens, and a step lets computed catch up with known.

    One step: ``plan = schedule()``, the runner executes it, then ``commit(plan, result)``, or ``fail(plan)``
    if nothing came back. Between the two, ``abort``, ``finish`` and ``expire`` may be called: they end a
    sequence at once, and its blocks and slot are given back when the step is through.

    Args:
        config: limits.
        blocks: the KV memory; used by this scheduler alone.
        clock: seconds, monotonic; ``Request.arrival`` is on the same clock.

    Attributes:
        preemptions: sequences that lost their blocks to one before them.
    """

    def __init__(
        self, config: SchedulerConfig, blocks: BlockManager, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.config = config
        self.blocks = blocks
        self.preemptions = 0
        self._clock = clock
        self._keys = PolicyKeys(config)
        self._limits = QueueLimits(config)
        self._deadlines = Deadlines()
        self._requests: dict[str, Request] = {}
        self._queues = Queues(config.num_slots, blocks)
        self._step: Step | None = None  # scheduled and not yet committed
        self._steps = 0
        self._submitted = 0
        self._chunk = min(
            config.long_prefill_token_threshold or config.max_num_batched_tokens,
            blocks.max_chunk or config.max_num_batched_tokens,
        )

    @property
    def has_work(self) -> bool:
        """Whether ``schedule`` would return a plan, or a step is to be committed."""
        return bool(self._queues.running or self._queues.waiting)

    @property
    def num_running(self) -> int:
        """Sequences that hold a slot."""
        return len(self._queues.running)

    @property
    def num_waiting(self) -> int:
        """Sequences that wait for a slot, preempted ones included."""
        return len(self._queues.waiting)

    @property
    def running(self) -> SequenceOf[Sequence]:
        """Sequences that hold a slot, in policy order; to read, not to change."""
        return self._queues.running

    @property
    def waiting(self) -> SequenceOf[Sequence]:
        """Sequences that wait, in policy order; to read, not to change."""
        return self._queues.waiting

    @property
    def requests(self) -> SequenceOf[Request]:
        """Requests with an unfinished sequence, in the order of submission."""
        return list(self._requests.values())

    # ---- submission -------------------------------------------------------------------------------------

    def submit(self, request: Request) -> None:
        """Queue ``request`` and make its sequences.

        Raises:
            RequestError: it can never be served, or its id is in use; ``param`` names the field.
            QueueFullError: too much is waiting.
        """
        if request.request_id in self._requests:
            raise RequestError(
                f"request_id {request.request_id!r} is in use by a request that has not ended: "
                "choose another one",
                param="request_id",
            )
        max_length = longest_length(request, self.config, self.blocks)
        key = self._keys.ask(request, self._requests.values())
        self._limits.enter(request, len(self._queues.free_slots))
        open_sequences(request, max_length, key, self._submitted, self.blocks, self.config.rope_switch)
        self._submitted += 1
        self._requests[request.request_id] = request
        self._deadlines.add(request)
        self._queues.enqueue(request.sequences[0])

    # ---- one step ---------------------------------------------------------------------------------------

    def schedule(self) -> StepPlan | None:
        """Plan the next step; ``None`` if nothing is running or waiting.

        Side effects, in this order:

        0. Running sequences that outgrew ``config.rope_switch`` give back blocks and slot and wait, to be computed
           again from their tokens: most get them back in 2.
        1. Running sequences, in policy order, get their tokens: one each for those that have computed all
           others, a chunk each of what the budget leaves for the rest. Where blocks are short, the last in
           policy order is preempted (it was not scheduled yet): blocks and slot are free at once, and it waits.
        2. Unless there was a preemption, waiting sequences, in policy order, take prefix hits, a slot and
           blocks, until slots, blocks or budget do not suffice for the next. Blocks suffice if those that run
           could have their next one, too: otherwise the newcomer would soon be preempted.
        3. While 1 and 2 go on: full blocks of known tokens are published, so that later rows of the same step
           hit them; and where a row ends the prompt of a request with n > 1, its choices are forked off.
        4. Slots given back since the last plan, by preemption too, are named in ``plan.released``.
        5. What was scheduled counts as in flight until ``commit`` or ``fail``.
        """
        if self._step is not None:
            raise RuntimeError("schedule() before the last plan was committed or failed")
        running = self._queues.running
        if not running and not self._queues.waiting:
            return None
        switch = self.config.rope_switch
        if switch is not None:
            for sequence in [s for s in running if s.outgrew(switch)]:
                self._queues.requeue(sequence)
                sequence.lengthen(self.blocks)
        step = Step(StepPlan(self._steps), [s for s in running if s.computed < s.writable])
        self._steps += 1
        budget = self.config.max_num_batched_tokens
        if len(step.short) < len(running):
            budget = self._grow_running(step, budget)
        else:
            budget -= len(running)
        if self._queues.waiting and self._queues.free_slots and not step.preempted:
            self._admit_waiting(step, budget)
        self.blocks.drop_copy_sources()
        step.plan.released.extend(self._queues.released)
        self._queues.released.clear()
        step.fill_rows()
        self._step = step
        return step.plan

    def _grow_running(self, step: Step, budget: int) -> int:
        """Rows of the running sequences that need blocks or have more than one token to compute."""
        running = self._queues.running
        demanding = [s for s in running if s.computed >= s.writable]
        # Tokens set aside: one each for all that decode.
        budget -= len(step.short) + sum(len(s.token_ids) - s.computed == 1 for s in demanding)
        for sequence in demanding:
            if sequence.slot < 0:  # preempted, and so were all after it
                break
            count = len(sequence.token_ids) - sequence.computed
            if count > 1:
                count = min(count, budget, self._chunk)
                budget -= count
            if count and self._make_room(sequence, count, step):
                self._add_row(step, sequence, count)
        if step.preempted:
            step.short = [s for s in step.short if s.slot >= 0]
        return budget

    def _make_room(self, sequence: Sequence, count: int, step: Step) -> bool:
        """Blocks for ``count`` more tokens, taken from the last in policy order; ``False``: that was itself."""
        while not self.blocks.allocate(sequence.blocks, sequence.slot, sequence.computed, count, step.plan):
            victim = self._queues.running[-1]
            self.preemptions += 1
            victim.request.preemptions += 1
            step.preempted = True
            self._queues.requeue(victim)
            if victim is sequence:
                return False
        return True

    def _admit_waiting(self, step: Step, budget: int) -> None:
        """Rows of waiting sequences, as long as the next one in order gets slots, blocks and a token."""
        waiting, free_slots = self._queues.waiting, self._queues.free_slots
        spare = sum(map(self._lacking, self._queues.running))
        while waiting and budget > 0:
            sequence = waiting[0]
            born_with = min(len(sequence.children), self.config.num_slots - 1)
            if len(free_slots) <= born_with:
                return
            known = len(sequence.token_ids)
            whole = sequence.needs_every_position
            hit = 0 if whole else self.blocks.match(sequence.blocks, sequence.token_ids)
            count = min(known - hit, budget, self._chunk)
            slot = free_slots[-1]
            if not self.blocks.admit(sequence.blocks, slot, known, hit, count, step.plan, spare):
                return
            budget -= count
            self._queues.dequeue(sequence)
            self._queues.seat(sequence, free_slots.pop())
            sequence.computed = hit
            sequence.reserved = [free_slots.pop() for _ in range(born_with)]
            self._note_admission(sequence, hit)
            request = sequence.request
            step.plan.admissions.append(
                Admission(
                    slot,
                    sequence.token_ids[:],
                    sequence.prompt_length,
                    request.params,
                    request.seed,
                    sequence.index,
                    request.bad_word_ids,
                    sequence.long_rope,
                )
            )
            self._add_row(step, sequence, count)
            spare += self._lacking(sequence)

    def _lacking(self, sequence: Sequence) -> int:
        """Blocks a group that ``sequence`` will soon want: for the rest of its known tokens, or its next block."""
        size, blocks = self.blocks.block_size, sequence.blocks.num_blocks
        grows = sequence.max_length - 1 > blocks * size
        return max(-(-len(sequence.token_ids) // size) - blocks, int(grows))

    def _note_admission(self, sequence: Sequence, hit: int) -> None:
        request = sequence.request
        if request.first_scheduled is None:
            request.first_scheduled = self._clock()
            request.cached_tokens = hit
            self._limits.leave(request)

    def _add_row(self, step: Step, sequence: Sequence, count: int) -> None:
        """``sequence`` computes ``count`` tokens in this step; its blocks are there."""
        sequence.in_flight = count
        step.prompted = step.prompted or sequence.prompt_logprobs is not None
        step.pooled = step.pooled or sequence.pooling is not None
        (step.short if count == 1 else step.long).append(sequence)
        end = sequence.computed + count
        # A decode step's block is published at commit, like all that sampled tokens fill.
        if count > 1 or end <= sequence.prompt_length:
            self.blocks.publish(sequence.blocks, sequence.token_ids, end, step.published)
        if end < len(sequence.token_ids):
            step.partial = True
            sequence.writable = 0
        elif sequence.children:
            self._fork(step, sequence)
        else:
            sequence.writable = sequence.blocks.num_blocks * self.blocks.block_size

    def _fork(self, step: Step, parent: Sequence) -> None:
        """The prompt is computed with this step: choices split off into the slots kept for them."""
        for child in parent.children:
            if child.finish_reason is not None:
                continue
            if not parent.reserved:
                self._queues.enqueue(child)
                continue
            self._queues.seat(child, parent.reserved.pop())
            child.blocks = self.blocks.fork(parent.blocks, child.slot, step.plan)
            child.computed, child.in_flight = parent.computed, parent.in_flight
            step.forked.append(child)
            step.plan.forks.append(Fork(parent.slot, child.slot, child.index))
        self._queues.free_slots.extend(parent.reserved)
        parent.reserved = []
        parent.children = []
        parent.writable = 0  # the next write may have to copy the block

    def commit(self, plan: StepPlan, result: StepResult) -> Commit:
        """Take in what the step computed.

        Side effects, in this order: computed tokens count, sampled tokens are appended, blocks they filled
        are published, sequences that reached an end, or have their embedding, give back blocks and slot.
        """
        step = self._take_step(plan)
        filled = []
        ended_before = False
        for group in (step.short, step.long, step.forked):
            for s in group:
                s.computed = computed = s.computed + s.in_flight
                s.in_flight = 0
                if computed >= s.writable:
                    filled.append(s)
                if s.finish_reason is not None:
                    ended_before = True
        commit = Commit(step.samplers, result.token_ids, result.logprobs)
        if ended_before or result.errors:
            self._sort_out(step, result, commit)
        ended = []
        for s, token in zip(commit.sequences, commit.token_ids, strict=True):
            known = s.token_ids
            known.append(token)
            if token in s.stop_token_ids or len(known) >= s.max_length:
                ended.append(s)
        for s in filled:
            if s.slot >= 0:
                self.blocks.publish(s.blocks, s.token_ids, s.computed)
        if step.prompted:
            self._collect_prompt_logprobs(step, result, commit)
        for s in ended:
            self._end(s, commit)
        for s, embedding in zip(step.poolers, result.embeddings, strict=True):
            if s.finish_reason is None:
                self.finish(s, "stop")
                commit.embeddings.append((s.request, embedding))
                commit.finished.append(s)
        return commit

    def _sort_out(self, step: Step, result: StepResult, commit: Commit) -> None:
        """Leave out sequences that ended while the step was under way, or that the step ended in error."""
        kept = []
        for index, sequence in enumerate([*step.samplers, *step.poolers]):
            if sequence.finish_reason is not None:
                continue
            if index in result.errors:
                sequence.error = result.errors[index]
                self.finish(sequence, "error")
                commit.finished.append(sequence)
            elif index < len(step.samplers):
                kept.append(index)
        for sequence in step.sequences:
            if sequence.finish_reason is not None and sequence.slot >= 0:
                self._queues.unseat(sequence)
        commit.sequences = [step.samplers[index] for index in kept]
        commit.token_ids = [result.token_ids[index] for index in kept]
        if result.logprobs is not None:
            commit.logprobs = [result.logprobs[index] for index in kept]

    def _collect_prompt_logprobs(self, step: Step, result: StepResult, commit: Commit) -> None:
        for row, sequence in enumerate(step.short + step.long):
            if sequence.prompt_logprobs is None or sequence.slot < 0:
                continue
            sequence.prompt_logprobs.extend(result.prompt_logprobs.get(row, ()))
            if sequence.computed >= sequence.prompt_length:
                commit.prompt_logprobs.append((sequence.request, sequence.prompt_logprobs))
                sequence.prompt_logprobs = None

    def _end(self, sequence: Sequence, commit: Commit) -> None:
        """Finish ``sequence`` if its last token ends it: a stop token counts from min_tokens on."""
        request, token = sequence.request, sequence.token_ids[-1]
        if token in sequence.stop_token_ids and sequence.num_output >= request.params.min_tokens:
            self.finish(sequence, "stop", None if token in request.eos_token_ids else token)
        elif len(sequence.token_ids) >= sequence.max_length:
            self.finish(sequence, "length")
        else:
            return
        commit.finished.append(sequence)

    def fail(self, plan: StepPlan) -> None:
        """The step of ``plan`` failed as a whole, and what the runner did of it is not known.

        What the step published is withdrawn, so nothing stale is ever hit. Every running sequence gives back
        its blocks and slot and waits, to be computed again from its tokens.
        """
        step = self._take_step(plan)
        self.blocks.withdraw(step.published)
        for sequence in reversed(self._queues.running[:]):
            if sequence.finish_reason is None:
                self._queues.requeue(sequence)
            else:
                self._queues.unseat(sequence)
        # The runner may not have got as far as the plan's own list.
        self._queues.released = list(dict.fromkeys([*plan.released, *self._queues.released]))

    def _take_step(self, plan: StepPlan) -> Step:
        step = self._step
        if step is None or step.plan.step != plan.step:
            raise RuntimeError(f"step {plan.step} is not under way: each plan is committed or failed once")
        self._step = None
        return step

    # ---- ends -------------------------------------------------------------------------------------------

    def finish(self, sequence: Sequence, reason: FinishReason, stop_reason: int | str | None = None) -> None:
        """End ``sequence``, whatever it is doing. Does nothing if it has ended already."""
        if sequence.finish_reason is not None:
            return
        sequence.finish_reason = reason
        sequence.stop_reason = stop_reason
        request = sequence.request
        request.unfinished -= 1
        if sequence.queued:
            self._queues.dequeue(sequence)
        children, sequence.children = sequence.children, []
        for child in children:
            if child.finish_reason is None:
                self._queues.enqueue(child)
        if sequence.slot >= 0 and not sequence.in_flight:
            self._queues.unseat(sequence)
        if request.unfinished == 0:
            del self._requests[request.request_id]
            self._deadlines.discard(request)
            if request.first_scheduled is None:
                self._limits.leave(request)

    def abort(self, request: Request) -> list[Sequence]:
        """End the request; returns the sequences that were unfinished, now "abort"."""
        return self._finish_all(request, "abort", None)

    def expire(self) -> list[Sequence]:
        """End the requests whose ``params.timeout`` is over, waiting or running ("length", "timeout")."""
        if not self._deadlines:
            return []
        ended: list[Sequence] = []
        for request in self._deadlines.due(self._clock()):
            ended += self._finish_all(request, "length", "timeout")
        return ended

    def _finish_all(self, request: Request, reason: FinishReason, stop_reason: str | None) -> list[Sequence]:
        unfinished = [s for s in request.sequences if s.finish_reason is None]
        for sequence in reversed(unfinished):  # choice 0 last, so that it does not queue its children first
            self.finish(sequence, reason, stop_reason)
        return unfinished

    # ---- inspection -------------------------------------------------------------------------------------

    def snapshot(self) -> SchedulerSnapshot:
        """Every block and every sequence as they are now."""
        return SchedulerSnapshot(
            self.blocks.block_size,
            self.blocks.snapshot(),
            sequence_states(self._queues.running),
            sequence_states(self._queues.waiting),
        )

    def check(self) -> None:
        """Verify every invariant of queues, slots, counters and blocks (AssertionError says which one broke)."""
        self._queues.check()
        self.blocks.check()
        in_flight = self._step.sequences if self._step else []
        check_sequences(self._queues, self.requests, in_flight, self.blocks.num_holders)
        self._limits.check(self.requests)
