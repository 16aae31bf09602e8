"""A data set's folder appears whole or not at all, however many processes want it and die."""

import json
import signal
import subprocess
import sys
import time

import pytest

from data_sets import SCRIPTS, digest, lines, load, needs_emoji, run, start


@pytest.fixture(params=["shapes", "emoji"])
def dataset(request):
    if request.param == "emoji":
        needs_emoji()
    return request.param


@pytest.fixture
def script(dataset):
    return SCRIPTS[dataset]


@pytest.fixture
def prepare(dataset):
    return load(dataset)


@pytest.fixture
def out(tmp_path):
    return tmp_path / "home" / "data"


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def wait_until(true, seconds=60):
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)


def some_images(out):
    """Whether a drawing of `out` is under way."""
    return len(list(out.parent.glob("data.partial*/train/*.png"))) > 10


# ---- several processes at once ----


def test_of_four_processes_one_draws_and_all_succeed(script, out, tmp_path):
    """As four chapters on a fresh clone."""
    options = ("--size", 16, "--count", 100)
    processes = [start(script, out, *options) for _ in range(4)]
    answers = [process.communicate(timeout=300) for process in processes]
    assert [process.returncode for process in processes] == [0] * 4, answers
    assert sorted("already" in said for said, _ in answers) == [False, True, True, True]
    assert names(out.parent) == ["data"]
    assert run(script, tmp_path / "alone", *options)[0] == 0
    assert digest(out) == digest(tmp_path / "alone")


def test_who_waits_says_so_once_and_goes_on_when_the_data_are_there(out):
    first = start(SCRIPTS["shapes"], out, "--count", 2000)
    wait_until(lambda: some_images(out))
    first.send_signal(signal.SIGSTOP)
    second = start(SCRIPTS["shapes"], out, "--count", 2000)
    assert second.stderr.readline() == f"waiting for another process, which draws {out}\n"
    first.send_signal(signal.SIGCONT)
    assert second.communicate(timeout=300) == (f"{out} already holds this data set\n", "")
    first.communicate(timeout=60)
    assert first.returncode == second.returncode == 0


def test_who_waits_takes_over_when_the_other_is_killed(out):
    first = start(SCRIPTS["shapes"], out)
    wait_until(lambda: some_images(out))
    second = start(SCRIPTS["shapes"], out, "--count", 20)
    assert "waiting" in second.stderr.readline()
    first.kill()
    first.communicate(timeout=60)
    second.communicate(timeout=60)
    assert second.returncode == 0 and names(out.parent) == ["data"]
    assert len(lines(out, "train")) == 18


NO_LOCKS = """
import errno, fcntl, runpy, sys

def flock(*_):
    raise OSError(errno.ENOSYS, "Function not implemented")

fcntl.flock = flock
script = sys.argv.pop(1)
runpy.run_path(script, run_name="__main__")
"""


def test_without_locks_all_draw_and_the_first_wins(out, tmp_path):
    """On Lustre and some NFS: right all the same, though slower."""
    options = ["--size", "16", "--count", "100"]
    command = [sys.executable, "-c", NO_LOCKS, SCRIPTS["shapes"], "--out", out, *options]
    processes = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for _ in range(3)]
    complaints = [process.communicate(timeout=300)[1] for process in processes]
    assert [process.returncode for process in processes] == [0] * 3, complaints
    assert names(out.parent) == ["data"]
    run(SCRIPTS["shapes"], tmp_path / "alone", *options)
    assert digest(out) == digest(tmp_path / "alone")


class FakeMsvcrt:
    """What Windows has in place of fcntl: locking refuses while another process has the lock."""

    LK_NBLCK = 2

    def __init__(self, refusals):
        self.refusals = refusals

    def locking(self, file, mode, size):
        assert (mode, size) == (self.LK_NBLCK, 1)
        if self.refusals:
            self.refusals -= 1
            raise PermissionError(13, "Permission denied")


def test_windows_locks_are_waited_for(prepare, out, monkeypatch, capsys):
    monkeypatch.setattr(prepare.imagefolder, "fcntl", None)
    fake = FakeMsvcrt(refusals=3)
    monkeypatch.setattr(prepare.imagefolder, "msvcrt", fake, raising=False)
    assert prepare.prepare(out, size=16, count=20)
    assert fake.refusals == 0 and capsys.readouterr().err.count("waiting for another") == 1
    assert names(out.parent) == ["data"]


# ---- what is left over ----


def test_a_killed_run_leaves_nothing_that_looks_complete_and_the_next_heals_it(script, out):
    options = ["--processes", 2] if script == SCRIPTS["emoji"] else []
    process = start(script, out, "--count", 3000, *options)
    wait_until(lambda: some_images(out))
    process.kill()  # no cleaning up
    process.communicate(timeout=60)  # ends when its children, who have its stdout, are gone, too
    assert not out.exists() and names(out.parent) == ["data.partial", "data.partial.lock"]
    assert run(script, out, "--count", 20)[0] == 0
    assert names(out.parent) == ["data"] and names(out) == ["dataset.json", "test", "train"]


def leave_a_file(partial, friend):
    partial.write_text("half")


def leave_an_empty_folder(partial, friend):
    partial.mkdir()


def leave_rubbish(partial, friend):
    (partial / "train").mkdir(parents=True)
    (partial / "train" / "00000.png").write_bytes(b"\x89PNG")


def leave_a_broken_record(partial, friend):
    partial.mkdir()
    (partial / "dataset.json").write_text('{"dataset": ')


def leave_a_link(partial, friend):
    partial.symlink_to(friend, target_is_directory=True)


def leave_a_lock(partial, friend):
    partial.with_name(partial.name + ".lock").write_text("4711")


LEFTOVERS = [leave_a_file, leave_an_empty_folder, leave_rubbish]
LEFTOVERS += [leave_a_broken_record, leave_a_link, leave_a_lock]


@pytest.mark.parametrize("leave", LEFTOVERS)
def test_a_leftover_of_any_kind_is_replaced(prepare, out, tmp_path, leave):
    friend = tmp_path / "friend"
    friend.mkdir()
    (friend / "letter.txt").write_text("dear reader")
    out.parent.mkdir()
    leave(out.with_name("data.partial"), friend)
    assert prepare.prepare(out, size=16, count=20)
    assert names(out.parent) == ["data"] and names(out) == ["dataset.json", "test", "train"]
    assert names(friend) == ["letter.txt"]  # a link goes, what it points to stays


def test_an_interrupted_run_leaves_nothing(prepare, out, monkeypatch):
    draw = prepare.draw
    calls = []

    def interrupted(*asked):
        calls.append(asked)
        if len(calls) > 10:
            raise KeyboardInterrupt
        return draw(*asked)

    monkeypatch.setattr(prepare, "draw", interrupted)
    with pytest.raises(KeyboardInterrupt):
        prepare.prepare(out, size=16, count=20)
    assert names(out.parent) == []


# ---- what is somebody else's ----


@pytest.mark.parametrize("name", ["letter.txt", "letter.txt/data", "."])
def test_an_unwritable_or_foreign_folder_is_left_alone(script, tmp_path, name):
    letter = tmp_path / "letter.txt"
    letter.write_text("dear reader")
    out = tmp_path / name
    status, _, complaint = run(script, out, "--count", 20)
    assert status != 0 and len(complaint.splitlines()) == 1
    assert "out" in complaint and str(out) in complaint
    assert names(tmp_path) == ["letter.txt"] and letter.read_text() == "dear reader"


def test_a_data_set_of_another_name_is_left_alone(script, out):
    out.mkdir(parents=True)
    (out / "dataset.json").write_text('{"dataset": "mine"}')
    status, _, complaint = run(script, out, "--count", 20)
    assert status != 0 and str(out) in complaint and names(out) == ["dataset.json"]


def test_a_foreign_folder_that_appears_meanwhile_is_left_alone(prepare, out, monkeypatch):
    draw = prepare.draw

    def draw_late(*asked):
        out.mkdir(exist_ok=True)
        (out / "letter.txt").write_text("dear reader")
        return draw(*asked)

    monkeypatch.setattr(prepare, "draw", draw_late)
    with pytest.raises(ValueError, match="out: .*data exists and is not"):
        prepare.prepare(out, size=16, count=20)
    assert names(out.parent) == ["data"] and names(out) == ["letter.txt"]


# ---- what is there already ----


def test_the_same_data_set_is_kept_and_another_replaces_it(script, out):
    options = ("--size", 16, "--count", 20)
    assert run(script, out, *options)[0] == 0
    born, before = (out / "dataset.json").stat().st_mtime_ns, digest(out)
    status, said, _ = run(script, out, *options)
    assert status == 0 and "already" in said
    assert (out / "dataset.json").stat().st_mtime_ns == born and digest(out) == before
    assert run(script, out, *options, "--seed", 1)[0] == 0
    assert digest(out) != before and names(out.parent) == ["data"]
    assert json.loads((out / "dataset.json").read_text())["seed"] == 1


def test_a_data_set_is_found_where_nothing_can_be_written(prepare, out, monkeypatch):
    """As in a classroom's common copy: no lock is made for what is there already."""
    prepare.prepare(out, size=16, count=20)

    def refuse(path, out):
        raise PermissionError(path)

    monkeypatch.setattr(prepare.imagefolder, "lock", refuse)
    assert not prepare.prepare(out, size=16, count=20)


def test_an_empty_folder_and_a_link_to_one_can_be_named(prepare, out, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    out.parent.mkdir()
    out.symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    assert prepare.prepare(out, size=16, count=20)
    assert out.is_symlink() and names(tmp_path / "elsewhere") == ["dataset.json", "test", "train"]


# ---- the command ----


@pytest.mark.parametrize(
    "options, named",
    [
        (["--size", 8], ["size", "8", "16"]),
        (["--count", 5], ["count", "5", "20"]),
        (["--seed", -1], ["seed", "-1", "0"]),
        (["--size", "big"], ["--size", "big", "int"]),
    ],
)
def test_wrong_arguments_get_one_clear_line(script, tmp_path, options, named):
    status, _, complaint = run(script, tmp_path / "out", *options)
    assert status != 0 and len(complaint.splitlines()) == 1
    assert all(word in complaint for word in named)
    assert names(tmp_path) == []
