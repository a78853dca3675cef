"""Queued resources: golden scripts, and the whole script run against a stand-in for gcloud whose hosts are folders."""

import os
import re
import shlex
import signal
import subprocess
import time

import pytest

from launch import __main__ as door
from launch import tpu_vm
from launch.job import Job, LaunchError
from tests.launch_golden import assert_golden

TRAIN = ("tcjax", "train", "configs/llava.py:pretrain_7b")
JOB = Job(name="llava-7b", command=(*TRAIN, "--mesh.fsdp", "16"), restarts=2)
STUDY = Job(name="num-queries", command=("tcjax", "ablate", "experiments/num_queries"), runs=2, restarts=1)
PLACE = dict(project="our-project", zone="us-west4-a")

CASES = {  # name of the golden text: (job, fields of the profile)
    "tpu-vm-v5e-16": (JOB, dict(accelerator="v5e:4x4", capacity="spot", mounts={"runs": "our-runs"})),
    "tpu-vm-v5p-64x2": (
        Job(name="llava-7b", command=(*TRAIN, "--mesh.data", "2", "--mesh.fsdp", "64"), env={"WANDB_MODE": "a b"}),
        dict(
            accelerator="v5p:4x4x4", slices=2, capacity="reserved", network="ours", subnetwork="tpus", internal_ips=True
        )
        | dict(repository="https://github.com/you/tcjax", ref="v1", service_account="tcjax@our-project.iam"),
    ),
    "tpu-vm-study": (STUDY, dict(accelerator="v6e:2x2", capacity="flex-start", hours=48)),
}


def profile(**changes):
    return tpu_vm.Profile(**(PLACE | dict(accelerator="v5e:4x4") | changes))


@pytest.mark.parametrize("name", CASES)
def test_a_script_is_the_golden_text_and_bash_reads_it(name):
    job, changes = CASES[name]
    text = tpu_vm.text(job, profile(**changes))
    assert_golden(f"{name}.sh", text)
    assert subprocess.run(["bash", "-n"], input=text, text=True, capture_output=True).stderr == ""


CREATED = {  # fields of a profile: what the request says
    "spot": (dict(capacity="spot"), "--spot"),
    "reserved": (dict(capacity="reserved"), "--reserved"),
    "flex": (dict(capacity="flex-start", hours=6), "--provisioning-model=flex-start --max-run-duration=6h"),
    "type": (dict(accelerator="v5p:4x4x8"), "--runtime-version=v2-alpha-tpuv5 --accelerator-type=v5p-256"),
    "shape": (dict(accelerator="v4:4x4x16"), "--runtime-version=tpu-ubuntu2204-base --type=v4 --topology=4x4x16"),
    "several": (dict(slices=4), '--node-count=4 --node-prefix="$NAME" --runtime-version=v2-alpha-tpuv5-lite'),
}


@pytest.mark.parametrize("what", CREATED)
def test_a_request_says_what_the_profile_says(what):
    changes, said = CREATED[what]
    command = (*TRAIN, "--mesh.data", str(changes.get("slices", 1)))
    text = tpu_vm.text(Job(name="a", command=command), profile(**changes)).replace("\\\n    ", "")
    (create,) = re.findall(r"gcloud .*queued-resources create .*", text)
    assert said in create
    assert create.startswith("gcloud alpha ") == (what == "flex")


def test_a_shape_that_only_newer_gcloud_knows_is_asked_of_alpha():
    assert "gcloud alpha compute tpus" in tpu_vm.text(JOB, profile(accelerator="v5p:4x4x32"))


# The stand-in: $CLOUD/state holds the queued resource's state, $CLOUD/NODE-0 and -1 are the homes of a node's two hosts.
GCLOUD = r"""#!/bin/bash
set -eu
echo "$*" >> "$CLOUD/calls"
[ "$1" != alpha ] || shift
verb="$3 $4" name=$5 worker= command= sent=
for word; do
  case "$word" in
    --worker=*) worker=${word#*=} ;;
    --command=*) command=${word#*=} ;;
    */launch) sent=$word ;;
    *:) name=${word%:} ;;
  esac
done
hosts() { case "$worker" in all) echo 0 1 ;; *) echo "$worker" ;; esac; }
case "$verb" in
  "queued-resources create") echo ACTIVE > "$CLOUD/state" ;;
  "queued-resources describe") cat "$CLOUD/state" ;;
  "queued-resources delete") echo DELETED > "$CLOUD/state" ;;
  "tpu-vm describe") echo 10.0.0.9 ;;
  "tpu-vm scp") for host in $(hosts); do mkdir -p "$CLOUD/$name-$host"; cp -r "$sent" "$CLOUD/$name-$host"; done ;;
  "tpu-vm ssh")
    if [[ "$command" = *follow ]] && [ -s "$CLOUD/trouble" ]; then
      trouble=$(head -n 1 "$CLOUD/trouble")
      sed -i 1d "$CLOUD/trouble"
      [ "$trouble" = broken ] || echo SUSPENDED > "$CLOUD/state"
      [ "$trouble" = broken ] || HOME="$CLOUD/$name-0" bash -c 'kill -KILL -- -$(cat ~/launch/pid)'
      [ "$trouble" = broken ] || rm -rf "$CLOUD"/*-[01]/launch
      exit 255
    fi
    [ "$worker" = all ] || HOME="$CLOUD/$name-$worker" exec bash -c "$command"
    for host in $(hosts); do HOME="$CLOUD/$name-$host" bash -c "$command" & done
    for host in $(hosts); do wait -n; done ;;
esac
"""

# The stand-in for tcjax: notes each start in the host's home, ends with the next of the codes in $CLOUD/codes, then 0.
TCJAX = r"""#!/bin/bash
echo "$(basename "$HOME") $* ${MEGASCALE_SLICE_ID:-} ${MEGASCALE_COORDINATOR_ADDRESS:-} ${MEGASCALE_NUM_SLICES:-}" >> ~/began
trap 'kill $!; exit 143' TERM
code=$(sed -n "$(wc -l < ~/began)p" "$CLOUD/codes")
[ "$code" != wait ] || { sleep 30 & wait $!; }
exit "${code:-0}"
"""


@pytest.fixture
def cloud(tmp_path, monkeypatch):
    (tmp_path / "bin").mkdir()
    (tmp_path / "repository").mkdir()
    for path, text in {"bin/gcloud": GCLOUD, "repository/tcjax": TCJAX}.items():
        (tmp_path / path).write_text(text)
        (tmp_path / path).chmod(0o755)
    for path in ("codes", "trouble", "calls"):
        (tmp_path / path).write_text("")
    git = "git -c init.defaultBranch=main -c user.name=a -c user.email=a@b.c"
    make = f"{git} init -q && {git} add tcjax && {git} commit -qm a"
    subprocess.run(make, shell=True, check=True, cwd=tmp_path / "repository", capture_output=True)
    monkeypatch.chdir(tmp_path / "repository")
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:{os.environ['PATH']}")
    monkeypatch.setenv("CLOUD", str(tmp_path))
    monkeypatch.setenv("POLL", "0.1")
    return tmp_path


SETUP = ("mkdir -p .venv/bin", "cp tcjax .venv/bin/")


def script(cloud, job, **changes):
    path = cloud / "job.sh"
    path.write_text(tpu_vm.text(job, profile(setup=SETUP, **changes)).replace("sleep 5;", ""))
    return path


def run(path, step="all", timeout=60):
    return subprocess.run(["bash", str(path), step], capture_output=True, text=True, timeout=timeout)


def began(cloud):
    return sorted(line.strip() for path in cloud.glob("*/began") for line in path.read_text().splitlines())


def called(cloud, words):
    return sum(words in line for line in (cloud / "calls").read_text().splitlines())


def test_a_run_is_made_ready_on_every_host_followed_and_its_slice_deleted(cloud):
    done = run(script(cloud, JOB))
    assert (done.returncode, done.stderr) == (0, "")
    words = " ".join(JOB.command[1:])
    assert began(cloud) == [f"llava-7b-0 {words}", f"llava-7b-1 {words}"]
    assert (cloud / "state").read_text() == "DELETED\n"


def test_a_lost_process_is_begun_again_on_its_host_and_an_error_is_not(cloud):
    (cloud / "codes").write_text("42\n143\n1\n")
    done = run(script(cloud, JOB))
    assert done.returncode == 1 and len(began(cloud)) == 6
    assert "launch: exit code 42, restart 1 of 2" in done.stdout and "exit code 143, restart 2 of 2" in done.stdout


def test_slices_know_their_number_and_the_first_ones_address(cloud):
    command = (*TRAIN, "--mesh.data", "2")
    job = Job(name="llava-7b", command=command)
    assert run(script(cloud, job, slices=2, repository=str(cloud / "repository"))).returncode == 0
    words = " ".join(command[1:])
    assert began(cloud) == [
        f"llava-7b-{slice}-{host} {words} {slice} 10.0.0.9:8081 2" for slice in (0, 1) for host in (0, 1)
    ]


def test_a_broken_connection_ends_nothing(cloud):
    (cloud / "trouble").write_text("broken\nbroken\n")
    (cloud / "codes").write_text("wait\n")
    path = script(cloud, JOB)
    with subprocess.Popen(["bash", str(path)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        wait_for(lambda: (cloud / "trouble").read_text() == "" and len(began(cloud)) == 2)
        assert called(cloud, "queued-resources delete") == 0
        assert run(path, "stop").returncode == 0
        process.communicate(timeout=30)
    assert process.returncode == 143 and called(cloud, "queued-resources create") == 1
    assert called(cloud, "queued-resources delete") == 1


def test_a_slice_taken_away_is_requested_anew(cloud):
    (cloud / "trouble").write_text("taken\n")
    (cloud / "codes").write_text("wait\n")
    done = run(script(cloud, JOB))
    assert done.returncode == 0, done.stderr
    assert "was taken away; requested anew, 1 of 2" in done.stderr
    assert called(cloud, "queued-resources create") == 2 and called(cloud, "queued-resources delete") == 2


def test_a_host_that_cannot_be_made_ready_costs_nothing_more(cloud):
    path = script(cloud, JOB)
    path.write_text(path.read_text().replace("cp tcjax", "cp no-such-file"))
    assert run(path).returncode == 1
    assert began(cloud) == [] and (cloud / "state").read_text() == "DELETED\n"


def test_an_interrupted_launcher_leaves_the_slice_and_says_so(cloud):
    (cloud / "codes").write_text("wait\n")
    path = script(cloud, JOB)
    words = ["bash", str(path)]
    with subprocess.Popen(
        words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        wait_for(lambda: called(cloud, "host.sh follow"))
        os.killpg(process.pid, signal.SIGINT)
        said = process.communicate(timeout=30)[1]
    assert process.returncode == 130 and "goes on and costs money" in said
    assert (cloud / "state").read_text() == "ACTIVE\n" and len(began(cloud)) == 2
    assert run(path, "start").returncode != 0, "a second training would share the host"
    assert run(path, "stop").returncode == 0


def wait_for(true, seconds=30):
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, "it never came"
        time.sleep(0.05)


def test_every_run_of_a_study_has_a_queued_resource_of_its_own(cloud):
    done = run(script(cloud, STUDY))
    assert done.returncode == 0, done.stdout + done.stderr
    assert began(cloud) == [
        f"num-queries-r{k}-{host} ablate experiments/num_queries --run {k}" for k in (1, 2) for host in (0, 1)
    ]
    assert all(called(cloud, f"queued-resources create num-queries-r{k}") == 1 for k in (1, 2))


def test_an_unknown_step_is_refused(cloud):
    done = run(script(cloud, JOB), "destroy")
    assert (done.returncode, done.stderr) == (2, "no step destroy\n")


def test_submit_keeps_the_script_for_later_steps_and_returns_the_training_s_code(cloud):
    (cloud / "codes").write_text("1\n")
    job = Job(name="llava-7b", command=TRAIN, log_folder=str(cloud / "logs"))
    assert tpu_vm.submit(job, profile(setup=SETUP)) == 1
    assert (cloud / "logs/llava-7b.tpu_vm.sh").read_text() == tpu_vm.text(job, profile(setup=SETUP))


REFUSED = {  # fields of a profile: what is said
    "ironwood": (dict(accelerator="tpu7x:2x2x1"), "tpu7x is had on GKE alone"),
    "gpus": (dict(accelerator="h100:8"), "this route is for TPUs"),
    "slices": (dict(slices=0), "from 1 up"),
    "capacity": (dict(capacity="cheap"), "choose of on-demand, spot, reserved, flex-start"),
    "flex": (dict(accelerator="v5p:2x2x1", capacity="flex-start"), "flex-start is for v5e and v6e, not v5p"),
    "hours": (dict(capacity="flex-start", hours=200), "lasts 1 to 168 hours"),
    "place": (dict(zone=""), "needs a project and a zone"),
    "ref": (dict(ref="main"), "needs a repository"),
    "mounts": (dict(mounts={"runs": "gs://our-runs"}), "takes a bucket's bare name"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_a_profile_that_cannot_be_is_refused(what):
    changes, said = REFUSED[what]
    with pytest.raises(LaunchError, match=said):
        profile(**changes)


@pytest.mark.parametrize(
    "name, command, said",
    [
        ("7b", (*TRAIN, "--mesh.data=2"), "a letter first"),
        ("a" * 63, (*TRAIN, "--mesh.data=2"), "at most 62"),
        ("a", (*TRAIN, "--mesh.fsdp=3"), "--mesh.fsdp 3 does not divide the 32, but the job has 32 devices"),
        ("a", (*TRAIN, "--mesh.data=1"), "2 slices cannot share evenly"),
        ("a", TRAIN, "leaves it to the config: say --mesh.data 2"),
    ],
)
def test_a_job_that_cannot_be_is_refused(name, command, said):
    with pytest.raises(LaunchError, match=said):
        tpu_vm.text(Job(name=name, command=command), profile(slices=2))


def test_the_route_prints_the_script_of_a_profile(capsys):
    words = f"tpu_vm --profile tpu_vm_v5e --zone z --hours 3 -- {shlex.join(TRAIN)}"
    assert door.main(words.split()) == 0
    assert "--zone=z" in capsys.readouterr().out
