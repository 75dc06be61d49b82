"""Prompts for measurements: random token ids, repeatable from a seed."""

from __future__ import annotations

import argparse
import random
from collections.abc import Sequence

from kvpage.config import EngineOptions
from kvpage.flags.engine import chosen_model, engine_options
from kvpage.inspect.checkpoint import planned_model
from kvpage.loading.locate import find_folder
from kvpage.plugins import PluginRegistry

TOKENIZER_FILES = ("tokenizer*", "vocab*", "*.model")
"""A folder that holds none of these has no tokenizer of whatever kind."""


def vocabulary_size(namespace: argparse.Namespace) -> int:
    """Tokens of the model that the command line names, from its config."""
    options = EngineOptions(model=chosen_model(namespace), **engine_options(namespace))
    return planned_model(options, PluginRegistry()).spec.vocab_size


def has_tokenizer(namespace: argparse.Namespace) -> bool:
    """Whether the model that the command line names comes with a tokenizer, or one is named beside it."""
    options = EngineOptions(model=chosen_model(namespace), **engine_options(namespace))
    folder = find_folder(options, weights=False)
    return options.tokenizer is not None or any(any(folder.glob(name)) for name in TOKENIZER_FILES)


def random_prompts(vocabulary: int, lengths: Sequence[int], *, prefix: int, seed: int) -> list[list[int]]:
    """One prompt a length: ``prefix`` tokens that all have in common, then ``length`` of its own."""
    numbers = random.Random(seed)
    common = [numbers.randrange(vocabulary) for _ in range(prefix)]
    return [[*common, *(numbers.randrange(vocabulary) for _ in range(length))] for length in lengths]
