"""Requests made up from the server's own schema: right, nearly right and wrong ones never make it fail."""

import hypothesis
import pytest
import schemathesis
from hypothesis import HealthCheck

from deepseek_vl2.serve.api.app import create_app
from deepseek_vl2.serve.api.service import ChatService
from deepseek_vl2.serve.api.settings import ServerSettings

NUM_EXAMPLES = 15


@pytest.fixture(scope="module")
def schema(nano):
    service = ChatService(nano, ServerSettings())
    yield schemathesis.openapi.from_asgi("/openapi.json", create_app(service))
    service.close()


@pytest.mark.parametrize("mode", list(schemathesis.GenerationMode))
def test_no_request_makes_the_server_fail(schema, mode):
    operations = {operation.ok().label: operation.ok() for operation in schema.get_all_operations()}
    assert "POST /v1/chat/completions" in operations
    assert len(operations) == 5
    statuses = set()
    if mode is schemathesis.GenerationMode.NEGATIVE:  # the others have nothing that could be wrong
        operations = {label: operations[label] for label in ("POST /v1/chat/completions",)}
    for operation in operations.values():
        run(operation, mode, statuses)
    assert {200, 404} <= statuses if mode is schemathesis.GenerationMode.POSITIVE else 400 in statuses
    assert max(statuses) < 500


def run(operation, mode, statuses):
    @hypothesis.settings(
        max_examples=NUM_EXAMPLES,
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    @hypothesis.given(case=operation.as_strategy(generation_mode=mode))
    def ask(case):
        if isinstance(case.body, dict) and "messages" in case.body:
            # Else nearly all would end at the unknown model, or take long.
            case.body |= {"model": "nano", "max_tokens": 2, "max_completion_tokens": 2}
        response = case.call()
        assert response.status_code < 500, response.text
        statuses.add(response.status_code)
        if response.status_code >= 400:
            assert set(response.json()["error"]) == {"message", "type", "param", "code"}

    ask()
