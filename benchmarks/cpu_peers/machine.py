"""What the machine is, who uses it, and the worker processes that take turns on it. Linux only: it reads /proc."""

from __future__ import annotations

import json
import os
import platform
import select
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

QUIET = 0.06
"""Share of the machine's time that others may use while a run counts as undisturbed."""
FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8")
TICKS = os.sysconf("SC_CLK_TCK")
CORES = os.cpu_count() or 1


def describe() -> dict[str, Any]:
    """Processor, cores, instruction sets, memory and kernel."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    values = dict(line.replace("\t", "").split(":", 1) for line in lines if ":" in line)
    flags = values.get("flags", values.get("Features", "")).split()
    return {
        "processor": values.get("model name", platform.machine()).strip(),
        "cores": CORES,
        "flags": [flag for flag in FLAGS if flag in flags],
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "kernel": platform.release(),
    }


def processes(root: int) -> list[int]:
    """A process and all that descend from it."""
    found = [root]
    for process in found:
        for children in Path(f"/proc/{process}/task").glob("*/children"):
            try:
                found += map(int, children.read_text(encoding="ascii").split())
            except OSError:
                continue  # a thread that has ended meanwhile
    return found


def processor_seconds(root: int) -> float:
    """Processor time that a process, its descendants and the children it waited for have used."""
    total = 0
    for process in processes(root):
        try:
            fields = Path(f"/proc/{process}/stat").read_text(encoding="utf-8").rsplit(")", 1)[1].split()
        except OSError:
            continue
        total += sum(map(int, fields[11:15]))
    return total / TICKS


def machine_seconds() -> float:
    """Processor time that everybody has used since boot, what was stolen from a virtual machine included."""
    user, nice, system, _idle, _waiting, *rest = map(
        int, Path("/proc/stat").read_text(encoding="ascii").split("\n", 1)[0].split()[1:9]
    )
    return (user + nice + system + sum(rest)) / TICKS


class Guard:
    """The share of the machine's time that processes other than this one and its descendants use."""

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        """Count from now."""
        self._moment, self._all, self._own = (
            time.monotonic(),
            machine_seconds(),
            processor_seconds(os.getpid()),
        )

    def foreign(self) -> float:
        """0..1 since the last restart."""
        seconds = max(time.monotonic() - self._moment, 1e-9)
        used = (machine_seconds() - self._all) - (processor_seconds(os.getpid()) - self._own)
        return max(0.0, used / (seconds * CORES))

    def wait_until_quiet(self, most: float) -> None:
        """Return when others have left the machine alone for a second, or after ``most`` seconds."""
        until = time.monotonic() + most
        while time.monotonic() < until:
            self.restart()
            time.sleep(1.0)
            if self.foreign() < QUIET:
                return


class WorkerError(RuntimeError):
    """A worker ended, took too long, or said that it could not do what it was asked."""


class Worker:
    """A process that answers one JSON line with another, and is stopped (SIGSTOP) while it is not asked.

    Stopped, not only waiting: the thread pools of some engines spin for long, some for ever.
    """

    def __init__(
        self, command: Sequence[str], environment: Mapping[str, str], log: BinaryIO, patience: float
    ) -> None:
        self.started_at = time.monotonic()
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            env={**os.environ, **environment},
            start_new_session=True,
        )
        self._patience = patience
        self._rest = b""
        try:
            self.hello = self._answer()
        except WorkerError:
            self.close()
            raise
        self._signal(signal.SIGSTOP)

    def ask(self, message: Any) -> dict[str, Any]:
        """Wake the process up, send a line, wait for its answer, stop it again."""
        assert self._process.stdin is not None
        self._signal(signal.SIGCONT)
        try:
            self._process.stdin.write(json.dumps(message).encode() + b"\n")
            self._process.stdin.flush()
            answer = self._answer()
        except BrokenPipeError as error:
            raise WorkerError("the process ended; see its log") from error
        finally:
            self._signal(signal.SIGSTOP)
        if "error" in answer:
            raise WorkerError(answer["error"])
        return answer

    @property
    def process_id(self) -> int:
        """Of the process, which leads a group of its own."""
        return self._process.pid

    def peak_memory(self) -> int:
        """Bytes that were resident at most (VmHWM, files mapped included), the sum over descendants."""
        total = 0
        for process in processes(self._process.pid):
            try:
                status = Path(f"/proc/{process}/status").read_text(encoding="utf-8")
            except OSError:
                continue
            total += sum(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM"))
        return total * 1024

    def close(self) -> None:
        """End the process and its descendants."""
        self._signal(signal.SIGKILL)
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout):
            assert stream is not None
            try:
                stream.close()
            except BrokenPipeError:
                continue  # what was left to be written has no reader any more

    def _signal(self, number: int) -> None:
        try:
            os.killpg(self._process.pid, number)
        except ProcessLookupError:
            return  # it has ended; the next read says so

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        until = time.monotonic() + self._patience
        descriptor = self._process.stdout.fileno()
        while b"\n" not in self._rest:
            ready, _, _ = select.select([descriptor], [], [], max(0.0, until - time.monotonic()))
            if not ready:
                raise WorkerError(f"no answer within {self._patience:g} s")
            piece = os.read(descriptor, 65536)
            if not piece:
                raise WorkerError("the process ended; see its log")
            self._rest += piece
        line, self._rest = self._rest.split(b"\n", 1)
        found: dict[str, Any] = json.loads(line)
        return found
