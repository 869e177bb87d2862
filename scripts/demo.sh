#!/usr/bin/env bash
# Installs what is missing, then runs the demo. Arguments go to `sekd demo`.
set -euo pipefail
root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)

unset PYTHONDONTWRITEBYTECODE # or each start would compile torch and transformers again, for 10 to 30 s
bash "$root/scripts/setup.sh"
# The caller's folder stays the current one, so that relative paths among the arguments mean what they say.
exec "$root/.venv/bin/sekd" demo "$@"
