"""Chapter 7: how few steps are enough, averages of seeds, and image to image from every start."""

import torch

import common
from book import load_data, load_model
from ldm_minimal import ddim_timesteps, ddpm_step, guided_eps
from ldm_minimal.metrics import prompt_accuracy
from oracle import grade_scene, read
from prepare import COLOURS, HELD_OUT


# The chapter shows this definition; tests/test_experiments.py compares the two.
def skip(predict, schedule, x, times, generator=None):
    """DDPM's algorithm 2, at some of its timesteps only. This is wrong."""
    for t in times:
        eps_hat = predict(x, t)
        noise = torch.randn(x.shape, generator=generator) if t != times[-1] else None
        x = ddpm_step(schedule, x, t, eps_hat, noise)
        yield x


def distance(a, b):
    """The root mean square of a - b, the mean over images."""
    return round((a - b).square().mean(dim=(1, 2, 3)).sqrt().mean().item(), 4)


def two_starts(captions):
    """Noise to draw the captions from, and other noise."""
    return torch.randn(2, captions, 4, 8, 8, generator=torch.Generator().manual_seed(0))


def last_latent(model, prompts, z, **options):
    generator = torch.Generator().manual_seed(1)
    *_, (_, z, _) = model.denoise(prompts, z=z, generator=generator, **options)
    return z


@common.experiment("07/steps", captions=64, guidance=5.0, steps=[1000, 250, 50, 20, 10, 5, 2])
@torch.no_grad()
def fewer_steps(captions, guidance, steps):
    """Prompt accuracy, and the distance from 1,000 steps, by sampler and number of steps."""
    model = load_model()
    test = load_data("test")
    prompts, rows = test.captions[:captions], test.rows[:captions]
    start, other_start = two_starts(captions)
    context = torch.cat([model.embed([""] * captions), model.embed(prompts)])
    kvs = model.unet.keys_values(context)

    def predict(z, t):
        return guided_eps(model.unet, z, torch.full((captions,), t), kvs, guidance)

    def ddim(count, z=start, **options):
        return last_latent(model, prompts, z, steps=count, guidance=guidance, **options)

    def skipped(count):
        times = [t for t, _, _ in ddim_timesteps(model.schedule, count)]
        generator = torch.Generator().manual_seed(1)
        *_, z = skip(predict, model.schedule, start, times, generator)
        return z

    found = {}
    drawn = {}

    def measure(name, counts, sampler, **options):
        found[name] = {"steps": counts, "accuracy": [], "distance": []}
        for count in counts:
            z = sampler(count, **options)
            drawn[name, count] = z
            accuracy = prompt_accuracy(model.decode(z), rows)["all"]
            found[name]["accuracy"].append(round(accuracy, 4))
            found[name]["distance"].append(distance(z, drawn["DDIM", steps[0]]))
            print(name, count, accuracy)

    measure("DDIM", steps, ddim)
    measure("DDIM, leading", steps[1:], ddim, spacing="leading")
    measure("DDIM, $\\eta$ = 1", steps, ddim, eta=1.0)
    measure("DDPM, steps skipped", steps[1:], skipped)

    some = slice(3, 7)
    pictured = [("DDIM", count) for count in (steps[0], 20, 5, 2)] + [("DDPM, steps skipped", 50)]
    tiles = torch.cat([model.decode(drawn[key][some]) for key in pictured])
    restored = model.decode(model.encode(test.batch(slice(0, captions))))
    numbers = {
        "ways": found,
        "another_seed": distance(ddim(50, other_start), drawn["DDIM", 50]),
        "ceiling": round(prompt_accuracy(restored, rows)["all"], 4),
        "prompts": test.captions[some],
        "pictured": pictured,
    }
    return numbers, tiles


@common.beginning("07/steps")
@torch.no_grad()
def five_steps(record):
    model = load_model()
    test = load_data("test")
    count = record["captions"]
    start, _ = two_starts(count)
    guidance = record["guidance"]
    z = last_latent(model, test.captions[:count], start, steps=5, guidance=guidance)
    now = prompt_accuracy(model.decode(z), test.rows[:count])["all"]
    return [now], [record["ways"]["DDIM"]["accuracy"][record["steps"].index(5)]]


@common.experiment("07/mix", count=256, mixed=[1, 2, 4, 16], prompt="a large red heart")
@torch.no_grad()
def mixed_seeds(count, mixed, prompt):
    """Which backgrounds are drawn from averages of several starts, straight or on the shell."""
    model = load_model()
    generator = torch.Generator().manual_seed(0)
    noises = torch.randn(count, max(mixed), 4, 8, 8, generator=generator)
    found = {"straight": [], "on the shell": []}
    for name, shares_by_k in found.items():
        for k in mixed:
            length = 1 if name == "straight" else k**0.5
            z = length * noises[:, :k].mean(dim=1)
            z = last_latent(model, [prompt] * count, z, guidance=1.0, steps=20)
            scenes = [read(image) for image in common.for_the_oracle(model.decode(z))]
            shares = {}
            for background in ("white", "cream", "grey", "black"):
                drawn = sum(scene.background == background for scene in scenes)
                shares[background] = round(drawn / count, 4)
            right = sum(all(grade_scene(scene, prompt).values()) for scene in scenes)
            shares["accuracy"] = round(right / count, 4)
            shares_by_k.append(shares)
    return {"shares": found}, None


def another_colour(thing):
    """A colour that the object does not have, and that training showed on its shape."""
    colours = list(COLOURS)
    i = colours.index(thing["colour"])
    for colour in colours[i + 3 :] + colours[:i]:
        if (colour, thing["shape"]) not in HELD_OUT:
            return colour
    raise ValueError(f"no colour for {thing}")


def what_is_kept(scene, old, colour):
    """Has the scene's first object the new colour, and the old shape, position and size; and the
    scene the old background?"""
    was = old["things"][0]
    kept = dict.fromkeys(("new colour", "shape", "place", "size"), False)
    if scene.things:
        now = scene.things[0]
        kept["new colour"] = now.colour == colour
        kept["shape"] = now.shape == was["shape"]
        kept["place"] = max(abs(now.x - was["x"]), abs(now.y - was["y"])) < 0.1
        kept["size"] = now.size == was["size"]
    kept["background"] = scene.background == old["background"]
    return kept


@common.experiment("07/start", count=64, starts=[50, *range(100, 1000, 100), 999])
@torch.no_grad()
def image_to_image(count, starts):
    """Another colour for real images, from each start: what is kept, what the caption changes."""
    model = load_model()
    test = load_data("test")
    chosen = [i for i, row in enumerate(test.rows) if len(row["scene"]["things"]) == 1][:count]
    scenes = [test.rows[i]["scene"] for i in chosen]
    wanted = [another_colour(scene["things"][0]) for scene in scenes]
    shapes = [scene["things"][0]["shape"] for scene in scenes]
    prompts = [f"a {colour} {shape}" for colour, shape in zip(wanted, shapes)]
    z = model.encode(test.batch(torch.tensor(chosen)))
    eps = torch.randn(z.shape, generator=torch.Generator().manual_seed(0))
    shares = {}
    for guidance in (5.0, 1.0):
        found = {}
        for start in starts:
            z_t = model.schedule.add_noise(z, torch.full((count,), start), eps)
            drawn = last_latent(model, prompts, z_t, start=start, guidance=guidance)
            totals = dict.fromkeys(("new colour", "shape", "place", "size", "background"), 0)
            images = common.for_the_oracle(model.decode(drawn))
            for image, scene, colour in zip(images, scenes, wanted):
                for name, holds in what_is_kept(read(image), scene, colour).items():
                    totals[name] += int(holds)
            for name, total in totals.items():
                found.setdefault(name, []).append(round(total / count, 4))
        shares[f"{guidance:g}"] = found
    return {"shares": shares}, None


if __name__ == "__main__":
    common.main("07")
