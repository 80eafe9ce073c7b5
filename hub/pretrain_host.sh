#!/usr/bin/env bash
# Pretraining on all GPUs of this host:
#   hub/pretrain_host.sh models/multi.zip data/mt80/*.pt
# A process that dies has all of them started again, up to three times, from the last checkpoint.
set -euo pipefail

save=$1
shift
processes=${PROCESSES:-$(nvidia-smi --list-gpus | wc -l)}

exec torchrun --standalone --nproc-per-node "$processes" --max-restarts 3 \
    -m sb3_mbdpo pretrain "$@" --save "$save" \
    --preset paper --model-size "${MODEL_SIZE:-48}" --batch-size "${BATCH_SIZE:-1024}" --steps "${STEPS:-1000000}" \
    --scale-learning-rate "${RATE_RULE:-none}" --task-sampling balanced --seed "${SEED:-0}" \
    --set update_dtype=bfloat16 score_batch_size=64 \
    --checkpoint-every 5000 --resume-if-saved
