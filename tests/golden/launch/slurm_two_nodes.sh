#!/bin/bash
# To send it: mkdir -p runs/logs && sbatch THIS_FILE
#SBATCH --job-name=boards
#SBATCH --output=runs/logs/%x-%j.log
#SBATCH --open-mode=append
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --partition=cpu
#SBATCH --time=1:00:00
#SBATCH --signal=B:TERM@120
#SBATCH --requeue

me="$SLURM_JOB_ID"
codes=runs/logs/boards-$me.codes
# SIGTERM reaches this script alone before the time limit; the step's processes get it from here.
stopped=
trap 'stopped=1; scancel --signal=TERM "$me" 2> /dev/null' TERM

export JAX_COORDINATOR_ADDRESS=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1):$((61440 + SLURM_JOB_ID % 4096))

# The first process that fails says why; srun kills the others for it.
: > "$codes"
export codes
code=143
if [ -z "$stopped" ]; then
  srun --nodes=2 --ntasks=2 --ntasks-per-node=1 --kill-on-bad-exit=1 bash -c '
    trap : TERM; "$@"; code=$?; [ $code -eq 0 ] || echo $code >> "$codes"; exit $code
  ' rank tcjax train configs/boards.py &
  step=$!
  while stopped=; wait "$step"; code=$?; [ -n "$stopped" ]; do :; done
fi
[ $code -eq 0 ] || ! read -r first < "$codes" || code=$first
rm -f "$codes"

# 42: a process was lost; 128 and above: a signal, after SIGTERM with a save; 130: somebody pressed Ctrl-C.
if [ $code -eq 42 ] || { [ $code -ge 128 ] && [ $code -ne 130 ]; }; then
  state=$(squeue --noheader --jobs="$me" --format=%T) times=${SLURM_RESTART_COUNT:-0}
  if [ "$state" != RUNNING ]; then  # cancelled, or Slurm requeues it itself
    echo "launch: job $me ended with $code and is ${state:-gone}" >&2
  elif [ "$times" -lt 10 ]; then
    echo "launch: job $me ended with $code and is requeued, $((times + 1)) of 10 times" >&2
    scontrol requeue "$me"
  else
    echo "launch: job $me ended with $code and came back $times times: enough" >&2
  fi
fi
exit $code
