"""A run's student on the Hugging Face hub: which files are uploaded, and when.

transformers would upload everything in ``output_dir``, and would copy the files of each checkpoint there first, where a
killed process leaves half a model.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError
from transformers import Trainer
from transformers.trainer_utils import HubStrategy
from transformers.utils import logging
from transformers.utils.hub import PushInProgress

from sekd.model_card import CARD, CardSource, write_card
from sekd.run_folder import MODEL_FILES, TOKENIZER_FILES

logger = logging.get_logger(__name__)

HUB_ERRORS: tuple[type[Exception], ...] = (ValueError, OSError, *HfHubHTTPError.__bases__)
"""Refusals of the hub, and the errors of the HTTP library that this version of the hub's client uses."""

STUDENT = [*MODEL_FILES, *TOKENIZER_FILES]
"""What replaces the files of an earlier student in the repository."""

UPLOADED = [*STUDENT, CARD, "recipe.yaml", "versions.json", "metrics.jsonl"]
"""What of ``output_dir`` is uploaded: neither checkpoints nor rollouts, samples, or files that no run wrote."""


class HubTrainer(Trainer):
    """``Trainer`` whose uploads are the student, its card and its recipe.

    A subclass sets ``card``, and its ``save_model`` writes the card with the student.
    """

    card: CardSource
    args: Any

    def create_model_card(self, **front_matter: Any) -> None:
        """Write ``README.md`` into ``output_dir``, from now on with this front matter too, such as ``license``."""
        self.card.more = {**self.card.more, **front_matter}
        if self.is_world_process_zero():
            self.write_card(str(self.args.output_dir), str(self.args.output_dir))

    def write_card(self, written: str, folder: str) -> None:
        """Write the card into ``written``, whose files are for ``folder``."""
        self.card.repository = self.hub_model_id
        write_card(self.card, self.state, written, folder)

    def init_hf_repo(self, token: str | None = None) -> None:
        """Create the repository, if it does not exist.

        Raises:
            ValueError: the hub refuses, or cannot be reached.
        """
        name = self.args.hub_model_id or os.path.basename(os.path.abspath(str(self.args.output_dir)))
        try:
            with _reaching_hub(f"the repository {name!r} cannot be created"):
                super().init_hf_repo(token)
        except OSError as error:
            raise ValueError(f"push_to_hub: {error}") from error

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        **front_matter: Any,
    ) -> Any:
        """Save the student and upload it, with its card, recipe, versions and metrics, in one commit.

        Every process must call it. The files of an earlier student in the repository are deleted.

        Returns:
            The commit on the main process (a ``Future`` of it unless ``blocking``), None on the others.

        Raises:
            OSError: the upload failed. The student is saved.
        """
        if self.hub_model_id is None:
            self.init_hf_repo(token)
        self.card.more = {**self.card.more, **front_matter}
        self.save_model(_internal_call=True)
        return self.upload(commit_message, blocking, token, revision)

    def upload(
        self,
        commit_message: str | None = "Model save",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
    ) -> Any:
        """:meth:`push_to_hub` of what is saved in ``output_dir``."""
        if not self.is_world_process_zero():
            return None
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        self._finish_current_push()
        folder = str(self.args.output_dir)
        with _reaching_hub(f"the student is saved in {folder!r}, but not uploaded to {self.hub_model_id!r}"):
            job = HfApi().upload_folder(
                repo_id=str(self.hub_model_id),
                folder_path=folder,
                commit_message=commit_message,
                token=token or self.args.hub_token,
                revision=revision or self.args.hub_revision,
                allow_patterns=UPLOADED,
                delete_patterns=STUDENT,
                run_as_future=True,
            )
            return job.result() if blocking else job

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Upload the student of a checkpoint beside the training, as ``hub_strategy`` says."""
        strategy = self.args.hub_strategy
        if not self.is_world_process_zero() or strategy == HubStrategy.END:
            return
        self._finish_current_push()
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        common = {
            "repo_id": str(self.hub_model_id),
            "folder_path": checkpoint_folder,
            "token": self.args.hub_token,
            "revision": self.args.hub_revision,
            "commit_message": f"Training in progress, step {self.state.global_step}",
            "run_as_future": True,
        }
        api = HfApi()  # its jobs run one after the other
        jobs = [api.upload_folder(**common, allow_patterns=STUDENT, delete_patterns=STUDENT)]
        own_name = os.path.basename(checkpoint_folder)
        places = {HubStrategy.CHECKPOINT: "last-checkpoint", HubStrategy.ALL_CHECKPOINTS: own_name}
        if strategy in places:
            jobs.append(api.upload_folder(**common, path_in_repo=places[strategy], delete_patterns="*"))
        self.push_in_progress = PushInProgress(jobs)

    def _finish_current_push(self) -> None:
        """Wait for the upload of a checkpoint. If it failed, a warning says why: the training is worth more."""
        push = getattr(self, "push_in_progress", None)
        if push is None:
            return
        push.wait_until_done()
        for error in filter(None, (job.exception() for job in push.jobs)):
            logger.warning(f"a checkpoint was not uploaded to {self.hub_model_id!r}: {_squeeze(error)}")
        self.push_in_progress = None


def _squeeze(error: BaseException) -> str:
    return " ".join(str(error).split())


@contextmanager
def _reaching_hub(what: str) -> Iterator[None]:
    """Make an error of the network or the hub an OSError of one line."""
    try:
        yield
    except HUB_ERRORS as error:
        raise OSError(f"{what}: {_squeeze(error)}") from error
