#!/usr/bin/env bash
# Some kernels of every form under compute-sanitizer: accesses out of bounds, and races in shared memory.
. "$(dirname "$0")/prelude.sh"

sanitized=("$PYTHON" tests/cuda/runbook/sanitized.py)
PARTS=${PARTS:-4} # side by side

if [ "$DRY_RUN" = 1 ]; then
    step 120 "cases" "${sanitized[@]}" memcheck "$OUT/sanitizer-memcheck.log" --dry-run
fi
for tool in memcheck racecheck; do
    for ((part = 0; part < PARTS; part++)); do
        background 560 "$tool, part $part of $PARTS" "${sanitized[@]}" $tool "$OUT/sanitizer-$tool-$part.log" --every "$PARTS" --from $part
    done
done
wait_all
finish
