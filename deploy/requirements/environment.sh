#!/usr/bin/env bash
# Make a virtual environment and install the locked packages. Usage: environment.sh cpu|gpu VENV_DIR [FURTHER_LOCK...]
# cpu: everything is installed. gpu: the interpreter has vLLM with CUDA already, and what it lacks is added.
# PYTHON selects the interpreter.
set -euo pipefail

target=${1:?usage: environment.sh cpu|gpu VENV_DIR [FURTHER_LOCK...]}
venv=${2:?usage: environment.sh cpu|gpu VENV_DIR [FURTHER_LOCK...]}
shift 2
python=${PYTHON:-python3}
torch_version=2.13.0+cpu
torch_cpu_index=https://download.pytorch.org/whl/cpu
locks=$(cd "$(dirname "$0")" && pwd)
pip=("$venv/bin/python" -m pip --disable-pip-version-check)

fail() {
  printf 'setup: %s\n' "$*" >&2
  exit 1
}

case $target in
  cpu)
    "$python" -m venv --clear "$venv"
    # A CPU build that the machine's own pip configuration offers comes first, PyTorch's CPU index second. The exact
    # local version keeps pip from taking the CUDA build, which is several gigabytes larger.
    echo "setup: installing torch $torch_version"
    "${pip[@]}" install -qq --no-deps "torch==$torch_version" 2>/dev/null ||
      "${pip[@]}" install -qq --no-deps "torch==$torch_version" --index-url "$torch_cpu_index" ||
      fail "torch $torch_version was found neither in pip's configured places nor at $torch_cpu_index."
    ;;
  gpu)
    "$python" -m venv --clear --system-site-packages "$venv"
    ;;
  *)
    fail "$target is no target; known: cpu, gpu."
    ;;
esac

requirements=(--requirement "$locks/$target.lock")
for lock in "$@"; do
  requirements+=(--requirement "$locks/$lock")
done
echo "setup: installing the locked packages"
"${pip[@]}" install -qq --no-deps "${requirements[@]}" ||
  fail "A locked package could not be installed; the message above says which."
