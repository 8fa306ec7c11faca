"""What the package needs from the machine, and whether it is there."""

from __future__ import annotations

import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

from thinkfast import runtime

LEAST_MEMORY = 2 * 2**30
LEAST_DISK = 2**30


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the doctor's list."""

    what: str
    ok: bool
    found: str


def examine() -> list[Finding]:
    """Python, libraries, native kernels (compiled on the spot when they are not yet), memory, disk, bundled teacher."""
    versions = runtime.versions()
    memory, free = runtime.memory_bytes(), shutil.disk_usage(Path.cwd()).free
    teacher = runtime.ASSETS / "teacher" / "model.safetensors"
    return [
        Finding("python", sys.version_info >= (3, 11), versions["python"]),
        *(Finding(name, versions[name] != "not installed", versions[name]) for name in runtime.LIBRARIES),
        _kernels(),
        Finding("processor", True, f"{runtime.processor()}, {runtime.usable_cores()} cores for this process"),
        Finding("memory", memory is None or memory >= LEAST_MEMORY, _gib(memory)),
        Finding("free disk", free >= LEAST_DISK, f"{_gib(free)} under {Path.cwd()}"),
        Finding("bundled teacher", teacher.is_file(), str(teacher.parent) if teacher.is_file() else "missing"),
    ]


def _kernels() -> Finding:
    from thinkfast.ops.cpu.build import BuildError, build

    try:
        return Finding("native kernels", True, str(build()))
    except BuildError as error:
        return Finding("native kernels", False, f"{error}; decoding falls back to torch, which is slower")


def _gib(size: int | None) -> str:
    return "unknown" if size is None else f"{size / 2**30:.1f} GiB"
