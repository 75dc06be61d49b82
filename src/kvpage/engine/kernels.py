"""Which linear kernel computes which weights of an engine, and why not each other."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping

from kvpage.api.quant import LinearChoice, LinearKernel

LOG = logging.getLogger("kvpage")


class KernelLog:
    """Hears which kernel took each weight. A kernel that is defective is told to the log, once a form.

    Args:
        kernels: the classes by the names that plugins gave them.
    """

    def __init__(self, kernels: Mapping[str, type[LinearKernel]]) -> None:
        self._names = {kind: name for name, kind in kernels.items()}
        self._taken: Counter[tuple[str, str]] = Counter()
        self._refused: dict[str, dict[str, None]] = {}
        self._told: set[tuple[str, str]] = set()

    def note(self, choice: LinearChoice) -> None:
        """One weight found its kernel, or none."""
        if choice.kernel is not None:
            self._taken[self._name(choice.kernel), choice.form] += 1
        for refusal in choice.refused:
            name = self._name(refusal.kernel)
            reason = "; ".join(refusal.reasons)
            self._refused.setdefault(choice.form, {})[f"{name}: no: {reason}"] = None
            if refusal.broken and (name, choice.form) not in self._told:
                self._told.add((name, choice.form))
                LOG.warning(
                    "linear kernel %s fails on %s (%s) and is passed over: %s",
                    name,
                    choice.weight,
                    choice.form,
                    reason,
                )

    def text(self, otherwise: str) -> str:
        """In one line; ``otherwise``: who computes the weights where no kernel was asked for."""
        if not self._taken:
            return f"none: {otherwise} computes the weights itself"
        parts = []
        for (name, form), count in self._taken.items():
            refused = "; ".join(self._refused.get(form, ()))
            parts.append(f"{name}: {count} {form}" + (f" ({refused})" if refused else ""))
        return "; ".join(parts)

    def _name(self, kind: type[LinearKernel]) -> str:
        return self._names.get(kind) or str(getattr(kind, "name", kind.__name__))
