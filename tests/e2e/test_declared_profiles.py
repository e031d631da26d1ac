"""A server whose profiles a file declares: not ready before they are so, and following the file."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from waiting import wait_until

from artifacts.bundle import Bundle
from server.client import SteeringClientError

pytestmark = pytest.mark.engine

QUESTION = "What is 7 plus 5?"


def test_a_declared_server(
    start_operated: Any, tmp_path: Path, bundle_files: dict[str, Path], bundles: dict[str, Bundle]
) -> None:
    root, file = tmp_path / "root", tmp_path / "bundles.yaml"
    root.mkdir()
    careful = {"digest": bundles["careful"].digest, "source": "root:careful.safetensors"}

    def declare(**profiles: dict[str, Any]) -> None:
        temporary = file.with_suffix(".new")
        temporary.write_text(json.dumps({"schema": 1, "profiles": profiles}))
        temporary.replace(file)

    declare(medical=careful | {"strength": 0.0})
    flags = ("--steering-declaration", str(file), "--steering-bundle-root", str(root))
    with start_operated("declared", *flags, "--api-server-count", "2") as (server, admin, _):
        # Each new connection may reach another of the processes.
        def get(path: str) -> Any:
            return server.client.get(path, headers={"connection": "close"})

        answer = wait_until(
            lambda: (found := get("/health/ready")).status_code == 503 and "1 of 1" in found.text and found
        )
        assert answer.json()["status"] == "unavailable"
        assert "medical" not in answer.text, "anybody may ask this"
        assert get("/health/live").status_code == 200
        wait_until(lambda: server.metric("steering_declaration_applied") == 0)

        shutil.copyfile(bundle_files["careful"], root / "careful.safetensors")
        wait_until(lambda: all(get("/health/ready").status_code == 200 for _ in range(8)))
        wait_until(lambda: server.metric("steering_declaration_applied") == 1)
        status = admin.status().declaration
        assert status is not None
        assert (status.file, status.is_applied, status.problems) == (str(file), True, {})
        assert "13" in server.chat(QUESTION, steering_profile="medical")["choices"][0]["message"]["content"]

        declare(medical=careful | {"strength": 0.5})
        wait_until(lambda: admin.profile("medical").strength == 0.5)
        wait_until(lambda: server.chat(QUESTION, steering_profile="medical")["steering"]["strength"] == 0.5)
        assert "12" in server.chat(QUESTION, steering_profile="medical")["choices"][0]["message"]["content"]

        for change in (lambda: admin.rollback("medical"), lambda: admin.delete_profile("medical")):
            with pytest.raises(SteeringClientError) as refusal:
                change()
            assert (refusal.value.status, refusal.value.code) == (409, "steering_conflict")
        assert admin.audit().entries[0].outcome == "refused"

        file.write_text("no declaration")
        wait_until(lambda: admin.status().declaration.problems)  # type: ignore[union-attr]
        assert all(get("/health/ready").status_code == 200 for _ in range(8)), "it serves what it has"
        wait_until(lambda: server.metric("steering_declaration_applied") == 0)
        assert server.chat(QUESTION, steering_profile="medical")["steering"]["strength"] == 0.5

        declare()
        wait_until(lambda: not admin.profiles())
