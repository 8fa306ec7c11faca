"""Requests made from the server's own OpenAPI document: none of them breaks it."""

import pytest
from hypothesis import HealthCheck, settings

schemathesis = pytest.importorskip("schemathesis", reason="schemathesis is not installed")

schema = schemathesis.pytest.from_fixture("document")


@pytest.fixture(scope="session")
def document(address):
    return schemathesis.openapi.from_url(f"{address}/openapi.json")


@schema.parametrize()
@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
def test_no_request_breaks_the_server(case):
    if isinstance(case.body, dict) and case.body.get("model") and case.operation.method == "post":
        # Half of the time a model that is there, so that requests get further than its name.
        case.body["model"] = "talker" if len(case.body["model"]) % 2 else case.body["model"]
        if isinstance(case.body.get("time_budget"), int | float):
            case.body["time_budget"] = min(case.body["time_budget"], 0.2)
        else:
            case.body["max_tokens"] = case.body.get("max_tokens") or 5
    answer = case.call(timeout=60)
    case.validate_response(answer, checks=[schemathesis.checks.not_a_server_error])
    if answer.status_code >= 400:
        assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
