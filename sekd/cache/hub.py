"""Push a cache to a dataset repository of the Hugging Face hub, and pull one from there."""

import os

from huggingface_hub import CommitOperationAdd, HfApi, hf_hub_download, snapshot_download
from huggingface_hub.errors import RemoteEntryNotFoundError

from sekd.cache.store import MANIFEST, Store, is_cache, read_manifest, verify

CARD = """\
---
tags:
- sekd
- knowledge-distillation
---

# Teacher cache of {teacher}

Sampled classes of the teacher at {positions:,} positions of {samples:,} samples ({draws} draws a position, vocabulary
{vocab:,}), built by `sekd cache build`. To train from it without the teacher:

```bash
sekd cache pull {repo} DIR
sekd train RECIPE --teacher_cache DIR
```

`manifest.json` says what it was built from. A recipe with another tokenizer, length or number of draws is refused.
"""


def push(folder: str, repo: str, private: bool = False) -> str:
    """Upload a cache in one commit, so that a reader sees all of it or nothing; returns the repository's address.

    Raises:
        ValueError: an incomplete or broken cache; the error lists its problems.
    """
    store = _open_verified(folder)
    fingerprint = store.fingerprint
    card = CARD.format(
        repo=repo,
        teacher=fingerprint["teacher"]["name"],
        positions=store.total("rows"),
        samples=store.total("samples"),
        draws=fingerprint["class_samples"],
        vocab=fingerprint["vocab"],
    )
    files = [MANIFEST, *(shard["file"] for shard in store.manifest["shards"])]
    additions = [CommitOperationAdd(name, os.path.join(folder, name)) for name in files]
    api = HfApi()
    address = api.create_repo(repo, repo_type="dataset", private=private, exist_ok=True)
    api.create_commit(
        repo,
        [*additions, CommitOperationAdd("README.md", card.encode())],
        commit_message="Upload a teacher cache",
        repo_type="dataset",
    )
    return str(address)


def pull(repo: str, folder: str, revision: str | None = None) -> Store:
    """Download a cache and check every byte of it. A download that was interrupted resumes.

    Raises:
        ValueError: a repository without a cache, a folder with another cache, or bytes other than the pushed ones.
    """
    try:
        commit = (
            HfApi().dataset_info(repo, revision=revision).sha
        )  # one commit for all files: a push meanwhile must not mix two caches
        manifest = hf_hub_download(repo, MANIFEST, repo_type="dataset", revision=commit)
    except RemoteEntryNotFoundError as error:
        raise ValueError(f"dataset repository {repo!r} holds no {MANIFEST}, so it is not a cache of sekd") from error
    pushed = read_manifest(os.path.dirname(manifest))
    if is_cache(folder) and read_manifest(folder)["fingerprint"] != pushed["fingerprint"]:
        raise ValueError(f"{folder!r} holds another cache than {repo!r}; name another folder, or delete it")
    names = [MANIFEST, *(shard["file"] for shard in pushed["shards"])]
    snapshot_download(repo, repo_type="dataset", revision=commit, local_dir=folder, allow_patterns=names)
    return _open_verified(folder)


def _open_verified(folder: str) -> Store:
    if problems := verify(folder):
        raise ValueError(f"the cache in {folder!r} is broken: {'; '.join(problems)}")
    return Store(folder)
