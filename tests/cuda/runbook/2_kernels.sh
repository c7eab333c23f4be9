#!/usr/bin/env bash
# The norm kernels against eager, Inductor and Liger, in time: events for the launch, replays for the kernels alone.
. "$(dirname "$0")/prelude.sh"

bench=("$PYTHON" -m normfx.cli bench kernels --rivals eager,inductor,liger)
wide="16384x4096,8192x8192,131072x128,4096x768,32768x1024,8192x768,12608x384"
folded="16384x4096,4096x768"

if [ "$DRY_RUN" = 1 ]; then
    step 120 "norms" "${bench[@]}" --ops rms_norm,layer_norm --shapes "$wide" --dry-run
fi
if phase compile; then
    # a check compiles what is timed later, and finds what is wrong before
    for op in rms_norm layer_norm; do
        for task in forward backward; do
            beside 220 "compiling $op $task" "${bench[@]}" --check --ops $op --passes $task --shapes "$wide" --output "$OUT/check-$op-$task"
        done
    done
    for op in rms_norm_plain add_rms_norm add_layer_norm add_rms_norm_plain crms_norm; do
        beside 220 "compiling $op" "${bench[@]}" --check --ops $op --shapes "$folded" --output "$OUT/check-$op"
    done
    together
fi
if phase measure; then
    # no cell is begun after the minutes; one takes two seconds where everything is compiled
    device 150 "norms" "${bench[@]}" --ops rms_norm,layer_norm --shapes "$wide" --output "$OUT/kernels" --minutes 1.5
    device 120 "folded norms" "${bench[@]}" --ops rms_norm_plain,add_rms_norm,add_layer_norm,add_rms_norm_plain,crms_norm \
        --shapes "$folded" --output "$OUT/kernels-folded" --minutes 1
fi
finish
