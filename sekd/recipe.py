"""Turn a recipe into rows, samples, a cache and a trainer. Each method imports what it needs when it is called."""

import os
from collections.abc import Collection, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from sekd.parse import Purpose, parse_recipe
from sekd.pretrained import STUDENT, TEACHER, check_model_name, load_config, load_tokenizer

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset
    from peft import PeftConfig
    from transformers import PreTrainedTokenizerBase

    from sekd.cache.store import Store
    from sekd.config import SEKDConfig
    from sekd.on_policy.generate import RolloutCounts
    from sekd.trainer import SEKDTrainer


@dataclass
class Run:
    """The three records that a recipe and the command line fill in.

    ``script`` is TRL's ScriptArguments (the data), ``args`` the :class:`SEKDConfig`, ``model`` TRL's ModelConfig (the
    student). Every method raises ValueError for an invalid recipe or invalid data. Models are loaded last.
    """

    script: Any
    args: "SEKDConfig"
    model: Any

    @classmethod
    def parse(cls, recipe: str, overrides: Sequence[str] = (), purpose: Purpose | None = None) -> "Run":
        """The run that a recipe (a file, or the name of a shipped recipe) and the command line describe.

        With a ``purpose`` it does not train, and the purpose changes the recipe's values.

        Raises:
            ValueError: as :func:`parse_recipe`; or the recipe names no student, or no training data.
        """
        run = cls(*parse_recipe(recipe, overrides, purpose))
        from sekd.validation.training import check_adapter

        if run.model.model_name_or_path is None:
            raise ValueError("there is no student: set model_name_or_path to a folder or hub id")
        if run.script.dataset_name is None and run.args.rollouts is None:
            raise ValueError("there is no training data: set dataset_name to a file, folder or hub id")
        check_adapter(run.model)
        check_model_name(STUDENT, run.model.model_name_or_path)
        if run.script.dataset_streaming and run.args.rollouts is None:
            run.args.check_stream()
        return run

    @property
    def resume(self) -> str | bool | None:
        """``resume_from_checkpoint``: a checkpoint's folder, True for the newest one in output_dir, or None."""
        return self.args.resume_from_checkpoint or None

    def check_output_dir(self) -> None:
        """Check that the run can begin in ``output_dir``, or resume there.

        Raises:
            ValueError: another run uses the folder, its results are there, or there is no checkpoint to resume from.
        """
        from sekd.processes import run_on_main
        from sekd.run_folder import check_free

        inputs = self.model.model_name_or_path, self.args.teacher_model_name_or_path
        folder, overwrite = str(self.args.output_dir), self.args.overwrite_output_dir
        run_on_main(lambda: check_free(folder, self.resume, overwrite, inputs))

    def rows(self) -> "Dataset | IterableDataset":
        """The training rows: those of ``dataset_name``, or the rollouts in the file ``rollouts`` instead."""
        from sekd.data.kinds import ROLLOUT_COLUMNS
        from sekd.data.load import load_rows
        from sekd.on_policy.generate import is_unfinished

        script, rollouts = self.script, self.args.rollouts
        if rollouts is None:
            config, split = script.dataset_config, script.dataset_train_split
            return load_rows(script.dataset_name, config, split, script.dataset_streaming)
        path = os.path.abspath(os.path.expanduser(rollouts))  # a path, though it may look like a hub id
        if is_unfinished(path):
            raise ValueError(f"rollouts {rollouts!r} is not finished: start the same `sekd rollouts` again")
        if not os.path.exists(path):
            raise ValueError(f"rollouts {rollouts!r}: no such file; `sekd rollouts` generates it")
        rows = load_rows(path, field="rollouts")
        if missing := [column for column in ROLLOUT_COLUMNS if column not in rows.column_names]:
            raise ValueError(
                f"rollouts {rollouts!r} lacks the columns {' and '.join(missing)}: generate it with `sekd "
                "rollouts` or save_rollouts, or name other data in dataset_name"
            )
        return rows

    def held_out_rows(self) -> "Dataset | IterableDataset | None":
        """The rows to evaluate on; None without evaluation, and if ``eval_suite`` alone is evaluated.

        Raises:
            ValueError: evaluation without held-out data or ``eval_suite``, or on rows that are trained on.
        """
        from sekd.data.load import is_local, load_rows, share_rows

        script, args = self.script, self.args
        if not args.eval_on_start and args.eval_strategy == "no":
            return None
        name = args.eval_dataset_name or script.dataset_name
        split, test_split = script.dataset_train_split, script.dataset_test_split
        if name is None or (args.eval_dataset_name is None and is_local(name) and "[" not in test_split):
            if args.eval_suite:
                return None
            raise ValueError(
                "evaluation needs data of its own: set eval_dataset_name or eval_suite, or slice the file, for example "
                "dataset_test_split: train[:64] and dataset_train_split: train[64:]"
            )
        rows = load_rows(name, script.dataset_config, test_split, script.dataset_streaming)
        replayed = args.rollouts and os.path.abspath(os.path.expanduser(args.rollouts))
        if replayed is not None and share_rows(replayed, "train", name, test_split, rows):
            raise ValueError(
                f"rollouts {args.rollouts!r} are the held-out data, too; set eval_dataset_name to other data"
            )
        trained = script.dataset_name  # with rollouts, these are their prompts
        if trained is not None and share_rows(trained, split, name, test_split, rows):
            raise ValueError(
                f"dataset_test_split {test_split!r} of {name!r} has rows that dataset_train_split {split!r} trains on; "
                "set eval_dataset_name to other data, or take slices that share no row, such as dataset_train_split: "
                "train[64:] and dataset_test_split: train[:64]"
            )
        return rows

    def trainer(self) -> "SEKDTrainer":
        """The trainer, with its data prepared and its models loaded."""
        from sekd.trainer import SEKDTrainer

        if self.args.teacher_model_name_or_path is not None and self.args.teacher_cache is None:
            check_model_name(TEACHER, self.args.teacher_model_name_or_path)
        return SEKDTrainer(
            model=self.model.model_name_or_path,
            args=self.args,
            train_dataset=self.rows(),
            eval_dataset=self.held_out_rows(),
            peft_config=self._peft_config(),
            model_init_kwargs=self._model_init_kwargs(),
            recipe_records=(self.script, self.args, self.model),
        )

    def choose_samples(self) -> dict[str, Any]:
        """Choose samples, or read an earlier choice. The teacher is loaded only if the score reads it."""
        if self.args.rollouts is not None:
            raise ValueError(
                f"rollouts {self.args.rollouts!r} are of chosen prompts: `sekd rollouts` chooses them; to choose from "
                "the rollouts, name the file in dataset_name and leave rollouts out"
            )
        if self.args.sample_fraction == 1:
            raise ValueError(
                "sample_fraction is 1, which keeps every sample; set it, for example --sample_fraction 0.2"
            )
        self._check_sample_score()
        return self._choose(*self._prepare())

    def generate_rollouts(self, path: str, round_size: int | None = None) -> "RolloutCounts":
        """Generate rollouts of the initial student into a file, or resume. The samples are chosen first.

        ``round_size`` is the number of rollouts that a stopped command generates again at most.

        Raises:
            ValueError: an invalid recipe, invalid data, several processes, or a file with other rollouts.
            RolloutError, RolloutConfigError: the engine fails.
        """
        from sekd.on_policy.generate import ROUND_SIZE, check_file, generate_rollouts
        from sekd.student import check_context, load_student
        from sekd.validation.inputs import check_engine

        args, round_size = self.args, ROUND_SIZE if round_size is None else round_size
        path = os.path.expanduser(path)
        check_file(path, round_size)
        if args.teacher_model_name_or_path is not None:  # its classes limit the tokens
            check_model_name(TEACHER, args.teacher_model_name_or_path)
        if args.world_size > 1:
            raise ValueError(
                f"`sekd rollouts` in {args.world_size} processes would generate the same rollouts in each: start one "
                "process; with rollout_engine vllm_server, several servers share the prompts"
            )
        name, init = self.model.model_name_or_path, self._model_init_kwargs()
        self._peft_config()
        check_context(args, name, init, None)
        check_engine(args, init["quantization_config"] is not None)
        tokenizer, dataset = self._prepare()
        self._check_teacher_tokenizer(tokenizer)
        if args.sample_fraction < 1:
            dataset = dataset.select(self._choose(tokenizer, dataset)["kept"])
        student = load_student(name, args, **init).to(args.device)
        return generate_rollouts(path, dataset, student, tokenizer, args, self._count_classes(), round_size)

    def build_cache(self, engine: str = "local", workers: int | None = None) -> "Store":
        """Build the cache of the kept samples in ``teacher_cache`` (``--output``), or resume an unfinished build.

        Only one model is in memory at a time: the student while it scores samples, then the teacher, here or in the
        ``workers`` of ``engine`` "ray".

        Raises:
            ValueError: an invalid recipe, invalid data, or a folder with another cache.
        """
        args = self.args
        if args.teacher_cache is None:
            raise ValueError("there is no folder for the cache: add --output DIR")
        if args.teacher_model_name_or_path is None:
            raise ValueError("there is no teacher: set teacher_model_name_or_path to a folder or hub id")
        check_model_name(TEACHER, args.teacher_model_name_or_path)
        from sekd.cache.build import build_cache, check_build
        from sekd.cache.readers import RayReaders, load_reader
        from sekd.data.prepare import is_packed
        from sekd.models import find_teacher_device
        from sekd.validation.teachers import check_place

        check_place(args)
        check_build(args.teacher_cache, args, engine, workers)
        tokenizer, dataset = self._prepare()
        if args.sample_fraction < 1:
            dataset = dataset.select(self._choose(tokenizer, dataset)["kept"])
        self._check_teacher_tokenizer(tokenizer)
        config = load_config(STUDENT, self.model.model_name_or_path, self.model.model_revision)
        load = partial(
            load_reader,
            args,
            self.model.attn_implementation,
            config.get_text_config().vocab_size,
            is_packed(dataset),
        )
        if engine == "local":
            return build_cache(dataset, load(find_teacher_device(args)), tokenizer, args, args.teacher_cache)
        with closing(RayReaders(workers or 1, load)) as readers:
            return build_cache(dataset, readers, tokenizer, args, args.teacher_cache)

    def plan(self, known: Collection[str] = ()) -> dict[str, Any]:
        """The recipe's numbers for the size of its cache: the draws and the fraction of the samples.

        Also the positions (``sample_pool`` samples of full length) and the common vocabulary, unless ``known``.
        """
        args = self.args
        plan: dict[str, Any] = {"draws": args.class_samples, "fraction": args.sample_fraction}
        if "positions" not in known and args.sample_pool is not None:
            plan["positions"] = args.sample_pool * args.max_length
        if "vocab" not in known:
            plan["vocab"] = self._count_classes()
        return plan

    def _count_classes(self) -> int:
        """The classes that student and teacher have in common, from their configurations."""
        args, model = self.args, self.model
        configs = [load_config(STUDENT, model.model_name_or_path, model.model_revision)]
        if args.teacher_model_name_or_path is not None:
            configs.append(load_config(TEACHER, args.teacher_model_name_or_path, args.teacher_model_revision))
        return min(config.get_text_config().vocab_size for config in configs)

    def _prepare(self) -> "tuple[PreTrainedTokenizerBase, Dataset]":
        """The student's tokenizer and the samples to choose from."""
        from datasets import IterableDataset

        from sekd.samples import prepare_samples

        rows = self.rows()
        if isinstance(rows, IterableDataset) and self.args.sample_pool is None:
            raise ValueError("a stream has no length: set sample_pool to the number of first samples to choose from")
        tokenizer = load_tokenizer(STUDENT, self.model.model_name_or_path, self.model.model_revision)
        return tokenizer, prepare_samples(rows, tokenizer, self.args)

    def _check_teacher_tokenizer(self, tokenizer: "PreTrainedTokenizerBase") -> None:
        """Check that the teacher, if the recipe names one, has the student's tokens."""
        from sekd.data.prepare import check_same_tokenizer

        if self.args.teacher_model_name_or_path is not None:
            name, revision = self.args.teacher_model_name_or_path, self.args.teacher_model_revision
            check_same_tokenizer(tokenizer, load_tokenizer(TEACHER, name, revision))

    def _choose(self, tokenizer: "PreTrainedTokenizerBase", dataset: "Dataset") -> dict[str, Any]:
        from sekd.models import load_teacher
        from sekd.samples import choose_samples
        from sekd.student import load_student

        args, teacher = self.args, None
        self._peft_config()
        student = load_student(self.model.model_name_or_path, args, **self._model_init_kwargs())
        if self._check_sample_score():
            teacher = load_teacher(str(args.teacher_model_name_or_path), args, self.model.attn_implementation)
        return choose_samples(dataset, student, teacher, tokenizer, args)

    def _check_sample_score(self) -> bool:
        """Whether the sample score reads the teacher; ValueError if it does and there is no teacher."""
        from sekd.scores import needs_teacher

        score = self.args.sample_score
        if needs_teacher(score) and self.args.teacher_model_name_or_path is None:
            raise ValueError(f"sample_score {score!r} needs a teacher: set teacher_model_name_or_path")
        if needs_teacher(score):
            check_model_name(TEACHER, str(self.args.teacher_model_name_or_path))
        return needs_teacher(score)

    def _peft_config(self) -> "PeftConfig | None":
        """The new adapter that ``use_peft`` asks for; None for a whole student, and for one that is an adapter.

        Raises:
            ValueError: the student is an adapter, and ``use_peft`` or a key of its settings says otherwise.
        """
        from trl import ModelConfig, get_peft_config

        from sekd.pretrained import find_adapter
        from sekd.student import check_continued

        model = self.model
        wanted, saved = get_peft_config(model), find_adapter(model.model_name_or_path, model.model_revision)
        if saved is None:
            return wanted
        if wanted is None:
            raise ValueError(
                f"model_name_or_path {model.model_name_or_path!r} is an adapter of {saved.base_model_name_or_path!r}: "
                "set use_peft: true to train it on, or merge it into its base first to train a whole student"
            )
        check_continued(wanted, get_peft_config(ModelConfig(use_peft=True)), saved)
        return None

    def _model_init_kwargs(self) -> dict[str, Any]:
        from trl import get_quantization_config

        return {
            "revision": self.model.model_revision,
            "dtype": self.model.dtype,
            "attn_implementation": self.model.attn_implementation,
            "quantization_config": get_quantization_config(self.model),
        }
