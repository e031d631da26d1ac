"""`expertsteer demo`: serve the embedded lab model with its bundle and show what the profile does."""

import argparse
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from importlib.resources import files
from pathlib import Path
from typing import Any

HELP = "Serve the embedded lab model with its bundle and show three answers: off, on, negated."

_MODEL, _PROFILE, _QUESTION = "lab", "careful", "What is 7 plus 5?"
_START_TIMEOUT_S = 600
_STOP_TIMEOUT_S = 20
# What a CPU start needs; a value that the user has set wins. The model is local, so nothing is looked up anywhere.
_ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_NUM_OF_RESERVED_CPU": "0",
    "VLLM_NO_USAGE_STATS": "1",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags."""
    parser.add_argument("--host", default="127.0.0.1", help="Address to listen on (default: %(default)s).")
    parser.add_argument("--port", type=int, default=8000, help="Port to listen on (default: %(default)s).")
    parser.add_argument(
        "--compile",
        action="store_true",
        help="Compile the model, as `serve` does by default: starts later, runs faster.",
    )
    parser.add_argument("--exit", action="store_true", help="Stop after the three answers.")


def run(args: argparse.Namespace) -> int:
    """Start the server, show the answers, then serve until Ctrl-C."""
    with contextlib.closing(socket.socket()) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((args.host, args.port))
        except OSError as error:
            return _fail(f"cannot listen on {args.host}:{args.port} ({error.strerror}); choose another --port.")
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    log_path = Path(tempfile.mkstemp(prefix="expertsteer-demo-", suffix=".log")[1])
    url = f"http://{args.host}:{args.port}"
    with log_path.open("wb") as log:
        server = subprocess.Popen(_command(args), stdout=log, stderr=log, env=_ENVIRONMENT | os.environ)
    try:
        if not _wait_until_ready(server, url):
            print("\n".join(log_path.read_text(errors="replace").splitlines()[-20:]), file=sys.stderr)
            return _fail(f"the server did not start; its log is {log_path}.")
        _show(url)
        if args.exit:
            return 0
        print(f"\nServing at {url} until Ctrl-C. Log: {log_path}", flush=True)
        return server.wait()
    except KeyboardInterrupt:
        return 0
    finally:
        _stop(server)


def _command(args: argparse.Namespace) -> list[str]:
    lab = files("artifacts") / "lab"
    return [
        *(sys.executable, "-m", "server.cli", "serve", str(lab / "models" / "target")),
        *("--served-model-name", _MODEL, "--steering-bundle", str(lab / f"{_PROFILE}.safetensors")),
        *("--host", args.host, "--port", str(args.port), "--dtype", "float32", "--max-model-len", "256"),
        *([] if args.compile else ["--enforce-eager"]),
    ]


def _wait_until_ready(server: subprocess.Popen[bytes], url: str) -> bool:
    started, shown = time.monotonic(), sys.stderr.isatty()
    while server.poll() is None and (elapsed := time.monotonic() - started) < _START_TIMEOUT_S:
        with contextlib.suppress(OSError), urllib.request.urlopen(f"{url}/health", timeout=5):
            if shown:
                print("\r\033[K", end="", file=sys.stderr)
            return True
        if shown:
            print(f"\rStarting vLLM with the lab model, {elapsed:.0f} s ", end="", file=sys.stderr, flush=True)
        time.sleep(0.5)
    return False


def _show(url: str) -> None:
    default = _ask(url, _PROFILE)
    strength = default["steering"]["strength"]
    negated = _ask(url, {"name": _PROFILE, "strength": -strength})
    body = json.dumps(_body(_PROFILE))
    print(f"ExpertSteer demo at {url}  (interactive reference: {url}/docs)\n")
    print(f"curl {url}/v1/chat/completions -H 'content-type: application/json' \\\n  -d '{body}'\n")
    print(_QUESTION)
    for label, answer in (("off", _ask(url, None)), ("on", default), ("negated", negated)):
        receipt = answer.get("steering")
        shown = f"   [{receipt['tokens_steered']} tokens at strength {receipt['strength']:g}]" if receipt else ""
        print(f"  {label:8} {answer['choices'][0]['message']['content']}{shown}")
    sys.stdout.flush()


def _body(profile: Any) -> dict[str, Any]:
    body: dict[str, Any] = {
        "model": _MODEL,
        "messages": [{"role": "user", "content": _QUESTION}],
        "temperature": 0,
    }
    return body if profile is None else {**body, "steering_profile": profile}


def _ask(url: str, profile: Any) -> dict[str, Any]:
    request = urllib.request.Request(
        f"{url}/v1/chat/completions",
        data=json.dumps(_body(profile)).encode(),
        headers={"content-type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=60) as response:
        answer: dict[str, Any] = json.load(response)
    return answer


def _stop(server: subprocess.Popen[bytes]) -> None:
    if server.poll() is None:
        server.send_signal(signal.SIGTERM)
        try:
            server.wait(_STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            server.kill()


def _fail(message: str) -> int:
    print(f"expertsteer demo: {message}", file=sys.stderr)
    return 1
