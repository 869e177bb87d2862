"""Which values and which combinations work: what cannot is refused, and every combination that can trains."""

import importlib.util
from pathlib import Path

import pytest
from helpers import config, make_model, make_trainer
from transformers.trainer_optimizer import _BITSANDBYTES_OPTIMIZERS
from transformers.training_args import OptimizerNames
from trl import ModelConfig

from rollouts import HFEngine
from sekd.classes import CLASS_SELECTIONS
from sekd.config import SEKDConfig
from sekd.losses import DIVERGENCES
from sekd.policies import POLICIES
from sekd.scores import SCORES, Scoring
from sekd.validation.inputs import check_inputs
from sekd.validation.training import check_adapter
from sekd.validation.values import is_installed


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (dict(position_fraction=0.0), r"position_fraction 0.0 is outside \(0, 1\]; write 0.2 for 20 %"),
        (dict(position_fraction=20), r"position_fraction 20 is outside"),
        (dict(lmbda=1.5), r"lmbda 1.5 is outside \[0, 1\]; 0 is off-policy, 1 on-policy"),
        (dict(lmbda=-0.1), r"lmbda -0.1 is outside"),
        (dict(kd_weight=2.0), r"kd_weight 2.0 is outside \[0, 1\]; 1 is the divergence alone"),
        (dict(kd_temperature=0.0), r"kd_temperature 0.0 must be above 0"),
        (
            dict(jsd_beta=1.0),
            r"jsd_beta 1.0 is outside \(0, 1\); at the limits choose divergence: forward_kl or reverse_kl",
        ),
        (dict(divergence="kl"), r"divergence 'kl' is unknown; choose one of forward_kl, reverse_kl, jsd"),
        (dict(position_score="entropy"), r"position_score 'entropy' is unknown; choose from student_entropy"),
        (dict(position_score='{"kl": '), r"position_score '\{\"kl\": ' is not a mapping"),
        (dict(position_score={"kl": 1.0, "hk": 1.0}), r"position_score 'hk' is unknown; choose from student_entropy"),
        (dict(position_score=3), r"position_score 3 must be a mapping such as \{key: value\}, or text"),
        (dict(position_score=["kl"]), r"position_score \['kl'\] must be a mapping such as"),
        (dict(position_score={}), "all weights are 0; set one of them above 0"),
        (dict(position_score={"kl": "much"}), "the weight of kl is 'much'; it must be a finite number"),
        (
            dict(position_score="kl", position_policy="tip"),
            "position_score 'kl' has no effect: position_policy 'tip' reads student_entropy and reverse_kl; leave",
        ),
        (
            dict(score_normalization="zscore", position_policy="random"),
            "score_normalization 'zscore' has no effect: position_policy 'random' reads no score",
        ),
        (
            dict(divergence="at_kd", position_policy="pos_rs"),
            "'at_kd' weighs positions itself",
        ),
        (dict(decoupled_alpha=0.0, decoupled_beta=0.0), "decoupled_alpha and decoupled_beta are both 0"),
        (dict(kd_temperature=float("nan")), "kd_temperature nan must be a finite number"),
        (dict(bandit_alpha=float("inf")), "bandit_alpha inf must be a finite number"),
        (dict(position_fraction=True), "position_fraction True must be a finite number"),
        (dict(position_skip=1.5), "position_skip 1.5 must be a whole number"),
        (dict(gls_queue_size=10**9), "gls_queue_size 1000000000 must be from 1 to 10,000,000"),
        (dict(samples_file=""), "samples_file is empty; name a path, or leave it out"),
        (dict(text_prompt_length=0), "text_prompt_length 0 must be a whole number from 1 to max_prompt_length 512"),
        (dict(text_prompt_length=9, max_prompt_length=8), "text_prompt_length 9 must be .* to max_prompt_length 8"),
        (dict(text_prompt_length=1.5), "text_prompt_length 1.5 must be a whole number"),
        (dict(teacher_cache="c", lmbda=0.5), "lmbda 0.5 with teacher_cache: a cache holds positions of the data"),
        (dict(teacher_cache="c", class_selection="top_k_classes"), "teacher_cache holds rs_kd targets"),
        (
            dict(teacher_cache="c", class_samples=65),
            "class_samples 65 with teacher_cache: a cache holds at most 64 draws",
        ),
        (
            dict(teacher_cache="c", position_score="kl"),
            "position_policy 'top_k' reads kl, which needs",
        ),
        (
            dict(teacher_cache="c", position_policy="tip"),
            "position_policy 'tip' reads reverse_kl, which needs the teacher's whole",
        ),
        (
            dict(teacher_cache="c", sample_fraction=0.5, sample_score="kl"),
            "sample_score 'kl' needs a teacher model, but with teacher_cache none is loaded",
        ),
        (dict(score_normalization="log"), r"score_normalization 'log' is unknown; choose one of none, zscore, minmax"),
        (
            dict(position_policy="pos_rs", score_normalization="zscore"),
            "gives negative scores, but position_policy 'pos_rs' needs scores of at least 0; use minmax or none",
        ),
        (
            dict(position_policy="weighted", position_score={"kl": 1.0, "student_ce": -1.0}),
            "position_score has a negative weight, but position_policy 'weighted' needs scores of at least 0",
        ),
        (dict(position_skip=-1), "position_skip -1 must not be negative; 0 skips no position"),
        (dict(curriculum_steps=0), "curriculum_steps 0 must be at least 1"),
        (dict(gls_queue_size=0), "gls_queue_size 0 must be from 1 to"),
        (dict(pos_rs_exponent=-0.5), "pos_rs_exponent -0.5 must not be negative"),
        (dict(pos_rs_coverage=1.0), r"pos_rs_coverage 1.0 is outside \[0, 1\); at 1 choose position_policy: top_k"),
        (dict(bandit_alpha=-1.0), "bandit_alpha -1.0 must not be negative; 0 never explores"),
        (dict(bandit_ridge=0.0), "bandit_ridge 0.0 must be above 0"),
        (dict(skew_alpha=0.0), r"skew_alpha 0.0 is outside \(0, 1\)"),
        (dict(decoupled_beta=-8.0), "decoupled_beta -8.0 must not be negative; 0 leaves that part out"),
        (dict(class_selection="rskd"), "class_selection 'rskd' is unknown; choose one of full, rs_kd, top_k_classes"),
        (dict(class_samples=0), "class_samples 0 must be at least 1"),
        (dict(sampled_softmax=-1), "sampled_softmax -1 must not be negative; 0 uses all classes"),
        (
            dict(sampled_softmax=4096),
            "needs a selection of classes, but class_selection is full; set class_selection: rs_kd",
        ),
        (
            dict(class_selection="rs_kd", divergence="reverse_kl"),
            "class_selection 'rs_kd' estimates forward KL only; set divergence: forward_kl",
        ),
        (
            dict(class_selection="rs_kd", sampled_softmax=4096, kd_weight=0.5),
            "kd_weight 0.5 adds cross-entropy, which sampled_softmax cannot compute",
        ),
        (dict(class_selection="rs_kd", sampled_softmax=64), "sampled_softmax 64 must be above class_samples 64"),
        (dict(sample_fraction=0.0), r"sample_fraction 0.0 is outside \(0, 1\]; 0.2 keeps 20 %"),
        (dict(sample_score="loss"), "sample_score 'loss' is unknown; choose one of student_entropy"),
        (dict(sample_pool=0), "sample_pool 0 must be at least 1"),
        (dict(position_policy="top"), r"position_policy 'top' is unknown; choose one of all, top_k, random"),
        (dict(rollout_engine="tgi"), r"rollout_engine 'tgi' is unknown; choose one of vllm, vllm_server, hf"),
        (dict(rollout_timeout=0), "rollout_timeout 0.* must be above 0 seconds"),
        (
            dict(rollout_server_urls=["localhost:8000"]),
            "'localhost:8000' is not a server's address; write http://127.0.0.1:8000",
        ),
        (dict(rollout_server_urls=[], rollout_engine="vllm_server"), "rollout_server_urls is empty: name the servers"),
        (dict(overlong_prompts="cut"), r"overlong_prompts 'cut' is unknown; choose one of error, drop"),
        (dict(teacher_dtype="int8"), r"teacher_dtype 'int8' is unknown; choose one of auto, bfloat16"),
        (dict(temperature=-1.0), r"temperature -1.0 must not be negative; 0 is greedy"),
        (dict(top_p=0.0), r"top_p 0.0 is outside \(0, 1\]"),
        (dict(top_k=-1), r"top_k -1 must not be negative"),
        (dict(min_p=1.1), r"min_p 1.1 is outside \[0, 1\]"),
        (dict(max_length=0), r"max_length 0 must be at least 1"),
        (dict(max_completion_length=0), r"max_completion_length 0 must be at least 1"),
        (dict(head_chunk_rows=0), r"head_chunk_rows 0 must be at least 1"),
        (dict(eval_limit=0), r"eval_limit 0 must be at least 1"),
        (dict(eval_limit=5), r"eval_limit 5 has no effect without eval_suite; leave it out"),
        (dict(eval_chat_template=True), r"eval_chat_template True has no effect without eval_suite"),
        (dict(early_stopping_threshold=0.1), r"early_stopping_threshold 0.1 has no effect without early_stopping_pati"),
        (dict(early_stopping_patience=2), r"early_stopping_patience 2 counts evaluations: set eval_strategy: steps"),
        (dict(early_stopping_patience=0), r"early_stopping_patience 0 must be at least 1"),
        (dict(early_stopping_patience=2, eval_strategy="epoch"), r"early_stopping_patience 2 needs metric_for_best_m"),
        (dict(train_sampling_strategy="group_by_length"), "'group_by_length' is not supported: samples of"),
        (dict(torch_compile=True), r"torch_compile is not supported"),
        (dict(use_liger_kernel=True), r"use_liger_kernel true is not supported: sekd calls the student in parts"),
        (dict(auto_find_batch_size=True), r"auto_find_batch_size: true is not supported.*halve per_device_train"),
        (dict(prompt_template="Q:"), r"prompt_template 'Q:' lacks \{prompt\}"),
    ],
)
def test_values_that_cannot_work(values, message):
    with pytest.raises(ValueError, match=message):
        config(**values)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (dict(max_steps=0), "max_steps 0 trains nothing; set it to at least 1, or leave it out"),
        (dict(max_steps=-2), "max_steps -2 trains nothing"),
        (dict(num_train_epochs=0), "num_train_epochs 0 trains nothing; set it above 0"),
        (dict(per_device_train_batch_size=0), "per_device_train_batch_size 0 must be at least 1"),
        (dict(per_device_eval_batch_size=-1), "per_device_eval_batch_size -1 must be at least 1"),
        (dict(gradient_accumulation_steps=0), "gradient_accumulation_steps 0 must be at least 1"),
        (dict(learning_rate=-1.0), "learning_rate -1.0 must be at least 0"),
        (dict(seed=2**32), r"seed 4294967296 must be below 2\^32"),
        (dict(adam_beta2=1.0), r"adam_beta2 1.0 is outside \[0, 1\)"),
        (dict(save_steps=0), "save_steps 0 must be above 0"),
        (dict(report_to="nothing"), "report_to 'nothing' is unknown; choose all, none, or some of .*, wandb"),
        (dict(report_to=["clearml"]), "report_to 'clearml' is not installed; install it, or set report_to: none"),
        (dict(deepspeed={"a": 1}), r"deepspeed \{'a': 1\} needs deepspeed: run `pip install deepspeed`"),
        (dict(teacher_device="gpu 1"), "teacher_device 'gpu 1' is no device; write cpu, cuda or, for one GPU, cuda:1"),
        (
            dict(teacher_load_in_4bit=True, teacher_load_in_8bit=True),
            "teacher_load_in_4bit true with teacher_load_in_8bit true: a teacher has one kind of weights",
        ),
        (dict(teacher_fsdp=True, teacher_device="cpu"), "teacher_fsdp true with teacher_device 'cpu': only whole"),
        pytest.param(
            dict(teacher_fsdp=True, teacher_load_in_8bit=True),
            "teacher_fsdp true with teacher_load_in_8bit True: only",
            marks=pytest.mark.skipif(not is_installed("bitsandbytes"), reason="bitsandbytes is not installed here"),
        ),
        (dict(teacher_fsdp=True, teacher_cache="c"), "teacher_fsdp true has no effect with teacher_cache 'c'"),
        (
            dict(teacher_fsdp=True, sample_fraction=0.5, sample_score="kl"),
            "teacher_fsdp true with sample_score 'kl': samples are scored before the teacher is sharded",
        ),
        (dict(accelerator_config={"a": 1}), "accelerator_config has no key 'a'; it has split_batches, "),
        (dict(label_smoothing_factor=0.1), "label_smoothing_factor 0.1 has no effect: sekd's loss smooths no labels"),
        (dict(prediction_loss_only=True), "prediction_loss_only True has no effect"),
        (dict(bf16_full_eval=True), "bf16_full_eval True has no effect: evaluation has the precision of training"),
        (dict(fp16_full_eval=True), "fp16_full_eval True has no effect"),
        (dict(supervise_prompt=True, lmbda=1.0), "supervise_prompt true has no effect with lmbda 1.0: rollouts are"),
        (
            dict(supervise_prompt=True, rollouts="x.jsonl"),
            "supervise_prompt true has no effect with rollouts 'x.jsonl'",
        ),
        (dict(output_dir=__file__), "output_dir '.*': '.*test_validation.py' is a file; name a folder"),
        (dict(output_dir=f"{__file__}/a/b"), "output_dir '.*a/b': '.*test_validation.py' is a file; name a folder"),
    ],
)
def test_values_of_transformers_own_fields(values, message):
    """They are refused here, before any model is loaded."""
    with pytest.raises(ValueError, match=message):
        SEKDConfig(**{"output_dir": "unused", **values})


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (dict(lora_r=4), "lora_r 4 has no effect without use_peft: set use_peft: true, or leave lora_r out"),
        (dict(lora_target_modules=["q_proj"]), "lora_target_modules .* has no effect without use_peft"),
        (dict(use_dora=True), "use_dora True has no effect without use_peft"),
        (
            dict(use_peft=True, bnb_4bit_quant_type="fp4"),
            "bnb_4bit_quant_type 'fp4' has no effect without load_in_4bit",
        ),
        (dict(use_peft=True, lora_r=0), "lora_r 0 must be at least 1"),
        (dict(use_peft=True, lora_dropout=1.0), r"lora_dropout 1.0 is outside \[0, 1\)"),
    ],
)
def test_an_adapters_fields(values, message):
    with pytest.raises(ValueError, match=message):
        check_adapter(ModelConfig(**values))
    check_adapter(ModelConfig())
    check_adapter(ModelConfig(use_peft=True, lora_r=4, load_in_4bit=True, bnb_4bit_quant_type="fp4"))


@pytest.mark.parametrize(
    ("values", "line"),
    [
        (dict(do_eval=True), "do_eval true has no effect alone; set eval_strategy: steps or epoch, or eval_on_start"),
        (
            dict(lmbda=1.0, max_length=128),
            "max_length 128 has no effect with lmbda 1.0: a rollout has at most max_prompt_length 512 + "
            "max_completion_length 256 tokens",
        ),
        (dict(eval_suite=["paper"]), "eval_suite ['paper'] has no effect alone; set eval_strategy: steps or epoch"),
        (dict(do_eval=True, eval_strategy="epoch"), None),
        (dict(do_eval=True, eval_on_start=True), None),
        (dict(lmbda=0.5, max_length=128), None),
        (dict(lmbda=1.0, max_length=1024), None),
    ],
)
def test_what_shared_recipes_have_without_effect_is_named_once(values, line, monkeypatch):
    warnings = []
    for module in ("inputs", "training"):
        monkeypatch.setattr(f"sekd.validation.{module}.logger.warning", warnings.append)
    config(**values)
    assert len(warnings) == (line is not None)
    assert all(warning.startswith(line) for warning in warnings)


def test_vllm_asked_for_but_not_installed_says_what_to_install(monkeypatch, pairs):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "vllm" else found(name, *a))
    with pytest.raises(ValueError, match=r"needs vllm, which is not installed: run `bash scripts/setup.sh`"):
        check_inputs(config(lmbda=1.0, rollout_engine="vllm"), pairs, {}, None, False, None)
    check_inputs(config(lmbda=1.0, rollout_engine="vllm"), pairs, {}, None, False, HFEngine(make_model()))
    check_inputs(config(lmbda=0.0, rollout_engine="vllm"), pairs, {}, None, False, None)  # nothing generates


def test_a_quantized_teacher_needs_bitsandbytes(monkeypatch):
    monkeypatch.setattr("sekd.validation.teachers.is_installed", lambda package: package != "bitsandbytes")
    with pytest.raises(ValueError, match="teacher_load_in_4bit true needs bitsandbytes: run `pip install bitsandb"):
        config(teacher_load_in_4bit=True)


def test_the_teachers_place_fits_the_number_of_processes(monkeypatch, pairs):
    with pytest.raises(ValueError, match="teacher_fsdp true shards over several processes, and there is one: start"):
        check_inputs(config(teacher_fsdp=True), pairs, {}, None, False, None)
    with pytest.raises(ValueError, match="teacher_device 'cuda:77': this machine has cpu"):
        check_inputs(config(teacher_device="cuda:77"), pairs, {}, None, False, None)
    args = config(teacher_fsdp=True)
    monkeypatch.setattr(SEKDConfig, "world_size", 2)
    check_inputs(args, pairs, {}, None, False, None)
    args.teacher_device, args.teacher_fsdp = "cuda:1", False
    monkeypatch.setattr("sekd.validation.teachers._check_presence", lambda name: None)
    with pytest.raises(ValueError, match="teacher_device 'cuda:1' would hold a teacher for each of the 2 processes"):
        check_inputs(args, pairs, {}, None, False, None)


def test_zero_3_is_refused(monkeypatch, pairs):
    monkeypatch.setattr("transformers.integrations.is_deepspeed_zero3_enabled", lambda: True)
    with pytest.raises(ValueError, match=r"DeepSpeed ZeRO-3 gathers the student's head .* or ZeRO stage 2"):
        check_inputs(config(), pairs, {}, None, False, None)


def test_options_that_nothing_reads_are_named(caplog, monkeypatch):
    warnings = []
    monkeypatch.setattr("sekd.validation.selection.logger.warning", warnings.append)
    config(pos_rs_exponent=0.5, jsd_beta=0.3, class_samples=12)
    assert warnings == [
        f"{name} has no effect with the chosen policy, divergence and classes"
        for name in ("class_samples 12", "jsd_beta 0.3", "pos_rs_exponent 0.5")
    ]
    warnings.clear()
    config(position_policy="pos_rs", pos_rs_exponent=0.5, divergence="jsd", jsd_beta=0.3)
    assert not warnings


@pytest.mark.parametrize("field", ["teacher_system_prompt", "teacher_prompt_prefix"])
def test_fields_that_exclude_each_other(field):
    with pytest.raises(ValueError, match=f"{field} with teacher_cache 'c': a cache holds .* remove teacher_cache"):
        config(**{field: "w9", "teacher_cache": "c"})
    with pytest.raises(ValueError, match=f"supervise_prompt true with {field}: .* set supervise_prompt: false"):
        config(**{field: "w9", "supervise_prompt": True})


PAGE = (Path(__file__).parents[1] / "docs" / "selection.md").read_text()
SEVERAL = {"student_entropy": 1.0, "kl": 0.5}


def allowed(**choices):
    try:
        SEKDConfig(output_dir="unused", rollout_engine="hf", **choices)
    except ValueError:
        return False
    return True


def mark(**choices):
    return "✓" if allowed(**choices) else "–"


def policy_table():
    lines = [
        "| `position_policy` | reads | teacher's head | several scores | `zscore` | `at_kd` | `teacher_cache` | state |"
    ]
    lines += ["|---|---|---|---|---|---|---|---|"]
    for name in POLICIES:
        own = POLICIES[name].reads
        reads = "`position_score`" if own is None else ", ".join(f"`{n}`" for n in own) or "nothing"
        head = "as the score" if own is None else "all positions" if Scoring(own).needs_teacher else "chosen positions"
        several, zscore = ("", "")
        if own is None:
            several = mark(position_policy=name, position_score=SEVERAL)
            zscore = mark(position_policy=name, position_score=SEVERAL, score_normalization="zscore")
        at_kd = mark(position_policy=name, divergence="at_kd")
        cache = mark(position_policy=name, teacher_cache="folder")
        state = "✓" if POLICIES[name].has_state else ""
        lines.append(f"| `{name}` | {reads} | {head} | {several} | {zscore} | {at_kd} | {cache} | {state} |")
    return "\n".join(line.replace("|  |", "| |").replace("|  |", "| |") for line in lines)


def class_table():
    kinds = {"`full`": {}, "`rs_kd`": {"class_selection": "rs_kd"}}
    kinds |= {"`top_k_classes`": {"class_selection": "top_k_classes"}}
    kinds |= {"with `sampled_softmax`": {"class_selection": "rs_kd", "sampled_softmax": 4096}}
    lines = [f"| `divergence` | {' | '.join(kinds)} |", "|---" * (len(kinds) + 1) + "|"]
    for name in DIVERGENCES:
        cells = [mark(divergence=name, **choices) for choices in kinds.values()]
        lines.append(f"| `{name}` | {' | '.join(cells)} |")
    cells = [mark(divergence="forward_kl", kd_weight=0.5, **choices) for choices in kinds.values()]
    lines.append(f"| `forward_kl`, `kd_weight` < 1 | {' | '.join(cells)} |")
    return "\n".join(lines)


@pytest.mark.parametrize("table", [policy_table, class_table])
def test_the_page_has_the_table(table):
    assert table() in PAGE, f"put this into docs/selection.md:\n\n{table()}\n"


def cells():
    """Every pair that the tables allow."""
    for policy in POLICIES:
        if POLICIES[policy].reads is not None:
            yield {"position_policy": policy}
            continue
        # Every score with top_k; one of each kind with the others, since no policy knows which score it reads.
        for score in SCORES if policy == "top_k" else ("student_entropy", "kl"):
            yield {"position_policy": policy, "position_score": score}
        for normalization in ("none", "minmax", "zscore"):
            if normalization != "zscore" or not POLICIES[policy].needs_positive:
                choices = {"position_score": SEVERAL, "score_normalization": normalization}
                yield {"position_policy": policy, **choices}
    for policy in POLICIES:
        yield {"position_policy": policy, "lmbda": 1.0}
        yield {"position_policy": policy, "class_selection": "rs_kd", "class_samples": 8}
        if allowed(position_policy=policy, divergence="at_kd"):
            yield {"position_policy": policy, "divergence": "at_kd"}
    for divergence in DIVERGENCES:
        yield {"divergence": divergence}
        yield {"divergence": divergence, "kd_weight": 0.5, "kd_temperature": 2.0}
    for classes in [*CLASS_SELECTIONS][1:]:
        yield {"class_selection": classes, "class_samples": 8}
        yield {"class_selection": classes, "class_samples": 8, "kd_weight": 0.5, "kd_temperature": 2.0}
        yield {"class_selection": classes, "class_samples": 8, "sampled_softmax": 64}
    for score in (*SCORES, "random"):
        yield {"sample_fraction": 0.5, "sample_score": score}


def name_of(choices):
    return "-".join("+".join(v) if isinstance(v, dict) else str(v) for v in choices.values())


def train(tmp_path, tokenizer, pairs, steps, learning_rate, choices):
    options = dict(max_steps=steps, learning_rate=learning_rate, save_strategy="no", logging_steps=steps)
    trainer = make_trainer(
        tmp_path,
        tokenizer,
        pairs,
        None,
        None,
        dict(eval_dataset=pairs),
        **options,
        **{"position_fraction": 0.4} | choices,
    )
    before = trainer.evaluate()["eval_forward_kl"]
    trainer.train()
    assert trainer.state.global_step == steps
    assert trainer.evaluate()["eval_forward_kl"] < before


@pytest.mark.slow
@pytest.mark.parametrize("choices", [pytest.param(c, id=name_of(c)) for c in cells()])
def test_every_cell_trains(tmp_path, tokenizer, pairs, choices):
    train(tmp_path, tokenizer, pairs.select(range(24)), 8, 1e-2, choices)


RS_KD = {"class_selection": "rs_kd", "class_samples": 64}
TOP_SAMPLES = {"sample_fraction": 0.2}


PAPER = {
    "Full KD": {"position_policy": "all"},
    "RandomPos": {"position_policy": "random"},
    "AT-KD": {"position_policy": "all", "divergence": "at_kd"},
    **{score: {"position_score": score} for score in SCORES},
    "GLS": {"position_policy": "gls"},
    "Curriculum": {"position_policy": "curriculum", "curriculum_steps": 50},
    "Pos RS-KD*": {"position_policy": "pos_rs_corrected"},
    "Pos RS-KD": {"position_policy": "pos_rs"},
    "RandomSmp": {"position_policy": "all", "sample_score": "random", **TOP_SAMPLES},
    "RS-KD": {"position_policy": "all", **RS_KD},
    "TopSmp": {"position_policy": "all", **TOP_SAMPLES},
    "TopSmp + RS-KD": {"position_policy": "all", **TOP_SAMPLES, **RS_KD},
    "SE-KD + TopSmp": TOP_SAMPLES,
    "SE-KD 3X": {**TOP_SAMPLES, **RS_KD},
}
"""The rows of the paper's tables 2, 3 and 4."""


@pytest.mark.slow
@pytest.mark.parametrize("row", PAPER)
def test_every_row_of_the_papers_tables_trains(tmp_path, tokenizer, pairs, row):
    train(tmp_path, tokenizer, pairs, 50, 5e-3, {"position_fraction": 0.2, **PAPER[row]})


def test_one_process_may_not_wait_longer_than_the_others_wait_for_it(monkeypatch, pairs):
    values = dict(lmbda=1.0, rollout_engine="vllm_server", rollout_timeout=1800)
    check_inputs(config(**values), pairs, {}, None, False, None)
    monkeypatch.setattr(SEKDConfig, "world_size", 2)
    with pytest.raises(ValueError, match=r"rollout_timeout 1800 is not below ddp_timeout 1800: while one"):
        check_inputs(config(**values), pairs, {}, None, False, None)
    check_inputs(config(**values, ddp_timeout=2000), pairs, {}, None, False, None)


@pytest.mark.parametrize("name", [o.value for o in OptimizerNames if o in _BITSANDBYTES_OPTIMIZERS])
def test_an_optimizer_of_bitsandbytes_is_refused_with_fsdp(monkeypatch, pairs, name):
    pytest.importorskip("bitsandbytes")
    check_inputs(config(optim=name), pairs, {}, None, False, None)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ValueError, match=f"optim {name} with FSDP: bitsandbytes cannot update weights in shards; set"):
        check_inputs(config(optim=name), pairs, {}, None, False, None)


def test_an_optimizer_that_takes_shards_is_not_refused_with_fsdp(monkeypatch, pairs):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    for name in ("adamw_torch_fused", "adafactor", "adamw_torch_8bit"):
        check_inputs(config(optim=name), pairs, {}, None, False, None)
