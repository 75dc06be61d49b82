"""What a command line asks of a method, with the values it has where no flag was typed."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

METHODS = ("gptq", "awq", "int8", "fp8")
GPTQ_BITS = (2, 3, 4, 8)
WHOLE_ROW = -1
"""A group size: one group an output."""

USUAL_SAMPLES = {"gptq": 128, "awq": 64}
"""Calibration sequences where no flag says how many; the search of AWQ runs them twenty times as often."""


@dataclass(frozen=True, kw_only=True, slots=True)
class GptqSettings:
    """Of GPTQ (arXiv:2210.17323).

    Attributes:
        group_size: inputs that share a scale, or ``WHOLE_ROW``.
        desc_act: inputs are quantized by falling activation ("act-order"); slower in some engines.
        sym: no zero points but the middle one.
        damp_percent: share of the Hessian's mean diagonal that is added to it.
    """

    bits: int = 4
    group_size: int = 128
    desc_act: bool = False
    sym: bool = True
    damp_percent: float = 0.01


@dataclass(frozen=True, kw_only=True, slots=True)
class AwqSettings:
    """Of AWQ (arXiv:2306.00978), which is 4 bit with zero points. ``group_size``: inputs that share a scale."""

    group_size: int = 128


@dataclass(frozen=True, kw_only=True, slots=True)
class CalibrationSettings:
    """The text that activations are taken from: ``samples`` sequences of ``length`` tokens.

    Attributes:
        file: text, or .jsonl with "text"; ``None``: it is generated.
        length: ``None``: 512, or the model's context where that is shorter.
        seed: of what is generated, and of the order in which a file's documents are taken.
    """

    file: Path | None = None
    samples: int = USUAL_SAMPLES["gptq"]
    length: int | None = None
    seed: int = 0
