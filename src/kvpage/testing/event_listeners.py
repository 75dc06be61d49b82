"""The conformance suite of event listeners.

Subclass it in your tests, name your class, run pytest::

    from kvpage.testing.event_listeners import EventListenerConformance
    from mychip import Metrics

    class TestMetrics(EventListenerConformance):
        listener = Metrics

It is told of made-up requests in every legal order, then hears engines of the bundled model through preemption,
aborts, errors, timeouts and n > 1. The class must be importable by its module and name, as a plugin's is.
"""

from __future__ import annotations

import gc
import logging
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar, get_args

import torch

from kvpage import Engine, PluginRegistry, RequestError, SamplingParams, hookimpl
from kvpage.api.events import EventListener, StepStats
from kvpage.api.records import EventListenerRecord, LogitsProcessorRecord
from kvpage.api.sampling import LogitsProcessor
from kvpage.outputs import FinishReason, RequestMetrics
from kvpage.testing.comparing import require
from kvpage.testing.suite import ConformanceError, ConformanceSuite, not_claimed

PROMPTS = ("Blocks are handed out", "The cache", "A sequence of tokens, and then some more of them")


class EventListenerConformance(ConformanceSuite):
    """Subclass it, set ``listener``.

    Attributes:
        listener: the class under test; it is made without arguments, once an engine.
        engine_options: of the engines that it hears ("model", if not the bundled one).
    """

    listener: ClassVar[type[EventListener]]
    engine_options: ClassVar[Mapping[str, Any]] = {}

    def test_listens_to_something(self) -> None:
        """It overrides an event, and nothing that looks like one and is none (a misspelt name is never called)."""
        events = {name for name in vars(EventListener) if not name.startswith("_")}
        public = {
            name for cls in self.listener.__mro__[:-1] for name in vars(cls) if not name.startswith("_")
        }
        heard = sorted(
            name
            for name in events & public
            if getattr(self.listener, name) is not getattr(EventListener, name)
        )
        require(
            bool(heard),
            "listens to something",
            f"{self.listener.__name__} overrides no event; there are {', '.join(sorted(events))}",
        )

    def test_the_life_of_a_request(self) -> None:
        """A request of two choices, one of which is preempted; all events, in the documented order."""
        made = self.listener()
        self._tell(made, "admitted", "r", 5)
        self._tell(made, "scheduled", "r", 0, 0)
        self._tell(made, "scheduled", "r", 1, 5)
        self._tell(made, "token", "r", 0, (17,))
        self._tell(made, "token", "r", 1, (3, 4, 5))
        self._tell(made, "step", _stats(0))
        self._tell(made, "preempted", "r", 1)
        self._tell(made, "token", "r", 0, (2,))
        self._tell(made, "finished", "r", 0, "stop", 2)
        self._tell(made, "scheduled", "r", 1, 4)
        self._tell(made, "finished", "r", 1, "length", 3)
        self._tell(made, "completed", "r", _metrics(preemptions=1))
        self._tell(made, "step", _stats(1))

    def test_every_end(self) -> None:
        """Each finish reason, of a choice that never ran too, with metrics that were never measured."""
        made = self.listener()
        for reason in get_args(FinishReason):
            for ran in (True, False):
                request_id = f"{reason}-{ran}"
                self._tell(made, "admitted", request_id, 1)
                if ran:
                    self._tell(made, "scheduled", request_id, 0, 0)
                    self._tell(made, "token", request_id, 0, (1,))
                self._tell(made, "finished", request_id, 0, reason, int(ran))
                self._tell(made, "completed", request_id, RequestMetrics(arrival_time=1.0))

    def test_ids_come_again(self) -> None:
        """A request id may be used again once its request is completed, and may hold any characters."""
        made = self.listener()
        for request_id in ("again", "again", "", "ünï\n{}%s", "x" * 3000):
            self._tell(made, "admitted", request_id, 2)
            self._tell(made, "scheduled", request_id, 0, 0)
            self._tell(made, "finished", request_id, 0, "abort", 0)
            self._tell(made, "completed", request_id, _metrics())

    def test_many_requests_at_once(self) -> None:
        """300 requests overlap; each ends."""
        made = self.listener()
        for number in range(300):
            self._tell(made, "admitted", f"r{number}", number + 1)
        for number in range(300):
            self._tell(made, "scheduled", f"r{number}", 0, 0)
            self._tell(made, "step", _stats(number))
        for number in reversed(range(300)):
            self._tell(made, "token", f"r{number}", 0, (number,))
            self._tell(made, "finished", f"r{number}", 0, "length", 1)
            self._tell(made, "completed", f"r{number}", _metrics())

    def test_what_it_is_given_is_only_read(self) -> None:
        """Metrics belong to the request's output, which its owner reads."""
        made, metrics = self.listener(), _metrics(preemptions=2)
        before = repr(metrics)
        self._tell(made, "admitted", "r", 1)
        self._tell(made, "finished", "r", 0, "stop", 0)
        self._tell(made, "completed", "r", metrics)
        require(
            repr(metrics) == before,
            "only reads",
            f"metrics were {before}, and are {metrics!r} after completed()",
        )

    def test_engine_hears_no_error(self) -> None:
        """It hears real requests that are preempted, forked, aborted, timed out and refused; it raises nothing, and
        the tokens are those of an engine without it."""
        plain = self._run(PluginRegistry(plugins=[_FaultyPlugin()], entry_points=False))
        with self._no_errors():
            heard = self._run(self._registry())
        require(
            heard == plain,
            "engine's answers",
            f"with the listener an engine answers {heard}, without it {plain}",
        )

    def test_engines_have_listeners_of_their_own(self) -> None:
        """Two engines side by side, request ids in common, one closed before the other."""
        with self._no_errors():
            engines = [Engine(**self._options(), plugins=self._registry()) for _ in range(2)]
            try:
                handles = [engine.submit(PROMPTS[1], _greedy(4), request_id="same") for engine in engines]
                first, second = (list(handle.result().outputs[0].token_ids) for handle in handles)
                require(
                    first == second, "engines of their own", f"one engine answers {first}, the other {second}"
                )
                engines[0].close()
                engines[1].generate([PROMPTS[0]], _greedy(3))
            finally:
                for engine in engines:
                    engine.close()

    def test_closing_gives_everything_back(self) -> None:
        """close() in the middle of requests works, and nothing keeps the engine alive afterwards."""
        with self._no_errors():
            engine = Engine(**self._options(), plugins=self._registry())
            engine.submit(PROMPTS[0], _greedy(30))
            engine.step()
            engine.close()
            alive = weakref.ref(engine)
            del engine
            gc.collect()
        require(alive() is None, "closing", "the closed engine is still referenced, and its memory with it")

    # ---- made-up events ---------------------------------------------------------------------------------

    def _tell(self, made: EventListener, event: str, *values: object) -> None:
        __tracebackhide__ = True
        shown = ", ".join(f"{value!r:.60}" for value in values)
        try:
            answer = getattr(made, event)(*values)
        except Exception as error:  # whatever a listener raises is the finding
            raise ConformanceError(
                "raises nothing", f"{event}({shown}): {type(error).__name__}: {error}"
            ) from error
        require(answer is None, "returns nothing", f"{event}({shown}) returned {answer!r:.80}")

    # ---- real engines -----------------------------------------------------------------------------------

    def _options(self, **changes: Any) -> dict[str, Any]:
        small = {"model": "demo", "dtype": "float32", "num_kv_blocks": 64, "max_num_seqs": 4, "seed": 0}
        return {**small, **self.engine_options, **changes}

    def _registry(self) -> PluginRegistry:
        if "." in self.listener.__qualname__:
            not_claimed(f"{self.listener.__qualname__} cannot be imported by name, so no record can name it")
        plugins = [_FaultyPlugin(), _Plugin(self.listener)]
        return PluginRegistry(plugins=plugins, entry_points=False, strict=True)

    def _run(self, registry: PluginRegistry) -> list[Any]:
        """The answers to requests of all kinds on a cache too small for them."""
        answers: list[Any] = []
        small = self._options(num_kv_blocks=14, block_size=4, max_model_len=48, enable_prefix_caching=True)
        with Engine(**small, plugins=registry) as engine:
            handles = [
                engine.submit(prompt, _greedy(20, n=n, temperature=1.0, seed=n))
                for prompt, n in zip(PROMPTS, (1, 2, 1), strict=True)
            ]
            aborted = engine.submit(PROMPTS[0], _greedy(20))
            expired = engine.submit(PROMPTS[2], _greedy(20, timeout=1e-9))
            faulty = engine.submit(
                PROMPTS[1], _greedy(20, n=2, temperature=1.0, logits_processors=["faulty"])
            )
            for _ in range(3):
                engine.step()
            aborted.cancel()
            for handle in handles:
                answers.append([list(choice.token_ids) for choice in handle.result().outputs])
            for handle in (aborted, expired, faulty):
                try:
                    answers.append([choice.finish_reason for choice in handle.result().outputs])
                except RequestError as error:
                    answers.append(str(error))
            require(
                engine.stats().preemptions > 0,
                "preemption",
                "no request was preempted: the prompts are too short",
            )
        return answers

    @contextmanager
    def _no_errors(self) -> Iterator[None]:
        """The engine logs what a listener raises and drops it; here that is the finding."""
        __tracebackhide__ = True
        caught = _Caught()
        logger = logging.getLogger("kvpage")
        logger.addHandler(caught)
        try:
            yield
        finally:
            logger.removeHandler(caught)
        for record in caught.records:
            error = record.exc_info[1] if record.exc_info else None
            raise ConformanceError(
                "raises nothing", f"{record.getMessage()}: {type(error).__name__}: {error}"
            ) from error


class _Caught(logging.Handler):
    """Keeps what is logged of failed listeners."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.records: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        if "event listener" in record.getMessage():
            self.records.append(record)


class _Plugin:
    """Registers the class under test."""

    def __init__(self, listener: type[EventListener]) -> None:
        self._factory = f"{listener.__module__}:{listener.__name__}"

    @hookimpl
    def kvpage_event_listeners(self) -> Sequence[EventListenerRecord]:
        """The class, by import string."""
        return [EventListenerRecord(name="subject", factory=self._factory)]


class FaultyProcessor(LogitsProcessor):
    """Ends the requests that name it in error, at their third token."""

    def __init__(self) -> None:
        self._left: dict[int, int] = {}

    def admit(self, slot: int, params: SamplingParams, prompt_ids: Sequence[int]) -> None:
        self._left[slot] = 2

    def apply(self, logits: torch.Tensor, slots: Sequence[int]) -> torch.Tensor:
        return logits

    def advance(self, slot: int, token_ids: Sequence[int]) -> None:
        self._left[slot] -= len(token_ids)
        if self._left[slot] < 0:
            raise RequestError("this request is made to fail")


class _FaultyPlugin:
    """Registers the processor that ends requests in error."""

    @hookimpl
    def kvpage_logits_processors(self) -> Sequence[LogitsProcessorRecord]:
        """The class, by import string."""
        return [LogitsProcessorRecord(name="faulty", factory=f"{__name__}:FaultyProcessor")]


def _greedy(count: int, **values: Any) -> SamplingParams:
    return SamplingParams(**{"temperature": 0.0, "max_tokens": count, "ignore_eos": True, **values})


def _stats(step: int) -> StepStats:
    return StepStats(
        step=step, num_rows=2, num_tokens=7, running=2, waiting=1, free_blocks=5, used_blocks=3, seconds=0.01
    )


def _metrics(preemptions: int = 0) -> RequestMetrics:
    return RequestMetrics(
        arrival_time=1.0, queued=0.5, prefill=0.1, decode=0.2, cached_tokens=0, preemptions=preemptions
    )
