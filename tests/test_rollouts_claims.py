"""Two trainers and one server: one is refused, or stopped, and none trains on the other's weights."""

import os
import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from helpers import make_model
from rollout_helpers import PROMPTS
from serving import Served, SmallServer

from rollouts import HFEngine, RolloutConfigError, RolloutError, VLLMServerEngine, claims


@pytest.fixture(autouse=True)
def settle(monkeypatch):
    monkeypatch.setattr(claims, "SETTLE", 0.2)


@pytest.fixture
def served():
    return Served(make_model("untied"))


class Trainer:
    """A run with weights of its own, and its own door to the server."""

    def __init__(self, served, folder, seed, before=lambda path, body: None):
        self.server, self.folder = SmallServer(served, before), folder
        self.model = make_model("untied", seed)
        self.step, self.right = 0, HFEngine(self.model, 0.0, 4, stop_token_ids=[120]).generate(PROMPTS)
        self.engine = VLLMServerEngine(
            self.server.url, 0.0, 4, weights_folder=str(folder / "weights"), max_prompt_length=16, timeout=10
        )

    def sync(self):
        self.engine.sync_weights(self.model, self.step)
        self.step += 1

    def generate(self):
        """Whether the rollouts are those of this trainer's weights."""
        rollouts = self.engine.generate(PROMPTS)
        return [r.completion_ids for r in rollouts] == [r.completion_ids for r in self.right]


@pytest.fixture
def start(served, tmp_path):
    """A function that starts the run in a folder."""
    trainers = []

    def start(name, seed, **options):
        trainers.append(Trainer(served, tmp_path / name, seed, **options))
        return trainers[-1]

    yield start
    for trainer in trainers:
        trainer.engine.close()
        trainer.server.shutdown()
        trainer.server.server_close()


def hide_lock(trainer):
    """As if the other trainer ran on a machine that does not see this one's folder."""
    os.remove(f"{trainer.folder}/weights.lock")


def test_a_second_run_is_refused_and_names_the_first(start, served):
    first = start("first", 1)
    first.sync()
    assert first.generate()
    second = start("second", 2)
    with pytest.raises(RolloutConfigError, match=r"has the weights of the run in .*/first, which is still running"):
        second.sync()
    first.sync()
    assert first.generate()
    first.engine.close()
    assert served.version == "released"
    second.sync()
    assert second.generate()


def test_a_killed_run_and_one_whose_folder_is_gone_leave_the_server_free(start, served):
    first = start("first", 1)
    first.sync()
    first.engine.claim.lock.close()  # the system does this when a process ends
    first.engine.claim.lock = None
    second = start("second", 2)
    second.sync()
    assert second.generate()


def test_a_restarted_server_gets_the_weights_again(start, served):
    trainer = start("run", 1)
    trainer.sync()
    served.version, served.model = "default", make_model("untied")
    assert trainer.generate()


def test_a_run_whose_server_was_taken_stops_at_its_next_round_or_sync(start):
    first, second = start("first", 1), start("second", 2)
    first.sync()
    hide_lock(first)
    second.sync()
    assert second.generate()
    for action in (first.generate, first.sync):
        with pytest.raises(RolloutError, match=r"was taken by the run in .*/second, so it no longer has this run's"):
            action()
    assert second.generate()


def test_weights_between_the_others_weights_and_version_are_noticed(start):
    """A begins to load, B takes the server and loads, and A's weights arrive after B's: both are stopped."""
    waits, goes_on = threading.Event(), threading.Event()

    def before(path, body):
        if path == "/collective_rpc" and first.step == 1:
            waits.set()
            goes_on.wait(10)

    first = start("first", 1, before=before)
    second = start("second", 2)
    first.sync()
    hide_lock(first)
    with ThreadPoolExecutor(1) as pool:
        sync = pool.submit(first.sync)
        waits.wait(10)
        second.sync()
        assert second.generate()
        goes_on.set()
        with pytest.raises(RolloutError, match=r"was taken by the run in .*/second"):
            sync.result()
    with pytest.raises(RolloutConfigError, match="failed to load weights and may still have some of the old ones"):
        second.generate()


def test_of_two_runs_that_start_at_once_one_is_refused(start, served):
    """Both find the server free before either writes, and the second writes while the first already reads again."""
    both_read = threading.Barrier(2, timeout=10)

    def make_before(delay):
        reads = []

        def before(path, body):
            if path == "/update_weight_version" and not reads:
                reads.append(path)
                both_read.wait()
                time.sleep(delay)

        return before

    trainers = [start(name, seed, before=make_before(0.04 * seed)) for name, seed in (("first", 0), ("second", 1))]
    with ThreadPoolExecutor(2) as pool:
        errors = [future.exception() for future in [pool.submit(trainer.sync) for trainer in trainers]]
    (winner,) = [trainer for trainer, error in zip(trainers, errors, strict=True) if error is None]
    (error,) = [error for error in errors if error is not None]
    assert isinstance(error, RolloutConfigError)
    assert f"{winner.folder}, which is still running" in str(error)
    assert winner.generate()


def test_a_claim_that_took_long_to_write_is_withdrawn(start, served):
    slow = [True]

    def before(path, body):
        if path == "/update_weight_version" and slow.pop() if slow else False:
            time.sleep(0.3)

    versions = []
    trainer = start("run", 1, before=before)
    watch = start("watch", 2, before=lambda path, body: None)
    write = trainer.engine.claim.write
    trainer.engine.claim.write = lambda url, version, timeout=30: (
        versions.append(version.rpartition("#")[2]),
        write(url, version, timeout),
    )
    trainer.sync()
    assert versions[:3] == ["claimed", "released", "claimed"]
    assert trainer.generate()
    assert watch.engine.claim.claimed == set()


@pytest.mark.slow
@pytest.mark.parametrize("sees_locks", [True, False])
def test_no_interleaving_gives_a_run_the_others_rollouts(served, tmp_path, sees_locks):
    """Two runs at once, every request delayed at random: each ends with an error, or with its own rollouts alone."""
    ended = []
    for trial in range(6):
        served.version = "default"
        generator = random.Random(trial)

        def run(name, seed, served=served, generator=generator, trial=trial):
            delay = generator.choice([0.0, 0.02])
            before = lambda path, body: time.sleep(generator.random() * delay)  # noqa: E731
            trainer = Trainer(served, tmp_path / f"{trial}" / name, seed, before)
            if not sees_locks:
                hide_lock(trainer)
            try:
                for _ in range(4):
                    trainer.sync()
                    assert trainer.generate()
                return "trained"
            except (RolloutError, RolloutConfigError) as error:
                return type(error).__name__
            finally:
                trainer.engine.close()
                trainer.server.shutdown()
                trainer.server.server_close()

        with ThreadPoolExecutor(2) as pool:
            runs = [pool.submit(run, "a", 1), pool.submit(run, "b", 2)]
            ended.append(tuple(sorted(future.result() for future in runs)))
    if sees_locks:
        assert set(ended) <= {("RolloutConfigError", "trained"), ("trained", "trained")}, "one after the other at most"
    assert any("trained" in both for both in ended)
