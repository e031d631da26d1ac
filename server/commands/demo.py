"""`expertsteer demo [-- FLAG ...]`: serve the embedded lab model with its bundle and show what the profile does."""

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
import urllib.error
import urllib.request
from importlib.resources import files
from pathlib import Path
from typing import IO, Any

HELP = "Serve the embedded lab model with its bundle and show three answers: off, on, negated."

_MODEL, _PROFILE, _QUESTION = "lab", "careful", "What is 7 plus 5?"
_START_TIMEOUT_S = 600
# Longer than `serve` waits for running requests unless told otherwise.
_KEY_VARIABLES = ("VLLM_API_KEY", "EXPERTSTEER_ADMIN_KEY")
# What the command has to know itself to ask its questions; `--ssl` stands for all flags that begin so.
_OWN_FLAGS = ("--host", "--port", "--served-model-name", "--uds", "--ssl")
# The server is on this machine, so a proxy of the environment would not find it.
_DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))
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
    parser.add_argument(
        "--show-log",
        action="store_true",
        help="Show the server's log on standard error rather than keep it in a file, as containers want it.",
    )
    parser.add_argument(
        "serve_flags",
        nargs="*",
        metavar="FLAG",
        help="Flags for `expertsteer serve`, behind `--`, such as -- --steering-registry DIR.",
    )


def run(args: argparse.Namespace) -> int:
    """Start the server, show the answers, then serve until Ctrl-C."""
    for flag in args.serve_flags:
        name = flag.partition("=")[0]
        if _is_own(name.replace("_", "-")):
            return _fail(f"{name} cannot stand behind --; the demo takes --host and --port before it.")
    with contextlib.closing(socket.socket()) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((args.host, args.port))
        except (OSError, OverflowError) as error:
            return _fail(f"cannot listen on {args.host}:{args.port} ({error}); choose another --port.")
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    # An address that means "all" is none to send to.
    url = f"http://{'127.0.0.1' if args.host == '0.0.0.0' else args.host}:{args.port}"
    with _log(args) as log:
        command = [sys.executable, "-m", "server.cli", "serve", *serve_arguments(args)]
        server = subprocess.Popen(command, stdout=log, stderr=log, env=_ENVIRONMENT | os.environ)
    try:
        if not _wait_until_ready(server, url):
            if args.show_log:
                return _fail("the server did not start; its log is above.")
            print("\n".join(Path(log.name).read_text(errors="replace").splitlines()[-20:]), file=sys.stderr)
            return _fail(f"the server did not start; its log is {log.name}.")
        _show(url)
        if args.exit:
            return 0
        print(f"\nServing at {url} until Ctrl-C." + ("" if args.show_log else f" Log: {log.name}"), flush=True)
        return server.wait()
    except KeyboardInterrupt:
        return 0
    finally:
        _stop(server)


def _log(args: argparse.Namespace) -> IO[bytes]:
    if args.show_log:
        return os.fdopen(os.dup(sys.stderr.fileno()), "wb")
    return tempfile.NamedTemporaryFile(prefix="expertsteer-demo-", suffix=".log", delete=False)


def _is_own(flag: str) -> bool:
    """Whether a flag is one of the demo's, or an abbreviation of one, as `serve` takes them."""
    return flag.startswith(_OWN_FLAGS) or (len(flag) > len("--") and any(own.startswith(flag) for own in _OWN_FLAGS))


def serve_arguments(args: argparse.Namespace) -> list[str]:
    """What the demo says to `expertsteer serve`.

    Args:
        args: of the demo.
    """
    lab = files("artifacts") / "lab"
    return [
        *(str(lab / "models" / "target"), "--served-model-name", _MODEL),
        *("--steering-bundle", str(lab / f"{_PROFILE}.safetensors")),
        *("--host", args.host, "--port", str(args.port), "--dtype", "float32", "--max-model-len", "256"),
        *([] if args.compile else ["--enforce-eager"]),
        *args.serve_flags,
    ]


def _wait_until_ready(server: subprocess.Popen[bytes], url: str) -> bool:
    started, shown = time.monotonic(), sys.stderr.isatty()
    while server.poll() is None and (elapsed := time.monotonic() - started) < _START_TIMEOUT_S:
        with contextlib.suppress(OSError), _DIRECT.open(f"{url}/health", timeout=5):
            if shown:
                print("\r\033[K", end="", file=sys.stderr)
            return True
        if shown:
            print(f"\rStarting vLLM with the lab model, {elapsed:.0f} s ", end="", file=sys.stderr, flush=True)
        time.sleep(0.5)
    return False


def _show(url: str) -> None:
    body = json.dumps(_body(_PROFILE))
    print(f"ExpertSteer demo at {url}  (interactive reference: {url}/docs)\n")
    print(f"curl {url}/v1/chat/completions -H 'content-type: application/json' \\\n  -d '{body}'\n")
    print(_QUESTION)
    try:
        default = _ask(url, _PROFILE)
        negated = {"name": _PROFILE, "strength": -default["steering"]["strength"]}
        for label, answer in (("off", _ask(url, None)), ("on", default), ("negated", _ask(url, negated))):
            receipt = answer.get("steering")
            shown = f"   [{receipt['tokens_steered']} tokens at strength {receipt['strength']:g}]" if receipt else ""
            print(f"  {label:8} {answer['choices'][0]['message']['content']}{shown}")
    except urllib.error.HTTPError as error:
        # Keys of a file, or a registry whose profile is gone: the server runs as it was told to.
        print(f"  not asked: the server answers {error.code}, {error.read().decode(errors='replace')}")
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
        headers={"content-type": "application/json"} | _credentials(),
    )
    with _DIRECT.open(request, timeout=60) as response:
        answer: dict[str, Any] = json.load(response)
    return answer


def _credentials() -> dict[str, str]:
    key = next((os.environ[name] for name in _KEY_VARIABLES if os.environ.get(name)), None)
    return {} if key is None else {"authorization": f"Bearer {key}"}


def _stop(server: subprocess.Popen[bytes]) -> None:
    if server.poll() is None:
        # Told twice, this process still waits.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        server.send_signal(signal.SIGTERM)
        try:
            # It bounds its own end, by --shutdown-timeout; whoever cannot wait for that presses Ctrl-C again.
            server.wait()
        except KeyboardInterrupt:
            server.kill()


def _fail(message: str) -> int:
    print(f"expertsteer demo: {message}", file=sys.stderr)
    return 1
