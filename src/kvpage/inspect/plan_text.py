"""A memory plan as text for people."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from kvpage.inspect.held import held_text

if TYPE_CHECKING:
    from kvpage.inspect.memory import MemoryPlan

LABEL_WIDTH = 24
COLUMN_WIDTH = 13


def readable_bytes(size: int) -> str:
    """Decimal units, one digit after the point: "138.0 GB", "5.2 MB", "-2.1 GB"."""
    for limit, unit in ((10**9, "GB"), (10**6, "MB"), (10**3, "kB")):
        if abs(size) >= limit:
            return f"{size / limit:.1f} {unit}"
    return f"{size} bytes"


def readable_count(count: int) -> str:
    """Parameters: "68.98B", "135.2M", "812k"."""
    for limit, unit, digits in ((10**9, "B", 2), (10**6, "M", 1), (10**3, "k", 0)):
        if count >= limit:
            return f"{count / limit:.{digits}f}{unit}"
    return str(count)


def plan_text(plan: MemoryPlan) -> str:
    """Verdict first, then the sums, then what to turn."""
    return "\n".join(
        [*_title(plan), "", *_sums(plan), "", *_pool(plan), *_remedies(plan), "", *_not_yet(plan), FOOTNOTE]
    )


FOOTNOTE = "1 GB = 10^9 bytes. Activations and runtime are estimates; see --json for every number."


def _title(plan: MemoryPlan) -> Iterator[str]:
    chosen, devices = plan.resolved, plan.devices
    packed = f", {plan.quantization} weights" if plan.quantization else ""
    parameters = readable_count(plan.weights.parameters)
    yield f"{plan.model}: {plan.family}, {parameters} parameters, {chosen.dtype}{packed}"
    if plan.model_path:
        yield f"model path: {plan.model_path}"
    devices_text = f"{devices.count} x {readable_bytes(devices.memory)} {devices.kind}"
    share = f"; {plan.usable_reason} of it" if plan.usable != devices.memory else ""
    yield f"on {devices_text}{share}: {readable_bytes(plan.total_usable)} to use"
    if plan.fits:
        yield f"fits: about {readable_bytes(plan.total_kv_memory)} left for KV"
    elif plan.weights.device_bytes >= plan.usable:
        lacking = readable_bytes(plan.weights.total_bytes - plan.total_usable)
        total = readable_bytes(plan.missing * devices.count)
        yield (
            f"cannot load: the weights alone take {readable_bytes(plan.weights.total_bytes)}, {lacking} more than "
            f"may be used; {total} are missing with activations, runtime and the smallest KV pool"
        )
    else:
        yield f"does not fit: {readable_bytes(plan.missing * devices.count)} are missing"


def _not_yet(plan: MemoryPlan) -> Iterator[str]:
    if plan.cannot_run_yet:
        yield f"This version sizes but cannot run yet: {', '.join(plan.cannot_run_yet)}."


def _sums(plan: MemoryPlan) -> Iterator[str]:
    count = plan.devices.count
    heads = ("a device", "in all") if count > 1 else ("",)

    def row(label: str, *values: int, why: str = "") -> str:
        columns = "".join(f"{readable_bytes(value):>{COLUMN_WIDTH}}" for value in values[: len(heads)])
        return f"{label:<{LABEL_WIDTH}}{columns}{'   ' + why if why else ''}"

    if count > 1:
        yield " " * LABEL_WIDTH + "".join(f"{head:>{COLUMN_WIDTH}}" for head in heads)
    yield row("may be used", plan.usable, plan.total_usable)
    yield row(
        "weights",
        plan.weights.device_bytes,
        plan.weights.total_bytes,
        why="from the config" if plan.weights.estimated else "from the files' headers",
    )
    for part, size in plan.weights.total.items():
        yield row(f"  {part}", plan.weights.per_device[part], size)
    chosen = plan.resolved
    yield from held_text(plan.held, chosen.dtype, readable_bytes)
    yield row(
        "activations, at most",
        plan.activations,
        plan.activations * count,
        why=f"{chosen.max_num_batched_tokens} tokens a step, {chosen.max_num_seqs} sequences",
    )
    yield row(
        "runtime",
        plan.runtime,
        plan.runtime * count,
        why="interpreter, torch" if plan.devices.kind == "cpu" else "context, libraries, graphs",
    )
    yield row(
        "left for KV",
        plan.kv_memory,
        plan.total_kv_memory,
        why=chosen.reasons["kv_memory"] if plan.fits else "",
    )
    if count > 1 or plan.devices.kind != "cpu":
        rough = plan.total_usable - plan.weights.total_bytes
        yield (
            f"(counting weights only, as rules of thumb do: {readable_bytes(plan.total_usable)} - "
            f"{readable_bytes(plan.weights.total_bytes)} = {readable_bytes(rough)})"
        )


def _pool(plan: MemoryPlan) -> Iterator[str]:
    chosen, count = plan.resolved, plan.devices.count
    each = f" ({plan.kv_bytes_per_token:,} on each device)" if count > 1 else ""
    yield (
        f"KV cache: {plan.total_kv_bytes_per_token:,} bytes a token in {chosen.kv_dtype}{each}; "
        f"a block of {chosen.block_size} tokens takes {readable_bytes(plan.block_bytes)}{' a device' if each else ''}"
    )
    if plan.fits:
        blocks = " + ".join(f"{number:,}" for number in chosen.num_blocks)
        yield f"{blocks} blocks = {plan.tokens:,} tokens at once:"
        for length, number in plan.sequences.items():
            longest = "  (max_model_len)" if length == chosen.max_model_len else ""
            capped = (
                f", but max_num_seqs={chosen.max_num_seqs} run at once"
                if number > chosen.max_num_seqs
                else ""
            )
            noun = "sequence " if number == 1 else "sequences"
            yield f"{number:>10,} {noun} of {length:,} tokens{longest}{capped}"
        for note in chosen.notes:
            yield f"note: {note}"


def _remedies(plan: MemoryPlan) -> Iterator[str]:
    if plan.holds_longest:
        return
    yield ""
    if not plan.remedies:
        yield "No flag, nor two together, make it fit: choose a smaller model or larger devices."
        return
    yield (
        "what to turn (each line alone is enough):"
        if not plan.fits
        else "to serve sequences of max_model_len:"
    )
    width = max(len(remedy.flags) for remedy in plan.remedies)
    for remedy in plan.remedies:
        yield f"  {remedy.flags:<{width}}   {remedy.effect}"
