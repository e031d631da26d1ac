#!/usr/bin/env bash
# Libraries of the system that Python packages need and the base image lacks. Usage: system.sh cpu|gpu
set -euo pipefail

target=${1:?usage: system.sh cpu|gpu}

if [ "$target" = cpu ]; then
  # vLLM's CPU kernels are linked against it.
  apt-get update -qq
  apt-get install -qq --yes --no-install-recommends libnuma1
  rm -rf /var/lib/apt/lists/*
fi
