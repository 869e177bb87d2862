"""Tiny models, tokenizers and data, made from configurations; nothing is downloaded."""

import os
import random
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
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
)

VOCAB = 128
WORDS = 120
EOS = 120

_SMALL = dict(
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
    "tied": lambda: Qwen3ForCausalLM(Qwen3Config(**_SMALL, head_dim=16, tie_word_embeddings=True)),
    "untied": lambda: LlamaForCausalLM(LlamaConfig(**_SMALL, tie_word_embeddings=False)),
    "bias": lambda: PhiForCausalLM(PhiConfig(**_SMALL, partial_rotary_factor=0.5)),
    "softcap": lambda: Gemma2ForCausalLM(
        Gemma2Config(**_SMALL, head_dim=16, final_logit_softcapping=3.0, query_pre_attn_scalar=16, sliding_window=64)
    ),
    "logit_scale": lambda: CohereForCausalLM(CohereConfig(**_SMALL, logit_scale=0.25)),
    "logits_scaling": lambda: GraniteForCausalLM(GraniteConfig(**_SMALL, logits_scaling=4.0)),
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
    config = Qwen3Config(**_SMALL | sizes, head_dim=64)
    config.tie_word_embeddings = True
    return Qwen3ForCausalLM(config).eval()


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


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer()


@pytest.fixture(scope="session")
def pairs() -> Dataset:
    return make_pairs()


@pytest.fixture(scope="session")
def texts() -> Dataset:
    """64 documents of 3 to 60 words."""
    generator = random.Random(1)
    return Dataset.from_list([{"text": words(generator, 3, 60)} for _ in range(64)])
