"""A tiny model of text for lm-eval, rows of every task, and lm-eval's own command on them."""

import json
from pathlib import Path
from typing import Any

import torch
import yaml
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from sekd.eval.harness import run_prepared
from sekd.eval.prepared import DEFAULTS, TaskOptions, prepare_task
from sekd.eval.records import TaskResult

SHARED = Path(__file__).parents[2] / "shared" / "data"
FILES = {
    "arc_easy": "eval/arc_easy/test.jsonl",
    "hellaswag": "eval/hellaswag/validation.jsonl",
    "piqa": "eval/piqa/validation.jsonl",
    "lambada_openai": "eval/lambada_openai/test.jsonl",
    "gsm8k": "gsm8k/test.jsonl",
    "ifeval": "eval/ifeval/train.jsonl",
}


VOCAB = 800


def make_text_lm(seed: int = 0, context: int = 16384, batch_size: int = 8, **kwargs: Any) -> Any:
    """lm-eval's HFLM around a tiny model whose tokens are any text's."""
    from lm_eval.models.huggingface import HFLM

    torch.manual_seed(seed)
    tokens = Tokenizer(models.BPE())
    tokens.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<eos>", "<pad>"],
        show_progress=False,
    )
    tokens.train([str(Path(__file__).parents[1] / "LICENSE")], trainer)
    tokens.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokens, eos_token="<eos>", pad_token="<pad>")
    tokenizer.chat_template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=context,
        eos_token_id=0,
        bos_token_id=None,
        pad_token_id=1,
    )
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.3)
    return HFLM(model, tokenizer=tokenizer, batch_size=batch_size, device="cpu", **kwargs)


def run_task(lm: Any, name: str, split: str | None = None, options: TaskOptions = DEFAULTS) -> TaskResult:
    """What a model gives on a task."""
    return run_prepared(lm, prepare_task(name, split, options))


def write_rows(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def read_rows(task: str, count: int) -> list[dict]:
    """The first rows of a task in the shared data."""
    with open(SHARED / FILES[task]) as lines:
        return [json.loads(line) for _, line in zip(range(count), lines, strict=False)]


def run_lm_eval(folder: Path, yaml_file: str, files: dict[str, str], lm: Any, changes: dict, **kwargs: Any) -> Any:
    """The samples and results of ``lm_eval.simple_evaluate`` on local files, as its user would have it read them.

    A file of YAML includes that of the task and names the files instead of the hub's dataset.
    """
    import lm_eval
    import lm_eval.tasks

    own = Path(lm_eval.tasks.__file__).parent / yaml_file
    config = {"include": str(own), "task": "local", "dataset_path": "json", "dataset_name": None}
    config |= {"dataset_kwargs": {"data_files": files}} | changes
    (folder / "local.yaml").write_text(yaml.safe_dump(config))
    manager = lm_eval.tasks.TaskManager(include_path=str(folder), include_defaults=False)
    out = lm_eval.simple_evaluate(lm, tasks=["local"], task_manager=manager, bootstrap_iters=0, **kwargs)
    return out["samples"]["local"], out["results"]["local"]
