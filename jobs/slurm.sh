#!/usr/bin/env bash
# Starts Ray on the nodes of a Slurm allocation and runs a stage there: sbatch slurm.sh run run.dir=/shared/runs/mine ...
# When the time limit ends it, submit the same line again: it goes on where it stopped.
#SBATCH --job-name=alphatoken
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=1
#SBATCH --cpus-per-task=8
#SBATCH --mem=64G
#SBATCH --time=08:00:00
set -euo pipefail

if [ $# -eq 0 ]; then
    echo "usage: sbatch slurm.sh <stage> [key=value ...]" >&2
    exit 2
fi

port=${RAY_PORT:-6379}
cpus=${SLURM_CPUS_PER_TASK:-1}
export RAY_USAGE_STATS_ENABLED=0
# One token for the head, the other nodes and the stage, which srun hands on: without it Ray makes one for each user.
export RAY_AUTH_MODE=token
export RAY_AUTH_TOKEN=${RAY_AUTH_TOKEN:-$(od -An -N32 -tx1 /dev/urandom | tr -d ' \n')}
mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
head=${nodes[0]}
address=$(srun --nodes=1 --ntasks=1 --nodelist="$head" hostname --ip-address | awk '{print $1}')

srun --nodes=1 --ntasks=1 --overlap --nodelist="$head" \
    ray start --head --node-ip-address="$address" --port="$port" --num-cpus="$cpus" --block &
for _ in $(seq 60); do
    srun --nodes=1 --ntasks=1 --overlap --nodelist="$head" ray health-check --address="$address:$port" && break
    sleep 2
done
for node in "${nodes[@]:1}"; do
    srun --nodes=1 --ntasks=1 --overlap --nodelist="$node" \
        ray start --address="$address:$port" --num-cpus="$cpus" --block &
done

status=0
srun --nodes=1 --ntasks=1 --overlap --nodelist="$head" alphatoken "$@" "cluster.address=$address:$port" || status=$?
kill $(jobs -p) 2>/dev/null || true
exit "$status"
