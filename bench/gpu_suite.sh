#!/usr/bin/env bash
# Everything that needs a GPU, in parts of a few minutes: full-size models with random weights, made on the card.
#   bash bench/gpu_suite.sh step1024|step512|memory|inference|data|all
# Tables and JSON go to $OUT, or to outputs/gpu.
set -euo pipefail
cd "$(dirname "$0")/.."
out=${OUT:-outputs/gpu}
export PYTHONUNBUFFERED=1

step1024() {
    python3 -m bench.gpu_step --arms official,tables --output "$out/step1024_ratio.json"
    python3 -m bench.gpu_step --arms selective,none,short --separate --output "$out/step1024_arms.json"
}

step512() {
    python3 -m bench.gpu_step --resolution 512 --train_batch_size 4 --arms official,tables \
        --output "$out/step512_ratio.json"
    python3 -m bench.gpu_step --resolution 512 --train_batch_size 4 --arms selective,none,short --separate \
        --output "$out/step512_arms.json"
}

memory() {  # what --memory auto plans for smaller cards; eager, as predicted
    for limit in 12 16 24; do
        python3 -m bench.gpu_step --arms planned --memory_limit "$limit" --steps 3 --no-compile \
            --output "$out/memory_$limit.json"
    done
}

inference() {
    for side in 1024 512; do
        python3 -m bench.gpu_step --sampling 4,28 --resolution "$side" --output "$out/inference_$side.json"
    done
}

data() {
    for side in 512 1024; do
        OMP_NUM_THREADS=1 python3 -m bench.data --size "$side" --rounds 15
    done
}

case "${1:-}" in
    step1024 | step512 | memory | inference | data) parts=$1 ;;
    all) parts="step1024 step512 memory inference data" ;;
    *) echo "usage: bash bench/gpu_suite.sh step1024|step512|memory|inference|data|all" >&2; exit 2 ;;
esac
mkdir -p "$out"
for part in $parts; do
    "$part" 2>&1 | tee "$out/$part.txt"
done
