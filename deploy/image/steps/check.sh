#!/usr/bin/env bash
# Fail where something that the server needs is missing. Usage: check.sh cpu|gpu VENV_DIR
set -euo pipefail

target=${1:?usage: check.sh cpu|gpu VENV_DIR}
venv=${2:?usage: check.sh cpu|gpu VENV_DIR}
steps=$(cd "$(dirname "$0")" && pwd)

# The same way as in the image: by the console script, from a folder without sources.
cd /
export PYTHONSAFEPATH=1 PYTHONDONTWRITEBYTECODE=1
case $target in
  cpu) wanted=(cpu s3 signing) ;;
  # How vLLM and torch are put together is the business of those who made the base image.
  gpu) wanted=(cuda s3 signing --trust vllm --trust torch) ;;
  *) printf 'check: %s is no target; known: cpu, gpu.\n' "$target" >&2 && exit 1 ;;
esac
"$venv/bin/python" "$steps/../closure.py" "${wanted[@]}"
"$venv/bin/python" "$steps/../kernel_check.py" "$target"
"$venv/bin/expertsteer" --version
