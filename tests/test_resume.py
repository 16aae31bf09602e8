"""A run that is killed, again and again, ends with the weights of a run that never was."""

import csv
import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest
from conftest import ROOT, prepare_module

KILLS = 20


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    path = tmp_path_factory.mktemp("resume") / "shapes"
    prepare_module().prepare(path, 32, 100, seed=0)
    return path


def start(shapes, out):
    """The command, as a user types it; it saves its state after every step."""
    small = [f"--{what}-{stage}={value}" for stage in ("clip", "autoencoder", "denoiser")
             for what, value in (("steps", 12), ("batch", 4))]
    command = [sys.executable, "-m", "ldm_minimal", "train", "--data", str(shapes), "--out", str(out), "--captions", "0",
               "--save-every", "0", *small]
    return subprocess.Popen(command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, stderr=subprocess.PIPE,
                            stdout=subprocess.DEVNULL, text=True)


def finish(shapes, out):
    process = start(shapes, out)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors[-2000:]


def result(out):
    with open(out / "log.csv", newline="") as file:
        log = [{name: value for name, value in row.items() if name != "seconds"} for row in csv.DictReader(file)]
    return {str(path.relative_to(out)): path.read_bytes() for path in sorted(out.rglob("*.safetensors"))}, log


def signs_of_life(out):
    return {entry.name: entry.stat().st_mtime_ns for entry in os.scandir(out) if entry.is_file()} if out.exists() else None


def killed_at_random(shapes, out, chance, work):
    """Start the command and kill it up to `work` seconds after it has begun to train; False if it ended before that."""
    before, process = signs_of_life(out), start(shapes, out)
    while process.poll() is None and signs_of_life(out) == before:
        time.sleep(0.01)  # python and torch are still being loaded
    try:
        process.wait(timeout=chance.uniform(0, work))
        return False
    except subprocess.TimeoutExpired:
        process.kill()
        return True
    finally:
        process.communicate()


@pytest.mark.slow
def test_killed_twenty_times_the_weights_are_bit_identical(shapes, tmp_path):
    finish(shapes, tmp_path / "whole")
    whole, whole_log = result(tmp_path / "whole")
    assert set(whole) == {"model/model.safetensors", "judge/model.safetensors"}
    with open(tmp_path / "whole" / "log.csv", newline="") as file:
        work = sum({row["stage"]: float(row["seconds"]) for row in csv.DictReader(file)}.values())
    chance, kills, runs, progress = random.Random(0), 0, 0, set()
    while kills < KILLS:
        out, runs = tmp_path / f"killed{runs}", runs + 1
        while kills < KILLS:
            if not killed_at_random(shapes, out, chance, work / 2):
                work *= 0.7  # this machine is quicker than it was; a new run takes the remaining kills
                break
            kills += 1
            progress.add(tuple(json.loads((out / "run.json").read_text())["done"]))
        finish(shapes, out)
        killed, log = result(out)
        assert killed == whole, f"the weights differ after {kills} kills"
        assert log == whole_log
        assert not list(out.rglob("*partial*")), "something half-written is left"
    print(f"{kills} kills over {runs} runs, in the stages after {sorted(progress, key=len)}")
    assert len(progress) >= 2  # the kills fell into different stages


def test_the_same_command_on_a_finished_run_changes_nothing(shapes, tmp_path):
    out = tmp_path / "run"
    finish(shapes, out)
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*.safetensors")}
    finish(shapes, out)
    assert before == {path: path.stat().st_mtime_ns for path in out.rglob("*.safetensors")}


def test_ctrl_c_saves_and_says_how_to_go_on(shapes, tmp_path):
    process = start(shapes, tmp_path / "run")
    while not (tmp_path / "run" / "resume.pt").exists() and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "goes on with the same command" in errors and "Traceback" not in errors
