#!/usr/bin/env bash
# The main job on several machines of a SLURM cluster: sbatch docs/cluster/slurm.sh [kedro's options]
# Submit from the project's folder. It may lie on a shared file system or be cloned on each machine; only
# the first one writes. What is asked for here is two machines with four GPUs each.
#SBATCH --job-name=rdd
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=32
#SBATCH --time=12:00:00
# SIGTERM three minutes before the end: checkpoint, status 143; submitted again, it goes on from there.
#SBATCH --signal=TERM@180
#SBATCH --requeue
set -euo pipefail

first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export RENDEZVOUS="$first:$((20000 + SLURM_JOB_ID % 40000))"
export TIMEOUT=600
# By it the machines know one another; srun hands the environment on.
RDD_TOKEN=$(.venv/bin/python -c "import secrets; print(secrets.token_urlsafe(32))")
export RDD_TOKEN

# shellcheck disable=SC2016  # expanded on each machine
srun --kill-on-bad-exit=0 bash -c '
    if [ "$SLURM_NODEID" = 0 ]; then
        exec .venv/bin/kedro run --pipeline=distill_tse --env=camvid/published \
            --params="trainer.devices=auto,trainer.nodes=$SLURM_NNODES,trainer.rendezvous=$RENDEZVOUS,trainer.timeout=$TIMEOUT" "$@"
    else
        exec .venv/bin/python -m rdd_pipeline.launching.join "$RENDEZVOUS" --timeout "$TIMEOUT"
    fi
' rdd "$@"
