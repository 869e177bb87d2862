#!/usr/bin/env bash
# Installs what is missing, then runs the linters, the type checker and the tests. Arguments go to pytest.
set -euo pipefail
cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."

unset PYTHONDONTWRITEBYTECODE # the tests start hundreds of processes, and each would compile torch and transformers
bash scripts/setup.sh
bash scripts/setup_browser.sh
.venv/bin/ruff check .
.venv/bin/ruff format --check .
.venv/bin/mypy
# Two workers of one thread each: the tests' models are too small for more.
OMP_NUM_THREADS=1 .venv/bin/python -m pytest -n 2 "$@"
