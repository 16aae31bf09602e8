"""How good is a model? Prompt accuracy, reconstruction, Fréchet distance, CLIP score, retrieval.

An evaluator is a CLIP of another seed that no training used. Images are x (N, 3, H, W) in [-1, 1];
rows are the lines of a data set's metadata, `CaptionedImages.rows`.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm.auto import tqdm

from .files import data_module
from .ldm import CLIP, CaptionedImages, LatentDiffusion, PerceptualLoss


def psnr(x: Tensor, x_hat: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each image in dB, 10 log10(peak^2 / mse), with peak 2. (N,)."""
    return 10 * torch.log10(4 / (x - x_hat).square().mean(dim=(1, 2, 3)))


def prompt_accuracy(x: Tensor, rows: list[dict]) -> dict[str, float] | None:
    """The share of images in which everything that the caption states is true, by the oracle.

    "all": every stated attribute holds; "seen pairs" and "composition": the same on these parts
    of the test set; then one entry for each attribute, over the images whose caption states it.
    None for captions that are not those of the shapes data set, which is all that the oracle can
    read.
    """
    if "scene" not in rows[0]:
        return None
    oracle = data_module("shapes", "oracle")
    images = ((x.clamp(-1, 1) + 1) / 2).permute(0, 2, 3, 1).cpu().numpy()
    outcomes = {"all": [], "seen pairs": [], "composition": []}
    for image, row in zip(images, rows, strict=True):
        grade = oracle.grade(image, row["text"])  # {attribute: does it hold?}
        entirely_right = all(grade.values())
        outcomes["all"].append(entirely_right)
        part = "composition" if row["split"] == "composition" else "seen pairs"
        outcomes[part].append(entirely_right)
        for name, holds in grade.items():
            attribute = name.split()[0]
            outcomes.setdefault(attribute, []).append(holds)
    return {name: sum(values) / len(values) for name, values in outcomes.items() if values}


def image_features(evaluator: CLIP, x: Tensor, batch_size: int = 256) -> Tensor:
    """The evaluator's features of each image, not normalised: (N, width)."""
    return torch.cat([evaluator.image_encoder(part) for part in x.split(batch_size)])


def clip_score(evaluator: CLIP, x: Tensor, captions: list[str]) -> float:
    """100 times the mean cosine of each image's features and its caption's."""
    tokens = evaluator.tokenizer(captions).to(x.device)
    unit_features = F.normalize(image_features(evaluator, x), dim=-1)
    return 100 * (unit_features * evaluator.text_features(tokens)).sum(dim=-1).mean().item()


def retrieval(evaluator: CLIP, x: Tensor, rows: list[dict], among: int = 100) -> float | None:
    """How often an image's own caption matches it best, among those of the composition split.

    None where there are fewer than two different captions.
    """
    first_image = {}
    for i, row in enumerate(rows):
        if row.get("split") == "composition":
            first_image.setdefault(row["text"], i)
    captions = list(first_image)[:among]
    chosen = list(first_image.values())[:among]
    if len(captions) < 2:
        return None
    tokens = evaluator.tokenizer(captions).to(x.device)
    unit_features = F.normalize(image_features(evaluator, x[chosen]), dim=-1)
    best = (unit_features @ evaluator.text_features(tokens).T).argmax(dim=1).cpu()
    return (best == torch.arange(len(captions))).double().mean().item()


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """|mu_a - mu_b|^2 + tr(A + B - 2 sqrt(A B)) of two sets of features, (N, d) and (M, d).

    Heusel et al. 2017, arXiv 1706.08500. mu are the means, A and B the covariances.
    """
    a = a.cpu().double().numpy()
    b = b.cpu().double().numpy()
    cov_a = np.cov(a, rowvar=False)
    cov_b = np.cov(b, rowvar=False)
    # The trace of a matrix's root is the sum of the roots of its eigenvalues.
    eigenvalues = np.linalg.eigvals(cov_a @ cov_b).real.clip(min=0)
    distance = ((a.mean(0) - b.mean(0)) ** 2).sum()
    return float(distance + np.trace(cov_a) + np.trace(cov_b) - 2 * np.sqrt(eigenvalues).sum())


def draw_captions(
    model: LatentDiffusion, captions: list[str], guidance: float, seed: int, batch_size: int = 64
) -> Tensor:
    """One image for each caption, in fifty steps: (N, 3, H, W)."""
    generator = torch.Generator().manual_seed(seed)
    starts = range(0, len(captions), batch_size)
    images = []
    for i in tqdm(starts, desc=f"drawing, guidance {guidance:g}", unit="batch", leave=False):
        batch = captions[i : i + batch_size]
        images.append(model.generate(batch, guidance=guidance, generator=generator))
    return torch.cat(images)


@torch.no_grad()
def all_scores(
    model: LatentDiffusion,
    evaluator: CLIP,
    test: CaptionedImages,
    guidances: list[float],
    count: int,
    seed: int,
) -> dict:
    """Every score on the first `count` test images and their captions; an entry for each guidance.

    "ceiling" is the accuracy of the same images after the autoencoder alone. Fréchet distances
    are to the remaining test images, which no score has drawn, and None where there are fewer
    than two.
    """
    count = min(count, len(test))
    rows = test.rows[:count]
    captions = test.captions[:count]
    x = test.batch(slice(0, count)).to(model.device)
    x_hat = torch.cat([model.decode(model.encode(part)) for part in x.split(128)])
    perceptual = PerceptualLoss(evaluator.image_encoder.features)
    distances = [perceptual(a, b) for a, b in zip(x.split(128), x_hat.split(128), strict=True)]
    reference = None
    if len(test) - count > 1:
        rest = test.batch(slice(count, None)).to(model.device)
        reference = image_features(evaluator, rest)

    def frechet(images: Tensor) -> float | None:
        if reference is None:
            return None
        return frechet_distance(image_features(evaluator, images), reference)

    scores = {
        "captions": count,
        "steps": 50,
        "seed": seed,
        "psnr": psnr(x, x_hat).mean().item(),
        "perceptual": torch.cat(distances).mean().item(),
        "ceiling": prompt_accuracy(x_hat, rows),
        "clip_score_real": clip_score(evaluator, x, captions),
        "frechet_floor": frechet(x),
        "retrieval_real": retrieval(evaluator, x, rows),
        "guidance": {},
    }
    for guidance in guidances:
        drawn = draw_captions(model, captions, guidance, seed)
        scores["guidance"][f"{guidance:g}"] = {
            "accuracy": prompt_accuracy(drawn, rows),
            "clip_score": clip_score(evaluator, drawn, captions),
            "frechet": frechet(drawn),
            "retrieval": retrieval(evaluator, drawn, rows),
        }
    return scores


def print_scores(scores: dict) -> None:
    """The scores as a table: a column for each guidance, and one for the ceiling or real images."""
    entries = list(scores["guidance"].values())
    print(
        f"\n{scores['captions']} held-out captions, {scores['steps']} steps, seed {scores['seed']}"
    )
    print(
        f"{'reconstruction':<19}{scores['psnr']:.2f} dB PSNR, "
        f"perceptual distance {scores['perceptual']:.4f}"
    )
    headings = [f"w = {guidance}" for guidance in scores["guidance"]] + ["ceiling"]
    print(f"{'':<19}" + "".join(f"{heading:>12}" for heading in headings))
    for name in scores["ceiling"] or {}:
        label = "prompt accuracy" if name == "all" else f"  {name}"
        values = [entry["accuracy"][name] for entry in entries] + [scores["ceiling"][name]]
        print(f"{label:<19}" + "".join(f"{value:>12.1%}" for value in values))
    for label, key, real in (
        ("CLIP score", "clip_score", "clip_score_real"),
        ("Frechet distance", "frechet", "frechet_floor"),
        ("caption found", "retrieval", "retrieval_real"),
    ):
        values = [entry[key] for entry in entries] + [scores[real]]
        cells = ["-" if value is None else f"{value:.3f}" for value in values]
        print(f"{label:<19}" + "".join(f"{cell:>12}" for cell in cells))
    print(
        "ceiling: the test images after the autoencoder (accuracy), or as they are (the rest)\n"
        "caption found: the right one among up to 100 of the composition split\n"
    )
