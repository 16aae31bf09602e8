"""A run that is killed, again and again, ends with the weights of a run that never was.

tests/test_trainer.py resumes each training by itself, in seconds.
"""

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
    command = [sys.executable, "-m", "ldm_minimal", "train", "--data", str(shapes)]
    command += ["--out", str(out), "--captions", "0", "--save-every", "0"]
    for training in ("clip", "autoencoder", "denoiser"):
        command += [f"--steps-{training}", "12", f"--batch-{training}", "4"]
    return subprocess.Popen(
        command,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(shapes, out):
    process = start(shapes, out)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors[-2000:]


def read_log(out):
    with open(out / "log.csv", newline="") as file:
        return list(csv.DictReader(file))


def weights_and_losses(out):
    weights = {}
    for path in sorted(out.rglob("*.safetensors")):
        weights[path.relative_to(out).as_posix()] = path.read_bytes()
    rows = read_log(out)
    for row in rows:
        del row["seconds"]
    return weights, rows


def seconds_of_training(out):
    """What the stages took, one after the other."""
    seconds = {row["stage"]: float(row["seconds"]) for row in read_log(out)}
    return sum(seconds.values())


def file_times(out):
    """When each file of a run's folder was last written; None before there is a folder."""
    if not out.exists():
        return None
    return {entry.name: entry.stat().st_mtime_ns for entry in os.scandir(out) if entry.is_file()}


def killed_at_random(shapes, out, chance, seconds):
    """Start the command, kill it up to so many seconds after it has begun to train.

    False if it ended before that.
    """
    before, process = file_times(out), start(shapes, out)
    while process.poll() is None and file_times(out) == before:
        time.sleep(0.01)  # python and torch are still being loaded
    try:
        process.wait(timeout=chance.uniform(0, seconds))
        return False
    except subprocess.TimeoutExpired:
        process.kill()
        return True
    finally:
        process.communicate()


@pytest.mark.slow
def test_killed_twenty_times_the_weights_are_bit_identical(shapes, tmp_path):
    finish(shapes, tmp_path / "whole")
    expected_weights, expected_log = weights_and_losses(tmp_path / "whole")
    assert set(expected_weights) == {"model/model.safetensors", "evaluator/model.safetensors"}
    seconds = seconds_of_training(tmp_path / "whole") / 2
    chance = random.Random(0)
    kills, runs = 0, 0
    stages_done = set()  # at a kill
    while kills < KILLS:
        out = tmp_path / f"killed{runs}"
        runs += 1
        while kills < KILLS:
            if not killed_at_random(shapes, out, chance, seconds):
                seconds *= 0.7  # this machine is quicker than it was
                break  # a new run takes the remaining kills
            kills += 1
            stages_done.add(tuple(json.loads((out / "run.json").read_text())["done"]))
        finish(shapes, out)
        weights, log = weights_and_losses(out)
        assert weights == expected_weights, f"the weights differ after {kills} kills"
        assert log == expected_log
        assert not list(out.rglob("*partial*")), "something half-written is left"
        assert not (out / "state").exists()
    print(f"{kills} kills over {runs} runs, in the stages after {sorted(stages_done, key=len)}")
    assert len(stages_done) >= 2  # the kills fell into different stages


@pytest.mark.slow
def test_the_same_command_on_a_finished_run_changes_nothing(shapes, tmp_path):
    out = tmp_path / "run"
    finish(shapes, out)
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*.safetensors")}
    assert len(before) == 2
    finish(shapes, out)
    assert before == {path: path.stat().st_mtime_ns for path in out.rglob("*.safetensors")}


@pytest.mark.slow
def test_ctrl_c_saves_and_says_how_to_go_on(shapes, tmp_path):
    process = start(shapes, tmp_path / "run")
    while not (tmp_path / "run" / "state").exists() and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "goes on with the same command" in errors
    assert "Traceback" not in errors
    assert (tmp_path / "run" / "state" / "step.json").is_file()
