#!/usr/bin/env bash
# Install the wheel and nothing else, then take the installer away. Usage: install.sh VENV_DIR WHEEL_DIR
set -euo pipefail

venv=${1:?usage: install.sh VENV_DIR WHEEL_DIR}
wheels=${2:?usage: install.sh VENV_DIR WHEEL_DIR}
pip=("$venv/bin/python" -m pip --disable-pip-version-check --no-cache-dir)

"${pip[@]}" install -qq --no-deps --no-index "$wheels"/expertsteer-*.whl
# An image changes by a new build only.
"${pip[@]}" uninstall -qq --yes pip
