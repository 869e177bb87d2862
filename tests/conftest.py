"""Fixtures that every test file may use."""

import os
import random

os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
from datasets import Dataset
from helpers import make_pairs, make_tokenizer, words
from transformers import PreTrainedTokenizerFast


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
