#!/usr/bin/env bash
# num-queries on v6e:2x2, by queued resources of Cloud TPU. Needs gcloud, logged in, and an SSH agent
# (`ssh-add ~/.ssh/google_compute_engine`). Slices cost money until `delete`.
#   bash num-queries.tpu_vm.sh         everything: create, ready, setup, start, follow, delete
#   bash num-queries.tpu_vm.sh STEP    one of these, or stop, which saves and ends the training
set -euo pipefail
export NAME="${NAME:-num-queries}" RUN="${RUN:-}"

# A study: every run on a queued resource of its own, all at once; RUN=3 bash ... does the third alone.
if [ -z "$RUN" ]; then
  runs=() code=0
  for run in $(seq 1 2); do
    NAME="$NAME-r$run" RUN="$run" bash "$0" "$@" >> "$NAME-r$run.log" 2>&1 &
    runs+=($!)
    echo "run $run of 2: $NAME-r$run.log"
  done
  for run in "${runs[@]}"; do wait "$run" || code=$?; done
  exit "$code"
fi
[[ "$NAME" = *-r"$RUN" ]] || NAME="$NAME-r$RUN"

place=(--project=our-project --zone=us-west4-a)
nodes=("$NAME")
reach=()

create() {
  gcloud alpha compute tpus queued-resources create "$NAME" "${place[@]}" --node-id="$NAME" \
    --runtime-version=v2-alpha-tpuv6e \
    --accelerator-type=v6e-4 \
    --provisioning-model=flex-start \
    --max-run-duration=48h
}

state() {
  gcloud compute tpus queued-resources describe "$NAME" "${place[@]}" --format='value(state.state)'
}

gone() {  # taken away; not when nobody can be asked
  local now
  now=$(state) && [[ "$now" = SUSPEND* ]]
}

ready() {
  local now
  while :; do
    now=$(state)
    case "$now" in
      ACTIVE) return 0 ;;
      FAILED | SUSPEND* | DELETING) echo "$NAME is $now" >&2; return 1 ;;
    esac
    echo "$NAME is $now"
    sleep "${POLL:-30}"
  done
}

delete() {
  gcloud compute tpus queued-resources delete "$NAME" "${place[@]}" --force --quiet
}

# What every host gets in ~/launch.
prepare_sh() {
  cat << 'PREPARE'
#!/usr/bin/env bash
# Makes a host ready.
set -euo pipefail
mkdir -p ~/project && tar -xzf ~/launch/project.tar.gz -C ~/project
cd ~/project
python3 -m pip install --quiet --user uv
test -d .venv || ~/.local/bin/uv venv --quiet --python 3.11 .venv
~/.local/bin/uv pip install --quiet --python .venv/bin/python --editable '.[tpu]'
PREPARE
}

job_sh() {
  cat << 'JOB'
#!/usr/bin/env bash
# The training of this host: SIGTERM is passed on, and exit code 42 or a signal's begins it again.
cd ~/project || exit 1
echo $$ > ~/launch/pid
trap 'echo "$?" > ~/launch/code' EXIT
export PATH="$PWD/.venv/bin:$PATH"
export PYTHONUNBUFFERED=1
export JAX_PLATFORMS=tpu,cpu
set -- tcjax ablate experiments/num_queries ${RUN:+--run "$RUN"}
child= stopped= told=
stop() { stopped=yes told=yes; [ -z "$child" ] || kill -TERM "$child" 2>/dev/null || true; }
trap stop TERM
for again in $(seq 0 1); do
  [ "$again" = 0 ] || { echo "launch: exit code $code, restart $again of 1"; sleep 5; }
  child=
  [ -z "$told" ] || break
  "$@" &
  child=$!
  [ -z "$told" ] || kill -TERM "$child"
  wait "$child"; code=$?
  while [ -n "$stopped" ]; do stopped=; wait "$child"; code=$?; done
  [ -z "$told" ] || break
  case "$code" in 42|12[89]|13[1-9]|1[4-9][0-9]|2[0-5][0-9]) ;; *) break ;; esac
done
exit "$code"
JOB
}

host_sh() {
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
}

# One command on every host of every slice, at once; $slice is the slice's number.
everywhere() {
  local slice pids=() code=0 pid
  for slice in "${!nodes[@]}"; do
    gcloud compute tpus tpu-vm ssh "${nodes[$slice]}" "${place[@]}" "${reach[@]}" --worker=all \
      --command="${1//@slice@/$slice}" &
    pids+=($!)
  done
  for pid in "${pids[@]}"; do wait "$pid" || code=$?; done
  return "$code"
}

setup() {
  local files node
  files=$(mktemp -d)
  mkdir "$files/launch"
  git diff --quiet HEAD || echo "what is not committed is not sent" >&2
  git archive --format=tar.gz --output="$files/launch/project.tar.gz" HEAD
  for each in prepare job host; do "${each}_sh" > "$files/launch/$each.sh"; done
  for node in "${nodes[@]}"; do
    gcloud compute tpus tpu-vm scp --recurse "$files/launch" "$node:" "${place[@]}" "${reach[@]}" --worker=all
  done
  rm -r "$files"
  everywhere 'bash ~/launch/prepare.sh'
}

start() {
  everywhere "RUN=$RUN bash ~/launch/host.sh start"
}

follow() {  # the first host's log; its exit code is the job's
  gcloud compute tpus tpu-vm ssh "${nodes[0]}" "${place[@]}" "${reach[@]}" --worker=0 \
    --command='bash ~/launch/host.sh follow'
}

code() {  # once the training ended
  gcloud compute tpus tpu-vm ssh "${nodes[0]}" "${place[@]}" "${reach[@]}" --worker=0 --command='cat ~/launch/code'
}

stop() {
  everywhere 'bash ~/launch/host.sh stop'
}

all() {
  trap 'echo "interrupted; $NAME goes on and costs money: bash $0 follow, stop or delete" >&2; exit 130' INT TERM HUP
  local again ended=
  for again in $(seq 0 1); do
    [ "$again" = 0 ] || echo "$NAME was taken away; requested anew, $again of 1" >&2
    bash "$0" create
    if bash "$0" ready && bash "$0" setup && bash "$0" start; then
      # A broken connection is no end: asked until the first host says its code, or the slice is gone.
      until bash "$0" follow; ended=$(bash "$0" code) || gone; do sleep "${POLL:-30}"; done
    elif ! gone; then
      ended=1  # it could not be had, or not be set up
    fi
    delete
    [ -z "$ended" ] || exit "$ended"
  done
  echo "$NAME was taken away 2 times" >&2
  exit 143
}

case "${1:-all}" in
  all | create | state | ready | setup | start | follow | code | stop | delete) "${1:-all}" ;;
  *) echo "no step $1" >&2; exit 2 ;;
esac
