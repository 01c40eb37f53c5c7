"""launch/kubernetes.yaml: what Kubernetes demands of an indexed Job, names that agree, and a command that is ours, run
by two processes as by two pods.
"""

from __future__ import annotations

import signal
import subprocess
from typing import Any

import pytest
import yaml

from chatgot.errors import EXIT_CONFIG, EXIT_DATA, EXIT_INTERRUPTED
from chatgot.launcher import command as launcher
from chatgot.launcher.entry import refuse_wrong_settings
from chatgot.observe.journal import newest_step
from chatgot.observe.status import status
from tests.launch.test_run import wait_until
from tests.support import ROOT, environment, free_port, warm_python, write_run_yaml, write_text
from tests.training.in_process import tags


@pytest.fixture(scope="module")
def service() -> dict[str, Any]:
    return documents()[0]


@pytest.fixture(scope="module")
def job() -> dict[str, Any]:
    return documents()[1]


def documents() -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((ROOT / "launch" / "kubernetes.yaml").read_text(encoding="utf-8")))


def container(job: dict[str, Any]) -> dict[str, Any]:
    (only,) = job["spec"]["template"]["spec"]["containers"]
    return only


def test_it_is_an_indexed_job_and_a_headless_service_that_names_its_machines(service, job):
    assert (service["apiVersion"], service["kind"]) == ("v1", "Service")
    assert (job["apiVersion"], job["kind"]) == ("batch/v1", "Job")
    assert job["spec"]["completionMode"] == "Indexed"
    assert job["spec"]["completions"] == job["spec"]["parallelism"]
    assert service["spec"]["clusterIP"] == "None"  # a text: YAML's null would ask for an address
    assert service["spec"]["publishNotReadyAddresses"] is True  # the machines look for each other before they are ready
    assert service["spec"]["selector"] == {"job-name": job["metadata"]["name"]}
    assert job["spec"]["template"]["spec"]["subdomain"] == service["metadata"]["name"]


def test_a_saved_run_starts_again_and_a_wrong_setting_ends_the_job(job):
    rules = job["spec"]["podFailurePolicy"]["rules"]
    assert job["spec"]["template"]["spec"]["restartPolicy"] == "Never"  # podFailurePolicy is refused with another
    codes = {rule["action"]: rule["onExitCodes"] for rule in rules if "onExitCodes" in rule}
    assert codes["Ignore"]["values"] == [EXIT_INTERRUPTED]
    assert codes["FailJob"]["values"] == [EXIT_CONFIG, EXIT_DATA]
    for code in codes.values():
        assert code["operator"] == "In"
        assert code["containerName"] == container(job)["name"]
    assert [rule["action"] for rule in rules if "onPodConditions" in rule] == ["Ignore"]


def test_every_volume_that_is_mounted_is_there(job):
    volumes = {volume["name"] for volume in job["spec"]["template"]["spec"]["volumes"]}
    assert {mount["name"] for mount in container(job)["volumeMounts"]} == volumes


def test_its_command_is_launch_run_with_settings_that_train(service, job, tmp_path):
    ours, name = container(job), job["metadata"]["name"]
    assert ours["command"] == ["python", "launch/run"]
    (variable,) = ours["env"]
    assert "job-completion-index" in variable["valueFrom"]["fieldRef"]["fieldPath"]
    words = [word.replace(f"$({variable['name']})", "1") for word in ours["args"]]
    assert all(isinstance(word, str) for word in ours["args"])
    assert not any("$(" in word for word in words)
    split = words.index("--")
    arguments = launcher._parser().parse_args(words[:split])
    assert arguments.nnodes == job["spec"]["completions"]
    assert arguments.node_rank == 1
    assert arguments.nproc == ours["resources"]["limits"]["nvidia.com/gpu"]
    assert arguments.master_addr == f"{name}-0.{service['metadata']['name']}"
    given = dict(zip(words[split + 1 :: 2], words[split + 2 :: 2]))
    assert set(given) == {"--config", "--data", "--out_dir"}
    refuse_wrong_settings(given["--config"], None, [], str(write_text(tmp_path / "my.txt")), tmp_path / "run")


def test_two_pods_train_together_and_end_with_75_when_one_is_drained(job, tmp_path, text_file, request):
    """The same command for both, and in their environments nothing but the index differs."""
    out, port, (variable,) = tmp_path / "a", str(free_port()), container(job)["env"]
    here = {"chatgot-0.chatgot": "127.0.0.1", "8": "1", "/runs/my.txt": str(text_file), "/runs/a": str(out)}
    here["gpt2_small"] = str(write_run_yaml(tmp_path / "run.yaml", max_steps=1_000_000))
    _, run, *args = [*container(job)["command"], *container(job)["args"]]
    words = [warm_python(), run, "--master_port", port, *(here.get(word, word) for word in args)]
    pods = []
    for index in "01":
        command = [word.replace(f"$({variable['name']})", index) for word in words]
        pods.append(subprocess.Popen(command, cwd=ROOT, env=environment()))
        request.addfinalizer(pods[-1].wait)
        request.addfinalizer(pods[-1].kill)
    wait_until(lambda: newest_step(out / "metrics.jsonl") is not None or any(pod.poll() is not None for pod in pods))
    pods[1].send_signal(signal.SIGTERM)
    assert [pod.wait(300) for pod in pods] == [EXIT_INTERRUPTED] * 2
    assert tags(out) == [newest_step(out / "metrics.jsonl")]
    assert status(out)[1] == EXIT_INTERRUPTED
