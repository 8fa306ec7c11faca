"""The machine: what it is, which versions run on it, seeds and threads."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import random
import shlex
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

import thinkfast

LIBRARIES = ("torch", "numpy", "safetensors", "tokenizers", "pydantic", "pyarrow", "math-verify", "matplotlib")
ASSETS = Path(__file__).parent / "assets"


def seed_everything(seed: int) -> None:
    """Seeds Python, numpy and torch; everything else in the package takes an explicit seed."""
    import numpy
    import torch

    random.seed(seed)
    numpy.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def usable_cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def memory_bytes() -> int | None:
    """Main memory in bytes, None where the system does not say."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None


@cache
def processor() -> str:
    """The processor's name as the system gives it."""
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(errors="replace").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def machine() -> dict[str, object]:
    """What a figure depends on: processor, cores, memory, system. No host or user name."""
    return {
        "processor": processor(),
        "cores": usable_cores(),
        "memory_bytes": memory_bytes(),
        "system": f"{platform.system()} {platform.machine()}",
    }


def versions() -> dict[str, str]:
    """Python and the libraries of `LIBRARIES`, without importing them."""
    found = {"python": platform.python_version()}
    for name in LIBRARIES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


@cache
def code_version() -> str:
    """The package's version, with the commit and a '+' for uncommitted changes when it runs from a git checkout."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists() or shutil.which("git") is None:
        return thinkfast.__version__
    described = subprocess.run(
        ["git", "-C", str(root), "describe", "--always", "--dirty=+", "--exclude", "*"],
        capture_output=True,
        text=True,
        timeout=20,
        check=False,
    )
    commit = described.stdout.strip()
    return f"{thinkfast.__version__} ({commit})" if described.returncode == 0 and commit else thinkfast.__version__


def command() -> str:
    """The command line of this process as a shell takes it: a program on the PATH by its name alone, the package as
    `thinkfast`, any other script with the interpreter and its path from the working directory."""
    program = Path(sys.argv[0])
    if program.name == "__main__.py":
        words = [program.absolute().parent.name]
    elif program.suffix == ".py":
        words = ["python", os.path.relpath(program)]
    else:
        words = [program.name]
    return shlex.join([*words, *sys.argv[1:]])
