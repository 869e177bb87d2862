#!/usr/bin/env bash
# `sekd serve` of a checkout: serves a student for rollouts with vLLM's own server, in a terminal of its own.
#   bash scripts/serve_student.sh STUDENT --max-model-len 768 [--port 8000] [more options of vLLM's server]
# `bash scripts/serve_student.sh --help` says more.
set -euo pipefail
root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)

python=$root/.venv/bin/python
[[ -x $python ]] || python=python3
PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH} exec "$python" -m sekd.cli serve "$@"
