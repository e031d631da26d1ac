#!/usr/bin/env bash
# Make a virtual environment with everything that `make demo` and `make test` need on a machine without a GPU.
# Usage: deploy/setup.sh VENV_DIR   (run from the repository root; PYTHON selects the interpreter)
set -euo pipefail

venv=${1:?usage: deploy/setup.sh VENV_DIR}
python=${PYTHON:-python3}
torch_version=2.13.0+cpu
torch_cpu_index=https://download.pytorch.org/whl/cpu
needed_mib=6144

fail() {
  printf 'setup: %s\n' "$*" >&2
  exit 1
}

command -v "$python" >/dev/null || fail "$python not found; install Python 3.11 or newer, or set PYTHON."
"$python" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' ||
  fail "$("$python" --version) is not supported; install Python 3.11, 3.12 or 3.13, or set PYTHON."
"$python" -c 'import venv, ensurepip' 2>/dev/null ||
  fail "$python has no venv module; install it (Debian and Ubuntu: python3-venv)."
[ "$(uname -s)-$(uname -m)" = Linux-x86_64 ] ||
  fail "The pinned CPU build is for Linux on x86-64, this is $(uname -s) on $(uname -m); see README, own environment."
command -v g++ >/dev/null || fail "g++ not found; torch.compile needs a C++ compiler (Debian and Ubuntu: g++)."
free_mib=$(df -Pm . | awk 'NR == 2 { print $4 }')
[ "$free_mib" -ge "$needed_mib" ] || fail "$free_mib MiB of disk are free here, $needed_mib are needed."

echo "setup: creating $venv (about 4 GB, a few minutes)"
"$python" -m venv --clear "$venv"
pip=("$venv/bin/python" -m pip --disable-pip-version-check)

# A CPU build that the machine's own pip configuration offers comes first, PyTorch's CPU index second. The exact local
# version keeps pip from taking the CUDA build, which is several gigabytes larger.
echo "setup: installing torch $torch_version"
"${pip[@]}" install -qq --no-deps "torch==$torch_version" 2>/dev/null ||
  "${pip[@]}" install -qq --no-deps "torch==$torch_version" --index-url "$torch_cpu_index" ||
  fail "torch $torch_version was found neither in pip's configured places nor at $torch_cpu_index."

echo "setup: installing the locked packages"
"${pip[@]}" install -qq --no-deps --requirement deploy/requirements/cpu.lock ||
  fail "A locked package could not be installed; the message above says which."
"${pip[@]}" install -qq --no-deps --no-build-isolation --editable .
echo "setup: done"
