"""Kills training in the middle of its writes, resumes it, and compares with a run that nothing disturbed.

    python scripts/kill_runs.py [--trials 12] [--fault kill|term|full] [--modes "gls;cache"]

A shim between Python and libc counts the file operations below output_dir. At a random one it acts: ``kill`` writes
half of the buffer and sends SIGKILL, ``term`` sends SIGTERM, ``full`` lets this and all later writes fail as on a full
disk.
The run is resumed (and perhaps stopped again) until it ends. Every file but timings must equal the undisturbed run's.
It needs a C compiler. The table at the end has one line a mode; the exit status is 1 if anything differed.
"""

import argparse
import ctypes
import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path

SHIM = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

static char folder[4096];
static long at = -1, seen = 0;
static int fault = 0;  /* 0 kill, 1 term, 2 full */

void arm(const char *path, long when, int what) { strncpy(folder, path, 4095); at = when; seen = 0; fault = what; }
long count(void) { return seen; }

static int ours(const char *path) { return folder[0] && strncmp(path, folder, strlen(folder)) == 0; }
static int ours_fd(int fd) {
    char link[64], path[4096];
    if (!folder[0] || fd < 3) return 0;
    snprintf(link, 64, "/proc/self/fd/%d", fd);
    ssize_t n = readlink(link, path, 4095);
    if (n < 0) return 0;
    path[n] = 0;
    return ours(path);
}
/* 1: the caller must fail with ENOSPC */
static int event(int is_write) {
    seen++;
    if (at < 0 || seen < at) return 0;
    if (fault == 2) return is_write;
    if (seen == at) { kill(getpid(), fault ? SIGTERM : SIGKILL); }
    return 0;
}
#define REAL(name) static __typeof__(name) *real; if (!real) real = dlsym(RTLD_NEXT, #name)

ssize_t write(int fd, const void *buffer, size_t size) {
    REAL(write);
    if (ours_fd(fd)) {
        if (seen + 1 == at && fault == 0) real(fd, buffer, size / 2);
        if (event(1)) { errno = ENOSPC; return -1; }
    }
    return real(fd, buffer, size);
}
ssize_t writev(int fd, const struct iovec *parts, int number) {
    REAL(writev);
    if (ours_fd(fd)) {
        if (seen + 1 == at && fault == 0 && number) real(fd, parts, 1);
        if (event(1)) { errno = ENOSPC; return -1; }
    }
    return real(fd, parts, number);
}
int rename(const char *from, const char *to) { REAL(rename); if (ours(from)) event(0); return real(from, to); }
int unlink(const char *path) { REAL(unlink); if (ours(path)) event(0); return real(path); }
int unlinkat(int at_fd, const char *path, int flags) {
    REAL(unlinkat);
    if (ours(path) || ours_fd(at_fd)) event(0);
    return real(at_fd, path, flags);
}
int mkdir(const char *path, mode_t mode) {
    REAL(mkdir);
    if (ours(path) && event(1)) { errno = ENOSPC; return -1; }
    return real(path, mode);
}
int fsync(int fd) { REAL(fsync); if (ours_fd(fd)) event(0); return real(fd); }
"""

ON_POLICY = {"lmbda": 1.0, "rollout_engine": "hf", "max_completion_length": 6, "save_rollouts": True}
TEXT = {"dataset_name": "texts.jsonl", "max_length": 32, "max_prompt_length": 16}
MODES: dict[str, dict] = {
    "top_k": {},
    "gls": {"position_policy": "gls", "gradient_accumulation_steps": 2},
    "bandit": {"position_policy": "bandit"},
    "random, logs between checkpoints": {"position_policy": "random", "logging_steps": 5},
    "packed text": TEXT,
    "stream": {**TEXT, "dataset_streaming": True},
    "stream, later epochs": {**TEXT, "dataset_streaming": True, "max_length": 200, "gradient_accumulation_steps": 3},
    "stream, shuffled": {**TEXT, "dataset_streaming": True, "max_length": 200, "shuffle_buffer": 16},
    "LoRA": {"use_peft": True, "lora_r": 4, "lora_target_modules": ["q_proj", "v_proj"]},
    "samples": {"sample_fraction": 0.5},
    "cache": {"teacher_cache": "cache", "class_samples": 16},
    "evaluation, best checkpoint": {
        **{"eval_strategy": "steps", "eval_steps": 3, "load_best_model_at_end": True, "save_steps": 3},
        **{"dataset_test_split": "train[:8]", "dataset_train_split": "train[8:]"},
    },
    "rollouts": {**ON_POLICY},
    "rollouts of rounds": {**ON_POLICY, "rollout_batches": 4, "score_source": "rollout"},
    "two processes": {"position_policy": "gls", "per_device_train_batch_size": 2},
    "two processes, rollouts": {**ON_POLICY, "per_device_train_batch_size": 2},
    "rollouts before training": {**ON_POLICY, "sample_fraction": 0.5, "save_rollouts": False},
    "rollouts, several a prompt": {**ON_POLICY, "rollouts_per_prompt": 2, "rollout_batches": 3},
}
COMMANDS = {"rollouts before training": ["rollouts", "--round-size", "5", "--output"]}
"""Modes of another command than ``train``; its last argument is a file of the run's folder."""
PROCESSES = {"two processes": 2, "two processes, rollouts": 2}
TIMINGS = re.compile(r'"(train_runtime|\w+_per_second|\w+_share|(\w+_)?seconds)": [^,}]+')
IGNORED = ("versions.json", "run.json", "checkpoint.json", "training_args.bin", "recipe.yaml")


def compile_shim(folder: Path) -> str:
    """Build the shim, and return its path."""
    (folder / "shim.c").write_text(SHIM)
    library = folder / "shim.so"
    compiler = os.environ.get("CC", "cc")
    subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-o", library, folder / "shim.c", "-ldl"], check=True)
    return str(library)


def make_inputs(folder: Path) -> None:
    """A tiny pair, its tokenizer, prompts, texts and a cache."""
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
    from datasets import Dataset
    from helpers import make_pairs, make_tokenizer, save_pair, words

    draws = random.Random(1)
    texts = Dataset.from_list([{"text": words(draws, 3, 60)} for _ in range(64)])
    save_pair(folder, make_tokenizer(), texts)
    make_pairs().to_json(folder / "pairs.jsonl")


def make_recipe(folder: Path, mode: str, name: str) -> list[str]:
    """The arguments of ``sekd`` for a mode, with an output_dir of this name."""
    keys = {
        "output_dir": str(folder / name),
        "model_name_or_path": str(folder / "student"),
        "teacher_model_name_or_path": str(folder / "teacher"),
        "dataset_name": "pairs.jsonl",
        "max_steps": 12,
        "save_steps": 2,
        "save_total_limit": 2,
        "logging_steps": 1,
        "learning_rate": 1e-3,
        "per_device_train_batch_size": 4,
        "report_to": "none",
        "disable_tqdm": True,
        "log_completions_steps": 0,
        "bf16": False,
        "teacher_dtype": "float32",
        **MODES[mode],
    }
    for key in ("dataset_name", "teacher_cache"):
        if key in keys:
            keys[key] = str(folder / keys[key])
    path = folder / f"{name}.json"
    path.write_text(json.dumps(keys))
    command, *options = COMMANDS.get(mode, ["train"])
    return [command, str(path), *options, *([str(folder / name / "rollouts.jsonl")] if options else [])]


def run_forked(
    shim: ctypes.CDLL, arguments: list[str], folder: Path, at: int, fault: int, processes: int = 1
) -> tuple[int, str, list[int]]:
    """Run sekd in forked processes: the exit status (negative for a signal), the output, and their file operations.

    The fault comes at operation ``at``; the second process's operations are counted after the first's. A process that
    fails ends the others; its status and output count.
    """
    sys.stdout.flush()
    port, children, victim = find_port(), dict[int, int](), 0
    while at > 0 and victim < processes - 1 and at >= (operations := read_count(folder, victim)):
        at, victim = at - operations, victim + 1
    for rank in range(processes):
        child = os.fork()
        if child == 0:
            os.environ |= name_process(rank, processes, port) if processes > 1 else {}
            run_child(shim, arguments, folder, at if rank == victim else -1, fault, rank)
        children[child] = rank
    decisive = 0, 0
    while children:
        child, code = os.wait()
        status, rank = os.waitstatus_to_exitcode(code), children.pop(child)
        if status != 0 and decisive[0] == 0:
            decisive = status, rank
            for other in children if status != 128 + signal.SIGTERM else ():  # after SIGTERM, the other stops by itself
                os.kill(other, signal.SIGKILL)
    status, rank = decisive
    printed = (folder / f"printed_{rank}.txt").read_text(errors="replace")
    return status, printed, [read_count(folder, r) for r in range(processes)] if status == 0 else []


def read_count(folder: Path, rank: int) -> int:
    """The file operations of a process in the last run that no fault was set for."""
    return int((folder / f"count_{rank}.txt").read_text())


def run_child(shim: ctypes.CDLL, arguments: list[str], folder: Path, at: int, fault: int, rank: int) -> None:
    """The forked process."""
    output = os.open(folder / f"printed_{rank}.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    import torch.distributed as dist

    from sekd.cli import main

    keys = json.loads(Path(arguments[-1 if arguments[0] == "cache" else 1]).read_text())
    shim.arm(keys["output_dir"].encode(), at, fault)
    status = 99
    try:
        status = main(arguments)
        if dist.is_initialized() and status == 0:
            dist.barrier()
            dist.destroy_process_group()
    except BaseException:
        traceback.print_exc()
    if at < 0 and "--resume_from_checkpoint" not in arguments:
        (folder / f"count_{rank}.txt").write_text(str(shim.count()))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def find_port() -> int:
    """A port that no process listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def name_process(rank: int, processes: int, port: int) -> dict[str, str]:
    """The variables that torchrun sets."""
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
    return {name: str(value) for name, value in {**names, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}.items()}


def read_results(folder: Path) -> dict[str, bytes]:
    """Every file of a run that must be the same, without timings and paths."""
    results = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_dir() or path.name in IGNORED or ".old" in name:
            continue
        content = path.read_bytes()
        if path.name == "README.md":
            content = re.sub(rb"\| wall time .*", b"", content)
        if path.suffix in (".json", ".jsonl"):
            content = TIMINGS.sub("", content.decode()).replace(str(folder), "").encode()
        results[name] = content
    return results


def try_mode(shim: ctypes.CDLL, folder: Path, mode: str, trials: int, fault: str) -> tuple[int, int, list[str]]:
    """Stops and resumes a mode: (stops, trials that ended wrongly, what went wrong)."""
    kind = ("kill", "term", "full").index(fault)
    expected = {"kill": {-signal.SIGKILL}, "term": {128 + signal.SIGTERM, -signal.SIGTERM}, "full": {1, 2}}[fault]
    processes = PROCESSES.get(mode, 1)
    status, printed, counts = run_forked(shim, make_recipe(folder, mode, "whole"), folder, -1, 0, processes)
    assert status == 0, printed
    whole = read_results(folder / "whole")
    draws, stops, wrong, reasons = random.Random(mode), 0, 0, list[str]()
    for trial in range(trials):
        shutil.rmtree(folder / "cut", ignore_errors=True)
        arguments, before, problem = make_recipe(folder, mode, "cut"), stops, ""
        chances = draws.choice((1, 1, 2, 3))
        while not problem:
            at = draws.randrange(1, sum(counts)) if stops - before < chances else -1
            resume = ["--resume_from_checkpoint", "true"] if [*(folder / "cut").glob("checkpoint-*")] else []
            status, printed, _ = run_forked(shim, arguments + resume, folder, at, kind, processes)
            if status in expected:
                stops += 1
            if "Traceback" in printed or (status != 0 and status not in expected):
                problem = f"trial {trial}, operation {at}: status {status}: {printed[-1500:]}"
            elif status == 0:
                break
        results = read_results(folder / "cut") if not problem else {}
        if fault == "term":  # it saves checkpoints of other steps
            results |= {name: whole[name] for name in whole if name.startswith("checkpoint-")}
            results = {name: results[name] for name in results if name in whole or "checkpoint-" not in name}
        if not problem and results != whole:
            differing = [name for name in sorted({*whole, *results}) if whole.get(name) != results.get(name)]
            problem = f"trial {trial}: other than undisturbed: {', '.join(differing)}"
        if problem:
            wrong += 1
            reasons.append(problem)
    shutil.rmtree(folder / "whole")
    return stops, wrong, reasons


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=12, help="runs of each mode; each is stopped up to three times")
    parser.add_argument("--fault", choices=["kill", "term", "full"], default="kill")
    parser.add_argument("--modes", help="names separated by semicolons; all by default")
    options = parser.parse_args()
    if "SEKD_SHIM" not in os.environ:  # start again below the shim
        with tempfile.TemporaryDirectory() as folder:
            shim = compile_shim(Path(folder))
            environment = {**os.environ, "SEKD_SHIM": shim, "LD_PRELOAD": shim, "OMP_NUM_THREADS": "1"}
            environment |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}
            return subprocess.run([sys.executable, *sys.argv], env=environment, check=False).returncode
    shim = ctypes.CDLL(os.environ["SEKD_SHIM"])
    shim.arm.argtypes = [ctypes.c_char_p, ctypes.c_long, ctypes.c_int]
    shim.count.restype = ctypes.c_long
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_inputs(folder)
        import sekd.cli.train
        import sekd.trainer  # noqa: F401 - so that no child imports it again

        status, printed, _ = run_forked(
            shim, ["cache", "build", make_recipe(folder, "cache", "build")[1]], folder, -1, 0
        )
        assert status == 0, printed
        total = [0, 0]
        print(f"{'mode':34} {'trials':>6} {'stops':>6} {'wrong':>6}")
        for mode in options.modes.split(";") if options.modes else MODES:
            stops, wrong, reasons = try_mode(shim, folder, mode, options.trials, options.fault)
            print(f"{mode:34} {options.trials:6} {stops:6} {wrong:6}", flush=True)
            for reason in reasons[:3]:
                print(f"  {reason}", flush=True)
            total = [total[0] + stops, total[1] + wrong]
        print(f"{'all':34} {'':6} {total[0]:6} {total[1]:6}")
    return int(total[1] > 0)


if __name__ == "__main__":
    sys.exit(main())
