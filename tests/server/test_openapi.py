"""Whatever our own OpenAPI description allows, and what it does not: answers are as described, and never a 5xx."""

from __future__ import annotations

from pathlib import Path

import pytest
import schemathesis
from hypothesis import HealthCheck, settings
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import response_schema_conformance
from serving import serving
from tiny_models import write_tiny_model

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def described(tmp_path_factory: pytest.TempPathFactory) -> schemathesis.BaseSchema:
    folder = tmp_path_factory.mktemp("openapi")
    model = write_tiny_model(folder / "tiny.gguf")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_STATE_HOME", str(folder))
        with serving(Path(model), n_ctx=512) as server:
            yield schemathesis.openapi.from_url(f"{server.url}/openapi.json")


schema = schemathesis.pytest.from_fixture("described")


@schema.parametrize()
@settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
def test_every_request_is_answered(case: schemathesis.Case) -> None:
    if isinstance(case.body, dict):  # what is generated may be long
        for name in ("max_tokens", "max_completion_tokens", "max_output_tokens"):
            if case.body.get(name):
                case.body[name] = 4
        if case.path == "/v1/responses":
            case.body.setdefault("max_output_tokens", 4)
        if case.path == "/v1/chat/completions":
            case.body.setdefault("max_tokens", 4)
    case.call_and_validate(checks=[not_a_server_error, response_schema_conformance], timeout=60)
