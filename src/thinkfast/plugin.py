"""Makes `lm_eval --model thinkfast` known to evaluation harnesses that look for no plug-ins themselves, and is the
command `thinkfast-lm-eval`.

Newer harnesses find the model by the entry point `lm_eval.models` and need none of this. Released ones (0.4.13 is the
newest) load nothing from other packages, but they load torch, and torch calls the entry points `torch.backends` of all
installed packages. `TORCH_DEVICE_BACKEND_AUTOLOAD=0` turns that off.
"""

from __future__ import annotations

import importlib
import sys

NAME, MODEL = "thinkfast", "thinkfast.harness:ThinkfastLM"


def register() -> None:
    """In a process of the harness, puts the model in its registry by name, without importing it; does nothing in any
    other. It must not fail whatever harness is there: torch could not be imported then."""
    if "lm_eval" not in sys.modules:
        return
    try:
        importlib.import_module("lm_eval.models")  # the registry fills itself only while it is empty
        registry = importlib.import_module("lm_eval.api.registry").model_registry
    except (ImportError, AttributeError):
        return  # older than 0.4.10: another registry
    if NAME not in registry:
        registry.register(NAME, target=MODEL)


def main() -> None:
    """`thinkfast-lm-eval`: `harness.main`; without the harness one line and status 2."""
    try:
        harness = importlib.import_module("thinkfast.harness")
    except ModuleNotFoundError as error:
        missing = (error.name or "lm_eval").split(".")[0]
        print(f"thinkfast: {missing} is not installed: pip install 'thinkfast[eval]'", file=sys.stderr)
        sys.exit(2)
    harness.main()
