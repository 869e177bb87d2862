#!/usr/bin/env bash
# Runs the benchmarks that have aims, and prints their figures beside the aims.
#
#   bash scripts/bench_all.sh STUDENT TEACHER 'text/*.jsonl' [OUT [NAME...]]
#
# OUT (runs/bench) gets a JSON file and a log of each benchmark. The names are step, peers, costs, rollouts, 3x, cache and
# demo; all by default. Those that are not named keep their figures of before. One that fails is named at once, and has
# no figures; the exit status is 1 then. Nothing else should run on the machine meanwhile.
set -euo pipefail
if (($# < 3)); then
    sed -n '2,8s/^# \{0,1\}//p' "$0" >&2
    exit 2
fi
unset PYTHONDONTWRITEBYTECODE # or each benchmark would compile its imports again
root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
python=$root/.venv/bin/python
[[ -x $python ]] || python=python3
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}
student=$1 teacher=$2 text=$3 out=${4:-runs/bench}
known=" step peers costs rollouts 3x cache demo "
names=" ${*:5} "
failed=0
for name in ${names}; do
    [[ $known == *" $name "* ]] || { echo "bench_all: no benchmark $name; the names are$known" >&2 && exit 2; }
done
mkdir -p "$out"

measure() { # NAME COMMAND...: runs the command, if the name is wanted
    local name=$1
    shift
    [[ $names == "  " || $names == *" $name "* ]] || return 0
    echo "$name"
    if [[ -e $out/$name.json ]]; then rm -rf "$out/$name" "$out/$name.json"; fi # one that was stopped goes on
    "$@" >"$out/$name.log" 2>&1 && return
    echo "failed: $out/$name.log: $(grep -aE '^[A-Za-z_.]*(Error|error|Exception):' "$out/$name.log" | tail -n 1 || true)"
    failed=1
}

bench() { # NAME ARGUMENTS...: runs bench_NAME.py
    measure "$1" "$python" "$root/scripts/bench_$1.py" "${@:2}" --json "$out/$1.json"
}

demo() {
    local started=$SECONDS row='{"name": "demo", "figures": {"seconds": %d}}'
    "$python" -m sekd.cli demo --output_dir "$out/demo" || return
    printf '{"title": "sekd demo", "rows": ['"$row"']}\n' $((SECONDS - started)) >"$out/demo.json"
}

bench step "$student" "$teacher"
bench peers "$student" "$teacher"
bench costs --output_dir "$out/costs"
bench rollouts "$student" "$teacher" "$text"
bench 3x "$student" "$teacher" "$text" --output_dir "$out/3x"
bench cache "$student" "$teacher" "$text"
measure demo demo

"$python" "$root/scripts/bench_table.py" "$out"
exit "$failed"
