"""Where a process finds its place among the ranks, for every launcher; and what it refuses."""

from __future__ import annotations

import socket

import psutil
import pytest

from chatgot.distributed import Place, find_place, first_host, free_port, gloo_interface
from chatgot.errors import EXIT_ENVIRONMENT, MachineError

TORCHRUN = {
    "RANK": "3",
    "LOCAL_RANK": "1",
    "WORLD_SIZE": "4",
    "MASTER_ADDR": "host0",
    "MASTER_PORT": "29500",
    "TORCHELASTIC_RUN_ID": "x",
}
SLURM = {
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
    "SLURM_NTASKS": "8",
    "SLURM_JOB_ID": "123456",
    "SLURM_STEP_ID": "0",
    "SLURM_JOB_NODELIST": "gpu[003-007,9],cpu1",
}
OPEN_MPI = {"OMPI_COMM_WORLD_RANK": "2", "OMPI_COMM_WORLD_LOCAL_RANK": "0", "OMPI_COMM_WORLD_SIZE": "4"}


def without(variables: dict[str, str], *names: str) -> dict[str, str]:
    return {name: value for name, value in variables.items() if name not in names}


def test_plain_python_is_one_rank_and_gets_all_variables():
    environ = {"PATH": "/bin"}
    assert find_place(environ=environ) == Place(0, 0, 1, "python")
    assert environ["MASTER_ADDR"] == "127.0.0.1"
    assert {environ["RANK"], environ["LOCAL_RANK"], environ["WORLD_SIZE"]} == {"0", "1"}
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", int(environ["MASTER_PORT"])))


def test_a_second_call_finds_the_same_place():
    environ: dict[str, str] = {}
    first = find_place(environ=environ)
    port = environ["MASTER_PORT"]
    second = find_place(environ=environ)
    assert (second.rank, second.local_rank, second.world_size) == (first.rank, first.local_rank, first.world_size)
    assert environ["MASTER_PORT"] == port


def test_torchrun_and_its_variables_stay_as_they_are():
    environ = dict(TORCHRUN)
    assert find_place(environ=environ) == Place(3, 1, 4, "torchrun")
    assert environ == TORCHRUN


@pytest.mark.parametrize("local_rank", [None, 1])
def test_deepspeed_launcher_with_its_argument(local_rank):
    environ = without(TORCHRUN, "TORCHELASTIC_RUN_ID")
    assert find_place(local_rank, environ) == Place(3, 1, 4, "deepspeed")


def test_local_rank_argument_fills_in_a_missing_variable():
    environ = without(TORCHRUN, "TORCHELASTIC_RUN_ID", "LOCAL_RANK")
    assert find_place(2, environ).local_rank == 2
    assert environ["LOCAL_RANK"] == "2"


def test_a_world_of_one_needs_no_master():
    environ = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    assert find_place(environ=environ).world_size == 1
    assert environ["MASTER_ADDR"] == "127.0.0.1"


def test_slurm_step():
    environ = dict(SLURM)
    assert find_place(environ=environ) == Place(5, 1, 8, "slurm")
    assert environ["MASTER_ADDR"] == "gpu003"
    assert 10000 <= int(environ["MASTER_PORT"]) < 30000
    again = {**SLURM, "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}
    find_place(environ=again)
    assert again["MASTER_PORT"] == environ["MASTER_PORT"]  # all ranks of a step must agree
    beside = {**SLURM, "SLURM_STEP_ID": "1"}
    find_place(environ=beside)
    assert beside["MASTER_PORT"] != environ["MASTER_PORT"]


@pytest.mark.parametrize("name", ["SLURM_NPROCS", "SLURM_STEP_NUM_TASKS"])
def test_slurms_other_names_for_the_number_of_tasks(name):
    assert find_place(environ={**without(SLURM, "SLURM_NTASKS"), name: "8"}) == Place(5, 1, 8, "slurm")
    assert find_place(environ={**SLURM, "SLURM_STEP_NUM_TASKS": "6"}).world_size == 6  # the step's, not the job's


def test_an_sbatch_script_without_srun_is_told_so():
    with pytest.raises(MachineError, match=r"SLURM_NTASKS = 8, but srun did not start this process"):
        find_place(environ={**without(SLURM, "SLURM_STEP_ID"), "SLURM_PROCID": "0", "SLURM_LOCALID": "0"})


def test_mpich():
    environ = {"PMI_RANK": "2", "PMI_SIZE": "4", "MPI_LOCALRANKID": "0", "MASTER_ADDR": "a", "MASTER_PORT": "29500"}
    assert find_place(environ=environ) == Place(2, 0, 4, "mpi")


def test_slurm_step_nodes_come_before_the_jobs():
    environ = {**SLURM, "SLURM_STEP_NODELIST": "cpu1"}
    find_place(environ=environ)
    assert environ["MASTER_ADDR"] == "cpu1"


def test_a_shell_inside_a_slurm_job_is_plain_python():
    assert find_place(environ={**SLURM, "SLURM_NTASKS": "1", "SLURM_PROCID": "0"}).launcher == "python"


def test_open_mpi():
    environ = {**OPEN_MPI, "MASTER_ADDR": "host0", "MASTER_PORT": "29500"}
    assert find_place(environ=environ) == Place(2, 0, 4, "mpi")
    assert environ["RANK"] == "2"


@pytest.mark.parametrize("missing", ["RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"])
def test_partial_variables_are_refused_by_name(missing):
    with pytest.raises(MachineError, match=f"environment: {missing} not set") as caught:
        find_place(environ=without(TORCHRUN, missing))
    assert caught.value.exit_code == EXIT_ENVIRONMENT == 6


def test_empty_variable_counts_as_missing():
    with pytest.raises(MachineError, match="MASTER_ADDR not set"):
        find_place(environ={**TORCHRUN, "MASTER_ADDR": ""})


def test_open_mpi_without_a_master_is_refused():
    with pytest.raises(MachineError, match="MASTER_ADDR, MASTER_PORT not set"):
        find_place(environ=dict(OPEN_MPI))


@pytest.mark.parametrize("name", ["RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_PORT"])
def test_words_instead_of_numbers_are_refused(name):
    with pytest.raises(MachineError, match=f"{name} = 'two': expected a whole number"):
        find_place(environ={**TORCHRUN, name: "two"})


@pytest.mark.parametrize("rank", ["4", "-1"])
def test_rank_outside_the_world_is_refused(rank):
    with pytest.raises(MachineError, match="is not below WORLD_SIZE = 4"):
        find_place(environ={**TORCHRUN, "RANK": rank})


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("gpu1", "gpu1"),
        ("gpu1,gpu2", "gpu1"),
        ("gpu[003-007,9],cpu1", "gpu003"),
        ("gpu[7,9]", "gpu7"),
        ("a-b[01-02]", "a-b01"),
        ("rack[1-2]node[1-4]", "rack1node1"),
        ("gpu[1-4]-ib", "gpu1-ib"),
        ("rack[2,4]gpu[08-09]x,cpu[1-2]", "rack2gpu08x"),
        ("", ""),
    ],
)
def test_first_host_of_a_slurm_node_list(nodes, first):
    assert first_host(nodes) == first


def test_free_port_can_be_bound():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", free_port()))


def resolving(monkeypatch: pytest.MonkeyPatch, **addresses: str) -> None:
    """Let names resolve to addresses as some machine's /etc/hosts would."""
    original = socket.gethostbyname
    monkeypatch.setattr(socket, "gethostname", lambda: "node1")
    monkeypatch.setattr(socket, "gethostbyname", lambda name: addresses.get(name) or original(name))


def route() -> str | None:
    """The address that this machine sends from; None: it has no network."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))
        except OSError:
            return None
        return probe.getsockname()[0]


@pytest.mark.parametrize("master", ["192.0.2.1", "node1"])
def test_gloo_gets_the_interface_that_others_reach_where_the_hostname_is_the_loopback(master, monkeypatch):
    resolving(monkeypatch, node1="127.0.1.1")
    address = route()
    known = {name: [one.address for one in addresses] for name, addresses in psutil.net_if_addrs().items()}
    assert [gloo_interface(master)] == ([name for name in known if address in known[name]] or [None])


def test_gloos_own_choice_stays_where_it_is_right(monkeypatch):
    if (address := route()) is not None:
        resolving(monkeypatch, node1=address, node0="192.0.2.4")
        assert gloo_interface("node0") is None
    resolving(monkeypatch, node1="127.0.1.1")
    assert gloo_interface("127.0.0.1") is None, "all ranks are on this machine"
    assert gloo_interface("localhost") is None
