"""The log record of a steered request."""

import logging
from collections.abc import Iterator
from typing import Any, cast

import pytest

from artifacts.manifest import Scope
from server import request_log
from server.engine.steering import Steering
from server.profiles import Profile, Resolved, ResolvedTerm
from server.registry.records import ProfileSettings


def resolve(*names: str) -> Resolved:
    settings = [ProfileSettings(f"sha256:{name}", 1.0, 2.0, Scope.ALL, None, (), None, "") for name in names]
    terms = [
        ResolvedTerm(Profile(name, cast(Any, None), each), -0.5, Scope.ALL)
        for name, each in zip(names, settings, strict=True)
    ]
    return Resolved(tuple(terms), Steering("steer-1", ()))


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    """Records that the logger emits, wherever its parents send theirs."""
    level = request_log.logger.level
    request_log.logger.addHandler(caplog.handler)
    yield caplog
    request_log.logger.removeHandler(caplog.handler)
    request_log.logger.setLevel(level)


def record_of(log: pytest.LogCaptureFixture) -> logging.LogRecord:
    found = {id(record): record for record in log.records}
    (record,) = found.values()
    return record


def test_text_and_fields(log: pytest.LogCaptureFixture) -> None:
    request_log.enable(True)
    request_log.log_request(resolve("a", "b"), "ok", {"x": [5, 1, 5, 2], "y": [5, 1, 5, 2]}, "req-9", 0.25)
    record = record_of(log)
    assert record.name == "vllm.expertsteer.requests"
    assert record.levelno == logging.INFO
    assert record.getMessage() == (
        "Steered request request_id=req-9 steering_id=steer-1 profile=a,b bundle=sha256:a,sha256:b strength=-0.5,-0.5 "
        "scope=all,all prompt_tokens=20 generation_tokens=6 outcome=ok duration_s=0.25"
    )
    fields = vars(record)
    assert (fields["request_id"], fields["profile"], fields["bundle"]) == ("req-9", "a,b", "sha256:a,sha256:b")
    assert (fields["prompt_tokens"], fields["generation_tokens"], fields["duration_s"]) == (20, 6, 0.25)


def test_nothing_when_off(log: pytest.LogCaptureFixture) -> None:
    request_log.enable(False)
    request_log.log_request(resolve("a"), "ok", {}, None, 0.0)
    assert not log.records


def test_a_request_without_id(log: pytest.LogCaptureFixture) -> None:
    request_log.enable(True)
    request_log.log_request(resolve("a"), "aborted", {}, None, 0.0)
    message = record_of(log).getMessage()
    assert "request_id=- " in message
    assert "prompt_tokens=0 generation_tokens=0 outcome=aborted" in message


@pytest.mark.parametrize(
    ("request_id", "shown"),
    [
        ("a b", '"a b"'),
        ('say "x"', '"say \\"x\\""'),
        ("x\r\nERROR forged=1", '"x\\r\\nERROR forged=1"'),
        ("\x1b[31m\x00\x7f", '"\\x1b[31m\\x00\\x7f"'),
        ("\u202eevil\u2028", '"\\u202eevil\\u2028"'),
        ("a=b", '"a=b"'),
        ("", '""'),
        ("%s%d", "%s%d"),
        ("naïve", "naïve"),
    ],
)
def test_text_of_users_stays_one_value_on_one_line(log: pytest.LogCaptureFixture, request_id: str, shown: str) -> None:
    request_log.enable(True)
    request_log.log_request(resolve("a"), "ok", {}, request_id, 0.0)
    message = record_of(log).getMessage()
    assert f"request_id={shown} steering_id=" in message
    assert message.isprintable()
