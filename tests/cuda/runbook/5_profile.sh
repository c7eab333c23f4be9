#!/usr/bin/env bash
# One kernel under torch's profiler and Nsight Compute: LayerNorm backward, by its machine code short of bytes in flight.
. "$(dirname "$0")/prelude.sh"

call=("$PYTHON" tests/cuda/runbook/profiled.py --op layer_norm --task backward --shape 16384x4096)

if [ "$DRY_RUN" = 1 ]; then
    step 120 "the norm" "${call[@]}" --dry-run
fi
device 120 "torch's profiler" "${call[@]}" --trace "$OUT/profile.json"
if [ "$DRY_RUN" = 1 ] || command -v ncu >/dev/null; then
    # not the first launches; the clocks stay as they are
    device 200 "Nsight Compute" ncu --clock-control none --set detailed --kernel-name regex:backward --launch-skip 2 \
        --launch-count 1 --csv --log-file "$OUT/ncu.csv" "${call[@]}"
else
    say "ncu is not there"
fi
finish
