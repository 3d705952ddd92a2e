#!/usr/bin/env bash
# Runs the suite with a given torch, in an environment of its own: tests/compat.sh 2.14.1 [arguments of pytest]
set -euo pipefail
cd "$(dirname "$0")/.."
version=${1:?which torch? For example: tests/compat.sh 2.14.1}
shift
environment=$(mktemp -d)
trap 'rm -rf "$environment"' EXIT
python3 -m venv "$environment"
export PATH="$environment/bin:$PATH" PIP_DISABLE_PIP_VERSION_CHECK=1
python -m pip install --quiet "torch==$version"
python -m pip install --quiet -e '.[test]'
python -c 'import torch; print("torch", torch.__version__)'
python -m pytest "$@"
