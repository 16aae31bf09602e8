"""Every score against a value worked out by hand."""

import types

import pytest
import torch

from ldm_minimal.metrics import clip_score, frechet_distance, prompt_accuracy, psnr, retrieval


def test_psnr_of_a_constant_error():
    """An error of 0.2 everywhere: mse 0.04, peak 2, so 10 log10(4 / 0.04) = 20 dB."""
    x = torch.rand(2, 3, 4, 4, generator=torch.Generator().manual_seed(0)) - 0.5
    error = torch.tensor([0.2, 0.02]).view(2, 1, 1, 1)
    torch.testing.assert_close(psnr(x, x + error), torch.tensor([20.0, 40.0]), rtol=1e-4, atol=0)


def test_frechet_distance_of_gaussians_has_its_closed_form():
    """For independent dimensions it is |mu_a - mu_b|^2 + sum (sigma_a - sigma_b)^2."""
    noise = torch.randn(4000, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    noise = noise - noise.mean(0)
    whitening = torch.linalg.inv(torch.linalg.cholesky(torch.cov(noise.T)).T)
    noise = noise @ whitening  # its covariance is exactly I
    a = noise * torch.tensor([1.0, 2.0, 3.0])
    b = noise * torch.tensor([2.0, 2.0, 1.0]) + torch.tensor([0.0, 5.0, 0.0])
    assert frechet_distance(a, b) == pytest.approx(25 + 1 + 0 + 4, rel=1e-6)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-6)


class FirstPixel:
    """An evaluator that sees only an image's first pixel, and reads captions that are numbers."""

    def tokenizer(self, captions):
        return torch.tensor([int(caption) for caption in captions])

    def image_encoder(self, x):
        return torch.nn.functional.one_hot((x[:, 0, 0, 0] * 100).round().long(), 100).float()

    def text_features(self, tokens):
        return torch.nn.functional.one_hot(tokens, 100).float()


def images_of(numbers):
    return torch.stack([torch.full((3, 4, 4), number / 100) for number in numbers])


def test_clip_score_is_100_times_the_mean_cosine():
    captions = ["3", "4", "5", "6"]
    assert clip_score(FirstPixel(), images_of([3, 4, 5, 6]), captions) == pytest.approx(100)
    assert clip_score(FirstPixel(), images_of([3, 4, 9, 9]), captions) == pytest.approx(50)


def test_retrieval_counts_the_captions_that_are_found():
    rows = [{"text": str(n), "split": "composition"} for n in (3, 4, 5, 6, 7)]
    rows.insert(4, {"text": "50", "split": "test"})
    evaluator = FirstPixel()
    assert retrieval(evaluator, images_of([3, 4, 5, 6, 50, 7]), rows) == 1
    assert retrieval(evaluator, images_of([3, 5, 4, 6, 4, 7]), rows) == 0.6
    only_test = [row | {"split": "test"} for row in rows]
    assert retrieval(evaluator, images_of([3, 4, 5, 6, 50, 7]), only_test) is None


def test_prompt_accuracy_needs_every_stated_attribute(monkeypatch):
    """Of four images one has a wrong colour and another a wrong size: half are right."""

    class Oracle:
        @staticmethod
        def grade(image, caption):
            return {
                "colour of the circle": caption != "wrong colour",
                "size": caption != "wrong size",
            }

        @staticmethod
        def parse(caption):
            relation = {"right": "left of", "wrong size": "above", "wrong colour": "below"}
            return types.SimpleNamespace(relation=relation.get(caption))

    monkeypatch.setattr("ldm_minimal.metrics.data_module", lambda dataset, name: Oracle)
    captions = ["right", "wrong colour", "wrong size", "right too"]
    splits = ["test", "test", "composition", "composition"]
    rows = [
        {"text": text, "split": split, "scene": {}}
        for text, split in zip(captions, splits, strict=True)
    ]
    accuracy = prompt_accuracy(torch.zeros(4, 3, 2, 2), rows)
    expected = {"all": 0.5, "seen pairs": 0.5, "composition": 0.5, "colour": 0.75, "size": 0.75}
    expected |= {"left first": 0.5, "right first": 0.0}  # "right too" has one object
    assert accuracy == expected
    assert prompt_accuracy(torch.zeros(1, 3, 2, 2), [{"text": "a cat"}]) is None
