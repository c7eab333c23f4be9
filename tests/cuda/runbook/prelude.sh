# Sourced by the scripts next to it: arguments, results, a checkout that counts as installed, steps that end in time.
#
#     OUT          folder of the results, by default ./gpu-results
#     PYTHON       the interpreter that has torch, by default python3
#     DRY_RUN=1    or --dry-run: everything but the device's part
#     --compile    only compile what is to be timed, side by side, which other scripts may run next to
#     --measure    only measure, after --compile

set -uo pipefail
case "${1:-}" in
    "") ;;
    --dry-run) DRY_RUN=1 ;;
    --compile | --measure | --kernels | --models) PHASE=${1#--} ;;
    *) echo "usage: $0 [--dry-run | --compile | --measure | --kernels | --models]" >&2; exit 2 ;;
esac
PHASE=${PHASE:-} DRY_RUN=${DRY_RUN:-0} PYTHON=${PYTHON:-python3} NAME=$(basename "$0" .sh)
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/../../.." && pwd)
mkdir -p "${OUT:=gpu-results}"
OUT=$(cd "$OUT" && pwd)
LOG=$OUT/$NAME${PHASE:+-$PHASE}.log
: >"$LOG"
passed=() failed=()

# the checkout is imported as it is; metadata in a temporary folder name its version and its backend
SITE=$(mktemp -d)
trap 'rm -rf "$SITE"' EXIT
VERSION=$(sed -n 's/^version = "\(.*\)"/\1/p' "$ROOT/pyproject.toml")
mkdir "$SITE/normfx-$VERSION.dist-info"
printf 'Metadata-Version: 2.1\nName: normfx\nVersion: %s\n' "$VERSION" >"$SITE/normfx-$VERSION.dist-info/METADATA"
printf '[torch_dynamo_backends]\nnormfx = normfx.backend:normfx\n' >"$SITE/normfx-$VERSION.dist-info/entry_points.txt"
export PYTHONPATH="$SITE:$ROOT${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
unset TRITON_INTERPRET
cd "$ROOT" || exit 1

say() { echo "== $*" | tee -a "$LOG"; }

# step SECONDS WHAT COMMAND…: one part of the script, ended after so many seconds, its output in the log
step() {
    local limit=$1 what=$2 begin=$SECONDS status
    shift 2
    say "$what: $*"
    timeout --kill-after=10 "$limit" "$@" 2>&1 | tee -a "$LOG"
    status=${PIPESTATUS[0]}
    if [ "$status" = 0 ]; then passed+=("$what"); else failed+=("$what (exit status $status)"); fi
    say "$what: exit status $status after $((SECONDS - begin)) s"
}

# device SECONDS WHAT COMMAND…: a step that needs a device; a dry run only names it
device() {
    if [ "$DRY_RUN" = 1 ]; then say "dry run, not run: $2: timeout $1 ${*:3}"; else step "$@"; fi
}

# background SECONDS WHAT COMMAND…: a step that needs a device but not alone, begun now; `wait_all` waits for these
background() {
    if [ "$DRY_RUN" = 1 ]; then say "dry run, not run, in the background: $2: timeout $1 ${*:3}"; return; fi
    local limit=$1 what=$2 part=${LOG%.log}-${#begun[@]}.log
    shift 2
    say "begun: $what: $*"
    (
        begin=$SECONDS
        timeout --kill-after=10 "$limit" "$@"
        status=$?
        echo "exit status $status after $((SECONDS - begin)) s"
        exit $status
    ) >"$part" 2>&1 &
    begun+=("$! $part $what")
}
begun=()

# phase NAME: whether this part of the script is to be run
phase() { [ -z "$PHASE" ] || [ "$PHASE" = "$1" ]; }

# wait_all: waits for what was begun, says how each ended, and takes its output into the log
wait_all() {
    local each process part what status
    for each in ${begun[@]+"${begun[@]}"}; do
        read -r process part what <<<"$each"
        wait "$process"
        status=$?
        if [ "$status" = 0 ]; then passed+=("$what"); else failed+=("$what (exit status $status)"); fi
        say "$what:"
        tail -n "${LINES_SHOWN:-25}" "$part"
        cat "$part" >>"$LOG"
    done
    begun=()
}

# has MODULE: whether Python finds it
has() { "$PYTHON" -c "import importlib.util as u, sys; sys.exit(u.find_spec('$1') is None)"; }

# the last lines of every script, and its exit status
finish() {
    local line
    say "$NAME, after $SECONDS s: ${#passed[@]} passed, ${#failed[@]} failed; results in $OUT"
    for line in ${passed[@]+"${passed[@]}"}; do say "passed: $line"; done
    for line in ${failed[@]+"${failed[@]}"}; do say "FAILED: $line"; done
    if [ "$DRY_RUN" = 1 ]; then say "this was a dry run: nothing was shown about a device"; fi
    [ ${#failed[@]} = 0 ]
    exit
}

say "$NAME, $(date -u +%Y-%m-%dT%H:%M:%SZ), normfx $VERSION, commit $(git -C "$ROOT" rev-parse HEAD 2>/dev/null || echo unknown)"
if [ "$DRY_RUN" != 1 ]; then
    step 20 "a GPU" nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader
    if [ ${#failed[@]} != 0 ]; then finish; fi
fi
