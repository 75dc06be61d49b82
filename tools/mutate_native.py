"""Plants bugs in the native kernels, one at a time, and asks whether the tests see them.

python tools/mutate_native.py                      # every bug; minutes
python tools/mutate_native.py --only causal bias   # those whose names hold one of the words
python tools/mutate_native.py --list

Each bug is a small edit of src/kvpage_cpu/csrc such as people make. A copy of the sources is edited and built, and
the tests run on that library (KVPAGE_CPU_LIBRARY). A bug is caught where they fail, crash or hang. Exit 1 where a bug
survives, or where the text that it edits is no longer there. Needs cmake, ninja and a C++ compiler.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SOURCES = Path("src/kvpage_cpu/csrc")
HANGS_AFTER = 600  # seconds


@dataclass(frozen=True, slots=True)
class Bug:
    """``before`` in ``file`` becomes ``after``; it occurs there once."""

    name: str
    file: str
    before: str
    after: str

    def occurrences(self, folder: Path) -> int:
        """How often ``before`` is found in the file; 1 is right."""
        path = folder / self.file
        return path.read_text(encoding="utf-8").count(self.before) if path.is_file() else 0

    def plant(self, folder: Path) -> str:
        """Edits the file and returns what it was."""
        path = folder / self.file
        text = path.read_text(encoding="utf-8")
        path.write_text(text.replace(self.before, self.after), encoding="utf-8")
        return text


BUGS = (
    Bug("linear: the bias is dropped", "linear.cpp", "out[n] = out[n] + finish.bias[n];", ""),
    Bug(
        "linear: every panel takes the scales of the first",
        "linear.cpp",
        "load(linear.output_scales + column + n * W)",
        "load(linear.output_scales + n * W)",
    ),
    Bug("linear: int8 weights are off by one", "linear.cpp", "splat_int(-128 *", "splat_int(-127 *"),
    Bug(
        "linear: the last output of a short panel is not written",
        "linear.cpp",
        "if (out == last) memcpy(y, last, count * sizeof(float));",
        "if (out == last) memcpy(y, last, (count - 1) * sizeof(float));",
    ),
    Bug(
        "linear: sums start anew in every chunk of K",
        "linear_kernels.h",
        "if (!work.first) load_sum(",
        "if (false) load_sum(",
    ),
    Bug(
        "linear: nibbles of int4 are swapped",
        "linear_pack.cpp",
        "exchange(exchange(x, 4, 0x00f000f0), 8, 0x0000ff00)",
        "exchange(x, 8, 0x0000ff00)",
    ),
    Bug(
        "linear: int4 offsets are left out of integer products",
        "linear_kernels.h",
        "sum = fma(x, group.offsets[n], sum);",
        ";",
    ),
    Bug(
        "linear: zeros of groups are forgotten",
        "linear.cpp",
        "(splat((float)linear.zero) - load(offsets + i)) * load(scales + i)",
        "zero()",
    ),
    Bug(
        "linear: all groups take the first super-scale",
        "linear.cpp",
        "(of_panel + index) * PANEL + n",
        "of_panel * PANEL + n",
    ),
    Bug(
        "linear: columns of an act-order weight meet those of x in order",
        "linear_rows.cpp",
        "x[rows.permutation[column + i]]",
        "x[column + i]",
    ),
    Bug("linear: half a row's sums are lost", "linear_rows.h", "if ((i + W) % rows.group) continue;", ""),
    Bug(
        "linear: subnormal 8-bit floats are taken for others",
        "linear_decode.h",
        "_mm512_testn_epi16_mask(words, _mm512_set1_epi16(0x7800))",
        "(__mmask32)0",
    ),
    Bug(
        "linear: the head's row is read with the zero of the first group",
        "linear_pack.cpp",
        "meaning = meaning_of(linear, row, column / linear.group);",
        "meaning.scale = meaning_of(linear, row, column / linear.group).scale;",
    ),
    Bug("linear: dynamic codes leave their range", "linear_rows.cpp", "127.0f / range", "128.5f / range"),
    Bug(
        "linear: inputs beyond K are read",
        "linear_rows.cpp",
        "column + i < inputs ? x[column + i] : 0.0f",
        "x[column + i]",
    ),
    Bug(
        "linear: the head's row is taken from the panel before",
        "linear_pack.cpp",
        "const int index = row / PANEL;",
        "const int index = row > PANEL ? row / PANEL - 1 : 0;",
    ),
    Bug("attention: the causal mask is off by one", "attention.cpp", "return {oldest, to + 1};", "return {oldest, to + 2};"),
    Bug("attention: the window is one longer", "attention.cpp", "from - layer_.window + 1", "from - layer_.window"),
    Bug(
        "attention: sums are not rescaled when the largest score grows",
        "attention.cpp",
        "sums[m] = fma(sums[m], splat(factors[m]), sum);",
        "sums[m] = sums[m] + sum;",
    ),
    Bug(
        "attention: a split takes the last one's weight",
        "attention.cpp",
        "__builtin_fmaf(part.weights[row], own, total.weights[row] * past)",
        "part.weights[row]",
    ),
    Bug(
        "attention: slots that were never written are read",
        "attention.cpp",
        "const bool whole = written >= (piece + 1) * PIECE;",
        "const bool whole = written >= 0;",
    ),
    Bug(
        "attention: the scales of int8 V are dropped",
        "attention_softmax.h",
        "if (v_scales) weight = weight * load(v_scales + key);",
        "",
    ),
    Bug("attention: all heads read the first's queries", "attention.cpp", "unit_.head * group_ + row % group_) * layer_.q_head", "row % group_) * layer_.q_head"),
    Bug("attention: the sink has no share", "attention.cpp", "__builtin_fmaf(weights, share, power(sink - most))", "weights * share"),
    Bug("decoder: rope turns the other way", "elementwise.h", "store(x + i, a * c - b * s);", "store(x + i, a * c + b * s);"),
    Bug("decoder: the norm's epsilon is forgotten", "elementwise.h", "squares / (float)n + norm.eps", "squares / (float)n"),
    Bug(
        "decoder: the norm leaves out what does not fill a vector",
        "elementwise.h",
        "for (; i < n; i++) rest += x[i] * x[i];",
        "",
    ),
    Bug(
        "decoder: heads are read before all threads have computed them",
        "decoder.cpp",
        "model_.hidden, rows);\n            });\n            team_.barrier();",
        "model_.hidden, rows);\n            });",
    ),
    Bug(
        "decoder: every product takes the rows of the first",
        "decoder.cpp",
        "if (i == 0 || !same_rows(linears[i - 1], linears[i])) {",
        "if (i == 0) {",
    ),
    Bug(
        "decoder: the wrong token's state is kept at the end",
        "decoder.cpp",
        "memcpy(space_.last_x + i * hidden, x + token * hidden,",
        "memcpy(space_.last_x + i * hidden, x + i * hidden,",
    ),
    Bug("sampling: top-p counts what top-k left out", "sampling.cpp", "top_p * kept.mass", "top_p * row.total"),
    Bug(
        "sampling: the draw ignores what was cut off",
        "sampling.cpp",
        "if (weight == 0.0f || weight < least) continue;",
        "if (weight == 0.0f) continue;",
    ),
)  # fmt: skip


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--list", action="store_true", help="names of the bugs, and whether their text is there"
    )
    parser.add_argument(
        "--only", nargs="+", default=[""], metavar="WORD", help="bugs whose names hold one of these"
    )
    parser.add_argument("--tests", nargs="+", default=["tests/cpu"], help="what pytest runs (tests/cpu)")
    arguments = parser.parse_args()
    bugs = [bug for bug in BUGS if any(word in bug.name for word in arguments.only)]
    stale = [bug for bug in bugs if bug.occurrences(ROOT / SOURCES) != 1]
    for bug in stale:
        print(f"STALE     {bug.name}: {bug.file} does not hold its text exactly once")
    if arguments.list:
        print("\n".join(bug.name for bug in bugs if bug not in stale))
        return 1 if stale else 0
    with tempfile.TemporaryDirectory(prefix="kvpage-bugs-") as folder:
        survivors = run(Path(folder), [bug for bug in bugs if bug not in stale], arguments.tests)
    print(f"{len(bugs) - len(stale) - survivors} caught, {survivors} survived, {len(stale)} stale")
    return 1 if survivors or stale else 0


def run(folder: Path, bugs: Sequence[Bug], tests: Sequence[str]) -> int:
    """Builds and tests each bug in ``folder``; the number of survivors."""
    shutil.copy(ROOT / "CMakeLists.txt", folder)
    shutil.copytree(ROOT / SOURCES, folder / SOURCES)
    build = folder / "build"
    command("cmake", "-S", str(folder), "-B", str(build), "-G", "Ninja")
    command("cmake", "--build", str(build))
    library = build / "libkvpage_cpu.so"
    verdict(library, tests, must_pass=True)
    survivors = 0
    for bug in bugs:
        original = bug.plant(folder / SOURCES)
        started = time.monotonic()
        command("cmake", "--build", str(build))
        built = time.monotonic()
        result = verdict(library, tests)
        survivors += result == "survived"
        print(
            f"{result:9} {bug.name} (built {built - started:.0f} s, tested {time.monotonic() - built:.0f} s)",
            flush=True,
        )
        (folder / SOURCES / bug.file).write_text(original, encoding="utf-8")
    return survivors


def verdict(library: Path, tests: Sequence[str], *, must_pass: bool = False) -> str:
    """How the tests end with this library: "survived", or how it was caught."""
    pytest = [
        sys.executable,
        "-m",
        "pytest",
        "-x",
        "-q",
        "--numprocesses=0",
        "-p",
        "no:cacheprovider",
        *tests,
    ]
    environment = {**os.environ, "KVPAGE_CPU_LIBRARY": str(library)}
    try:
        done = subprocess.run(
            pytest,
            cwd=ROOT,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
            timeout=HANGS_AFTER,
        )
    except subprocess.TimeoutExpired:
        return "hung"
    status = done.returncode
    if status > 1 or (must_pass and status):
        raise SystemExit(
            f"{done.stdout[-4000:]}{' '.join(pytest)} ended with status {status}: nothing can be proved"
        )
    return "survived" if status == 0 else "caught" if status == 1 else "crashed"


def command(*words: str) -> None:
    """Runs a command; what it printed is shown where it fails."""
    result = subprocess.run(words, capture_output=True, text=True, check=False)
    if result.returncode:
        raise SystemExit(f"{' '.join(words)} failed:\n{result.stdout}{result.stderr}")


if __name__ == "__main__":
    raise SystemExit(main())
