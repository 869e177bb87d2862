"""Fixtures that every test file may use."""

import gc
import os
import random
import sys
from collections.abc import Iterator
from contextlib import ExitStack

os.environ["HF_HUB_OFFLINE"] = "1"

import huggingface_hub.constants
import pytest
import torch
import transformers.utils.hub
import yaml
from datasets import Dataset
from devices import ELSEWHERE, MadeOn, TwoDevices
from helpers import DEVICE, make_pairs, make_tokenizer, save_pair, words
from hub_server import Hub, serve_hub
from transformers import PreTrainedTokenizerFast
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from sekd.policies import POLICIES
from sekd.scores import SCORES

pytest_plugins = ["page_helpers"]  # the fixtures of the tests in a browser


@pytest.fixture(scope="module", autouse=True)
def _keep_imports_from_the_garbage_collector() -> None:
    """A Trainer collects garbage after each run, which takes 0.4 s with all that was imported."""
    gc.collect()
    gc.freeze()


def pytest_configure(config: pytest.Config) -> None:
    """With SEKD_TEST_DEVICE, the tensors that tests make are on it. The tests of formulas run on any device."""
    with ExitStack() as modes:
        if DEVICE.type == ELSEWHERE.type:
            modes.enter_context(TwoDevices())
        if DEVICE.type != "cpu":
            modes.enter_context(MadeOn(DEVICE))
        config.add_cleanup(modes.pop_all().close)


def pytest_sessionfinish() -> None:
    gc.unfreeze()


@pytest.fixture
def float64(monkeypatch) -> Iterator[None]:
    """Models and steps in float64, where the order of a sum changes 1e-16 of it: for tests that claim equality.

    Llama's own norm computes in float32, whatever its input is.
    """

    def forward(norm: LlamaRMSNorm, hidden: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.rms_norm(hidden, norm.weight.shape, norm.weight, norm.variance_epsilon)

    monkeypatch.setattr(LlamaRMSNorm, "forward", forward)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


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


@pytest.fixture
def hub(monkeypatch, tmp_path) -> Iterator[dict[str, bytes]]:
    """The files of a hub that the client in this process talks to."""
    with serve_hub() as address:
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", address)
        template = address + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
        monkeypatch.setattr(transformers.utils.hub, "_hf_api", None)
        yield Hub.files


@pytest.fixture
def recipe(tmp_path, tokenizer, pairs):
    """A recipe that runs here in seconds."""
    save_pair(tmp_path, tokenizer)
    pairs.to_json(tmp_path / "pairs.jsonl")
    keys = {
        "output_dir": str(tmp_path / "run"),
        "model_name_or_path": str(tmp_path / "student"),
        "teacher_model_name_or_path": str(tmp_path / "teacher"),
        "dataset_name": str(tmp_path / "pairs.jsonl"),
        "rollout_engine": "hf",
        "max_completion_length": 4,
        "max_steps": 4,
        "logging_steps": 2,
        "save_steps": 2,
        "learning_rate": "1e-3",
        "report_to": "none",
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(keys))
    return str(path)


@pytest.fixture
def own_strategies() -> Iterator[None]:
    """Forget afterwards what recipes/newer_scores.py adds, so that the next test imports it again."""
    scores, policies = {**SCORES}, {**POLICIES}
    yield
    sys.modules.pop("newer_scores", None)
    SCORES.clear()
    POLICIES.clear()
    SCORES.update(scores)
    POLICIES.update(policies)
