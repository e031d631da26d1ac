"""What the server's own parser makes of the arguments that deploy/ writes."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dockerfile import REPOSITORY

_SCRIPT = Path(__file__).with_name("parse_arguments.py")
_TIMEOUT_S = 400


def parsed_flags(commands: Sequence[Sequence[str]]) -> list[dict[str, Any]]:
    """Flags of each command, by name; `refused` alone where the parser does not take it.

    Args:
        commands: arguments of `expertsteer`, from the name of its command on.
    """
    done = subprocess.run(
        [sys.executable, _SCRIPT],
        input=json.dumps(commands),
        cwd=REPOSITORY,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        timeout=_TIMEOUT_S,
    )
    assert done.returncode == 0, done.stderr
    # vLLM may write lines of its own before.
    found: list[dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
    return found
