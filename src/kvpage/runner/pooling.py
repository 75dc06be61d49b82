"""Pooler: the hidden states of a prompt, made into one vector."""

from __future__ import annotations

import math
from array import array
from itertools import accumulate

import torch

from kvpage.params import PoolingParams
from kvpage.sched.plan import StepPlan


class Pool:
    """What one slot has seen of its prompt.

    ``mean``: sums are float64, in which the sum of float32 states is all but exact, so neither the size of the
    chunks nor a preemption changes the vector by more than its rounding to float32.
    """

    __slots__ = ("_count", "_last", "_params", "_total")

    def __init__(self, params: PoolingParams) -> None:
        self._params = params
        self._count = 0
        self._total: torch.Tensor | None = None
        self._last: torch.Tensor | None = None

    def add(self, hidden: torch.Tensor) -> None:
        """The states [count, H] of the next positions."""
        if self._params.pooling == "last":
            self._last = hidden[-1].clone()  # the step's tensor may be written again
            return
        total = hidden.sum(0, dtype=torch.float64)
        self._total = total if self._total is None else self._total.add_(total)
        self._count += len(hidden)

    def vector(self) -> array[float]:
        """float32 [H]. Raises ValueError where a state is not finite."""
        if self._total is not None:
            pooled = self._total / self._count
        else:
            assert self._last is not None, "a slot without a row ends no prompt"
            pooled = self._last.double()
        length = float(pooled.norm())
        if not math.isfinite(length):
            raise ValueError("the hidden states of this prompt are not finite, so it has no embedding")
        if self._params.normalize and length > 0.0:
            pooled = pooled / length
        found = array("f")
        found.frombytes(pooled.float().cpu().numpy().tobytes())
        return found


class Pooler:
    """The slots of one engine whose prompts become vectors. A slot that is taken again starts from nothing."""

    def __init__(self) -> None:
        self._pools: dict[int, Pool] = {}

    @property
    def busy(self) -> bool:
        """Whether any slot's prompt becomes a vector."""
        return bool(self._pools)

    def admit(self, slot: int, params: PoolingParams) -> None:
        """A prompt takes ``slot``; its first position to be computed is 0 where every position counts."""
        self._pools[slot] = Pool(params)

    def release(self, slot: int) -> None:
        """Nothing more comes from ``slot``, which need not have been admitted here."""
        self._pools.pop(slot, None)

    def pool(self, plan: StepPlan, hidden: torch.Tensor) -> tuple[list[array[float]], dict[int, str]]:
        """Take in the states [T, H] of a step after the final norm.

        Returns one vector for each of ``plan.pool_rows``, and why one of them is worth nothing, by its index.
        """
        if not self._pools:
            return [], {}
        for slot, count, end in zip(plan.slots, plan.counts, accumulate(plan.counts), strict=True):
            pool = self._pools.get(slot)
            if pool is not None:
                pool.add(hidden[end - count : end])
        vectors: list[array[float]] = []
        errors: dict[int, str] = {}
        for index, row in enumerate(plan.pool_rows):
            try:
                vectors.append(self._pools[plan.slots[row]].vector())
            except ValueError as error:
                vectors.append(array("f"))
                errors[index] = str(error)
        return vectors, errors
