#!/bin/bash
# To send it: mkdir -p runs/logs && sbatch THIS_FILE
#SBATCH --job-name=num-queries
#SBATCH --output=runs/logs/%x-%A_%a.log
#SBATCH --open-mode=append
#SBATCH --array=1-7%4
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --partition=gpu
#SBATCH --time=24:00:00
#SBATCH --signal=B:TERM@300
#SBATCH --requeue
#SBATCH --exclusive

me="${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID"
codes=runs/logs/num-queries-$me.codes
# SIGTERM reaches this script alone before the time limit; the step's processes get it from here.
stopped=
trap 'stopped=1; scancel --signal=TERM "$me" 2> /dev/null' TERM

export XLA_FLAGS='--xla_a --xla_b'
export JAX_COORDINATOR_ADDRESS=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1):$((61440 + SLURM_JOB_ID % 4096))
source .venv/bin/activate

# The first process that fails says why; srun kills the others for it.
: > "$codes"
export codes
code=143
if [ -z "$stopped" ]; then
  srun --nodes=2 --ntasks=16 --ntasks-per-node=8 --cpus-per-task=8 --kill-on-bad-exit=1 bash -c '
    trap : TERM; "$@"; code=$?; [ $code -eq 0 ] || echo $code >> "$codes"; exit $code
  ' rank tcjax ablate experiments/num_queries --queries 64,16,4 --run "$SLURM_ARRAY_TASK_ID" &
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
  elif [ "$times" -lt 3 ]; then
    echo "launch: job $me ended with $code and is requeued, $((times + 1)) of 3 times" >&2
    scontrol requeue "$me"
  else
    echo "launch: job $me ended with $code and came back $times times: enough" >&2
  fi
fi
exit $code
