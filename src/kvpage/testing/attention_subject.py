"""What every part of the attention suite starts from: the class under test, its claims, and the cases they allow."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, ClassVar

import torch

from kvpage.api.attention import AttentionBackend, AttentionCaps, AttentionNeed
from kvpage.testing.attention_class import Mistake, class_mistake, made_mistake
from kvpage.testing.attention_layout import Shape, environment
from kvpage.testing.attention_report import check_step
from kvpage.testing.attention_rig import Rig, Row, Step
from kvpage.testing.guest_manners import HostState
from kvpage.testing.suite import ConformanceError, ConformanceSuite, not_claimed

DTYPES = ("float32", "bfloat16", "float16")
KV_DTYPES = ("int8", "fp8_e4m3")
HEAD_DIMS = (32, 64, 80, 96, 112, 128, 192, 256)
BLOCK_SIZES = (1, 8, 16, 17, 32, 64, 128)
FEATURES = frozenset({"window", "softcap", "sinks", "v_head_dim"})

Tolerances = Mapping[str, tuple[float, float]]


class AttentionSubject(ConformanceSuite):
    """The class under test, and what a subclass may set.

    Attributes:
        backend: the class under test.
        device: torch device string; ``None`` = the CPU if the backend claims it, else the first device it claims.
        dtypes, head_dims, block_sizes: narrow the claims that are proven (a slow machine); ``None`` = all.
        tolerances: dtype -> (absolute, relative) difference allowed; inputs and outputs are of order 1.
        kv_tolerances: the same by KV dtype, where that is narrower than the model's.
        batch_invariant: a row's output has the same bits whatever its batch mates are. ``False`` if the backend
            does not promise that; its documentation should then say so, since sampled text may depend on load.
    """

    _mistake: ClassVar[Mistake | None]
    backend: ClassVar[type[AttentionBackend]]
    device: ClassVar[str | None] = None
    dtypes: ClassVar[Iterable[str] | None] = None
    head_dims: ClassVar[Iterable[int] | None] = None
    block_sizes: ClassVar[Iterable[int] | None] = None
    batch_invariant: ClassVar[bool] = True
    tolerances: ClassVar[Tolerances] = {
        "float32": (2e-5, 2e-5), "float16": (3e-3, 3e-3), "bfloat16": (2e-2, 2e-2),
    }  # fmt: skip
    kv_tolerances: ClassVar[Tolerances] = {"int8": (6e-2, 6e-2), "fp8_e4m3": (2.5e-1, 1e-1)}

    def setup_method(self) -> None:
        """pytest's hook before each test: a backend without manners disturbs no other test."""
        self._host = HostState.now()

    def teardown_method(self) -> None:
        """pytest's hook after each test."""
        self._host.restore()

    def cases(self) -> Iterator[tuple[str, Callable[[], None]]]:
        for name, case in super().cases():
            yield name, _restoring(case)

    @property
    def claims(self) -> AttentionCaps:
        """``backend.caps``; skips where the backend cannot be made, which is one finding and not a hundred."""
        mistake = self.mistake()
        if mistake is not None:
            not_claimed(f"see {mistake.test}")
        return self.backend.caps

    def mistake(self) -> Mistake | None:
        """Why no case can run, looked for once a suite; ``None``: one can."""
        kind = type(self)
        if "_mistake" not in vars(kind):
            kind._mistake = self._find_mistake()
        return kind._mistake

    def axes(self) -> dict[str, Sequence[Any]]:
        wrong = class_mistake(getattr(self, "backend", None))
        caps = AttentionCaps(devices=frozenset(), dtypes=frozenset()) if wrong else self.backend.caps
        return {
            "dtype": _axis(DTYPES, caps.dtypes, self.dtypes),
            "kv_dtype": _axis(KV_DTYPES, caps.kv_dtypes, None),
            "head_dim": sorted(_axis(HEAD_DIMS, caps.head_dims, self.head_dims)),
            "block_size": sorted(_axis(BLOCK_SIZES, caps.block_sizes, self.block_sizes)),
        }

    def where(self) -> str:
        """The device the suite runs on; skips where this machine has none."""
        claimed = self.claims.devices
        if self.device is not None and self.device.partition(":")[0] not in claimed:
            raise ConformanceError(
                "device",
                f"device {self.device!r} is set, {self.backend.__name__} claims {', '.join(sorted(claimed))}",
            )
        device = self.device or ("cpu" if "cpu" in claimed else min(claimed, default="of any kind"))
        try:
            torch.empty(0, device=device)
        except (RuntimeError, AssertionError) as error:
            not_claimed(f"no device {device} on this machine: {str(error).splitlines()[0]}")
        return device

    def shape(self, **changes: Any) -> Shape:
        """A small case that the backend claims, with ``changes``."""
        return self._shape(self.claims, changes)

    def rig(
        self,
        lengths: Sequence[int],
        shape: Shape | None = None,
        *,
        features: Iterable[str] = (),
        **options: Any,
    ) -> Rig:
        """A rig for ``shape``; skips, naming the claim, where the backend's caps do not have it."""
        shape, device = shape or self.shape(), self.where()
        need = AttentionNeed(
            device=device.partition(":")[0],
            dtype=shape.dtype,
            kv_dtype=shape.kv_dtype or shape.dtype,
            head_dims=frozenset({shape.head_dim, shape.value_dim}),
            block_size=shape.block_size,
            features=frozenset(features),
        )
        reasons = self.claims.missing(need)
        if reasons:
            not_claimed(f"{self.backend.__name__} does not claim {'; '.join(reasons)}")
        return Rig(self.backend, shape, device, lengths, **options)

    def check(self, property: str, rig: Rig, step: Step) -> float:
        """Hold a step against the float64 oracle; the largest difference."""
        __tracebackhide__ = True
        return check_step(property, rig, step, self.allowed(rig.shape))

    def allowed(self, shape: Shape) -> tuple[float, float]:
        """(absolute, relative) difference allowed for a case."""
        wide = (2.5e-1, 2.5e-1)
        if shape.kv_dtype is not None and shape.kv_dtype != shape.dtype:
            return self.kv_tolerances.get(shape.kv_dtype, wide)
        return self.tolerances.get(shape.dtype, wide)

    def mixed(self, shape: Shape | None = None, **options: Any) -> tuple[Rig, list[Row]]:
        """A rig and a step of decode rows, verify rows and prompt chunks around block edges, short ones first."""
        size = (shape or self.shape()).block_size
        spans = [(length - 1, length) for length in (1, max(1, size - 1), size, size + 1, 3 * size + 2)]
        spans += [(size - 1, size + 1), (2 * size, 2 * size + 5), (max(0, size - 2), size + 1)]
        spans += [(0, size + 3), (5, 2 * size + 7), (2 * size - 1, 3 * size)]
        rig = self.rig([last for _, last in spans], shape, **options)
        return rig, [Row(row, first, last) for row, (first, last) in enumerate(spans)]

    def _shape(self, caps: AttentionCaps, changes: Mapping[str, Any]) -> Shape:
        axes = self.axes()
        small = {
            "dtype": _first(axes["dtype"], caps.dtypes),
            "head_dim": _first([32, *axes["head_dim"]], caps.head_dims),
            "block_size": _first([8, *axes["block_size"]], caps.block_sizes),
        }
        if self.head_dims is not None and "head_dim" not in changes:
            small["head_dim"] = min(self.head_dims)
        if self.block_sizes is not None and "block_size" not in changes:
            small["block_size"] = min(self.block_sizes)
        return Shape(**{**small, **changes})

    def _find_mistake(self) -> Mistake | None:
        wrong = class_mistake(getattr(self, "backend", None))
        if wrong is not None:
            return wrong
        caps = self.backend.caps
        device = self.device or ("cpu" if "cpu" in caps.devices else min(caps.devices, default="of any kind"))
        try:
            torch.empty(0, device=device)
        except (RuntimeError, AssertionError):
            return None  # the cases are skipped, and say that this machine has no such device
        shape = self._shape(caps, {})
        sizes = {"num_blocks": 9, "max_num_seqs": 8, "max_num_batched_tokens": 64}
        return made_mistake(
            self.backend, environment(shape, device, **sizes, max_model_len=8 * shape.block_size)
        )


def _restoring(case: Callable[[], None]) -> Callable[[], None]:
    def run() -> None:
        __tracebackhide__ = True
        host = HostState.now()
        try:
            case()
        finally:
            host.restore()

    return run


def _axis(standard: Sequence[Any], claimed: Iterable[Any] | None, chosen: Iterable[Any] | None) -> list[Any]:
    """Standard values in their order, then others that are claimed; only those chosen, if any are."""
    everything = [*standard, *sorted(set(claimed or ()) - set(standard))]
    if chosen is None:
        return everything
    kept = set(chosen)
    return [*(value for value in everything if value in kept), *sorted(kept - set(everything))]


def _first(preferred: Sequence[Any], claimed: frozenset[Any] | None) -> Any:
    """The first preferred value that is claimed."""
    return next((value for value in preferred if claimed is None or value in claimed), preferred[0])
