#!/usr/bin/env bash
# Serves a student for rollouts with vLLM's own server, in a terminal of its own; on a CPU too.
#   bash scripts/serve_student.sh STUDENT --max-model-len 768 [--port 8000] [more options of vLLM's server]
# For a LoRA student add --enable-lora --max-lora-rank 32: then its adapter alone is sent, else merged weights.
# It listens on this machine only, since whoever reaches it can replace its weights; --host 0.0.0.0 opens it to a
# network that you trust. The trainer sends weights as files, so both must see the run's output_dir.
set -euo pipefail

if (($# == 0)); then
  sed -n '2,6s/^# //p' "${BASH_SOURCE[0]}" >&2
  exit 2
fi
student=$1
shift
port=8000
arguments=("$@")
for ((i = 0; i < $#; i++)); do
  case ${arguments[i]} in
    --port) port=${arguments[i + 1]:-} ;;
    --port=*) port=${arguments[i]#*=} ;;
  esac
done
python=$(dirname -- "${BASH_SOURCE[0]}")/../.venv/bin/python
[[ -x $python ]] || python=python3

options=()
if ! nvidia-smi -L 2>/dev/null | grep '^GPU ' >/dev/null; then
  if [[ " $* " != *" --max-model-len"* ]]; then
    echo "serve_student.sh: on a CPU add --max-model-len: max_prompt_length + max_completion_length" >&2
    exit 2
  fi
  # Where vLLM cuts a prompt in two it rewinds the request's generator, which only a GPU's can.
  options+=(--no-enable-chunked-prefill --max-num-batched-tokens 8192 --dtype bfloat16)
  header=$("$python" -c 'import sysconfig; print(sysconfig.get_path("include"))')/Python.h
  [[ -f $header ]] && command -v "${CXX-g++}" >/dev/null || options+=(--enforce-eager) # nothing to compile with
  export VLLM_USE_AOT_COMPILE=${VLLM_USE_AOT_COMPILE:-0} # what it saves is of no use on a CPU: it does not load
  export VLLM_CPU_KVCACHE_SPACE=${VLLM_CPU_KVCACHE_SPACE:-1} VLLM_CPU_OMP_THREADS_BIND=${VLLM_CPU_OMP_THREADS_BIND:-nobind}
fi
export VLLM_SERVER_DEV_MODE=1 VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 VLLM_MAX_STOP_STRINGS=${VLLM_MAX_STOP_STRINGS:-64}
export VLLM_LOGGING_LEVEL=${VLLM_LOGGING_LEVEL:-WARNING}

cat <<LINES
Add to the recipe:
  model_name_or_path: $student
  rollout_engine: vllm_server
  rollout_server_urls: [http://127.0.0.1:$port]
LINES
exec "$python" -m vllm.entrypoints.openai.api_server --model "$student" --host 127.0.0.1 "${options[@]}" "$@"
