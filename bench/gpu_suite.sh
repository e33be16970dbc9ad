#!/usr/bin/env bash
# Everything that needs a GPU, in parts of a few minutes: full-size models with random weights, made on the card.
#   bash bench/gpu_suite.sh PART|all [flags of bench.gpu_step that win over a part's own]
# Tables and JSON go to $OUT, or to outputs/gpu. What fails is named at the end, and the rest is measured all the same.
# The code of every part but data runs on a CPU, on a small model, with
#   --device cpu --layers 1,1 --heads 1 --resolution 64 --max_sequence_length 16 --steps 1
set -euo pipefail
cd "$(dirname "$0")/.."
out=${OUT:-outputs/gpu}
parts="ceilings step1024 step1024b2 step512 step512b1 quantised profile memory inference data"
export PYTHONUNBUFFERED=1
flags=("${@:2}")
failed=""

measure() {  # measure NAME FLAGS: NAME.txt and NAME.json
    local name=$1
    shift
    python3 -m bench.gpu_step "$@" --output "$out/$name.json" "${flags[@]}" 2>&1 | tee "$out/$name.txt" ||
        failed+=" $name"
}

ceilings() {  # tokens: 512 px with a reference, 1024 px without and with one
    measure ceilings --ceilings 2560,4608,8704
}

step1024() {
    measure step1024_ratio --arms official,tables
    measure step1024_arms --arms selective,none,short --separate
}

step1024b2() {
    measure step1024b2 --train_batch_size 2 --arms official,selective,tables --separate
}

step512() {
    measure step512_ratio --resolution 512 --train_batch_size 4 --arms official,tables
    measure step512_arms --resolution 512 --train_batch_size 4 --arms selective,none,short --separate
}

step512b1() {
    measure step512b1_ratio --resolution 512 --arms official,tables
    measure step512b1_short --resolution 512 --arms short
}

quantised() {  # compiled, as every arm on a GPU
    measure quantised --arms int8,fp8,nf4 --separate
}

profile() {
    measure profile1024 --arms official,tables --steps 3 --profile
    measure profile512 --resolution 512 --train_batch_size 4 --arms tables --steps 3 --profile
}

memory() {  # what --memory auto plans for smaller cards, on 8 GiB offload; eager, as predicted
    for limit in 8 12 16 24; do
        measure "memory_$limit" --arms planned --memory_limit "$limit" --steps 3 --no-compile
    done
}

inference() {
    for side in 1024 512; do
        measure "inference_$side" --sampling 4,28 --resolution "$side"
    done
}

data() {
    for side in 512 1024; do
        OMP_NUM_THREADS=1 python3 -m bench.data --size "$side" --rounds 15 2>&1 | tee "$out/data_$side.txt" ||
            failed+=" data_$side"
    done
}

case " $parts all " in
    *" ${1:-none} "*) ;;
    *) echo "usage: bash bench/gpu_suite.sh ${parts// /|}|all [flags of bench.gpu_step]" >&2; exit 2 ;;
esac
mkdir -p "$out"
for part in $([ "$1" = all ] && echo "$parts" || echo "$1"); do
    "$part"
done
[ -z "$failed" ] || { echo "failed:$failed" >&2; exit 1; }
