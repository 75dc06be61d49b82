"""Executors: who runs a plan. A plan goes in, a future comes out."""

from __future__ import annotations

from typing import Protocol

from kvpage.runner.runner import ModelRunner
from kvpage.sched.plan import StepPlan, StepResult


class Pending(Protocol):
    """A result that may still be on its way."""

    def result(self) -> StepResult:
        """Wait for it; raises what ended the step."""
        ...


class Executor(Protocol):
    """Runs plans in the order they were submitted."""

    def submit(self, plan: StepPlan) -> Pending: ...

    def close(self) -> None: ...


class _Done:
    __slots__ = ("_result",)

    def __init__(self, result: StepResult) -> None:
        self._result = result

    def result(self) -> StepResult:
        return self._result


class LocalExecutor:
    """Runs a plan at once, in the caller's thread."""

    def __init__(self, runner: ModelRunner) -> None:
        self._runner: ModelRunner | None = runner

    def submit(self, plan: StepPlan) -> Pending:
        assert self._runner is not None, "the executor is closed"
        return _Done(self._runner.execute(plan))

    def close(self) -> None:
        self._runner = None
