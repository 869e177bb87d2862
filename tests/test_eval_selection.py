"""What a run keeps for its report equals a naive computation, and changes nothing in the run."""

import copy
import os
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from cache_helpers import SETTINGS, make_cache
from helpers import config, make_model, make_trainer, trained_weights
from oracles import seeded
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from sekd.data.batch import Sample, collate
from sekd.data.prepare import prepare
from sekd.distill import Method
from sekd.eval.selection import SNAPSHOTS, TOP, choose_steps, decode_tokens, measure_selection
from sekd.eval.snapshots import FOLDER, list_snapshots, read_snapshot
from sekd.files import DamagedFile
from sekd.on_policy.schedule import is_on_policy
from sekd.teachers import LiveTeacher
from sekd.types import Batch


def make_batch(tokenizer, rows, args):
    samples = [Sample(**row) for row in prepare(rows, tokenizer, args)]
    return samples, Batch(**collate(samples, 0))


@pytest.mark.parametrize("score", ["student_entropy", "reverse_kl"])
def test_a_snapshot_equals_a_naive_computation(tmp_path, tokenizer, pairs, score):
    student, teacher = make_model("untied"), make_model("untied", 1)
    args = make_trainer(tmp_path, tokenizer, pairs, position_score=score, position_fraction=0.3).args
    samples, batch = make_batch(tokenizer, pairs.select(range(3)), args)
    kept = measure_selection(student, LiveTeacher(teacher, 128), batch, Method.from_config(args, 128), 0)
    n = 0
    for sample in samples:
        ids = torch.tensor([sample.input_ids])
        with torch.no_grad():
            q, p = (m(input_ids=ids).logits[0].double().log_softmax(-1) for m in (student, teacher))
        places = [t for t in range(len(sample.input_ids) - 1) if sample.supervised[t + 1]]
        entropies = [-(q[t].exp() * q[t]).sum().item() for t in places]
        reverse = [(q[t].exp() * (q[t] - p[t])).sum().item() for t in places]
        scores = {"student_entropy": entropies, "reverse_kl": reverse}[score]
        budget = max(1, -(-3 * len(places) // 10))
        chosen = sorted(range(len(places)), key=lambda i: -scores[i])[:budget]
        for i, t in enumerate(places):
            expected = {
                "student_entropy": entropies[i],
                "reverse_kl": reverse[i],
                "forward_kl": (p[t].exp() * (p[t] - q[t])).sum().item(),
                "teacher_entropy": -(p[t].exp() * p[t]).sum().item(),
                "student_ce": -q[t, sample.input_ids[t + 1]].item(),
                "weight": 1 / budget if i in chosen else 0,
            }
            for name, value in expected.items():
                assert kept[name][n].item() == pytest.approx(value, rel=1e-4, abs=1e-6), name
            assert kept["scores"][n].tolist() == pytest.approx([scores[i]], rel=1e-4)
            for name, logp in (("student", q), ("teacher", p)):
                order = logp[t].argsort(descending=True)[:TOP]
                assert kept[f"{name}_ids"][n].tolist() == order.tolist()
                assert kept[f"{name}_probs"][n].tolist() == pytest.approx(logp[t][order].exp().tolist(), rel=1e-4)
            n += 1
    assert n == len(kept["weight"])


def test_the_policy_stays_as_it_is_and_draws_as_the_step_would(tmp_path, tokenizer, pairs):
    student, teacher = make_model("untied"), LiveTeacher(make_model("untied", 1), 128)
    for policy in ("gls", "random", "pos_rs", "bandit"):
        args = make_trainer(tmp_path, tokenizer, pairs, position_policy=policy).args
        _, batch = make_batch(tokenizer, pairs.select(range(3)), args)
        method = Method.from_config(args, 128)
        before = copy.deepcopy(method.policy.state_dict()), method.policy.selected
        kept = [measure_selection(student, teacher, batch, method, 3, seeded(batch)) for _ in range(2)]
        assert torch.equal(kept[0]["weight"], kept[1]["weight"])
        after = method.policy.state_dict(), method.policy.selected
        assert str(before) == str(after), policy
        scores = kept[0]["scores"].shape[1]
        assert scores == len(args.scoring.names) if args.scoring else scores == 0


def read_all(folder):
    return {step: read_snapshot(path) for step, path in list_snapshots(os.path.join(folder, FOLDER)).items()}


def test_a_run_keeps_held_out_sequences_and_learns_the_same(tmp_path, tokenizer, pairs):
    kept = {}
    for number in (0, 2):
        torch.manual_seed(0)
        student = make_model("untied").train()
        options = dict(eval_dataset=pairs.select(range(5)))
        folder = tmp_path / str(number)
        choices = dict(record_selection=number, max_steps=8, position_policy="random")
        trainer = make_trainer(folder, tokenizer, pairs, student, None, options, **choices)
        kept[number] = trained_weights(trainer), [entry.get("loss") for entry in trainer.state.log_history]
    assert kept[0][1] == kept[2][1]
    assert all(torch.equal(weight, kept[2][0][name]) for name, weight in kept[0][0].items())
    assert not (tmp_path / "0" / FOLDER).exists()
    snapshots = read_all(tmp_path / "2")
    assert [*snapshots] == sorted(choose_steps(8)) == [0, 2, 4, 6, 8]
    assert len(choose_steps(8)) == SNAPSHOTS
    held_out = [Sample(**row) for row in prepare(pairs.select(range(2)), tokenizer, trainer.args)]
    for snapshot in snapshots.values():
        assert snapshot.samples == [*map(asdict, held_out)]
        assert snapshot.source == "held-out data"
        assert snapshot.scores == []
    tokens = held_out[0].input_ids
    assert snapshots[0].texts[tokens[0]] == f" {tokenizer.decode([tokens[0]])}"
    first = snapshots[0].columns["position"][snapshots[0].columns["sample"] == 0]
    assert [tokens[t + 1] for t in first.tolist()] == [
        token for token, is_target in zip(tokens[1:], held_out[0].supervised[1:], strict=True) if is_target
    ]
    assert not torch.equal(snapshots[0].columns["student_entropy"], snapshots[8].columns["student_entropy"])
    bytes_a_position = sum(c.element_size() * c.shape[1:].numel() for c in snapshots[0].columns.values())
    assert bytes_a_position <= 90


def test_a_snapshot_shows_the_positions_of_the_step(tmp_path, tokenizer, pairs):
    """Without held-out data a run keeps sequences of its first step, with the weights that the step gives them."""
    seen = []
    trainer = make_trainer(tmp_path, tokenizer, pairs, position_policy="pos_rs", record_selection=4, max_steps=1)
    begin = trainer.begin

    def watch(checkpoint):
        begin(checkpoint)
        inner = trainer.method.policy.function

        def function(scores, valid, **options):
            weights = inner(scores, valid, **options)
            seen.append(weights[valid])
            return weights

        trainer.method.policy.function = function

    trainer.begin = watch
    trainer.train()
    recorded, trained = seen[0], seen[1]
    assert sorted(recorded.tolist()) == sorted(trained.tolist())
    assert torch.equal(read_all(tmp_path)[0].columns["weight"], recorded)


def test_a_resumed_on_policy_run_keeps_the_same_snapshots(tmp_path, tokenizer, pairs):
    choices = dict(lmbda=1.0, max_steps=8, save_strategy="steps", save_steps=3, record_selection=2)
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    make_trainer(whole, tokenizer, pairs, **choices).train()
    make_trainer(resumed, tokenizer, pairs, **choices).train()
    for step in (4, 6, 8):
        os.remove(list_snapshots(str(resumed / FOLDER))[step])
    again = make_trainer(resumed, tokenizer, pairs, **choices)
    again.train(resume_from_checkpoint=str(resumed / "checkpoint-3"))
    first, second = read_all(whole), read_all(resumed)
    assert [*first] == [*second] == [0, 2, 4, 6, 8]
    for step, snapshot in first.items():
        assert snapshot.source == "rollouts of the first step"
        assert snapshot.samples == first[0].samples == second[step].samples
        for name, column in snapshot.columns.items():
            assert torch.equal(column, second[step].columns[name]), (step, name)


def test_a_cache_gives_the_estimate_on_its_classes(tmp_path, tokenizer, pairs):
    make_cache(tmp_path / "cache", tokenizer, pairs)
    choices = dict(teacher_cache=str(tmp_path / "cache"), class_selection="rs_kd", record_selection=2) | SETTINGS
    trainer = make_trainer(tmp_path / "run", tokenizer, pairs, **choices)
    trainer.train()
    snapshot = read_all(tmp_path / "run")[0]
    columns = snapshot.columns
    assert columns["teacher_entropy"].isnan().all()
    batch = Batch(**collate([Sample(**fields) for fields in snapshot.samples], 0))
    state = trainer.teacher.read(batch)
    with torch.no_grad():
        q = make_model("untied")(input_ids=batch.input_ids).logits[batch.valid].log_softmax(-1)
    estimate = torch.where(state["probs"] > 0, state["probs"] * (state["probs"].log() - q.gather(1, state["ids"])), 0.0)
    assert columns["forward_kl"].float().tolist() == pytest.approx(estimate.sum(1).tolist(), rel=2e-3)
    assert columns["teacher_probs"].float().sum(1).max() <= 1.001


def test_damaged_snapshots_are_named(tmp_path, tokenizer, pairs):
    make_trainer(tmp_path, tokenizer, pairs, record_selection=1).train()
    path = Path(list_snapshots(str(tmp_path / FOLDER))[0])
    content = path.read_bytes()
    of_another_version = content.replace(b'\\"version\\": 1', b'\\"version\\": 9')
    assert of_another_version != content
    for damaged in (content[:50], content[: len(content) // 2], b"", of_another_version):
        path.write_bytes(damaged)
        with pytest.raises(DamagedFile, match=r"0000000\.safetensors"):
            read_snapshot(str(path))
    for facts in ("{}", "[]", '{"version": 1}', '{"version": 1, "texts": {}, "samples": [{}]}'):
        save_file({"weight": torch.zeros(2)}, path, {"sekd": facts})
        with pytest.raises(DamagedFile, match=r"0000000\.safetensors"):
            read_snapshot(str(path))


def test_a_new_run_removes_the_snapshots_of_the_run_before(tmp_path, tokenizer, pairs):
    make_trainer(tmp_path, tokenizer, pairs, record_selection=1, max_steps=4).train()
    make_trainer(tmp_path, tokenizer, pairs, record_selection=0, max_steps=4, overwrite_output_dir=True).train()
    assert not list_snapshots(str(tmp_path / FOLDER))


def test_a_mixed_run_names_the_source_of_its_sequences(tmp_path, tokenizer, pairs):
    for lmbda, source in ((0.0, "training data"), (1.0, "rollouts of the first step")):
        make_trainer(tmp_path / source, tokenizer, pairs, lmbda=lmbda, record_selection=1).train()
        assert read_all(tmp_path / source)[0].source == source
    options = dict(eval_dataset=pairs.select(range(2)))
    make_trainer(tmp_path / "mixed", tokenizer, pairs, None, None, options, lmbda=0.5, record_selection=1).train()
    assert read_all(tmp_path / "mixed")[0].source == "held-out data"
    first = next(seed for seed in range(20) if not is_on_policy(config(lmbda=0.5, seed=seed), 0))
    make_trainer(tmp_path / "off", tokenizer, pairs, lmbda=0.5, seed=first, record_selection=1).train()
    assert read_all(tmp_path / "off")[0].source == "training data"


def test_a_token_keeps_the_space_before_it():
    """Llama's decoder drops the space before the first token."""
    model = models.Unigram(
        [("<unk>", 0.0), ("▁the", -1.0), ("▁teacher", -1.0), ("s", -1.0), ("a", -2.0), ("▁", -3.0)], 0
    )
    words = Tokenizer(model)
    words.pre_tokenizer, words.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>")
    ids = tokenizer("the teachers")["input_ids"]
    texts = decode_tokens(tokenizer, ids)
    assert "".join(texts[token] for token in ids) == " the teachers"
    assert [tokenizer.decode([token]) for token in ids] == ["the", "teacher", "s"]
