#!/usr/bin/env bash
# All that a borrowed GPU machine should be asked, in one command:
#
#     bash tests/gpu/all.sh OUT [PART ...]        parts: tests training sampling emoji; all by default
#
# Not yet run as a whole, neither on a GPU nor as a rehearsal; `sampling` needs diffusers.
# Each part has its own time limit and writes OUT/PART.log at once, so that a run that is cut off still brings
# back what was done. Nothing is fetched. EMOJI names a folder with the emoji data set (drawn here if it is
# not given, which needs three packages); DEVICE=cpu and STEPS=2 rehearse it all without a GPU.
set -uo pipefail
cd "$(dirname "$0")/../.."
OUT=$1
shift
PARTS=${*:-tests training sampling emoji}
DEVICE=${DEVICE:-cuda}
PYTHON=${PYTHON:-python3}
STEPS=${STEPS:-}
export PYTHONUNBUFFERED=1 PYTHONPATH=$PWD TQDM_MININTERVAL=10
mkdir -p "$OUT"

part() {  # part NAME SECONDS COMMAND...: run it, at most so long, its output in OUT/NAME.log
    local name=$1 limit=$2 start=$SECONDS
    [[ " $PARTS " == *" $name "* ]] || return 0
    echo "=== $name: ${*:3}"
    timeout "$limit" "${@:3}" >"$OUT/$name.log" 2>&1
    echo "=== $name: status $?, $((SECONDS - start)) s; its end:"
    tail -n 25 "$OUT/$name.log" | tr '\r' '\n' | tail -n 25
}

emoji() {  # the whole of size emoji: train, then the weights in fp16, in files of at most 15 MB
    local few=()
    [[ -n $STEPS ]] && few=(--steps-clip "$STEPS" --steps-autoencoder "$STEPS" --steps-denoiser "$STEPS"
        --batch-clip 4 --batch-autoencoder 4 --batch-denoiser 4)
    "$PYTHON" -m ldm_minimal train --size emoji ${EMOJI:+--data "$EMOJI"} --compile --out "$OUT/run" \
        --captions 324 --save-every 60 "${few[@]}" $EMOJI_OPTIONS &&
        "$PYTHON" - "$OUT" <<'PYTHON'
import pathlib
import shutil
import sys

from ldm_minimal import CLIP, LatentDiffusion
from ldm_minimal.files import save_in_files_of

out = pathlib.Path(sys.argv[1])
for part, kind in (("model", LatentDiffusion), ("evaluator", CLIP)):
    save_in_files_of(15e6, kind.load(out / "run" / part), out / "emoji" / part)
for path in (out / "run").glob("*.*"):
    shutil.copy(path, out / "emoji")
PYTHON
}
export -f emoji
export OUT PYTHON STEPS EMOJI=${EMOJI:-} EMOJI_OPTIONS=${EMOJI_OPTIONS:-}

part tests 240 "$PYTHON" -m pytest -q -m gpu tests/gpu --durations=10
part training 240 "$PYTHON" tests/benchmarks/training.py --size emoji --device "$DEVICE" --no-diffusers
part sampling 180 "$PYTHON" tests/benchmarks/sampling.py --device "$DEVICE"
part emoji 570 bash -c emoji
echo "=== all parts in $SECONDS s"
