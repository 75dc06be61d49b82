"""Stands between the suite and a backend object: after every call, what the backend was given is as it was."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import fields

import torch

from kvpage.api.attention import AttentionBackend, AttentionBatch, AttentionEnv, AttentionLayer, Rope
from kvpage.api.kv import KVLayout
from kvpage.testing.comparing import bits, told_apart
from kvpage.testing.guest_manners import HostState, host_kept
from kvpage.testing.suite import ConformanceError

READ_ONLY = "inputs are only read"
AXES: Mapping[str, tuple[str, ...]] = {
    "q": ("token", "head", "element"),
    "k": ("token", "head", "element"),
    "v": ("token", "head", "element"),
    "positions": ("token",),
    "layer.sinks": ("head",),
    "batch.cu_seqlens_q": ("entry",),
    "batch.seq_lens": ("row",),
    "batch.block_tables": ("row", "column"),
    "batch.slot_mapping": ("token",),
}


class WatchedBackend:
    """The methods of ``subject``, each followed by a look at its inputs; ``manners``: at the process around it instead.

    Raises:
        ConformanceError: naming the method, what it changed, the first index and both values.
    """

    def __init__(self, kind: type[AttentionBackend], env: AttentionEnv, *, manners: bool = False) -> None:
        self._manners = manners
        with self._guest(f"{kind.__name__}(env)"):
            self.subject = kind(env)

    def kv_layout(self) -> KVLayout:
        with self._guest("kv_layout"):
            return self.subject.kv_layout()

    def plan(self, batch: AttentionBatch) -> object:
        __tracebackhide__ = True
        seen = self._inputs("plan", {}, batch)
        with self._guest("plan"):
            plan = self.subject.plan(batch)
        seen.check()
        return plan

    def write_kv(self, kv: torch.Tensor, k: torch.Tensor, v: torch.Tensor, batch: AttentionBatch) -> None:
        __tracebackhide__ = True
        seen = self._inputs("write_kv", {"k": k, "v": v}, batch)
        with self._guest("write_kv"):
            self.subject.write_kv(kv, k, v, batch)
        seen.check()

    def rope_write(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        positions: torch.Tensor,
        rope: Rope | None,
        kv: torch.Tensor,
        batch: AttentionBatch,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        __tracebackhide__ = True
        # q and k may be rotated in place.
        tables = {} if rope is None else {"rope.cos": rope.cos, "rope.sin": rope.sin}
        seen = self._inputs("rope_write", {"v": v, "positions": positions, **tables}, batch)
        with self._guest("rope_write"):
            turned = self.subject.rope_write(q, k, v, positions, rope, kv, batch)
        seen.check()
        return turned

    def attend(
        self,
        q: torch.Tensor,
        kv: torch.Tensor,
        layer: AttentionLayer,
        batch: AttentionBatch,
        plan: object,
        out: torch.Tensor,
    ) -> None:
        __tracebackhide__ = True
        sinks = {} if layer.sinks is None else {"layer.sinks": layer.sinks}
        seen = self._inputs("attend", {"q": q, "the cache": kv, **sinks}, batch)
        with self._guest("attend"):
            self.subject.attend(q, kv, layer, batch, plan, out)
        seen.check()

    def copy_blocks(self, kv: torch.Tensor, source: torch.Tensor, target: torch.Tensor) -> None:
        __tracebackhide__ = True
        seen = self._inputs("copy_blocks", {"source": source, "target": target}, None)
        with self._guest("copy_blocks"):
            self.subject.copy_blocks(kv, source, target)
        seen.check()

    def _inputs(
        self, method: str, tensors: Mapping[str, torch.Tensor], batch: AttentionBatch | None
    ) -> _Inputs:
        return _Inputs(method, {}, None) if self._manners else _Inputs(method, tensors, batch)

    def _guest(self, method: str) -> AbstractContextManager[HostState | None]:
        return host_kept(method) if self._manners else nullcontext()


class _Inputs:
    """What one call is given, and copies of it."""

    def __init__(
        self, method: str, tensors: Mapping[str, torch.Tensor], batch: AttentionBatch | None
    ) -> None:
        self._method, self._batch = method, batch
        self._told = {} if batch is None else {f.name: getattr(batch, f.name) for f in fields(batch)}
        mine = {f"batch.{name}": x for name, x in self._told.items() if isinstance(x, torch.Tensor)}
        self._tensors = {**tensors, **mine}
        self._before = {name: tensor.clone() for name, tensor in self._tensors.items()}
        self._lists = {name: list(x) for name, x in self._told.items() if isinstance(x, list)}

    def check(self) -> None:
        __tracebackhide__ = True
        for name, was in self._told.items():
            now = getattr(self._batch, name)
            if now is not was and (isinstance(was, torch.Tensor | list) or now != was):
                raise ConformanceError(
                    READ_ONLY, f"{self._method} put another {type(now).__name__} in batch.{name}"
                )
            if name in self._lists and now != self._lists[name]:
                raise ConformanceError(
                    READ_ONLY, f"{self._method} changed batch.{name}: got {now}, expected {self._lists[name]}"
                )
        for name, now in self._tensors.items():
            was = self._before[name]
            if not torch.equal(bits(now), bits(was)):
                raise ConformanceError(READ_ONLY, _changed(self._method, name, now, was))


def _changed(method: str, name: str, now: torch.Tensor, was: torch.Tensor) -> str:
    places = (bits(now) != bits(was)).nonzero()
    place = tuple(int(i) for i in places[0])
    axes = AXES.get(name)
    where = (
        ", ".join(f"{axis} {at}" for axis, at in zip(axes or (), place, strict=False)) or f"index {[*place]}"
    )
    got, expected = told_apart(now[place], was[place])
    return (
        f"{method} changed {name}: first at {where}: got {got}, expected {expected} as before the call; "
        f"{len(places)} of {now.numel()} values differ"
    )
