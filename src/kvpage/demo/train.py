"""Train the demo model: ``python -m kvpage.demo.train --out DIR``.

The tokenizer and the model are trained from nothing on the text of :mod:`kvpage.demo.corpus`. Seeds are
fixed: on one machine, with one version of torch and one number of threads, the weights come out the same.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from kvpage.demo.corpus import BOS, END, PAD, Segment, documents
from kvpage.demo.tokens import CONTEXT, VOCABULARY, train_tokenizer, write_tokenizer

__all__ = ["ROUNDS", "Round", "main", "train"]


_TOKENS_PER_STEP = 2048
# The last steps of a round use long rows, so that the model keeps its manners far from the start of a context.
_LONG_ROW = 2048
_LONG_STEPS = 150
_WARMUP = 100
_FINAL_LEARNING_RATE = 2e-5
_WEIGHT_DECAY = 0.05
_SHEETS_FIRST = 0.7
_SHEETS_LATER = 0.05


@dataclass(frozen=True)
class Round:
    """One cycle of warmup and cosine decay, with an optimizer and text of its own.

    The first ``sheet_steps`` steps mostly see pages of sums: sums are learned late and suddenly, facts early
    and steadily. ``impressions`` is the share of documents that show what people try first. ``row`` is the
    number of tokens in a row; in short rows more documents stand at the start of the context, as a first
    question does.
    """

    steps: int
    sheet_steps: int
    learning_rate: float
    seed: int
    impressions: float = 0.0
    row: int = 512


ROUNDS = (
    Round(steps=2400, sheet_steps=1000, learning_rate=1.5e-3, seed=20),
    Round(steps=1200, sheet_steps=0, learning_rate=1e-3, seed=40),
    Round(steps=1700, sheet_steps=250, learning_rate=1e-3, seed=60),
    Round(steps=1600, sheet_steps=0, learning_rate=8e-4, seed=80, impressions=0.45, row=256),
)


def model_config() -> LlamaConfig:
    """Return the architecture of the demo model: about 2.9 million parameters."""
    return LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=256, intermediate_size=512, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=2, head_dim=64, max_position_embeddings=CONTEXT,
        tie_word_embeddings=True, pad_token_id=0, bos_token_id=1, eos_token_id=2, dtype="bfloat16",
    )  # fmt: skip


def _encode(tokenizer: Tokenizer, document: list[Segment]) -> tuple[list[int], list[float]]:
    ids: list[int] = []
    weights: list[float] = []
    for segment in document:
        piece = tokenizer.encode(segment.text, add_special_tokens=False).ids
        ids += piece
        weights += [segment.weight] * len(piece)
    return ids, weights


def _rows(
    tokenizer: Tokenizer, stream: Iterator[list[Segment]], length: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield rows of ids [length + 1] and loss weights [length + 1]; each row begins with a document."""
    while True:
        ids: list[int] = []
        weights: list[float] = []
        while len(ids) <= length:
            more_ids, more_weights = _encode(tokenizer, next(stream))
            ids += more_ids
            weights += more_weights
        yield torch.tensor(ids[: length + 1]), torch.tensor(weights[: length + 1])


def _learning_rate(round_: Round, step: int) -> float:
    if step < _WARMUP:
        return round_.learning_rate * (step + 1) / _WARMUP
    progress = (step - _WARMUP) / max(1, round_.steps - _WARMUP)
    span = round_.learning_rate - _FINAL_LEARNING_RATE
    return _FINAL_LEARNING_RATE + span * 0.5 * (1 + math.cos(math.pi * progress))


def _loss(model: LlamaForCausalLM, rows: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Return the mean loss over the tokens that carry weight; only their logits are computed."""
    ids = torch.stack([row for row, _ in rows])
    weights = torch.stack([weight for _, weight in rows])[:, 1:]
    hidden = model.model(input_ids=ids[:, :-1], use_cache=False).last_hidden_state
    counted = weights > 0
    logits = model.lm_head(hidden[counted]).float()
    losses = torch.nn.functional.cross_entropy(logits, ids[:, 1:][counted], reduction="none")
    return (losses * weights[counted]).sum() / weights.sum()


def _optimizer(model: LlamaForCausalLM) -> torch.optim.AdamW:
    matrices = [parameter for parameter in model.parameters() if parameter.dim() >= 2]
    vectors = [parameter for parameter in model.parameters() if parameter.dim() < 2]
    groups = [
        {"params": matrices, "weight_decay": _WEIGHT_DECAY},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, betas=(0.9, 0.98))


def _write(model: LlamaForCausalLM, tokenizer: Tokenizer, folder: Path) -> None:
    """Write the checkpoint in bfloat16, with the model as it is left untouched."""
    folder.mkdir(parents=True, exist_ok=True)
    copy = LlamaForCausalLM(model_config()).bfloat16()
    copy.load_state_dict({name: value.bfloat16() for name, value in model.state_dict().items()})
    copy.save_pretrained(folder)
    (folder / "model.safetensors").chmod(0o644)
    generation = {
        "bos_token_id": tokenizer.token_to_id(BOS),
        "eos_token_id": [tokenizer.token_to_id(END)],
        "pad_token_id": tokenizer.token_to_id(PAD),
        "do_sample": True,
        "temperature": 0.3,
        "transformers_version": transformers.__version__,
    }
    (folder / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n", encoding="utf-8")
    write_tokenizer(tokenizer, folder)


def _train_round(model: LlamaForCausalLM, tokenizer: Tokenizer, round_: Round) -> None:
    """Train ``model`` in place: float32 weights, products in bfloat16."""
    optimizer = _optimizer(model)
    first = documents(round_.seed, _SHEETS_FIRST, round_.impressions)
    later = documents(round_.seed + 1, _SHEETS_LATER, round_.impressions)
    started = time.monotonic()
    for step in range(round_.steps):
        length = _LONG_ROW if step >= round_.steps - _LONG_STEPS else round_.row
        source = _rows(tokenizer, first if step < round_.sheet_steps else later, length)
        for group in optimizer.param_groups:
            group["lr"] = _learning_rate(round_, step)
        rows = [next(source) for _ in range(_TOKENS_PER_STEP // length)]
        with torch.autocast("cpu", torch.bfloat16):
            loss = _loss(model, rows)
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step % 25 == 0 or step == round_.steps - 1:
            print(f"step {step:5d}  loss {loss.item():.4f}  {time.monotonic() - started:6.0f} s", flush=True)


def train(folder: Path, rounds: Sequence[Round] = ROUNDS, start: Path | None = None) -> None:
    """Train tokenizer and model and write the checkpoint to ``folder`` after every round.

    Every round goes on from the checkpoint that was written before it, in bfloat16 as it is; ``start`` is such
    a checkpoint, to go on from instead of beginning anew.
    """
    tokenizer = train_tokenizer(ROUNDS[0].seed)
    torch.manual_seed(ROUNDS[0].seed)
    for round_ in rounds:
        if start is None:
            model = LlamaForCausalLM(model_config()).float()
        else:
            model = LlamaForCausalLM.from_pretrained(start, dtype=torch.float32)
        _train_round(model, tokenizer, round_)
        _write(model, tokenizer, folder)
        start = folder


def main() -> None:
    """Read the command line and train."""
    parser = argparse.ArgumentParser(prog="python -m kvpage.demo.train", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for the checkpoint")
    parser.add_argument("--start", type=Path, help="do the last round again, from this checkpoint")
    parser.add_argument("--threads", type=int, default=2, help="torch threads (default: %(default)s)")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    train(arguments.out, ROUNDS[-1:] if arguments.start else ROUNDS, arguments.start)


if __name__ == "__main__":
    main()
