"""The command line of ldm_minimal: train · sample · evaluate · info.

    python -m ldm_minimal train                                   # data, three trainings, a picture, scores; resumes
    python -m ldm_minimal sample "a red circle above a blue square"
    python -m ldm_minimal evaluate --guidance 3 7.5
    python -m ldm_minimal info

A run's folder holds model/ and judge/ (safetensors, config, tokenizer), log.csv, a picture for each stage, scores.json,
run.json (what was asked, what is done) and, until it is finished, resume.pt, from which the same command goes on.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import importlib
import importlib.util
import json
import math
import os
import pathlib
import signal
import sys
import time
import warnings

import numpy as np
import torch
from accelerate import Accelerator
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from . import stable_diffusion
from .ldm import (CLIP, NAMED_SIZES, Attention, CaptionedImages, Config, LatentDiffusion, PerceptualLoss, Tokenizer,
                  measure_scale_factor, train_autoencoder, train_clip, train_denoiser)

REPOSITORY = pathlib.Path(__file__).resolve().parent.parent
SHIPPED = REPOSITORY / "data" / "checkpoints" / "shapes"
PROMPTS = ["a red circle above a blue square", "a small green star on a white background", "a large striped purple heart",
           "a yellow triangle to the left of a cyan cross", "a pink circle on a black background", "a checked orange star",
           "a little blue square below a red heart", "a green circle right of a yellow square, on a grey background"]
STAGES = ("clip", "judge", "autoencoder", "denoiser")


# ------------------------------------------------------------------------------------------------------- pictures ----


def to_image(x: Tensor) -> Image.Image:
    """x (3, H, W) in [-1, 1] -> a PIL picture."""
    return Image.fromarray(((x.clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 0).cpu().numpy())


def picture_grid(x: Tensor, captions: list[str], columns: int, tile: int = 160) -> Image.Image:
    """Pictures in rows of `columns`, each about `tile` wide with its caption under it. x: (N, 3, H, W) in [-1, 1]."""
    factor = max(1, round(tile / x.shape[-1]))
    high, wide = factor * x.shape[-2], factor * x.shape[-1]
    font, line, pad = ImageFont.load_default(size=12), 15, 8
    lines = [wrap(caption, font, wide) for caption in captions]
    height = high + line * max(map(len, lines)) + pad
    columns = min(columns, len(x))
    sheet = Image.new("RGB", (columns * (wide + pad) + pad, math.ceil(len(x) / columns) * (height + pad) + pad), "white")
    pen = ImageDraw.Draw(sheet)
    for i, (picture, text) in enumerate(zip(x, lines)):
        left, top = pad + (i % columns) * (wide + pad), pad + (i // columns) * (height + pad)
        sheet.paste(to_image(picture).resize((wide, high), Image.Resampling.NEAREST), (left, top))
        pen.rectangle((left - 1, top - 1, left + wide, top + high), outline="#bbbbbb")
        for row, words in enumerate(text):
            pen.text((left, top + high + 3 + row * line), words, fill="#222222", font=font)
    return sheet


def wrap(text: str, font: ImageFont.ImageFont, width: int) -> list[str]:
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        lines[-1:] = [longer] if font.getlength(longer) <= width else [lines[-1], word]
    return lines


def write_whole(path: pathlib.Path, write) -> None:
    """Let `write` fill a file beside `path`, then rename it into place: nothing half-written stays."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.stem}.partial{path.suffix}")
    try:
        write(partial)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def save_grid(path: pathlib.Path, x: Tensor, captions: list[str], columns: int = 4) -> None:
    sheet = picture_grid(x, captions, columns)
    write_whole(path, lambda partial: sheet.save(partial))


# ----------------------------------------------------------------------------------------------------------- data ----


def data_module(dataset: str, name: str):
    """data/{dataset}/{name}.py of this repository: it is reached by path, being no part of the package."""
    path = REPOSITORY / "data" / dataset / f"{name}.py"
    if not path.is_file():
        raise ValueError(f"{path} is not there; `train` without --data and `evaluate` need a clone of the repository")
    if dataset == "shapes":  # whose oracle imports its neighbour
        if str(path.parent) not in sys.path:
            sys.path.insert(0, str(path.parent))
        return importlib.import_module(name)
    spec = importlib.util.spec_from_file_location(f"{dataset}_{name}", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    try:
        spec.loader.exec_module(module)
    except SystemExit as missing:  # a package that only this data set needs
        raise ValueError(str(missing)) from None
    return module


def data_folder(data: str | None, size: int, count: int | None = None, dataset: str = "shapes") -> pathlib.Path:
    """The folder of the data set: a given one as it is, if it exists; else `count` pictures of `dataset` (20,000 shapes, all
    emoji), drawn if they are not there."""
    folder = pathlib.Path(data) if data else REPOSITORY / "data" / dataset / str(size)
    given = data is not None and folder.exists()
    if given and count is None:
        return folder
    prepare = data_module(dataset, "prepare")
    found = prepare.recorded(folder) or {}
    if folder.exists() and count not in (None, found.get("count")):
        held = f"{found['count']:,} pictures" if found.get("count") else "other data"
        raise ValueError(f"--count is {count}, but {folder} holds {held}; leave --count out, or name a new folder with --data")
    if not given:
        if not found:
            print(f"drawing captioned pictures into {folder}", file=sys.stderr)
        count = count or found.get("count", 20000 if dataset == "shapes" else None)
        prepare.prepare(folder, size=size, count=count, seed=0)  # nothing to do if they are there already
    return folder


def read_split(folder: pathlib.Path, split: str, size: int) -> CaptionedImages:
    """train/ or test/ of a data set; a folder with neither is a training set of its own."""
    if split == "train" and not (folder / split).is_dir():
        return CaptionedImages(folder, size, progress=True)
    return CaptionedImages(folder / split, size, progress=True)


# ---------------------------------------------------------------------------------------------------------- train ----


class Run:
    """A training's folder: its settings, its log, and the state from which a killed run goes on."""

    def __init__(self, out: pathlib.Path, settings: dict, accelerator: Accelerator):
        self.out, self.main, self.parts, self.rows = out, accelerator.is_main_process, {}, []
        self.scaler = {"scaler": accelerator.scaler} if accelerator.scaler else {}  # of fp16's losses
        self.progress = {"settings": settings, "done": []}
        marker = out / "run.json"
        if marker.is_file():
            found = read_json(marker)
            changed = [name for name in settings if found["settings"].get(name) != settings[name]]
            if changed:
                raise ValueError(f"--out {out} holds a run with another {' and '.join(changed)}; give its own command again to go on "
                                 "with it, or another --out")
            self.progress = found
        elif out.exists() and any(not path.name.startswith(".") for path in out.iterdir()):
            raise ValueError(f"--out {out} is not empty and holds no run of ours; choose another folder")
        elif self.main:
            out.mkdir(parents=True, exist_ok=True)
            self.write_marker()
        if (out / "log.csv").is_file():
            with open(out / "log.csv", newline="") as file:
                self.rows = list(csv.DictReader(file))

    def write_marker(self) -> None:
        write_whole(self.out / "run.json", lambda partial: partial.write_text(json.dumps(self.progress, indent=2)))

    def done(self, stage: str) -> bool:
        return stage in self.progress["done"]

    def resume(self, stage: str):
        """What a training stage calls: takes its stateful parts, loads a killed run's state, returns the step to go on at."""
        def load(parts: dict) -> int:
            self.stage, self.parts, step = stage, {**parts, **self.scaler}, 0
            if (self.out / "resume.pt").is_file():
                state = read_state(self.out / "resume.pt")
                if state["stage"] == stage:
                    step = state["step"]
                    for name in self.parts.keys() & state["parts"].keys():  # the scaler is there in fp16 only
                        self.parts[name].load_state_dict(state["parts"][name])
            before = STAGES.index(stage)
            self.rows = [r for r in self.rows if STAGES.index(r["stage"]) < before
                         or (r["stage"] == stage and int(r["step"]) <= step)]
            last = self.rows[-1] if self.rows and self.rows[-1]["stage"] == stage else {"seconds": 0}
            self.started = time.time() - float(last["seconds"])
            return step
        return load

    def log(self, step: int, losses: dict[str, float]) -> None:
        self.rows.append({"stage": self.stage, "step": step, "seconds": round(time.time() - self.started, 1),
                          **{name: f"{value:.6g}" for name, value in losses.items()}})

    def save(self, step: int) -> None:
        """Everything the stage needs to go on from `step`, and the log so far."""
        if self.main:
            state = {"stage": self.stage, "step": step, "parts": {n: p.state_dict() for n, p in self.parts.items()}}
            self.write_log()
            write_whole(self.out / "resume.pt", lambda partial: torch.save(state, partial))

    def write_log(self) -> None:
        names = ["stage", "step", "seconds", *dict.fromkeys(k for row in self.rows for k in row if k not in ("stage", "step", "seconds"))]

        def write(partial: pathlib.Path) -> None:
            with open(partial, "w", newline="") as file:
                table = csv.DictWriter(file, names, restval="")
                table.writeheader()
                table.writerows(self.rows)
        write_whole(self.out / "log.csv", write)

    def finish(self, stage: str, steps: int, save) -> None:
        """Keep the last state, `save` the stage's result, then note that it is done: a kill in between loses nothing."""
        if self.main:
            self.save(steps)
            save()
            self.progress["done"].append(stage)
            self.write_marker()
            (self.out / "resume.pt").unlink(missing_ok=True)


def read_json(path: pathlib.Path) -> dict:
    try:
        found = json.loads(path.read_text())
        return found | {"settings": found["settings"] | {}, "done": list(found["done"])}
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{path} is no record of a run of ours") from None


def read_state(path: pathlib.Path) -> dict:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception:  # torch raises many kinds
        raise ValueError(f"{path} cannot be read; remove it to start the stage again") from None


def drive(run: Run, stage: str, training, steps: int, save_every: float) -> None:
    """Run a training generator to its end behind a progress bar; log every tenth step, save the state now and then.

    Ctrl-C is heard at the end of a step, so that the saved state is that of a whole number of steps; a second one at once.
    """
    bar, saved, stop = None, time.time(), []
    ctrl_c = signal.signal(signal.SIGINT, lambda *_: stop.append(True) if not stop else signal.default_int_handler(*_))
    try:
        for step, losses in training:
            bar = bar or tqdm(total=steps, initial=step - 1, desc=f"{stage:<11}", unit="step", disable=not run.main)
            bar.update()
            due = stop or time.time() - saved > save_every
            if step % 10 == 0 or step == steps or due:
                losses = {name: value.item() for name, value in losses.items()}
                if not all(map(math.isfinite, losses.values())):
                    raise ValueError(f"the loss of stage {stage} is not finite at step {step}: {losses}; try a smaller learning rate")
                bar.set_postfix({name: f"{value:.3g}" for name, value in losses.items()}, refresh=False)
            if step % 10 == 0 or step == steps:
                run.log(step, losses)
            if due:
                run.save(step)
                saved = time.time()
            if stop:
                break
        if stop:
            raise KeyboardInterrupt
    finally:
        signal.signal(signal.SIGINT, ctrl_c)
        if bar is not None:
            bar.close()


def sized_config(args: argparse.Namespace) -> Config:
    """The named size, with the steps, batch sizes and learning rates given on the command line."""
    config = NAMED_SIZES[args.size]
    if config.image is None:
        raise ValueError(f"--size {args.size} is not trained here, it loads official checkpoints; trainable are 'shapes' and 'emoji'")
    for stage in ("clip", "autoencoder", "denoiser"):
        given = {"steps": getattr(args, f"steps_{stage}"), "batch": getattr(args, f"batch_{stage}"),
                 "learning_rate": getattr(args, f"rate_{stage}")}
        given["parts"] = None if stage == "clip" else args.accumulate
        recipe = dataclasses.replace(getattr(config, f"{stage}_stage"), **{k: v for k, v in given.items() if v is not None})
        config = dataclasses.replace(config, **{f"{stage}_stage": recipe})
    share = config.autoencoder_stage.steps / NAMED_SIZES[args.size].autoencoder_stage.steps  # a longer training waits longer
    return dataclasses.replace(config, adversarial_start=round(config.adversarial_start * share))


def mixed_precision(choice: str) -> str:
    """auto: bf16 where the GPU has it in hardware (compute capability 8), fp16 on older ones, fp32 elsewhere."""
    if choice == "auto":
        if not torch.cuda.is_available():
            return "no"
        return "bf16" if torch.cuda.get_device_capability()[0] >= 8 else "fp16"
    return {"fp32": "no"}.get(choice, choice)


def train(args: argparse.Namespace) -> None:
    config = sized_config(args)
    accelerator = Accelerator(cpu=best_device() == "cpu", mixed_precision=mixed_precision(args.precision),
                              dynamo_backend="inductor" if args.compile else None)
    out = pathlib.Path(args.out or f"runs/{args.size}")
    settings = {"seed": args.seed, "data": args.data, "config": json.loads(json.dumps(dataclasses.asdict(config)))}
    with accelerator.main_process_first():
        folder = data_folder(args.data, config.image_size, args.count, config.name)
    data = read_split(folder, "train", config.image_size)
    data.images = data.images.to(accelerator.device)  # all of them: nothing waits for a picture
    check_batches(config, len(data), accelerator.num_processes)
    with accelerator.main_process_first():
        run = Run(out, settings, accelerator)
    model = start_or_load(run, config, data, args.seed).to(accelerator.device)
    shared = dict(seed=args.seed, accelerator=accelerator)
    for stage in STAGES:
        if not run.done(stage):
            torch.manual_seed(args.seed * len(STAGES) + STAGES.index(stage))  # first weights of judge and discriminator
            train_stage(stage, run, model, data, shared, args.save_every)
    if accelerator.is_main_process:
        (out / "resume.pt").unlink(missing_ok=True)  # a kill may have left it
        final_report(out, LatentDiffusion.load(out / "model").to(accelerator.device), data, folder, args)
    accelerator.end_training()


def check_batches(config: Config, count: int, processes: int) -> None:
    """Before the first stage, not after the second."""
    for stage in ("clip", "autoencoder", "denoiser"):
        recipe = getattr(config, f"{stage}_stage")
        if recipe.batch > count or recipe.batch % (processes * recipe.parts):
            parts = f" times --accumulate {recipe.parts}" * (recipe.parts > 1)
            raise ValueError(f"--batch-{stage} is {recipe.batch}; allowed are multiples of the {processes} processes{parts}, up to the {count} pictures")


def start_or_load(run: Run, config: Config, data: CaptionedImages, seed: int) -> LatentDiffusion:
    """The model of the last finished stage, or a new one with its tokenizer."""
    if run.progress["done"]:
        return LatentDiffusion.load(run.out / "model")
    torch.manual_seed(seed)
    model = LatentDiffusion(config)
    model.tokenizer = Tokenizer.train(data.captions, config.text.vocab_size, config.text.length)
    return model


def train_stage(stage: str, run: Run, model: LatentDiffusion, data: CaptionedImages, shared: dict, save_every: float) -> None:
    config, resume = model.config, run.resume(stage)
    if stage in ("clip", "judge"):
        recipe = config.clip_stage
        if stage == "clip":
            clip = CLIP(model.tokenizer, model.text_encoder, model.image_encoder)
        else:  # another seed in weights and in batches; no training uses it, evaluation does
            clip = CLIP.build(config.text, config.image)
            clip.tokenizer, shared = model.tokenizer, {**shared, "seed": shared["seed"] + 1_000_003}
        training = train_clip(clip, data, recipe, resume=resume, **shared)
    elif stage == "autoencoder":
        recipe = config.autoencoder_stage
        training = train_autoencoder(model, data, recipe, resume=resume, **shared)
    else:
        recipe = config.denoiser_stage
        training = train_denoiser(model, data, recipe, resume=resume, **shared)
    drive(run, stage, training, recipe.steps, save_every)
    if stage == "autoencoder":
        measure_scale_factor(model, data, shared["seed"])
    if run.main:
        stage_picture(stage, run.out, model, clip if stage in ("clip", "judge") else None, data)
    shared["accelerator"].wait_for_everyone()  # nobody still reads the state that is now removed
    run.finish(stage, recipe.steps, (lambda: clip.save(run.out / "judge")) if stage == "judge" else (lambda: model.save(run.out / "model")))
    shared["accelerator"].wait_for_everyone()


@torch.no_grad()
def stage_picture(stage: str, out: pathlib.Path, model: LatentDiffusion, clip: CLIP | None, data: CaptionedImages) -> None:
    """What the stage can do now: captions it finds, pictures it restores, prompts it draws."""
    device, some = next(model.parameters()).device, slice(0, 8)
    x, captions = data.pictures(some).to(device), data.captions[some]
    if stage == "clip":
        many = data.captions[:100]
        best = (clip.image_features(x) @ clip.text_features(model.tokenizer(many).to(device)).T).argmax(dim=1).tolist()
        save_grid(out / "clip.png", x, [f"found: {many[i]}" for i in best])
    elif stage == "autoencoder":
        save_grid(out / "autoencoder.png", torch.cat([x, model.autoencoder(x)[0]]),
                  ["original"] * len(x) + ["restored"] * len(x), columns=8)
    elif stage == "denoiser":
        prompts = PROMPTS if model.config.name == "shapes" else captions
        save_grid(out / "samples.png", model.generate(prompts, guidance=5.0, generator=torch.Generator().manual_seed(0)), prompts)


def final_report(out: pathlib.Path, model: LatentDiffusion, data: CaptionedImages, folder: pathlib.Path, args: argparse.Namespace) -> None:
    judge = CLIP.load(out / "judge").to(model.device)
    neighbours(out / "neighbours.png", model, judge, data)
    write_whole(out / "README.md", lambda partial: partial.write_text(card(model.config, folder, args), encoding="utf-8"))
    print(f"\nmodel    {out / 'model'}, its card {out / 'README.md'}\npictures {out / 'clip.png'}, {out / 'autoencoder.png'}, {out / 'samples.png'}\n"
          f"copying? {out / 'neighbours.png'}: samples above, the training pictures most like them below\nlosses   {out / 'log.csv'}")
    if (folder / "test").is_dir() and args.captions > 1:
        print(f"scores   {out / 'scores.json'}")
        scores = all_scores(model, judge, folder, [5.0], args.captions, args.seed)
        write_whole(out / "scores.json", lambda partial: partial.write_text(json.dumps(scores, indent=2) + "\n"))
        print_scores(scores)
    prompt = "a red circle above a blue square" if model.config.name == "shapes" else data.captions[0]
    print(f'draw your own: python -m ldm_minimal sample "{prompt}" --model {out}')


@torch.no_grad()
def neighbours(path: pathlib.Path, model: LatentDiffusion, judge: CLIP, data: CaptionedImages, count: int = 12) -> None:
    """Samples, and under each the training picture nearest to it in the judge's eyes: is it copying?"""
    rows = torch.linspace(0, len(data) - 1, min(count, len(data))).long()
    prompts = [data.captions[i] for i in rows]
    drawn = model.generate(prompts, guidance=5.0, generator=torch.Generator().manual_seed(1))
    unit = lambda x: torch.nn.functional.normalize(features(judge, x), dim=-1)  # noqa: E731
    known = torch.cat([unit(data.pictures(slice(i, i + 256)).to(model.device)) for i in range(0, len(data), 256)])
    nearest = (unit(drawn) @ known.T).argmax(dim=1).cpu()
    x = torch.cat([drawn, data.pictures(nearest).to(drawn)])
    save_grid(path, x, prompts + [f"nearest: {data.captions[i]}" for i in nearest], columns=len(prompts))


def card(config: Config, folder: pathlib.Path, args: argparse.Namespace) -> str:
    """What a model is, how it was made, and whose pictures it learnt from."""
    record = folder / "dataset.json"
    made = json.loads(record.read_text(encoding="utf-8")) if record.is_file() else {}
    stages = ", ".join(f"{stage} {recipe.steps:,} steps of {recipe.batch}" for stage, recipe in (
        ("clip", config.clip_stage), ("autoencoder", config.autoencoder_stage), ("denoiser", config.denoiser_stage)))
    lines = [f"# A latent diffusion model of size `{config.name}`", "", f"Trained by ldm_minimal on `{folder}`, seed {args.seed}: {stages}.",
             f"Pictures of {config.image_size} x {config.image_size}, scale factor {config.scale_factor:.4f}. Losses in log.csv, scores in scores.json."]
    if "attribution" in made:
        lines += ["", f"The pictures: {made['attribution']}. What is made of them is to be shared alike: {made['licence']}."]
    return "\n".join(lines) + "\n"


# --------------------------------------------------------------------------------------------------------- sample ----


def load_part(folder: str | os.PathLike, part: str, kind: type):
    """`part` (model or judge) of a run's folder, or of a folder that is itself a saved model."""
    folder = pathlib.Path(folder)
    if not folder.is_dir():
        raise ValueError(f"--model {folder} is not a folder" if folder.exists() else f"--model {folder} does not exist")
    marker = folder / "run.json"
    if part == "model" and marker.is_file() and "denoiser" not in read_json(marker)["done"]:
        raise ValueError(f"--model {folder} is a run that is not finished; its `train` command goes on with it")
    return kind.load(folder if part == "model" and (folder / "config.json").is_file() else folder / part)


PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def best_device() -> str:
    return "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"


def load_model(model: str | os.PathLike, *, precision: str = "fp32", tokenizer: str | None = None, device: str | None = None) -> LatentDiffusion:
    """A run's folder, a saved model, or Stable Diffusion 1: a .safetensors or .ckpt file, or a `diffusers` folder."""
    path, device, dtype = pathlib.Path(model), device or best_device(), PRECISIONS[precision]
    if path.is_file() or (path / "model_index.json").is_file():
        return stable_diffusion.load(path, dtype=dtype, device=device, tokenizer=tokenizer, progress=device != "meta")
    if tokenizer:
        raise ValueError(f"--tokenizer is for files of Stable Diffusion; --model {path} has its own")
    return load_part(path, "model", LatentDiffusion).to(device, dtype)


def sample(args: argparse.Namespace) -> None:
    if not all(prompt.strip() for prompt in args.prompts):
        raise ValueError('an empty prompt; say what to draw, for example "a red circle above a blue square"')
    out = pathlib.Path(args.out)
    if out.suffix.lower() not in (".png", ".jpg", ".jpeg", ".webp"):
        raise ValueError(f"--out {out} must end in .png, .jpg or .webp")
    check_writable(out)
    model = load_model(args.model, precision=args.precision, tokenizer=args.tokenizer)
    if args.precision != "fp32" and model.device.type == "cpu":
        print(f"ldm_minimal: on a CPU {args.precision} halves the memory, and may take several times as long as fp32", file=sys.stderr)
    started, side, prompts = time.time(), model.config.image_size, [prompt for prompt in args.prompts for _ in range(args.count)]
    path = model.denoise(prompts, steps=args.steps, guidance=args.guidance, negative=args.negative,
                         size=(args.height or side, args.width or side), generator=torch.Generator().manual_seed(args.seed))
    with tqdm(path, total=args.steps, desc="denoising", unit="step", leave=False) as bar, torch.no_grad():
        for _, z, _ in bar:
            pass
        x = model.decode(z)
    save_grid(out, x, prompts) if len(x) > 1 else save_single(out, x[0])
    print(f"{out}  {len(x)} picture{'s' * (len(x) > 1)} of {x.shape[-1]} x {x.shape[-2]}, {time.time() - started:.1f} s")


def save_single(path: pathlib.Path, x: Tensor) -> None:
    """One picture; small ones are enlarged by a whole number to about 256 pixels, to be seen."""
    picture, factor = to_image(x), max(1, 256 // x.shape[-1])
    picture = picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST)
    write_whole(path, lambda partial: picture.save(partial))


def check_writable(out: pathlib.Path) -> None:
    """Before the long work, not after it."""
    if out.is_dir():
        raise ValueError(f"--out {out} is a folder; a file name is needed")
    write_whole(out.with_name(f".{out.name}.try"), lambda partial: partial.touch())
    out.with_name(f".{out.name}.try").unlink()


# ------------------------------------------------------------------------------------------------------- evaluate ----


@torch.no_grad()
def all_scores(model: LatentDiffusion, judge: CLIP, folder: pathlib.Path, guidances: list[float], count: int, seed: int) -> dict:
    """Every score of the model on the first `count` test pictures and their captions; one entry of "guidance" each."""
    test = read_split(folder, "test", model.config.image_size)
    count = min(count, len(test))
    x, rows = test.pictures(slice(0, count)).to(model.device), test.rows[:count]
    x_hat = torch.cat([model.decode(model.encode(part)) for part in x.split(128)])
    perceptual = PerceptualLoss(judge.image_encoder.features)
    psnr = -10 * torch.log10(((x - x_hat) / 2).square().mean(dim=(1, 2, 3)))
    rest = test.pictures(slice(count, None)).to(model.device)  # pictures that no score below has drawn
    reference = features(judge, rest) if len(rest) > 1 else None
    scores = {"captions": count, "steps": 50, "seed": seed, "psnr": psnr.mean().item(),
              "perceptual": torch.cat([perceptual(a, b) for a, b in zip(x.split(128), x_hat.split(128))]).mean().item(),
              "ceiling": accuracy(x_hat, rows), "clip_score_real": clip_score(judge, x, rows),
              "frechet_floor": frechet(features(judge, x), reference), "retrieval_real": retrieval(judge, x, rows), "guidance": {}}
    for w in guidances:
        drawn = draw_captions(model, [row["text"] for row in rows], w, seed)
        scores["guidance"][f"{w:g}"] = {"accuracy": accuracy(drawn, rows), "clip_score": clip_score(judge, drawn, rows),
                                        "frechet": frechet(features(judge, drawn), reference), "retrieval": retrieval(judge, drawn, rows)}
    return scores


def draw_captions(model: LatentDiffusion, captions: list[str], guidance: float, seed: int, batch: int = 64) -> Tensor:
    generator, pictures = torch.Generator().manual_seed(seed), []
    for i in tqdm(range(0, len(captions), batch), desc=f"drawing captions, guidance {guidance:g}", unit="batch", leave=False):
        pictures.append(model.generate(captions[i:i + batch], guidance=guidance, generator=generator))
    return torch.cat(pictures)


def accuracy(x: Tensor, rows: list[dict]) -> dict[str, float] | None:
    """Prompt accuracy by the oracle: the share of pictures in which every stated attribute holds, and each attribute's.

    None where the captions are not those of the shapes data set, which is all the oracle can read.
    """
    if "scene" not in rows[0]:
        return None
    grade = data_module("shapes", "oracle").grade
    pictures = ((x.clamp(-1, 1) + 1) / 2).permute(0, 2, 3, 1).cpu().numpy()
    grades = [grade(picture, row["text"]) for picture, row in zip(pictures, rows)]
    split = lambda name: [all(g.values()) for g, row in zip(grades, rows) if row["split"] == name]  # noqa: E731
    result = {"all": [all(g.values()) for g in grades], "seen pairs": split("test"), "composition": split("composition")}
    for g in grades:
        for name, holds in g.items():
            result.setdefault(name.split()[0], []).append(holds)
    return {name: sum(values) / len(values) for name, values in result.items() if values}


def features(judge: CLIP, x: Tensor) -> Tensor:
    return torch.cat([judge.image_encoder(part) for part in x.split(256)])


def clip_score(judge: CLIP, x: Tensor, rows: list[dict]) -> float:
    """Mean cosine, times 100, of pictures and captions in the judge's eyes."""
    tokens = judge.tokenizer([row["text"] for row in rows]).to(x.device)
    images = torch.nn.functional.normalize(features(judge, x), dim=-1)
    return 100 * (images * judge.text_features(tokens)).sum(dim=-1).mean().item()


def retrieval(judge: CLIP, x: Tensor, rows: list[dict], among: int = 100) -> float | None:
    """Of the composition split's first `among` captions, the share whose picture the judge likes best of all that many captions.

    None where there are fewer than two such captions."""
    first = {}
    for i, row in enumerate(rows):
        if row.get("split") == "composition":
            first.setdefault(row["text"], i)
    texts, places = list(first)[:among], list(first.values())[:among]
    if len(texts) < 2:
        return None
    images = torch.nn.functional.normalize(features(judge, x[places]), dim=-1)
    best = (images @ judge.text_features(judge.tokenizer(texts).to(x.device)).T).argmax(dim=1).cpu()
    return (best == torch.arange(len(texts))).double().mean().item()


def frechet(a: Tensor, b: Tensor | None) -> float | None:
    """|mu_a - mu_b|^2 + tr(A + B - 2 sqrt(A B)) of two sets of features (N, d): Heusel et al. 2017, arXiv 1706.08500.

    None where no pictures are left to compare with.
    """
    if b is None:
        return None
    a, b = a.cpu().double().numpy(), b.cpu().double().numpy()
    cov_a, cov_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    root = np.sqrt(np.linalg.eigvals(cov_a @ cov_b).real.clip(min=0)).sum()  # the trace of the root of the product
    return float(((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(cov_a) + np.trace(cov_b) - 2 * root)


def print_scores(scores: dict) -> None:
    print(f"\n{scores['captions']} held-out captions, {scores['steps']} DDIM steps, seed {scores['seed']}")
    print(f"reconstruction     {scores['psnr']:.2f} dB PSNR, perceptual distance {scores['perceptual']:.4f}")
    columns = {f"w = {w}": entry for w, entry in scores["guidance"].items()}
    print(f"{'':<19}" + "".join(f"{name:>12}" for name in columns) + f"{'ceiling':>12}")
    for name in scores["ceiling"] or {}:
        values = [entry["accuracy"][name] for entry in columns.values()] + [scores["ceiling"][name]]
        label = "prompt accuracy" if name == "all" else f"  {name}"
        print(f"{label:<19}" + "".join(f"{value:>12.1%}" for value in values))
    for label, key, real in [("CLIP score", "clip_score", "clip_score_real"), ("Frechet distance", "frechet", "frechet_floor"),
                             ("caption found", "retrieval", "retrieval_real")]:
        values = [entry.get(key) for entry in columns.values()] + [scores.get(real)]
        print(f"{label:<19}" + "".join(f"{'-':>12}" if value is None else f"{value:>12.3f}" for value in values))
    print("ceiling: the same pictures through the autoencoder (accuracy), or real pictures (the rest); caption found: the right one "
          "of up to 100 of the composition split\n")


def evaluate(args: argparse.Namespace) -> None:
    model = load_part(args.model, "model", LatentDiffusion).to(best_device())
    judge = load_part(args.model, "judge", CLIP).to(model.device)
    folder = data_folder(args.data, model.config.image_size, dataset=model.config.name)
    scores = all_scores(model, judge, folder, args.guidance, args.captions, args.seed)
    print(json.dumps(scores, indent=2)) if args.json else print_scores(scores)


# ----------------------------------------------------------------------------------------------------------- info ----


def info(args: argparse.Namespace) -> None:
    """Parameters, bytes and floating-point operations of each part, measured by running it once."""
    if args.model and not args.size:
        model = load_model(args.model, device="meta")
    else:
        with torch.device("meta"):
            model = LatentDiffusion(NAMED_SIZES[args.size])
    for module in model.modules():
        if isinstance(module, Attention):
            module.keep_weights = True  # the counter does not see inside the fused kernel
    config, device = model.config, model.device
    x = torch.zeros(1, 3, config.image_size, config.image_size, device=device)
    side = config.image_size // model.autoencoder.f
    z, t = torch.zeros(1, config.autoencoder.channels, side, side, device=device), torch.zeros(1, dtype=torch.long, device=device)
    tokens = torch.zeros(1, config.text.length, dtype=torch.long, device=device)
    context = torch.zeros(1, config.text.length, config.text.width, device=device)
    calls = {"text_encoder": lambda: model.text_encoder(tokens), "autoencoder": lambda: model.autoencoder(x),
             "unet": lambda: model.unet(z, t, context)}
    if model.image_encoder is not None:
        calls["image_encoder"] = lambda: model.image_encoder(x)
    print(f"{config.name}: {config.image_size} x {config.image_size} pictures, f = {model.autoencoder.f}, "
          f"{config.autoencoder.channels} x {side} x {side} latents, scale factor {config.scale_factor}")
    print(f"{'':<15}{'parameters':>15}{'MB':>10}{'GFLOP, one forward pass of one picture':>42}")
    for name, call in calls.items():
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            call()
        weights = list(getattr(model, name).parameters())
        count, size = sum(p.numel() for p in weights), sum(p.numel() * p.element_size() for p in weights)
        print(f"{name:<15}{count:>15,}{size / 1e6:>10.1f}{counter.get_total_flops() / 1e9:>42.3f}")


# --------------------------------------------------------------------------------------------------------- parser ----


class Parser(argparse.ArgumentParser):
    def error(self, message: str):
        self.exit(2, f"{self.prog}: {message} (--help lists what is allowed)\n")


def number(kind: type, low: float, high: float = math.inf):
    """A parser of numbers in [low, high] that says what came and what is allowed."""
    def read(text: str):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not low <= value <= high or not math.isfinite(value):
            allowed = f"from {low:g} to {high:g}" if math.isfinite(high) else f"of at least {low:g}"
            raise argparse.ArgumentTypeError(f"{text!r} came, a{' whole' if kind is int else ''} number {allowed} is allowed")
        return value
    return read


def parser() -> argparse.ArgumentParser:
    root = Parser(prog="ldm_minimal", description="Latent diffusion, built and trained in an afternoon.")
    commands = root.add_subparsers(dest="command", required=True, parser_class=Parser)
    seed = dict(type=number(int, 0, 2**31), default=0, help="of all randomness (default 0)")

    t = commands.add_parser("train", help="train the whole pipeline; the same command goes on with a run that was stopped")
    t.add_argument("--size", choices=sorted(NAMED_SIZES), default="shapes")
    t.add_argument("--data", help="an imagefolder with train/ and test/; the shapes are drawn there if it does not exist")
    t.add_argument("--count", type=number(int, 20), help="pictures to draw where data are made (default: 20000 shapes, all emoji)")
    t.add_argument("--out", help="folder of the run (default runs/SIZE); may be a mounted drive")
    t.add_argument("--seed", **seed)
    t.add_argument("--precision", choices=["auto", "fp32", "bf16", "fp16"], default="auto")
    for stage in ("clip", "autoencoder", "denoiser"):
        t.add_argument(f"--steps-{stage}", type=number(int, 1))
        t.add_argument(f"--batch-{stage}", type=number(int, 2))
        t.add_argument(f"--rate-{stage}", type=number(float, 0), help="peak learning rate")
    t.add_argument("--accumulate", type=number(int, 1, 64), help="compute each batch of autoencoder and denoiser in so many parts: less memory, same step")
    t.add_argument("--compile", action="store_true", help="torch.compile the networks: minutes at first, then faster on a GPU")
    t.add_argument("--save-every", type=number(float, 0), default=30, help="seconds between saved states (default 30)")
    t.add_argument("--captions", type=number(int, 0), default=128, help="test captions to draw for the scores at the end")

    s = commands.add_parser("sample", help="draw prompts with a trained model")
    s.add_argument("prompts", nargs="+", metavar="PROMPT")
    s.add_argument("--model", default=SHIPPED, help="a run's folder, a saved model, or Stable Diffusion 1 as a .safetensors or .ckpt file or a "
                   "`diffusers` folder (default: the shipped model)")
    s.add_argument("--tokenizer", help="of a single-file Stable Diffusion: a folder with vocab.json and merges.txt, a tokenizer.json, or "
                   "bpe_simple_vocab_16e6.txt.gz (default: from the Hugging Face hub)")
    s.add_argument("--precision", choices=list(PRECISIONS), default="fp32", help="fp16 and bf16 halve the memory, for a GPU (default fp32)")
    s.add_argument("--height", type=number(int, 1, 4096), help="in pixels (default: the model's); with Stable Diffusion a multiple of 64")
    s.add_argument("--width", type=number(int, 1, 4096), help="likewise")
    s.add_argument("--count", type=number(int, 1, 64), default=1, help="pictures of each prompt, drawn at once (default 1)")
    s.add_argument("--steps", type=number(int, 1, 1000), default=50)
    s.add_argument("--guidance", type=number(float, 0, 100), default=7.5)
    s.add_argument("--negative", default="", help="what to steer away from")
    s.add_argument("--seed", **seed)
    s.add_argument("--out", default="out.png")

    e = commands.add_parser("evaluate", help="score a trained model against held-out captions and pictures")
    e.add_argument("--model", default=SHIPPED)
    e.add_argument("--data", help="a data set with test/ (default: the shapes, drawn if they are not there)")
    e.add_argument("--guidance", type=number(float, 0, 100), nargs="+", default=[5.0])
    e.add_argument("--captions", type=number(int, 2), default=512)
    e.add_argument("--seed", **seed)
    e.add_argument("--json", action="store_true", help="for machines")

    i = commands.add_parser("info", help="parameters, bytes and operations of each part")
    i.add_argument("--model", default=SHIPPED)
    i.add_argument("--size", choices=sorted(NAMED_SIZES))
    return root


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    warnings.showwarning = lambda message, *_, **__: print(f"ldm_minimal: {message}", file=sys.stderr)
    try:
        {"train": train, "sample": sample, "evaluate": evaluate, "info": info}[args.command](args)
    except (ValueError, OSError) as error:
        print(f"ldm_minimal {args.command}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nldm_minimal: stopped; a training goes on with the same command", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
