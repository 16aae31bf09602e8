#!/usr/bin/env bash
# All that a borrowed GPU machine should be asked, in one command:
#
#     bash tests/gpu/all.sh OUT [PART ...]        parts: tests check chapters training sampling emoji; all by default
#
# Each part has its own time limit and writes OUT/PART.log at once, so that a run that is cut off still brings
# back what was done. Nothing is fetched. `sampling` and `check` need diffusers, `chapters` needs nbval, and `emoji` draws its data
# set, for which it needs three packages, unless EMOJI names a folder that has it. DEVICE=cpu and STEPS=2 rehearse it all without a GPU.
set -uo pipefail
cd "$(dirname "$0")/../.."
OUT=$1
shift
PARTS=${*:-tests check chapters training sampling emoji}
DEVICE=${DEVICE:-cuda}
PYTHON=${PYTHON:-python3}
STEPS=${STEPS:-}
export PYTHONUNBUFFERED=1 PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} TQDM_MININTERVAL=10
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
        --batch-clip 4 --batch-autoencoder 4 --batch-denoiser 4 --captions 4)
    "$PYTHON" -m ldm_minimal train --size emoji ${EMOJI:+--data "$EMOJI"} --out "$OUT/run" \
        --captions 200 --save-every 60 "${few[@]}" $EMOJI_OPTIONS &&
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

NBVAL="--nbval-lax --nbval-current-env --nbval-cell-timeout 300"
SIDE_BY_SIDE="--numprocesses ${PROCESSES:-8} --dist loadfile"
[[ $DEVICE == cpu ]] && export LDM_REHEARSE=1
part tests 200 "$PYTHON" -m pytest -v --tb short -m gpu tests/gpu --numprocesses 4 --durations 10
part check 150 env OMP_NUM_THREADS=1 "$PYTHON" -m pytest -q $SIDE_BY_SIDE -m "not slow and not gpu" tests
part chapters 300 env OMP_NUM_THREADS=2 "$PYTHON" -m pytest -q $SIDE_BY_SIDE $NBVAL chapters
part training 200 "$PYTHON" tests/benchmarks/training.py --size emoji --device "$DEVICE" --no-diffusers \
    ${STEPS:+--steps $STEPS --batch 4}
part sampling 180 "$PYTHON" tests/benchmarks/sampling.py --device "$DEVICE" \
    ${STEPS:+--images --width 32 --side 64 --steps $STEPS --repeats 1}
part emoji 590 bash -c emoji
echo "=== all parts in $SECONDS s"
