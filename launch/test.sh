#!/usr/bin/env bash
# Lint and tests in an environment of their own, <clone>/.venv.
#
#   bash launch/test.sh                                  # everything, as CI runs it
#   bash launch/test.sh tests/config_test.py -k refuses  # arguments go to pytest; -n 0 runs in one process
#   PYTHON=python3.12 bash launch/test.sh
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
# shellcheck source=launch/environment.sh
source "$root/launch/environment.sh"

cd "$root"
make_environment "$root" "$root/requirements-dev.txt"
"$venv_python" -m ruff check .
"$venv_python" -m ruff format --check .
# A file stays on one worker, so that its tests share what they compiled.
JAX_PLATFORMS="${JAX_PLATFORMS:-cpu}" exec "$venv_python" -m pytest -n 2 --dist loadfile "$@"
