"""How good is a model? Prompt accuracy, reconstruction, Fréchet distance, CLIP score, retrieval.

An evaluator is a CLIP of another seed that no training used. Images are x (N, 3, H, W) in [-1, 1];
rows are the lines of a data set's metadata, `CaptionedImages.rows`.
"""

from __future__ import annotations

import numpy as np
import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm.auto import tqdm

from .files import LPIPS_WEIGHTS, data_module
from .ldm import CLIP, CaptionedImages, LatentDiffusion, PerceptualLoss


def psnr(x: Tensor, x_hat: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each image in dB, 10 log10(peak^2 / mse), with peak 2. (N,)."""
    return 10 * torch.log10(4 / (x - x_hat).square().mean(dim=(1, 2, 3)))


def prompt_accuracy(x: Tensor, rows: list[dict]) -> dict[str, float] | None:
    """The share of images in which everything that the caption states is true, by the oracle.

    "all": every stated attribute holds; "seen pairs" and "composition": the same on these parts
    of the test set; "left first" and "right first": the same where the caption names the left or
    upper of two objects first, or the other one; then one entry for each attribute, over the
    images whose caption states it. None for captions that are not those of the shapes data set,
    which is all that the oracle can read.
    """
    if "scene" not in rows[0]:
        return None
    oracle = data_module("shapes", "oracle")
    images = ((x.clamp(-1, 1) + 1) / 2).permute(0, 2, 3, 1).cpu().numpy()
    outcomes = {"all": [], "seen pairs": [], "composition": [], "left first": [], "right first": []}
    for image, row in zip(images, rows, strict=True):
        grade = oracle.grade(image, row["text"])  # {attribute: does it hold?}
        entirely_right = all(grade.values())
        outcomes["all"].append(entirely_right)
        part = "composition" if row["split"] == "composition" else "seen pairs"
        outcomes[part].append(entirely_right)
        relation = oracle.parse(row["text"]).relation
        if relation is not None:
            order = "left first" if relation in ("left of", "above") else "right first"
            outcomes[order].append(entirely_right)
        for name, holds in grade.items():
            attribute = name.split()[0]
            outcomes.setdefault(attribute, []).append(holds)
    return {name: sum(values) / len(values) for name, values in outcomes.items() if values}


def mean_distance(
    distance: PerceptualLoss, x: Tensor, x_hat: Tensor, batch_size: int = 64
) -> float:
    """The mean perceptual distance of each image and its reconstruction."""
    pairs = zip(x.split(batch_size), x_hat.split(batch_size), strict=True)
    return torch.cat([distance(a, b) for a, b in pairs]).mean().item()


# ---- the published LPIPS ----------------------------------------------------------------------


def published_lpips(vgg: dict[str, Tensor], lpips: dict[str, Tensor]) -> PerceptualLoss:
    """The perceptual loss with which Stable Diffusion's autoencoder was trained.

    vgg: torchvision's VGG16 state dict. lpips: the linear weights of the `lpips` package (v0.1,
    vgg). Raises ValueError naming what is missing.
    """
    layer_weights = [f"lin{i}.model.1.weight" for i in range(5)]
    missing = [name for name in ("features.0.weight", "features.28.bias") if name not in vgg]
    missing += [name for name in layer_weights if name not in lpips]
    if missing:
        raise ValueError(
            f"vgg or lpips lacks {', '.join(missing)}; needed are torchvision's VGG16 and "
            "lpips' v0.1 'vgg' weights"
        )
    return PerceptualLoss(VGGFeatures(vgg), [lpips[name].flatten() for name in layer_weights])


class VGGFeatures(nn.Module):
    """VGG16's feature maps before each pooling (Simonyan & Zisserman 2015).

    x (B, 3, H, W) in [-1, 1], which is shifted and scaled as lpips does -> five maps, from
    (B, 64, H, W) to (B, 512, H / 16, W / 16).
    """

    # Convolutions of each level, by their numbers in torchvision's `features`.
    LEVELS = ((0, 2), (5, 7), (10, 12, 14), (17, 19, 21), (24, 26, 28))
    SHIFT = (-0.030, -0.088, -0.188)
    SCALE = (0.458, 0.448, 0.450)

    def __init__(self, state: dict[str, Tensor]):
        super().__init__()
        self.weights = nn.ParameterDict()
        self.biases = nn.ParameterDict()
        for numbers in self.LEVELS:
            for number in numbers:
                self.weights[f"{number}"] = state[f"features.{number}.weight"]
                self.biases[f"{number}"] = state[f"features.{number}.bias"]
        device = state["features.0.weight"].device
        self.register_buffer("shift", torch.tensor(self.SHIFT, device=device).view(1, 3, 1, 1))
        self.register_buffer("scale", torch.tensor(self.SCALE, device=device).view(1, 3, 1, 1))
        self.requires_grad_(False)

    def forward(self, x: Tensor) -> list[Tensor]:
        h = (x - self.shift.to(x)) / self.scale.to(x)
        maps = []
        for level, numbers in enumerate(self.LEVELS):
            if level > 0:
                h = F.max_pool2d(h, 2)
            for number in numbers:
                weight = self.weights[f"{number}"].to(x.dtype)
                bias = self.biases[f"{number}"].to(x.dtype)
                h = F.relu(F.conv2d(h, weight, bias, padding=1))
            maps.append(h)
        return maps


def load_lpips(device: str | torch.device = "cpu") -> PerceptualLoss:
    """The published LPIPS. Raises ValueError where data/lpips/prepare.py has not fetched it."""
    if not LPIPS_WEIGHTS.is_file():
        raise ValueError(
            f"{LPIPS_WEIGHTS} does not exist; python data/lpips/prepare.py fetches it (64 MB)"
        )
    try:
        weights = safetensors.torch.load_file(LPIPS_WEIGHTS, device=str(device))
        return published_lpips(weights, weights)
    except (safetensors.SafetensorError, KeyError, ValueError) as error:
        raise ValueError(
            f"{LPIPS_WEIGHTS} cannot be used: {error}; delete it and fetch it again"
        ) from None


# ---- by an evaluator --------------------------------------------------------------------------


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
    lpips = load_lpips(model.device) if LPIPS_WEIGHTS.is_file() else None
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
        "perceptual": mean_distance(perceptual, x, x_hat),
        "lpips": None if lpips is None else mean_distance(lpips, x, x_hat),
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
    lpips = "not fetched" if scores["lpips"] is None else f"{scores['lpips']:.4f}"
    print(
        f"\n{scores['captions']} held-out captions, {scores['steps']} steps, seed {scores['seed']}"
    )
    print(
        f"{'reconstruction':<19}{scores['psnr']:.2f} dB PSNR, "
        f"perceptual distance {scores['perceptual']:.4f}, LPIPS {lpips}"
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
