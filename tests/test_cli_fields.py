"""The keys that `sekd train --help` lists are the keys there are."""

import dataclasses
from dataclasses import field
from pathlib import Path

from sekd.cli import fields
from sekd.cli.train import HELP_FILE


def test_the_file_is_what_the_generator_writes():
    assert Path(HELP_FILE).read_text() == fields.format_help(), (
        "the fields have changed: run `python -m sekd.cli.fields` to write train_help.txt again"
    )


def test_every_key_is_in_one_group_and_has_help():
    known, own = fields.list_fields(), fields.list_own_fields()
    shown = [name for names in fields.list_groups().values() for name in names]
    assert len(shown) == len({*shown})
    assert {*own} <= {*shown}, "put new fields into a group"
    assert {*shown} <= known.keys(), "a group names a key that no record has"
    assert {*fields.FOREIGN} == {*shown} - {*own}
    for name in own:
        assert known[name].metadata["help"]


def test_help_is_in_our_own_words():
    known = fields.list_fields()
    for name, text in fields.FOREIGN.items():
        theirs = str(known[name].metadata.get("help", "")).split()
        ours = text.split()
        for start in range(len(ours) - 7):
            copied = ours[start : start + 8]
            assert all(theirs[i : i + 8] != copied for i in range(len(theirs))), f"{name}: {' '.join(copied)}"


def test_defaults_are_spelled_as_in_a_recipe():
    @dataclasses.dataclass
    class Example:
        urls: list = field(default_factory=lambda: ["http://a", "b"])
        nothing: str | None = None
        rate: float = 1e-5
        flag: bool = True
        when: str = "no"

    shown = {f.name: fields.format_default(f) for f in dataclasses.fields(Example)}
    assert shown == {"urls": "['http://a', b]", "nothing": "null", "rate": "1.0e-05", "flag": "true", "when": "'no'"}
    text = fields.format_help()
    assert "  rollout_server_urls: ['http://127.0.0.1:8000']\n" in text
    assert "MISSING" not in text
    assert "factory" not in text
