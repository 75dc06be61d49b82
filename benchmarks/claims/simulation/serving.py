"""Serve a queue that is never empty, with the same memory, limits and order under every allocator.

Paged serving is kvpage's own ``Scheduler`` over its own ``BlockManager``, preemptions and recomputing included.
Contiguous serving is the same loop: first come, first served, a request starts when its run of slots is there.
"""

from __future__ import annotations

from dataclasses import dataclass

from kvpage import SamplingParams
from kvpage.cache.manager import BlockManager
from kvpage.cache.tables import GroupConfig
from kvpage.sched.admission import SchedulerConfig
from kvpage.sched.plan import StepResult
from kvpage.sched.scheduler import Scheduler
from kvpage.sched.sequence import Request
from simulation.allocators import Policy
from simulation.workloads import MAX_MODEL_LEN, Job, Workload

MAX_NUM_SEQS = 1024
MAX_NUM_BATCHED_TOKENS = 2048
WARM_UP = 0.1
"""Share of the requests that have ended before anything is counted: at first all are young."""


@dataclass(frozen=True, slots=True)
class Machine:
    """A model on a device, as far as a step's time goes: a model of it, at peak rates, good for ratios only."""

    slots: int
    kv_bytes: int
    weight_bytes: float
    parameters: float
    bandwidth: float
    flops: float

    def step_seconds(self, tokens: int, context: int) -> float:
        """The longer of reading weights and KV of ``context`` tokens, and computing ``tokens``."""
        memory = (self.weight_bytes + self.kv_bytes * context) / self.bandwidth
        return max(memory, 2 * self.parameters * tokens / self.flops)


OPT_13B = Machine(15_700, 819_200, 26e9, 13e9, 1.555e12, 312e12)
"""OPT-13B on an A100-40GB, 12 GB for KV: table 1 of arXiv:2309.06180; peak rates of the data sheet."""


@dataclass(slots=True)
class Outcome:
    """Sums over the counted steps; shares are of all slots of the pool."""

    slots: int
    steps: int = 0
    sequences: int = 0
    produced: int = 0
    seconds: float = 0.0
    states: int = 0
    reserved: int = 0
    internal: int = 0
    preemptions: int = 0
    ended: int = 0

    @property
    def concurrency(self) -> float:
        """Sequences that ran at once, mean over the steps."""
        return self.sequences / max(1, self.steps)

    @property
    def throughput(self) -> float:
        """New tokens a second of modelled time."""
        return self.produced / self.seconds if self.seconds else 0.0

    def share(self, slots: int) -> float:
        """Of the pool, mean over the steps."""
        return slots / (self.slots * max(1, self.steps))

    @property
    def waste(self) -> float:
        """Share of the pool that holds no token, while requests wait for memory."""
        return 1 - self.share(self.states)

    @property
    def external(self) -> float:
        """Share of the pool that nobody has been given or that its allocator rounded up to."""
        return self.waste - self.share(self.reserved) - self.share(self.internal)

    def checked(self) -> Outcome:
        """Itself.

        Raises:
            ValueError: nothing was counted: the queue was empty before the pool was full and the warm-up over.
        """
        if not self.steps:
            raise ValueError("too few requests to keep any waiting for memory: raise --tokens")
        return self

    def count(self, *, sequences: int, produced: int, seconds: float, states: int) -> None:
        """One step."""
        self.steps += 1
        self.sequences += sequences
        self.produced += produced
        self.seconds += seconds
        self.states += states


@dataclass(slots=True)
class _Running:
    job: Job
    run: tuple[int, int]
    reserve: int
    computed: int = 0


def serve_contiguous(
    jobs: list[Job], policy: Policy, workload: Workload, machine: Machine = OPT_13B, *, static: bool = False
) -> Outcome:
    """Continuous batching over runs of slots; ``static``: a batch begins when the last one has ended as a whole."""
    allocator, outcome = policy.allocator(machine.slots), Outcome(machine.slots)
    waiting, running = list(reversed(jobs)), list[_Running]()
    while waiting:
        budget = MAX_NUM_BATCHED_TOKENS - len(running)
        is_open = not (static and running)
        while is_open and waiting and len(running) < MAX_NUM_SEQS and waiting[-1].prompt <= budget:
            size = policy.reserve(waiting[-1], workload)
            run = allocator.take(size)
            if run is None:
                break
            job = waiting.pop()
            budget -= job.prompt
            running.append(_Running(job, run, size))
        if not running:
            raise ValueError(f"{waiting[-1]} can never start: {policy.name} of {machine.slots} slots")
        active = [one for one in running if one.computed < one.job.slots]
        tokens = 0
        for one in active:
            count = 1 if one.computed else one.job.prompt
            one.computed += count
            tokens += count
        context = sum(one.computed for one in active)
        if waiting and outcome.ended >= WARM_UP * len(jobs):
            seconds = machine.step_seconds(tokens, context)
            states = sum(one.computed for one in running)
            outcome.count(sequences=len(active), produced=len(active), seconds=seconds, states=states)
            outcome.reserved += sum(one.job.slots - one.computed for one in running)
            outcome.internal += sum(one.reserve - one.job.slots for one in running)
        ended = [one for one in running if one.computed >= one.job.slots]
        if static and len(ended) < len(running):
            continue
        for one in ended:
            allocator.give_back(*one.run)
        outcome.ended += len(ended)
        if ended:
            running = [one for one in running if one.computed < one.job.slots]
    return outcome.checked()


def serve_paged(jobs: list[Job], block_size: int = 16, machine: Machine = OPT_13B) -> Outcome:
    """The same queue through kvpage's scheduler and block manager; no prefix is shared."""
    blocks = machine.slots // block_size
    manager = BlockManager(
        block_size=block_size, groups=[GroupConfig("full", blocks + 1)], enable_prefix_caching=False
    )
    config = SchedulerConfig(MAX_NUM_SEQS, MAX_NUM_BATCHED_TOKENS, MAX_MODEL_LEN)
    scheduler, outcome = Scheduler(config, manager), Outcome(machine.slots)
    for number, job in enumerate(jobs):
        params = SamplingParams(max_tokens=job.output, temperature=0.0)
        scheduler.submit(Request(str(number), [1] * job.prompt, params, seed=0, arrival=0.0))
    while scheduler.num_waiting:
        plan = scheduler.schedule()
        assert plan is not None, "requests wait, so there is a step"
        if scheduler.num_waiting and outcome.ended >= WARM_UP * len(jobs):
            states = sum(one.computed + one.in_flight for one in scheduler.running)
            produced, sequences = len(plan.sample_slots), scheduler.num_running
            seconds = machine.step_seconds(plan.num_tokens, states)
            outcome.count(sequences=sequences, produced=produced, seconds=seconds, states=states)
            outcome.internal += manager.used_blocks * block_size - states
        commit = scheduler.commit(plan, StepResult([1] * len(plan.sample_slots)))
        outcome.ended += len(commit.finished)
    outcome.preemptions = scheduler.preemptions
    return outcome.checked()
