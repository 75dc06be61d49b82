"""``kvpage plan``: will a model fit. Reads config.json and safetensors headers; loads no torch, but for a CPU, where the
backends of this installation are asked how they lay KV out, and for a quantized checkpoint, whose scheme is asked what it
makes of each matrix."""

from __future__ import annotations

import argparse
import functools
import json
import logging
from collections.abc import Sequence
from dataclasses import replace

from kvpage.cli.main import NO, OK
from kvpage.cli.signals import undivided
from kvpage.config import EngineOptions, parse_size, resolve_dtype
from kvpage.errors import ConfigError
from kvpage.flags.engine import add_engine_flags, add_model_argument, chosen_model, engine_options
from kvpage.flags.parser import CommandParser
from kvpage.inspect.checkpoint import planned_model
from kvpage.inspect.held import Holding
from kvpage.inspect.machine import available_memory, nvidia_gpus
from kvpage.inspect.plan import BlockLayout, Devices, Layouts, PlannedModel, plan_memory
from kvpage.plugins import BackendChoice, PluginRegistry

DESCRIPTION = """\
Weights, KV bytes a token, blocks, how many sequences of what length fit; and which flag to turn where they do not.
Reads the config and the headers of the files only. Exit status: 0 it fits, 1 it does not, 2 the question is wrong."""

SMALLEST_DEVICE = 2**27
"""Less than this is a number whose unit was forgotten."""


def run(arguments: Sequence[str]) -> int:
    """The command."""
    parser = CommandParser("kvpage plan", DESCRIPTION, "[MODEL]")
    add_model_argument(parser)
    described = parser.add_argument_group("devices (default: those of this machine)")
    described.add_argument("--gpu", metavar="SIZE", help="memory of each GPU, such as 80GB or 80GiB")
    described.add_argument(
        "--memory", metavar="SIZE", help="memory of each device; with --device cpu, of the machine"
    )
    described.add_argument("-tp", "--tensor-parallel-size", dest="ranks", type=int, default=1, metavar="N",
                         help="devices that the model is split over [1]")  # fmt: skip
    parser.add_argument("--json", action="store_true", help="every number, as JSON")
    add_engine_flags(parser, skip=("tensor_parallel_size",))
    namespace = parser.parse_arguments(arguments)
    options = EngineOptions(model=chosen_model(namespace), **engine_options(namespace))
    registry, devices = PluginRegistry(), planned_devices(namespace, options)
    model = planned_model(options, registry)
    if model.quantization_config and model.stored:
        model = replace(model, holding=_holding(options, registry))
    layouts = cpu_layouts(model, options, registry) if devices.kind == "cpu" else None
    plan = plan_memory(model, options, devices, layouts)
    print(json.dumps(plan.to_dict(), indent=2) if namespace.json else plan.to_text())
    return OK if plan.fits else NO


def _holding(options: EngineOptions, registry: PluginRegistry) -> Holding | None:
    with undivided():  # torch, as the backends themselves
        from kvpage.engine.held import planned_holding

    return planned_holding(options, registry)


def cpu_layouts(model: PlannedModel, options: EngineOptions, registry: PluginRegistry) -> Layouts:
    """KV blocks of the attention backend that an engine on this machine's CPU would choose."""
    with undivided():  # torch, as the backends themselves
        from kvpage.engine.attention import laid_out_facts
        from kvpage.engine.backends import choose_backends

    @functools.cache
    def choice(dtype: str) -> BackendChoice:
        asked = replace(options, dtype=dtype)
        return choose_backends(asked, registry, model.spec, "cpu", dtype, logging.DEBUG).attention

    def layout(turned: EngineOptions) -> BlockLayout:
        dtype = resolve_dtype(turned, model.dtype, "cpu")
        chosen = choice(dtype)
        groups = laid_out_facts(turned, model.spec, "cpu", dtype, chosen)
        return BlockLayout(
            block_size=chosen.block_size,
            bytes_per_block=tuple(group.bytes_per_block or 0 for group in groups),
        )

    return layout


def planned_devices(namespace: argparse.Namespace, options: EngineOptions) -> Devices:
    """The devices that the flags describe, or those of this machine.

    Raises:
        ConfigError: the flags contradict each other, or a size is no device's.
    """
    kind = options.device.partition(":")[0]
    given = namespace.gpu or namespace.memory
    if namespace.gpu and (kind == "cpu" or namespace.memory):
        other = "--device cpu" if kind == "cpu" else f"--memory {namespace.memory}"
        raise ConfigError(f"--gpu {namespace.gpu} and {other} contradict each other: leave one out")
    if namespace.ranks < 1:
        raise ConfigError(f"-tp must be at least 1, got {namespace.ranks}")
    if given:
        size = parse_size(given) or 0
        if size < SMALLEST_DEVICE:
            raise ConfigError(
                f"{given} is {size} bytes, less than any device has: give a unit, such as {given}GB"
            )
        if kind == "auto":
            kind = "cuda" if namespace.gpu else "cpu"
        return Devices(kind=kind, memory=size, count=namespace.ranks)
    cards = nvidia_gpus() if kind in ("auto", "cuda") else []
    if cards:
        return Devices(kind="cuda", memory=min(size for _, size in cards), count=namespace.ranks)
    if kind not in ("auto", "cpu"):
        raise ConfigError(
            f"device={options.device!r}: none was found here; say what to plan for, such as --gpu 80GB"
        )
    return Devices(kind="cpu", memory=available_memory(), count=namespace.ranks)
