"""How much does `train` depend on the seed and on the number of threads? A table.

    python tests/benchmarks/seeds.py                       # five seeds with two threads
    python tests/benchmarks/seeds.py --threads 1 --jobs 2  # with one thread each, two at once

Each run is `python -m ldm_minimal train` as a reader types it, into runs/seeds/THREADS-SEED; then
its model is scored on 512 held-out captions at guidance 3. A stopped run goes on where it was, and
a finished one is read, not repeated. Further options go to `train` (after `--`).
"""

import argparse
import csv
import json
import os
import pathlib
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

GUIDANCE = "3"
COLUMNS = (
    "all",
    "seen pairs",
    "composition",
    "left first",
    "right first",
    "count",
    "size",
    "texture",
    "colour",
    "shape",
    "relation",
)


def train_and_evaluate(out, seed, threads, captions, options):
    """Train one seed, score it, and return its scores; what is there already is not repeated."""
    result = out / "seed.json"
    if result.is_file():
        return json.loads(result.read_text())
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    program = [sys.executable, "-m", "ldm_minimal"]
    out.mkdir(parents=True, exist_ok=True)
    with open(out.with_suffix(".log"), "a") as log:
        command = [*program, "train", "--seed", str(seed), "--out", str(out), "--captions", "0"]
        subprocess.run([*command, *options], env=environment, stdout=log, stderr=log, check=True)
        command = [*program, "evaluate", "--model", str(out), "--captions", str(captions)]
        command += ["--guidance", GUIDANCE, "--json"]
        done = subprocess.run(
            command, env=environment, stdout=subprocess.PIPE, stderr=log, check=True
        )
    scores = json.loads(done.stdout)
    with open(out / "log.csv", newline="") as file:
        log = list(csv.DictReader(file))
    scores["minutes"] = minutes_of(log)
    scores["discriminator lives"] = share_of_a_living_discriminator(log)
    result.write_text(json.dumps(scores))
    return scores


def minutes_of(log):
    """What the trainings took, also if the run was stopped and went on."""
    last = {row["stage"]: float(row["seconds"]) for row in log}
    return sum(last.values()) / 60


def share_of_a_living_discriminator(log):
    """Of the logged steps since it joined, those in which its loss lies between 0.4 and 0.9."""
    losses = [float(row["discriminator"]) for row in log if row["discriminator"]]
    return sum(0.4 <= loss <= 0.9 for loss in losses) / len(losses)


def row_of(scores):
    """The figures of a run's line in the table."""
    accuracy = scores["guidance"][GUIDANCE]["accuracy"]
    row = [accuracy[name] for name in COLUMNS]
    row += [scores["ceiling"]["all"], scores["discriminator lives"]]
    return [*row, scores["psnr"], scores["minutes"]]


def main():
    arguments = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    arguments.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    arguments.add_argument("--threads", type=int, default=2, help="of each run (default 2)")
    arguments.add_argument("--jobs", type=int, default=1, help="runs at once (default 1)")
    arguments.add_argument("--captions", type=int, default=512)
    arguments.add_argument("--out", type=pathlib.Path, default=pathlib.Path("runs/seeds"))
    arguments.add_argument("options", nargs="*", help="of train, after --")
    given = arguments.parse_args()
    with ThreadPoolExecutor(given.jobs) as pool:
        futures = []
        for seed in given.seeds:
            out = given.out / f"{given.threads}-{seed}"
            arguments_of_run = (out, seed, given.threads, given.captions, given.options)
            futures.append(pool.submit(train_and_evaluate, *arguments_of_run))
        rows = []
        names = [*COLUMNS, "ceiling", "discr. lives", "PSNR", "minutes"]
        print("seed     " + "".join(f"{name:>13}" for name in names))
        for seed, future in zip(given.seeds, futures, strict=True):
            rows.append(row_of(future.result()))
            print(f"{seed:<9}" + cells(rows[-1]), flush=True)
    for label, choose in (("lowest", min), ("median", statistics.median), ("highest", max)):
        print(f"{label:<9}" + cells([choose(column) for column in zip(*rows)]))


def cells(row):
    *shares, psnr, minutes = row
    return "".join(f"{share:>13.1%}" for share in shares) + f"{psnr:>10.2f} dB{minutes:>13.1f}"


if __name__ == "__main__":
    main()
