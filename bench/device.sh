#!/usr/bin/env bash
# What only a GPU can tell, in eight minutes at most, on a machine with one GPU and no network:
#
#   bench/device.sh [FOLDER]     default: bench/results/device
#   bench/device.sh --dry [FOLDER]    what would run, with its limits
#
# The tests marked `gpu`; rates; ResNet18's blocks of n = 8,192 and 16,384 by hand and by stiffcore; all square blocks of
# ResNet18 and ResNet50; tensor slices; a division of k = 4,096. Each step has a limit of its own and is ended with all
# that it started; what it has written by then is kept, and the next one begins. FOLDER gets summary.json (each step: how
# it ended, its seconds), a JSON file of each benchmark, and log.txt: eight files, none over 16 MB.
# PYTHON names the interpreter; LIMIT the seconds in all.
set -u
dry=
if [ "${1:-}" = --dry ]; then dry=yes; shift; fi
here=$(cd "$(dirname "$0")" && pwd)
mkdir -p "${1:-$here/results/device}" || exit 1
out=$(cd "${1:-$here/results/device}" && pwd)
cd "$here/.." || exit 1
python=${PYTHON:-python}
all=${LIMIT:-480}
most=$((16 * 1000 * 1000))
started=$SECONDS
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export PYTHONUNBUFFERED=1 PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
steps=()
: >"$out/log.txt"

summary() {
    local joined
    joined=$(printf ',\n  %s' "${steps[@]}")
    printf '{\n "date": "%s",\n "commit": "%s",\n "seconds": %d,\n "limit": %d,\n "steps": [%s\n ]\n}\n' "$(date -u +%FT%TZ)" \
        "$(git rev-parse HEAD 2>/dev/null || echo unknown)" $((SECONDS - started)) "$all" "${joined:1}" >"$out/summary.json"
}

# step NAME SECONDS ARGUMENTS...: python with these arguments
step() {
    local name=$1 limit=$2 left state code=0 begun=$SECONDS made="$here/results/$1-cuda.json" log="$work/log" counts=
    shift 2
    left=$((all - SECONDS + started - 8))  # 8: to end a step that does not want to, and to write
    ((limit > left)) && limit=$left
    if [ -n "$dry" ]; then
        echo "$name: at most $limit s: $python $*"
        return
    fi
    if ((limit < 5)); then
        state="left out"
    else
        touch "$work/before"
        timeout -k 5 "$limit" "$python" "$@" >"$log" 2>&1 </dev/null
        code=$?
        case $code in
            0) state=done ;;
            124 | 137) state="out of time" ;;
            *) state=failed ;;
        esac
        { printf '\n==== %s: %s (%d)\n' "$name" "$state" "$code"; tail -c 1000000 "$log"; } >>"$out/log.txt"
        if [ "$made" -nt "$work/before" ]; then
            if (($(wc -c <"$made") < most)); then cp "$made" "$out/$name.json"; else state="$state, too large"; fi
        fi
        if [ "$name" = tests ]; then
            counts=$(printf ', "passed": %d, "failed": %d, "skipped": %d' \
                $(for what in PASSED 'FAILED\|ERROR' SKIPPED; do grep -c "^\[gw[0-9]*\].* \($what\) " "$log"; done))
        fi
    fi
    steps+=("$(printf '{"step": "%s", "state": "%s", "code": %d, "seconds": %d, "limit": %d%s}' \
        "$name" "$state" "$code" $((SECONDS - begun)) "$limit" "$counts")")
    echo "$name: $state, $((SECONDS - begun)) s${counts//\"/}"
    summary
}

step rates 50 bench/rates.py --device cuda
step tests 130 -m pytest -m gpu -v -n 4 -p no:cacheprovider
step by_hand 90 bench/by_hand.py --device cuda --blocks layer2.1,layer1.1
step cost 100 bench/cost.py --device cuda --networks resnet18,resnet50
step slices 40 bench/slices.py --device cuda --quick
step divide_device 50 bench/divide_device.py --device cuda
for part in "${steps[@]:-}"; do
    case $part in *'"state": "done"'* | '') ;; *) exit 1 ;; esac
done
