#!/usr/bin/env bash
# What a CUDA machine must show, in under 9 minutes: the tests of formulas on CUDA tensors, then check_gpu.py.
# It has Python 3.12, torch and transformers, and needs no package index and no vLLM.
#
#   scripts/check_gpu.sh --wheels FOLDER   where there is an index: download what such a machine may lack
#   scripts/check_gpu.sh [FOLDER]          on the machine: install what is missing from FOLDER, beside its own packages
#   scripts/check_gpu.sh --tiny            without a GPU: the same code with tiny models and one file of tests
#
# The results are in $OUT, or else in runs/check_gpu. PYTHON names the interpreter.
set -euo pipefail
cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."

python=${PYTHON:-python3}
out=${OUT:-runs/check_gpu}
largest=$((64 * 2 ** 20)) # bytes of wheels
tests=(tests/test_{distributions,scores,losses,classes,policies,heads,head_loss,distill}.py)
device=cuda on=cuda workers=4 options=()
if [[ ${1-} == --tiny ]]; then
  tests=(tests/test_distributions.py)
  device=cpu on=elsewhere workers=0 options=(--tiny)
  shift
fi

# The requirements of sekd and its tests that Python lacks, or all of them, without what comes with such a machine.
list_requirements() {
  "$python" - "$@" <<'EOF'
import re
import sys
import tomllib
from importlib.metadata import distributions

with open("pyproject.toml", "rb") as file:
    project = tomllib.load(file)["project"]
needs = ["dill<0.4.2", "multiprocess<0.70.20", "xxhash"]  # of datasets
needs += ["execnet", "iniconfig", "pluggy", "sortedcontainers", "wadler-lindig"]  # of the tests
unused = {"torch", "transformers", "mypy", "ruff", "selenium", "types-PyYAML", "types-tqdm"}
own = {re.sub(r"[-_.]+", "-", found.name).lower() for found in distributions()} if sys.argv[1] == "missing" else set()
for requirement in [*project["dependencies"], *project["optional-dependencies"]["dev"], *needs]:
    name = re.match(r"[\w-]+", requirement)[0]
    if name not in unused and name.lower() not in own:
        print(requirement)
EOF
}

if [[ ${1-} == --wheels ]]; then
  mapfile -t requirements < <(list_requirements all)
  "$python" -m pip download --no-deps --only-binary=:all: --python-version 3.12 --dest "$2" "${requirements[@]}"
  size=$(cat "$2"/*.whl | wc -c)
  echo "check_gpu: $(find "$2" -name '*.whl' | wc -l) wheels, $((size / 2 ** 10)) KiB of $((largest / 2 ** 10))"
  exit $((size > largest))
fi

SECONDS=0
site=$(mktemp -d)
trap 'rm -rf "$site"' EXIT
mkdir -p "$out"
export PYTHONPATH=$PWD:$site HF_HUB_OFFLINE=1
mapfile -t missing < <(list_requirements missing)
if ((${#missing[@]})); then
  echo "check_gpu: missing: ${missing[*]}"
  "$python" -m pip install --quiet --no-index --no-deps --no-compile --find-links "${1:?name the folder of wheels}" \
    --target "$site" "${missing[@]}"
fi

result=PASS
SEKD_TEST_DEVICE=$on timeout 200 "$python" -m pytest -p no:cacheprovider -n "$workers" "${tests[@]}" 2>&1 |
  tee "$out/tests.txt" || result=FAIL
timeout 300 "$python" scripts/check_gpu.py --device "$device" --output_dir "$out" "${options[@]}" || result=FAIL
echo "check_gpu: $result in $SECONDS s"
[[ $result == PASS ]]
