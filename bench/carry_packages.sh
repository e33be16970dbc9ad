#!/usr/bin/env bash
# What a GPU machine without a package index lacks for bench/gpu_suite.sh, in one small archive, made on a machine that
# has one; the versions are those of requirements.lock.
#   bash bench/carry_packages.sh ARCHIVE.tar.xz [Python there, 3.12] [CUDA of the torch there, 130]
# There: mkdir /tmp/site && tar xf ARCHIVE.tar.xz -C /tmp/site && export PYTHONPATH=/tmp/site
set -euo pipefail
archive=$(realpath "${1:?name the archive}") python=${2:-3.12} cuda=${3:-130}
cd "$(dirname "$0")/.."
site=$(mktemp -d)
trap 'rm -r "$site"' EXIT
names="bitsandbytes configargparse diffusers lpips omegaconf peft torchao"
platforms=$(printf -- '--platform manylinux_2_%s_x86_64 ' 17 24 28 34 39)  # pip takes them to the letter
# shellcheck disable=SC2046,SC2086
python3 -m pip install -q --no-deps --no-compile --only-binary=:all: --implementation cp --python-version "$python" \
    $platforms --target "$site" $(grep -E "^(${names// /|})==" requirements.lock)
rm -rf "$site/test"  # torchao's
# Kernels of other machines, and those that nothing here calls.
find "$site/bitsandbytes" -name 'libbitsandbytes_*.so' ! -name "*_cuda$cuda.so" ! -name '*_cpu.so' -delete
find "$site/torchao" -name '_C*.so' -delete
[ -e "$site/bitsandbytes/libbitsandbytes_cuda$cuda.so" ] || { echo "bitsandbytes has no CUDA $cuda" >&2; exit 1; }
tar cJf "$archive" -C "$site" .
du -h "$archive"
