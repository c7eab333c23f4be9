#!/usr/bin/env bash
# A little of each step, side by side: in three minutes one knows what does not work on this machine.
. "$(dirname "$0")/prelude.sh"

# each of these would start as many compilers as there are cores
export TORCHINDUCTOR_COMPILE_THREADS=2
test=("$PYTHON" -m pytest -m gpu -q --tb=short -rs -p no:cacheprovider -p no:benchmark --deadline 110 tests/kernels/test_gpu.py)
parallel=()
if has xdist; then parallel=(-n 6); fi
bench=("$PYTHON" -m normfx.cli bench)
norms=(kernels --ops layer_norm,add_rms_norm --shapes 4096x768 --rounds 3 --output "$OUT/first-kernels")
models=(--device cuda --dtypes bfloat16 --models vit_small --batches 8 --task forward,training --graphs --rounds 3
    --variants "inductor,normfx,normfx-cached,normfx-triton,normfx-reduce-overhead" --output "$OUT/first-models")
profiled=("$PYTHON" tests/cuda/runbook/profiled.py --op layer_norm --task backward --shape 16384x4096)

if [ "$DRY_RUN" = 1 ]; then
    step 120 "norms" "${bench[@]}" "${norms[@]}" --dry-run
    step 300 "models" "${bench[@]}" "${models[@]}" --dry-run
fi
background 150 "kernels" "${test[@]}" -k "hard_values or 32_bits or 768-bfloat16 or 4096-bfloat16 or 32768-bfloat16"
background 150 "models and kept folds" "${test[@]}" ${parallel[@]+"${parallel[@]}"} -k "not (float64 or hard_values or 32_bits)"
background 150 "times of norms" "${bench[@]}" "${norms[@]}"
background 150 "times of models" "${bench[@]}" "${models[@]}"
background 150 "memcheck" "$PYTHON" tests/cuda/runbook/sanitized.py memcheck "$OUT/first-memcheck.log" --every 9
background 150 "profile" "${profiled[@]}" --trace "$OUT/first-profile.json"
background 150 "counters" ncu --clock-control none --set detailed --kernel-name regex:backward --launch-skip 2 \
    --launch-count 1 --csv --log-file "$OUT/first-ncu.csv" "${profiled[@]}"
wait_all
finish
