#!/usr/bin/env bash
# Compile the kernels ahead of time, into the package of the current folder. Usage: kernels.sh cpu|gpu VENV_DIR [ARGUMENT...]
# Arguments go to the compiler's front end, such as --arch 90a.
set -euo pipefail

target=${1:?usage: kernels.sh cpu|gpu VENV_DIR [ARGUMENT...]}
venv=${2:?usage: kernels.sh cpu|gpu VENV_DIR [ARGUMENT...]}
shift 2

case $target in
  cpu) module=steering_kernels.native_build ;;
  gpu) module=steering_kernels.cuda ;;
  *) printf 'kernels: %s is no target; known: cpu, gpu.\n' "$target" >&2 && exit 1 ;;
esac

if [ "$target" = gpu ] && ! command -v g++ >/dev/null; then
  # nvcc leaves the host's part to it.
  apt-get update -qq
  apt-get install -qq --yes --no-install-recommends g++
fi
# The package is imported from here: it is not installed yet.
PYTHONPATH=$PWD "$venv/bin/python" -m "$module" --build "$PWD/steering_kernels/lib" "$@"
