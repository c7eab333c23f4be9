#!/usr/bin/env bash
# Some kernels of every form under compute-sanitizer: accesses out of bounds, and races in shared memory.
. "$(dirname "$0")/prelude.sh"

sanitized=("$PYTHON" tests/cuda/runbook/sanitized.py)

if [ "$DRY_RUN" = 1 ]; then
    step 120 "cases" "${sanitized[@]}" memcheck "$OUT/sanitizer-memcheck.log" --dry-run
fi
device 250 "memcheck" "${sanitized[@]}" memcheck "$OUT/sanitizer-memcheck.log"
device 300 "racecheck" "${sanitized[@]}" racecheck "$OUT/sanitizer-racecheck.log"
finish
