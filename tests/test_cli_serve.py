"""`sekd serve` becomes vLLM's server with the options that rollouts need."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from sekd.cli import main, serve

SCRIPT = Path(__file__).parents[1] / "scripts" / "serve_student.sh"


class Replaced(Exception):
    """This process would be vLLM's server now."""


@pytest.fixture
def started(monkeypatch):
    """The command lines and environments that would have taken the place of this process."""
    calls = []
    for name in [name for name in os.environ if name.startswith("VLLM_")]:
        monkeypatch.delenv(name)

    def execve(path, command, environment):
        calls.append((command, environment))
        raise Replaced

    monkeypatch.setattr(os, "execve", execve)
    monkeypatch.setattr(serve.importlib.util, "find_spec", lambda name: name)
    return calls


def run(started, *arguments):
    with pytest.raises(Replaced):
        main(["serve", "folder/student", *arguments])
    return started[-1]


def test_on_a_cpu(started, monkeypatch, capsys):
    monkeypatch.setattr(serve, "has_gpu", lambda: False)
    monkeypatch.setattr(serve, "can_compile", lambda: False)
    monkeypatch.setattr("sekd.hardware.choose_dtype", lambda on_cpu: "float32" if on_cpu else "bfloat16")
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "4")
    monkeypatch.setenv("VLLM_MAX_STOP_STRINGS", "")
    command, environment = run(started, "--max-model-len", "768", "--port", "8001", "--enable-lora")
    assert command[:7] == [
        *(sys.executable, "-m", "vllm.entrypoints.openai.api_server"),
        *("--model", "folder/student", "--host", "127.0.0.1"),
    ]
    assert command[7:] == [
        *("--no-enable-chunked-prefill", "--max-num-batched-tokens", "8192", "--dtype", "float32"),
        *("--block-size", "32", "--enforce-eager"),
        *("--max-model-len", "768", "--port", "8001", "--enable-lora"),
    ], "the user's options come last"
    wanted = dict(VLLM_SERVER_DEV_MODE="1", VLLM_ALLOW_RUNTIME_LORA_UPDATING="1", VLLM_LOGGING_LEVEL="WARNING")
    wanted |= dict(VLLM_USE_AOT_COMPILE="0", VLLM_CPU_OMP_THREADS_BIND="nobind")
    assert wanted.items() <= environment.items()
    assert environment["VLLM_CPU_KVCACHE_SPACE"] == "4", "the user's value"
    assert environment["VLLM_MAX_STOP_STRINGS"] == "64", "an empty value is none"
    assert environment["PATH"] == os.environ["PATH"]
    assert capsys.readouterr().out == (
        "Add to the recipe:\n"
        "  model_name_or_path: folder/student\n"
        "  rollout_engine: vllm_server\n"
        "  rollout_server_urls: [http://127.0.0.1:8001]\n"
    )


def test_on_a_gpu(started, monkeypatch):
    monkeypatch.setattr(serve, "has_gpu", lambda: True)
    command, environment = run(started, "--dtype", "auto")
    assert command[7:] == ["--dtype", "auto"]
    assert "VLLM_CPU_KVCACHE_SPACE" not in environment


def test_a_cpu_needs_a_length_and_vllm_must_be_installed(started, monkeypatch, capsys):
    monkeypatch.setattr(serve, "has_gpu", lambda: False)
    assert main(["serve", "student", "--port", "1"]) == 2
    assert "on a CPU add --max-model-len: max_prompt_length + max_completion_length" in capsys.readouterr().err
    monkeypatch.setattr(serve.importlib.util, "find_spec", lambda name: None)
    assert main(["serve", "student", "--max-model-len=9"]) == 2
    assert "vLLM is not installed" in capsys.readouterr().err
    assert not started


@pytest.mark.parametrize(
    ("options", "port"),
    [([], "8000"), (["--port", "1"], "1"), (["--port=2"], "2"), (["--port", "1", "--port=3"], "3"), (["--port"], "")],
)
def test_the_port(options, port):
    assert serve.read_option(options, "port", "8000") == port


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "0.0.0.0"])
def test_a_port_in_use_is_refused_before_the_student_loads(started, monkeypatch, capsys, host):
    monkeypatch.setattr(serve, "has_gpu", lambda: True)
    options = [] if host == "127.0.0.1" else ["--host", host]
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = str(other.getsockname()[1])
        assert main(["serve", "student", "--port", port, *options]) == 2
    error = capsys.readouterr().err
    assert f"port {port} of {host} is in use; stop the program that listens there, or choose another: --port" in error
    assert not started
    run(started, "--port", port, *options)


@pytest.mark.parametrize(("cxx", "compiles"), [("", False), ("no-such-compiler", False), ("sh", True)])
def test_what_vllm_compiles_with(monkeypatch, tmp_path, cxx, compiles):
    (tmp_path / "Python.h").touch()
    monkeypatch.setattr(serve.sysconfig, "get_path", lambda name: str(tmp_path))
    monkeypatch.setenv("CXX", cxx)
    assert serve.can_compile() == compiles
    (tmp_path / "Python.h").unlink()
    assert not serve.can_compile()


def test_a_gpu_is_what_nvidia_smi_lists(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    for text, expected in (("GPU 0: NVIDIA H100", True), ("No devices were found", False)):
        (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\necho '{text}'\n")
        (tmp_path / "nvidia-smi").chmod(0o755)
        assert serve.has_gpu() == expected
    monkeypatch.setenv("PATH", "")
    assert not serve.has_gpu()


def test_the_script_calls_the_command(tmp_path):
    command = ["bash", str(SCRIPT), "--help"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.stdout.startswith("usage: sekd serve STUDENT --max-model-len N")
    done = subprocess.run(command[:2], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 2
    assert "usage: sekd serve STUDENT" in done.stderr
