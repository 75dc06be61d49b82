"""What quantizing while loading costs in quality: perplexity and answers of the bundled model, scheme by scheme.

python benchmarks/quantization_quality.py                            # the table of docs/quantization.md
python benchmarks/quantization_quality.py --decoder-backend torch    # with activations as they are
python benchmarks/quantization_quality.py --checkpoints DIR ...      # what `kvpage quantize` made of it instead
python benchmarks/quantization_quality.py --checkpoints DIR --nearest 4:32:sym --nearest 4:32:asym

--nearest BITS:GROUP:sym|asym measures the model with its layers' weights rounded to nearest in the format of GPTQ (sym,
asym) or AWQ (asym): what a calibrated method must beat. The rounded weights are plain ones of float32.

The text is drawn from the model's own generator with a seed that no round of its training used. Perplexity, by
``prompt_logprobs``, is that of the tokens which its training counted: what the assistant says, not what it is asked at
random. The questions are those of ``python -m kvpage.demo.evaluate``, held back from training.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer

from kvpage import Engine, SamplingParams
from kvpage.demo import path
from kvpage.demo.corpus import documents, held_back
from kvpage.demo.evaluate import engine_generate, score, wrong
from kvpage.testing.checkpoints import read_folder, write_folder

SCHEMES = ("int8", "int8-weight-only", "int4", "int4-weight-only")
SEED = 1000
QUESTIONS = 400


@dataclass(frozen=True, slots=True)
class Document:
    """Tokens of a document, and which of them training counted."""

    ids: list[int]
    counted: list[bool]


@dataclass(frozen=True, slots=True)
class Quality:
    """Of one way to load the model. ``loss``: nats a token, the logarithm of the perplexity; the others are shares of
    the questions that were answered to the letter."""

    scheme: str
    head: str
    loss: float
    arithmetic: float
    factual: float


def read_documents(folder: Path, count: int, context: int) -> list[Document]:
    """``count`` documents, each cut to ``context`` tokens."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    found = []
    for segments in islice(documents(SEED), count):
        ids: list[int] = []
        counted: list[bool] = []
        for segment in segments:
            piece = tokenizer.encode(segment.text, add_special_tokens=False).ids
            ids += piece
            counted += [segment.weight > 0] * len(piece)
        found.append(Document(ids[:context], counted[:context]))
    return found


def mean_loss(folder: Path, texts: Sequence[Document], options: dict[str, Any]) -> float:
    """Nats a token that training counted."""
    params = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=0)
    prompts = [{"prompt_token_ids": text.ids} for text in texts]
    losses: list[float] = []
    with Engine(str(folder), **options) as engine:
        for text, output in zip(texts, engine.generate(prompts, params), strict=True):
            assert output.prompt_logprobs is not None
            for token, counted, entry in zip(text.ids, text.counted, output.prompt_logprobs, strict=True):
                if counted and entry is not None:
                    losses.append(-entry[token].logprob)
    return sum(losses) / len(losses)


def measure(
    folder: Path, texts: Sequence[Document], scheme: str, head: str, options: dict[str, Any]
) -> Quality:
    """Loss and answers of the model loaded with ``options``."""
    loss = mean_loss(folder, texts, options)
    examples = held_back(QUESTIONS)
    rest = {name: value for name, value in options.items() if name != "dtype"}
    scores = score(examples, wrong(examples, engine_generate(folder, options["dtype"], **rest)))
    shares = {kind: right / asked for kind, (right, asked) in scores.items()}
    return Quality(scheme, head, loss, shares["arithmetic"], shares["factual"])


def runs(base: dict[str, Any]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """(scheme, whether the head is quantized, engine options), the plain model first."""
    yield base["dtype"], "plain", base
    for scheme in SCHEMES:
        yield scheme, "quantized", {**base, "quantization": scheme}
        yield (
            scheme,
            "plain",
            {**base, "quantization": scheme, "quantization_config": {"quantize_head": False}},
        )


def round_to_nearest(weight: torch.Tensor, bits: int, group: int, symmetric: bool) -> torch.Tensor:
    """weight [out, in] float32 as a group's scale (of float16) and zero point can say it."""
    rows, most = weight.reshape(-1, group), 2**bits - 1
    low, high = rows.amin(1, keepdim=True).clamp(max=0), rows.amax(1, keepdim=True).clamp(min=0)
    if symmetric:
        high = torch.maximum(high, -low)
        low = -high
    scale = ((high - low).clamp(min=1e-8) / most).half().float()
    zero = torch.full_like(scale, 2 ** (bits - 1)) if symmetric else (-low / scale).round().clamp(0, most)
    return ((rows / scale).round() + zero).clamp(0, most).sub(zero).mul(scale).reshape(weight.shape)


def write_rounded(folder: Path, target: Path, nearest: str) -> None:
    """The plain checkpoint ``folder`` with the linear weights of its layers rounded as ``nearest`` says."""
    bits, group, kind = nearest.split(":")
    shutil.copytree(folder, target, ignore=shutil.ignore_patterns("*.safetensors"))
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    tensors = {
        name: round_to_nearest(tensor.float(), int(bits), int(group), kind == "sym")
        if ".layers." in name and tensor.dim() == 2
        else tensor.float()
        for name, tensor in read_folder(folder)[1].items()
    }
    write_folder(target, {**config, "dtype": "float32"}, tensors)


def table(found: Sequence[Quality]) -> str:
    """Markdown; differences are against the first row."""
    first = found[0]
    lines = [
        "| weights | head and embedding | perplexity | against plain | loss, nats a token | sums right | facts right |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in found:
        more = f"{100 * math.expm1(row.loss - first.loss):+.3f} %" if row is not first else ""
        lines.append(
            f"| {row.scheme} | {row.head} | {math.exp(row.loss):.5f} | {more} | {row.loss:.5f} | {row.arithmetic:.1%} | {row.factual:.1%} |"
        )
    return "\n".join(lines)


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, nargs="?", default=path(), help="default: the bundled model")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--decoder-backend", help="default: the engine's choice")
    parser.add_argument("--documents", type=int, default=400)
    parser.add_argument(
        "--checkpoints", type=Path, nargs="+", default=[], help="of the same model, quantized"
    )
    parser.add_argument("--nearest", action="append", default=[], metavar="BITS:GROUP:sym|asym")
    parser.add_argument("--out", type=Path, help="results as JSON")
    arguments = parser.parse_args()
    base: dict[str, Any] = {"dtype": arguments.dtype}
    if arguments.decoder_backend:
        base["decoder_backend"] = arguments.decoder_backend
    with Engine(str(arguments.folder), **base) as engine:
        context = engine.config.max_model_len - 1
    texts = read_documents(arguments.folder, arguments.documents, context)
    found = []
    if arguments.checkpoints or arguments.nearest:
        found.append(measure(arguments.folder, texts, base["dtype"], "plain", base))
        for checkpoint in arguments.checkpoints:
            found.append(measure(checkpoint, texts, checkpoint.name, "plain", base))
        for nearest in arguments.nearest:
            with tempfile.TemporaryDirectory() as scratch:
                write_rounded(arguments.folder, Path(scratch) / "rounded", nearest)
                found.append(measure(Path(scratch) / "rounded", texts, f"nearest {nearest}", "plain", base))
    else:
        for scheme, head, options in runs(base):
            found.append(measure(arguments.folder, texts, scheme, head, options))
            print(found[-1], flush=True)
    tokens = sum(sum(text.counted) for text in texts)
    print(f"\n{len(texts)} documents, {tokens} tokens counted; {QUESTIONS} questions\n")
    print(table(found))
    if arguments.out:
        arguments.out.write_text(
            json.dumps([asdict(row) for row in found], indent=2) + "\n", encoding="utf-8"
        )


if __name__ == "__main__":
    main()
