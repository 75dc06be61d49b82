"""The suites of logits processors and listeners find the mistakes planted here, and name the property."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from planted import finds
from small_processors import NoRepeat, Sharpen
from test_listener_conformance import Counters

from kvpage.api.events import EventListener, StepStats
from kvpage.outputs import FinishReason, RequestMetrics
from kvpage.params import SamplingParams
from kvpage.testing.event_listeners import EventListenerConformance
from kvpage.testing.logits_processors import LogitsProcessorConformance

# ---- logits processors ----------------------------------------------------------------------------------


class ForgetsNothing(NoRepeat):
    """Continues the list of the sequence that had the slot before."""

    def admit(self, slot: int, params: SamplingParams, prompt_ids: Sequence[int]) -> None:
        before = self.known.get(slot, [])
        super().admit(slot, params, prompt_ids)
        self.known[slot] = before + self.known[slot]

    def release(self, slot: int) -> None:
        self.windows.pop(slot)


class NoRollback(NoRepeat):
    def rollback(self, slot: int, count: int) -> None: ...


class OneListForAll(NoRepeat):
    def admit(self, slot: int, params: SamplingParams, prompt_ids: Sequence[int]) -> None:
        super().admit(slot, params, prompt_ids)
        self.known[slot] = self.known.setdefault(-1, [])


class LastTokenOnly(NoRepeat):
    """At re-admission it is told of several tokens at once."""

    def advance(self, slot: int, token_ids: Sequence[int]) -> None:
        self.known[slot].append(token_ids[-1])


class RowIsSlot(NoRepeat):
    def apply(self, logits: torch.Tensor, slots: Sequence[int]) -> torch.Tensor:
        return super().apply(logits, list(range(len(slots))))


class CountsCalls(NoRepeat):
    def apply(self, logits: torch.Tensor, slots: Sequence[int]) -> torch.Tensor:
        for slot in slots:
            self.known[slot].append(len(self.known[slot]))
        return super().apply(logits, slots)


class HalfPrecision(Sharpen):
    def apply(self, logits: torch.Tensor, slots: Sequence[int]) -> torch.Tensor:
        return super().apply(logits, slots).half()


class NaNLater(NoRepeat):
    """0 / 0, once a token was generated twice."""

    def apply(self, logits: torch.Tensor, slots: Sequence[int]) -> torch.Tensor:
        out = super().apply(logits, slots)
        for row, slot in enumerate(slots):
            if len(self.known[slot]) - len(set(self.known[slot])) > 0:
                out[row, self.known[slot][-1]] = torch.nan
        return out


class Flips(Sharpen):
    def apply(self, logits: torch.Tensor, slots: Sequence[int]) -> torch.Tensor:
        return -logits


class ForbidsByProduct(Sharpen):
    def apply(self, logits: torch.Tensor, slots: Sequence[int]) -> torch.Tensor:
        return logits * 0.0


class WrongErrors(NoRepeat):
    def admit(self, slot: int, params: SamplingParams, prompt_ids: Sequence[int]) -> None:
        self.windows[slot], self.known[slot] = int((params.extra_args or {}).get("window", 3)), []


class PeeksAtTokens(Sharpen):
    def advance(self, slot: int, token_ids: Sequence[int]) -> None:
        self.factors[slot] += 1.0


class SharedWithEveryone(NoRepeat):
    """Its state belongs to the class: requests of one engine reach those of another."""

    everyone: list[int] = []

    def admit(self, slot: int, params: SamplingParams, prompt_ids: Sequence[int]) -> None:
        super().admit(slot, params, prompt_ids)
        self.known[slot] = SharedWithEveryone.everyone


@pytest.mark.parametrize(
    ("processor", "case", "message"),
    [
        (ForgetsNothing, "release_forgets", "release forgets: first wrong value at row 0, token"),
        (NoRollback, "rollback_undoes_advance", "rollback: .* 1 of 1 drafts taken back"),
        (OneListForAll, "slots_are_independent", "slots are independent"),
        (LastTokenOnly, "readmission_continues", "readmission: .* preempted after 5"),
        (RowIsSlot, "order_of_rows_does_not_matter", "order of rows"),
        (CountsCalls, "apply_is_repeatable", "apply is repeatable: .* after 0 tokens"),
        (HalfPrecision, "shape_dtype_and_device_are_kept", "shape, dtype and device: .* became .*float16"),
        (ForbidsByProduct, "shape_dtype_and_device_are_kept", "no NaN: ForbidsByProduct wrote NaN; first NaN"),
        (NaNLater, "slots_are_independent", "no NaN: NaNLater wrote NaN at row 0, token 3, after 2 tokens"),
        (NaNLater, "apply_is_repeatable", "no NaN: NaNLater wrote NaN at row 0, token 3, after 2 tokens"),
        (Flips, "keeps_argmax", "keeps_argmax: after 0 tokens the likeliest token was"),
        (PeeksAtTokens, "needs_tokens", "needs_tokens = False: first wrong value"),
        (WrongErrors, "bad_params_are_request_errors", "bad params: .* ValueError"),
        (SharedWithEveryone, "engine_alone_and_in_a_batch", "token .* is .* expected"),
    ],
    ids=lambda value: value.__name__ if isinstance(value, type) else "",
)  # fmt: skip
def test_a_processors_bug_is_named(processor: type, case: str, message: str) -> None:
    wrong = [{"extra_args": {"window": "wide"}}]
    finds(LogitsProcessorConformance, f"test_{case}", message, processor=processor, bad_params=wrong)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({}, r"bad params: \{\} changes nothing: an entry of bad_params is laid over params"),
        ({"extra_args": {"window": 4}}, "changes nothing"),
        ({"temperature": -1.0}, "is refused by SamplingParams itself"),
    ],
)
def test_an_entry_of_bad_params_that_asks_nothing_is_refused(entry: dict[str, object], message: str) -> None:
    finds(
        LogitsProcessorConformance,
        "test_bad_params_are_request_errors",
        message,
        processor=NoRepeat,
        params={"extra_args": {"window": 4}},
        bad_params=[entry],
    )


# ---- event listeners ------------------------------------------------------------------------------------


class Misspelt(EventListener):
    def on_finished(self, request_id: str, index: int, reason: FinishReason, output_tokens: int) -> None: ...


class ExpectsTokens(Counters):
    """A request that never ran has no decode time."""

    def completed(self, request_id: str, metrics: RequestMetrics) -> None:
        super().completed(request_id, metrics)
        assert metrics.decode is not None
        self.rate = 1 / metrics.decode


class OneChoiceEach(Counters):
    def finished(self, request_id: str, index: int, reason: FinishReason, output_tokens: int) -> None:
        del self.open[request_id]

    def completed(self, request_id: str, metrics: RequestMetrics) -> None: ...


class FewReasons(Counters):
    def finished(self, request_id: str, index: int, reason: FinishReason, output_tokens: int) -> None:
        {"stop": 0, "length": 1, "abort": 2}[reason]


class ResetsMetrics(Counters):
    def completed(self, request_id: str, metrics: RequestMetrics) -> None:
        metrics.preemptions = 0


class OnlyOne(Counters):
    """Keeps its open requests in the class: two engines with one id meet there."""

    everyone: dict[str, int] = {}

    def admitted(self, request_id: str, prompt_tokens: int) -> None:
        assert request_id not in self.everyone, f"{request_id} is known"
        self.everyone[request_id] = prompt_tokens

    def completed(self, request_id: str, metrics: RequestMetrics) -> None:
        self.everyone.clear()


class FaultsWithAStep(Counters):
    def step(self, stats: StepStats) -> None:
        if stats.seconds != 0.01:
            raise RuntimeError("a real step")


@pytest.mark.parametrize(
    ("listener", "case", "message"),
    [
        (Misspelt, "listens_to_something", "Misspelt overrides no event; there are admitted, completed"),
        (ExpectsTokens, "every_end", "raises nothing: completed"),
        (OneChoiceEach, "the_life_of_a_request", r"raises nothing: finished\('r', 1"),
        (FewReasons, "every_end", "raises nothing: finished.*'error'"),
        (ResetsMetrics, "what_it_is_given_is_only_read", "only reads: metrics were"),
        (OnlyOne, "engines_have_listeners_of_their_own", "AssertionError: same is known"),
        (FaultsWithAStep, "engine_hears_no_error", "RuntimeError: a real step"),
    ],
    ids=lambda value: value.__name__ if isinstance(value, type) else "",
)  # fmt: skip
def test_a_listeners_bug_is_named(listener: type, case: str, message: str) -> None:
    finds(EventListenerConformance, f"test_{case}", message, listener=listener)
