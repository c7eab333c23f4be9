#!/usr/bin/env bash
# The norm kernels against eager, Inductor and Liger, in time: events for the launch, replays for the kernels alone.
#     NORMS        of "wide folded few loops single", all by default
. "$(dirname "$0")/prelude.sh"

bench=("$PYTHON" -m normfx.cli bench kernels --rivals eager,inductor,liger)

# groups: a name, minutes, ops, passes, dtypes, shapes
groups() {
    echo wide 1.5 rms_norm,layer_norm forward,backward bfloat16 16384x4096,8192x8192,131072x128,4096x768,32768x1024,8192x768,12608x384
    echo folded 1 rms_norm_plain,add_rms_norm,add_layer_norm,add_rms_norm_plain,crms_norm forward,backward bfloat16 16384x4096,4096x768
    echo few 0.6 layer_norm,rms_norm backward bfloat16 512x768,1024x768,2048x768,1024x4096,2048x4096,4096x2048
    echo loops 0.4 layer_norm,add_layer_norm forward bfloat16 8192x2048,8192x4096,4096x5120
    echo single 0.4 layer_norm,rms_norm backward float32 4096x768,8192x768,16384x2048
}
asked() { [[ " ${NORMS:-wide folded few loops single} " == *" $1 "* ]]; }
# each PHASE: what is to be done with a group
each() {
    local name minutes ops passes dtypes shapes op task
    while read -r name minutes ops passes dtypes shapes; do
        asked "$name" || continue
        set -- "$1" --dtypes "$dtypes" --shapes "$shapes"
        case $1 in
            dry-run) step 60 "$name" "${bench[@]}" --ops "$ops" --passes "$passes" "${@:2}" --dry-run ;;
            measure)
                # no cell is begun after the minutes; one takes two seconds where everything is compiled
                device "$(python3 -c "print(int(60 * $minutes) + 20)")" "$name" "${bench[@]}" --ops "$ops" --passes "$passes" "${@:2}" \
                    --minutes "$minutes" --output "$OUT/kernels-$name"
                ;;
            compile)
                # a check compiles what is timed later, and finds what is wrong before
                for op in ${ops//,/ }; do
                    for task in ${passes//,/ }; do
                        background 220 "compiling $name: $op $task" "${bench[@]}" --check --ops "$op" --passes "$task" "${@:2}" \
                            --output "$OUT/check-$name-$op-$task"
                    done
                done
                ;;
        esac
    done < <(groups)
}

if [ "$DRY_RUN" = 1 ]; then each dry-run; fi
if phase compile; then
    each compile
    wait_all
fi
if phase measure; then each measure; fi
finish
