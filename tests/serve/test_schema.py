"""Requests made from the server's own OpenAPI document, such as keep to it and such as do not: none breaks it."""

import importlib
import pkgutil
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings

schemathesis = pytest.importorskip(
    "schemathesis", reason="schemathesis is not installed: the extra dev, with `make test`"
)
# It imports much of itself late, and pytest parses what it imports. CPython 3.11 counts the depth of parsing for all
# threads together: a server that formats a traceback at that moment would break the import. No server runs yet.
for _name in ("core", "engine", "generation", "openapi", "specs.openapi", "transport"):
    _part = importlib.import_module(f"schemathesis.{_name}")
    for _module in pkgutil.walk_packages(_part.__path__, f"{_part.__name__}."):
        importlib.import_module(_module.name)

ASKING = ["/v1/chat/completions", "/v1/completions"]
PLACES = [*ASKING, "/v1/models", "/health", "/ready", "/metrics"]
MODES = {"keeps": schemathesis.GenerationMode.POSITIVE, "breaks": schemathesis.GenerationMode.NEGATIVE}


@pytest.fixture(scope="module")
def schema(address: str) -> Any:
    return schemathesis.openapi.from_url(f"{address}/openapi.json")


def test_the_document_names_every_place(schema: Any) -> None:
    assert set(schema.raw_schema["paths"]) == set(PLACES)


@pytest.mark.parametrize(
    ("place", "mode"), [*((place, "keeps") for place in PLACES), *((place, "breaks") for place in ASKING)]
)
def test_no_request_breaks_the_server(schema: Any, place: str, mode: str) -> None:
    asks = place in ASKING
    operation = schema[place]["POST" if asks else "GET"]
    seen = set()

    @settings(max_examples=150 if asks else 5, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(operation.as_strategy(generation_mode=MODES[mode]))
    def ask(case: Any) -> None:
        if isinstance(case.body, dict):
            if isinstance(case.body.get("model"), str):
                case.body["model"] = "talker"  # so that requests get further than this name
            if isinstance(case.body.get("time_budget"), int | float):
                case.body["time_budget"] = min(case.body["time_budget"], 0.1)
            elif isinstance(case.body.get("max_tokens"), int):
                case.body["max_tokens"] = min(case.body["max_tokens"], 5)
        answer = case.call(timeout=60)
        seen.add(answer.status_code)
        case.validate_response(answer, checks=[schemathesis.checks.not_a_server_error])
        if answer.status_code >= 400:
            assert set(answer.json()["error"]) == {"message", "type", "param", "code"}

    ask()
    assert (200 if mode == "keeps" else 400) in seen
