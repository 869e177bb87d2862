"""Tiny models, tokenizers, data and trainers, built from configurations; nothing is downloaded."""

import os
import random
import subprocess
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    BitsAndBytesConfig,
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PhiConfig,
    PhiForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from sekd import SEKDConfig, SEKDTrainer
from sekd.data.batch import Sample, collate
from sekd.data.prepare import prepare
from sekd.types import Batch

DEVICE = torch.device(os.environ.get("SEKD_TEST_DEVICE", "cpu"))
"""Where models and batches are; conftest.py puts other tensors there."""

VOCAB = 128
WORDS = 120
EOS = 120


SMALL = dict(
    vocab_size=VOCAB,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=2,
    pad_token_id=122,
    eos_token_id=EOS,
    bos_token_id=None,
)


ARCHITECTURES = {
    "tied": lambda: Qwen3ForCausalLM(Qwen3Config(**SMALL, head_dim=16, tie_word_embeddings=True)),
    "untied": lambda: LlamaForCausalLM(LlamaConfig(**SMALL, tie_word_embeddings=False)),
    "bias": lambda: PhiForCausalLM(PhiConfig(**SMALL, partial_rotary_factor=0.5)),
    "softcap": lambda: Gemma2ForCausalLM(
        Gemma2Config(**SMALL, head_dim=16, final_logit_softcapping=3.0, query_pre_attn_scalar=16, sliding_window=64)
    ),
    "logit_scale": lambda: CohereForCausalLM(CohereConfig(**SMALL, logit_scale=0.25)),
    "logits_scaling": lambda: GraniteForCausalLM(GraniteConfig(**SMALL, logits_scaling=4.0)),
}


def make_model(kind: str = "tied", seed: int = 0) -> PreTrainedModel:
    """A tiny model whose distributions are far from flat, so that wrong rows give wrong numbers."""
    torch.manual_seed(seed)
    model = ARCHITECTURES[kind]()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.3)
            elif "bias" in kind:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    return model.eval()


def make_vllm_model(seed: int = 0, vocab: int = VOCAB, intermediate: int = 48) -> PreTrainedModel:
    """A tiny model that vLLM can run: it needs heads of size 64 (and bitsandbytes an intermediate size like that)."""
    torch.manual_seed(seed)
    sizes = {"vocab_size": vocab, "hidden_size": 64, "intermediate_size": intermediate, "num_key_value_heads": 1}
    config = Qwen3Config(**SMALL | sizes, head_dim=64)
    config.tie_word_embeddings = True
    return Qwen3ForCausalLM(config).eval()


EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
"""The parameters of a mixture of experts' one module that holds all experts."""


def make_moe(seed: int = 0) -> PreTrainedModel:
    """A tiny mixture of experts."""
    torch.manual_seed(seed)
    sizes = dict(head_dim=16, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24, decoder_sparse_step=1)
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**SMALL, **sizes)).eval()


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Words w0 to w119, and a chat template."""
    vocab = {f"w{i}": i for i in range(WORDS)} | {"<eos>": EOS, "<unk>": 121, "<pad>": 122}
    vocab |= {"<user>": 123, "<assistant>": 124, "<system>": 125}
    words = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made = PreTrainedTokenizerFast(
        tokenizer_object=words, eos_token="<eos>", unk_token="<unk>", pad_token="<pad>", model_max_length=1024
    )
    made.chat_template = (
        "{% for m in messages %}<{{ m.role }}> "
        "{% if m.role == 'assistant' %}{% generation %}{{ m.content }} <eos>{% endgeneration %} "
        "{% else %}{{ m.content }} {% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<assistant> {% endif %}"
    )
    return made


def save_pair(folder: Path, tokenizer: PreTrainedTokenizerFast, texts: Dataset | None = None) -> None:
    """A student, a teacher, and texts.jsonl if there are texts, in a folder: what a recipe names."""
    for name, seed in (("student", 0), ("teacher", 1)):
        make_model("untied", seed).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    if texts is not None:
        texts.to_json(folder / "texts.jsonl")


def words(generator: random.Random, low: int, high: int) -> str:
    return " ".join(f"w{generator.randrange(WORDS)}" for _ in range(generator.randint(low, high)))


def make_pairs() -> Dataset:
    """64 prompts and completions."""
    generator = random.Random(0)
    return Dataset.from_list(
        [{"prompt": words(generator, 2, 8), "completion": words(generator, 1, 12)} for _ in range(64)]
    )


def make_trainer(tmp_path, tokenizer, data, student=None, teacher=None, trainer_options=None, **kwargs):
    defaults = dict(
        output_dir=str(tmp_path),
        rollout_engine="hf",
        max_completion_length=6,
        per_device_train_batch_size=4,
        max_steps=2,
        learning_rate=1e-3,
        bf16=False,
        logging_steps=1,
        save_strategy="no",
        disable_tqdm=True,
        teacher_dtype="float32",
        report_to="none",
        log_completions_steps=0,
    )
    return SEKDTrainer(
        model=student or make_model("untied"),
        teacher_model=teacher or make_model("untied", 1),
        args=SEKDConfig(**defaults | kwargs),
        train_dataset=data,
        processing_class=tokenizer,
        **(trainer_options or {}),
    )


def keep_engine(trainer):
    """The trainer, whose engine goes on after training, as an engine that the user passed does."""
    trainer.schedule.engine_was_given = True
    return trainer


def trained_weights(trainer):
    trainer.train()
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters()}


ONE_SGD_STEP = dict(max_steps=1, optim="sgd", learning_rate=1.0, max_grad_norm=0.0, lr_scheduler_type="constant")


def qlora_student(folder):
    """A saved student, and the trainer's options that load it in 4 bits with an adapter."""
    make_vllm_model(intermediate=128).save_pretrained(folder / "student")
    return str(folder / "student"), dict(
        peft_config=LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear"),
        model_init_kwargs=dict(quantization_config=BitsAndBytesConfig(load_in_4bit=True)),
    )


def config(**kwargs):
    """A configuration that trains nothing."""
    return SEKDConfig(output_dir="unused", **{"rollout_engine": "hf", **kwargs})


def first(rows, tokenizer, **kwargs):
    """The sample that the first row becomes."""
    return Sample(**prepare(Dataset.from_list(rows), tokenizer, config(**kwargs))[0])


def messages(*turns):
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


def rollout_row(prompt, completion, **more):
    """A row of a file of recorded rollouts."""
    texts = [" ".join(f"w{i}" if i != EOS else "<eos>" for i in ids) for ids in (prompt, completion)]
    ids = {"prompt_ids": prompt, "completion_ids": completion}
    return {**ids, "prompt": texts[0], "completion": texts[1], **more}


def gradients(model):
    return {name: p.grad.double() for name, p in model.named_parameters()}


def prompts_and_completions(seed=0):
    """Four samples, and the same as documents of (ids, supervised)."""
    generator = torch.Generator().manual_seed(seed)
    samples, documents = [], []
    for number, (prompt, completion) in enumerate([(3, 9), (5, 4), (2, 12), (4, 1)]):
        ids = torch.randint(0, VOCAB, (prompt + completion,), generator=generator).tolist()
        supervised = [0] * prompt + [1] * completion
        samples.append(Sample(ids, supervised, number, prompt))
        documents.append([(ids, supervised)])
    return samples, documents


def make_batch(samples):
    """The samples, padded with tokens 122, where the models are."""
    return Batch(**collate(samples, 122)).to(DEVICE)


class LargestTensor(TorchDispatchMode):
    """Remembers the largest tensor that any operation returned. What ``expand`` returns needs no memory."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for leaf in torch.utils._pytree.tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                in_memory = leaf.untyped_storage().nbytes() // leaf.itemsize
                self.elements = max(self.elements, min(leaf.numel(), in_memory))
        return result


def samples_with_contexts():
    """Prompts that are longer, shorter and as long for the teacher, and one that is the same."""
    generator = torch.Generator().manual_seed(0)

    def draw(count):
        return torch.randint(0, VOCAB, (count,), generator=generator).tolist()

    samples = []
    for number, (prompt, theirs, completion) in enumerate([(3, 11, 9), (5, 2, 4), (2, 2, 12), (4, None, 6)]):
        ids = draw(prompt + completion)
        supervised = [0] * prompt + [1] * completion
        context = None if theirs is None else draw(theirs)
        samples.append(Sample(ids, supervised, number, prompt, teacher_prompt_ids=context))
    return samples


def add_lora(model, **options):
    """The model with an adapter that changes it."""
    options = {"r": 4, "target_modules": ["q_proj", "v_proj", "up_proj"], **options}
    adapted = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **options))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name or "lora_embedding_B" in name or "magnitude" in name:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    return adapted.eval()


def run_two_processes(*arguments):
    """distributed_worker.py under torchrun."""
    here = Path(__file__).parent
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port=0"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{here}{os.pathsep}{here.parent}"}
    command += ["--rdzv_backend=c10d", "--rdzv_endpoint=127.0.0.1:0", str(here / "distributed_worker.py"), *arguments]
    run_command(command, environment)


def run_command(command, environment):
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
