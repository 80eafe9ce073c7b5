#!/usr/bin/env bash
#SBATCH --job-name=mbdpo-pretrain
#SBATCH --nodes=8
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=48:00:00
#SBATCH --requeue
# Pretraining on the GPUs of several hosts, which all see the same folders:
#   sbatch hub/pretrain_slurm.sh models/multi.zip data/mt80/*.pt
# Given again, or started again by SLURM, it goes on from the last checkpoint.
set -euo pipefail

save=$1
shift
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)

exec srun torchrun --nnodes "$SLURM_JOB_NUM_NODES" --nproc-per-node "$SLURM_GPUS_ON_NODE" --max-restarts 3 \
    --rdzv-id "$SLURM_JOB_ID" --rdzv-backend c10d --rdzv-endpoint "$first:29500" \
    -m sb3_mbdpo pretrain "$@" --save "$save" \
    --preset paper --model-size "${MODEL_SIZE:-317}" --batch-size "${BATCH_SIZE:-1024}" --steps "${STEPS:-10000000}" \
    --scale-learning-rate "${RATE_RULE:-none}" --task-sampling balanced --seed "${SEED:-0}" \
    --set update_dtype=bfloat16 score_batch_size=64 \
    --checkpoint-every 5000 --resume-if-saved
