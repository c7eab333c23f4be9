#!/usr/bin/env bash
# Every generated kernel against float64, and models with them: what lets an architecture enter TESTED.
. "$(dirname "$0")/prelude.sh"

test=("$PYTHON" -m pytest -m gpu -q --tb=short -rs -p no:cacheprovider -p no:benchmark)  # not all have that plugin
parallel=()
if has xdist; then parallel=(-n 8); fi  # of models; the kernels have processes of their own

if [ "$DRY_RUN" = 1 ]; then
    step 300 "collected" "${test[@]}" --collect-only tests/test_gpu.py
fi
device 270 "kernels" "${test[@]}" --deadline 230 tests/test_gpu.py -k "float64 or hard_values or 32_bits"
device 290 "models" "${test[@]}" ${parallel[@]+"${parallel[@]}"} --deadline 240 tests/test_gpu.py \
    -k "not (float64 or hard_values or 32_bits)"
if grep -q "no time was left for it" "$LOG"; then failed+=("tests were left out, for want of time: run it again, it has compiled"); fi
if [ "$DRY_RUN" != 1 ] && [ ${#failed[@]} = 0 ]; then
    say "with 4_sanitizer.sh passed too, this architecture belongs into TESTED (normfx/lower/choice.py):" \
        "$("$PYTHON" -c 'import torch; print("sm_{}{}".format(*torch.cuda.get_device_capability()))')"
fi
finish
