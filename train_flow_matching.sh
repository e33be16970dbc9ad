#!/usr/bin/env bash
# Trains a restoration LoRA as flow matching from the degraded to the clean photograph (--start_noise 0), in the 17
# aspect ratios of Kontext:
#
#   MODEL_NAME=/path/to/FLUX.1-Kontext-dev HR_ROOT=photos [HELDOUT_ROOT=heldout] bash train_flow_matching.sh
#
# Arguments go to the training script and win over what stands here.
#   OUTPUT_DIR       folder for all that is written
#   PERCEPTUAL       vgg (the default) or lpips, which need a weight file, gradient, or none
#   NUM_PROCESSES    training processes, one a GPU
#   KONTEXT_PYTHON   Python of an environment of your own; nothing is installed then
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/scripts/setup_env.sh"

usage="MODEL_NAME=/path/to/FLUX.1-Kontext-dev HR_ROOT=photos bash $0"
[[ -n "${MODEL_NAME:-}" ]] || die "MODEL_NAME is not set; name the model's folder: $usage"
[[ -d "${HR_ROOT:-}" ]] || die "HR_ROOT=${HR_ROOT:-}: no such folder; name your folder of clean photographs: $usage"
options=(--hr_root "$HR_ROOT")
[[ " $* " == *" --degradation_preset"* || " $* " == *" --lr_root"* ]] || # a preset brings its own, pairs need none
  options+=(--degradation_types downsample,noise,blur,jpeg --noise_level 0.02 --blur_radius 1.5 --jpeg_quality 85)
[[ -z "${HELDOUT_ROOT:-}" ]] || options+=(--heldout_root "$HELDOUT_ROOT")
[[ "${PERCEPTUAL:=vgg}" == none ]] || options+=(--perceptual_loss "$PERCEPTUAL")

exec "${LAUNCH[@]}" "$ROOT/train_deg_lora_flux_kontext.py" \
  --pretrained_model_name_or_path "$MODEL_NAME" \
  --output_dir "${OUTPUT_DIR:-$ROOT/outputs/flow-matching-$(date +%Y%m%d-%H%M%S)}" \
  --mixed_precision bf16 \
  --start_noise 0 \
  --no-reference_tokens \
  --weighting_scheme uniform \
  --guidance_scale 1.5 \
  --rank 16 \
  --use_bucket_sampler \
  --resolution 1024 \
  --train_batch_size 1 \
  --gradient_accumulation_steps 4 \
  --gradient_checkpointing \
  --learning_rate 1e-4 \
  --use_8bit_adam \
  --lr_scheduler cosine \
  --lr_warmup_steps 100 \
  --max_train_steps 3000 \
  --checkpointing_steps 500 \
  --validation_epochs 5 \
  --seed 42 \
  --dataloader_num_workers 4 \
  "${options[@]}" "$@"
