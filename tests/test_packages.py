"""The wheel holds every package and what the commands read."""

import importlib.metadata
import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SETUPTOOLS = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]


def test_the_list_of_packages_is_the_tree():
    folders = {file.parent for package in ("sekd", "rollouts") for file in (ROOT / package).rglob("*.py")}
    names = {str(folder.relative_to(ROOT)).replace(os.sep, ".") for folder in folders}
    assert {*SETUPTOOLS["packages"]} == names | {"sekd.recipes"}
    for package, patterns in SETUPTOOLS["package-data"].items():
        folder = ROOT / SETUPTOOLS["package-dir"].get(package, package.replace(".", "/"))
        for pattern in patterns:
            assert [*folder.glob(pattern)], f"{package} has no {pattern}"


@pytest.mark.slow
def test_a_wheel_works_outside_the_checkout(tmp_path):
    installed = {package.name for package in importlib.metadata.distributions()}
    # find_spec("pip") would change what distutils is, and break vLLM's import in later tests.
    if not {"pip", "setuptools"} <= installed:
        pytest.skip("the wheel is built with pip and setuptools")
    source, folder = tmp_path / "source", tmp_path / "site"
    for name in ("sekd", "rollouts", "recipes"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    build = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-w", str(tmp_path)]
    subprocess.run([*build, str(source)], check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(folder)
    for name in ("sekd/py.typed", "rollouts/py.typed", "sekd/recipes/demo.yaml", "sekd/cli/train_help.txt"):
        assert (folder / name).exists()
    assert (folder / "sekd" / "recipes" / "accelerate" / "ddp.yaml").exists()

    environment = {**os.environ, "PYTHONPATH": str(folder), "HF_HUB_OFFLINE": "1"}
    (tmp_path / "elsewhere").mkdir()

    def run(*command):
        return subprocess.run(
            [sys.executable, *command], cwd=tmp_path / "elsewhere", env=environment, capture_output=True, text=True
        )

    shown = run("-m", "sekd.cli", "train", "gsm8k_on_policy_sekd", "--help")
    assert "  position_fraction: 0.2\n" in shown.stdout, shown.stderr
    assert "\ngsm8k_on_policy_sekd " in run("-m", "sekd.cli", "recipes").stdout
    assert "position_policy: random\n" in run("-m", "sekd.cli", "recipes", "show", "gsm8k_on_policy_random").stdout
    (tmp_path / "elsewhere" / "mine.yaml").write_text("base: gsm8k_on_policy_sekd\noutput_dir: runs/mine\n")
    code = (
        "import sekd, sys; from sekd.recipe import Run; print(sekd.__file__)\n"
        "for name in ('gsm8k_on_policy_sekd', 'recipes/gsm8k_on_policy_random.yaml', 'mine.yaml'):\n"
        "    print(Run.parse(name, ['--rollout_engine', 'hf', '--optim', 'adamw_torch']).args.output_dir)"
    )
    done = run("-c", code)
    runs = ["runs/gsm8k_on_policy_sekd", "runs/gsm8k_on_policy_random", "runs/mine"]
    assert done.stdout.splitlines() == [str(folder / "sekd" / "__init__.py"), *runs], done.stderr[-2000:]
