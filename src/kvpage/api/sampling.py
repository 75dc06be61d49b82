"""The contracts of sampling: logits processors change logits, a sampling kernel makes tokens of them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, TypeAlias

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    import torch

    from kvpage.params import SamplingParams

    Int64Array: TypeAlias = npt.NDArray[np.int64]
    Float32Array: TypeAlias = npt.NDArray[np.float32]
    Float64Array: TypeAlias = npt.NDArray[np.float64]

NO_TOKEN = -1
"""In place of a token where a row has none: NaN logits, or every token forbidden."""


class LogitsProcessor(ABC):
    """Keeps its own state a slot; a slot is a sequence's name from admission to preemption or end.

    One object serves one engine. Calls come from the thread that steps the engine, in this order for a slot:
    ``admit`` (again after a preemption, with all tokens known by then), then ``apply`` and ``advance`` once a
    sampled token, ``rollback`` where drafted tokens were refused, ``release`` once.
    """

    keeps_argmax: ClassVar[bool] = False
    """True if the likeliest token is never changed: greedy rows then skip this processor."""

    needs_tokens: ClassVar[bool] = True
    """True if ``apply`` depends on the tokens given to ``advance``: such a slot is not scheduled ahead."""

    @abstractmethod
    def admit(self, slot: int, params: SamplingParams, prompt_ids: Sequence[int]) -> None:
        """A sequence starts on ``slot``. ``params`` carries this processor's values in ``extra_args``.

        Raises:
            kvpage.errors.RequestError: the values are wrong; the request alone ends in error.
        """

    @abstractmethod
    def apply(self, logits: torch.Tensor, slots: Sequence[int]) -> torch.Tensor:
        """Change ``logits`` (float32 [N, V], row i belongs to ``slots[i]``), in place or anew; returns them.

        Called only with slots whose request named this processor. -inf forbids a token.
        """

    def advance(self, slot: int, token_ids: Sequence[int]) -> None:
        """Tokens were chosen for ``slot`` (at re-admission: all that were generated before)."""

    def rollback(self, slot: int, count: int) -> None:
        """The last ``count`` tokens given to ``advance`` did not stand."""

    def release(self, slot: int) -> None:
        """The sequence left ``slot``; forget it."""


@dataclass(frozen=True, slots=True)
class Shaping:
    """How each of N rows shapes its distribution; arrays of the host.

    Attributes:
        temperature: float32 [N]; 0 = the row's token is its likeliest one, and the rest does not count.
        top_k: int64 [N]; 0 = all.
        top_p: float64 [N]; 1 = all.
        min_p: float32 [N]; 0 = all.
    """

    temperature: Float32Array
    top_k: Int64Array
    top_p: Float64Array
    min_p: Float32Array

    def rows(self, chosen: slice | Int64Array) -> Shaping:
        """The same for some of the rows."""
        return Shaping(self.temperature[chosen], self.top_k[chosen], self.top_p[chosen], self.min_p[chosen])


@dataclass(frozen=True, slots=True)
class SamplingEnv:
    """What a sampling kernel is made for: torch device string, and V, the width of the logits."""

    device: str
    vocab_size: int


class SamplingKernel(ABC):
    """From logits to tokens. One object serves one engine, on the thread that steps it.

    A row's token is a function of that row alone, to the bit: of its logits, its shaping and its uniform number, never
    of the number of rows or of what stands in others. Between kernels, tokens may differ where a probability lies
    within float32 rounding of a threshold, or the uniform number of a token's edge.

    Raises:
        KvpageError: (of the constructor) it cannot run here; the next kernel is taken, and the message kept.
    """

    def __init__(self, env: SamplingEnv) -> None:
        self.env = env

    @abstractmethod
    def likeliest(self, logits: torch.Tensor) -> Int64Array:
        """The token with the largest logit of each row, the lowest id on ties.

        Args:
            logits: float32, bfloat16 or float16 [N, V] on the env's device; left as they are.

        Returns:
            int64 [N] on the host; ``NO_TOKEN`` where a row holds NaN, or nothing but -inf.
        """

    @abstractmethod
    def draw(self, logits: torch.Tensor, shaping: Shaping, uniforms: Float32Array) -> Int64Array:
        """One token a row by inverse CDF over the kept set, in order of token id.

        Probabilities are those of softmax(logits / temperature). In this order, top-k keeps the k largest, top-p the
        fewest largest of these that make up that part of their sum, min-p those of at least that part of the largest;
        every cut is a threshold, so what ties with the last one kept is kept as well. The token is the first whose
        cumulative probability (summed in float64) exceeds uniform * the kept sum.

        Args:
            logits: float32, bfloat16 or float16 [N, V] on the env's device; they may be changed.
            shaping: of the N rows.
            uniforms: float32 [N] in [0, 1), on the host.

        Returns:
            int64 [N] on the host; ``NO_TOKEN`` where a row holds NaN, +inf (unless its temperature is 0), or nothing
            but -inf.
        """
