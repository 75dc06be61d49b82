"""auto-gptq's solver and packer, without the rest of it.

Its last release, 0.7.1, does not import under transformers 5, and asks for CUDA. The solver and the packer themselves
need neither: they are imported under empty parent packages, which are gone afterwards, as are the modules. What
another part of the program imported of auto-gptq stays as it is.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch

from kvpage import KvpageError

PACKAGE = "auto_gptq"
VERSION = "0.7.1"
PARENTS = ("", ".quantization", ".nn_modules", ".nn_modules.qlinear")


@dataclass(frozen=True, kw_only=True, slots=True)
class GptqPackage:
    """Classes of auto-gptq.

    Attributes:
        solver: ``GPTQ``: gathers the Hessian of a linear module and quantizes it.
        quantizer: ``Quantizer``: scales and zero points of groups.
        packer: ``QuantLinear``: the tensors of the format.
    """

    solver: Any
    quantizer: Any
    packer: Any


def load_package() -> GptqPackage:
    """auto-gptq's parts, from the installed package.

    Raises:
        KvpageError: it is not installed, or of another version.
    """
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise KvpageError(
            "--method gptq quantizes with auto-gptq, whose last release has wheels up to Python 3.11 (this is "
            f"{sys.version_info.major}.{sys.version_info.minor}): pip install 'kvpage[gptq]', from a clone '.[gptq]'"
        )
    found = importlib.metadata.version("auto-gptq")
    if found != VERSION:
        raise KvpageError(
            f"--method gptq needs auto-gptq {VERSION}, found {found}: pip install 'kvpage[gptq]'"
        )
    with _stubs(Path(next(iter(spec.submodule_search_locations)))), _same_switches(), _silent():
        solver = importlib.import_module(f"{PACKAGE}.quantization.gptq")
        quantizer = importlib.import_module(f"{PACKAGE}.quantization.quantizer")
        packer = importlib.import_module(f"{PACKAGE}.nn_modules.qlinear.qlinear_cuda")
    # The module is this package's own copy: nothing else sees that its torch does not wait for CUDA.
    vars(solver)["torch"] = _TorchOnCpu()
    return GptqPackage(solver=solver.GPTQ, quantizer=quantizer.Quantizer, packer=packer.QuantLinear)


class _TorchOnCpu:
    """torch, but that the two calls for CUDA of the solver do nothing."""

    cuda = SimpleNamespace(synchronize=lambda: None, empty_cache=lambda: None)

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


@contextmanager
def _stubs(folder: Path) -> Iterator[None]:
    """Empty packages in ``sys.modules`` in place of those whose import fails; what was there is put back."""
    before = {name: module for name, module in sys.modules.items() if _is_ours(name)}
    for name in before:
        del sys.modules[name]
    for part in PARENTS:
        stub = ModuleType(PACKAGE + part)
        stub.__path__ = [str(folder.joinpath(*part.split(".")))]
        sys.modules[stub.__name__] = stub
    try:
        yield
    finally:
        for name in [name for name in sys.modules if _is_ours(name)]:
            del sys.modules[name]
        sys.modules.update(before)


def _is_ours(name: str) -> bool:
    return name == PACKAGE or name.startswith(f"{PACKAGE}.")


@contextmanager
def _same_switches() -> Iterator[None]:
    """The solver's module switches TF32 off for the whole process; as it was afterwards."""
    switches: tuple[Any, ...] = (torch.backends.cuda.matmul, torch.backends.cudnn)
    before = [place.allow_tf32 for place in switches]
    try:
        yield
    finally:
        for place, value in zip(switches, before, strict=True):
            place.allow_tf32 = value


@contextmanager
def _silent() -> Iterator[None]:
    """Without a line on stderr that there is no CUDA extension, where the host has no handler for it."""
    logger, handler = logging.getLogger(PACKAGE), logging.NullHandler()
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
