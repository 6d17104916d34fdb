"""Whatever our own OpenAPI description allows, and what it does not: answers are as described, and never a 5xx."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from programs import TinyModel
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import response_schema_conformance
from serving import Serving, serving

pytestmark = pytest.mark.filterwarnings("ignore")
_BOUNDS = ("max_tokens", "max_completion_tokens", "max_output_tokens")


@pytest.fixture(scope="module")
def server(tiny_model: TinyModel) -> Iterator[Serving]:
    with serving(tiny_model(), n_ctx=512, on_disk=False) as server:
        yield server


@pytest.mark.parametrize("mode", [GenerationMode.POSITIVE, GenerationMode.NEGATIVE])
def test_every_request_is_answered(server: Serving, mode: GenerationMode) -> None:
    schema = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
    paths = set()
    for found in schema.get_all_operations():
        operation = found.ok()
        if mode is GenerationMode.NEGATIVE and not (operation.body or operation.query):
            continue  # nothing can be wrong with it
        paths.add(operation.path)

        @given(case=operation.as_strategy(generation_mode=mode))
        @settings(
            max_examples=5,
            deadline=None,
            database=None,
            derandomize=True,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        def check(case: schemathesis.Case) -> None:
            if isinstance(case.body, dict):  # answers need not be long
                for name in _BOUNDS:
                    if isinstance(case.body.get(name), int) and case.body[name] > 4:
                        case.body[name] = 4
                if case.path in ("/v1/chat/completions", "/v1/responses"):
                    case.body.setdefault("max_output_tokens" if "responses" in case.path else "max_tokens", 4)
            case.call_and_validate(checks=[not_a_server_error, response_schema_conformance], timeout=60)

        check()
    assert {"/v1/chat/completions", "/v1/messages", "/v1/responses"} <= paths
