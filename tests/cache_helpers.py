"""Small caches, and how to damage them."""

import json
import re

from helpers import VOCAB, make_model

from sekd import SEKDConfig
from sekd.cache.build import build_cache
from sekd.cache.readers import LocalReader
from sekd.cache.store import MANIFEST, Store
from sekd.data.prepare import prepare
from sekd.models import freeze

SETTINGS = dict(max_length=40, max_prompt_length=20, class_samples=16)


def config(folder, **choices):
    """The configuration that a cache is built with."""
    return SEKDConfig(output_dir=str(folder), bf16=False, disable_tqdm=True, **SETTINGS | choices)


def make_cache(folder, tokenizer, rows, seed=1, order=None, shard_samples=8, **choices):
    args = config(f"{folder}.run", **choices)
    dataset = prepare(rows, tokenizer, args)
    if order is not None:
        dataset = dataset.select(order(len(dataset)))
    reader = LocalReader(freeze(make_model("untied", seed)), VOCAB, args)
    return build_cache(dataset, reader, tokenizer, args, str(folder), shard_samples)


def contents(folder, timed=True):
    """The bytes of each file of a cache; with ``timed=False`` without the seconds of its build."""
    files = {path.name: path.read_bytes() for path in sorted(folder.iterdir())}
    return files if timed else {name: re.sub(rb' "seconds": [^\n]*', b"", content) for name, content in files.items()}


def damage_truncate(folder):
    path = folder / "shard-00001.arrow"
    path.write_bytes(path.read_bytes()[:-100])


def damage_flip(folder, shard=1):
    path = folder / f"shard-{shard:05d}.arrow"
    store = Store(str(folder))
    data = path.read_bytes()
    # In the middle of a sample's bytes, where Arrow itself notices nothing.
    place = data.index(store.shards[shard].column("data")[0].as_py()) + 30
    path.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])


def damage_remove(folder):
    (folder / "shard-00001.arrow").unlink()


def damage_format(folder):
    manifest = json.loads((folder / MANIFEST).read_text())
    (folder / MANIFEST).write_text(json.dumps(manifest | {"format": 99}))


def damage_incomplete(folder):
    manifest = json.loads((folder / MANIFEST).read_text())
    (folder / MANIFEST).write_text(json.dumps(manifest | {"complete": False}))


def damage_manifest(folder):
    (folder / MANIFEST).unlink()
