"""Steps elsewhere than on the CPU equal the CPU's, and no operation takes tensors of both devices."""

import pytest
import torch
from cache_helpers import SETTINGS, make_cache
from cache_helpers import config as cache_config
from devices import ELSEWHERE, TwoDevices
from helpers import VOCAB, add_lora, config, make_batch, make_model, make_trainer, prompts_and_completions

from sekd.cache.readers import LocalReader
from sekd.classes import CLASS_SELECTIONS
from sekd.data.prepare import prepare
from sekd.distill import Method, distill, kl_after_step
from sekd.losses import DIVERGENCES
from sekd.models import freeze, run_inside
from sekd.policies import POLICIES, FinishedStep
from sekd.scores import SCORES
from sekd.seeds import make_generators
from sekd.teachers.live import LiveTeacher

CPU = torch.device("cpu")

STEPS = {
    **{f"policy {name}": {"position_policy": name} for name in POLICIES},
    **{f"divergence {name}": {"divergence": name} for name in DIVERGENCES},
    **{f"score {name}": {"position_score": name} for name in SCORES},
    **{f"classes {name}": {"class_selection": name, "class_samples": 8} for name in CLASS_SELECTIONS},
    "sampled softmax": {"class_selection": "rs_kd", "class_samples": 8, "sampled_softmax": 40},
    "several scores": {"position_score": {"kl": 1.0, "student_ce": 0.5}, "score_normalization": "zscore"},
    "temperature and cross-entropy": {"kd_temperature": 2.0, "kd_weight": 0.5, "position_skip": 1},
}


def take_step(device, in_bf16=False, **choices):
    """The loss, the gradients and the sums of a step with everything on ``device``, as the trainer takes it."""
    args = config(bf16=False, head_chunk_rows=8, position_fraction=0.4, **choices)
    student, model = (make_model("untied", seed).to(device) for seed in (0, 1))
    teacher, batch = LiveTeacher(freeze(model), VOCAB), make_batch(prompts_and_completions()[0]).to(device)
    method, step = Method.from_config(args, VOCAB), 3
    generators = make_generators(batch, args.seed, step, by_targets=True)
    with torch.autocast(device.type, torch.bfloat16, enabled=in_bf16):
        loss, sums = run_inside(student, lambda b: distill(student, teacher, b, method, step, generators), batch)
    loss.backward()
    method.policy.end_step(FinishedStep(kl_after=lambda *part: kl_after_step(student, teacher, *part, method)))
    numbers = {"loss": loss.detach(), **sums, **{name: p.grad for name, p in student.named_parameters()}}
    assert {tensor.device for tensor in numbers.values()} == {device}
    return {name: tensor.cpu() for name, tensor in (numbers | method.policy.state_dict()).items()}


@pytest.mark.parametrize("choice", STEPS)
def test_a_step_elsewhere_equals_the_cpus(choice):
    expected = take_step(CPU, **STEPS[choice])
    with TwoDevices():
        elsewhere = take_step(ELSEWHERE, **STEPS[choice])
    assert elsewhere.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(elsewhere[name], value, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


def test_a_step_in_bf16_elsewhere_is_as_exact_as_the_cpus():
    """Positions are drawn, since rounded scores would choose others. Attention rounds in other places."""
    exact, expected = (take_step(CPU, in_bf16, position_policy="random") for in_bf16 in (False, True))
    with TwoDevices():
        elsewhere = take_step(ELSEWHERE, in_bf16=True, position_policy="random")
    own_error, error = (
        sum((step[name] - exact[name]).square().sum() for name in exact if "weight" in name).sqrt()
        for step in (elsewhere, expected)
    )
    assert 0 < own_error < 1.5 * error


RUNS = {
    "SE-KD": {},
    "gls": {"position_policy": "gls"},
    "a policy that learns": {"position_policy": "bandit"},
    "an adapter": {"adapter": True, "gradient_checkpointing": True},
    "packed documents": {"packing": True, "max_length": 32, "use_texts": True},
    "on-policy": {"lmbda": 1.0, "teacher_prompt_prefix": "w1 w2 "},
    "on-policy, scored by the sampler": {"lmbda": 1.0, "score_source": "rollout", "rollouts_per_prompt": 2},
    "samples by a score of the teacher": {"sample_fraction": 0.5, "sample_score": "kl"},
    "a cache": {"cached": True},
    "a cache with the teacher's entropy": {"cached": True, "position_score": "teacher_entropy"},
}


def run(folder, tokenizer, pairs, texts, adapter=False, use_texts=False, cached=False, **choices):
    """The trainer after its run, and its evaluation."""
    data, student = (texts if use_texts else pairs).select(range(16)), make_model("untied")
    choices = {"optim": "sgd", "learning_rate": 0.1, **choices}
    if cached:
        cache = make_cache(folder / "cache", tokenizer, data, cache_teacher_entropy=True)
        choices |= SETTINGS | {"teacher_cache": cache.folder}
    student = add_lora(student) if adapter else student
    trainer = make_trainer(folder / "run", tokenizer, data, student, trainer_options={"eval_dataset": data}, **choices)
    trainer.train()
    return trainer, {} if cached else trainer.evaluate()


@pytest.mark.slow
@pytest.mark.parametrize("choice", RUNS)
def test_a_run_elsewhere_equals_the_cpus(tmp_path, tokenizer, pairs, texts, monkeypatch, choice):
    expected, metrics = run(tmp_path / "cpu", tokenizer, pairs, texts, **RUNS[choice])
    monkeypatch.setenv("ACCELERATE_TORCH_DEVICE", str(ELSEWHERE))
    monkeypatch.setattr(torch.accelerator, "synchronize", lambda device: None)  # nothing runs in the background
    with TwoDevices():
        trainer, own_metrics = run(tmp_path / "elsewhere", tokenizer, pairs, texts, **RUNS[choice])
        weights = {name: p.detach().cpu() for name, p in trainer.model.named_parameters()}
    assert {p.device for p in trainer.model.parameters()} == {ELSEWHERE}
    assert own_metrics == pytest.approx(metrics, rel=1e-3)
    for name, weight in expected.model.named_parameters():
        torch.testing.assert_close(weights[name], weight.detach(), rtol=1e-4, atol=1e-5)
    for own_line, line in zip(trainer.state.log_history, expected.state.log_history, strict=True):
        numbers = [name for name in line if name in ("loss", "grad_norm", "entropy", "selected_fraction", "train_loss")]
        assert [own_line[name] for name in numbers] == pytest.approx([line[name] for name in numbers], rel=1e-3)


def test_a_cache_from_a_teacher_elsewhere_is_the_cpus(tmp_path, tokenizer, pairs):
    args = cache_config(tmp_path, cache_teacher_entropy=True)
    samples = list(prepare(pairs.select(range(4)), tokenizer, args))
    expected = LocalReader(freeze(make_model("untied")), VOCAB, args).encode(samples)
    with TwoDevices():
        teacher = freeze(make_model("untied")).to(ELSEWHERE)
        assert LocalReader(teacher, VOCAB, args).encode(samples) == expected
