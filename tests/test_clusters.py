"""A process finds its place in what flags or a cluster say, and half a place is refused."""

import pytest

from tcjax import processes
from tcjax.clusters import Group, find, first_host

TRIO = {"JAX_COORDINATOR_ADDRESS": "host:1234", "JAX_NUM_PROCESSES": "4", "JAX_PROCESS_ID": "3"}
SLURM = {
    "SLURM_JOB_ID": "4099",
    "SLURM_STEP_NODELIST": "node[03-04]",
    "SLURM_NTASKS": "4",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2)",
}
MPI = {
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_RANK": "2",
    "OMPI_COMM_WORLD_LOCAL_RANK": "0",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
    "OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1,10.148.0.1:34911",
}
GKE = {"TPU_WORKER_HOSTNAMES": "job-0.job,job-1.job", "TPU_WORKER_ID": "1"}
SLICES = {"MEGASCALE_NUM_SLICES": "2", "MEGASCALE_SLICE_ID": "1", "MEGASCALE_COORDINATOR_ADDRESS": "job-0-0.job:8081"}

PLACES = {  # name: (environment, coordinator, processes, process, source)
    "environment": (TRIO, "host:1234", 4, 3, "the environment"),
    "environment before Slurm": (SLURM | TRIO, "host:1234", 4, 3, "the environment"),
    "Slurm": (SLURM, "node03:61443", 4, 3, "Slurm"),
    "Slurm, another coordinator": (SLURM | {"JAX_COORDINATOR_ADDRESS": "127.0.0.1:7"}, "127.0.0.1:7", 4, 3, "Slurm"),
    "Slurm, another port": (SLURM | {"JAX_COORDINATOR_PORT": "9"}, "node03:9", 4, 3, "Slurm"),
    "a step smaller than its job": (
        SLURM | {"SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "1"},
        "node03:61443",
        2,
        1,
        "Slurm",
    ),
    "Open MPI": (MPI, "10.96.0.1:62624", 4, 2, "Open MPI"),
    "Open MPI on one host": (
        {k: v for k, v in MPI.items() if "uri" not in k} | {"OMPI_COMM_WORLD_LOCAL_SIZE": "4"},
        "localhost:61440",
        4,
        2,
        "Open MPI",
    ),
    "GKE": (GKE, "job-0.job:8482", 2, 1, "TPU on GKE"),
    "GKE, two slices": (GKE | SLICES, "job-0-0.job:8482", 4, 3, "TPU on GKE"),
}
ALONE = {
    "nothing": {},
    "a batch script of Slurm, no step": {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4", "SLURM_PROCID": "0"},
    "a step of one task": SLURM | {"SLURM_NTASKS": "1", "SLURM_PROCID": "0"},
    "mpirun -n 1": {"OMPI_COMM_WORLD_SIZE": "1"},
}
REFUSED = {
    "half of the environment": ({"JAX_NUM_PROCESSES": "2"}, {}, r"JAX_COORDINATOR_ADDRESS, JAX_PROCESS_ID must be set"),
    "a coordinator alone": (
        {"JAX_COORDINATOR_ADDRESS": "h:1"},
        {},
        r"JAX_COORDINATOR_ADDRESS=h:1 is set, but nothing says",
    ),
    "a word": (TRIO | {"JAX_NUM_PROCESSES": "two"}, {}, r"JAX_NUM_PROCESSES='two' is no whole number"),
    "half of the flags": ({}, {"processes": 2}, r"--coordinator and --process is missing"),
    "too large a number": (
        {},
        {"coordinator": "h:1", "processes": 2, "process": 2},
        r"process 2 of 2 \(flags\).*0 to 1",
    ),
    "a negative count": ({}, {"coordinator": "h:1", "processes": -2, "process": 0}, r"process 0 of -2 \(flags\)"),
    "no port": (
        {},
        {"coordinator": "host", "processes": 2, "process": 0},
        r"coordinator 'host' \(flags\) is no HOST:PORT",
    ),
    "Open MPI that names no host": (
        MPI | {"OMPI_MCA_orte_hnp_uri": ""},
        {},
        r"mpirun -x JAX_COORDINATOR_ADDRESS=HOST:PORT",
    ),
}


@pytest.mark.parametrize("name", PLACES)
def test_a_place_is_found(name):
    environ, *expected = PLACES[name]
    found = find(environ)
    assert found is not None
    assert [found.coordinator, found.processes, found.process, found.source] == expected


@pytest.mark.parametrize("name", ALONE)
def test_nothing_that_says_otherwise_is_one_process(name):
    assert find(ALONE[name]) is None


@pytest.mark.parametrize("name", REFUSED)
def test_half_a_place_or_an_impossible_one_is_refused(name):
    environ, flags, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        find(environ, **flags)


def test_flags_come_before_everything():
    found = find(SLURM | TRIO, "other:99", 3, 0)
    assert found == Group(coordinator="other:99", processes=3, process=0, source="flags")


@pytest.mark.parametrize(
    ("nodes", "first"),
    [("a", "a"), ("a,b", "a"), ("n[001-004,9],m", "n001"), ("rack[2-3]n[07,09],login", "rack2n07"), ("n[5]", "n5")],
)
def test_the_first_host_of_a_list(nodes, first):
    assert first_host(nodes) == first


@pytest.mark.parametrize(
    ("changes", "devices"),
    [
        ({}, None),  # no GPUs to share
        ({"CUDA_VISIBLE_DEVICES": "0,1,2,3"}, (2, 3)),  # two tasks see all four
        ({"CUDA_VISIBLE_DEVICES": "0,1,2,3", "SLURM_GPUS_ON_NODE": "4"}, (2, 3)),
        ({"CUDA_VISIBLE_DEVICES": "2,3", "SLURM_GPUS_ON_NODE": "4"}, None),  # Slurm has bound two to each
        ({"CUDA_VISIBLE_DEVICES": "0"}, None),
        ({"CUDA_VISIBLE_DEVICES": "0,1,2,3", "SLURM_STEP_TASKS_PER_NODE": "1(x4)"}, None),  # the node's only task
        ({"CUDA_VISIBLE_DEVICES": "0,1,2,3", "JAX_LOCAL_DEVICE_IDS": "0"}, None),  # jax reads that itself
    ],
)
def test_tasks_of_a_node_share_its_gpus(changes, devices):
    found = find(SLURM | changes)
    assert found is not None and found.devices == devices


def test_the_place_is_described_in_one_line(monkeypatch):
    for name in {*TRIO, *SLURM, *MPI, *GKE}:
        monkeypatch.delenv(name, raising=False)
    assert processes.describe() == "one process"
    for name, value in SLURM.items():
        monkeypatch.setenv(name, value)
    assert processes.describe() == "process 3 of 4, told by Slurm; coordinator node03:61443"
