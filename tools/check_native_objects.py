"""What the compiler made of src/kvpage_cpu/csrc: can each instruction set's code run where it is chosen?

python tools/check_native_objects.py build/native src/kvpage_cpu/libkvpage_cpu.so

- No object of the kernels has a weak symbol: of several copies of an inline function the linker keeps one, which may
  be the copy that an older processor cannot run.
- No object has instructions beyond its set (on x86-64).
- The library exports the C ABI and nothing else, and leaves the processor's rounding and denormals as they are.

Needs nm and objdump. Exit 1 where one of it does not hold, with every finding.
"""

from __future__ import annotations

import argparse
import platform
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

ONCE = "kvpage_cpu"
BEYOND = {
    ONCE: r"\tv\w+",  # VEX and EVEX encoded instructions alone begin with v
    "kernels_0": r"\tv\w+",
    "kernels_1": r"%zmm\d+|%[xy]mm(?:1[6-9]|2\d|3[01])\b|%k[0-7]\b",
    "kernels_2": r"\tvdp\w+|\tvpdp\w+|\tvcvtne\w*bf16\w*",
}
"""Targets of CMakeLists.txt, and what their code must not contain; kernels_3 is the largest set."""


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("build", type=Path, help="the build folder")
    parser.add_argument("library", type=Path, help="the library")
    arguments = parser.parse_args()
    objects = sorted(arguments.build.glob("CMakeFiles/*.dir/**/*.o"))
    kernels = [path for path in objects if target(path) != ONCE]
    if not kernels:
        parser.error(f"{arguments.build} holds no objects of kernels: build it first")
    findings = [finding for path in kernels for finding in weak_symbols(path)]
    if platform.machine() == "x86_64":
        findings += [finding for path in objects for finding in instructions_beyond(path)]
    findings += foreign_exports(arguments.library)
    print(
        "\n".join(findings) or f"{len(objects)} objects: no weak symbols, no instructions beyond their sets"
    )
    return 1 if findings else 0


def target(path: Path) -> str:
    """The CMake target that an object belongs to."""
    return next(part for part in path.parts if part.endswith(".dir")).removesuffix(".dir")


def weak_symbols(path: Path) -> Iterator[str]:
    """The weak and the unique symbols that an object defines."""
    for line in output("nm", "-C", str(path)).splitlines():
        if re.search(r" [WVu] ", line):
            yield f"{target(path)}/{path.name}: weak symbol {line.split(' ', 2)[2]}"


def instructions_beyond(path: Path) -> Iterator[str]:
    """The functions of an object with instructions of another set, each with the first of them."""
    pattern = BEYOND.get(target(path))
    if pattern is None:
        return
    function, told = "", ""
    for line in output("objdump", "-dC", "--no-show-raw-insn", str(path)).splitlines():
        if line.endswith(">:"):
            function = line.partition(" ")[2]
        elif function != told and re.search(pattern, line):
            told = function
            yield f"{target(path)}/{path.name}: {function} has {' '.join(line.split()[1:])}"


def foreign_exports(library: Path) -> Iterator[str]:
    """Symbols that the library shows and that are not of its ABI; and start-up code that changes the host."""
    for line in output("nm", "-DC", "--defined-only", str(library)).splitlines():
        name = line.split(" ", 2)[2]
        if not name.startswith("kvp_"):
            yield f"{library.name} exports {name}"
    if "set_fast_math" in output("nm", str(library)):
        yield f"{library.name} was linked with -ffast-math: loading it would flush the host's denormals to zero"


def output(*command: str) -> str:
    """What a command prints."""
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


if __name__ == "__main__":
    raise SystemExit(main())
