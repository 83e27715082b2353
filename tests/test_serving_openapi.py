"""The service's own OpenAPI description: complete, and true under schemathesis."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.generate_command import folder
from helpers.serving import running_server

from ascendspeed.inference.serving import openapi
from ascendspeed.inference.serving.app import Routes

__all__ = ["folder"]

CHECKS = (
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_schema_conformance",
    "negative_data_rejection",
)


def test_every_path_is_described():
    document = openapi.describe("1", has_key=True)
    routes = {route.path: route.methods for route in Routes(None, "1", True).table()}
    undescribed = {"/metrics", "/", openapi.PATH}
    assert document["paths"].keys() == routes.keys() - undescribed
    for path, operations in document["paths"].items():
        assert {method.upper() for method in operations} == routes[path] - {"HEAD"}
        for operation in operations.values():
            assert ("security" in operation) == (path != "/health")
    fields = document["components"]["schemas"]["ChatCompletionRequest"]
    assert fields["additionalProperties"] is False
    assert {"messages", "temperature", "user"} <= fields["properties"].keys()
    json.dumps(document)


@pytest.mark.slow
def test_schemathesis(folder, tmp_path):
    flags = ["--cache-memory", "0.01", "--block-size", "16", "--max-model-len", "96", "--max-queue", "200"]
    with running_server(folder, tmp_path, *flags, "--served-model-name", "tiny") as server:
        command = [str(Path(sys.executable).with_name("schemathesis")), "run", f"{server.url}/openapi.json"]
        command += ["--checks", ",".join(CHECKS), "--max-examples", "40", "--seed", "1", "--no-color"]
        command += ["--phases", "examples,coverage,fuzzing", "--generation-deterministic"]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=1500)
        assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
        assert json.loads(server.get("/health")) == {"status": "ok"}
        assert server.metric("kv_cache_usage_perc") == 0
