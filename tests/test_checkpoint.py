"""The shipped checkpoint keeps its promises: floors measured here on fewer captions than its card reports."""

import json

import pytest
from conftest import ROOT

from ldm_minimal import CLIP, LatentDiffusion
from ldm_minimal.__main__ import SHIPPED, all_scores, data_folder

GUIDANCE = 5.0


@pytest.fixture(scope="module")
def scores():
    """96 of the held-out captions, drawn; the data set is made if it is not there, as `evaluate` does."""
    folder = data_folder(None, 32)
    return all_scores(LatentDiffusion.load(SHIPPED / "model"), CLIP.load(SHIPPED / "judge"), folder, [GUIDANCE], 96, seed=0)


@pytest.mark.slow
def test_prompts_are_obeyed(scores):
    accuracy = scores["guidance"]["5"]["accuracy"]
    print(f"prompt accuracy {accuracy['all']:.1%}, composition {accuracy['composition']:.1%}, "
          f"oracle ceiling {scores['ceiling']['all']:.1%}, on {scores['captions']} captions")
    assert accuracy["all"] >= 0.90
    assert accuracy["composition"] >= 0.75


@pytest.mark.slow
def test_pictures_survive_the_autoencoder(scores):
    assert scores["psnr"] >= 30
    assert scores["ceiling"]["all"] >= 0.95  # the oracle reads what the autoencoder restores


@pytest.mark.slow
def test_drawn_pictures_look_real_to_the_judge(scores):
    drawn = scores["guidance"]["5"]
    assert drawn["clip_score"] >= 0.9 * scores["clip_score_real"]
    assert drawn["frechet"] <= 10 * scores["frechet_floor"]


def test_it_is_small_and_says_where_it_comes_from():
    files = [path for path in SHIPPED.rglob("*.safetensors")]
    assert {path.parent.name for path in files} == {"model", "judge"}
    assert sum(path.stat().st_size for path in files) <= 12e6
    card = (SHIPPED / "README.md").read_text(encoding="utf-8")
    assert all(word in card for word in ("-m ldm_minimal train", "seed", "minutes", "prompt accuracy"))
    config = json.loads((SHIPPED / "model" / "config.json").read_text())
    assert 0.1 < config["scale_factor"] < 10
    steps = [line.split(",")[:2] for line in (SHIPPED / "log.csv").read_text().splitlines()[1:]]
    for stage, recipe in (("clip", "clip_stage"), ("autoencoder", "autoencoder_stage"), ("denoiser", "denoiser_stage")):
        assert [stage, str(config[recipe]["steps"])] in steps, f"log.csv does not show the end of stage {stage}"


def test_the_cards_figures_are_those_of_its_scores():
    """Every score in the card's table stands in scores.json, which `evaluate --json` wrote."""
    scores = json.loads((SHIPPED / "scores.json").read_text())
    card = (SHIPPED / "README.md").read_text(encoding="utf-8")
    for value in (f"{scores['psnr']:.2f}", f"{scores['ceiling']['all']:.1%}".replace("%", " %"),
                  *(f"{entry['accuracy'][name]:.1%}".replace("%", " %") for entry in scores["guidance"].values()
                    for name in ("all", "composition"))):
        assert value in card, f"{value} is in scores.json and not in the card"
    assert (ROOT / "data" / "README.md").read_text(encoding="utf-8").count("checkpoints/shapes") >= 1
