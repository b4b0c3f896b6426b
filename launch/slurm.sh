#!/usr/bin/env bash
# Train on a Slurm cluster, one process a GPU, and go on by itself after preemption or the time limit:
#   CONFIG=recipes/mine/rgrl.yaml OUTPUT_DIR=/shared/runs/mine sbatch --nodes 4 launch/slurm.sh [--section.key value ...]
# Run it in an environment that has rgrl, from a folder that all nodes see: paths in CONFIG, and modules with rewards of
# your own, are looked up there. Options on sbatch's command line replace those below.
#SBATCH --job-name=rgrl
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=USR1@600
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%j.out
set -euo pipefail

# The cluster's values: set them here or in the environment of sbatch.
CONFIG=${CONFIG:?set CONFIG to a recipe}
OUTPUT_DIR=${OUTPUT_DIR:?set OUTPUT_DIR to a folder that all nodes see}
SHARE_WEIGHTS=${SHARE_WEIGHTS:-false}   # true: the processes of a node share the frozen layers, as launch/fsdp2.yaml
REQUEUE_CODE=${REQUEUE_CODE:-75}        # exit code of a run that was asked to stop and has saved
export MASTER_PORT=${MASTER_PORT:-29500}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

MASTER_ADDR=${MASTER_ADDR:-$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)}
export MASTER_ADDR
export WORLD_SIZE=$SLURM_NTASKS LOCAL_WORLD_SIZE=$((SLURM_NTASKS / SLURM_NNODES))
if [[ $SHARE_WEIGHTS == true ]]; then
  export ACCELERATE_USE_FSDP=true FSDP_VERSION=2 FSDP_CPU_RAM_EFFICIENT_LOADING=false
fi

# The processes answer these signals; this script waits for them.
trap : USR1 TERM
code=0
# No launcher stands in between, so signals reach the processes and their exit code comes back. One that ends does not
# take the others with it: the main one may still be saving, and without one of theirs they end after their time limit.
# shellcheck disable=SC2016 # each task expands its own
srun --kill-on-bad-exit=0 bash -c 'export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID; exec python "$@"' task \
  -m rgrl train --config "$CONFIG" --run.output_dir "$OUTPUT_DIR" --run.resume_from_checkpoint auto "$@" || code=$?
if ((code == REQUEUE_CODE)); then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
