"""The self-test finds what is broken; the list tells what is there."""

import importlib.metadata
from pathlib import Path

import pytest

from thinkfast import doctor, runtime
from thinkfast.cli import main
from thinkfast.doctor import examine, extras, self_test
from thinkfast.engine import backends
from thinkfast.model.decoder import Decoder

TEACHER = runtime.ASSETS / "teacher"


def test_the_self_test_passes_and_is_quick(tiny_teacher: Path) -> None:
    finding = self_test(TEACHER)
    assert finding.ok, finding.found
    assert "native and torch agree" in finding.found
    assert float(finding.found.rsplit("(", 1)[1].split(" s")[0]) < 10
    assert self_test(tiny_teacher).ok


def test_the_self_test_names_a_broken_teacher(tmp_path: Path) -> None:
    finding = self_test(tmp_path / "none")
    assert finding.ok is False
    assert finding.found.startswith(f"failed at 'load the bundled teacher': {tmp_path}/none: ")


def test_the_self_test_sees_kernels_that_compute_something_else(monkeypatch: pytest.MonkeyPatch) -> None:
    class Wrong(backends.NativeBackend):
        def __init__(self, model: Decoder, kv_dtype: str, weights: str) -> None:
            model.layers[0].mixer.A_log.data += 1.0  # type: ignore[union-attr,operator]
            super().__init__(model, kv_dtype, weights)

    monkeypatch.setattr(backends, "NativeBackend", Wrong)
    finding = self_test(TEACHER)
    assert finding.ok is False
    assert finding.found.startswith("failed at 'compare native with torch': prompt 0 gives [")
    assert "\n" not in finding.found


def test_without_a_compiler_torch_is_tested_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CXX", str(tmp_path / "no-compiler"))
    finding = self_test(TEACHER)
    assert finding.ok
    assert "torch alone" in finding.found


def test_a_failed_self_test_is_status_1(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def broken(teacher: Path) -> doctor.Finding:
        return doctor.Finding("self-test", False, f"failed at 'save': no room for {teacher.name}")

    monkeypatch.setattr(doctor, "self_test", broken)
    assert main(["doctor"]) == 1
    assert capsys.readouterr().out.splitlines()[-1] == "NO  self-test       failed at 'save': no room for teacher"


def test_extras_are_on_or_say_how_to_get_them(monkeypatch: pytest.MonkeyPatch) -> None:
    required = [
        "numpy>=2",
        'pytest>=9; extra == "dev"',
        'thinkfast[fancy]; extra == "dev"',
        "no-such-package>=1; extra == 'fancy'",
    ]
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: required)
    on, off = extras()
    assert (on.what, on.ok, on.found) == ("extra dev", True, "pytest")
    assert (off.what, off.ok) == ("extra fancy", None)
    assert off.found == "off: no no-such-package; pip install 'thinkfast[fancy]'"


def test_what_can_be_done_without_is_no_failure() -> None:
    findings = {finding.what: finding for finding in examine()}
    assert findings["gpu"].ok is not False
    assert findings["gpu"].found
    assert list(findings)[-1] == "self-test"
