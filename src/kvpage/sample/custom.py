"""Runs the logits processors that requests name, and keeps their failures to the requests that named them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from kvpage.api.sampling import LogitsProcessor
from kvpage.errors import KvpageError, RequestError
from kvpage.params import SamplingParams

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Admission:
    """A slot's processors in order of registration, and its tokens: a fork is admitted anew with them."""

    params: SamplingParams
    names: tuple[str, ...]
    prompt_ids: tuple[int, ...]
    output_ids: list[int]


class CustomProcessors:
    """The registered processors of one engine, each made when a request first names it.

    Args:
        factories: name -> what makes the processor; its order is the order in which processors run.
    """

    def __init__(self, factories: Mapping[str, Callable[[], LogitsProcessor]]) -> None:
        self._factories = dict(factories)
        self._processors: dict[str, LogitsProcessor] = {}
        self._admissions: dict[int, _Admission] = {}

    def admit(
        self, slot: int, params: SamplingParams, prompt_ids: Sequence[int], output_ids: Sequence[int]
    ) -> None:
        """A sequence starts on ``slot``; of ``output_ids``, generated before, its processors hear by ``advance``.

        Raises:
            RequestError: no processor has that name, it cannot be made, or it fails; its own RequestError as it is.
                The slot is then as if never admitted.
        """
        for name in params.logits_processors:
            self._make(name)
        names = tuple(name for name in self._factories if name in params.logits_processors)
        admission = _Admission(params, names, tuple(prompt_ids), list(output_ids))
        self._admissions[slot] = admission
        try:
            for name in names:
                processor = self._processors[name]
                with _blamed(name, "admit"):
                    processor.admit(slot, params, admission.prompt_ids)
                if admission.output_ids:
                    with _blamed(name, "advance"):
                        processor.advance(slot, tuple(admission.output_ids))
        except BaseException:
            self.release(slot)
            raise

    def fork(self, parent: int, child: int) -> None:
        """Admit ``child`` with the tokens of ``parent``. Raises like ``admit``."""
        admission = self._admissions.get(parent)
        if admission is not None:
            self.admit(child, admission.params, admission.prompt_ids, admission.output_ids)

    def release(self, slot: int) -> None:
        """The sequence left ``slot``. A processor that fails here is logged: its request is over already."""
        admission = self._admissions.pop(slot, None)
        for name in admission.names if admission is not None else ():
            try:
                self._processors[name].release(slot)
            except Exception:
                logger.exception("logits processor %r failed to release a sequence", name)

    def apply(
        self, logits: torch.Tensor, rows: Sequence[int], slots: Sequence[int], greedy: Sequence[bool]
    ) -> dict[int, str]:
        """Run each processor once, on the rows whose requests named it, in place.

        Args:
            logits: float32 [N, V].
            rows: K row indices; ``slots`` and ``greedy`` (the likeliest token will be taken) belong to them.

        Returns:
            Row index -> what went wrong, for every row of a processor that raised or returned nonsense.
        """
        errors: dict[int, str] = {}
        for name in self._factories:
            processor = self._processors.get(name)
            chosen = [
                (row, slot)
                for row, slot, is_greedy in zip(rows, slots, greedy, strict=True)
                if processor is not None
                and name in self._admissions[slot].names
                and row not in errors
                and not (is_greedy and processor.keeps_argmax)
            ]
            if processor is None or not chosen:
                continue
            index = torch.tensor([row for row, _ in chosen], device=logits.device)
            try:
                part = logits[index]
                changed = processor.apply(part, [slot for _, slot in chosen])
                if not isinstance(changed, torch.Tensor):
                    raise TypeError(f"apply() returned {changed!r:.80}, expected the logits")
                if changed.shape != part.shape:
                    raise ValueError(
                        f"apply() returned shape {tuple(changed.shape)}, expected {tuple(part.shape)}"
                    )
                for place in _newly_nan(logits[index], changed):
                    row = chosen[place][0]
                    errors[row] = f"logits processor {name!r} wrote NaN into the logits: repair its plugin"
                logits[index] = changed.to(logits)
            except Exception as error:
                message = _failure(name, error)
                errors.update((row, message) for row, _ in chosen)
        return errors

    def advance(self, slot: int, token: int) -> str | None:
        """The output of ``slot`` grew by ``token``; returns what went wrong, if anything did."""
        admission = self._admissions[slot]
        admission.output_ids.append(token)
        for name in admission.names:
            try:
                self._processors[name].advance(slot, (token,))
            except Exception as error:
                return _failure(name, error)
        return None

    def _make(self, name: str) -> None:
        if name in self._processors:
            return
        factory = self._factories.get(name)
        if factory is None:
            known = ", ".join(self._factories) or "none"
            raise RequestError(
                f"no logits processor is named {name!r}; registered: {known}", param="logits_processors"
            )
        try:
            made = factory()
        except Exception as error:
            raise RequestError(
                f"logits processor {name!r} could not be made ({type(error).__name__}: {error}): "
                "leave it out or repair its plugin",
                param="logits_processors",
            ) from error
        if not isinstance(made, LogitsProcessor):
            raise RequestError(
                f"logits processor {name!r} could not be made: {made!r:.80} is no "
                "kvpage.api.sampling.LogitsProcessor; leave it out or repair its plugin",
                param="logits_processors",
            )
        self._processors[name] = made


@contextmanager
def _blamed(name: str, method: str) -> Iterator[None]:
    """Faults of a processor's own code name the processor and the method."""
    try:
        yield
    except KvpageError:
        raise
    except Exception as error:
        logger.warning("logits processor %r failed", name, exc_info=error)
        raise RequestError(
            f"logits processor {name!r} raised {type(error).__name__} in {method}: {error}"
        ) from error


def _newly_nan(before: torch.Tensor, after: torch.Tensor) -> list[int]:
    """Rows [N, V] of ``after`` with a NaN that ``before`` has none in."""
    damaged = after.isnan().any(1)
    if not bool(damaged.any()):
        return []
    found: list[int] = (damaged & ~before.isnan().any(1)).nonzero().flatten().tolist()
    return found


def _failure(name: str, error: Exception) -> str:
    logger.warning("logits processor %r failed", name, exc_info=error)
    return f"logits processor {name!r} failed ({type(error).__name__}: {error})"
