"""The experiments: their results are complete, checked, and made by the code that chapters show."""

import ast
import json
import shutil
import sys

import nbformat
import pytest
import torch

from conftest import ROOT, noise, seeded
from ldm_minimal import NoiseSchedule

sys.path.insert(0, str(ROOT / "chapters"))
sys.path.insert(0, str(ROOT / "chapters" / "experiments"))
import chapter_03
import chapter_07
import chapter_09
import chapter_10
import check

import book
import common
import execute

CHAPTERS = ROOT / "chapters"


@pytest.fixture
def results(tmp_path, monkeypatch):
    """A copy of the results, which the experiments take for the real one."""
    folder = tmp_path / "results"
    shutil.copytree(common.RESULTS, folder)
    monkeypatch.setattr(common, "RESULTS", folder)
    return folder


def change(path, **values):
    record = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(record | values), encoding="utf-8")


# ---- check.py ----


def test_every_result_has_its_experiment_and_says_how_it_was_made():
    assert check.missing() == []


def test_a_missing_result_is_found(results):
    (results / "07" / "mix.json").unlink()
    assert check.missing() == ["07/mix has an experiment and no file"]


def test_a_result_that_no_experiment_makes_is_found(results):
    shutil.copy(results / "07" / "mix.json", results / "07" / "lost.json")
    change(results / "07" / "lost.json", command=common.command("07/lost"))
    assert check.missing() == ["07/lost has a file and no experiment"]


def test_a_result_of_another_command_is_found(results):
    change(results / "07" / "mix.json", command="python mix.py")
    assert check.missing() == ["07/mix does not say how it was made"]


def test_a_result_that_is_too_large_is_found(results):
    (results / "07" / "steps.webp").write_bytes(bytes(check.LARGEST + 1))
    assert check.missing() == [f"{results / '07' / 'steps.webp'} is larger than 300 kB"]


def test_a_result_that_a_chapter_reads_and_nothing_makes_is_found(monkeypatch):
    monkeypatch.delitem(common.EXPERIMENTS, "07/mix")
    assert "07/mix is read by a chapter and has no experiment" in check.missing()


def test_a_chapter_without_a_beginning_is_found(monkeypatch):
    monkeypatch.delitem(common.BEGINNINGS, "07/steps")
    assert check.missing() == ["no experiment of chapter 07 has a beginning"]


@pytest.mark.slow
def test_a_corrupted_number_is_found(results):
    assert check.changed(["10"]) == []
    path = results / "10" / "traps.json"
    traps = json.loads(path.read_text(encoding="utf-8"))["traps"]
    traps["U-Net: 16 heads for 4"]["guess"] *= 1.06
    change(path, traps=traps)
    assert check.changed(["10"]) == ["10/traps does not come out again"]


# ---- how a result is made ----


def test_a_result_is_recorded_and_read_back(results, monkeypatch):
    images = torch.rand(3, 3, 32, 32, generator=seeded()) * 2 - 1

    def found(steps):
        return {"loss": 0.5 * steps, "draw": torch.rand(1).item()}, images

    monkeypatch.setitem(common.EXPERIMENTS, "07/new", (found, {"steps": 4}))
    monkeypatch.setattr(book.loading, "RESULTS", results)
    common.make("07/new")
    record = book.result("07/new")
    torch.manual_seed(0)
    assert record["draw"] == torch.rand(1).item()
    assert record["steps"] == 4 and record["loss"] == 2.0 and record["seed"] == 0
    assert record["command"] == "python chapters/experiments/chapter_07.py new"
    assert (record["pictures"] - images).abs().max() <= 1 / 255 + 1e-6


def test_a_script_makes_all_of_its_results_or_those_that_are_named(monkeypatch):
    made = []
    monkeypatch.setattr(common, "make", made.append)
    monkeypatch.setattr(sys, "argv", ["chapter_07.py", "start"])
    common.main("07")
    monkeypatch.setattr(sys, "argv", ["chapter_07.py"])
    common.main("07")
    assert made[0] == "07/start"
    assert sorted(made[1:]) == ["07/mix", "07/start", "07/steps"]


def test_a_script_refuses_another_result(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["chapter_07.py", "stops"])
    with pytest.raises(SystemExit) as stop:
        common.main("07")
    assert stop.value.code == 2
    assert "there is no result 'stops'; choose from" in capsys.readouterr().err


# ---- what the experiments compute ----


def test_means_leave_out_what_is_not_there():
    assert common.means([1.0, 3.0, None, 5.0, None, None], 2) == [2.0, 5.0, None]


def test_first_means_follow_each_other():
    losses = iter([1.0, 3.0, 5.0, 7.0])
    assert common.first_mean(losses, 2) == 2.0
    assert common.first_mean(losses, 2) == 6.0


def test_error_by_timestep_is_1_for_no_prediction_and_0_for_the_right_one():
    schedule = NoiseSchedule()
    z = torch.zeros(64, 4, 8, 8)  # z_t is the noise times sqrt(1 - alpha_bar)

    def nothing(z_t, t, context):
        return torch.zeros_like(z_t)

    def right(z_t, t, context):
        return z_t / (1 - schedule.alpha_bars[t]).sqrt().float().view(-1, 1, 1, 1)

    times = (10, 500, 999)
    assert common.error_by_timestep(nothing, schedule, z, None, times) == pytest.approx(
        [1, 1, 1], abs=0.05
    )
    assert max(common.error_by_timestep(right, schedule, z, None, times)) < 1e-9


def test_specks_darken_a_third_of_the_pixels_in_all_colours():
    x = torch.full((64, 3, 32, 32), 0.5)
    y = chapter_03.speckled(x, seed=0)
    dark = (y - 0.5).abs() > 1e-6
    assert (dark == dark[:, :1]).all()
    assert dark.float().mean().item() == pytest.approx(0.35, abs=0.01)
    torch.testing.assert_close(y[dark], torch.full_like(y[dark], -0.1))


def test_images_are_spoiled_with_the_same_squared_error():
    x = noise(4, 3, 32, 32).float()
    for y in chapter_03.spoil(x, error=0.02).values():
        torch.testing.assert_close((x - y).square().mean(dim=(1, 2, 3)), torch.full((4,), 0.02))


def test_skip_is_algorithm_2_at_some_timesteps():
    schedule = NoiseSchedule("linear")
    start = noise(5, 3)
    times = [999, 500, 20]

    def predict(x, t):
        return 0.3 * x + t / 1000

    fresh = seeded(1)
    x = start
    for t in times:
        beta, alpha_bar = schedule.betas[t], schedule.alpha_bars[t]
        x = (x - beta / (1 - alpha_bar).sqrt() * predict(x, t)) / (1 - beta).sqrt()
        if t != 20:
            variance = beta * (1 - schedule.alpha_bars[t - 1]) / (1 - alpha_bar)
            x = x + variance.sqrt() * torch.randn(x.shape, generator=fresh)
    *_, skipped = chapter_07.skip(predict, schedule, start, times, seeded(1))
    torch.testing.assert_close(skipped, x)


def test_peak_counts_what_is_alive_at_once():
    x = torch.zeros(1000)
    with chapter_09.Peak() as watch:
        y = x + 1  # 4,000 bytes
        y = y.view(10, 100) * 2  # 8,000, then 4,000 again
        y += 1  # in place
    assert watch.peak == 8000
    assert watch.now == 4000


def test_every_trap_is_known_and_no_other(tiny):
    for trap in chapter_10.TRAPS:
        chapter_10.set_trap(tiny, trap)
    with pytest.raises(ValueError, match="trap is 'a new one'"):
        chapter_10.set_trap(tiny, "a new one")


# ---- the chapters show the code of their results ----

SHOWN = {
    "02": ["Block", "SimpleUNet", "train", "clipped"],
    "03": [
        "SimpleAutoencoder",
        "learn",
        "restoration_loss",
        "SimpleVAE",
        "vae_loss",
        "speckled",
        "spoil",
        "train",
    ],
    "05": ["inside"],
    "07": ["skip"],
    "08": ["new_model", "whole_recipe"],
    "09": ["flops", "small", "UNETS"],
}


def definitions(source):
    """{name: source} of what a script or a cell defines, without docstrings and comments."""
    found = {}
    for node in ast.parse(source).body:
        if isinstance(node, ast.Assign):
            found[ast.unparse(node.targets[0])] = ast.unparse(node)
        elif isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            for part in ast.walk(node):
                if isinstance(part, (ast.FunctionDef, ast.ClassDef)) and ast.get_docstring(part):
                    part.body = part.body[1:] or [ast.Pass()]
            found[node.name] = ast.unparse(node)
    return found


@pytest.mark.parametrize("chapter", SHOWN)
def test_a_chapter_shows_the_code_that_made_its_results(chapter):
    script = definitions((CHAPTERS / "experiments" / f"chapter_{chapter}.py").read_text("utf-8"))
    notebook = nbformat.read(next(CHAPTERS.glob(f"{chapter}_*.ipynb")), as_version=4)
    shown = {}
    for cell in notebook.cells:
        if cell.cell_type == "code":
            shown |= definitions(cell.source)
    for name in SHOWN[chapter]:
        assert shown[name] == script[name]


# ---- execute.py ----


@pytest.mark.slow
def test_executing_a_chapter_keeps_its_outputs_and_seconds(tmp_path, monkeypatch):
    monkeypatch.setattr(execute, "HERE", tmp_path)
    source = (
        "import book\nimport matplotlib.pyplot as plt\nplt.plot([1, 2])\nplt.show()\n"
        "print('a stored output')"
    )
    cells = [nbformat.v4.new_markdown_cell("# A chapter"), nbformat.v4.new_code_cell(source)]
    cells[1].metadata["alt"] = "A line that rises."
    monkeypatch.setenv("PYTHONPATH", str(CHAPTERS))
    path = tmp_path / "11_new.ipynb"
    nbformat.write(nbformat.v4.new_notebook(cells=cells), path)
    execute.execute(path)
    stored = nbformat.read(path, as_version=4)
    heading, code = stored.cells
    assert stored.metadata["measured"].keys() == {"seconds", "machine", "torch"}
    assert "a stored output" in "".join(output.get("text", "") for output in code.outputs)
    assert any('alt="A line that rises."' in str(output.get("data")) for output in code.outputs)
    assert "execution" not in code.metadata  # timestamps
    assert heading.metadata["slideshow"]["slide_type"] == "slide"
    assert code.metadata["slideshow"]["slide_type"] == "subslide"
