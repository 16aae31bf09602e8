"""python -m ldm_minimal evaluate: score a trained model against held-out captions and images."""

from __future__ import annotations

import argparse
import json

from .cli import add_seed, number
from .files import SHIPPED, best_device, data_folder, data_of_run, load_part, read_split
from .ldm import CLIP, LatentDiffusion
from .metrics import all_scores, print_scores


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `evaluate`."""
    parser.add_argument(
        "--model", default=SHIPPED, help="a run's folder (default: the shipped model)"
    )
    parser.add_argument(
        "--data", help="a data set with test/ (default: the one that the run was trained on)"
    )
    parser.add_argument("--guidance", type=number(float, 0, 100), nargs="+", default=[5.0])
    parser.add_argument(
        "--captions", type=number(int, 2), default=512, help="how many (default 512)"
    )
    add_seed(parser)
    parser.add_argument("--json", action="store_true", help="for machines")


def run(args: argparse.Namespace) -> None:
    """The command. Raises ValueError or OSError for what is wrong with its options."""
    model = load_part(args.model, "model", LatentDiffusion).to(best_device())
    evaluator = load_part(args.model, "evaluator", CLIP).to(model.device)
    data = args.data or data_of_run(args.model)
    folder = data_folder(data, model.config.image_size, dataset=model.config.name)
    test = read_split(folder, "test", model.config.image_size)
    scores = all_scores(model, evaluator, test, args.guidance, args.captions, args.seed)
    if args.json:
        print(json.dumps(scores, indent=2))
    else:
        print_scores(scores)
