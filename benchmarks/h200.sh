#!/usr/bin/env bash
# Measure every figure of the docs that needs a GPU: benchmarks/h200.sh
# It writes one JSON file for each run into benchmarks/results/, named after the card. It needs no weights. The
# int8 rows need torchao (pip install torchao). The committed files of an H200 took seven minutes; xl-512-plain,
# xl-256-scaling and the 8-bit rows are not among them yet.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python}
card=$("$python" -c 'import torch; print(torch.cuda.get_device_name().lower().replace(" ", "-"))')
folder=benchmarks/results
mkdir -p "$folder"

measure() { # NAME ARGUMENTS: one run of benchmark.py
    local name=$1
    shift
    "$python" benchmark.py --output "$folder/$card-$name.json" "$@"
}

methods=(fora:2 random:0.375)
for size in 256 512; do
    shared=(--model DiT-XL/2 --image-size "$size" --precision bf16 --methods "${methods[@]}")
    measure "xl-$size-plain" "${shared[@]}" --batch-size 1 8
    measure "xl-$size-compiled" "${shared[@]}" taylor-fora:2 --batch-size 1 8 --compile
done
# 64 trajectories are 128 rows under guidance: twice the published batch, whose 64 count both halves.
measure xl-256-train --model DiT-XL/2 --precision bf16 --batch-size 64 --num-sampling-steps 10 \
    --cfg-scale 1.5 --repeats 2 --train --compile \
    --cases update "update, backbone gradients" "update, compiled"
measure xl-256-train-20-steps --model DiT-XL/2 --precision bf16 --batch-size 8 --num-sampling-steps 20 \
    --cfg-scale 4 --repeats 2 --train --cases update end-to-end "end-to-end, kept" "end-to-end, search"
measure xl-256-scaling --model DiT-XL/2 --precision bf16 --compile --methods fora:2 \
    --batch-size 1 2 4 8 16 --num-sampling-steps 10 20 50
for kind in int8wo int8 fp8; do
    measure "xl-256-$kind" --model DiT-XL/2 --precision bf16 --compile --quantize "$kind" \
        --methods "${methods[@]}" --batch-size 1 8
done
