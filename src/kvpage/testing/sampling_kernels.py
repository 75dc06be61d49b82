"""The conformance suite of sampling kernels.

Subclass it in your tests, name your class, run pytest::

    from kvpage.testing.sampling_kernels import SamplingKernelConformance
    from mychip import MySampling

    class TestMySampling(SamplingKernelConformance):
        kernel = MySampling
        device = "cuda"

The truth is computed in float64. Logits lie on a grid, so that two weights are equal or differ by more than rounding;
rows whose cut would hang on rounding all the same are not used.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import torch

from kvpage.api.sampling import NO_TOKEN, SamplingEnv, SamplingKernel, Shaping
from kvpage.testing.comparing import require, require_equal
from kvpage.testing.suite import ConformanceSuite

NEUTRAL: Mapping[str, float] = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}
ASKED: Mapping[str, Mapping[str, float]] = {
    "nothing": {},
    "cold": {"temperature": 1e-3},
    "hot": {"temperature": 30.0},
    "top-1": {"top_k": 1},
    "top-20": {"top_k": 20},
    "top-all": {"top_k": 10**6},
    "top-p tiny": {"top_p": 1e-6},
    "top-p": {"top_p": 0.9},
    "top-p nearly 1": {"top_p": 0.9995},
    "min-p": {"min_p": 0.05},
    "min-p 1": {"min_p": 1.0},
    "top-k and top-p": {"top_k": 30, "top_p": 0.6},
    "everything": {"temperature": 0.8, "top_k": 200, "top_p": 0.95, "min_p": 0.01},
}
ROUNDING = 2e-6
"""Of the whole mass: how far float32 probabilities may move a token's edge."""
LAST = 1.0 - 2.0**-24
"""The largest uniform number that there is."""
ROWS = 12
LEVELS = 128


class SamplingKernelConformance(ConformanceSuite):
    """Subclass it, set ``kernel``.

    Attributes:
        kernel: the class under test.
        device: torch device string. dtypes: of logits, narrowed where a device lacks one.
        vocab_sizes: widths of the logits.
    """

    kernel: ClassVar[type[SamplingKernel]]
    device: ClassVar[str] = "cpu"
    dtypes: ClassVar[Sequence[str]] = ("float32", "bfloat16", "float16")
    vocab_sizes: ClassVar[Sequence[int]] = (1, 7, 260, 5003, 32000)

    def axes(self) -> dict[str, Sequence[Any]]:
        return {"dtype": list(self.dtypes), "vocab_size": list(self.vocab_sizes), "asked": list(ASKED)}

    def test_likeliest_is_the_lowest_of_the_largest(self, dtype: str, vocab_size: int) -> None:
        """Logits with few levels, so that many are equal; 0 and -0 are. Logits are only read."""
        for levels in (1, 3, LEVELS):
            logits = self._logits(vocab_size, levels, dtype)
            logits[0] = torch.where(torch.arange(vocab_size, device=self.device) % 2 == 0, -0.0, 0.0)
            before = logits.clone()
            expected = logits.double().cpu().numpy().argmax(-1)
            self._require_tokens("likeliest", self._made(vocab_size).likeliest(logits), expected)
            require_equal("likeliest only reads", logits, before, ("row", "token"))

    def test_drawn_tokens_are_those_of_the_cdf(self, dtype: str, vocab_size: int, asked: str) -> None:
        """Each token is in the kept set, and its part of the CDF, in order of token id, holds the uniform number."""
        for levels in (5, LEVELS):
            logits = self._logits(vocab_size, levels, dtype)
            uniforms = _uniforms(ROWS, vocab_size + levels)
            tokens = self._made(vocab_size).draw(logits.clone(), self._shaping(ASKED[asked]), uniforms)
            self._require_drawn(tokens, logits, ASKED[asked], uniforms)

    def test_forbidden_tokens_are_never_drawn(self, vocab_size: int) -> None:
        """-inf has no weight, with whatever uniform number; one token that is left is drawn always."""
        logits = self._logits(vocab_size, 50, "float32")
        logits[:, torch.rand(vocab_size, generator=_generator(5), device="cpu") < 0.8] = -math.inf
        logits[1] = -math.inf
        logits[:, vocab_size // 2] = 1.0
        for asked in ("nothing", "top-p", "top-20"):
            for uniforms in (
                _uniforms(ROWS, 1),
                np.zeros(ROWS, np.float32),
                np.full(ROWS, LAST, np.float32),
            ):
                tokens = self._made(vocab_size).draw(logits.clone(), self._shaping(ASKED[asked]), uniforms)
                self._require_drawn(tokens, logits, ASKED[asked], uniforms)
                require(tokens[1] == vocab_size // 2, "the only token left", f"got {tokens[1]}")

    def test_rows_without_a_token_say_so(self, dtype: str, vocab_size: int) -> None:
        """NaN anywhere, or nothing but -inf: NO_TOKEN. +inf is the likeliest token, and nothing can be drawn beside
        it. Other rows notice nothing."""
        kernel, logits = self._made(vocab_size), self._logits(vocab_size, LEVELS, dtype)
        uniforms, shaping = _uniforms(ROWS, 2), self._shaping(ASKED["everything"])
        greedy, drawn = kernel.likeliest(logits), kernel.draw(logits.clone(), shaping, uniforms)
        logits[2, vocab_size - 1] = math.nan
        logits[5] = -math.inf
        logits[8, vocab_size // 3] = math.inf
        greedy[[2, 5, 8]] = [NO_TOKEN, NO_TOKEN, vocab_size // 3]
        drawn[[2, 5, 8]] = NO_TOKEN
        self._require_tokens("rows without a token, likeliest", kernel.likeliest(logits), greedy)
        found = kernel.draw(logits.clone(), shaping, uniforms)
        self._require_tokens("rows without a token, drawn", found, drawn)

    def test_temperature_0_takes_the_likeliest(self, dtype: str, vocab_size: int) -> None:
        """Beside rows that draw, and whatever else the row asks for; all rows may be such."""
        kernel, logits = self._made(vocab_size), self._logits(vocab_size, LEVELS, dtype)
        shaping, uniforms = self._shaping(ASKED["everything"]), _uniforms(ROWS, 3)
        expected, greedy = kernel.draw(logits.clone(), shaping, uniforms), kernel.likeliest(logits)
        for rows in ([0, 3, ROWS - 1], list(range(ROWS))):
            shaping.temperature[rows] = 0.0
            expected[rows] = greedy[rows]
            found = kernel.draw(logits.clone(), shaping, uniforms)
            self._require_tokens("temperature 0", found, expected)

    def test_a_row_has_the_same_token_in_any_batch(self, vocab_size: int) -> None:
        """Alone, in another order, beside rows that ask for other things, at another place in memory. Uniform numbers
        lie at edges of the CDF, where the last bit of any sum shows."""
        kernel, logits = self._made(vocab_size), self._logits(vocab_size, LEVELS, "float32")
        rows = [{**NEUTRAL, **list(ASKED.values())[i % len(ASKED)]} for i in range(ROWS)]
        shaping = Shaping(
            np.array([row["temperature"] for row in rows], np.float32),
            np.array([row["top_k"] for row in rows], np.int64),
            np.array([row["top_p"] for row in rows], np.float64),
            np.array([row["min_p"] for row in rows], np.float32),
        )
        edges = np.array([self._edge(logits[i], rows[i], i * vocab_size // ROWS) for i in range(ROWS)])
        for offset in (-4, 0, 4):
            uniforms = np.clip(edges + offset * 2.0**-24, 0.0, LAST).astype(np.float32)
            self._require_same_alone(kernel, logits, shaping, uniforms)

    def test_tokens_are_new_memory(self) -> None:
        """What a call returned stays as it is when the next call returns."""
        kernel, logits = self._made(64), self._logits(64, LEVELS, "float32")
        first = kernel.likeliest(logits)
        kept = first.copy()
        kernel.likeliest(-logits)
        kernel.draw(-logits, self._shaping({}), _uniforms(ROWS, 1))
        self._require_tokens("tokens are new memory", first, kept)

    def test_no_rows(self) -> None:
        """Logits [0, V] give no tokens."""
        none = np.empty(0, np.int64)
        logits = torch.empty(0, 9, device=self.device)
        shaping = self._shaping({}).rows(none)
        self._require_tokens("no rows", self._made(9).likeliest(logits), none)
        found = self._made(9).draw(logits, shaping, np.empty(0, np.float32))
        self._require_tokens("no rows", found, none)

    # ---- what the tests share -------------------------------------------------------------------------------

    def _made(self, vocab_size: int) -> SamplingKernel:
        return self.kernel(SamplingEnv(self.device, vocab_size))

    def _logits(self, vocab_size: int, levels: int, dtype: str) -> torch.Tensor:
        """[ROWS, V]: multiples of 1/32 in [-4, 4), which every dtype holds as they are; levels <= LEVELS."""
        drawn = torch.randint(-levels, levels, (ROWS, vocab_size), generator=_generator(levels), device="cpu")
        return (drawn / 32).to(device=self.device, dtype=getattr(torch, dtype))

    def _shaping(self, asked: Mapping[str, float]) -> Shaping:
        row = {**NEUTRAL, **asked}
        return Shaping(
            np.full(ROWS, row["temperature"], np.float32),
            np.full(ROWS, int(row["top_k"]), np.int64),
            np.full(ROWS, row["top_p"], np.float64),
            np.full(ROWS, row["min_p"], np.float32),
        )

    def _require_same_alone(
        self,
        kernel: SamplingKernel,
        logits: torch.Tensor,
        shaping: Shaping,
        uniforms: npt.NDArray[np.float32],
    ) -> None:
        __tracebackhide__ = True
        vocab_size = logits.shape[-1]
        expected = kernel.draw(logits.clone(), shaping, uniforms)
        for i in range(ROWS):
            wide = torch.full((3, vocab_size + 5), math.nan, device=self.device)
            wide[1, 3:-2] = logits[i]
            index = np.array([i])
            alone = kernel.draw(wide[1:2, 3:-2], shaping.rows(index), uniforms[index])
            self._require_tokens("a row alone", alone, expected[index])
        order = np.random.default_rng(0).permutation(ROWS)
        shuffled = logits[torch.from_numpy(order).to(logits.device)]
        found = kernel.draw(shuffled, shaping.rows(order), uniforms[order])
        self._require_tokens("rows in another order", found, expected[order])

    def _edge(self, logits: torch.Tensor, asked: Mapping[str, float], token: int) -> float:
        """Where the part of ``token`` ends in the CDF."""
        cumulative = kept_weights(logits, asked)[0].cumsum(-1)
        return float(cumulative[token] / cumulative[-1])

    def _require_tokens(
        self, property: str, got: npt.NDArray[np.int64], expected: npt.NDArray[np.int64]
    ) -> None:
        __tracebackhide__ = True
        good = isinstance(got, np.ndarray) and got.dtype == np.int64
        require(good, property, f"expected an int64 array, got {getattr(got, 'dtype', type(got).__name__)}")
        require_equal(property, torch.from_numpy(got), torch.from_numpy(expected), ("row",))

    def _require_drawn(
        self,
        tokens: npt.NDArray[np.int64],
        logits: torch.Tensor,
        asked: Mapping[str, float],
        uniforms: npt.NDArray[np.float32],
    ) -> None:
        __tracebackhide__ = True
        for row, (token, uniform) in enumerate(zip(tokens.tolist(), uniforms.tolist(), strict=True)):
            weights, certain = kept_weights(logits[row], asked)
            if not certain:
                continue
            where = f"row {row}, uniform {uniform:.9g}: token {token}"
            inside = 0 <= token < len(weights) and bool(weights[token] > 0)
            require(inside, "kept set", f"{where} is none of the {int((weights > 0).sum())} kept tokens")
            total, end = float(weights.sum()), float(weights[: token + 1].sum())
            begin = (end - float(weights[token])) / total
            held = begin - ROUNDING <= uniform <= end / total + ROUNDING
            require(held, "inverse CDF", f"{where} is drawn from {begin:.9g} to {end / total:.9g}")


def kept_weights(logits: torch.Tensor, asked: Mapping[str, float]) -> tuple[torch.Tensor, bool]:
    """(what each token of a row [V] weighs, float64 on the host, 0 where it is not kept; whether that is certain,
    because no cut comes within rounding of a weight that it would treat otherwise)."""
    row = {**NEUTRAL, **asked}
    temperature = float(np.float32(row["temperature"]))
    weights = torch.softmax(logits.double().cpu() / temperature, -1)
    ordered = weights.sort(descending=True).values
    least, certain = 0.0, True
    top_k = int(row["top_k"])
    if 0 < top_k < len(ordered):
        least = float(ordered[top_k - 1])
    if row["top_p"] < 1.0:
        running = ordered[ordered >= least].cumsum(-1)
        target = row["top_p"] * running[-1]
        crossing = min(int(torch.searchsorted(running, target)), len(running) - 1)
        # Sums that end a group of equal weights decide what is kept.
        ends = torch.cat((ordered[: len(running)].diff() != 0, torch.tensor([True], device="cpu")))
        certain = not bool(((running - target).abs()[ends] < ROUNDING).any())
        least = max(least, float(ordered[crossing]))
    share = float(np.float32(row["min_p"])) * float(ordered[0])
    if share > 0.0:
        near = (weights - share).abs() < ROUNDING * share
        certain = certain and not bool((near & (weights != ordered[0])).any())
        least = max(least, share * (1.0 - ROUNDING))
    return torch.where(weights >= least, weights, 0.0), certain


def _uniforms(count: int, seed: int) -> npt.NDArray[np.float32]:
    """Multiples of 2**-24, as the engine's noise has them."""
    drawn = np.random.default_rng(seed).integers(0, 2**24, count)
    return (drawn * 2.0**-24).astype(np.float32)


def _generator(seed: int) -> torch.Generator:
    return torch.Generator(device="cpu").manual_seed(seed)
