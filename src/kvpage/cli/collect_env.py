"""``kvpage collect-env``: what a bug report needs to know of this machine."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import kvpage
from kvpage.cli.main import OK
from kvpage.cli.signals import undivided
from kvpage.flags.parser import CommandParser
from kvpage.inspect.machine import available_memory, nvidia_gpus, total_memory
from kvpage.plugins import PluginRegistry

DESCRIPTION = "Versions, processor, memory, torch and GPUs, and the plugins that were found: paste it into a bug report."

PACKAGES = (
    "torch", "transformers", "tokenizers", "safetensors", "huggingface-hub", "numpy", "jinja2", "pluggy", "rich",
)  # fmt: skip
INSTRUCTIONS = (
    "sse4_2", "avx", "avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512vl", "avx512_bf16", "avx512_vnni",
    "avx_vnni", "amx_tile", "amx_bf16", "amx_int8", "asimd", "asimddp", "bf16", "i8mm", "sve", "sve2",
)  # fmt: skip
"""Instruction sets that kernels choose by; named as Linux names them."""

VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "HF_HUB_OFFLINE",
             "HF_HOME", "KVPAGE_CPU_ISA", "KVPAGE_CPU_LIBRARY")  # fmt: skip


def run(arguments: Sequence[str]) -> int:
    """The command."""
    parser = CommandParser("kvpage collect-env", DESCRIPTION)
    parser.add_argument("--json", action="store_true", help="as JSON")
    namespace = parser.parse_arguments(arguments)
    registry = PluginRegistry()
    with undivided():  # torch, as plugins themselves
        told = {name: list(lines) for name, lines in registry.descriptions().items()}
    facts = {**environment(), "torch": torch_facts(), "plugins": plugin_facts(registry), "descriptions": told}
    if namespace.json:
        print(json.dumps(facts, indent=2))
    else:
        print("\n".join(as_text(facts)))
    return OK


def environment() -> dict[str, Any]:
    """Versions, processor, memory, GPUs, and the variables that change how fast torch runs. No torch is loaded."""
    return {
        "kvpage": kvpage.__version__,
        "python": f"{platform.python_version()} ({platform.python_implementation()})",
        "os": platform.platform(),
        "cpu": cpu_facts(),
        "memory": {"total": total_memory(), "available": available_memory()},
        "gpus": [{"name": name, "memory": size} for name, size in nvidia_gpus()],
        "packages": {name: _version(name) for name in PACKAGES},
        "variables": {name: os.environ[name] for name in VARIABLES if name in os.environ},
    }


def cpu_facts() -> dict[str, Any]:
    """Model, cores and instruction sets."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        text = ""
    entries: dict[str, str] = {}
    for line in text.splitlines():
        name, _, value = line.partition(":")
        entries.setdefault(name.strip(), value.strip())
    flags = set((entries.get("flags") or entries.get("Features") or "").split())
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "model": entries.get("model name") or platform.processor() or platform.machine(),
        "architecture": platform.machine(),
        "cores": os.cpu_count(),
        "usable_cores": usable,
        "instructions": [name for name in INSTRUCTIONS if name in flags],
    }


def torch_facts() -> dict[str, Any]:
    """What torch says of itself and its devices; an ``error`` where it cannot be imported."""
    try:
        with undivided():
            import torch
    except Exception as error:  # a broken install may raise anything, and is what the report is for
        return {"error": f"{type(error).__name__}: {error}"}
    devices = []
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            card = torch.cuda.get_device_properties(index)
            devices.append(
                {"name": card.name, "memory": card.total_memory, "capability": f"{card.major}.{card.minor}"}
            )
    return {
        "version": torch.__version__,
        "threads": torch.get_num_threads(),
        "interop_threads": torch.get_num_interop_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cuda": torch.version.cuda,
        "hip": torch.version.hip,
        "devices": devices,
        "parallel": [line.strip() for line in torch.__config__.parallel_info().splitlines() if line.strip()],
    }


def plugin_facts(registry: PluginRegistry) -> list[dict[str, str]]:
    """Every plugin that was found, broken ones included."""
    return [
        {"name": plugin.name, "origin": plugin.origin, "version": plugin.version, "status": plugin.status,
         "reason": plugin.reason}
        for plugin in registry.statuses()
    ]  # fmt: skip


def as_text(facts: Mapping[str, Any], indent: str = "") -> list[str]:
    """Nested facts as lines ``name: value``."""
    lines: list[str] = []
    for name, value in facts.items():
        if isinstance(value, Mapping) and value:
            lines += [f"{indent}{name}:", *as_text(value, indent + "  ")]
        elif isinstance(value, list) and value and isinstance(value[0], Mapping):
            lines.append(f"{indent}{name}:")
            lines += [
                f"{indent}  {', '.join(_pair(*pair) for pair in entry.items() if pair[1])}" for entry in value
            ]
        elif isinstance(value, list) and any(" " in line for line in value):  # sentences, not names
            lines += [f"{indent}{name}:", *(f"{indent}  {line}" for line in value)]
        else:
            lines.append(indent + _pair(name, value))
    return lines


def _pair(name: str, value: object) -> str:
    if name in ("total", "available", "memory") and isinstance(value, int):
        return f"{name}: {value / 2**30:.1f} GiB"
    if isinstance(value, list):
        return f"{name}: {' '.join(str(entry) for entry in value) or 'none'}"
    return f"{name}: {'not installed' if value is None and name in PACKAGES else value}"


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None
