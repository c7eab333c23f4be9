#!/usr/bin/env bash
# Every generated kernel against float64, and models with them: what lets an architecture enter TESTED.
. "$(dirname "$0")/prelude.sh"

test=("$PYTHON" -m pytest -m gpu -q --tb=short -rs -p no:cacheprovider -p no:benchmark tests/kernels/test_gpu.py)  # not all have that plugin
side_by_side() { if has xdist; then echo "-n $1"; fi; }
kernels="float64 or hard_values or 32_bits"

if [ "$DRY_RUN" = 1 ]; then
    step 300 "collected" "${test[@]}" --collect-only
fi
if phase kernels; then
    background 420 "kernels" "${test[@]}" --deadline 380 $(side_by_side 3) -k "$kernels"
fi
if phase models; then
    # each of these would start as many compilers as there are cores
    TORCHINDUCTOR_COMPILE_THREADS=2 background 420 "models" "${test[@]}" --deadline 380 $(side_by_side 6) -k "not ($kernels)"
fi
wait_all
if grep -q "no time was left for it" "$LOG"; then failed+=("tests were left out, for want of time: run it again, it has compiled"); fi
if [ "$DRY_RUN" != 1 ] && [ ${#failed[@]} = 0 ]; then
    say "with 4_sanitizer.sh passed too, this architecture belongs into TESTED (normfx/lower/choice.py):" \
        "$("$PYTHON" -c 'import torch; print("sm_{}{}".format(*torch.cuda.get_device_capability()))')"
fi
finish
