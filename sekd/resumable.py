"""A Trainer that may be killed at any time: its resumed run equals an undisturbed one.

Checkpoints are whole or absent (:mod:`sekd.checkpoints`), and its folder belongs to one run (:mod:`sekd.run_folder`).
What the Trainer keeps in memory alone is in the checkpoint too: the sums of the next log, and of ``train_loss``.
"""

import json
import os
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, ClassVar

import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from transformers import TrainerCallback
from transformers.trainer import TRAINER_STATE_NAME
from transformers.utils import logging

from sekd.checkpoints import (
    UNFINISHED,
    RunRefused,
    finish_checkpoint,
    name_checkpoint,
    remove_unfinished,
    rotate_checkpoints,
    set_later_aside,
)
from sekd.files import write_atomically
from sekd.hub import HubTrainer
from sekd.processes import run_on_main
from sekd.run_folder import begin_run, check_results, lock_run, resume_run
from sekd.saving import replace_student

logger = logging.get_logger(__name__)

WRITE_ERRORS = ("os error", "inline_container", "iostream error", "file write failed")
"""What errors of writing say in Rust (safetensors, tokenizers) and in torch.save, which do not raise OSError."""

LOG_STATE = "log_state.json"
"""The file in a checkpoint with the sums of the steps since the last log."""


class Interrupted(Exception):
    """SIGTERM ended the run. Its checkpoint is saved."""


class InterruptedWait(Interrupted):
    """SIGTERM ended the run while it waited before a step."""


class ResumableTrainer(HubTrainer):
    """``Trainer`` with checkpoints that are whole or absent, and a folder that belongs to one run.

    A subclass keeps its own state with :meth:`begin` and :meth:`save_state`, and says in ``facts`` what a resumed run
    must have in common with this one. ``inputs`` are the folders of the models that the run reads.
    """

    saved_errors: ClassVar[tuple[type[Exception], ...]] = (InterruptedWait,)
    """Errors that do not spoil the run: a checkpoint is saved when one of them ends it."""

    args: Any
    control: Any
    facts: dict[str, Any]
    inputs: Sequence[str | None] = ()

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.add_callback(_Resumption(self))
        self.checkpoint: str | None = None
        self.stopping, self._got_sigterm = False, False
        self._unfinished: str | None = None
        self._run: str | None = None
        self._holds_folder = False
        self._waits = False

    # What a subclass adds

    def begin(self, checkpoint: str | None) -> None:
        """Begin with the state of a checkpoint, or without any. Called before the first step of each attempt."""

    def save_state(self, folder: str) -> None:
        """Write the subclass's own state into a checkpoint. Every process calls it."""

    def write_student(self, written: str, folder: str) -> None:
        """Write the student's files into ``written``. They are moved to ``folder``. Every process calls it."""
        if not self.is_fsdp_enabled:
            super().save_model(written, _internal_call=True)
            return
        # transformers would write nothing for state_dict_type SHARDED_STATE_DICT, accelerate's default for FSDP2.
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        weights = get_model_state_dict(self.model, options=options)  # empty in all processes but the first
        if self.args.should_save:
            self._save(written, state_dict=weights)

    def end_waits(self) -> None:
        """End what still goes on in the background. The run is over."""

    def export_log(self) -> dict[str, Any]:
        """The subclass's sums of the steps since the last log, over all processes, as JSON."""
        return {}

    def restore_log(self, state: dict[str, Any]) -> None:
        """Take the sums that :meth:`export_log` gave."""

    # Training

    @contextmanager
    def hold_folder(self) -> Iterator[None]:
        """Let no other run write into ``output_dir``. Every process must call it. It may be nested.

        Raises:
            RunRefused: another run holds the folder.
        """
        if self._holds_folder:
            yield
            return
        with ExitStack() as stack:
            run_on_main(lambda: stack.enter_context(lock_run(str(self.args.output_dir))))
            self._holds_folder = True
            try:
                yield
            finally:
                self._holds_folder = False

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """As ``Trainer.train``. True resumes from the newest whole checkpoint in ``output_dir``.

        Without the argument, ``args.resume_from_checkpoint`` says from where, if anywhere.

        Raises:
            RunRefused: ``output_dir`` has the results of another run, another run is writing into it, or there is no
                whole checkpoint of this run.
            Interrupted: SIGTERM came, and the checkpoint of the last step is saved (``save_on_signal``).
        """
        with self.hold_folder(), self._noting_sigterm():
            resume = self.args.resume_from_checkpoint if resume_from_checkpoint is None else resume_from_checkpoint
            self.checkpoint, self._run = run_on_main(lambda: self._open_folder(resume or None))
            try:
                output = super().train(self.checkpoint, *args, **kwargs)
            except self.saved_errors as error:
                if isinstance(error, InterruptedWait):
                    self.end_waits()
                if self.state.global_step > 0:
                    self._save_checkpoint(self.model, None)
                raise
            finally:
                self._close_bars()
        if self.state.global_step == 0:
            raise RunRefused(
                "nothing was trained: the data has no batch of per_device_train_batch_size samples; lower it, or set "
                "dataloader_drop_last: false"
            )
        return output._replace(training_loss=output.metrics["train_loss"])

    def _open_folder(self, resume: str | bool | None) -> tuple[str | None, str]:
        folder, overwrite = str(self.args.output_dir), self.args.overwrite_output_dir
        if resume is None:
            # A second call of train() replaces the results of the first.
            check_results(folder, overwrite or self._run is not None, self.inputs)
            return None, begin_run(folder)
        return resume_run(folder, resume, self.facts, overwrite, self.inputs)

    def _init_training_state(self, max_steps: int, *args: Any, **kwargs: Any) -> Any:
        result = super()._init_training_state(max_steps, *args, **kwargs)
        self.state.compute_steps(self.args, max_steps)  # the checkpoint has the steps of the run before
        if self.state.best_global_step:  # the folder may have moved
            best = name_checkpoint(str(self.args.output_dir), self.state.best_global_step)
            self.state.best_model_checkpoint = best if os.path.isdir(best) else None
        if self.state.global_step > max_steps:
            raise RunRefused(
                f"{self.checkpoint!r} is of step {self.state.global_step}, but max_steps (or num_train_epochs) ends at "
                f"step {max_steps}: raise it to train on"
            )
        return result

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        if self.state.global_step >= self.state.max_steps:  # the checkpoint of the last step: nothing is left
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As ``Trainer.log``; ``train_loss`` is the mean over all steps of the run, also of those before a resume."""
        if "train_loss" in logs:
            logs["train_loss"] = self._total_loss_scalar / max(self.state.global_step, 1)
        super().log(logs, start_time)

    # What transformers builds from fields that it does not check

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        with _naming("optim, optim_args or optim_target_modules"):
            return super().create_optimizer(*args, **kwargs)

    def create_scheduler(self, *args: Any, **kwargs: Any) -> Any:
        with _naming("lr_scheduler_type, lr_scheduler_kwargs or warmup_steps"):
            return super().create_scheduler(*args, **kwargs)

    def get_train_dataloader(self) -> Any:
        with _naming("one of the dataloader_ fields"):
            return super().get_train_dataloader()

    def _determine_best_metric(self, *args: Any, **kwargs: Any) -> bool:
        with _naming("metric_for_best_model"):
            return super()._determine_best_metric(*args, **kwargs)

    # Checkpoints

    def _get_output_dir(self, trial: Any) -> str:
        return self._unfinished or super()._get_output_dir(trial)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if self._unfinished is None:  # else it has not its final name yet
            super()._push_from_checkpoint(checkpoint_folder)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        folder, step = super()._get_output_dir(trial), self.state.global_step
        unfinished = os.path.join(folder, UNFINISHED)
        written = name_checkpoint(unfinished, step)
        log_state = self._export_log_state()
        if self.args.should_save:
            remove_unfinished(folder)
        self.accelerator.wait_for_everyone()
        self._unfinished = unfinished
        try:
            with _writing(f"the checkpoint of step {step}", folder):
                os.makedirs(written, exist_ok=True)
                self.save_state(written)
                super()._save_checkpoint(model, trial)
                if self.state.best_global_step == step:  # the Trainer took the unfinished folder
                    self.state.best_model_checkpoint = name_checkpoint(folder, step)
                self.accelerator.wait_for_everyone()
                if self.args.should_save:
                    write_atomically(os.path.join(written, LOG_STATE), json.dumps(log_state))
                    self._finish(written, folder, step)
        finally:
            self._unfinished = None
        self.accelerator.wait_for_everyone()
        if self.args.push_to_hub:
            self._push_from_checkpoint(name_checkpoint(folder, step))

    def _finish(self, written: str, folder: str, step: int) -> None:
        """Give the written checkpoint its name, and delete those above ``save_total_limit``."""
        final = name_checkpoint(folder, step)
        self.state.save_to_json(os.path.join(written, TRAINER_STATE_NAME))  # with the path of the best checkpoint
        facts = {"step": step, "run": self._run, "save_only_model": self.args.save_only_model, "run_facts": self.facts}
        finish_checkpoint(written, facts)
        self._finish_current_push()  # it reads a checkpoint that may go now
        self.rotate(folder, final)

    def rotate(self, folder: str, newest: str) -> None:
        """Delete the oldest checkpoints above ``save_total_limit``, but neither ``newest`` nor the best one."""
        best = name_checkpoint(folder, self.state.best_global_step or -1)
        rotate_checkpoints(folder, self.args.save_total_limit, {newest, best})

    def _export_log_state(self) -> dict[str, Any]:
        loss = self.accelerator.reduce(self._tr_loss.detach().clone(), "mean").item()
        state = {"loss": loss, "total_loss": self._total_loss_scalar, "last_logged": self._globalstep_last_logged}
        return {**state, "sums": self.export_log()}

    def restore_log_state(self) -> None:
        """Take the sums of the steps since the last log from the checkpoint."""
        if self.checkpoint is None:
            return
        with open(os.path.join(self.checkpoint, LOG_STATE)) as file:
            state = json.load(file)
        self._tr_loss = torch.tensor(state["loss"], device=self.args.device)
        self._total_loss_scalar, self._globalstep_last_logged = state["total_loss"], state["last_logged"]
        self.restore_log(state["sums"])

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As ``Trainer.save_model``. Except in a checkpoint, whole files take the place of any student in the folder.

        With ``push_to_hub``, a student that is saved in ``output_dir`` is uploaded, too.

        Raises:
            OSError: a full disk, or another error of writing.
        """
        if _internal_call and output_dir is not None:
            super().save_model(output_dir, _internal_call)
            return
        folder = str(output_dir or self.args.output_dir)
        written = os.path.join(folder, UNFINISHED, "student")
        with self.hold_folder(), _writing("the student", folder):
            if self.args.should_save:
                remove_unfinished(folder)  # a killed process may have left a part of a student
            self.accelerator.wait_for_everyone()
            self.write_student(written, folder)
            if self.args.should_save:
                self.write_card(written, folder)
                replace_student(written, folder)
        if self.args.push_to_hub and not _internal_call and folder == str(self.args.output_dir):
            self.upload()

    # Signals

    @contextmanager
    def _noting_sigterm(self) -> Iterator[None]:
        """SIGTERM lets the current step end, saves its checkpoint and stops. A second one ends the process at once."""
        self.stopping, self._got_sigterm = False, False
        if not self.args.save_on_signal or threading.current_thread() is not threading.main_thread():
            yield
            return

        previous = signal.getsignal(signal.SIGTERM)

        def note(*_: Any) -> None:
            self._got_sigterm = True
            signal.signal(signal.SIGTERM, previous)
            self._end_wait()

        signal.signal(signal.SIGTERM, note)
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, previous)

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Around what may take long before a step, such as generation: SIGTERM ends it at once."""
        self._waits = self.accelerator.num_processes == 1  # others would wait for the process that stops
        try:
            self._end_wait()
            yield
        finally:
            self._waits = False

    def _end_wait(self) -> None:
        if self._waits and self._got_sigterm:
            step = self.state.global_step  # train() saves its checkpoint
            raise InterruptedWait(
                f"stopped by SIGTERM after step {step}, whose checkpoint is saved"
                if step
                else "stopped by SIGTERM before the first step"
            )

    def _close_bars(self) -> None:
        """End the line of a progress bar, so that an error begins a line of its own."""
        for callback in self.callback_handler.callbacks:
            if (bar := getattr(callback, "training_bar", None)) is not None:
                bar.close()

    def agree_to_stop(self) -> bool:
        """Whether any process got SIGTERM: all agree. Every process calls it after each step."""
        self.stopping = self._got_sigterm
        if self.accelerator.num_processes > 1:
            flag = torch.tensor(int(self._got_sigterm), device=self.args.device)
            self.stopping = bool(self.accelerator.reduce(flag, "sum").item())
        return self.stopping


@contextmanager
def _writing(what: str, folder: str) -> Iterator[None]:
    """Free the disk after an error, and make an error of writing an OSError. Each library raises one of its own."""
    try:
        yield
    except Exception as error:
        remove_unfinished(folder)
        is_of_writing = isinstance(error, OSError) or any(text in str(error) for text in WRITE_ERRORS)
        if not is_of_writing:
            raise
        reason = " ".join(str(getattr(error, "strerror", None) or error).split())
        raise OSError(
            f"{what} could not be written to {folder!r} ({type(error).__name__}: {reason}); the disk may be full"
        ) from error


@contextmanager
def _naming(fields: str) -> Iterator[None]:
    """Say which fields of the recipe an error of building comes from."""
    try:
        yield
    except (AssertionError, AttributeError, ImportError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise RunRefused(f"{fields}: {type(error).__name__}: {' '.join(str(error).split())}") from error


class _Resumption(TrainerCallback):
    """Begins with the state of the checkpoint, and ends with one after SIGTERM."""

    def __init__(self, trainer: ResumableTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.trainer.checkpoint is not None and args.should_save:
            set_later_aside(args.output_dir, state.global_step)
            self.trainer.rotate(args.output_dir, self.trainer.checkpoint)  # the run may have died before it did so
        self.trainer.begin(self.trainer.checkpoint)
        self.trainer.restore_log_state()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.trainer.agree_to_stop():
            control.should_save = True

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.trainer.stopping:
            raise Interrupted(f"stopped by SIGTERM after step {state.global_step}, whose checkpoint is saved")
