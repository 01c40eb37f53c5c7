"""ChatGoT installed from a wheel, an sdist and an editable checkout, each in an empty environment, used elsewhere.

Only ChatGoT itself is installed there; a .pth file lends it the libraries of the environment that runs the tests.
"""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from chatgot.config.run import preset_names
from chatgot.deepspeed_json.read import shipped_jsons
from tests.support import ROOT, write_text

# Looked up by their distributions: find_spec("pip") makes setuptools give up its distutils for the whole process, and
# then nothing can be compiled in it any more.
INSTALLED = {distribution.name for distribution in importlib.metadata.distributions()}
MISSING = [name for name in ("pip", "setuptools", "wheel") if name not in INSTALLED]
pytestmark = pytest.mark.skipif(bool(MISSING), reason=f"{', '.join(MISSING)} not installed")
LEFT_OUT = shutil.ignore_patterns(".*", "runs", "build", "dist", "*.egg-info", "__pycache__", "tests")
OFFLINE = ("--no-deps", "--no-build-isolation", "--no-index", "-q", "--disable-pip-version-check")


def call(*command: str | Path, cwd: Path) -> str:
    """What the command prints; it must end with 0, without the checkout on its path."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"DS_ACCELERATOR": "cpu", "WANDB_MODE": "disabled", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [str(word) for word in command], cwd=cwd, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the checkout, because building leaves files in it."""
    return Path(shutil.copytree(ROOT, tmp_path_factory.mktemp("source") / "chatgot", ignore=LEFT_OUT))


@pytest.fixture(scope="module", params=["wheel", "sdist", "editable"])
def installed(request: pytest.FixtureRequest, checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bin folder of an environment that ChatGoT was installed into."""
    folder = tmp_path_factory.mktemp(request.param)
    call(sys.executable, "-m", "venv", "--without-pip", folder / "env", cwd=folder)
    python = folder / "env" / "bin" / "python"
    site = Path(call(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=folder).strip())
    (site / "libraries.pth").write_text(sysconfig.get_path("purelib") + "\n")  # whose own .pth files are not read
    what = ["-e", checkout]
    if request.param == "wheel":
        call(sys.executable, "-m", "pip", "wheel", *OFFLINE, "-w", folder, checkout, cwd=folder)
        what = [*folder.glob("*.whl")]
    elif request.param == "sdist":
        call(sys.executable, "setup.py", "-q", "sdist", "-d", folder, cwd=checkout)
        what = [*folder.glob("*.tar.gz")]
    # The dependencies of the tests' environment hold another ChatGoT, which is not to be looked at.
    call(python, "-m", "pip", "install", "--ignore-installed", *OFFLINE, *what, cwd=folder)
    return python.parent


def test_every_shipped_file_is_found_by_name(
    installed: Path, checkout: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    file = Path(call(installed / "python", "-c", "import chatgot; print(chatgot.__file__)", cwd=tmp_path).strip())
    editable = "editable" in request.node.name
    assert file.is_relative_to(checkout if editable else installed.parent)
    assert file.with_name("inference").joinpath("page.html").is_file()
    configs = call(installed / "chatgot", "configs", cwd=tmp_path)
    assert {line.split()[0] for line in configs.splitlines()[1:]} == set(shipped_jsons())
    presets = call(installed / "chatgot", "presets", cwd=tmp_path)
    assert set(preset_names()) <= {line.split()[0] for line in presets.splitlines()}
    check = call(installed / "chatgot", "check", "bf16_zero2", "--config", "tiny", "--device", "cuda", cwd=tmp_path)
    assert "bf16_zero2.json: nothing to say" in check
    assert "ZeRO stage 2" in call(installed / "chatgot", "plan", "bf16_zero2", "--config", "gpt2_small", cwd=tmp_path)
    sweep = call(installed / "chatgot", "plan", "--sweep", cwd=tmp_path)
    assert sweep.count(".json") == len(shipped_jsons())


@pytest.mark.parametrize("installed", ["wheel"], indirect=True)
def test_an_installed_package_trains_samples_and_verifies(installed: Path, tmp_path: Path) -> None:
    write_text(tmp_path / "night.txt")
    program = (
        "import chatgot; run = chatgot.train('fp32_zero0', 'run', data='night.txt', overrides={'train.max_steps': 2, "
        "'model.d_model': 32, 'model.n_layers': 1, 'model.max_seq_length': 16, 'train.sample_max_new_tokens': 4, "
        "'train.log_every': 1, 'ds.chatgot.schedule.warmup_steps': 1}); print('SAMPLE', run.sample('The night'))"
    )
    assert "\nSAMPLE The night" in call(installed / "python", "-c", program, cwd=tmp_path)
    assert "run: whole" in call(installed / "chatgot", "verify", "run", cwd=tmp_path)
