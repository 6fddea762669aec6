#!/usr/bin/env bash
# All that a short loan of a GPU is good for, in order of worth; what is finished is kept:
#     benchmarks/gpu_session.sh OUTPUT [SECONDS [CAMVID WEIGHTS]]
# 1. the tests for it; 2. the training step against a plain loop, with every method and a profile, at the
# size of the Cityscapes recipes; 3. the same for small networks at CamVid's size; 4. eight students under one
# teacher against one by one; 5. with CamVid and a folder of ImageNet weights: as many of its trainings
# as fit. Nothing is begun after SECONDS (840). Called again with the same OUTPUT, step 5 goes on where it stopped.
set -uo pipefail
here="$(cd "$(dirname "$0")" && pwd)"
out="$(mkdir -p "${1:?folder for the results}" && cd "$1" && pwd)"
limit="${2:-840}" camvid="${3:-}" weights="${4:-}"
[ -n "$camvid" ] && camvid="$(cd "$camvid" && pwd)"
[ -n "$weights" ] && weights="$(cd "$weights" && pwd)"
cd "$here/.."
if [ -z "${PYTHON:-}" ]; then
    PYTHON=python3
    if [ -x .venv/bin/python ]; then PYTHON=.venv/bin/python; fi
fi
export PYTHON PYTHONPATH="$PWD/src${PYTHONPATH:+:$PYTHONPATH}"
left() { echo $((limit - SECONDS)); }
step() { # NAME NEEDED-SECONDS COMMAND...
    local name="$1" needed="$2"
    shift 2
    if [ "$(left)" -lt "$needed" ]; then
        echo "-- $name: not begun, $(left) s are left"
        return
    fi
    echo "-- $name"
    timeout "$(left)" "$@" 2>&1 | tee "$out/$name.txt" | tail -40
    echo "-- $name: status ${PIPESTATUS[0]}, $(left) s are left"
}
step check 60 bash benchmarks/gpu_check.sh -q
step step_large 90 "$PYTHON" benchmarks/step.py --methods all --profile --output "$out"
step step_small 60 "$PYTHON" benchmarks/step.py --size 360 360 --output "$out" \
    --teacher deeplabv3_tf_efficientnet_lite2 --student deeplabv3_mobilenetv2_100
step step_compiled 120 "$PYTHON" benchmarks/step.py --compile --output "$out/compiled"
step shared_teacher 60 "$PYTHON" benchmarks/shared_teacher.py --iterations 20 --output "$out"
if [ -n "$camvid" ] && [ -n "$weights" ] && [ "$(left)" -gt 60 ]; then
    step camvid 60 "$PYTHON" benchmarks/camvid.py --data "$camvid" --weights "$weights" \
        --output "$out/camvid" --limit-s "$(($(left) - 20))"
    "$PYTHON" benchmarks/camvid.py --output "$out/camvid" --table | tee "$out/camvid_table.md"
fi
