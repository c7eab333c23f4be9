#!/usr/bin/env bash
# Models end to end: as they are compiled by default, replayed from CUDA graphs, and with mode="reduce-overhead".
. "$(dirname "$0")/prelude.sh"

bench=("$PYTHON" -m normfx.cli bench --device cuda --dtypes bfloat16)
plain=(--models gpt2_small,vit_small --batches 64,1 --graphs --variants "inductor,normfx,normfx-triton" --output "$OUT/models")
reduced=(--models gpt2_small,vit_small --batches 1 --base inductor-reduce-overhead
    --variants "normfx-reduce-overhead,normfx-triton-reduce-overhead" --output "$OUT/models-reduce-overhead")
training=(--models gpt2_small --batches 32 --task training --variants "inductor,normfx,normfx-triton"
    --output "$OUT/models-training")

if [ "$DRY_RUN" = 1 ]; then
    step 300 "forward" "${bench[@]}" "${plain[@]}" --dry-run
    step 300 "reduce-overhead" "${bench[@]}" "${reduced[@]}" --dry-run
    step 300 "training" "${bench[@]}" "${training[@]}" --dry-run
fi
device 300 "forward" "${bench[@]}" "${plain[@]}" --minutes 3
device 130 "reduce-overhead" "${bench[@]}" "${reduced[@]}" --minutes 1
device 130 "training" "${bench[@]}" "${training[@]}" --minutes 1
finish
