"""Three machines, as far as the network goes: namespaces with their own addresses on a bridge, an ssh server in each.

The run folder is shared, as on a cluster; only root can make namespaces.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from chatgot.observe.journal import newest_step
from tests.launch.test_hostfile import ssh_server
from tests.launch.test_run import ROOT, wait_until
from tests.support import engine_json, environment, free_port, write_json, write_run_yaml
from tests.training.in_process import argv, events, series

ADDRESSES = ("10.219.0.1", "10.219.0.2", "10.219.0.3")


def ip(*words: str) -> None:
    done = subprocess.run(["ip", *words], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"ip {' '.join(words)}: {done.stderr.strip()}")


def within(node: int) -> list[str]:
    """What starts a command on a node."""
    return ["ip", "netns", "exec", f"chatgot{node}"]


@pytest.fixture(scope="module")
def network() -> Iterator[None]:
    if os.geteuid() != 0 or shutil.which("ip") is None:
        pytest.skip("only root can make network namespaces, with iproute2's ip")
    try:
        ip("link", "add", "chatgot", "type", "bridge")
        ip("link", "set", "chatgot", "up")
        for node, address in enumerate(ADDRESSES):
            ip("netns", "add", f"chatgot{node}")
            ip("link", "add", f"chatgot{node}", "type", "veth", "peer", "name", "eth7", "netns", f"chatgot{node}")
            ip("link", "set", f"chatgot{node}", "master", "chatgot", "up")
            for words in (("addr", "add", f"{address}/24", "dev", "eth7"), ("link", "set", "eth7", "up")):
                ip("-n", f"chatgot{node}", *words)
            ip("-n", f"chatgot{node}", "link", "set", "lo", "up")
        yield
    finally:
        for node in range(len(ADDRESSES)):
            subprocess.run(["ip", "netns", "del", f"chatgot{node}"], stderr=subprocess.DEVNULL)
        subprocess.run(["ip", "link", "del", "chatgot"], stderr=subprocess.DEVNULL)


@pytest.mark.usefixtures("network")
def test_the_interface_that_reaches_the_others_is_found() -> None:
    """The machine's own name resolves to an address that no node has, or to the loopback."""
    code = "import sys; from chatgot.distributed import gloo_interface as g, own_address; "
    code += f"print(*map(g, {ADDRESSES!r}), *map(own_address, {ADDRESSES!r}))"
    done = subprocess.run([*within(1), sys.executable, "-c", code], env=environment(), capture_output=True, text=True)
    assert done.stdout.split() == ["eth7"] * 3 + ["False", "True", "False"], done.stderr


@pytest.mark.slow
@pytest.mark.usefixtures("network")
def test_a_slow_node_is_waited_for_and_one_that_is_cut_off_is_left_out(tmp_path: Path, text_file: Path) -> None:
    saving = {"checkpoint": {"every_steps": 40, "every_minutes": None, "keep_best": 0}}
    out, config = tmp_path / "out", write_run_yaml(tmp_path / "run.yaml", max_steps=80)
    engine = write_json(tmp_path / "engine.json", engine_json(1, batch=12, micro=2, chatgot=saving))
    (tmp_path / "hosts").write_text("".join(f"{address} slots=1\n" for address in ADDRESSES))
    options = ["--hostfile", str(tmp_path / "hosts"), "--master_port", str(free_port()), "--grace", "5"]
    options += ["--max_restarts", "3", "--rejoin_minutes", "0", "--"]
    words = [*options, *argv(engine, out, config, text_file, "--hang_timeout", "15")]

    def step(number: int) -> None:
        wait_until(lambda: (newest_step(out / "metrics.jsonl") or 0) >= number or process.poll() is not None)
        assert process.poll() is None, (tmp_path / "said").read_text()

    (tmp_path / "ssh").mkdir()
    servers = {address: within(node) for node, address in enumerate(ADDRESSES)}
    with contextlib.ExitStack() as stack:
        path, _ = stack.enter_context(ssh_server(tmp_path / "ssh", servers, within(0)))
        said = stack.enter_context((tmp_path / "said").open("w"))
        command = [*within(0), sys.executable, str(ROOT / "launch" / "run"), *words]
        process = subprocess.Popen(command, env=environment(**path), stdout=said, stderr=said)
        stack.callback(process.wait)
        stack.callback(process.send_signal, signal.SIGINT)
        stack.callback(process.send_signal, signal.SIGINT)
        step(5)
        shaped = ["dev", "chatgot2", "root", "tbf", "rate", "1mbit", "burst", "32kbit", "latency", "400ms"]
        subprocess.run(["tc", "qdisc", "add", *shaped], check=True)
        step(15)
        subprocess.run(["tc", "qdisc", "del", "dev", "chatgot2", "root"], check=True)
        step(52)
        ip("link", "set", "chatgot2", "down")
        cut = time.monotonic()
        while not events(out, "failed"):
            assert time.monotonic() < cut + 60, (tmp_path / "said").read_text()
            time.sleep(0.1)
        print(f"exit 6 was recorded {time.monotonic() - cut:.1f} s after the cut")
        assert process.wait(300) == 0, (tmp_path / "said").read_text()
    told = (tmp_path / "said").read_text()
    [failed] = events(out, "failed")
    assert failed["exit_code"] == 6
    assert "the run hangs; where the ranks are:" in failed["error"]
    assert "2 rank(s) on 10.219.0.1, 10.219.0.2 go on" in told
    assert "the ranks talk over eth7" in told
    begun = [event for event in events(out) if event["event"] in ("started", "resumed")]
    assert [event["world_size"] for event in begun] == [3, 2]
    [verified] = events(out, "resume_verified")
    assert verified["steps"] >= 10, "batches of each, losses of the first ten within 1e-5"
    assert not events(out, "resume_differs")
    assert len(series(out, "train/loss")) == 80
