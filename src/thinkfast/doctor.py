"""What the package needs from the machine, whether it is there, and whether the whole road works on it."""

from __future__ import annotations

import importlib.metadata
import re
import shutil
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from thinkfast import runtime
from thinkfast.errors import BadInput

if TYPE_CHECKING:
    from thinkfast.engine.sampling import Sample

MARKS = {True: "ok", False: "NO", None: "--"}
LEAST_MEMORY = 2 * 2**30
LEAST_DISK = 2**30
TOKENS = 24
PROMPTS = ([1, 17, 42], [1, 60, 61, 62, 63, 64, 65])
TOLERANCE = 1e-3  # of a sum of TOKENS log-probabilities, float32 against float32 in another order


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the doctor's list; `ok` None is something that can be done without."""

    what: str
    ok: bool | None
    found: str


def examine() -> list[Finding]:
    """Python, libraries, memory, disk, bundled teacher, fast paths (the kernels are compiled when they are not yet),
    extras, and at the end the self-test."""
    versions = runtime.versions()
    memory, free = runtime.memory_bytes(), shutil.disk_usage(Path.cwd()).free
    teacher = runtime.ASSETS / "teacher" / "model.safetensors"
    return [
        Finding("python", sys.version_info >= (3, 11), versions["python"]),
        *(Finding(name, versions[name] != "not installed", versions[name]) for name in runtime.LIBRARIES),
        Finding("processor", True, f"{runtime.processor()}, {runtime.usable_cores()} cores for this process"),
        Finding("memory", memory is None or memory >= LEAST_MEMORY, _gib(memory)),
        Finding("free disk", free >= LEAST_DISK, f"{_gib(free)} under {Path.cwd()}"),
        Finding("bundled teacher", teacher.is_file(), str(teacher.parent) if teacher.is_file() else "missing"),
        _kernels(),
        _gpu(),
        *extras(),
        self_test(teacher.parent),
    ]


def extras() -> list[Finding]:
    """One line for each optional part of the installed package: on, or what is missing and how to get it."""
    try:
        required = importlib.metadata.requires("thinkfast") or []
    except importlib.metadata.PackageNotFoundError:
        return [Finding("extras", None, "unknown: thinkfast runs from its source and is not installed")]
    wanted: dict[str, list[str]] = {}
    for line in required:
        found = re.match(r"""([\w.-]+).*;.*\bextra\s*==\s*["']([\w-]+)["']""", line)
        if found and found[1] != "thinkfast":  # an extra within another has a line of its own
            wanted.setdefault(found[2], []).append(found[1])
    return [_extra(name, packages) for name, packages in wanted.items()]


def self_test(teacher: Path) -> Finding:
    """Converts `teacher` to a hybrid, saves it, loads it, and decodes a few tokens in the native and the torch backend,
    which must choose the same tokens. Takes a few seconds. One line says which step failed."""
    started, step = time.perf_counter(), "import"
    try:
        import torch

        from thinkfast.engine.engine import Engine
        from thinkfast.engine.sampling import SamplingParams
        from thinkfast.model.checkpoint import load_model, save_model
        from thinkfast.ops.cpu.build import BuildError, build
        from thinkfast.student.convert import convert
        from thinkfast.student.plan import LayerPlan

        step = "load the bundled teacher"
        model = load_model(teacher)
        step = "convert"
        student = convert(model, LayerPlan(attention=(1,)))
        with tempfile.TemporaryDirectory(prefix="thinkfast-") as folder:
            step = "save"
            save_model(student, Path(folder) / "student")
            step = "load what was saved"
            loaded = load_model(Path(folder) / "student")
        for name, tensor in student.state_dict().items():
            if not torch.equal(tensor, loaded.state_dict()[name]):
                raise BadInput(f"{name} is not what was saved")
        try:
            build()
            backends = ["torch", "native"]
        except BuildError:
            backends = ["torch"]
        drawn = {}
        for name in backends:
            step = f"decode in {name}"
            params = SamplingParams(max_tokens=TOKENS, temperature=0, ignore_eos=True)
            rows = Engine(loaded, 4, name, kv_dtype="float32").sample(PROMPTS, 1, params)
            drawn[name] = [row[0] for row in rows]
        step = "compare native with torch"
        for index, plain in enumerate(drawn["torch"]):
            fast = drawn[backends[-1]][index]
            if fast.token_ids != plain.token_ids or not abs(fast.logprob_sum - plain.logprob_sum) <= TOLERANCE:
                raise BadInput(f"prompt {index} gives {_shown(fast)} against {_shown(plain)}")
    except Exception as error:  # noqa: BLE001 - whatever it is, it is what the doctor is asked to tell
        words = " ".join(str(error).split()) or type(error).__name__
        return Finding("self-test", False, f"failed at '{step}': {words}")
    done = "native and torch agree" if len(backends) == 2 else "torch alone, there are no native kernels to compare"
    seconds = time.perf_counter() - started
    return Finding("self-test", True, f"converted, saved, loaded, decoded: {done} ({seconds:.1f} s)")


def _kernels() -> Finding:
    from thinkfast.ops.cpu.build import BuildError, build

    try:
        return Finding("native kernels", True, str(build()))
    except BuildError as error:
        return Finding("native kernels", False, f"{error}; decoding falls back to torch, which is slower")


def _gpu() -> Finding:
    import torch

    if torch.cuda.is_available():
        return _gpu_kernels(torch.cuda.get_device_name())
    if torch.version.cuda is None and torch.version.hip is None:
        return Finding("gpu", None, f"off: torch {torch.__version__} is built without CUDA")
    return Finding("gpu", None, "off: torch has CUDA but finds no device or no driver")


def _gpu_kernels(name: str) -> Finding:
    try:
        from thinkfast.ops.triton.check import check_step

        wrong = check_step(2, 4, 2, 16, 16, device="cuda")
    except Exception as error:  # noqa: BLE001 - a compiler or driver may fail in any way, and torch still decodes
        words = " ".join(str(error).split()) or type(error).__name__
        return Finding(
            "gpu", False, f"{name}; models on it decode in torch, which is slower: no Triton kernels: {words}"
        )
    return Finding("gpu", wrong < TOLERANCE, f"{name}; Triton kernels run, relative error {wrong:.1e}")


def _extra(name: str, packages: list[str]) -> Finding:
    missing = []
    for package in packages:
        try:
            importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            missing.append(package)
    if missing:
        return Finding(f"extra {name}", None, f"off: no {', '.join(missing)}; pip install 'thinkfast[{name}]'")
    return Finding(f"extra {name}", True, ", ".join(packages))


def _shown(sample: Sample) -> str:
    return f"{list(sample.token_ids)} ({sample.logprob_sum:.4f})"


def _gib(size: int | None) -> str:
    return "unknown" if size is None else f"{size / 2**30:.1f} GiB"
