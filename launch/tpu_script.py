"""The shell script of launch/tpu_vm.py, part by part: what asks Google Cloud for slices, and what lies on their hosts.

Every step is a function and may be called alone. `all` calls each as a process of its own, so that `set -e` holds in it.
"""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING

from launch import slices
from launch.forward import supervised
from launch.job import Job

if TYPE_CHECKING:
    from launch.tpu_vm import Profile

MEGASCALE_PORT = 8081


def head(job: Job, profile: Profile, name: str) -> str:
    several = f"{profile.slices} slices of " if profile.slices > 1 else ""
    return f"""\
#!/usr/bin/env bash
# {name} on {several}{profile.accelerator}, by queued resources of Cloud TPU. Needs gcloud, logged in, and an SSH agent
# (`ssh-add ~/.ssh/google_compute_engine`). Slices cost money until `delete`.
#   bash {name}.tpu_vm.sh         everything: create, ready, setup, start, follow, delete
#   bash {name}.tpu_vm.sh STEP    one of these, or stop, which saves and ends the training
set -euo pipefail
export NAME="${{NAME:-{name}}}" RUN="${{RUN:-}}"
"""


def study(job: Job) -> str:
    return f"""\
# A study: every run on a queued resource of its own, all at once; RUN=3 bash ... does the third alone.
if [ -z "$RUN" ]; then
  runs=() code=0
  for run in $(seq 1 {job.runs}); do
    NAME="$NAME-r$run" RUN="$run" bash "$0" "$@" >> "$NAME-r$run.log" 2>&1 &
    runs+=($!)
    echo "run $run of {job.runs}: $NAME-r$run.log"
  done
  for run in "${{runs[@]}}"; do wait "$run" || code=$?; done
  exit "$code"
fi
[[ "$NAME" = *-r"$RUN" ]] || NAME="$NAME-r$RUN"
"""


def cloud(profile: Profile, target: slices.Slice) -> str:
    """create, state, gone, ready, delete."""
    words = ["--runtime-version=" + (profile.runtime or target.facts.runtime)]
    if target.usual:
        words.append(f"--accelerator-type={target.accelerator_type}")
    else:
        words += [f"--type={target.facts.type_name}", f"--topology={target.topology}"]
    alpha = "alpha " if profile.capacity == "flex-start" or not (target.usual or target.generation == "v4") else ""
    words += {
        "on-demand": [],
        "spot": ["--spot"],
        "reserved": ["--reserved"],
        "flex-start": ["--provisioning-model=flex-start", f"--max-run-duration={profile.hours}h"],
    }[profile.capacity]
    asked = {"network": profile.network, "subnetwork": profile.subnetwork, "service-account": profile.service_account}
    words += [f"--{name}={value}" for name, value in asked.items() if value]
    words += ["--internal-ips"] if profile.internal_ips else []
    node = f'--node-count={profile.slices} --node-prefix="$NAME"' if profile.slices > 1 else '--node-id="$NAME"'
    return f"""\
create() {{
  gcloud {alpha}compute tpus queued-resources create "$NAME" "${{place[@]}}" {node} \\
    {(" " + chr(92) + chr(10) + "    ").join(shlex.quote(word) for word in words)}
}}

state() {{
  gcloud compute tpus queued-resources describe "$NAME" "${{place[@]}}" --format='value(state.state)'
}}

gone() {{  # taken away; not when nobody can be asked
  local now
  now=$(state) && [[ "$now" = SUSPEND* ]]
}}

ready() {{
  local now
  while :; do
    now=$(state)
    case "$now" in
      ACTIVE) return 0 ;;
      FAILED | SUSPEND* | DELETING) echo "$NAME is $now" >&2; return 1 ;;
    esac
    echo "$NAME is $now"
    sleep "${{POLL:-30}}"
  done
}}

delete() {{
  gcloud compute tpus queued-resources delete "$NAME" "${{place[@]}}" --force --quiet
}}
"""


def hosts(job: Job, profile: Profile) -> str:
    """What lies in ~/launch of every host: prepare.sh, job.sh, host.sh."""
    exports = {"PYTHONUNBUFFERED": "1", "JAX_PLATFORMS": "tpu,cpu"} | dict(job.env)
    lines = "".join(f"export {name}={shlex.quote(value)}\n" for name, value in exports.items())
    run = ' ${RUN:+--run "$RUN"}' if job.runs else ""
    if profile.repository:
        where = shlex.quote(profile.repository)
        checkout = f" && git -C ~/project checkout --quiet {shlex.quote(profile.ref)}" if profile.ref else ""
        fetch = f"test -d ~/project || git clone --quiet {where} ~/project{checkout}"
    else:
        fetch = "mkdir -p ~/project && tar -xzf ~/launch/project.tar.gz -C ~/project"
    mounts = ""
    for folder, bucket in profile.mounts.items():
        path = shlex.quote(folder)
        mounts += f"mkdir -p {path}; mountpoint -q {path} || gcsfuse --implicit-dirs {shlex.quote(bucket)} {path}\n"
    return f"""\
# What every host gets in ~/launch.
prepare_sh() {{
  cat << 'PREPARE'
#!/usr/bin/env bash
# Makes a host ready.
set -euo pipefail
{fetch}
cd ~/project
{chr(10).join(profile.setup)}
{mounts}PREPARE
}}

job_sh() {{
  cat << 'JOB'
#!/usr/bin/env bash
# The training of this host: SIGTERM is passed on, and exit code 42 or a signal's begins it again.
cd ~/project || exit 1
echo $$ > ~/launch/pid
trap 'echo "$?" > ~/launch/code' EXIT
export PATH="$PWD/.venv/bin:$PATH"
{lines}set -- {shlex.join(job.command)}{run}
{supervised(job.restarts)}JOB
}}

host_sh() {{
  cat << 'HOST'
#!/usr/bin/env bash
# bash host.sh start | follow | stop
cd ~/launch || exit 1
case "$1" in
  start)
    if [ -s pid ] && kill -0 "$(cat pid)" 2> /dev/null; then echo "a training is running here" >&2; exit 1; fi
    rm -f code pid
    setsid nohup bash job.sh > log 2>&1 < /dev/null &
    until [ -s pid ]; do sleep 0.1; done ;;
  follow)
    tail -n +1 -f --pid="$(cat pid)" log
    exit "$(cat code)" ;;
  stop) kill -TERM "$(cat pid)" ;;
esac
HOST
}}
"""


def steps(job: Job, profile: Profile) -> str:
    """setup, start, follow, code, stop, by ssh."""
    pack = 'git diff --quiet HEAD || echo "what is not committed is not sent" >&2\n  '
    pack += 'git archive --format=tar.gz --output="$files/launch/project.tar.gz" HEAD\n  '
    megascale = ""
    if profile.slices > 1:
        names: dict = {
            "COORDINATOR_ADDRESS": f"$first:{MEGASCALE_PORT}",
            "NUM_SLICES": profile.slices,
            "SLICE_ID": "$slice",
        }
        names["PORT"] = MEGASCALE_PORT
        megascale = " ".join(f"MEGASCALE_{name}={value}" for name, value in names.items()) + " \\\n    "
    run = "RUN=$RUN " if job.runs else ""
    first = ""
    if profile.slices > 1:
        first = """
  local first
  first=$(gcloud compute tpus tpu-vm describe "${nodes[0]}" "${place[@]}" \\
    --format='value(networkEndpoints[0].ipAddress)')"""
    return f"""\
# One command on every host of every slice, at once; $slice is the slice's number.
everywhere() {{
  local slice pids=() code=0 pid
  for slice in "${{!nodes[@]}}"; do
    gcloud compute tpus tpu-vm ssh "${{nodes[$slice]}}" "${{place[@]}}" "${{reach[@]}}" --worker=all \\
      --command="${{1//@slice@/$slice}}" &
    pids+=($!)
  done
  for pid in "${{pids[@]}}"; do wait "$pid" || code=$?; done
  return "$code"
}}

setup() {{
  local files node
  files=$(mktemp -d)
  mkdir "$files/launch"
  {"" if profile.repository else pack}for each in prepare job host; do "${{each}}_sh" > "$files/launch/$each.sh"; done
  for node in "${{nodes[@]}}"; do
    gcloud compute tpus tpu-vm scp --recurse "$files/launch" "$node:" "${{place[@]}}" "${{reach[@]}}" --worker=all
  done
  rm -r "$files"
  everywhere 'bash ~/launch/prepare.sh'
}}

start() {{{first}
  everywhere "{"env " if megascale else ""}{megascale.replace("$slice", "@slice@")}{run}bash ~/launch/host.sh start"
}}

follow() {{  # the first host's log; its exit code is the job's
  gcloud compute tpus tpu-vm ssh "${{nodes[0]}}" "${{place[@]}}" "${{reach[@]}}" --worker=0 \\
    --command='bash ~/launch/host.sh follow'
}}

code() {{  # once the training ended
  gcloud compute tpus tpu-vm ssh "${{nodes[0]}}" "${{place[@]}}" "${{reach[@]}}" --worker=0 --command='cat ~/launch/code'
}}

stop() {{
  everywhere 'bash ~/launch/host.sh stop'
}}
"""


def everything(job: Job) -> str:
    return f"""\
all() {{
  trap 'echo "interrupted; $NAME goes on and costs money: bash $0 follow, stop or delete" >&2; exit 130' INT TERM HUP
  local again ended=
  for again in $(seq 0 {job.restarts}); do
    [ "$again" = 0 ] || echo "$NAME was taken away; requested anew, $again of {job.restarts}" >&2
    bash "$0" create
    if bash "$0" ready && bash "$0" setup && bash "$0" start; then
      # A broken connection is no end: asked until the first host says its code, or the slice is gone.
      until bash "$0" follow; ended=$(bash "$0" code) || gone; do sleep "${{POLL:-30}}"; done
    elif ! gone; then
      ended=1  # it could not be had, or not be set up
    fi
    delete
    [ -z "$ended" ] || exit "$ended"
  done
  echo "$NAME was taken away {job.restarts + 1} times" >&2
  exit 143
}}

case "${{1:-all}}" in
  all | create | state | ready | setup | start | follow | code | stop | delete) "${{1:-all}}" ;;
  *) echo "no step $1" >&2; exit 2 ;;
esac
"""
