"""What a person sees and what a run leaves in its folder."""

import json

from transformers import TrainerControl, TrainerState, TrainingArguments

from sekd.callbacks import ProgressLine, RunFiles
from sekd.versions import installed_versions


def state(step, history=()):
    made = TrainerState(log_history=list(history), is_world_process_zero=True)
    made.global_step = step
    return made


def test_a_log_is_one_short_line(capsys):
    logs = {
        "loss": 0.25,
        "forward_kl_selected": 0.5,
        "selected_fraction": 0.2,
        "tokens_per_second": 12345.6,
        "epoch": 1.0,
    }
    ProgressLine().on_log(TrainingArguments(output_dir="unused"), state(7), TrainerControl(), logs=logs)
    assert capsys.readouterr().out == "step     7  loss 0.2500  forward_kl_sel 0.5000  sel 20%  12,346 tok/s\n"


def test_the_line_shows_the_metrics_that_an_evaluation_names(capsys):
    """The evaluation names them when it has measured them, after the callback was made."""
    forms = {}
    line = ProgressLine(forms)
    forms |= {"wikitext_word_perplexity": "wikitext word_perplexity {:.2f}", "mine_too_strict": "mine {:.1%}"}
    logs = {"eval_wikitext_word_perplexity": 19.664, "eval_mine_too_strict": 0.5, "eval_mine_acc": 0.25}
    line.on_log(TrainingArguments(output_dir="unused"), state(7), TrainerControl(), logs=logs)
    assert capsys.readouterr().out == "step     7  wikitext word_perplexity 19.66  mine 50.0%\n"


def test_metrics_keep_what_the_checkpoint_knows_only(tmp_path):
    args = TrainingArguments(output_dir=str(tmp_path))
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}\n{"step": 3, "lost": true}\n')
    files = RunFiles(args)
    files.on_train_begin(args, state(2, [{"step": 1}, {"step": 2}]), TrainerControl())
    files.on_log(args, state(3, [{"step": 1}, {"step": 2}, {"step": 3}]), TrainerControl())
    assert [json.loads(line) for line in (tmp_path / "metrics.jsonl").open()] == [{"step": 1}, {"step": 2}, {"step": 3}]
    assert f"output_dir: {tmp_path}" in (tmp_path / "recipe.yaml").read_text()
    assert json.loads((tmp_path / "versions.json").read_text())["torch"] == installed_versions()["torch"]


def test_nothing_is_written_before_a_run_begins(tmp_path):
    """The folder may be another run's, and an evaluation alone is no run."""
    args = TrainingArguments(output_dir=str(tmp_path))
    RunFiles(args).on_log(args, state(0, [{"step": 0}]), TrainerControl())
    assert not (tmp_path / "metrics.jsonl").exists()
