#!/usr/bin/env bash
# Trains a restoration LoRA, restores photographs it never saw, and scores them against the clean originals.
#
#   bash run_scripts.sh                                                     the embedded model and photographs, on a CPU
#   HR_ROOT=photos HELDOUT_ROOT=heldout bash run_scripts.sh                 the embedded model, your photographs
#   MODEL_NAME=/path/to/FLUX.1-Kontext-dev HR_ROOT=photos HELDOUT_ROOT=heldout bash run_scripts.sh      the real thing
#
# Arguments go to the training script and win over what stands here: bash run_scripts.sh --max_train_steps 100
# (a --config file does not: it loses against all that is on a command line, so also against what stands here).
#   OUTPUT_DIR       folder for all that is written
#   PERCEPTUAL       with MODEL_NAME: vgg (the default) or lpips, which need a weight file, gradient, or none
#   TEST_OPTIONS     options for the test script, such as "--crop_px 128": it scores whole photographs of the embedded
#                    model, by tiles, and with MODEL_NAME crops of 512 px
#   NUM_PROCESSES    training processes, one a GPU
#   KONTEXT_PYTHON   Python of an environment of your own; nothing is installed then
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/scripts/setup_env.sh"

[[ " $* " != *" --output_dir"* ]] || die "name the folder with OUTPUT_DIR=folder bash $0, not with --output_dir"
[[ -z "${HR_ROOT:-}" || -d "$HR_ROOT" ]] ||
  die "HR_ROOT=$HR_ROOT: no such folder; name your folder of clean photographs"

if [[ -n "${MODEL_NAME:-}" ]]; then
  [[ -n "${HR_ROOT:-}" ]] || die "HR_ROOT is not set; name your folder of clean photographs: HR_ROOT=photos bash $0"
  OUTPUT_DIR="${OUTPUT_DIR:-$ROOT/outputs/$(basename "$MODEL_NAME")-$(date +%Y%m%d-%H%M%S)}"
  training=(
    --mixed_precision bf16
    --instance_prompt "Restore this degraded photograph to high fidelity"
    --resolution 512
    --train_batch_size 4
    --gradient_accumulation_steps 4
    --learning_rate 1e-4
    --max_train_steps 3000
    --dataloader_num_workers 4
  )
  damage=(--degradation_types "downsample,noise,blur")
  [[ "${PERCEPTUAL:=vgg}" == none ]] || training+=(--perceptual_loss "$PERCEPTUAL")
  scoring=(--crop_px 512)
else
  MODEL_NAME="$ROOT/assets/tiny-kontext"
  if [[ -z "${HR_ROOT:-}" || -z "${HELDOUT_ROOT:-}" ]]; then
    (cd "$ROOT" && "$PYTHON" -m scripts.download_dataset sample)
  fi
  HR_ROOT="${HR_ROOT:-$ROOT/data/sample/train}"
  HELDOUT_ROOT="${HELDOUT_ROOT:-$ROOT/data/sample/heldout}"
  OUTPUT_DIR="${OUTPUT_DIR:-$ROOT/outputs/tiny-kontext-$(date +%Y%m%d-%H%M%S)}"
  # The threads of a tiny model wait for each other all the time: asleep they would wake too late, and spinning for long
  # would take the loader's core. Freed memory is kept, not fetched from the kernel anew in every step.
  export OMP_NUM_THREADS="${OMP_NUM_THREADS:-2}" GOMP_SPINCOUNT=20000
  export MALLOC_MMAP_THRESHOLD_=33554432 MALLOC_TRIM_THRESHOLD_=1000000000
  export DIFFUSERS_VERBOSITY=error TRANSFORMERS_VERBOSITY=error # they remark on the tiny model's own autoencoder
  training=(
    --resolution 128
    --rank 32
    --lora_layers attn.to_q,attn.to_k,attn.to_v,attn.to_out.0,ff.net.0.proj,ff.net.2,proj_mlp,proj_out,x_embedder
    --train_batch_size 4
    --max_sequence_length 16
    --crop_zoom 1-4
    --dataloader_num_workers 1
    --random_flip
    --learning_rate 4e-3
    --lr_scheduler cosine
    --lr_warmup_steps 10
    --max_train_steps 1400
    --start_noise 0
    --no-reference_tokens
    --train_sigmas 1
    --checkpointing_steps 700
    --checkpoints_total_limit 1
    --validation_steps 700
  )
  # Twice the noise and blur that the base model saw, all at once.
  damage=(--degradation_types "downsample,blur,noise" --lr_scale 2 --blur_radius 1.0 --noise_level 0.098)
  scoring=(--max_images 20 --token_shifts 2)
fi
[[ " $* " == *" --degradation_preset"* || " $* " == *" --lr_root"* ]] || # a preset brings its own, pairs need none
  training+=("${damage[@]}")
[[ -z "${HELDOUT_ROOT:-}" ]] || training+=(--heldout_root "$HELDOUT_ROOT")

"${LAUNCH[@]}" "$ROOT/train_deg_lora_flux_kontext.py" --pretrained_model_name_or_path "$MODEL_NAME" \
  --hr_root "$HR_ROOT" --output_dir "$OUTPUT_DIR" "${training[@]}" "$@"

if [[ -z "${HELDOUT_ROOT:-}" ]]; then
  echo "LoRA, model card and validation: $OUTPUT_DIR. With HELDOUT_ROOT=folder it would now be scored on photographs" \
    "that training never saw."
  exit
fi

# Scored as it was trained, whatever the arguments above changed.
trained="$("$PYTHON" - "$OUTPUT_DIR/args.json" <<'END'
import json, sys
args = json.load(open(sys.argv[1]))
prefixes = "degradation_", "lr_scale", "noise_", "gray_noise_", "blur_", "jpeg_", "downsample_", "upsample_", "damage_"
if args["heldout_lr_root"]:
    print(f"--degraded={args['heldout_lr_root']}", f"--upscale_kernel={args['upscale_kernel']}", sep="\n")
options = {k: v for k, v in args.items() if k.startswith(prefixes) and v is not None}  # None: as the preset has it
print(*(f"--{k}={v}" for k, v in options.items()), sep="\n")
END
)"
while IFS= read -r option; do
  scoring+=("$option")
done <<<"$trained"
"$PYTHON" "$ROOT/test_deg_lora_flux_kontext.py" --pretrained_model_name_or_path "$MODEL_NAME" --lora "$OUTPUT_DIR" \
  --clean "$HELDOUT_ROOT" --output "$OUTPUT_DIR" "${scoring[@]}" ${TEST_OPTIONS:-}

echo "
Done in $((SECONDS / 60)) min $((SECONDS % 60)) s. All of it lies in $OUTPUT_DIR:
  grid.png                           degraded, restored and clean photographs side by side
  metrics.json, scores.csv           the table above, and every image's scores
  pytorch_lora_weights.safetensors   the LoRA; README.md describes it"
