#!/usr/bin/env bash
# Models end to end, forward and a training step, also replayed from CUDA graphs; single inputs with mode="reduce-overhead".
#     TASK         of "training forward one", all by default
#     MODELS       models and the inputs in a batch, one pair a line
#     TRAINED      variants of a training step
. "$(dirname "$0")/prelude.sh"
export PYTHONPATH="$ROOT/tests/cuda/runbook:$PYTHONPATH"

bench=("$PYTHON" -m normfx.cli bench --device cuda --dtypes bfloat16)
trained=(--task training --graphs --variants "${TRAINED:-inductor,normfx,normfx-triton,normfx-live}")
called=(--task forward --graphs --variants "inductor,normfx,normfx-triton,normfx-cached")
one=(--models gpt2_small,vit_small --batches 1 --base inductor-reduce-overhead
    --variants "inductor,normfx,normfx-reduce-overhead,normfx-cached-reduce-overhead")

batches() { echo "${MODELS:-$'gpt2_small 64\nvit_small 64\nwide:gpt2 8'}"; }
TASK=${TASK:-training forward one}
asked() { [[ " $TASK " == *" $1 "* ]]; }

if [ "$DRY_RUN" = 1 ]; then
    step 300 "single inputs" "${bench[@]}" "${one[@]}" --output "$OUT/dry-run" --dry-run
fi
if phase compile; then
    while read -r model batch; do
        size=(--models "$model" --batches "$batch" --rounds 2)
        if asked training; then background 220 "compiling $model, training" "${bench[@]}" "${size[@]}" "${trained[@]}" --output "$OUT/check-$model-t"; fi
        if asked forward; then background 220 "compiling $model, forward" "${bench[@]}" "${size[@]}" "${called[@]}" --output "$OUT/check-$model-f"; fi
    done < <(batches)
    if asked one; then background 220 "compiling for single inputs" "${bench[@]}" "${one[@]}" --rounds 2 --output "$OUT/check-one"; fi
    wait_all
fi
if phase measure; then
    while read -r model batch; do
        size=(--models "$model" --batches "$batch")
        if asked training; then device 55 "$model, training" "${bench[@]}" "${size[@]}" "${trained[@]}" --output "$OUT/$model-training"; fi
        if asked forward; then device 45 "$model, forward" "${bench[@]}" "${size[@]}" "${called[@]}" --output "$OUT/$model-forward"; fi
    done < <(batches)
    if asked one; then device 50 "single inputs" "${bench[@]}" "${one[@]}" --output "$OUT/one"; fi
fi
finish
