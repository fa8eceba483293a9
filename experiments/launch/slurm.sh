#!/usr/bin/env bash
# Any target of the Makefile on the machines of a Slurm job, one task a machine:
#
#     make install                                                        # once, on a file system that all machines see
#     sbatch --nodes 2 experiments/launch/slurm.sh train-adaptthink-7b
#     sbatch --nodes 1 experiments/launch/slurm.sh train-ada-grpo-14b OFFLOAD=1 ARGS="--save_every 5"
#
# A job that comes to its time limit, is preempted or loses a machine goes back into the queue, and the same command
# continues the run from its newest checkpoint. A run that fails by itself does not: its error would only come again.
#
#SBATCH --job-name=adaptive-reasoning
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --mem=0
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
#SBATCH --signal=B:USR1@120
set -euo pipefail

if [ $# -lt 1 ]; then
  echo "usage: sbatch --nodes N experiments/launch/slurm.sh TARGET [NAME=VALUE ...]" >&2
  exit 2
fi
cd "${SLURM_SUBMIT_DIR:?this script is for sbatch}"
if [ ! -f .venv/.installed ]; then
  echo "error: $PWD/.venv is not there. Run make install first: machines that install at the same time disturb each other." >&2
  exit 2
fi

nodes=$SLURM_JOB_NUM_NODES
read -r first < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
port=$((20000 + SLURM_JOB_ID % 20000)) # two jobs may share a machine
echo "job $SLURM_JOB_ID, start ${SLURM_RESTART_COUNT:-0}: make $* on $nodes machines, $first:$port"

step=
requeue() { # two minutes before the time limit, by --signal: everything up to the newest checkpoint is kept
  echo "job $SLURM_JOB_ID: the time limit is near, it goes back into the queue"
  trap - USR1
  kill -TERM "$step" 2>/dev/null || true
  wait "$step" || true
  scontrol requeue "$SLURM_JOB_ID"
  exit 0
}
trap requeue USR1

# Since Slurm 22.05 srun does not take over the job's CPUs a task: it would have one for the 8 processes.
# Every task is told which machine it is; the target and its options are handed through word by word.
# shellcheck disable=SC2016  # SLURM_NODEID is the task's, not this script's
srun --nodes="$nodes" --ntasks="$nodes" --ntasks-per-node=1 --kill-on-bad-exit=1 \
  ${SLURM_CPUS_PER_TASK:+--cpus-per-task="$SLURM_CPUS_PER_TASK"} \
  bash -c 'exec make "$@" NODE_RANK="$SLURM_NODEID"' make "$@" \
  NUM_NODES="$nodes" MASTER_ADDR="$first" MASTER_PORT="$port" &
step=$!
wait "$step" # a signal ends this wait, and its handler the script
