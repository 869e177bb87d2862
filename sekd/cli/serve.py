"""``sekd serve``."""

import argparse
import errno
import importlib.util
import os
import shutil
import socket
import subprocess
import sys
import sysconfig
from collections.abc import Mapping, Sequence

from sekd.cli.common import WrongInput

DESCRIPTION = """\
Serve a student for rollouts with vLLM's own server. Run it in a separate terminal. It works on a CPU too.

Further options go to vLLM's server. For a LoRA student add --enable-lora --max-lora-rank 32: then only its adapter is
sent, otherwise merged weights. The trainer sends weights as files, so both must see the run's output_dir.

The server listens on this machine only, because whoever reaches it can replace its weights. --host 0.0.0.0 opens it to
a network that you trust.

examples:
  sekd serve Qwen/Qwen3-1.7B --max-model-len 768
  sekd serve Qwen/Qwen3-1.7B --max-model-len 768 --port 8001 --enable-lora --max-lora-rank 32
"""
DEFAULTS = {
    "VLLM_MAX_STOP_STRINGS": "64",
    "VLLM_LOGGING_LEVEL": "WARNING",
}
CPU_DEFAULTS = {
    "VLLM_USE_AOT_COMPILE": "0",  # what it saves cannot be loaded on a CPU
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
}
ALWAYS = {"VLLM_SERVER_DEV_MODE": "1", "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.usage = f"{parser.prog} STUDENT --max-model-len N [options of vLLM's server]"
    parser.description = DESCRIPTION
    parser.add_argument("student", metavar="STUDENT", help="folder or hub id of the student")
    parser.add_argument(
        "options",
        nargs=argparse.REMAINDER,
        metavar="--max-model-len N",
        help="max_prompt_length + max_completion_length of the recipe; needed on a CPU",
    )


def run(options: argparse.Namespace) -> int:
    if importlib.util.find_spec("vllm") is None:
        raise WrongInput(
            'vLLM is not installed: run `bash scripts/setup.sh` (or `pip install "sekd[vllm]"` on a CUDA machine)'
        )
    on_cpu = not has_gpu()
    if on_cpu and not any(option.startswith("--max-model-len") for option in options.options):
        raise WrongInput("on a CPU add --max-model-len: max_prompt_length + max_completion_length")
    command = build_command(options.student, options.options, on_cpu)
    check_port(read_option(options.options, "host", "127.0.0.1"), read_option(options.options, "port", "8000"))
    print(
        "Add to the recipe:\n"
        f"  model_name_or_path: {options.student}\n"
        "  rollout_engine: vllm_server\n"
        f"  rollout_server_urls: [http://127.0.0.1:{read_option(options.options, 'port', '8000')}]",
        flush=True,
    )
    # The server replaces this process, so signals reach it.
    os.execve(command[0], command, build_environment(os.environ, on_cpu))


def build_command(student: str, options: Sequence[str], on_cpu: bool) -> list[str]:
    """The command line of vLLM's server. The user's options come last, so they replace ours."""
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", student, "--host", "127.0.0.1"]
    if on_cpu:
        from sekd.hardware import choose_dtype

        # Where vLLM splits a prompt it rewinds the request's generator, which works on a GPU only.
        command += ["--no-enable-chunked-prefill", "--max-num-batched-tokens", "8192", "--dtype", choose_dtype(on_cpu)]
        command += ["--block-size", "32"]  # as in rollouts/vllm_setup.py
        if not can_compile():
            command += ["--enforce-eager"]
    return [*command, *options]


def build_environment(environment: Mapping[str, str], on_cpu: bool) -> dict[str, str]:
    """The server's environment. The user's values replace the defaults, unless they are empty."""
    defaults = DEFAULTS | (CPU_DEFAULTS if on_cpu else {})
    return {**environment, **{name: environment.get(name) or value for name, value in defaults.items()}, **ALWAYS}


def read_option(options: Sequence[str], name: str, default: str) -> str:
    """The value of the last ``--name`` among the options, or the server's default."""
    value = default
    for place, option in enumerate(options):
        if option == f"--{name}":
            value = "".join(options[place + 1 : place + 2])
        elif option.startswith(f"--{name}="):
            value = option.removeprefix(f"--{name}=")
    return value


def check_port(host: str, port: str) -> None:
    """Check that no other program listens on the port, before vLLM loads the student.

    Raises:
        WrongInput: it is in use. Other errors are left to vLLM, which knows its options.
    """
    if not port.isdigit() or int(port) > 65535:
        return
    try:
        ((family, *_, address), *_) = socket.getaddrinfo(host, int(port), type=socket.SOCK_STREAM)
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as vLLM: a port just closed is free
            probe.bind(address)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise WrongInput(
                f"port {port} of {host} is in use; stop the program that listens there, or choose another: --port"
            ) from error


def has_gpu() -> bool:
    """Whether nvidia-smi lists a GPU."""
    if shutil.which("nvidia-smi") is None:
        return False
    listing = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False)
    return any(line.startswith("GPU ") for line in listing.stdout.splitlines())


def can_compile() -> bool:
    """Whether a C++ compiler and Python's headers are installed, for vLLM to compile the model on a CPU."""
    header = os.path.join(sysconfig.get_path("include"), "Python.h")
    return os.path.isfile(header) and shutil.which(os.environ.get("CXX", "g++")) is not None
