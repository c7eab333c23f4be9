#!/usr/bin/env bash
# Models end to end, forward and a training step, also replayed from CUDA graphs; single inputs with mode="reduce-overhead".
. "$(dirname "$0")/prelude.sh"

bench=("$PYTHON" -m normfx.cli bench --device cuda --dtypes bfloat16)
many=(--models gpt2_small,vit_small --batches 64 --task forward,training --graphs
    --variants "inductor,normfx,normfx-triton" --output "$OUT/models")
one=(--models gpt2_small,vit_small --batches 1 --base inductor-reduce-overhead
    --variants "inductor,normfx,normfx-reduce-overhead,normfx-triton-reduce-overhead" --output "$OUT/models-reduce-overhead")

if [ "$DRY_RUN" = 1 ]; then
    step 300 "batches of 64" "${bench[@]}" "${many[@]}" --dry-run
    step 300 "single inputs" "${bench[@]}" "${one[@]}" --dry-run
fi
# no cell is begun after the minutes; one takes a minute or two, most of it compiling
device 380 "batches of 64" "${bench[@]}" "${many[@]}" --minutes 4
device 190 "single inputs" "${bench[@]}" "${one[@]}" --minutes 1
finish
