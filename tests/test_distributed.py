"""Two processes give the single process's loss and gradient."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import make_model
from distributed_worker import gradients, samples
from test_trainer import ONE_SGD_STEP, make_trainer, trained_weights

HERE = Path(__file__).parent
pytestmark = pytest.mark.slow


def run_two_processes(*arguments):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port=0"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE)}
    command += ["--rdzv_backend=c10d", "--rdzv_endpoint=127.0.0.1:0", str(HERE / "distributed_worker.py"), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


def test_fsdp2_gives_the_single_process_loss_and_gradient(tmp_path):
    run_two_processes("fsdp2", str(tmp_path / "found.pt"))
    found = torch.load(tmp_path / "found.pt")
    loss, expected = gradients(make_model("untied"), samples(), sequences=4, processes=1)
    torch.testing.assert_close(found["loss"], loss, rtol=1e-5, atol=1e-7)
    for name, gradient in expected.items():
        torch.testing.assert_close(found["gradients"][name], gradient, rtol=1e-4, atol=1e-6)
    # What a rollout engine would get: every tensor whole, under its checkpoint name.
    for name, tensor in make_model("untied").state_dict().items():
        assert torch.equal(found["weights"][name], tensor)


@pytest.mark.parametrize("policy", ["top_k", "random"])
def test_ddp_through_the_trainer_gives_the_single_process_step(tmp_path, tokenizer, pairs, policy):
    run_two_processes("ddp", str(tmp_path / "found.pt"), policy)
    found = torch.load(tmp_path / "found.pt")
    options = dict(per_device_train_batch_size=8, position_policy=policy)
    evaluation = dict(eval_dataset=pairs.select(range(5)))
    trainer = make_trainer(
        tmp_path, tokenizer, pairs.select(range(8)), None, None, evaluation, **ONE_SGD_STEP, **options
    )
    assert found["metrics"] == pytest.approx(trainer.evaluate(), rel=1e-5)
    for name, weight in trained_weights(trainer).items():
        torch.testing.assert_close(found["weights"][name], weight, rtol=1e-5, atol=1e-6)
    assert found["loss"] == pytest.approx(trainer.state.log_history[0]["loss"], rel=1e-5)
