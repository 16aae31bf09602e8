"""python -m ldm_minimal train: the three trainings, an evaluator, images and scores.

A run's folder holds model/ and evaluator/ (safetensors, config, tokenizer), log.csv, images of what
it can do (clip, autoencoder, samples, neighbours), scores.json, README.md, run.json (what was
asked, what is done) and, until it is finished, state/, from which the same command goes on.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import dataclasses
import json
import math
import pathlib
import shutil
import signal
import time
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor, nn
from tqdm import tqdm

from .cli import add_seed, number
from .files import (
    best_device,
    data_folder,
    one_training_in,
    read_record,
    read_split,
    recover_folder,
    whole_file,
    whole_folder,
)
from .ldm import (
    CLIP,
    NAMED_SIZES,
    CaptionedImages,
    Config,
    LatentDiffusion,
    Tokenizer,
    compile_blocks,
    measure_scale_factor,
    save_state,
    train_autoencoder,
    train_clip,
    train_denoiser,
)
from .metrics import all_scores, image_features, load_lpips, print_scores
from .sample import save_sheet

STAGES = ("clip", "evaluator", "autoencoder", "denoiser")
TRAININGS = ("clip", "autoencoder", "denoiser")  # with own options; the evaluator is a clip
PROMPTS = [
    "a red circle above a blue square",
    "a small green star on a white background",
    "a large striped purple heart",
    "a yellow triangle to the left of a cyan cross",
    "a pink circle on a black background",
    "a checked orange star",
    "a little blue square below a red heart",
    "a green circle right of a yellow square, on a grey background",
]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `train`."""
    parser.add_argument("--size", choices=sorted(NAMED_SIZES), default="shapes")
    parser.add_argument(
        "--data",
        help="a folder of captioned images, with train/ and test/ (default: the size's own data "
        "set, drawn if it is not there)",
    )
    parser.add_argument(
        "--count",
        type=number(int, 20),
        help="draw so many images, into --data if it is new, else into a folder of their own "
        "(default: 20000 shapes, all emoji)",
    )
    parser.add_argument(
        "--out", help="folder of the run (default runs/SIZE); may be a mounted drive"
    )
    add_seed(parser)
    parser.add_argument("--precision", choices=["auto", "fp32", "bf16", "fp16"], default="auto")
    for training in TRAININGS:
        parser.add_argument(f"--steps-{training}", type=number(int, 1))
        parser.add_argument(f"--batch-{training}", type=number(int, 2))
        parser.add_argument(f"--rate-{training}", type=number(float, 0), help="peak learning rate")
    parser.add_argument(
        "--accumulate",
        type=number(int, 1, 64),
        help="compute each batch of autoencoder and denoiser in so many parts, for less memory",
    )
    parser.add_argument(
        "--perceptual",
        choices=["clip", "lpips"],
        default="clip",
        help="features of the autoencoder's perceptual loss: those of the model's own CLIP, or the "
        "published LPIPS, which python data/lpips/prepare.py fetches (default clip)",
    )
    parser.add_argument(
        "--compile",
        action="store_true",
        help="torch.compile the networks' blocks: a minute or more at first, then faster on a GPU; "
        "for trainings much longer than the recipe's",
    )
    parser.add_argument(
        "--save-every",
        type=number(float, 0),
        default=30,
        help="seconds between saved states (default 30)",
    )
    parser.add_argument(
        "--captions",
        type=number(int, 0),
        default=128,
        help="test captions to draw for the scores at the end (default 128)",
    )


def run(args: argparse.Namespace) -> None:
    """The command. Raises ValueError or OSError for what is wrong with its options."""
    config = config_from(args)
    if args.perceptual == "lpips":
        load_lpips()  # raises now rather than after two stages
    out = pathlib.Path(args.out or f"runs/{args.size}")
    accelerator = Accelerator(
        cpu=best_device() == "cpu", mixed_precision=mixed_precision(args.precision)
    )
    with accelerator.main_process_first():
        folder = data_folder(args.data, config.image_size, args.count, config.name)
    data = read_split(folder, "train", config.image_size).to(accelerator.device)
    test = None
    if (folder / "test").is_dir() and args.captions > 1:
        test = read_split(folder, "test", config.image_size)  # now, for what may be wrong with it
    if accelerator.device.type == "cuda":
        torch.set_float32_matmul_precision("high")  # Muon's products on the tensor cores
    check_batch_sizes(config, len(data), accelerator.num_processes)
    settings = {
        "seed": args.seed,
        "data": args.data if args.count is None else str(folder),
        "perceptual": args.perceptual,
        "number of processes": accelerator.num_processes,
        "precision": accelerator.mixed_precision,
        "config": json.loads(json.dumps(dataclasses.asdict(config))),
    }
    alone = one_training_in(out) if accelerator.is_main_process else contextlib.nullcontext()
    with alone:
        with accelerator.main_process_first():
            record = Run(out, settings, accelerator)
        model = load_or_build(record, config, data, args.seed).to(accelerator.device)
        for stage in STAGES:
            if stage not in record.done:
                # Seeds the first weights of evaluator and discriminator.
                torch.manual_seed(args.seed * len(STAGES) + STAGES.index(stage))
                train_stage(stage, record, model, data, args)
        if accelerator.is_main_process:
            shutil.rmtree(out / "state", ignore_errors=True)  # a kill may have left it
            model = LatentDiffusion.load(out / "model").to(accelerator.device)
            evaluator = CLIP.load(out / "evaluator").to(accelerator.device)
            report(out, model, evaluator, data, test, folder, args)
    accelerator.end_training()


def config_from(args: argparse.Namespace) -> Config:
    """The named size, with the steps, batch sizes and learning rates of the command line."""
    config = NAMED_SIZES[args.size]
    if config.image is None:
        raise ValueError(
            f"--size {args.size} is not trained here, it loads official checkpoints; trainable are "
            "'shapes' and 'emoji'"
        )
    options = vars(args)
    recipes = {}
    for training in TRAININGS:
        given = {
            "steps": options[f"steps_{training}"],
            "batch_size": options[f"batch_{training}"],
            "learning_rate": options[f"rate_{training}"],
            "grad_accum_steps": None if training == "clip" else args.accumulate,
        }
        given = {name: value for name, value in given.items() if value is not None}
        recipe = getattr(config, f"{training}_training")
        recipes[f"{training}_training"] = dataclasses.replace(recipe, **given)
    if args.perceptual == "lpips":
        config = dataclasses.replace(config, perceptual_weight=1.0)  # as in Rombach et al.
    # The discriminator joins, and is heard, after the same share of a longer or shorter training.
    share = recipes["autoencoder_training"].steps / config.autoencoder_training.steps
    return dataclasses.replace(
        config,
        discriminator_start=round(config.discriminator_start * share),
        discriminator_head_start=round(config.discriminator_head_start * share),
        **recipes,
    )


def mixed_precision(choice: str) -> str:
    """accelerate's name for a precision.

    auto: bf16 where the GPU computes in it (capability 8), fp16 on an older GPU, fp32 elsewhere.
    """
    if choice == "fp32" or (choice == "auto" and not torch.cuda.is_available()):
        return "no"
    if choice == "auto":
        return "bf16" if torch.cuda.get_device_capability()[0] >= 8 else "fp16"
    return choice


def check_batch_sizes(config: Config, count: int, num_processes: int) -> None:
    """Before the first stage, not after the second."""
    recipes = {
        "clip": config.clip_training,
        "autoencoder": config.autoencoder_training,
        "denoiser": config.denoiser_training,
    }
    for training, recipe in recipes.items():
        multiple = num_processes * recipe.grad_accum_steps
        if recipe.batch_size > count or recipe.batch_size % multiple:
            raise ValueError(
                f"--batch-{training} is {recipe.batch_size}; allowed are multiples of {multiple} "
                f"(processes x --accumulate), up to the {count} images"
            )


# ---- a run's folder ----------------------------------------------------------------------------


class Run:
    """A training's folder: its settings, its log, and the state from which a stopped run goes on.

    Raises ValueError for a folder that holds another run, or something else.
    """

    def __init__(self, out: pathlib.Path, settings: dict, accelerator: Accelerator):
        self.out = out
        self.accelerator = accelerator
        self.settings = settings
        self.done = []  # stages
        self.rows = []  # of log.csv
        if (out / "run.json").is_file():
            self._go_on()
        elif out.exists() and any(not path.name.startswith(".") for path in out.iterdir()):
            raise ValueError(
                f"--out {out} is not empty and holds no run of ours; choose another folder"
            )
        elif accelerator.is_main_process:
            self._write_record()

    def _go_on(self) -> None:
        record = read_record(self.out / "run.json")
        precision = self.settings["precision"]  # which older runs do not tell
        old = {"precision": precision, **record["settings"]}
        changed = [name for name, value in self.settings.items() if old.get(name) != value]
        if changed:
            raise ValueError(
                f"--out {self.out} holds a run with another {' and '.join(changed)}; give its own "
                "command again to go on with it, or another --out"
            )
        self.done = record["done"]
        if self.accelerator.is_main_process:
            for name in ("model", "evaluator", "state"):
                recover_folder(self.out / name)
        if (self.out / "log.csv").is_file():
            with open(self.out / "log.csv", newline="") as file:
                self.rows = list(csv.DictReader(file))

    def _write_record(self) -> None:
        with whole_file(self.out / "run.json") as partial:
            record = {"settings": self.settings, "done": self.done}
            partial.write_text(json.dumps(record, indent=2) + "\n")

    def begin(self, stage: str) -> pathlib.Path | None:
        """Start or go on with a stage. Returns the folder of the state to go on from, or None."""
        state = self.out / "state"
        step = 0
        if (state / f"{stage}.json").is_file():
            step = json.loads((state / "step.json").read_text())
        self.stage = stage
        earlier = STAGES[: STAGES.index(stage)]
        self.rows = [
            row
            for row in self.rows
            if row["stage"] in earlier or (row["stage"] == stage and int(row["step"]) <= step)
        ]
        seconds = [float(row["seconds"]) for row in self.rows if row["stage"] == stage]
        self.started = time.time() - (seconds[-1] if seconds else 0)
        return state if step else None

    def log(self, step: int, losses: dict[str, float]) -> None:
        row = {"stage": self.stage, "step": step, "seconds": round(time.time() - self.started, 1)}
        self.rows.append(row | {name: f"{value:.6g}" for name, value in losses.items()})

    def save(self, step: int) -> None:
        """The log so far, and all that the stage needs to go on after `step`."""
        if self.accelerator.is_main_process:
            self._write_log()
            with whole_folder(self.out / "state") as partial:
                save_state(self.accelerator, partial, step)
                (partial / f"{self.stage}.json").touch()

    def _write_log(self) -> None:
        columns = dict.fromkeys(["stage", "step", "seconds"])
        for row in self.rows:
            columns |= dict.fromkeys(row)
        with whole_file(self.out / "log.csv") as partial, open(partial, "w", newline="") as file:
            table = csv.DictWriter(file, list(columns), restval="")
            table.writeheader()
            table.writerows(self.rows)

    def finish(self, part: str, model: CLIP | LatentDiffusion) -> None:
        """Save the stage's result, then note that it is done: a kill in between loses nothing."""
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            with whole_folder(self.out / part) as partial:
                model.save(partial)
            self.done.append(self.stage)
            self._write_record()
            shutil.rmtree(self.out / "state", ignore_errors=True)
        self.accelerator.wait_for_everyone()


def drive(
    record: Run,
    training: Iterator[tuple[int, dict[str, Tensor]]],
    steps: int,
    save_every: float,
) -> None:
    """Run a training to its end: a progress bar, a log of each tenth step, saved states.

    Ctrl-C takes effect at the end of a step, so that the saved state is that of a whole number of
    steps; a second Ctrl-C takes effect at once.
    """
    stop = []

    def on_ctrl_c(signal_number: int, frame: object) -> None:
        if stop:
            signal.default_int_handler(signal_number, frame)
        stop.append(True)

    previous_handler = signal.signal(signal.SIGINT, on_ctrl_c)
    hidden = not record.accelerator.is_main_process
    bar = tqdm(total=steps, desc=f"{record.stage:<11}", unit="step", disable=hidden)
    saved = time.time()
    try:
        for step, losses in training:
            if bar.n == 0 and step > 1:  # a run that goes on
                bar.initial = bar.n = step - 1
            bar.update()
            log_now = step % 10 == 0 or step == steps
            save_now = bool(stop) or step == steps or time.time() - saved > save_every
            if log_now or save_now:
                losses = {name: value.item() for name, value in losses.items()}
                check_finite(losses, record.stage, step)
                shown = {name: f"{value:.3g}" for name, value in losses.items()}
                bar.set_postfix(shown, refresh=False)
            if log_now:
                record.log(step, losses)
            if save_now:
                record.save(step)
                saved = time.time()
            if stop:
                raise KeyboardInterrupt
    finally:
        signal.signal(signal.SIGINT, previous_handler)
        bar.close()


def check_finite(losses: dict[str, float], stage: str, step: int) -> None:
    """Raises ValueError for a loss that is infinite or not a number."""
    if not all(math.isfinite(value) for value in losses.values()):
        raise ValueError(
            f"the loss of stage {stage} is not finite at step {step}: {losses}; try a smaller "
            "learning rate, and another --out"
        )


# ---- the stages --------------------------------------------------------------------------------


def load_or_build(record: Run, config: Config, data: CaptionedImages, seed: int) -> LatentDiffusion:
    """The model of the last finished stage, or a new one with its tokenizer."""
    if record.done:
        return LatentDiffusion.load(record.out / "model")
    torch.manual_seed(seed)
    model = LatentDiffusion(config)
    model.tokenizer = Tokenizer.train(data.captions, config.text.vocab_size, config.text.length)
    return model


def train_stage(
    stage: str, record: Run, model: LatentDiffusion, data: CaptionedImages, args: argparse.Namespace
) -> None:
    """Train one of STAGES, save its result and an image of what it can do."""
    options = {
        "seed": args.seed,
        "accelerator": record.accelerator,
        "resume_from": record.begin(stage),
    }
    clip = CLIP(model.tokenizer, model.text_encoder, model.image_encoder)
    if stage == "evaluator":
        # Other weights and other batches than the model's own CLIP. No training uses it.
        clip = CLIP.build(model.config.text, model.config.image)
        clip.tokenizer = model.tokenizer
        options["seed"] = args.seed + 1_000_003
    if stage in ("clip", "evaluator"):
        trained = clip
        recipe = model.config.clip_training
        options["text_lr_scale"] = model.config.clip_text_lr_scale
        training = train_clip(clip, data, recipe, **options)
    elif stage == "autoencoder":
        trained = nn.ModuleList([model.autoencoder, model.image_encoder])  # and the loss's features
        recipe = model.config.autoencoder_training
        if args.perceptual == "lpips":
            options["perceptual"] = load_lpips(model.device)
        training = train_autoencoder(model, data, recipe, **options)
    else:
        trained = model.unet
        recipe = model.config.denoiser_training
        training = train_denoiser(model, data, recipe, **options)
    if args.compile:
        compile_blocks(trained)
    drive(record, training, recipe.steps, args.save_every)
    if args.compile:  # what follows has other shapes, each of which would be compiled, too
        for part in trained.modules():
            part._compiled_call_impl = None
    if stage == "autoencoder":
        measure_scale_factor(model, data, args.seed)
    if record.accelerator.is_main_process:
        stage_image(stage, record.out, model, data)
    if stage == "evaluator":
        record.finish("evaluator", clip)
    else:
        record.finish("model", model)


@torch.no_grad()
def stage_image(
    stage: str, out: pathlib.Path, model: LatentDiffusion, data: CaptionedImages
) -> None:
    """What the stage can do now: captions it finds, images it restores, prompts it draws."""
    x = data.batch(slice(0, 8)).to(model.device)
    if stage == "clip":
        clip = CLIP(model.tokenizer, model.text_encoder, model.image_encoder)
        candidates = data.captions[:100]
        text_features = clip.text_features(model.tokenizer(candidates).to(model.device))
        best = (clip.image_features(x) @ text_features.T).argmax(dim=1).tolist()
        save_sheet(out / "clip.png", x, [f"found: {candidates[i]}" for i in best])
    elif stage == "autoencoder":
        x_hat, _ = model.autoencoder(x)
        labels = ["original"] * len(x) + ["restored"] * len(x)
        save_sheet(out / "autoencoder.png", torch.cat([x, x_hat]), labels, columns=8)
    elif stage == "denoiser":
        prompts = example_prompts(data)
        generator = torch.Generator().manual_seed(0)
        drawn = model.generate(prompts, guidance=5.0, generator=generator)
        save_sheet(out / "samples.png", drawn, prompts)


# ---- at the end --------------------------------------------------------------------------------


def report(
    out: pathlib.Path,
    model: LatentDiffusion,
    evaluator: CLIP,
    data: CaptionedImages,
    test: CaptionedImages | None,
    folder: pathlib.Path,
    args: argparse.Namespace,
) -> None:
    """Write neighbours.png, the card README.md and scores.json, and say where everything is."""
    nearest_neighbours(out / "neighbours.png", model, evaluator, data)
    with whole_file(out / "README.md") as partial:
        partial.write_text(model_card(model.config, folder, args.seed), encoding="utf-8")
    print(f"\nmodel    {out / 'model'}, its card {out / 'README.md'}")
    print(f"images   {out / 'clip.png'}, {out / 'autoencoder.png'}, {out / 'samples.png'}")
    print(f"copying? {out / 'neighbours.png'}: samples, and the training images most like them")
    print(f"losses   {out / 'log.csv'}")
    if test is not None:
        scores = all_scores(model, evaluator, test, [5.0], args.captions, args.seed)
        with whole_file(out / "scores.json") as partial:
            partial.write_text(json.dumps(scores, indent=2) + "\n")
        print(f"scores   {out / 'scores.json'}")
        print_scores(scores)
    prompt = example_prompts(data)[0]
    print(f'draw your own: python -m ldm_minimal sample "{prompt}" --model {out}')


def example_prompts(data: CaptionedImages) -> list[str]:
    """Eight prompts for our own scenes; for other images, the captions of the first eight."""
    return PROMPTS if "scene" in data.rows[0] else data.captions[:8]


@torch.no_grad()
def nearest_neighbours(
    path: pathlib.Path,
    model: LatentDiffusion,
    evaluator: CLIP,
    data: CaptionedImages,
    count: int = 12,
) -> None:
    """Samples, and under each the training image that the evaluator finds most like it: a copy?"""
    chosen = torch.linspace(0, len(data) - 1, min(count, len(data))).long().tolist()
    prompts = [data.captions[i] for i in chosen]
    drawn = model.generate(prompts, guidance=5.0, generator=torch.Generator().manual_seed(1))
    known = []
    for i in range(0, len(data), 256):
        x = data.batch(slice(i, i + 256)).to(model.device)
        known.append(F.normalize(image_features(evaluator, x), dim=-1))
    similarity = F.normalize(image_features(evaluator, drawn), dim=-1) @ torch.cat(known).T
    nearest = similarity.argmax(dim=1).cpu()
    x = torch.cat([drawn, data.batch(nearest).to(drawn)])
    captions = prompts + [f"nearest: {data.captions[i]}" for i in nearest]
    save_sheet(path, x, captions, columns=len(prompts))


def model_card(config: Config, folder: pathlib.Path, seed: int) -> str:
    """What a model is, how it was made, and whose images it was trained on, as Markdown."""
    record = folder / "dataset.json"
    dataset = json.loads(record.read_text(encoding="utf-8")) if record.is_file() else {}
    recipes = {
        "clip": config.clip_training,
        "autoencoder": config.autoencoder_training,
        "denoiser": config.denoiser_training,
    }
    trainings = [f"{name} {r.steps:,} steps of {r.batch_size}" for name, r in recipes.items()]
    lines = [
        f"# A latent diffusion model of size `{config.name}`",
        "",
        f"Trained by ldm_minimal on `{folder}`, seed {seed}: {', '.join(trainings)}.",
        f"Images of {config.image_size} x {config.image_size}, "
        f"scale factor {config.scale_factor:.4f}. Losses in log.csv; scores, if any, "
        "in scores.json.",
    ]
    if "attribution" in dataset:
        lines += [
            "",
            f"The images: {dataset['attribution']}. What is made of them is to be shared alike: "
            f"{dataset['licence']}.",
        ]
    return "\n".join(lines) + "\n"
