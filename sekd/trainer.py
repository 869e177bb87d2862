"""SEKDTrainer: a Trainer around :func:`sekd.distill.distill`. No loss arithmetic lives here."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import gather_object
from datasets import Dataset, IterableDataset
from jaxtyping import Bool, Float
from torch import Tensor, nn
from transformers import (
    EvalPrediction,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProgressCallback,
    TrainerCallback,
)

from rollouts import RolloutEngine, RolloutError
from sekd.callbacks import ProgressLine, RunFiles
from sekd.config import SEKDConfig
from sekd.data.batch import Sample, collate, group_by_length
from sekd.data.prepare import check_token_ids, is_packed, prepare
from sekd.distill import Method, distill, kl_after_step
from sekd.eval.agreement import AGREEMENT_STEPS, measure_agreement
from sekd.eval.during import Evaluation
from sekd.eval.early_stopping import make_early_stopping, resume_early_stopping
from sekd.eval.held_out import Pair
from sekd.eval.selection import make_recorder
from sekd.fingerprints import check_same_weights
from sekd.floor import Floor
from sekd.measured import MeasuredTrainer
from sekd.metrics import add_sums
from sekd.model_card import CardSource
from sekd.models import check_head, check_head_columns, evaluating, log_dtypes, run_inside, unwrap
from sekd.on_policy.sampler import RepeatSampler
from sekd.on_policy.schedule import RolloutSchedule
from sekd.on_policy.weights import check_mergeable
from sekd.policies import FinishedStep
from sekd.policies.base import load_state, save_state
from sekd.pretrained import STUDENT, load_tokenizer
from sekd.resumable import InterruptedWait
from sekd.run_folder import describe_run, list_keys
from sekd.samples import choose_samples, order_stream, prepare_samples
from sekd.saving import save_merged
from sekd.seeds import make_generators
from sekd.student import check_context, check_models_outside, check_student, load_student, prepare_student
from sekd.teacher_source import make_teacher_source
from sekd.timing import timed
from sekd.types import Batch, TeacherState
from sekd.validation.inputs import check_inputs, check_separate
from sekd.validation.rollouts import engine_trait

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel


class SEKDTrainer(MeasuredTrainer):
    """Distils a teacher into a student at selected positions.

    Data and tokenizers are checked before any model is loaded. Models may be given by name.

    Args:
        model: the student: a model, or a folder or hub id. An adapter (or a PEFT model) is trained on.
        teacher_model: the teacher. Default: ``args.teacher_model_name_or_path``; none with ``args.teacher_cache``.
        train_dataset: rows as :mod:`sekd.data` reads them.
        eval_dataset: rows of the same kind; ``evaluate`` measures the student on them.
        processing_class: the tokenizer. Default: the student's own.
        peft_config: trains a new adapter instead of the whole student.
        rollout_engine: generates in on-policy steps. Default: ``args.rollout_engine``, started when it is needed.
        model_init_kwargs: for the student's ``from_pretrained``. Default: float32 weights.
        compute_metrics: gives ``evaluate`` more metrics. It gets an ``EvalPrediction``: the student's likeliest tokens
            and the targets, both [samples T], with -100 at invalid positions.
        recipe_records: the dataclasses whose fields ``recipe.yaml`` keeps. Default: ``args``.

    Raises:
        ValueError: data, tokenizers or options that cannot work, and how to fix it.
        FloatingPointError: a loss is not finite in training. The error names the samples.
    """

    args: SEKDConfig
    saved_errors = (RolloutError, InterruptedWait)

    def __init__(
        self,
        model: "str | PreTrainedModel | PeftModel",
        teacher_model: str | PreTrainedModel | None = None,
        args: SEKDConfig | None = None,
        train_dataset: Dataset | IterableDataset | None = None,
        eval_dataset: Dataset | IterableDataset | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        peft_config: "PeftConfig | None" = None,
        rollout_engine: RolloutEngine | None = None,
        model_init_kwargs: dict[str, Any] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, torch.optim.lr_scheduler.LRScheduler | None] = (None, None),
        compute_metrics: Callable[[EvalPrediction], dict[str, float]] | None = None,
        recipe_records: Sequence[Any] = (),
    ) -> None:
        args = args or SEKDConfig()
        check_separate(model, teacher_model)
        source = make_teacher_source(teacher_model, args)
        if train_dataset is None:
            raise ValueError("there is no training data: set dataset_name, or pass train_dataset")
        init = {"dtype": torch.float32, **(model_init_kwargs or {})}
        adapter = check_student(model, peft_config, init, args, optimizers[0])
        check_inputs(args, train_dataset, init, adapter, getattr(model, "is_quantized", False), rollout_engine)
        check_context(args, model, init, rollout_engine)
        if processing_class is None:
            name = model if isinstance(model, str) else model.config._name_or_path
            processing_class = load_tokenizer(STUDENT, name, init.get("revision"))
        source.check(processing_class)
        samples = prepare_samples(train_dataset, processing_class, args)
        packed = is_packed(samples)
        if eval_dataset is not None:
            eval_dataset = prepare(eval_dataset, processing_class, args)
            packed |= is_packed(eval_dataset)
            if args.max_eval_samples is not None:
                eval_dataset = eval_dataset.take(args.max_eval_samples)
        self.evaluation = Evaluation(args, processing_class, eval_dataset)

        names = [getattr(m, "name_or_path", m) for m in (model, teacher_model or args.teacher_model_name_or_path)]
        if isinstance(model, str):
            model = load_student(model, args, **init)
        source.load(init.get("attn_implementation"))
        check_same_weights(student=model, teacher=source.model)
        if args.sample_fraction < 1:
            samples = samples.select(choose_samples(samples, model, source.model, processing_class, args)["kept"])
        model = prepare_student(model, peft_config, args, init.get("revision"), optimizers[0])

        args._n_gpu = min(args.n_gpu, 1)  # DataParallel would split the loss; `accelerate launch` uses more GPUs
        super().__init__(
            model,
            args,
            data_collator=_make_samples,
            train_dataset=order_stream(samples, args) if isinstance(samples, IterableDataset) else samples,
            eval_dataset=[] if eval_dataset is None and self.evaluation.has_tasks else eval_dataset,
            processing_class=processing_class,
            compute_metrics=compute_metrics,
            callbacks=[RunFiles(*(recipe_records or [args])), *make_early_stopping(args), *(callbacks or [])],
            optimizers=optimizers,
        )
        self.eval_dataset = eval_dataset  # the Trainer refuses None, but the tasks of eval_suite need no samples
        self.inputs = [*names, adapter and adapter.base_model_name_or_path]
        self.loss_is_scaled_for_ga = True  # the loss is divided by the step's sequences already
        if not args.disable_tqdm:
            self.remove_callback(ProgressCallback)
            self.add_callback(ProgressLine(self.evaluation.forms))

        check_head(self.model, packed)
        if args.merge_adapter or (args.any_on_policy and not engine_trait(args, rollout_engine, "shares_model")):
            check_mergeable(self.model)
        self.teacher, vocab = source.connect(self.model, self.train_dataset, packed)
        check_token_ids(self.train_dataset, vocab)
        log_dtypes(self.model, source.model, args, generates=args.any_on_policy and rollout_engine is None)
        self.method = Method.from_config(args, vocab)
        check_head_columns(self.model, args)
        if self.method.mean_over == "step" and self.is_deepspeed_enabled:
            raise ValueError(
                f"position_policy {args.position_policy!r} divides each step's gradient by its selected positions, but "
                "DeepSpeed does not keep it in the parameters; use DDP or FSDP2, or position_policy: top_k"
            )
        self.add_callback(_EndOfStep(self))
        self._step_loss: Tensor | float = 0.0
        self.schedule = RolloutSchedule(
            args,
            self.accelerator,
            processing_class,
            lambda: self.model_wrapped,
            vocab,
            self.count,
            rollout_engine,
            self.evaluation.count_tokens(self.model),
        )
        self.evaluation.connect(self.accelerator, self.schedule, compute_metrics)
        self.recorder = make_recorder(args, processing_class, eval_dataset, self.teacher.has_logits)
        pad, eos = processing_class.pad_token_id, processing_class.eos_token_id
        self.pad_token_id: int = pad if pad is not None else eos or 0
        local = not engine_trait(args, rollout_engine, "uses_servers")
        self.floor = Floor(self.model, source.model, self.method, args, generates=local)
        keys, processes = list_keys(recipe_records or [args]), self.accelerator.num_processes
        saves_adapter = hasattr(self.model, "peft_config") and not args.merge_adapter
        student, teacher = (name or "" for name in names)
        self.card = CardSource(args, keys, student, teacher, self.train_dataset, processes, saves_adapter)
        self.facts = describe_run(keys, processes, self.model, source.describe(), samples)

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        dataset, times = train_dataset or self.train_dataset, self.args.rollouts_per_prompt
        if times == 1:
            return super()._get_train_sampler(dataset)
        seed = self.args.data_seed if self.args.data_seed is not None else self.args.seed
        shuffle = self.args.train_sampling_strategy != "sequential"
        return RepeatSampler(len(dataset), times, seed, shuffle, lambda: int(self.state.epoch or 0))

    # One optimizer step: all its micro-batches at once, then each through the loss.

    def get_batch_samples(self, epoch_iterator: Iterator, num_batches: int, device: torch.device) -> tuple[list, Any]:
        """The micro-batches of an optimizer step, and the number of sequences that their loss is a mean over."""
        per_step = self.args.gradient_accumulation_steps  # the loader gives fewer at the end of an epoch

        def pull() -> list[list[Sample]]:
            with timed("data"):
                return super(SEKDTrainer, self).get_batch_samples(epoch_iterator, per_step, device)[0]

        with self.waiting():
            micro_batches = self.schedule.next_step(self.state.global_step, self.state.max_steps, pull)
        self.record_selection([sample for samples in micro_batches for sample in samples])
        if not self.method.divergence.reads_batch:
            micro_batches = group_by_length(micro_batches)
        batches = [self._collate(samples) for samples in micro_batches]
        sequences = torch.tensor(sum(int((b["targets"] >= 0).any(1).sum()) for b in batches), device=device)
        return batches, self.accelerator.reduce(sequences, "sum").clamp(min=1)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Float[Tensor, ""]:
        """This micro-batch's share of the mean over the sequences of the optimizer step."""
        batch, step = Batch.from_inputs(inputs), self.state.global_step
        generators = self._make_generators(batch)
        inspect = None
        if batch.student_entropy is not None and step % AGREEMENT_STEPS == 0:
            fraction, chunk_rows = self.method.policy.fraction.value(step), self.args.head_chunk_rows
            inspect = partial(measure_agreement, fraction=fraction, chunk_rows=chunk_rows)

        def share(batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
            total, sums = distill(model, self.teacher, batch, self.method, step, generators, inspect)
            # Wrappers average gradients over processes. Multiplying by their number gives the sum.
            return total / num_items_in_batch * self.accelerator.num_processes, sums

        with self.accelerator.autocast():
            loss, sums = run_inside(model, share, batch)
        if not torch.isfinite(loss):
            raise FloatingPointError(
                f"the loss is {loss.item()} at step {step}, on samples {batch.sample_ids.tolist()}; training stops "
                f"before this changes the weights. Checkpoints are in {self.args.output_dir}; a lower learning_rate or "
                "max_grad_norm may help, or bf16: false"
            )
        add_sums(self._sums, sums)
        self.floor.count_batch(batch, step, sums)
        return loss

    def _make_generators(self, batch: Batch) -> list[torch.Generator]:
        """The generator of each sequence at the next step."""
        repeats_ids = self.args.rollouts_per_prompt > 1 or isinstance(self.train_dataset, IterableDataset)
        return make_generators(batch, self.args.seed, self.state.global_step, by_targets=repeats_ids)

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """As ``Trainer.training_step``; with gls, also rescale the accumulated gradient after the last micro-batch.

        The loss then is the mean over the chosen positions of the whole step.
        """
        loss, selected = super().training_step(model, inputs, num_items_in_batch), self.method.policy.selected
        if selected is None:
            return loss
        self._step_loss += loss
        if not self.accelerator.sync_gradients:
            return loss
        all_selected = self.accelerator.reduce(torch.tensor(selected, device=loss.device), "sum")
        factor = (num_items_in_batch / all_selected.clamp(min=1)).item()
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter.grad.mul_(factor)
        total, self._step_loss = self._step_loss, 0.0
        return total * factor - (total - loss)  # the Trainer adds up the micro-batches' losses

    @timed("scoring")
    def end_step(self) -> None:
        """Called after each optimizer step: a policy with state learns from it."""
        self.method.policy.end_step(FinishedStep(gather_object, self._sum_over_processes, self._kl_after))

    def _sum_over_processes(self, tensor: Tensor) -> Tensor:
        return self.accelerator.reduce(tensor.to(self.args.device), "sum").cpu()

    @torch.no_grad()
    def _kl_after(self, batch: Batch, chosen: Bool[Tensor, " N"], state: TeacherState) -> Float[Tensor, " K"]:
        model = self.model_wrapped
        with self.accelerator.autocast():
            return run_inside(model, lambda b: kl_after_step(model, self.teacher, b, chosen, state, self.method), batch)

    # Around the steps

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As :meth:`ResumableTrainer.train`. An engine that the run started ends with it; an error ends any engine."""
        try:
            output = super().train(*args, **kwargs)
        except BaseException:
            self.close()
            raise
        if not self.schedule.engine_was_given:
            self.close()
        return output

    def begin(self, checkpoint: str | None) -> None:
        """Begin with the policy's state and the rollouts of a checkpoint, or without any."""
        self.method = Method.from_config(self.args, self.method.vocab)  # a new policy: an attempt may have failed
        self.floor.method, self._step_loss = self.method, 0.0
        super().begin(checkpoint)
        if checkpoint is not None:
            load_state(self.method.policy, self.args.position_policy, checkpoint)
            resume_early_stopping(self.callback_handler.callbacks, self.state)
        self.schedule.begin(checkpoint)
        self.recorder.begin()

    def save_state(self, folder: str) -> None:
        """Write the policy's state, and the rollouts that were not trained on yet, into a checkpoint."""
        if self.args.should_save:
            save_state(self.method.policy, self.args.position_policy, folder)
        self.schedule.save(folder)

    def write_student(self, written: str, folder: str) -> None:
        """Write the student's files, which are for ``folder``: with ``merge_adapter``, those of a whole student."""
        for adapter in getattr(unwrap(self.model_wrapped), "peft_config", {}).values():
            check_models_outside(folder, {"the base of the student's adapter": adapter.base_model_name_or_path})
        if self.args.merge_adapter:
            save_merged(self.model_wrapped, self.processing_class, written, self.args.should_save)
        else:
            super().write_student(written, folder)

    def record_selection(self, samples: Sequence[Sample] = (), is_end: bool = False) -> None:
        """Keep what the student would choose now of a few sequences, if that is due (``record_selection``).

        ``samples`` are the samples of the next step. Nothing that training draws or learns depends on this.
        """
        with self.uncounted():
            self.recorder.record(self.pair, self.method, self._make_generators, self.state, samples, is_end)

    def close(self) -> None:
        """End the rollout engine."""
        self.schedule.close()

    end_waits = close

    @property
    def engine(self) -> RolloutEngine | None:
        """The rollout engine; None before the first round."""
        return self.schedule.engine

    @property
    def pair(self) -> Pair:
        """The student in its wrappers and the teacher, as an evaluation reads them."""
        return Pair(
            *(self.model_wrapped, self.teacher, self.method.vocab, self.args.device, self.pad_token_id),
            autocast=self.accelerator.autocast,
            batch_size=self.args.per_device_eval_batch_size,
            chunk_rows=self.method.chunk_rows,
        )

    @torch.no_grad()
    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """The means of :func:`measure_sequences` over all valid positions of the held-out data, and ``eval_suite``.

        An on-policy run (``lmbda`` 1) evaluates fresh rollouts of the held-out prompts. With an ``eval_dataset`` as
        argument, its samples alone are measured. Nothing that training draws, learns or keeps depends on this.

        Raises:
            ValueError: there is nothing to evaluate.
        """
        data = self.eval_dataset if eval_dataset is None else eval_dataset
        if data is not None and "input_ids" not in next(iter(data)):
            data = prepare(data, self.processing_class, self.args)
        samples = None if data is None else _make_samples(list(data))
        with self.uncounted(), evaluating(self.model_wrapped):
            metrics = self.evaluation.measure(self.pair, samples, with_suite=eval_dataset is None)
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in metrics.items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def more_logs(self) -> dict[str, float]:
        """The checks of weights, and the values of schedules."""
        return self.schedule.weight_check.take_log() | self.args.get_scheduled(self.state.global_step - 1)

    @timed("data")
    def _collate(self, samples: list[Sample]) -> dict[str, Tensor]:
        batch = collate(samples, self.pad_token_id)
        self.count(padding=batch["input_ids"].numel() - sum(len(sample.input_ids) for sample in samples))
        return batch


class _EndOfStep(TrainerCallback):
    def __init__(self, trainer: SEKDTrainer) -> None:
        self.trainer = trainer

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.end_step()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.record_selection(is_end=True)


def _make_samples(rows: list[dict[str, Any]]) -> list[Sample]:
    """The loader's collator. Samples are batched later, once it is known whether their step is on-policy."""
    return [Sample(**row) for row in rows]
