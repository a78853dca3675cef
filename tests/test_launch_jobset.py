"""JobSet manifests: golden texts, the models of the API, and every rule refusing what breaks it."""

import copy

import pytest
import yaml as pyyaml
from kubeflow_trainer_api.models.jobset_v1alpha2_job_set import JobsetV1alpha2JobSet
from pydantic import ValidationError

from launch import __main__ as door
from launch import gke_jobset, jobset_rules, mesh
from launch.forward import RESTART_CODES
from launch.job import Job, LaunchError, known
from tests.launch_golden import FOLDER, assert_golden

TRAIN = ("tcjax", "train", "configs/llava.py:pretrain_7b")
IMAGE = "us-docker.pkg.dev/project/tcjax/tcjax:1"
VOLUMES = {"/tcjax/runs": "pvc:runs", "/tcjax/data/prepared": "gs://data", "/models": "nfs://10.0.0.2/models"}
JOB = Job(name="llava-7b", command=(*TRAIN, "--mesh.fsdp", "16"))
STUDY = Job(name="num-queries", command=("tcjax", "ablate", "experiments/num_queries"), runs=2)

# name of the golden text: (job, fields of the profile)
CASES = {
    "gke-v5e-16": (JOB, dict(accelerator="v5e:4x4", volumes=VOLUMES, service_account="tcjax", secret="wandb")),
    "gke-v5e-256x2": (
        Job(
            name="llava-7b",
            command=(*TRAIN, "--mesh.data=2", "--mesh.fsdp=256"),
            grace=300,
            save_seconds=200,
            restarts=50,
        ),
        dict(
            accelerator="v5e:16x16",
            slices=2,
            queue="tpus",
            priority="high",
            restart_strategy="BlockingRecreate",
            spot=True,
        ),
    ),
    "gke-v5p-64": (Job(name="LLaVA-7B", command=TRAIN), dict(accelerator="v5p:4x4x4", reservation="ours", shm="64Gi")),
    "gke-v6e-256": (
        Job(name="llava-7b", command=TRAIN),
        dict(accelerator="v6e:16x16", memory="300Gi", cpu="100", ttl=600),
    ),
    "gke-tpu7x-8": (
        Job(name="llava-7b", command=(*TRAIN, "--mesh.fsdp", "16", "--mesh.data=1", "--mesh.tensor=1")),
        dict(accelerator="tpu7x:2x2x2", node_selector={"cloud.google.com/placement-policy-name": "ours"}),
    ),
    "gke-h100-2x8": (
        Job(name="llava-7b", command=(*TRAIN, "--mesh.data", "16"), env={"NCCL_DEBUG": "WARN", "ODD": "a$(B) $$"}),
        dict(accelerator="h100:2x8", namespace="gpus"),
    ),
    "gke-study": (STUDY, dict(accelerator="v5e:2x2")),
}


def profile(**changes):
    return gke_jobset.Profile(**(dict(accelerator="v5e:4x4", image=IMAGE) | changes))


def manifests(name="gke-v5e-16"):
    job, changes = CASES[name]
    return gke_jobset.manifests(job, profile(**changes))


def assert_fits_the_api(manifest):
    """Read by the API's models and written again, nothing is lost: no field is unknown, no type or enumeration wrong."""
    assert JobsetV1alpha2JobSet.from_dict(manifest).to_dict() == manifest


# Texts ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_a_manifest_is_the_golden_text(name):
    job, changes = CASES[name]
    assert_golden(f"{name}.yaml", gke_jobset.text(job, profile(**changes)))


@pytest.mark.parametrize("name", CASES)
def test_a_golden_manifest_reads_back_fits_the_api_and_keeps_the_rules(name):
    job, _ = CASES[name]
    documents = list(pyyaml.safe_load_all((FOLDER / f"{name}.yaml").read_text()))
    assert documents == manifests(name)
    for document in documents:
        assert_fits_the_api(document)
        assert list(jobset_rules.faults(document, job.save_seconds)) == []


def at(manifest, *path):
    for key in path:
        manifest = manifest[key]
    return manifest


REPLICATED = ("spec", "replicatedJobs", 0)
CHILD = (*REPLICATED, "template", "spec")
POD = (*CHILD, "template", "spec")
TRAINER = (*POD, "containers", 0)

WRONG_BY_THE_API = {  # where: what is written there
    "a misspelt field": (("spec", "failurePolicy"), {"maxRestart": 3}),
    "a misspelt field of the pod": (POD, {"nodeSelectors": {}}),
    "a Python name of a field": (("spec",), {"ttl_seconds_after_finished": 1}),
    "a wrong type": (CHILD, {"parallelism": "4"}),
    "a number as a variable's value": ((*TRAINER, "env", 0), {"value": 1}),
    "a bad enumeration of the pod": (POD, {"dnsPolicy": "ClusterFirstWithHostnet"}),
    "a bad enumeration of the exit codes": (
        (*CHILD, "podFailurePolicy", "rules", 0, "onExitCodes"),
        {"operator": "Not"},
    ),
}


@pytest.mark.parametrize("what", WRONG_BY_THE_API)
def test_the_models_of_the_api_catch(what):
    path, change = WRONG_BY_THE_API[what]
    (manifest,) = manifests()
    at(manifest, *path).update(change)
    with pytest.raises((AssertionError, ValidationError)):
        assert_fits_the_api(manifest)


def test_exit_codes_reach_kubernetes_as_the_contract_has_them():
    (manifest,) = manifests()
    (rule,) = at(manifest, *CHILD)["podFailurePolicy"]["rules"]
    codes = rule["onExitCodes"]
    assert (rule["action"], codes["operator"], codes["containerName"]) == ("FailJob", "NotIn", "train")
    assert codes["values"] == sorted(set(RESTART_CODES)) and len(codes["values"]) <= 255  # Kubernetes' own limits
    assert {42, 143, 134, 255} <= set(codes["values"]) and not {0, 1, 2, 127, 130} & set(codes["values"])


def test_gpu_hosts_find_the_first_pod_by_name():
    (manifest,) = manifests("gke-h100-2x8")
    env = {each["name"]: each.get("value", each.get("valueFrom")) for each in at(manifest, *TRAINER)["env"]}
    assert env["JAX_COORDINATOR_ADDRESS"] == "llava-7b-node-0-0.llava-7b:6002"
    assert env["JAX_NUM_PROCESSES"] == "2"
    index = "metadata.annotations['batch.kubernetes.io/job-completion-index']"
    assert env["JAX_PROCESS_ID"] == {"fieldRef": {"fieldPath": index}}


def test_a_dollar_stays_what_it_was_in_the_pod():
    (manifest,) = manifests("gke-h100-2x8")
    assert {"name": "ODD", "value": "a$$(B) $$$"} in at(manifest, *TRAINER)["env"]


def test_every_run_of_a_study_is_a_jobset_of_its_own():
    made = manifests("gke-study")
    assert [each["metadata"]["name"] for each in made] == ["num-queries-r1", "num-queries-r2"]
    assert [at(each, *TRAINER)["args"][-2:] for each in made] == [["--run", "1"], ["--run", "2"]]


# Rules ---------------------------------------------------------------------------------------------------------------

BROKEN = {  # what is broken: (golden case, where, what is written there, what is said)
    "two replicated jobs": ("gke-v5e-16", ("spec",), {"replicatedJobs": [{}, {}]}, "2 replicated jobs"),
    "hosts": (
        "gke-v5e-16",
        CHILD,
        {"parallelism": 2, "completions": 2},
        "2 hosts of 4 chips are 8, but v5e:4x4 is 16 chips",
    ),
    "completions": ("gke-v5e-16", CHILD, {"completions": 1}, "completions 1 is not parallelism 4"),
    "chips": ("gke-v5e-16", (*TRAINER, "resources"), {"limits": {"google.com/tpu": 8}}, "4 hosts of 8 chips are 32"),
    "no chips": (
        "gke-v5e-16",
        (*TRAINER, "resources"),
        {"limits": {}},
        "must name one of google.com/tpu, nvidia.com/gpu",
    ),
    "topology": (
        "gke-v5e-16",
        (*POD, "nodeSelector"),
        {jobset_rules.TOPOLOGY: "4x8"},
        "v5e:4x8 is 32 chips on 8 hosts of 4",
    ),
    "pair": ("gke-v5e-16", (*POD, "nodeSelector"), {jobset_rules.TOPOLOGY: "2x2x4"}, "do not fit: .*no slice of v5e"),
    "selector": (
        "gke-v5e-16",
        (*POD, "nodeSelector"),
        {jobset_rules.ACCELERATOR: "tpu-v5e"},
        "known: tpu-v4-podslice, tpu-v5",
    ),
    "gpu": ("gke-h100-2x8", (*POD, "nodeSelector"), {jobset_rules.GPU: "h100"}, "known: nvidia-tesla-a100"),
    "gpu replicas": ("gke-h100-2x8", REPLICATED, {"replicas": 2}, "2 replicas of GPU nodes"),
    "exclusive": ("gke-v5e-16", ("metadata",), {"annotations": {}}, "slices would share node pools"),
    "toleration": ("gke-v5e-16", POD, {"tolerations": []}, "no toleration of google.com/tpu"),
    "mesh": ("gke-v5e-16", TRAINER, {"args": ["--mesh.fsdp", "12"]}, "--mesh.fsdp 12 does not divide the 16"),
    "whole mesh": (
        "gke-v5e-256x2",
        TRAINER,
        {"args": ["--mesh.data=2", "--mesh.fsdp=128", "--mesh.tensor=1"]},
        "is a mesh of 256, but the job has 512 devices",
    ),
    "ironwood": ("gke-tpu7x-8", TRAINER, {"args": ["--mesh.fsdp", "32"]}, "does not divide the 16, but .* 16 devices"),
    "data of slices": (
        "gke-v5e-256x2",
        TRAINER,
        {"args": ["--mesh.data", "1"]},
        "data is 1, which 2 slices cannot share",
    ),
    "config's slices": ("gke-v5e-256x2", TRAINER, {"args": TRAIN[1:]}, "leaves it to the config: say --mesh.data 2"),
    "rest of slices": (
        "gke-v5e-256x2",
        TRAINER,
        {"args": ["--mesh.data", "-1", "--mesh.fsdp=256", "--mesh.tensor=2"]},
        "data is 1, which 2 slices cannot share evenly; make it a multiple of 2",
    ),
    "address": (
        "gke-h100-2x8",
        ("metadata",),
        {"name": "other"},
        "'llava-7b-node-0-0.llava-7b:6002', not the first pod's, other-node-0-0.other:PORT",
    ),
    "processes": (
        "gke-h100-2x8",
        CHILD,
        {"parallelism": 4, "completions": 4},
        "JAX_NUM_PROCESSES is '2', not the 4 hosts",
    ),
    "no index": ("gke-h100-2x8", TRAINER, {"env": []}, "every pod would be the same process"),
    "capital": ("gke-v5e-16", ("metadata",), {"name": "LLaVA"}, "small letters, digits and '-', a letter first"),
    "digit first": ("gke-v5e-16", ("metadata",), {"name": "7b"}, "a letter first"),
    "long name": ("gke-v5e-16", ("metadata",), {"name": "a" * 48}, "has 48 characters.*at most 47"),
    "grace": ("gke-v5e-16", POD, {"terminationGracePeriodSeconds": 30}, "30 is shorter than the 60 seconds of a save"),
    "forwarding": (
        "gke-v5e-16",
        TRAINER,
        {"command": ["bash", "-c", '"$@"', "bash"]},
        "SIGTERM or its exit code would be lost",
    ),
    "restart policy": ("gke-v5e-16", POD, {"restartPolicy": "OnFailure"}, "exit codes are read with Never alone"),
    "backoff": ("gke-v5e-16", CHILD, {"backoffLimit": 3}, "backoffLimit 3"),
    "exit codes": ("gke-v5e-16", (*CHILD, "podFailurePolicy"), {"rules": []}, "on every exit code but 42 and 128-255"),
    "failure": ("gke-v5e-16", ("spec", "failurePolicy"), {"rules": []}, "would restart forever"),
    "restarts": ("gke-v5e-16", ("spec", "failurePolicy"), {"maxRestarts": -1}, "maxRestarts -1 is negative"),
    "strategy": (
        "gke-v5e-16",
        ("spec", "failurePolicy"),
        {"restartStrategy": "Again"},
        "choose of Recreate, BlockingRecreate",
    ),
    "in place": (
        "gke-v5e-16",
        ("spec", "failurePolicy"),
        {"restartStrategy": "InPlaceRestart"},
        "needs another policy than",
    ),
    "dns": ("gke-v5e-16", POD, {"dnsPolicy": "ClusterFirst"}, "would not find each other by name"),
}


@pytest.mark.parametrize("what", BROKEN)
def test_a_manifest_that_breaks_a_rule_is_refused(what):
    name, path, change, said = BROKEN[what]
    manifest = copy.deepcopy(manifests(name)[0])
    at(manifest, *path).update(change)
    with pytest.raises(LaunchError, match=said):
        jobset_rules.check(manifest, save_seconds=60)


@pytest.mark.parametrize("words", ["--mesh.fsdp 0", "--mesh.data=x", "--mesh.tensor", "--mesh.fsdp -2"])
def test_a_mesh_that_is_no_number_is_refused(words):
    with pytest.raises(LaunchError, match="a mesh axis takes a whole number from 1 up, or -1"):
        mesh.asked(words.split())


@pytest.mark.parametrize(
    "words", ["", "--mesh.data -1", "--mesh.fsdp 8", "--mesh.data=4 --mesh.fsdp=4", "--mesh.tensor 16"]
)
def test_a_mesh_left_open_fits_what_it_divides(words):
    assert list(mesh.faults(words.split(), devices=16, replicas=1)) == []


def test_the_longest_name_is_as_long_as_a_pod_may_be_called():
    assert len("x" * jobset_rules.longest_name("slice", 12, 64) + "-slice-11-63-abcde") == 63


PROFILES = {  # fields of a profile: what is said
    "no accelerator": (dict(accelerator="v5e"), "not known: write GENERATION:TOPOLOGY"),
    "no slices": (dict(slices=0), "from 1 up"),
    "slices of GPUs": (dict(accelerator="h100:8", slices=2), "slices are TPUs'; write more hosts"),
    "no image": (dict(image="two words"), "takes the name of a container image"),
    "ttl": (dict(ttl=-1), "takes seconds"),
    "strategy": (dict(restart_strategy="Never"), "choose of Recreate, BlockingRecreate"),
    "relative path": (dict(volumes={"runs": "pvc:runs"}), "an absolute path"),
    "bucket's folder": (
        dict(volumes={"/runs": "gs://bucket/folder"}),
        "takes gs://BUCKET, pvc:CLAIM or nfs://SERVER/PATH",
    ),
    "unknown volume": (dict(volumes={"/runs": "s3://bucket"}), "takes gs://BUCKET"),
}


@pytest.mark.parametrize("what", PROFILES)
def test_a_profile_that_cannot_be_is_refused(what):
    changes, said = PROFILES[what]
    with pytest.raises(LaunchError, match=said):
        gke_jobset.text(Job(name="a", command=TRAIN), profile(**changes))


def test_the_route_prints_a_manifest_from_a_profile_by_name_and_its_flags_overrule(capsys):
    words = "gke_jobset --profile gke_v5e --accelerator v6e:8x8 --slices 2 --queue q -- tcjax train c.py --mesh.data 2"
    assert door.main(words.split()) == 0
    (manifest,) = pyyaml.safe_load_all(capsys.readouterr().out)
    assert_fits_the_api(manifest)
    assert at(manifest, *POD)["nodeSelector"][jobset_rules.TOPOLOGY] == "8x8"
    assert at(manifest, *REPLICATED)["replicas"] == 2


@pytest.mark.parametrize("name", known("gke_jobset"))
def test_every_profile_of_the_repository_gives_a_manifest_that_fits_the_api(name, capsys):
    assert door.main(["gke_jobset", "--profile", name, "--", *TRAIN, "--mesh.data", "2"]) == 0
    for manifest in pyyaml.safe_load_all(capsys.readouterr().out):
        assert_fits_the_api(manifest)


def test_the_route_refuses_on_one_line_before_it_prints(capsys):
    words = "gke_jobset --profile gke_v5e -- tcjax train configs/boards.py --mesh.fsdp 5"
    assert door.main(words.split()) == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.count("\n") == 1 and "--mesh.fsdp 5 does not divide the 16" in said.err


@pytest.fixture
def kubectl(tmp_path, monkeypatch):
    """A program of that name that keeps what it is given."""
    program = tmp_path / "kubectl"
    program.write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/words\ncat > {tmp_path}/manifest\nexit 7\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    return tmp_path


def test_submit_hands_the_manifest_to_kubectl_and_returns_its_code(kubectl):
    assert gke_jobset.submit(JOB, profile(context="ours")) == 7
    assert (kubectl / "words").read_text() == "--context ours create -f -\n"
    assert (kubectl / "manifest").read_text() == gke_jobset.text(JOB, profile(context="ours"))


def test_submit_without_kubectl_says_so(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(LaunchError, match="kubectl is not on the PATH: submit where kubectl is set up"):
        gke_jobset.submit(JOB, profile())
