"""Train the demo model: ``python -m kvpage.demo.train --out DIR``.

The tokenizer and the model are trained from nothing on the text of :mod:`kvpage.demo.corpus`. Seeds are
fixed: on one machine, with one version of torch and one number of threads, the weights come out the same.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from kvpage.demo.corpus import BOS, END, PAD, Segment, documents
from kvpage.demo.tokens import CONTEXT, VOCABULARY, train_tokenizer, write_tokenizer

__all__ = ["Recipe", "main", "train"]


@dataclass(frozen=True)
class Recipe:
    """Everything that fixes the result. A step computes ``tokens_per_step`` tokens in rows of one length."""

    seed: int = 20
    steps: int = 3600
    tokens_per_step: int = 2048
    row: int = 512
    # The last steps use long rows, so that the model keeps its manners far from the start of a context.
    long_row: int = 2048
    long_steps: int = 250
    warmup: int = 150
    learning_rate: float = 1.5e-3
    final_learning_rate: float = 2e-5
    weight_decay: float = 0.05


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


def _learning_rate(recipe: Recipe, step: int) -> float:
    if step < recipe.warmup:
        return recipe.learning_rate * (step + 1) / recipe.warmup
    progress = (step - recipe.warmup) / max(1, recipe.steps - recipe.warmup)
    span = recipe.learning_rate - recipe.final_learning_rate
    return recipe.final_learning_rate + span * 0.5 * (1 + math.cos(math.pi * progress))


def _loss(model: LlamaForCausalLM, rows: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Return the mean loss over the tokens that carry weight; only their logits are computed."""
    ids = torch.stack([row for row, _ in rows])
    weights = torch.stack([weight for _, weight in rows])[:, 1:]
    hidden = model.model(input_ids=ids[:, :-1], use_cache=False).last_hidden_state
    counted = weights > 0
    logits = model.lm_head(hidden[counted])
    losses = torch.nn.functional.cross_entropy(logits, ids[:, 1:][counted], reduction="none")
    return (losses * weights[counted]).sum() / weights.sum()


def _optimizer(model: LlamaForCausalLM, recipe: Recipe) -> torch.optim.AdamW:
    matrices = [parameter for parameter in model.parameters() if parameter.dim() >= 2]
    vectors = [parameter for parameter in model.parameters() if parameter.dim() < 2]
    groups = [
        {"params": matrices, "weight_decay": recipe.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=recipe.learning_rate, betas=(0.9, 0.98))


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


def train(folder: Path, recipe: Recipe, save_every: int = 500) -> None:
    """Train tokenizer and model and write the checkpoint to ``folder``, also every ``save_every`` steps."""
    torch.manual_seed(recipe.seed)
    tokenizer = train_tokenizer(recipe.seed)
    model = LlamaForCausalLM(model_config()).float()
    optimizer = _optimizer(model, recipe)
    stream = documents(recipe.seed)
    long_from = recipe.steps - recipe.long_steps
    started = time.monotonic()
    for step in range(recipe.steps):
        length = recipe.long_row if step >= long_from else recipe.row
        source = _rows(tokenizer, stream, length)
        for group in optimizer.param_groups:
            group["lr"] = _learning_rate(recipe, step)
        loss = _loss(model, [next(source) for _ in range(recipe.tokens_per_step // length)])
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step % 25 == 0 or step == recipe.steps - 1:
            print(f"step {step:5d}  loss {loss.item():.4f}  {time.monotonic() - started:6.0f} s", flush=True)
        if (step + 1) % save_every == 0 or step == recipe.steps - 1:
            _write(model, tokenizer, folder)


def main() -> None:
    """Read the command line and train."""
    parser = argparse.ArgumentParser(prog="python -m kvpage.demo.train", description="Train the demo model.")
    parser.add_argument("--out", type=Path, required=True, help="folder for the checkpoint")
    parser.add_argument("--steps", type=int, default=Recipe.steps, help="default: %(default)s")
    parser.add_argument("--threads", type=int, default=2, help="default: %(default)s")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    train(arguments.out, Recipe(steps=arguments.steps))


if __name__ == "__main__":
    main()
