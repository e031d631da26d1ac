#!/usr/bin/env bash
# Build the wheel of the current folder. Usage: wheel.sh VENV_DIR OUT_DIR
set -euo pipefail

venv=${1:?usage: wheel.sh VENV_DIR OUT_DIR}
out=${2:?usage: wheel.sh VENV_DIR OUT_DIR}

# It holds compiled kernels, so it is for this platform only.
platform=$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_platform())')
"$venv/bin/python" -m pip --disable-pip-version-check wheel -qq --no-deps --no-build-isolation --no-index \
  --config-settings="--build-option=--plat-name=$platform" --wheel-dir "$out" .
