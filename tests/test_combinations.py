"""What goes with what: the README's tables are generated here, and every cell that says yes trains."""

from pathlib import Path

import pytest
from test_trainer import make_trainer

from sekd.classes import CLASS_SELECTIONS
from sekd.config import SEKDConfig
from sekd.losses import DIVERGENCES
from sekd.policies import NEEDS_POSITIVE, POLICIES, READS
from sekd.policies.gls import STATEFUL
from sekd.scores import SCORES, Scoring

README = (Path(__file__).parents[1] / "README.md").read_text()
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
        own = READS.get(name)
        reads = "`position_score`" if own is None else ", ".join(f"`{n}`" for n in own) or "nothing"
        head = "as the score" if own is None else "all rows" if Scoring(own).needs_teacher else "chosen rows"
        several, zscore = ("", "")
        if own is None:
            several = mark(position_policy=name, position_score=SEVERAL)
            zscore = mark(position_policy=name, position_score=SEVERAL, score_normalization="zscore")
        at_kd = mark(position_policy=name, divergence="at_kd")
        cache = mark(position_policy=name, teacher_cache="folder")
        state = "✓" if name in STATEFUL else ""
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
def test_the_readme_has_the_table(table):
    assert table() in README, f"put this into the README:\n\n{table()}\n"


def cells():
    """Every pair that the tables allow."""
    for policy in POLICIES:
        if policy in READS:
            yield {"position_policy": policy}
            continue
        for score in SCORES:
            yield {"position_policy": policy, "position_score": score}
        for normalization in ("none", "minmax", "zscore"):
            if normalization != "zscore" or policy not in NEEDS_POSITIVE:
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
    for classes in CLASS_SELECTIONS[1:]:
        yield {"class_selection": classes, "class_samples": 8}
        yield {"class_selection": classes, "class_samples": 8, "kd_weight": 0.5, "kd_temperature": 2.0}
        yield {"class_selection": classes, "class_samples": 8, "sampled_softmax": 64}
    for score in (*SCORES, "random"):
        yield {"sample_fraction": 0.5, "sample_score": score}


def name_of(choices):
    return "-".join("+".join(v) if isinstance(v, dict) else str(v) for v in choices.values())


def train(tmp_path, tokenizer, pairs, steps, choices):
    options = dict(max_steps=steps, learning_rate=2e-3, save_strategy="no", logging_steps=steps)
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
    train(tmp_path, tokenizer, pairs.select(range(24)), 20, choices)


RS_KD = {"class_selection": "rs_kd", "class_samples": 64}
TOP_SAMPLES = {"sample_fraction": 0.2}
PAPER = {
    "Full KD": {"position_policy": "all"},
    "RandomPos": {"position_policy": "random"},
    "AT-KD": {"position_policy": "all", "divergence": "at_kd"},
    **{score: {"position_score": score} for score in SCORES},
    "GLS": {"position_policy": "gls"},
    "Curriculum": {"position_policy": "curriculum", "curriculum_steps": 200},
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
def test_every_row_of_the_papers_tables_trains_200_steps(tmp_path, tokenizer, pairs, row):
    train(tmp_path, tokenizer, pairs, 200, {"position_fraction": 0.2, **PAPER[row]})
