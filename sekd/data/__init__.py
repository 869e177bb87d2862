"""From datasets to token batches: load rows, encode each as tokens, prepare samples, collate them into batches."""

from sekd.data.batch import Sample, collate, from_rollout
from sekd.data.load import is_local, load_rows
from sekd.data.prepare import check_same_tokenizer, prepare

__all__ = ["Sample", "check_same_tokenizer", "collate", "from_rollout", "is_local", "load_rows", "prepare"]
