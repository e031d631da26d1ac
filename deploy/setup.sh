#!/usr/bin/env bash
# Make a virtual environment with everything that `make demo` and `make test` need on a machine without a GPU.
# Usage: deploy/setup.sh VENV_DIR   (run from the repository root; PYTHON selects the interpreter)
set -euo pipefail

venv=${1:?usage: deploy/setup.sh VENV_DIR}
python=${PYTHON:-python3}
needed_mib=6144

fail() {
  printf 'setup: %s\n' "$*" >&2
  exit 1
}

command -v "$python" >/dev/null || fail "$python not found; install Python 3.11, 3.12 or 3.13, or set PYTHON."
"$python" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' ||
  fail "$("$python" --version) is not supported; install Python 3.11, 3.12 or 3.13, or set PYTHON."
"$python" -c 'import venv, ensurepip' 2>/dev/null ||
  fail "$python has no venv module; install it (Debian and Ubuntu: python3-venv)."
[ "$(uname -s)-$(uname -m)" = Linux-x86_64 ] ||
  fail "The pinned CPU build is for Linux on x86-64, this is $(uname -s) on $(uname -m); see 'Without a container' in deploy/README.md."
command -v g++ >/dev/null || fail "g++ not found; torch.compile needs a C++ compiler (Debian and Ubuntu: g++)."
free_mib=$(df -Pm . | awk 'NR == 2 { print $4 }')
[ "$free_mib" -ge "$needed_mib" ] || fail "$free_mib MiB of disk are free here, $needed_mib are needed."

echo "setup: creating $venv (about 4 GB, a few minutes)"
PYTHON=$python deploy/requirements/environment.sh cpu "$venv" test.lock
"$venv/bin/python" -m pip --disable-pip-version-check install -qq --no-deps --no-build-isolation --editable .
echo "setup: done"
