"""Where the processes of a sweep run: on this machine, or in tasks of Ray. ENGINES has both."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from sekd.cluster import connect_to_ray

GRACE = 60.0
"""Seconds that a process has after SIGTERM: a run ends its step, and saves its checkpoint."""
PAUSE = 0.2
"""Seconds between two looks at the processes."""


@dataclass(frozen=True)
class Job:
    """A ``sekd`` command that is run in a process of its own.

    Attributes:
        name: for messages.
        arguments: of ``sekd``.
        log: the file that gets its output.
        finished: the run's folder, in which its end is noted; None for none.
        folder: the working directory.
        path: folders that Python also imports from.
    """

    name: str
    arguments: tuple[str, ...]
    log: str
    finished: str | None
    folder: str
    path: tuple[str, ...] = ()


@runtime_checkable
class Engine(Protocol):
    """Runs jobs, ``jobs`` at once. ``running`` are the jobs that have not ended."""

    jobs: int

    @property
    def running(self) -> Collection[Job]: ...

    def start(self, job: Job) -> None:
        """Start a job. At most ``jobs`` may run."""

    def wait(self, seconds: float) -> list[tuple[Job, int]]:
        """The jobs that ended, with their exit status. It returns when one ended, or after some seconds."""

    def close(self) -> None:
        """End all jobs, with SIGTERM at first."""


class LocalEngine:
    """Processes on this machine. They share its threads, and its GPUs. They end if this process dies."""

    def __init__(self, jobs: int | None) -> None:
        gpus = list_gpus()
        self.jobs = jobs or max(1, len(gpus))
        self.free = [share_machine(place, self.jobs, gpus) for place in range(self.jobs)]
        self.processes: dict[Job, tuple[subprocess.Popen[bytes], dict[str, str]]] = {}

    @property
    def running(self) -> Collection[Job]:
        return self.processes.keys()

    def start(self, job: Job) -> None:
        environment = self.free.pop(0)
        self.processes[job] = open_process(job, environment), environment

    def wait(self, seconds: float) -> list[tuple[Job, int]]:
        end = time.monotonic() + seconds
        while True:
            ended = [job for job, (process, _) in self.processes.items() if process.poll() is not None]
            if ended or time.monotonic() > end:
                break
            time.sleep(PAUSE)
        results = []
        for job in ended:
            process, environment = self.processes.pop(job)
            self.free.append(environment)
            results.append((job, process.returncode))
        return results

    def close(self) -> None:
        end_processes([process for process, _ in self.processes.values()])
        self.processes.clear()


class RayEngine:
    """Tasks of Ray, each of which starts the same process on its machine. All machines must see the sweep's folders.

    A task has a GPU, or a share of one if there are fewer than ``jobs``, and its share of the CPUs.
    """

    def __init__(self, jobs: int | None) -> None:
        self.ray, self.started = connect_to_ray()
        resources = self.ray.cluster_resources()
        gpus, cpus = int(resources.get("GPU", 0)), resources.get("CPU", 1)
        self.jobs = jobs or max(1, gpus)
        # Ray takes a part of a CPU or GPU, or a whole number of them.
        share = cpus / self.jobs
        amounts = {"num_cpus": share if share < 1 else int(share), "num_gpus": min(1, gpus / self.jobs)}
        # A run that died is not repeated here: the same command resumes it.
        self.task = self.ray.remote(max_retries=0, **amounts)(run_in_task)
        self.environment = {"OMP_NUM_THREADS": choose_threads(int(share))}
        self.jobs_of: dict[Any, Job] = {}

    @property
    def running(self) -> Collection[Job]:
        return self.jobs_of.values()

    def start(self, job: Job) -> None:
        self.jobs_of[self.task.remote(job, self.environment)] = job

    def wait(self, seconds: float) -> list[tuple[Job, int]]:
        done, _ = self.ray.wait([*self.jobs_of], timeout=seconds)
        results = []
        for reference in done:
            job = self.jobs_of.pop(reference)
            try:
                status = self.ray.get(reference)
            except self.ray.exceptions.RayError as error:
                with open(job.log, "a", encoding="utf-8") as log:
                    reason = str(error).strip().splitlines()[-1]
                    log.write(f"\nRay lost the process: {reason}\n")
                status = 1
            results.append((job, status))
        return results

    def close(self) -> None:
        for reference in self.jobs_of:
            self.ray.cancel(reference)  # raises KeyboardInterrupt in the task
        if self.jobs_of:
            self.ray.wait([*self.jobs_of], num_returns=len(self.jobs_of), timeout=GRACE)
        self.jobs_of.clear()
        if self.started:
            self.ray.shutdown()


@dataclass(frozen=True)
class EngineKind:
    """What is known of an engine.

    Attributes:
        make: takes the number of jobs at once; None for one a GPU, or one without GPUs.
        requires: the package that it needs.
    """

    make: Callable[[int | None], Engine]
    requires: str | None = None


ENGINES = {"local": EngineKind(LocalEngine), "ray": EngineKind(RayEngine, requires="ray")}
"""Engines by name."""


def open_process(job: Job, environment: Mapping[str, str]) -> "subprocess.Popen[bytes]":
    """Start the process of a job. Its output is appended to its log."""
    os.makedirs(os.path.dirname(job.log) or ".", exist_ok=True)
    variables = {**os.environ, **environment, "PYTHONUNBUFFERED": "1"}
    if job.path:
        variables["PYTHONPATH"] = os.pathsep.join([*filter(None, [os.environ.get("PYTHONPATH")]), *job.path])
    command = [sys.executable, "-m", "sekd.cli.worker", str(os.getpid()), job.finished or "", *job.arguments]
    with open(job.log, "ab") as log:
        log.write(f"$ sekd {' '.join(job.arguments)}\n".encode())
        log.flush()
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            cwd=job.folder,
            env=variables,
            start_new_session=True,  # Ctrl-C reaches the sweep alone, which then ends its processes
        )


def end_processes(processes: "Collection[subprocess.Popen[bytes]]") -> None:
    """End processes: SIGTERM, and SIGKILL after ``GRACE`` seconds, or at a second Ctrl-C."""
    for process in processes:
        with suppress(ProcessLookupError):
            process.terminate()
    end = time.monotonic() + GRACE
    try:
        for process in processes:
            with suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, end - time.monotonic()))
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()
                process.wait()


def run_in_task(job: Job, environment: Mapping[str, str]) -> int:
    """Run a job in a task of Ray; its exit status."""
    process = open_process(job, environment)
    try:
        return process.wait()
    finally:
        end_processes([process])


def list_gpus() -> list[str]:
    """The GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [name for name in visible.split(",") if name]
    import torch

    return [str(place) for place in range(torch.cuda.device_count())]


def share_machine(place: int, jobs: int, gpus: list[str]) -> dict[str, str]:
    """The environment of the job at a place among ``jobs``: its threads, and its GPUs.

    With more GPUs than jobs, a job has several. With fewer, jobs share one.
    """
    variables = {"OMP_NUM_THREADS": choose_threads(len(os.sched_getaffinity(0)) // jobs)}
    if gpus:
        number = max(1, len(gpus) // jobs)
        chosen = [gpus[(place * number + i) % len(gpus)] for i in range(number)]
        variables["CUDA_VISIBLE_DEVICES"] = ",".join(chosen)
    return variables


def choose_threads(share: int) -> str:
    """The threads of a process: as OMP_NUM_THREADS says here, else its share of the cores."""
    return os.environ.get("OMP_NUM_THREADS") or str(max(1, share))


def read_last_error(log: str) -> str:
    """The line of a log that says why its last process ended: an error, or else the last line."""
    try:
        with open(log, encoding="utf-8", errors="replace") as file:
            text = file.read().rpartition("\n$ sekd ")[2]
    except FileNotFoundError:
        return "it wrote nothing"
    lines = [line.strip() for line in text.replace("\r", "\n").splitlines()[1:] if line.strip()]
    errors = [line for line in lines if line.startswith("sekd: ") or "Error: " in line.partition(" ")[0] + " "]
    return (errors or lines or ["it wrote nothing"])[-1]


def describe_status(status: int) -> str:
    """An exit status as text."""
    return f"killed by {signal.Signals(-status).name}" if status < 0 else f"exit status {status}"
