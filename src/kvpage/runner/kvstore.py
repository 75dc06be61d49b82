"""The KV memory of one engine, and the StepContext through which a model reaches it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from kvpage.api.attention import AttentionBackend, AttentionBatch, AttentionLayer, Rope
from kvpage.api.decoder import KVGroupStep
from kvpage.api.kv import BlockCopy, KVLayout
from kvpage.api.model import AttentionSpec, PagedModelSpec, RopeSpec


@dataclass(slots=True)
class GroupRuntime:
    """One KV group: its backend object, and a KV tensor, layer record and rope a layer (by ``kv_index``)."""

    backend: AttentionBackend
    tensors: list[torch.Tensor]
    layers: list[AttentionLayer]
    ropes: list[Rope | None]


class KVStore:
    """KV tensors of every group.

    Args:
        spec: the model.
        backend: makes the backend of (group index), and its layout.
        allocate: (shape, torch dtype) -> zeroed tensor of the engine's own memory.
        rope: builds the rotary tables of a RopeSpec.
    """

    def __init__(
        self,
        spec: PagedModelSpec,
        backend: Callable[[int], tuple[AttentionBackend, KVLayout]],
        *,
        allocate: Callable[[Sequence[int], torch.dtype], torch.Tensor],
        rope: Callable[[RopeSpec], Rope],
    ) -> None:
        self.groups: list[GroupRuntime] = []
        built: list[tuple[RopeSpec, Rope]] = []

        def tables(wanted: RopeSpec) -> Rope:
            """Equal specs share one table."""
            for known, table in built:
                if known == wanted:
                    return table
            built.append((wanted, rope(wanted)))
            return built[-1][1]

        mixers = {(m.kv_group, m.kv_index): m for m in spec.attention}
        for index, group in enumerate(spec.kv_groups):
            made, layout = backend(index)
            runtime = GroupRuntime(made, [], [], [])
            dtype = getattr(torch, layout.dtype)
            for position in range(len(group.layers)):
                mixer = mixers[index, position]
                runtime.tensors.append(allocate(layout.shape, dtype))
                runtime.layers.append(
                    AttentionLayer(
                        index=position, scale=mixer.scale, window=mixer.window, softcap=mixer.softcap
                    )
                )
                runtime.ropes.append(None if mixer.rope is None else tables(mixer.rope))
            self.groups.append(runtime)

    def copy_blocks(self, copies: Sequence[BlockCopy]) -> None:
        """Copy-on-write, in all layers of each group, before anything of the step is written."""
        by_group: dict[int, list[BlockCopy]] = {}
        for copy in copies:
            by_group.setdefault(copy.group, []).append(copy)
        for index, items in by_group.items():
            group = self.groups[index]
            source = torch.tensor([copy.source for copy in items], device=group.tensors[0].device)
            target = torch.tensor([copy.target for copy in items], device=group.tensors[0].device)
            for tensor in group.tensors:
                group.backend.copy_blocks(tensor, source, target)

    def step(
        self,
        rope_positions: torch.Tensor,
        batches: Sequence[AttentionBatch],
        wanted: torch.Tensor | None = None,
    ) -> PagedContext:
        """The context of one step, whose tokens turn by rows ``rope_positions`` int64 [T] of the rotary tables.

        ``wanted``: see ``StepContext``. Every backend plans the step once.
        """
        plans = [group.backend.plan(batch) for group, batch in zip(self.groups, batches, strict=True)]
        return PagedContext(self.groups, rope_positions, batches, plans, wanted)


class PagedContext:
    """``kvpage.api.model.StepContext`` over paged KV."""

    __slots__ = ("_batches", "_groups", "_plans", "_rope_positions", "wanted")

    def __init__(
        self,
        groups: Sequence[GroupRuntime],
        rope_positions: torch.Tensor,
        batches: Sequence[AttentionBatch],
        plans: Sequence[object],
        wanted: torch.Tensor | None = None,
    ) -> None:
        self._groups, self._rope_positions = groups, rope_positions
        self._batches, self._plans = batches, plans
        self.wanted = wanted

    def attend(
        self,
        spec: AttentionSpec,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        sinks: torch.Tensor | None = None,
    ) -> torch.Tensor:
        group, batch = self._groups[spec.kv_group], self._batches[spec.kv_group]
        index = spec.kv_index
        layer, kv = group.layers[index], group.tensors[index]
        if sinks is not None and layer.sinks is not sinks:
            layer = group.layers[index] = replace(layer, sinks=sinks)
        q, _ = group.backend.rope_write(q, k, v, self._rope_positions, group.ropes[index], kv, batch)
        out = torch.empty((q.shape[0], spec.num_heads, spec.v_head_dim), dtype=q.dtype, device=q.device)
        group.backend.attend(q, kv, layer, batch, self._plans[spec.kv_group], out)
        return out

    def group(self, index: int) -> KVGroupStep:
        group = self._groups[index]
        return KVGroupStep(
            group.backend,
            self._batches[index],
            self._plans[index],
            group.tensors,
            group.ropes,
            self._rope_positions,
        )
