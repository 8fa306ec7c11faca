"""Compiles the kernels beside this file into the user's cache directory, once a compiler, machine and source."""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

SOURCE = Path(__file__).parent
FLAGS = ("-std=c++17", "-O3", "-fPIC", "-shared", "-pthread", "-fno-math-errno", "-fno-trapping-math", "-Wno-psabi")
TUNING = (("-march=native",), ("-mcpu=native",), ())


class BuildError(RuntimeError):
    """There is no working C++ compiler, or the kernels do not compile with it."""


def cache_directory() -> Path:
    """`$XDG_CACHE_HOME/thinkfast`, by default `~/.cache/thinkfast`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "thinkfast"


def find_compiler() -> str:
    """`$CXX`, else the first of c++, g++, clang++ on the path. Raises BuildError where there is none."""
    wanted = [os.environ["CXX"]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]
    for name in wanted:
        path = shutil.which(name)
        if path:
            return path
    raise BuildError(f"no C++ compiler: looked for {', '.join(wanted)}")


def build(name: str = "decode") -> Path:
    """Path of the library compiled from `name`.cpp. Raises BuildError with the compiler's last words."""
    compiler = find_compiler()
    sources = [*sorted(SOURCE.glob("*.h")), SOURCE / f"{name}.cpp"]
    digest = hashlib.blake2b(digest_size=12)
    for text in (_run([compiler, "--version"]), _processor(), *FLAGS, *(path.read_text() for path in sources)):
        digest.update(text.encode() + b"\0")
    target = cache_directory() / f"{name}-{digest.hexdigest()}.so"
    if not target.exists():
        _compile(compiler, SOURCE / f"{name}.cpp", target)
    return target


def _compile(compiler: str, source: Path, target: Path) -> None:
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        # Processes that compile at the same time each rename a whole file into place.
        with tempfile.TemporaryDirectory(dir=target.parent) as folder:
            made = Path(folder) / target.name
            for tuning in TUNING:
                try:
                    _run([compiler, *FLAGS, *tuning, str(source), "-o", str(made)])
                    break
                except BuildError:
                    if not tuning:
                        raise
            made.replace(target)
    except OSError as error:
        raise BuildError(f"cannot write {target}: {error}") from error


def _run(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BuildError(f"{command[0]} does not run: {error}") from error
    if done.returncode:
        words = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        errors = [line for line in words if "error" in line]
        raise BuildError(f"{command[0]} failed: {(errors or words)[0]}")
    return done.stdout


def _processor() -> str:
    """Names the instruction set that `native` stands for, so that a cache on a shared disk serves many machines."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.lower().startswith(("flags", "features")):
                return line
    return f"{platform.machine()} {platform.processor()}"
