#!/usr/bin/env bash
# The norm kernels against eager and Inductor, in time: events for the launch, replays for the kernels alone.
. "$(dirname "$0")/prelude.sh"

bench=("$PYTHON" -m normfx.cli bench kernels --rivals eager,inductor)
wide=(--ops rms_norm,layer_norm --shapes "16384x4096,8192x8192,131072x128,4096x768,32768x1024" --output "$OUT/kernels")
folded=(--ops rms_norm_plain,add_rms_norm,add_rms_norm_plain,crms_norm --shapes "16384x4096,4096x768"
    --output "$OUT/kernels-folded")

if [ "$DRY_RUN" = 1 ]; then
    step 120 "norms" "${bench[@]}" "${wide[@]}" --dry-run
    step 120 "folded norms" "${bench[@]}" "${folded[@]}" --dry-run
fi
# no cell is begun after the minutes; one takes half a minute
device 320 "norms" "${bench[@]}" "${wide[@]}" --minutes 4.5
device 240 "folded norms" "${bench[@]}" "${folded[@]}" --minutes 3
finish
