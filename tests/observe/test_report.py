"""The report of a real run that was killed and resumed: its numbers are the journal's, and it draws itself offline."""

from __future__ import annotations

import json
import re
import shutil
import time
from pathlib import Path
from typing import Any

import pytest

from chatgot import cli
from chatgot.errors import ConfigError
from chatgot.observe.curves import page
from chatgot.observe.journal import METRICS, read_journal
from chatgot.observe.report import ReportWriter, report
from tests.support import engine_json, live_metrics, write_json, write_run_yaml
from tests.training import in_process
from tests.training.in_process import argv

STEPS = 8
HOSTILE = "</script><script>document.title = 'broken'</script><img src=http://127.0.0.1:9/x> /*PLOTLY*/ /*DATA*/"


@pytest.fixture(scope="module")
def run(tmp_path_factory, text_file) -> Path:
    """A run that was killed at step 5 and resumed from step 3; a sample that wants to be a program lies in it."""
    folder = tmp_path_factory.mktemp("report")
    saving = {"every_steps": 3, "every_minutes": None, "keep_best": 0}
    engine = write_json(folder / "engine.json", engine_json(1, chatgot={"checkpoint": saving}))
    config = write_run_yaml(folder / "run.yaml", max_steps=STEPS, eval_every=2, sample_every=4)
    line = argv(engine, folder / "out", config, text_file)
    in_process.abandon_after(5, line)
    assert in_process.train(line) == 0
    (folder / "out" / "samples" / "step-000006.txt").write_text(HOSTILE, encoding="utf-8")
    return folder / "out"


def data_of(path: Path) -> dict[str, Any]:
    """The numbers that a report holds."""
    [text] = re.findall(r'<script type="application/json" id="data">(.*?)</script>', path.read_text("utf-8"), re.DOTALL)
    return json.loads(text)


def test_every_number_of_the_report_is_the_journals(run, tmp_path):
    found = data_of(report([run], tmp_path / "one.html"))["runs"][0]
    records, _ = read_journal(run / "metrics.jsonl")
    expected: dict[tuple[str, str], dict[int, float]] = {}
    for record in records:
        for name in METRICS:
            if name in record:
                kind = next(one for one in ("train", "val", "sample") if any(key.startswith(one) for key in record))
                expected.setdefault((kind, name), {})[record["step"]] = record[name]
    drawn = {
        (kind, name): dict(zip((span[0] for span in curve["steps"]), values["mean"]))
        for kind, curve in found["curves"].items()
        for name, values in curve["metrics"].items()
    }
    assert drawn == expected
    last = [record for record in records if "train/loss" in record][-1]
    last = {name: value for name, value in last.items() if name != "goodput/wall_seconds"}  # the last evaluation's
    assert found["numbers"] | last == found["numbers"]
    losses = {record["val/loss"]: record["step"] for record in records if "val/loss" in record}
    assert (found["numbers"]["best val/loss"], found["numbers"]["best step"]) == min(losses.items())
    assert found["curves"]["train"]["tokens"][-1] == last["data/tokens"]
    assert found["curves"]["val"]["wall"] == pytest.approx(sorted(found["curves"]["val"]["wall"]))
    events = [event for event in read_journal(run / "events.jsonl")[0] if event["event"] not in ("goodput", "memory")]
    assert found["events"]["kinds"] == [event["event"] for event in events if "step" in event or "from_step" in event]
    assert found["goodput"]["seconds"] == read_journal(run / "events.jsonl")[0][-2]["seconds"]
    assert [start["kind"] for start in found["starts"]] == ["started", "resumed"]
    assert found["starts"][1]["proof"] == "verified 2/2 steps, bit for bit"
    assert found["starts"][1]["end"] == f"finished at step {STEPS}"
    assert [sample["step"] for sample in found["samples"]] == [4, 6, 8]
    assert found["settings"]["model.d_model"] == "32"
    assert found["settings"]["ds.zero_optimization.stage"] == "1"
    assert found["state"].startswith(f"finished at step {STEPS}")


def test_no_text_of_a_run_becomes_a_part_of_the_page(run, tmp_path):
    path = report([run], tmp_path / "one.html")
    assert HOSTILE not in path.read_text("utf-8")
    assert data_of(path)["runs"][0]["samples"][1]["text"] == HOSTILE
    assert "default-src 'none'" in path.read_text("utf-8")


def test_runs_are_compared_under_names_of_their_own(run, tmp_path, capsys, monkeypatch):
    other = shutil.copytree(run, tmp_path / "out")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as end:
        cli.main(["report", str(run), str(other)])
    assert (end.value.code, capsys.readouterr().out) == (0, "report: report.html\n")
    assert [one["name"] for one in data_of(tmp_path / "report.html")["runs"]] == [str(run), str(other)]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["{tmp}"], "not a run folder"),
        (["{run}", "--out", "{tmp}/no/such/report.html"], "cannot be written"),
        (["{run}", "{run}", "--terminal"], "shows one run"),
    ],
    ids=["no run", "no such folder", "two in a terminal"],
)
def test_what_is_refused(words, message, run, tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        cli.main(["report", *(word.format(run=run, tmp=tmp_path) for word in words)])
    assert end.value.code == ConfigError.exit_code
    assert message in capsys.readouterr().err


def test_a_run_writes_its_report_at_its_end_and_a_failure_is_only_said(run, tmp_path, text_file, capsys, monkeypatch):
    monkeypatch.delenv("CHATGOT_REPORT")
    folder = tmp_path / "run"
    shutil.copytree(run, folder / "out")
    assert not (run / "report.html").exists(), "tests switch it off"
    engine = write_json(folder / "engine.json", json.loads((run / "ds_config.json").read_text()))
    line = argv(engine, folder / "out", folder / "out" / "run.yaml", text_file, f"train.max_steps={STEPS + 1}")
    assert in_process.train(line, CHATGOT_REPORT=None) == 0
    assert f"run folder: {folder / 'out'}, and its report.html" in capsys.readouterr().out
    found = data_of(folder / "out" / "report.html")["runs"][0]
    assert found["numbers"]["step"] == STEPS + 1
    assert found["state"].startswith(f"finished at step {STEPS + 1}")
    (folder / "out" / "ds_config.json").write_text("{")
    assert ReportWriter(folder / "out").end(60) is None
    assert ReportWriter(folder / "out").end(0.001) is None


def test_the_terminal_shows_the_same(run, capsys):
    text, running = page(run, 100, 60, colour=False)
    assert not running
    assert max(map(len, text.split("\n"))) <= 100
    last = [record for record in live_metrics(run / "metrics.jsonl") if "train/loss" in record][-1]
    for part in (
        f"finished at step {STEPS}",
        f"loss {last['train/loss']:.4f}",
        "train/loss",
        "time: ",
        f"step {STEPS}: finished",
    ):
        assert part in text
    with pytest.raises(SystemExit):
        cli.main(["report", "--follow", str(run)])
    assert f"finished at step {STEPS}" in capsys.readouterr().out


@pytest.fixture(scope="module")
def browser():
    webdriver = pytest.importorskip("selenium.webdriver")
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if chromium is None or driver is None:
        pytest.skip("needs chromium and chromedriver")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for word in ("--headless=new", "--no-sandbox", "--window-size=1280,4000"):
        options.add_argument(word)
    options.set_capability("goog:loggingPrefs", {"performance": "ALL", "browser": "ALL"})
    with webdriver.Chrome(options, webdriver.ChromeService(driver)) as browser:
        yield browser


def test_a_browser_draws_it_without_a_network(run, tmp_path, browser):
    path = report([run], tmp_path / "one.html")
    browser.execute_cdp_cmd("Network.enable", {})
    browser.execute_cdp_cmd(
        "Network.emulateNetworkConditions",
        {"offline": True, "latency": 0, "downloadThroughput": 0, "uploadThroughput": 0},
    )
    browser.get(path.as_uri())
    deadline = time.monotonic() + 60
    while browser.execute_script("return document.querySelectorAll('.chart .main-svg').length") < 2 * 8:
        assert time.monotonic() < deadline, "the curves are not drawn"
        time.sleep(0.1)
    assert browser.title == "out - ChatGoT"
    messages = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    asked = {one["params"]["request"]["url"] for one in messages if one["method"] == "Network.requestWillBeSent"}
    assert asked == {path.as_uri()}
    assert browser.get_log("browser") == []
    shown = browser.execute_script(
        "const slider = document.querySelector('input[type=range]'); slider.value = 1;"
        "slider.dispatchEvent(new Event('input')); return document.querySelector('pre').textContent"
    )
    assert shown == HOSTILE
