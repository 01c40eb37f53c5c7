from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import venv
from pathlib import Path

import pytest

from chatgot.observe.journal import METRICS
from tests.observe.offline_wandb import read_offline_history, read_offline_records

ROOT = Path(__file__).parents[2]

TRAIN = """
import json, logging, sys
from pathlib import Path
from types import SimpleNamespace
from chatgot.observe.journal import METRICS
from chatgot.observe.wandb_run import WandbRun

job = json.loads(sys.argv[1])
logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
section = SimpleNamespace(enabled=job.get("enabled", True), project="ravens", group="winter", team=None)
run = WandbRun(
    section, run_dir=Path(job["run_dir"]), run_name="a-run", run_config={"model": {"d_model": 64}},
    resumed_from_step=job.get("resumed_from_step"), tags=("north", "snow"),
    init_timeout=job.get("init_timeout", 30), finish_timeout=job.get("finish_timeout", 30),
)
steps = list(range(*job["steps"]))
if back_to := job.get("back_to"):
    steps += range(back_to + 1, job["steps"][1] + 2)
for step in steps:
    run.log({"train/loss": 1 / step, "optim/grad_norm": None}, step)
    if step == steps[0]:
        run.log({"goodput/fraction": 0.5}, step)
    if step % job.get("eval_every", 5) == 0:
        run.log({"val/loss": 2 / step}, step)
        run.log_table("sample", ("step", "text"), [[step, "<Tyrion> ’twas\\n  a night"]], step)
print("trained", run.mode, "wandb" in sys.modules, flush=True)
if job.get("wait"):
    sys.stdin.read()
run.finish(job.get("exit_code", 0))
print("ended", flush=True)
"""


@pytest.fixture
def environment(tmp_path):
    """No key, no settings, no network: only what an offline wandb needs."""
    home = tmp_path / "home"
    home.mkdir()
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith("WANDB") and name not in ("NETRC", "PYTHONPATH")
    }
    return {
        **kept,
        "HOME": str(home),
        "PYTHONPATH": str(ROOT),
        "WANDB_ERROR_REPORTING": "false",
        "WANDB_BASE_URL": "http://127.0.0.1:9",
    }


def train(environment: dict[str, str], run_dir: Path, steps: range, python: str = sys.executable, **job) -> list[str]:
    run_dir.mkdir(exist_ok=True)
    done = subprocess.run(
        [python, "-c", TRAIN, json.dumps({"run_dir": str(run_dir), "steps": [steps.start, steps.stop], **job})],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        cwd=run_dir.parent,
    )
    assert (done.returncode, done.stderr) == (0, ""), done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert lines[-1] == "ended"
    return lines


def exit_codes(run_dir: Path) -> list[int]:
    return [r.exit.exit_code for r in read_offline_records(run_dir) if r.WhichOneof("record_type") == "exit"]


def wait_until(condition) -> None:
    for _ in range(200):
        if condition():
            return
        time.sleep(0.1)
    raise AssertionError("it did not come true within 20 s")


def test_invariant_16_resumed_run_keeps_one_wandb_id(tmp_path, environment):
    run_dir = tmp_path / "run"
    first = train(environment, run_dir, range(1, 11))
    assert "offline (no API key for 127.0.0.1:9: set WANDB_API_KEY" in first[0]
    time.sleep(1)  # wandb names its folders by the second
    (run_dir / "metrics.jsonl").write_text(json.dumps({"step": 10, **dict.fromkeys(METRICS, 1.0)}) + "\n")
    second = train(environment, run_dir, range(7, 16), resumed_from_step=6)
    assert "goes on, offline" in second[0]
    assert (len(first), len(second)) == (3, 3), "nothing else is said"
    ids, history = read_offline_history(run_dir)
    assert ids == {json.loads((run_dir / "wandb" / "run_id.json").read_text())["id"]}
    assert [r["train/step"] for r in history] == list(range(1, 16))
    assert [r["train/loss"] for r in history] == [1 / step for step in range(1, 16)]
    assert [r["train/step"] for r in history if "val/loss" in r] == [5, 10, 15]
    assert all("optim/grad_norm" not in r for r in history)


def test_an_evaluation_that_a_kill_cut_off_reaches_wandb_after_the_resume(tmp_path, environment):
    run_dir = tmp_path / "run"
    train(environment, run_dir, range(1, 6), eval_every=100)
    time.sleep(1)  # wandb names its folders by the second
    train(environment, run_dir, range(3, 7), resumed_from_step=2)
    history = read_offline_history(run_dir)[1]
    assert [r["train/step"] for r in history] == [1, 2, 3, 4, 5, 5, 6]
    assert [("train/loss" in r, "val/loss" in r) for r in history[4:]] == [(True, False), (False, True), (True, False)]


def test_what_only_a_resumed_step_tells_makes_no_second_record_of_it(tmp_path, environment):
    run_dir = tmp_path / "run"
    train(environment, run_dir, range(1, 4))
    time.sleep(1)  # wandb names its folders by the second
    train(environment, run_dir, range(3, 5), resumed_from_step=2)
    history = read_offline_history(run_dir)[1]
    assert [(r["train/step"], "goodput/fraction" in r) for r in history] == [
        (1, True),
        (2, False),
        (3, False),
        (4, False),
    ]


def test_links_and_fifos_in_a_folder_from_elsewhere_lead_nowhere(tmp_path, environment):
    run_dir, foreign = tmp_path / "run", tmp_path / "foreign"
    train(environment, run_dir, range(1, 4))
    foreign.write_text("mine")
    note = run_dir / "wandb" / "last_record.json"
    note.unlink()
    os.mkfifo(note)
    note.with_name(f"{note.name}.new").symlink_to(foreign)
    time.sleep(1)  # wandb names its folders by the second
    (run_dir / "metrics.jsonl").write_text('{"step": 3, "train/loss": 0.3}\n')
    said = train(environment, run_dir, range(3, 5), resumed_from_step=2)
    assert f"{note} cannot be read" in said[0]
    assert foreign.read_text() == "mine"
    assert json.loads(note.read_text())["step"] == 4
    assert [r["train/step"] for r in read_offline_history(run_dir)[1]] == [1, 2, 3, 4]


def test_what_a_kill_kept_from_wandb_is_sent_by_the_resume(tmp_path, environment):
    run_dir = tmp_path / "run"
    train(environment, run_dir, range(1, 6), eval_every=100)
    time.sleep(1)  # wandb names its folders by the second
    rows = [{"step": step, "train/loss": 1 / step} for step in range(1, 9)]
    rows[4:4] = [{"step": 5, "val/loss": 0.4}, {"step": 5, "digest": {"loss": 0.2}}]
    rows[-1]["val/loss"] = "nan"
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    train(environment, run_dir, range(8, 11), resumed_from_step=7)
    history = read_offline_history(run_dir)[1]
    assert [r["train/step"] for r in history] == [1, 2, 3, 4, 5, 5, 6, 7, 8, 9, 10]
    assert [r["train/loss"] for r in history if "train/loss" in r] == [1 / step for step in range(1, 11)]
    assert [(r["train/step"], r["val/loss"]) for r in history if "val/loss" in r] == [(5, 0.4), (10, 0.2)]


def test_what_wandb_is_told_of_the_run(tmp_path, environment):
    run_dir = tmp_path / "run"
    train(environment, run_dir, range(1, 6), exit_code=75)
    records = read_offline_records(run_dir)
    (run,) = (r.run for r in records if r.WhichOneof("record_type") == "run")
    assert (run.display_name, run.project, run.run_group, run.resume) == ("a-run", "ravens", "winter", True)
    assert {item.key: json.loads(item.value_json) for item in run.config.update}["model"] == {"d_model": 64}
    metrics = [r.metric for r in records if r.WhichOneof("record_type") == "metric"]
    assert "train/step" in [m.name for m in metrics]
    assert [m.step_metric for m in metrics if m.glob_name == "*"] == ["train/step"]
    assert exit_codes(run_dir) == [75]
    assert list(run.tags) == ["north", "snow"]
    (sample,) = (run_dir / "wandb").glob("offline-run-*/files/media/table/sample_*.table.json")
    table = json.loads(sample.read_text(encoding="utf-8"))
    assert table == {"columns": ["step", "text"], "data": [[5, "<Tyrion> ’twas\n  a night"]]}


def test_steps_are_logged_again_where_the_run_folder_had_no_wandb_run(tmp_path, environment):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").write_text('{"step": 20}\n')
    train(environment, tmp_path / "run", range(7, 10), resumed_from_step=6)
    assert [r["train/step"] for r in read_offline_history(tmp_path / "run")[1]] == [7, 8, 9]


def test_steps_that_are_trained_again_after_a_rollback_are_logged_once(tmp_path, environment):
    train(environment, tmp_path / "run", range(1, 9), back_to=4)
    assert [r["train/step"] for r in read_offline_history(tmp_path / "run")[1]] == list(range(1, 11))


def test_a_killed_training_loses_no_record(tmp_path, environment):
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    process = subprocess.Popen(
        [sys.executable, "-c", TRAIN, json.dumps({"run_dir": str(run_dir), "steps": [1, 101], "wait": True})],
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=tmp_path,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    with process.stdin, process.stdout:
        assert "new run" in process.stdout.readline()
        assert process.stdout.readline().startswith("trained offline")
        wait_until(
            lambda: 99 in [r["train/step"] for r in read_offline_history(run_dir)[1]]
        )  # step 100 waits for its successor
        process.send_signal(signal.SIGKILL)
        process.wait()
    wait_until(lambda: exit_codes(run_dir) == [1])
    assert [r["train/step"] for r in read_offline_history(run_dir)[1]] == list(range(1, 101))


def test_invariant_16_absent_wandb_is_no_error(tmp_path, environment):
    venv.create(tmp_path / "bare", symlinks=True)  # an interpreter without packages
    lines = train(environment, tmp_path / "run", range(1, 11), python=str(tmp_path / "bare" / "bin" / "python"))
    assert lines == [
        "wandb: off, wandb is not installed (pip install wandb), and the JSON's wandb section asks for it. "
        "Training goes on; metrics.jsonl has every metric",
        "trained off False",
        "ended",
    ]


@pytest.mark.parametrize(("mode", "enabled"), [("disabled", True), ("online", False)])
def test_disabled_means_no_process_and_no_file(tmp_path, environment, mode, enabled):
    lines = train({**environment, "WANDB_MODE": mode}, tmp_path / "run", range(1, 11), enabled=enabled)
    assert lines == (["wandb: off (WANDB_MODE=disabled)"] if enabled else []) + ["trained off False", "ended"]
    assert list((tmp_path / "run").iterdir()) == []


def test_what_a_sitecustomize_prints_is_no_reply_of_the_worker(tmp_path, environment):
    noise = tmp_path / "noise"
    noise.mkdir()
    (noise / "sitecustomize.py").write_text("import sys\nprint('module load cuda', flush=True)\n")
    noisy = {**environment, "PYTHONPATH": os.pathsep.join((str(noise), environment["PYTHONPATH"]))}
    lines = train(noisy, tmp_path / "run", range(1, 11))
    assert lines[0] == "module load cuda"
    assert lines[-2].startswith("trained offline")


def test_the_training_process_never_imports_wandb(tmp_path, environment):
    lines = train({**environment, "WANDB_MODE": "offline"}, tmp_path / "run", range(1, 3))
    assert "offline (WANDB_MODE=offline)" in lines[0]
    assert lines[1] == "trained offline False"


def test_a_port_that_refuses_means_offline(tmp_path, environment):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    online = {**environment, "WANDB_API_KEY": "k" * 40, "WANDB_BASE_URL": f"http://127.0.0.1:{port}"}
    lines = train(online, tmp_path / "run", range(1, 4))
    assert f"127.0.0.1:{port} cannot be reached: ConnectionRefusedError" in lines[0]
    assert [r["train/step"] for r in read_offline_history(tmp_path / "run")[1]] == [1, 2, 3]


def test_a_server_that_never_answers_means_offline_under_the_same_id(tmp_path, environment):
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        online = {
            **environment,
            "WANDB_API_KEY": "k" * 40,
            "WANDB_BASE_URL": f"http://127.0.0.1:{silent.getsockname()[1]}",
        }
        lines = train(online, tmp_path / "run", range(1, 4), init_timeout=10)
    assert lines[1].startswith("trained offline")
    ids, history = read_offline_history(tmp_path / "run")
    assert ids == {json.loads((tmp_path / "run/wandb/run_id.json").read_text())["id"]}
    assert [r["train/step"] for r in history] == [1, 2, 3]


FAKE = """
import sys, time
from types import SimpleNamespace
class Settings:
    model_fields = {}
def setup():
    return SimpleNamespace(settings=SimpleNamespace(mode="offline", base_url="http://127.0.0.1:9", api_key=None))
class Run:
    url = None
    def define_metric(self, *a, **k): pass
    def log(self, record):
        log_hook(record)
    def finish(self, exit_code): finish_hook()
class Table:
    def __init__(self, columns, data): pass
def init(**kwargs):
    init_hook()
    return Run()
def nothing(*a): pass
def forever(*a):
    time.sleep(1000)
def fail(*a):
    raise KeyError("deep inside")
def die(*a):
    import os
    os._exit(9)
init_hook = log_hook = finish_hook = nothing
"""


def fake_wandb(tmp_path: Path, environment: dict[str, str], hook: str) -> dict[str, str]:
    (tmp_path / "fake").mkdir()
    (tmp_path / "fake" / "wandb.py").write_text(FAKE + hook)
    return {**environment, "PYTHONPATH": f"{tmp_path / 'fake'}:{ROOT}"}


def test_with_a_key_and_a_server_the_run_is_online(tmp_path, environment):
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        hook = (
            "import os\nRun.url = 'http://here/ravens/runs/1'\n"
            "settings = SimpleNamespace(mode='online', base_url=os.environ['WANDB_BASE_URL'], api_key=None)\n"
            "def setup():\n    return SimpleNamespace(settings=settings)\n"
            "def init(**kwargs):\n    print('wandb: WARNING mode', kwargs['mode'], file=sys.stderr)\n    return Run()\n"
        )
        host = f"127.0.0.1:{server.getsockname()[1]}"
        online = {**fake_wandb(tmp_path, environment, hook), "WANDB_BASE_URL": f"http://{host}"}
        without_key = train(online, tmp_path / "a", range(1, 3))
        (tmp_path / "home" / ".netrc").write_text(f"machine {host}\n  login user\n  password {'k' * 40}\n")
        with_key = train(online, tmp_path / "b", range(1, 3))
    assert without_key[0] == "wandb: WARNING mode offline"
    assert with_key[0] == "wandb: WARNING mode online"
    assert with_key[1].endswith("online: http://here/ravens/runs/1")
    assert with_key[2] == "trained online False"


def test_a_wandb_that_hangs_in_init_is_given_up(tmp_path, environment):
    lines = train(
        fake_wandb(tmp_path, environment, "init_hook = forever\n"), tmp_path / "run", range(1, 4), init_timeout=0.7
    )
    assert lines == [
        "wandb: off, wandb did not answer within 0.7 s. Training goes on; metrics.jsonl has every metric",
        "trained off False",
        "ended",
    ]


def test_a_wandb_that_hangs_in_finish_is_given_up(tmp_path, environment):
    lines = train(
        fake_wandb(tmp_path, environment, "finish_hook = forever\n"), tmp_path / "run", range(1, 4), finish_timeout=0.7
    )
    assert lines[1] == "trained offline False"
    assert "did not answer within 0.7 s" in lines[2]
    assert "wandb sync" in lines[2]


def test_a_wandb_that_hangs_in_log_never_blocks_the_training(tmp_path, environment):
    many = range(1, 30_000)  # more than pipe and queue hold
    lines = train(fake_wandb(tmp_path, environment, "log_hook = forever\n"), tmp_path / "run", many, finish_timeout=0.7)
    assert sum("wandb: off" in line for line in lines) == 1
    assert "it has not taken the last" in lines[1]
    assert lines[2] == "trained off False"


@pytest.mark.parametrize(
    ("hook", "why"), [("log_hook = fail\n", "KeyError: 'deep inside'"), ("log_hook = die\n", "its process has ended")]
)
def test_a_wandb_that_fails_in_log_is_said_once_and_left(tmp_path, environment, hook, why):
    lines = train(fake_wandb(tmp_path, environment, hook), tmp_path / "run", range(1, 4))
    said = [line for line in lines if line.startswith("wandb: off")]
    assert len(said) == 1
    assert why in said[0]


def test_wandbs_own_warnings_are_passed_on(tmp_path, environment):
    hook = "def log_hook(record):\n    print('wandb: WARNING the quota is used up', file=sys.stderr)\n"
    lines = train(fake_wandb(tmp_path, environment, hook), tmp_path / "run", range(1, 3))
    assert lines.count("wandb: WARNING the quota is used up") == 2


def test_a_broken_id_file_is_said_and_replaced(tmp_path, environment):
    folder = tmp_path / "run" / "wandb"
    folder.mkdir(parents=True)
    (folder / "run_id.json").write_text('{"id": ')
    lines = train(environment, tmp_path / "run", range(1, 3))
    assert "run_id.json cannot be read" in lines[0]
    assert read_offline_history(tmp_path / "run")[0] == {json.loads((folder / "run_id.json").read_text())["id"]}
