"""Remakes the small result files that the chapters read, from the chapters' own code and the library.

    python chapters/runs.py 02            # remake the results of chapter 2
    python chapters/runs.py 09/paid       # only this one
    python chapters/runs.py --check       # is there a recipe for every file that a chapter reads, and a file for every recipe?
    python chapters/runs.py --execute 02  # run the notebooks of chapter 2, keep what they print and draw, and their seconds
    python chapters/runs.py --minutes     # the README's table of minutes, from the seconds that are kept

A result is runs/NN/NAME.json: curves and numbers, with the seed, machine and minutes that made them; and, where there are
pictures, runs/NN/NAME.png, all of them in one row of 32 x 32 tiles. `book.result("NN/NAME")` reads both.
"""

from __future__ import annotations

import argparse
import base64
import io
import json
import platform
import random
import re
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

import book
from ldm_minimal.__main__ import accuracy
from oracle import grade

HERE = Path(__file__).resolve().parent
RECIPES, PROBES = {}, {}


def recipe(name: str):
    """Register what makes runs/`name`: a function that returns (numbers, pictures or None)."""

    def register(function):
        RECIPES[name] = function
        return function

    return register


def probe(name: str):
    """Register what `--check` runs again of runs/`name`, in seconds: a function of the record that returns (made now, on record)."""

    def register(function):
        PROBES[name] = function
        return function

    return register


def chapter_code(number: str) -> dict:
    """The names that chapter `number` defines in its cells tagged "export": runs use the very code that the chapter shows."""
    notebook = json.loads(next(HERE.glob(f"{number}_*.ipynb")).read_text(encoding="utf-8"))
    names = {}
    for cell in notebook["cells"]:
        if "export" in cell["metadata"].get("tags", []):
            exec("".join(cell["source"]), names)
    return names


def machine() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    try:
        name = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())[1]
    except (OSError, TypeError):
        name = platform.processor() or platform.machine()
    return f"{torch.get_num_threads()} thread{'s' * (torch.get_num_threads() > 1)} of {name}"


def make(name: str) -> None:
    started, worked = time.time(), time.process_time()
    torch.manual_seed(0)
    numbers, pictures = RECIPES[name]()
    record = {
        "command": f"python chapters/runs.py {name[:2]}",
        "seed": 0,
        "machine": machine(),
        "torch": torch.__version__,
        "minutes": round((time.time() - started) / 60, 1),
        "cpu_minutes": round((time.process_time() - worked) / 60, 1),
    } | numbers
    folder = HERE / "runs" / name[:2]
    folder.mkdir(parents=True, exist_ok=True)
    (HERE / "runs" / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n")
    if pictures is not None:
        row(pictures).save(HERE / "runs" / f"{name}.png", optimize=True)
    print(f"runs/{name}: {record['minutes']} minutes")


def row(pictures: Tensor) -> Image.Image:
    """(N, 3, H, W) in [-1, 1] -> one picture, side by side."""
    return book.to_image(torch.cat(list(pictures.cpu()), dim=2))


def check() -> list[str]:
    """What is wrong: files without a recipe, recipes without a file, files too large."""
    files = {str(path.relative_to(HERE / "runs").with_suffix("")) for path in (HERE / "runs").rglob("*.json")}
    read = {
        name
        for path in HERE.glob("[0-9][0-9]_*.ipynb")
        for name in re.findall(r'book\.result\(\\"([^"\\]+)', path.read_text(encoding="utf-8"))
    }
    return (
        [f"{name} is read by a chapter and has no recipe" for name in sorted(read - set(RECIPES))]
        + [f"{name} has a recipe and no file" for name in sorted(set(RECIPES) - files)]
        + [f"{name} has a file and no recipe" for name in sorted(files - set(RECIPES))]
        + [f"{path} is larger than 300 kB" for path in (HERE / "runs").rglob("*.*") if path.stat().st_size > 300_000]
        + [
            f"no recipe of chapter {number} has a probe"
            for number in sorted({name[:2] for name in RECIPES} - {name[:2] for name in PROBES})
        ]
    )


def repeat() -> list[str]:
    """Which results do not come out again: each probe makes the cheap beginning of one, and must agree to 5 % (other machines round otherwise)."""
    wrong = []
    for name, function in PROBES.items():
        torch.manual_seed(0)
        now, before = (
            torch.tensor(v, dtype=torch.float64) for v in function(json.loads((HERE / "runs" / f"{name}.json").read_text(encoding="utf-8")))
        )
        print(f"{name}: {now.tolist()} now, {before.tolist()} on record")
        if not torch.allclose(now, before, rtol=0.05):
            wrong.append(f"{name} does not come out again")
    return wrong


def smaller(png: str) -> str:
    """A stored figure, base64, with 256 colours: about a third of the bytes, and no difference that one sees."""
    with Image.open(io.BytesIO(base64.b64decode(png))) as image:
        file = io.BytesIO()
        image.convert("RGB").quantize(256, method=Image.Quantize.MAXCOVERAGE, kmeans=2, dither=Image.Dither.NONE).save(
            file, "png", optimize=True
        )
    return base64.b64encode(file.getvalue()).decode()


def execute(number: str) -> None:
    """Run a chapter and its solutions from a clean kernel and keep the outputs, without timestamps; metadata says how long it took."""
    import nbformat
    from nbclient import NotebookClient

    for path in [*HERE.glob(f"{number}_*.ipynb"), *HERE.glob(f"solutions/{number}_*.ipynb")]:
        notebook, started = nbformat.read(path, as_version=4), time.time()
        NotebookClient(
            notebook, timeout=600, kernel_name="python3", store_widget_state=False, resources={"metadata": {"path": str(path.parent)}}
        ).execute()
        notebook.metadata.pop("widgets", None)
        notebook.metadata["measured"] = {"seconds": round(time.time() - started), "machine": machine(), "torch": torch.__version__}
        for cell in notebook.cells:
            cell.metadata.pop("execution", None)
            drawn = [output for output in cell.get("outputs", []) if "image/png" in output.get("data", {})]
            for output in drawn:
                output["data"]["image/png"] = smaller(output["data"]["image/png"])
            slide = "slide" if cell.source.startswith("#") and cell.cell_type == "markdown" else "subslide" if drawn else "-"
            cell.metadata["slideshow"] = {"slide_type": slide}
        nbformat.write(notebook, path)
        print(f"{path.relative_to(HERE)}: {notebook.metadata['measured']['seconds']} s")


def minutes() -> str:
    """The README's table of chapters: question, minutes of the chapter and of its solutions, as the executed notebooks say."""
    rows = ["| chapter | question | minutes | solutions |", "|---|---|---|---|"]
    for path in sorted(HERE.glob("[0-9][0-9]_*.ipynb")):
        notebook, solved = (json.loads(p.read_text(encoding="utf-8")) for p in (path, HERE / "solutions" / path.name))
        title, question = re.match(r"# (.*?)\n\n\*\*(.*?)\*\*", "".join(notebook["cells"][0]["source"])).groups()
        took = [f"{n['metadata']['measured']['seconds'] / 60:.1f}" for n in (notebook, solved)]
        rows.append(f"| [{title}](chapters/{path.name}) | {question} | {took[0]} | {took[1]} |")
    return "\n".join(rows)


# ---- chapter 2 ----


@recipe("02/pixels")
def pixels():
    """Chapter 2's simple U-Net in pixel space, trained for longer; the loss at each t, of 300 steps and of all; 16 samples."""
    code, steps, batch = chapter_code("02"), 1200, 32
    data, held_out = book.load_data("train"), book.load_data("test").pictures(slice(0, 128))
    torch.manual_seed(0)

    def by_time(unet):
        noise = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for t in range(0, 1000, 50):
                eps, times = torch.randn(held_out.shape, generator=noise), torch.full((128,), t)
                yield ((unet(code["schedule"].add_noise(held_out, times, eps), times) - eps) ** 2).mean().item()

    def trained(steps):
        torch.manual_seed(0)
        unet = code["SimpleUNet"]()
        losses = list(code["train"](unet, lambda count: data.pictures(torch.randint(len(data), (count,))), steps, batch, 2e-3))
        return unet, losses

    short, _ = trained(300)
    unet, losses = trained(steps)
    with torch.no_grad():
        *_, drawn = code["sample"](lambda x, t: unet(x, torch.full((len(x),), t)), torch.randn(16, 3, 32, 32))
    smooth = torch.tensor(losses).view(-1, 50).mean(dim=1).tolist()
    return {
        "steps": steps,
        "batch": batch,
        "losses_of_50_steps": [round(v, 4) for v in smooth],
        "loss_by_t": [round(v, 5) for v in by_time(unet)],
        "loss_by_t_short": [round(v, 5) for v in by_time(short)],
    }, drawn.clamp(-1, 1)


@probe("02/pixels")
def first_steps_in_pixels(record):
    """The first fifty steps of the long training."""
    code, data = chapter_code("02"), book.load_data("train")
    torch.manual_seed(0)
    training = code["train"](code["SimpleUNet"](), drawing(data), record["steps"], record["batch"], 2e-3)
    return [sum(next(training) for _ in range(50)) / 50], record["losses_of_50_steps"][:1]


# ---- chapter 3 ----


def restored_scores(net, code, x, rows) -> tuple[dict, Tensor]:
    """How well an autoencoder restores x: PSNR, the judge's seen difference, the share that the oracle still reads; and x_hat."""
    from ldm_minimal import PerceptualLoss

    with torch.no_grad():
        x_hat, posterior = net(x)
        seen = PerceptualLoss(book.load_judge().image_encoder.features)(x, x_hat).mean().item()
    return {
        "psnr": round(code["psnr"](x, x_hat), 2),
        "seen": round(seen, 4),
        "legible": round(accuracy(x_hat, rows)["all"], 4),
        "kl": round(posterior.kl().mean().item(), 1),
        "mean_std": round(posterior.mean.std().item(), 4),
        "channel_std": [round(v, 4) for v in posterior.mean.std(dim=(0, 2, 3)).tolist()],
        "cloud_std": round((0.5 * posterior.logvar).exp().square().mean().sqrt().item(), 5),
    }, x_hat.clamp(-1, 1)


def drawing(data):
    """A function that draws a batch of the data, from torch's own random numbers."""
    return lambda count: data.pictures(torch.randint(len(data), (count,)))


@recipe("03/losses")
def losses(steps: int = 1200, every: int = 20):
    """Chapter 3's loss, term by term: six autoencoders of equal steps; curves of their parts, scores, six restored pictures each."""
    from ldm_minimal import SHAPES, Autoencoder, PatchDiscriminator, PerceptualLoss, autoencoder_loss

    code, data, test = chapter_code("03"), book.load_data("train"), book.load_data("test")
    x, seen = test.pictures(slice(0, 256)), PerceptualLoss(book.load_model().image_encoder.requires_grad_(False).features)

    def objective(kl_weight=0.0, perceptual=None):
        return partial(
            autoencoder_loss,
            perceptual=perceptual,
            kl_weight=kl_weight,
            perceptual_weight=SHAPES.perceptual_weight,
            adversarial_weight=SHAPES.adversarial_weight,
        )

    squares = lambda x, x_hat, posterior, adversary: ((x - x_hat).square().sum(dim=(1, 2, 3)).mean(), {"l1": (x - x_hat).abs().mean()})  # noqa: E731
    whole = objective(1e-6, seen)
    variants = {
        "$L_2$": (squares, False, None),
        "$L_1$": (objective(), False, None),
        "+ KL": (objective(1e-6), True, None),
        "+ perceptual": (whole, True, None),
        "+ adversarial": (whole, True, steps // 2),
        "adversarial from step 0": (whole, True, 0),
    }
    found, tiles = {}, [x[:6]]
    for name, (loss, cloud, start) in variants.items():
        torch.manual_seed(0)
        net = Autoencoder(SHAPES.autoencoder)
        critic = None if start is None else PatchDiscriminator(32, 2)
        if critic:  # the adversary's gradient is compared at the decoder's last weights
            loss = partial(loss, last_weight=net.decoder[-1].weight)
        parts = list(code["train"](net, drawing(data), steps, loss, critic, start or 0, cloud))
        curves = {key: [mean_of([p[key] for p in parts[i : i + every] if key in p]) for i in range(0, steps, every)] for key in parts[-1]}
        scores, x_hat = restored_scores(net.eval(), code, x, test.rows[:256])
        found[name] = scores | {"curves": curves}
        tiles.append(x_hat[:6])
        print(name, scores)
    return {"steps": steps, "at": list(range(every // 2, steps, every)), "variants": found}, torch.cat(tiles)


@recipe("03/fixed")
def fixed_weight(steps: int = 1200, every: int = 20, weight: float = 5000.0):
    """The adversary from the first step, and its weight not adapted but fixed: the run of section 3.7 that breaks."""
    from ldm_minimal import SHAPES, Autoencoder, PatchDiscriminator, PerceptualLoss, autoencoder_loss

    code, data, test = chapter_code("03"), book.load_data("train"), book.load_data("test")
    seen = PerceptualLoss(book.load_model().image_encoder.requires_grad_(False).features)

    def objective(x, x_hat, posterior, adversary):
        loss, parts = autoencoder_loss(x, x_hat, posterior, seen, perceptual_weight=SHAPES.perceptual_weight)
        return loss + SHAPES.adversarial_weight * weight * -adversary(x_hat).mean(), parts

    torch.manual_seed(0)
    net = Autoencoder(SHAPES.autoencoder)
    parts = list(code["train"](net, drawing(data), steps, objective, PatchDiscriminator(32, 2), 0))
    scores, x_hat = restored_scores(net.eval(), code, test.pictures(slice(0, 256)), test.rows[:256])
    curves = {key: [mean_of([p[key] for p in parts[i : i + every]]) for i in range(0, steps, every)] for key in ("l1", "discriminator")}
    return {"steps": steps, "weight": weight, "curves": curves} | scores, x_hat[:6]


def mean_of(values: list[float]) -> float | None:
    return float(f"{sum(values) / len(values):.4g}") if values else None


@probe("03/losses")
def first_steps_of_l1(record):
    """Twenty steps of the variant L1."""
    from ldm_minimal import SHAPES, Autoencoder, autoencoder_loss

    torch.manual_seed(0)
    training = chapter_code("03")["train"](
        Autoencoder(SHAPES.autoencoder),
        drawing(book.load_data("train")),
        record["steps"],
        partial(autoencoder_loss, kl_weight=0.0),
        cloud=False,
    )
    return [mean_of([next(training)["l1"] for _ in range(20)])], record["variants"]["$L_1$"]["curves"]["l1"][:1]


@recipe("03/kl")
def kl_sweep(steps: int = 800, weights=(1e-6, 1e-4, 1e-2, 1e-1, 1.0, 10.0)):
    """The same autoencoder, L1 + perceptual + KL, the KL's weight from a millionth up; five restored pictures and five from noise each."""
    from ldm_minimal import SHAPES, Autoencoder, PerceptualLoss, autoencoder_loss

    code, data, test = chapter_code("03"), book.load_data("train"), book.load_data("test")
    x, noise, found, tiles = test.pictures(slice(0, 256)), torch.randn(5, 4, 8, 8, generator=torch.Generator().manual_seed(0)), {}, []
    seen = PerceptualLoss(book.load_model().image_encoder.requires_grad_(False).features)
    for weight in weights:
        torch.manual_seed(0)
        net = Autoencoder(SHAPES.autoencoder)
        objective = partial(autoencoder_loss, perceptual=seen, kl_weight=weight, perceptual_weight=SHAPES.perceptual_weight)
        for _ in code["train"](net, drawing(data), steps, objective):
            pass
        scores, x_hat = restored_scores(net.eval(), code, x, test.rows[:256])
        found[f"{weight:g}"] = scores
        with torch.no_grad():
            tiles += [x_hat[:5], net.decode(noise).clamp(-1, 1)]
        print(weight, scores)
    return {"steps": steps, "weights": list(weights), "variants": found}, torch.cat(tiles)


# ---- chapter 4 ----


@recipe("04/scaled")
def scaled(steps: int = 1000, widths=(1.0, 5.49, 0.18), captions: int = 128):
    """U-Nets of equal steps on latents of three widths: errors by t, prompt accuracy, and what each draws for eight prompts."""
    from ldm_minimal import UNet, train_denoiser
    from ldm_minimal.__main__ import draw_captions

    model, data, test = book.load_model(), book.load_data("train"), book.load_data("test")
    measured, x, times = model.scale_factor, test.pictures(slice(0, 128)), list(range(0, 1000, 50)) + [999]
    stage = replace(model.config.denoiser_stage, steps=steps)
    prompts = [
        "a red circle",
        "a large blue square",
        "a small green star",
        "a yellow heart",
        "a pink cross above a blue circle",
        "a red star left of a green square",
        "a cyan triangle above a purple heart",
        "an orange circle left of a blue cross",
    ]
    found, tiles = {}, []
    for width in widths:
        torch.manual_seed(0)
        model.unet, model.config = UNet(model.config.unet), replace(model.config, scale_factor=width * measured)
        losses = [parts["mse"].item() for _, parts in train_denoiser(model, data, stage, seed=0)]
        noise, eps_by_t, z0_by_t = torch.Generator().manual_seed(1), [], []
        with torch.no_grad():
            z, context = model.encode(x), model.embed(test.captions[:128])
            for t in times:
                eps, a = torch.randn(z.shape, generator=noise), model.schedule.alpha_bars[t].item()
                error = (
                    (model.unet(model.schedule.add_noise(z, torch.full((128,), t), eps), torch.full((128,), t), context) - eps)
                    .square()
                    .mean()
                    .item()
                )
                eps_by_t.append(float(f"{error:.4g}"))
                z0_by_t.append(float(f"{(error * (1 - a) / a) ** 0.5 / width:.4g}"))
            right = round(accuracy(draw_captions(model, test.captions[:captions], 5.0, 0), test.rows[:captions])["all"], 4)
            tiles.append(draw_captions(model, prompts, 5.0, 0).clamp(-1, 1))
        found[f"{width:g}"] = {
            "eps_by_t": eps_by_t,
            "z0_by_t": z0_by_t,
            "accuracy": right,
            "mse": [mean_of(losses[i : i + 20]) for i in range(0, steps, 20)],
        }
        print(width, found[f"{width:g}"])
    return {"steps": steps, "batch": stage.batch, "t": times, "prompts": prompts, "variants": found}, torch.cat(tiles)


@probe("04/scaled")
def first_steps_at_unit_width(record):
    """Twenty steps of the rescaled training."""
    from ldm_minimal import UNet, train_denoiser

    model = book.load_model()
    torch.manual_seed(0)
    model.unet = UNet(model.config.unet)
    training = train_denoiser(model, book.load_data("train"), replace(model.config.denoiser_stage, steps=record["steps"]), seed=0)
    return [mean_of([next(training)[1]["mse"].item() for _ in range(20)])], record["variants"]["1"]["mse"][:1]


# ---- chapter 5 ----


def things_of(count: int, things: int, skip: int = 0) -> list[dict]:
    """Test scenes with so many things: rows of the metadata."""
    rows = [row for row in book.load_data("test").rows if row["split"] == "test" and len(row["scene"]["things"]) == things]
    return rows[skip : skip + count]


@recipe("05/drawn")
def attention_while_drawing(count: int = 64, steps: int = 50):
    """Chapter 5: draw captions of one and of two things, read where these came to lie, and score every step's maps against that."""
    code = chapter_code("05")
    return {
        "steps": steps,
        "guidance": 3.0,
        "two": follow_maps(code, things_of(count, 2, skip=64), steps),
        "one": follow_maps(code, things_of(count, 1), steps),
    }, None


def follow_maps(code: dict, rows: list[dict], steps: int) -> dict:
    """{"t": of each step, "colour": the share of the colour words' maps in their discs, by layer and step, "colour, other": ...}"""
    model, layers, film = code["model"], code["layers"], []
    for layer in layers:
        layer.keep_weights = True
    for t, z, _ in model.denoise([row["text"] for row in rows], steps=steps, guidance=3.0, generator=torch.Generator().manual_seed(0)):
        film.append((t, [layer.weights.chunk(2)[1].mean(dim=1) for layer in layers]))
    scenes = [code["read"]((x.permute(1, 2, 0).numpy() + 1) / 2) for x in model.decode(z)]
    found = [{(thing.colour, thing.shape): vars(thing) for thing in scene.things} for scene in scenes]
    named = [code["named"](row) for row in rows]
    wanted = [[(thing["colour"], thing["shape"]) for *_, thing in things] for things in named]
    whole = [i for i, (have, want) in enumerate(zip(found, wanted)) if all(kind in have for kind in want)]  # drawn as asked
    discs = {
        side: torch.stack([torch.stack([code["disc"](found[i][kind], side) for kind in wanted[i]], dim=1) for i in whole])
        for side in (4, 8)
    }
    others = {side: disc.flip(2) for side, disc in discs.items()}

    def scores(places, discs):
        return [
            [
                round(code["inside"](weights[i][whole], places[whole], discs[round(weights[i].shape[1] ** 0.5)]).mean().item(), 3)
                for _, weights in film
            ]
            for i in range(len(layers))
        ]

    words = dict(zip(("colour", "shape"), torch.tensor([[thing[:2] for thing in things] for things in named]).permute(2, 0, 1)))
    return {"pictures": len(rows), "as asked": len(whole), "t": [t for t, _ in film], "area": round(discs[8].mean().item(), 4)} | {
        kind + name: scores(places, which) for kind, places in words.items() for name, which in (("", discs), (", other", others))
    }


@recipe("05/swap")
def swapped_vectors(count: int = 64, steps: int = 25):
    """Chapter 5: captions that differ in one word; a part of the other's vectors is put in; how often does the picture follow it?"""
    code, what, follows = chapter_code("05"), ["colour 1", "shape 1", "colour 2", "shape 2", "background"], []
    for kind in what:
        first, second = code["pairs"](kind, count)
        one, two = code["model"].embed(first), code["model"].embed(second)
        places = code["parts"](first, second)
        places["all but the word"] = ~places["the word itself"]
        follows.append([])
        for place in places.values():
            drawn = code["draw"](torch.where(place[..., None], two, one), steps=steps)
            follows[-1].append(sum(found[kind] for found in code["marks"](drawn, second)) / count)
    return {
        "pictures": count,
        "steps": steps,
        "guidance": 3.0,
        "what": what,
        "parts": list(places),
        "follows": [[round(v, 3) for v in row] for row in follows],
    }, None


@recipe("05/words")
def contexts_spoilt(count: int = 256, steps: int = 25):
    """Chapter 5: what pictures have right when the order of words is lost, or the padding is another's."""
    code, rows = chapter_code("05"), things_of(count, 2, skip=64)
    model, tokenizer, captions = code["model"], code["tokenizer"], [row["text"] for row in rows]
    chance, place = random.Random(0), torch.arange(77)
    shuffled = [" ".join(chance.sample(text.split(), len(text.split()))) for text in captions]
    padding = (place > (tokenizer(captions) == tokenizer.end).int().argmax(dim=1, keepdim=True))[..., None]
    plain, bag = model.embed(captions), code["model"].embed(shuffled)
    contexts = {
        "as asked": plain,
        "words shuffled": bag,
        "padding: zeros": torch.where(padding, 0.0, plain),
        "padding: of the empty caption": torch.where(padding, model.embed([""]), plain),
        "padding: of the next caption": torch.where(padding, plain.roll(1, dims=0), plain),
    }
    model.text_encoder.position.weight.data.zero_()
    contexts["positions forgotten"] = model.embed(captions)
    share = []
    for context in contexts.values():
        with torch.no_grad():
            found = code["marks"](
                torch.cat([code["draw"](part, steps=steps, seed=i) for i, part in enumerate(context.split(64))]), captions
            )
        several = {"all of it": [all(marks.values()) for marks in found]} | {
            name: [value for marks in found for key, value in marks.items() if key.startswith(name)]
            for name in ("count", "colour", "shape", "relation", "background")
        }
        share.append([round(sum(values) / len(values), 3) for values in several.values()])
    return {"pictures": count, "steps": steps, "guidance": 3.0, "contexts": list(contexts), "marks": list(several), "share": share}, None


@probe("05/drawn")
def one_thing_drawn(record):
    """The captions of one thing, drawn again with all their maps."""
    now = follow_maps(chapter_code("05"), things_of(record["one"]["pictures"], 1), record["steps"])
    return [now["as asked"], now["colour"][-1][0]], [record["one"]["as asked"], record["one"]["colour"][-1][0]]


# ---- chapter 6 ----


def scene_for(caption: str, random):
    """A scene of which `caption` is true; what it leaves open is drawn as the data set draws it."""
    from oracle import parse
    from prepare import BACKGROUNDS, LINES, SIZES, Scene, Thing, pick

    stated, ends = parse(caption), ((0.25, 0.5), (0.75, 0.5))
    places = {"left of": ends, "right of": ends[::-1], "above": [e[::-1] for e in ends], "below": [e[::-1] for e in ends[::-1]]}
    things = []
    for said, (x, y) in zip(stated.things, places.get(stated.relation) or [(pick(random, LINES), pick(random, LINES))]):
        texture = said.get("texture", "plain")  # a caption always names another; of the plain things 3 in 8 are large
        size = said.get("size") or ("large" if texture != "plain" or random.random() < 3 / 8 else "small")
        things.append(Thing(said["shape"], said["colour"], size, texture, x, y, SIZES[size]))
    return Scene(stated.background or pick(random, BACKGROUNDS), tuple(things))


@torch.no_grad()
def denoised(model, prompts: list[str], w: float, seed: int, batch: int = 64) -> Tensor:
    """The latents that fifty steps make of the prompts, with the same noise for every w."""
    random = torch.Generator().manual_seed(seed)
    return torch.cat(
        [[z for _, z, _ in model.denoise(prompts[i : i + batch], guidance=w, generator=random)][-1] for i in range(0, len(prompts), batch)]
    )


def guided_scores(model, code: dict, w: float, count: int) -> dict:
    """On the first `count` test captions: the share drawn wholly right, the share of single attributes, and how saturated the pictures are."""
    test = book.load_data("test")
    z = denoised(model, test.captions[:count], w, 0)
    with torch.no_grad():
        x = model.decode(z)
    grades = [grade(picture, caption) for picture, caption in zip(((x + 1) / 2).permute(0, 2, 3, 1).numpy(), test.captions)]
    single, colours = [holds for g in grades for holds in g.values()], code["colours"](x).mean(dim=0).tolist()
    return {
        "accuracy": round(sum(all(g.values()) for g in grades) / count, 4),
        "attributes": round(sum(single) / len(single), 4),
        "vividness": round(colours[0], 4),
        "off": round(colours[1], 4),
        "latent_std": round(z.std().item(), 4),
    }


@recipe("06/sweep")
def sweep(weights=(0, 1, 2, 3, 5, 7.5, 10, 15), captions: int = 128, prompts: int = 8, seeds: int = 8):
    """The shipped model at each w: accuracy, saturation, variety between seeds; pictures of six prompts, and of one with eight seeds."""
    import numpy as np
    from prepare import draw

    code, model, judge, test = chapter_code("06"), book.load_model(), book.load_judge(), book.load_data("test")
    shown = [
        "a red circle",
        "a large green star",
        "a small blue square",
        "a striped yellow heart",
        "a purple triangle above an orange cross",
        "a cyan heart left of a red circle",
    ]
    unfinished = [caption for caption in test.captions if "background" not in caption][:prompts]
    many, random = [caption for caption in unfinished for _ in range(seeds)], np.random.default_rng(0)

    def varieties(x):
        with torch.no_grad():
            features = judge.image_encoder(x)
        return {
            "variety": round(code["variety"](features.unflatten(0, (prompts, seeds))), 4),
            "backgrounds": round(code["backgrounds"](x, prompts), 4),
        }

    real = torch.stack([torch.from_numpy(draw(scene_for(caption, random), 32)) for caption in many]).permute(0, 3, 1, 2) / 127.5 - 1
    truth, found, rows, tiles = varieties(real), {}, [], []
    for w in weights:
        with torch.no_grad():
            x, few = model.decode(denoised(model, many, w, 1)), model.decode(denoised(model, shown, w, 2))
        found[f"{w:g}"] = guided_scores(model, code, w, captions) | varieties(x)
        rows.append(few)
        tiles.append(x[:seeds])
        print(w, found[f"{w:g}"], flush=True)
    return {
        "weights": list(weights),
        "captions": captions,
        "prompts": shown,
        "unfinished": unfinished,
        "seeds": seeds,
        "truth": truth,
        "by_w": found,
    }, torch.cat(rows + tiles)


@probe("06/sweep")
def captions_at_5(record):
    """The same captions drawn again at w = 5: how many are right, and how far their colours are from the palette."""
    now = guided_scores(book.load_model(), chapter_code("06"), 5, record["captions"])
    return [now[name] for name in ("accuracy", "off")], [record["by_w"]["5"][name] for name in ("accuracy", "off")]


@recipe("06/dropout")
def dropout(steps: int = 600, rates=(0.1, 0.0), captions: int = 128):
    """Two short U-Nets, that differ in how often the caption was dropped: errors with and without a caption, eight pictures each at w = 0, 1, 5; accuracy by w."""
    from ldm_minimal import UNet, train_denoiser
    from oracle import UNKNOWN, read

    code, model, data, test, found, tiles = chapter_code("06"), book.load_model(), book.load_data("train"), book.load_data("test"), {}, []
    prompts = [
        "a red circle",
        "a blue square",
        "a large green star",
        "a yellow heart",
        "a purple triangle",
        "an orange cross",
        "a pink circle on a black background",
        "a cyan square on a white background",
    ]
    times = list(range(50, 1000, 100))
    for rate in rates:
        torch.manual_seed(0)
        model.unet = UNet(model.config.unet)
        stage = replace(model.config.denoiser_stage, steps=steps)
        losses = [parts["mse"].item() for _, parts in train_denoiser(model, data, stage, caption_dropout=rate, seed=0)]
        noise, errors = torch.Generator().manual_seed(1), []
        with torch.no_grad():
            z, contexts = (
                model.encode(test.pictures(slice(0, 128))),
                (model.embed(test.captions[:128]), model.embed([""]).expand(128, -1, -1)),
            )
            for t in times:
                eps, at = torch.randn(z.shape, generator=noise), torch.full((128,), t)
                errors.append(
                    [float(f"{(model.unet(model.schedule.add_noise(z, at, eps), at, c) - eps).square().mean():.4g}") for c in contexts]
                )
            nothing = model.decode(denoised(model, [""] * 64, 1.0, 0))
            tiles += [nothing[:8]] + [model.decode(denoised(model, prompts, w, 2)) for w in (1.0, 5.0)]
        scenes = [read(picture) for picture in ((nothing + 1) / 2).permute(0, 2, 3, 1).numpy()]
        legible = [1 <= len(s.things) <= 2 and UNKNOWN not in (s.background, *(thing.shape for thing in s.things)) for s in scenes]
        found[f"{rate:g}"] = {
            "mse": [mean_of(losses[i : i + 20]) for i in range(0, steps, 20)],
            "captioned": [e[0] for e in errors],
            "empty": [e[1] for e in errors],
            "legible": round(sum(legible) / 64, 4),
            "by_w": {f"{w:g}": guided_scores(model, code, w, captions) for w in ((1, 2, 3, 5, 10) if rate else (1, 5))},
        }
        print(rate, found[f"{rate:g}"], flush=True)
    return {"steps": steps, "batch": stage.batch, "captions": captions, "t": times, "prompts": prompts, "by_rate": found}, torch.cat(tiles)


@probe("06/dropout")
def first_steps_without_dropout(record):
    """Twenty steps of the training that never drops a caption."""
    from ldm_minimal import UNet, train_denoiser

    model = book.load_model()
    torch.manual_seed(0)
    model.unet = UNet(model.config.unet)
    training = train_denoiser(
        model, book.load_data("train"), replace(model.config.denoiser_stage, steps=record["steps"]), caption_dropout=0.0, seed=0
    )
    return [mean_of([next(training)[1]["mse"].item() for _ in range(20)])], record["by_rate"]["0"]["mse"][:1]


# ---- chapter 7 ----


def seen_in(picture: Tensor):
    """The scene that the oracle sees in x (3, H, W)."""
    from oracle import read

    return read(((picture.clamp(-1, 1) + 1) / 2).permute(1, 2, 0).numpy())


@recipe("07/steps")
def fewer_steps(captions: int = 64, counts=(1000, 250, 50, 20, 10, 5, 2), guidance: float = 5.0):
    """Prompt accuracy, and the distance from 1000 steps, against the number of steps; four captions drawn with some."""
    from ldm_minimal import ddim_sample, ddim_timesteps, guided_eps

    code, model, test = chapter_code("07"), book.load_model(), book.load_data("test")
    rows, code["schedule"] = test.rows[:captions], model.schedule  # `skip`, with the model's own schedule
    with torch.no_grad():
        context = torch.cat([model.embed([""]).expand(captions, -1, -1), model.embed(test.captions[:captions])])
        prepared = model.unet.prepare(context)
    guess = torch.no_grad()(
        lambda z, t: guided_eps(model.unet, z, torch.full((len(z),), int(t[0]) if torch.is_tensor(t) else t), prepared, guidance)
    )
    start, other = torch.randn(2, captions, 4, 8, 8, generator=torch.Generator().manual_seed(0))

    def end(z=start, **settings):
        *_, (_, z, _) = ddim_sample(guess, model.schedule, z, generator=torch.Generator().manual_seed(1), **settings)
        return z

    def skipped(n):
        *_, z = code["skip"](guess, start, [t for t, _, _ in ddim_timesteps(model.schedule, n)], torch.Generator().manual_seed(1))
        return z

    ways = {
        "DDIM": (counts, lambda n: end(steps=n)),
        "DDIM, leading": (counts[1:], lambda n: end(steps=n, spacing="leading")),
        "DDIM, $\\eta$ = 1": (counts, lambda n: end(steps=n, eta=1.0)),
        "DDPM, steps skipped": (counts[1:], skipped),
    }
    found, drawn = {}, {}
    for name, (numbers, way) in ways.items():
        found[name] = {"steps": list(numbers), "accuracy": [], "distance": []}
        for n in numbers:
            drawn[name, n] = z = way(n)
            with torch.no_grad():
                found[name]["accuracy"].append(round(accuracy(model.decode(z), rows)["all"], 4))
            found[name]["distance"].append(apart(z, drawn["DDIM", counts[0]]))
            print(name, n, found[name]["accuracy"][-1], found[name]["distance"][-1])
    some = slice(3, 7)
    pictured = [("DDIM", n) for n in (counts[0], 20, 5, 2)] + [("DDPM, steps skipped", 50)]
    with torch.no_grad():
        tiles = torch.cat([model.decode(drawn[key][some]) for key in pictured])
        ceiling = accuracy(model.decode(model.encode(test.pictures(slice(0, captions)))), rows)["all"]
    return {
        "captions": captions,
        "guidance": guidance,
        "steps": list(counts),
        "ways": found,
        "another_seed": apart(end(other, steps=50), drawn["DDIM", 50]),
        "ceiling": round(ceiling, 4),
        "prompts": test.captions[some],
        "pictured": [list(key) for key in pictured],
    }, tiles


def apart(a: Tensor, b: Tensor) -> float:
    """The root mean square of a - b, for latents of about unit variance; the mean over pictures."""
    return round((a - b).square().mean(dim=(1, 2, 3)).sqrt().mean().item(), 4)


@recipe("07/mix")
def mixed_seeds(count: int = 256, mixed=(1, 2, 4, 16), steps: int = 20, prompt: str = "a large red heart"):
    """What becomes of the backgrounds, which the prompt leaves open, where 2, 4 and 16 starts are averaged; straight, and put back on the shell."""
    from oracle import grade_scene

    model, noises = book.load_model(), torch.randn(count, max(mixed), 4, 8, 8, generator=torch.Generator().manual_seed(0))
    found = {"straight": [], "on the shell": []}
    for name in found:
        for k in mixed:
            z = noises[:, :k].mean(dim=1) * (1 if name == "straight" else k**0.5)
            *_, (_, z, _) = model.denoise([prompt] * count, z=z, guidance=1.0, steps=steps)
            with torch.no_grad():
                x = model.decode(z)
            scenes = [seen_in(picture) for picture in x]
            holds = sum(all(grade_scene(scene, prompt).values()) for scene in scenes)
            found[name].append(
                {b: round(sum(scene.background == b for scene in scenes) / count, 4) for b in ("white", "cream", "grey", "black")}
                | {"accuracy": round(holds / count, 4)}
            )
            print(name, k, found[name][-1])
    return {"count": count, "mixed": list(mixed), "prompt": prompt, "drawing_steps": steps, "shares": found}, None


@recipe("07/start")
def picture_to_picture(count: int = 64, starts=(50, 100, 200, 300, 400, 500, 600, 700, 800, 900, 999), guidances=(5.0, 1.0)):
    """Another colour for real pictures, from each start: which part of the old picture is kept, which part of the new caption holds."""
    from prepare import COLOURS, HELD_OUT

    model, test, colours = book.load_model(), book.load_data("test"), list(COLOURS)
    rows = [i for i, row in enumerate(test.rows) if len(row["scene"]["things"]) == 1][:count]
    old, wanted = [test.rows[i]["scene"] for i in rows], []
    for scene in old:
        thing, place = scene["things"][0], colours.index(scene["things"][0]["colour"])
        wanted.append(next(c for c in colours[place + 3 :] + colours[:place] if (c, thing["shape"]) not in HELD_OUT))
    prompts = [f"a {colour} {scene['things'][0]['shape']}" for colour, scene in zip(wanted, old)]
    eps, shares = torch.randn(count, 4, 8, 8, generator=torch.Generator().manual_seed(0)), {}
    with torch.no_grad():
        z = model.encode(test.pictures(torch.tensor(rows)))
    for guidance in guidances:
        found = shares[f"{guidance:g}"] = {name: [] for name in ("new colour", "shape", "place", "size", "background")}
        for start in starts:
            *_, (_, new, _) = model.denoise(
                prompts, z=model.schedule.add_noise(z, torch.full((count,), start), eps), start=start, guidance=guidance
            )
            with torch.no_grad():
                pictures = model.decode(new)
            kept = [what_is_kept(seen_in(picture), scene, colour) for picture, scene, colour in zip(pictures, old, wanted)]
            for name, values in zip(found, zip(*kept)):
                found[name].append(round(sum(values) / count, 4))
            print(guidance, start, {name: values[-1] for name, values in found.items()})
    return {"count": count, "starts": list(starts), "shares": shares}, None


def what_is_kept(now, old: dict, colour: str) -> tuple[bool, ...]:
    """Is the first thing of the scene `now` of the new colour, and of the old shape, place and size, on the old background?"""
    was, thing = old["things"][0], now.things[0] if now.things else None
    same = now.background == old["background"]
    if thing is None:
        return False, False, False, False, same
    near = max(abs(thing.x - was["x"]), abs(thing.y - was["y"])) < 0.1
    return thing.colour == colour, thing.shape == was["shape"], bool(near), thing.size == was["size"], same


@probe("07/steps")
def accuracy_of_five_steps(record):
    """The same captions and starting noises, five steps of DDIM."""

    model, test, count = book.load_model(), book.load_data("test"), record["captions"]
    start, _ = torch.randn(2, count, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    *_, (_, z, _) = model.denoise(test.captions[:count], z=start, steps=5, guidance=record["guidance"])
    with torch.no_grad():
        return [accuracy(model.decode(z), test.rows[:count])["all"]], [record["ways"]["DDIM"]["accuracy"][record["steps"].index(5)]]


# ---- chapter 8 ----


@recipe("08/reference")
def reference(seeds: int = 5, steps=(60, 150, 100), window: int = 10):
    """The chapter's short recipe with other seeds than its own: mean losses of every ten steps, (seeds, steps / 10) a stage."""
    code, data, found = chapter_code("08"), book.load_data("train"), {"clip": [], "autoencoder": [], "denoiser": []}
    for seed in range(1, seeds + 1):
        losses = {stage: [] for stage in found}
        for stage, _, parts in code["whole_recipe"](code["new_model"](data, seed, adversarial_start=100), data, seed, steps):
            losses[stage].append(parts[{"clip": "clip", "autoencoder": "l1", "denoiser": "mse"}[stage]].item())
        for stage, values in losses.items():
            found[stage].append([float(f"{v:.4g}") for v in torch.tensor(values).view(-1, window).mean(dim=1).tolist()])
        print(seed, {stage: rows[-1][-1] for stage, rows in found.items()})
    return {"seeds": list(range(1, seeds + 1)), "runs": found}, None


@probe("08/reference")
def first_losses_of_seed_1(record):
    """CLIP's first twenty steps."""
    code, data = chapter_code("08"), book.load_data("train")
    training = code["whole_recipe"](code["new_model"](data, 1, adversarial_start=100), data, 1, (60, 150, 100))
    losses = [next(training)[2]["clip"].item() for _ in range(20)]
    return [mean_of(losses[:10]), mean_of(losses[10:])], record["runs"]["clip"][0][:2]


def held_out_error(model, unet, z, context) -> float:
    """Mean squared error in eps on held-out latents, at twenty times, always with the same noise."""
    noise, errors = torch.Generator().manual_seed(1), []
    with torch.no_grad():
        for t in range(25, 1000, 50):
            eps = torch.randn(z.shape, generator=noise)
            errors.append(
                (unet(model.schedule.add_noise(z, torch.full((len(z),), t), eps), torch.full((len(z),), t), context) - eps)
                .square()
                .mean()
                .item()
            )
    return float(f"{sum(errors) / len(errors):.4g}")


@recipe("08/ema")
def ema(steps: int = 500, every: int = 25):
    """One U-Net on the shipped latents: held-out error of the weights of the step and of their average."""
    from ldm_minimal import UNet, train_denoiser

    model, data, test = book.load_model(), book.load_data("train"), book.load_data("test")
    torch.manual_seed(0)
    model.unet = UNet(model.config.unet)
    with torch.no_grad():
        z, context = model.encode(test.pictures(slice(0, 64))), model.embed(test.captions[:64])
    parts, at, raw, average = {}, [], [], []
    for step, _ in train_denoiser(
        model, data, replace(model.config.denoiser_stage, steps=2 * steps), resume=lambda p: parts.update(p) or 0
    ):
        if step % every == 0:
            at.append(step)
            raw.append(held_out_error(model, parts["unet"], z, context))
            average.append(held_out_error(model, parts["ema"], z, context))
            if step == steps:  # half way of its schedule, where the rate is still high
                break
    return {"steps": steps, "at": at, "raw": raw, "ema": average}, None


@recipe("08/rates")
def rates(steps: int = 300, values=("4e-5", "4e-3", "4e-1")):
    """Three U-Nets that differ in the learning rate: mean error of every ten steps, and four pictures each."""
    from ldm_minimal import UNet, train_denoiser

    model, data, found, tiles = book.load_model(), book.load_data("train"), {}, []
    for rate in values:
        torch.manual_seed(0)
        model.unet = UNet(model.config.unet)
        losses = [
            parts["mse"].item()
            for _, parts in train_denoiser(model, data, replace(model.config.denoiser_stage, steps=steps, learning_rate=float(rate)))
        ]
        found[rate] = [float(f"{v:.4g}") for v in torch.tensor(losses).view(-1, 10).mean(dim=1).tolist()]
        tiles.append(
            model.generate(
                ["a red circle", "a blue square", "a large yellow star", "a green heart"],
                guidance=3.0,
                generator=torch.Generator().manual_seed(0),
            ).nan_to_num()
        )
    return {"steps": steps, "at": list(range(5, steps, 10)), "mse": found}, torch.cat(tiles)


# ---- chapter 9 ----


def of_one_thing(split: str):
    """The scenes of one thing alone: easier, so that small trainings get somewhere."""
    data = book.load_data(split)
    keep = [i for i, row in enumerate(data.rows) if len(row["scene"]["things"]) == 1]
    data.images, data.rows = data.images[keep], [data.rows[i] for i in keep]
    data.captions = [row["text"] for row in data.rows]
    return data


def test_cards() -> Tensor:
    """What no training picture shows: stripes of 1, 2 and 4 pixels, and small letters. (4, 3, 32, 32)"""
    from PIL import ImageDraw, ImageFont

    card = Image.new("L", (32, 32), 255)
    for i, word in enumerate(("LATENT", "DIFFU-", "SION")):
        ImageDraw.Draw(card).text((0, 10 * i), word, fill=0, font=ImageFont.load_default(size=9))
    stripes = [1 - 2.0 * (torch.arange(32) // width % 2) for width in (1, 2, 4)]
    letters = torch.tensor(list(card.tobytes())).view(32, 32) / 127.5 - 1
    return torch.stack([*(stripe.expand(32, 32) for stripe in stripes), letters])[:, None].expand(-1, 3, -1, -1)


def contrast_kept(net, widths=(1, 2, 3, 4, 6, 8)) -> list[float]:
    """Of black and white stripes of these widths, upright and level: the contrast after the autoencoder, in the same pattern, over that before."""
    kept = []
    for width in widths:
        stripe = 1 - 2.0 * (torch.arange(48) // width % 2)
        x = torch.stack([stripe[shift : shift + 32].expand(32, 32) for shift in range(2 * width)])  # each place once
        x = torch.cat([x, x.transpose(1, 2)])[:, None].expand(-1, 3, -1, -1)
        pattern = x - x.mean(dim=(1, 2, 3), keepdim=True)
        with torch.no_grad():
            x_hat = net(x)[0].clamp(-1, 1)
        kept.append(round(((x_hat * pattern).sum() / (x * pattern).sum()).item(), 4))
    return kept


def space_scores(model, rows, judge, reference) -> tuple[dict, Tensor]:
    """Prompt accuracy and Fréchet distance of what `model` draws for the captions of `rows`, and the pictures."""
    from ldm_minimal.__main__ import features, frechet

    noise, pictures = torch.Generator().manual_seed(0), []
    for i in range(0, len(rows), 64):
        pictures.append(model.generate([row["text"] for row in rows[i : i + 64]], steps=20, guidance=3.0, generator=noise))
    x = torch.cat(pictures).nan_to_num()
    with torch.no_grad():
        grades = {name: round(value, 4) for name, value in accuracy(x, rows).items()}
        return {"accuracy": grades, "frechet": round(frechet(features(judge, x), reference), 4)}, x


def squeeze_further(model, data, steps: int, see):
    """Train what is new in the autoencoder of `model`. Returns (10^12 operations, losses): f = 2 by chapter 3's loss without an adversary, f = 8 in the latents of f = 4."""
    from ldm_minimal import Stage, encode_all, train_autoencoder
    from ldm_minimal.ldm import Accelerator, Trainee

    code, net = chapter_code("09"), model.autoencoder
    if net.f == 2:
        stage, before = Stage(steps, 8, 1e-3), model.config
        model.config = replace(model.config, adversarial_start=stage.steps)
        losses = [parts["l1"].item() for _, parts in train_autoencoder(model, data, stage, perceptual=see)]
        model.config = before
        return code["squeeze_flops"](net, see) * stage.batch * stage.steps / 1e12, losses
    stage, z, losses = Stage(steps, 32, 2e-3), [], []
    for part in data.images.split(256):
        with torch.no_grad():
            z.append(net.scale * net.outer.encode(part.float() / 127.5 - 1).mean)
    z, inner = torch.cat(z), torch.nn.ModuleList([net.down, net.up])
    trainee = Trainee(inner, stage, Accelerator(cpu=True))
    for step in range(steps):
        batch = z[torch.randint(len(z), (stage.batch,))]
        loss = (net.up(net.down(batch)) - batch).square().mean()
        trainee.backward(loss)
        trainee.step(step)
        losses.append(loss.item())
    trainee.done()
    one = code["flops"](inner, lambda: net.up(net.down(z[:1])).sum().backward())
    encoding = code["flops"](net.outer, lambda: net.outer.encode(torch.zeros(1, 3, 32, 32)))
    return (one * stage.batch * stage.steps + encoding * len(data)) / 1e12, losses


def squeeze(space: str) -> dict:
    """What is new in the autoencoder of a space, trained; what it keeps of test pictures and of cards."""
    from ldm_minimal import PerceptualLoss, measure_scale_factor

    code, data, test = chapter_code("09"), of_one_thing("train"), of_one_thing("test")
    model, further, losses, started = code["new_model"](space), 0.0, [], time.process_time()
    if model.autoencoder.f in (2, 8):
        see = PerceptualLoss(model.image_encoder.requires_grad_(False).features)
        further, losses = squeeze_further(model, data, 800, see)
    seconds = time.process_time() - started
    if space != "f = 4":
        measure_scale_factor(model, data)
    model.eval()
    found = {
        "squeeze_tflops": 0 if space == "pixels" else round(further + code["shipped_tflop"](), 3),
        "further_seconds": round(seconds),
        "losses_of_20_steps": [mean_of(losses[i : i + 20]) for i in range(0, len(losses), 20)],
        "scale_factor": round(model.scale_factor, 4),
    }
    rows, x, tiles = test.rows[:128], test.pictures(slice(0, 128)), {}
    if space != "pixels":
        net = lambda x: (model.decode(model.encode(x)), model.autoencoder.encode(x))  # noqa: E731
        scores, restored = restored_scores(net, chapter_code("03"), x, rows)
        found["ceiling"] = {name: scores[name] for name in ("psnr", "seen", "legible")} | {
            "texture": round(accuracy(restored, rows)["texture"], 4),
            "contrast": contrast_kept(net),
        }
        with torch.no_grad():
            tiles = {"restored": restored[:4], "cards": model.decode(model.encode(test_cards()))}
        print(space, found["ceiling"], flush=True)
    return {"found": found, "tiles": tiles, "weights": model.autoencoder.state_dict(), "scale": model.scale_factor}


def in_space(space: str, budgets: list[float], words, batch: int = 32) -> dict:
    """A U-Net in one space; scored whenever its operations, in units of 10^12, pass one of `budgets`; with none, only the autoencoder's scores.

    words: what `embed` gives for the training captions, computed once for all spaces. Seconds are the process's own, scoring left out."""
    from ldm_minimal import Stage, train_denoiser
    from ldm_minimal.__main__ import features

    code, data, test, judge = chapter_code("09"), of_one_thing("train"), of_one_thing("test"), book.load_judge()
    model, squeezed = code["new_model"](space), kept_part(f"{space}, autoencoder", squeeze, space)
    model.autoencoder.load_state_dict(squeezed["weights"])
    model.config, rows, tiles = replace(model.config, scale_factor=squeezed["scale"]), test.rows[:128], squeezed["tiles"]
    with torch.no_grad():
        reference = features(judge, data.pictures(slice(0, 2000)))
    embed, one = model.embed, code["unet_step_flops"](model)
    model.embed = lambda prompts: words[tuple(prompts)] if tuple(prompts) in words else embed(prompts)
    found = {
        "f": model.autoencoder.f,
        "channels": model.autoencoder.channels,
        "parameters": sum(p.numel() for p in model.unet.parameters()),
        "step_flops": one,
        **squeezed["found"],
        "points": [],
    }
    parts, losses, budgets, clock, paused = {}, [], sorted(budgets), time.process_time(), 0.0
    forever = Stage(100_000 if budgets else 0, batch, 2e-3)  # the rate hardly falls, so that every point is the end of a training of that length
    for step, loss in train_denoiser(model, data, forever, resume=lambda p: parts.update(p) or 0):
        losses.append(loss["mse"].item())
        if step * batch * one < budgets[0] * 1e12:
            continue
        begun, learning = time.process_time(), model.unet
        model.unet = parts["ema"]
        scores, drawn = space_scores(model, rows, judge, reference)
        model.unet, tiles[f"{budgets.pop(0):g}"] = learning, drawn[:8]
        point = {"steps": step, "tflops": round(step * batch * one / 1e12, 3), "seconds": round(begun - clock - paused)}
        found["points"].append(point | scores)
        print(space, found["points"][-1], flush=True)
        paused += time.process_time() - begun
        if not budgets:
            break
    return found | {"mse_of_50_steps": [mean_of(losses[i : i + 50]) for i in range(0, len(losses), 50)], "tiles": tiles}


def kept_part(name: str, function, *arguments):
    """What `function` returned in a run that was stopped, or returns now: parts of a long recipe, in runs/ of the repository, which git ignores."""
    path = HERE.parent / "runs" / "parts" / f"{name}.pt"
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        started, worked = time.time(), time.process_time()
        made = function(*arguments)
        torch.save(made | {"minutes": (time.time() - started) / 60, "cpu_minutes": (time.process_time() - worked) / 60}, path)
    return torch.load(path, weights_only=True)


SPACE_BUDGETS = {  # of the U-Nets, in 10^12 operations; 8 is common to all
    "f = 4": [2, 4, 8, 13],
    "pixels": [8, 16, 24],
    "f = 8": [8],
    "f = 2": [8],
    "f = 8, c = 16": [8],
}


@recipe("09/spaces")
def spaces():
    """The same scenes, words and budget in five spaces: pixels, and latents of four autoencoders. One training of each stage a space."""
    from ldm_minimal.__main__ import features, frechet

    model, data, test = book.load_model(), of_one_thing("train"), of_one_thing("test")
    with torch.no_grad():
        parts = [data.captions[i : i + 256] for i in range(0, len(data), 256)]
        words = {tuple(part): model.embed(part) for part in parts}
        judge = book.load_judge()
        floor = frechet(features(judge, test.pictures(slice(0, 128))), features(judge, data.pictures(slice(0, 2000))))
    squeezes = [kept_part(f"{space}, autoencoder", squeeze, space) for space in SPACE_BUDGETS]
    made = {space: kept_part(f"{space} {budgets}", in_space, space, budgets, words) for space, budgets in SPACE_BUDGETS.items()}
    tiles, names = [test.pictures(slice(0, 8)), test_cards()], ["real"] * 8 + ["cards"] * 4
    minutes = {kind: round(sum(part.pop(kind) for part in [*squeezes, *made.values()]), 1) for kind in ("minutes", "cpu_minutes")}
    for space, part in made.items():
        for name, pictures in part.pop("tiles").items():
            tiles.append(pictures)
            names += [f"{space}: {name}"] * len(pictures)
    for path in (HERE.parent / "runs" / "parts").glob("*.pt"):
        path.unlink()
    return minutes | {
        "captions": 128,
        "drawing_steps": 20,
        "guidance": 3.0,
        "pictures_of_training": len(data),
        "batch": 32,
        "common": 8,
        "frechet_floor": round(floor, 4),
        "prompts": test.captions[:8],
        "stripes": [1, 2, 3, 4, 6, 8],
        "names": names,
        "spaces": made,
    }, torch.cat(tiles)


@probe("09/spaces")
def counted_again(record):
    """The operations of a training step in all spaces, the shipped autoencoder's, and the ceiling of f = 4."""
    code, test = chapter_code("09"), of_one_thing("test")
    models = {space: code["new_model"](space) for space in record["spaces"]}
    counted = [code["unet_step_flops"](model) for model in models.values()]
    with torch.no_grad():
        x_hat = models["f = 4"].decode(models["f = 4"].encode(test.pictures(slice(0, 128))))
    read, f4 = accuracy(x_hat, test.rows[:128])["all"], record["spaces"]["f = 4"]
    return [*counted, code["shipped_tflop"](), read], [part["step_flops"] for part in record["spaces"].values()] + [
        f4["squeeze_tflops"],
        f4["ceiling"]["legible"],
    ]


@recipe("09/paid")
def tricks_that_pay(rounds: int = 15):
    """Steps of training and whole drawings, with all tricks, without each, without any, and compiled, all in turns: seconds of every round.

    On a CPU the processor's seconds of one thread; on a GPU the clock's. What another kind of machine has left in the file stays there."""
    torch.set_num_threads(1)
    code, device = chapter_code("09"), "cuda" if torch.cuda.is_available() else "cpu"
    file, found = HERE / "runs" / "09" / "paid.json", {}
    machines = json.loads(file.read_text())["machines"] if file.exists() else {}

    def now():
        if device == "cpu":
            return time.process_time()
        torch.cuda.synchronize()
        return time.perf_counter()

    def timed(call) -> dict:
        """Seconds of each part of a training step, or of the whole of a drawing."""
        laps, before = {}, now()
        for part in call() or ["whole"]:
            laps[part], before = now() - before, now()
        return laps

    for name, config, batch, count in (("shapes", code["SHAPES"], 64, 16), ("emoji", code["EMOJI"], 8, 2)):
        if device == "cuda":
            batch, count = config.denoiser_stage.batch, 64
        for job, build, size, tricks in (("training", code["training_step"], batch, code["TRAINING_TRICKS"]), ("drawing", code["drawing"], count, code["DRAWING_TRICKS"])):
            left_out = {"all": ()} | {trick: (trick,) for trick in tricks} | {"none": tricks}
            calls = {way: build(config, size, without, device) for way, without in left_out.items()}
            calls["compiled"] = build(config, size, device=device, compiled=True)
            laps = {way: [] for way in calls}
            for way in [*calls, *calls]:  # to warm up, and to compile
                timed(calls[way])
            for r in range(rounds):
                for way in [*calls][r % len(calls) :] + [*calls][: r % len(calls)]:
                    laps[way].append(timed(calls[way]))
            seconds = {way: [round(sum(lap.values()), 4) for lap in values] for way, values in laps.items()}
            parts = {way: {part: round(min(lap[part] for lap in laps[way]), 4) for part in laps[way][0]} for way in ("all", "none")}
            found[f"{job}, {name}"] = {"pictures": size, "seconds": seconds, "parts": parts}
            print(f"{job}, {name}:", {way: round(min(values) / min(seconds["all"]), 3) for way, values in seconds.items()}, flush=True)
    return {"rounds": rounds, "machines": machines | {device: {"machine": machine(), "torch": torch.__version__, "jobs": found}}}, None


# ---- chapter 10 ----


@recipe("10/time")
def seconds_at_full_size(rounds: int = 5):
    """Stable Diffusion 1 with random weights on one thread: medians of the processor's seconds for each part, and for each kind of layer of the U-Net."""
    from collections import defaultdict
    from statistics import median

    torch.set_num_threads(1)
    code = chapter_code("10")
    model, kinds, found = code["full_size"](), defaultdict(list), defaultdict(list)
    started, spent = {}, defaultdict(float)
    for name, layer in model.unet.named_modules():
        if kind := code["kind"](name, layer):
            layer.register_forward_pre_hook(lambda layer, args: started.update({layer: time.process_time()}))
            layer.register_forward_hook(
                lambda layer, args, out, kind=kind: spent.update({kind: spent[kind] + time.process_time() - started[layer]})
            )
    z, t, tokens = torch.randn(1, 4, 64, 64), torch.tensor([500]), torch.randint(49408, (1, 77))
    with torch.no_grad():
        context = model.text_encoder(tokens)
        parts = {
            "text tower": lambda: model.text_encoder(tokens),
            "U-Net": lambda: model.unet(z, t, context),
            "decoder": lambda: model.autoencoder.decode(z),
        }
        for _ in range(rounds):  # in turns, so that a busy minute of the machine meets all of them
            for part, call in parts.items():
                spent.clear()
                before = time.process_time()
                assert call().isfinite().all()
                found[part].append(round(time.process_time() - before, 3))
                if part == "U-Net":
                    for kind in spent:
                        kinds[kind].append(round(spent[kind], 3))
            print({part: values[-1] for part, values in found.items()})
    middle = {part: median(values) for part, values in found.items()}
    middle_of_kinds = {kind: median(values) for kind, values in kinds.items()}
    return {"side": 64, "rounds": dict(found), "seconds": middle, "kinds": middle_of_kinds}, None


def guess_changes(code: dict, name: str, z: Tensor, captions: list[str]) -> tuple:
    """The model with one of the chapter's traps in it, and what its U-Net guesses at t = 500."""
    model = book.load_model().requires_grad_(False)
    code["TRAPS"][name](model)
    with torch.no_grad():
        return model, model.unet(z, torch.full((len(z),), 500), model.embed(captions))


def change(wrong: Tensor, right: Tensor) -> float:
    """The root mean square of the difference, in standard deviations of what is right."""
    return float(f"{(wrong - right).square().mean().sqrt() / right.std():.3g}")


@recipe("10/traps")
def traps(captions: int = 64, steps: int = 20, guidance: float = 5.0):
    """The shipped weights in networks with one thing wrong: how far pictures and one guess change, how many are right; four pictures each."""
    code, test, found, tiles, right = chapter_code("10"), book.load_data("test"), {}, [], {}
    z, some = torch.randn(captions, 4, 8, 8, generator=torch.Generator().manual_seed(0)), slice(3, 7)
    for name in code["TRAPS"]:
        model, guess = guess_changes(code, name, z, test.captions[:captions])
        *_, (_, end, _) = model.denoise(test.captions[:captions], steps=steps, guidance=guidance, z=z)
        with torch.no_grad():
            ways = {"drawn": model.decode(end), "redrawn": model.decode(model.encode(test.pictures(slice(0, captions))))}
        right = right or ways | {"guess": guess}
        way = "redrawn" if "encoder" in name else "drawn"  # what only the encoder does shows where a picture goes in
        each = (ways[way] - right[way]).square().mean(dim=(1, 2, 3)).sqrt() / right[way].std()
        found[name] = {
            "way": way,
            "guess": change(guess, right["guess"]),
            "error": change(ways[way], right[way]),
            "median": float(f"{each.median():.3g}"),
            "others": int((each > 0.1).sum()),
            "right": round(accuracy(ways[way], test.rows[:captions])["all"], 4),
        }
        tiles.append(ways[way][some])
        print(name, found[name])
    redrawn_right = round(accuracy(right["redrawn"], test.rows[:captions])["all"], 4)
    return {"captions": captions, "drawing_steps": steps, "guidance": guidance, "prompts": test.captions[some], "redrawn_right": redrawn_right,
            "traps": found}, torch.cat(tiles)


@probe("10/traps")
def guesses_changed(record):
    """One guess of the U-Net in three of the wrong networks."""
    code, test, count = chapter_code("10"), book.load_data("test"), record["captions"]
    z = torch.randn(count, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    names = ["nothing wrong", "text: GELU for quick-GELU", "U-Net: 16 heads for 4", "U-Net: GEGLU's halves swapped"]
    right, *wrong = (guess_changes(code, name, z, test.captions[:count])[1] for name in names)
    return [change(guess, right) for guess in wrong], [record["traps"][name]["guess"] for name in names[1:]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("chapters", nargs="*", metavar="NN", help="chapters whose results to remake, or single results, NN/NAME")
    parser.add_argument("--check", action="store_true", help="only compare recipes and files")
    parser.add_argument("--execute", action="store_true", help="run the notebooks of these chapters instead, and keep their outputs")
    parser.add_argument("--minutes", action="store_true", help="print the table of minutes")
    options = parser.parse_args()
    allowed = {path.name[:2] for path in HERE.glob("[0-9][0-9]_*.ipynb")} if options.execute else {name[:2] for name in RECIPES} | {*RECIPES}
    if not set(options.chapters) <= allowed or not (options.check or options.minutes or options.chapters):
        parser.exit(2, f"runs.py: name one of {', '.join(sorted(allowed))}, or --check or --minutes\n")
    if options.execute:
        for number in options.chapters:
            execute(number)
    else:
        for name in RECIPES:
            if {name, name[:2]} & {*options.chapters}:
                make(name)
    if options.minutes:
        print(minutes())
    if options.check:
        wrong = check() or repeat()
        print("\n".join(wrong) or "every result has its recipe, every recipe its result")
        sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
