"""Writes blocks.npz: blocks of every type that kvpage reads, and what gguf-py makes of them. Needs gguf==0.19.0.

``random``: any bytes, with scales that are finite; ``encoded``: by gguf-py's encoders, the second row with zeros.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, quants

SCALES = {
    "q4_0": (0,), "q4_1": (0, 2), "q5_0": (0,), "q5_1": (0, 2), "q8_0": (0,), "q2_k": (80, 82), "q3_k": (108,),
    "q4_k": (0, 2), "q5_k": (0, 2), "q6_k": (208,), "iq4_nl": (0,), "iq4_xs": (0,),
}  # fmt: skip
"""Where a block has its float16 numbers."""
ENCODED = ("q4_0", "q4_1", "q5_0", "q5_1", "q8_0")


def main() -> None:
    random = np.random.default_rng(20)
    found = {}
    for name, places in SCALES.items():
        kind = GGMLQuantizationType[name.upper()]
        block, size = GGML_QUANT_SIZES[kind]
        stored = random.integers(0, 256, (3 * 512 // block, size), dtype=np.uint8)
        for at in places:
            scales = (random.standard_normal(len(stored)) * 0.05).astype(np.float16)
            stored[:, at : at + 2] = scales.view(np.uint8).reshape(-1, 2)
        found[f"random.{name}"] = stored.reshape(3, -1)
        found[f"random.{name}.values"] = quants.dequantize(stored.reshape(3, -1), kind)
    for name in ENCODED:
        kind = GGMLQuantizationType[name.upper()]
        weight = random.standard_normal((3, 64)).astype(np.float32) * 0.3
        weight[1, :32] = 0
        stored = quants.quantize(weight, kind)
        found[f"encoded.{name}"] = stored
        found[f"encoded.{name}.values"] = quants.dequantize(stored, kind)
    np.savez_compressed(Path(__file__).with_name("blocks.npz"), **found)


if __name__ == "__main__":
    main()
