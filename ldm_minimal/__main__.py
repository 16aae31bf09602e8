"""The command line of ldm_minimal.

python -m ldm_minimal train      # data, three trainings, an image, scores; the same command resumes
python -m ldm_minimal sample "a red circle above a blue square"
python -m ldm_minimal evaluate --guidance 3 7.5
python -m ldm_minimal info
"""

from __future__ import annotations

import sys
import warnings

import torch

from . import evaluate, info, sample, train
from .cli import Parser

COMMANDS = {
    "train": (train, "train a whole model; the same command goes on with a stopped run"),
    "sample": (sample, "draw prompts with a trained model"),
    "evaluate": (evaluate, "score a trained model against held-out captions and images"),
    "info": (info, "parameters, bytes and operations of each part"),
}


def parser() -> Parser:
    """All commands and their options."""
    root = Parser(
        prog="ldm_minimal", description="Latent diffusion, built and trained in an afternoon."
    )
    commands = root.add_subparsers(dest="command", required=True, parser_class=Parser)
    for name, (module, help_text) in COMMANDS.items():
        module.add_arguments(commands.add_parser(name, help=help_text))
    return root


def _show_warning(message, *_args, **_kwargs) -> None:
    print(f"ldm_minimal: {message}", file=sys.stderr)


def main(argv: list[str] | None = None) -> int:
    """Run a command. Returns the exit status: 0, 1 for an error in one line, 130 after Ctrl-C."""
    args = parser().parse_args(argv)
    warnings.showwarning = _show_warning
    module, _ = COMMANDS[args.command]
    try:
        module.run(args)
    except (ValueError, OSError) as error:
        print(f"ldm_minimal {args.command}: {error}", file=sys.stderr)
        return 1
    except (torch.OutOfMemoryError, MemoryError) as error:
        reason = str(error).split("\n")[0]
        advice = "less at once (--count, --height, --batch-..., --accumulate) or --precision fp16"
        print(f"ldm_minimal {args.command}: out of memory; try {advice}: {reason}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nldm_minimal: stopped; a training goes on with the same command", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
