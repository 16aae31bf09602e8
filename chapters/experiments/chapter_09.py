"""Chapter 9: the same scenes in five spaces at equal work, and what each trick is worth."""

import json
import time
import weakref
from dataclasses import replace
from functools import partial

import torch
from accelerate import Accelerator
from PIL import Image, ImageDraw, ImageFont
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

import common
from book import load_data, load_evaluator, load_model
from ldm_minimal import (
    EMA,
    EMOJI,
    SHAPES,
    Attention,
    Autoencoder,
    CaptionedImages,
    Downsample,
    Gaussian,
    LatentDiffusion,
    PatchDiscriminator,
    PerceptualLoss,
    ResBlock,
    TrainConfig,
    Trainer,
    UNet,
    Upsample,
    autoencoder_loss,
    ddim_sample,
    discriminator_loss,
    encode_all,
    guided_eps,
    measure_scale_factor,
    train_autoencoder,
    train_denoiser,
)
from ldm_minimal.metrics import frechet_distance, image_features, prompt_accuracy

# ---- counting ----------------------------------------------------------------------------------


# The chapter shows this definition and UNETS; tests/test_experiments.py compares them.
def flops(module, call):
    """Additions and multiplications in `call`.

    The counter does not see into the fused kernel, so the module's attention takes its plain form.
    """
    attentions = [part for part in module.modules() if isinstance(part, Attention)]
    for attention in attentions:
        attention.keep_weights = True
    with FlopCounterMode(display=False) as counter:
        call()
    for attention in attentions:
        attention.keep_weights = False
        attention.weights = None
    return counter.get_total_flops()


class Peak(TorchDispatchMode):
    """The most bytes alive at once of all that is allocated inside the `with`."""

    def __init__(self):
        super().__init__()
        self.now = 0
        self.peak = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **(kwargs or {}))
        before = self.storages((args, kwargs))
        for key, storage in self.storages(result).items():
            if key not in before:  # neither a view of an input nor changed in place
                self.now += storage.nbytes()
                weakref.finalize(storage, self.free, storage.nbytes())
        self.peak = max(self.peak, self.now)
        return result

    def free(self, size):
        self.now -= size

    @staticmethod
    def storages(tree):
        tensors = [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]
        return {t.untyped_storage()._cdata: t.untyped_storage() for t in tensors}


def unet_step_flops(model):
    """Of one image in a training step of the U-Net, forward and backward."""
    side = 32 // model.autoencoder.f
    z = torch.zeros(1, model.autoencoder.latent_channels, side, side)
    t = torch.zeros(1, dtype=torch.long)
    context = torch.zeros(1, 77, 96)
    found = flops(model.unet, lambda: model.unet(z, t, context).sum().backward())
    model.unet.zero_grad()
    return found


def autoencoder_step_flops(net, perceptual, discriminator=None):
    """Of one image in a training step of the autoencoder, the discriminator's own step included."""
    x = torch.zeros(1, 3, 32, 32)
    eps = torch.zeros(1, net.latent_channels, 32 // net.f, 32 // net.f)

    def step():
        x_hat, posterior = net(x, eps)
        loss, _ = autoencoder_loss(x, x_hat, posterior, perceptual, discriminator, net.last_layer)
        loss.backward()
        if discriminator is not None:
            real, restored = discriminator(torch.cat([x, x_hat.detach()])).chunk(2)
            discriminator_loss(real, restored).backward()

    return flops(net, step)


def shipped_tflop():
    """10^12 operations of the shipped autoencoder's training."""
    model = load_model()
    recipe = model.config.autoencoder_training
    start = model.config.discriminator_start
    perceptual = PerceptualLoss(model.image_encoder.features)
    plain = autoencoder_step_flops(model.autoencoder, perceptual)
    adversarial = autoencoder_step_flops(model.autoencoder, perceptual, PatchDiscriminator(32, 2))
    an_image = start * plain + (recipe.steps - start) * adversarial
    return recipe.batch_size * an_image / 1e12


# ---- five spaces -------------------------------------------------------------------------------

small = SHAPES.unet  # attention on its two maps, 8 x 8 and 4 x 4
UNETS = {
    "pixels": replace(
        small, latent_channels=3, width=32, channel_mult=(1, 1, 2, 2), attention_levels=(2, 3)
    ),
    "f = 2": replace(small, channel_mult=(1, 1, 1), attention_levels=(1, 2)),
    "f = 4": small,
    "f = 8": small,
    "f = 8, c = 16": replace(small, latent_channels=16),
}


def no_variance(mean):
    """A Gaussian with this mean whose samples are all the mean."""
    return Gaussian(torch.cat([mean, torch.full_like(mean, -30.0)], dim=1))


class Pixels(nn.Module):
    """An autoencoder that does nothing: f = 1, and the latent is the image."""

    f = 1
    latent_channels = 3

    def encode(self, x):
        return no_variance(x)

    def decode(self, z):
        return z


def shallower(shipped):
    """f = 2: the outer layers of the shipped autoencoder, with new ones inside."""
    net = Autoencoder(replace(SHAPES.autoencoder, channel_mult=(1, 2)))
    for i in range(4):
        net.encoder[i].load_state_dict(shipped.encoder[i].state_dict())
    for i in range(-6, 0):
        net.decoder[i].load_state_dict(shipped.decoder[i].state_dict())
    return net


class Deeper(nn.Module):
    """f = 8: a small autoencoder of the latents of the model's f = 4, without a variance."""

    def __init__(self, model, c):
        super().__init__()
        self.f = 8
        self.latent_channels = c
        self.outer = model.autoencoder
        self.scale_factor = model.scale_factor
        conv = partial(nn.Conv2d, kernel_size=3, padding=1)
        block = partial(ResBlock, num_groups=4)
        down = [conv(4, 64), block(64, 64), Downsample(64), block(64, 128), block(128, 128)]
        self.down = nn.Sequential(*down, conv(128, c))
        up = [conv(c, 128), block(128, 128), block(128, 128), Upsample(128), block(128, 64)]
        self.up = nn.Sequential(*up, conv(64, 4))

    def encode(self, x):
        return no_variance(self.down(self.scale_factor * self.outer.encode(x).mean))

    def decode(self, z):
        return self.outer.decode(self.up(z) / self.scale_factor)


def new_model(space):
    """The shipped text encoder, the space's autoencoder (partly untrained), and a new U-Net."""
    torch.manual_seed(0)
    model = load_model()
    if space == "pixels":
        model.autoencoder = Pixels()
    elif space == "f = 2":
        model.autoencoder = shallower(model.autoencoder)
    elif space == "f = 8":
        model.autoencoder = Deeper(model, 4)
    elif space == "f = 8, c = 16":
        model.autoencoder = Deeper(model, 16)
    model.unet = UNet(UNETS[space])
    return model


def one_object(split):
    """The scenes with one object: easier, so that small trainings get somewhere."""
    data = load_data(split)
    chosen = [i for i, row in enumerate(data.rows) if len(row["scene"]["things"]) == 1]
    rows = [data.rows[i] for i in chosen]
    return CaptionedImages(data.images[chosen], [row["text"] for row in rows], rows)


def train_f2(model, data, steps=800):
    """By chapter 3's loss without a discriminator. Returns the operations."""
    recipe = TrainConfig(steps, batch_size=8, learning_rate=1e-3)
    perceptual = PerceptualLoss(model.image_encoder.requires_grad_(False).features)
    config = model.config
    model.config = replace(config, discriminator_start=steps)
    for _ in train_autoencoder(model, data, recipe, perceptual=perceptual):
        pass
    model.config = config
    return steps * recipe.batch_size * autoencoder_step_flops(model.autoencoder, perceptual)


def train_f8(model, data, steps=800):
    """The inner layers, in the latents of f = 4. Returns the operations."""
    recipe = TrainConfig(steps, batch_size=32, learning_rate=2e-3)
    net = model.autoencoder
    z = net.scale_factor * Gaussian(encode_all(load_model(), data)).mean
    inner = nn.ModuleList([net.down, net.up])
    trainer = Trainer(inner, recipe, Accelerator(cpu=True))
    for step in range(steps):
        batch = z[torch.randint(len(z), (recipe.batch_size,))]
        trainer.backward((net.up(net.down(batch)) - batch).square().mean())
        trainer.update(step)
    trainer.finish()
    one = flops(inner, lambda: net.up(net.down(z[:1])).sum().backward())
    encoding = flops(net.outer, lambda: net.outer.encode(torch.zeros(1, 3, 32, 32)))
    return steps * recipe.batch_size * one + len(data) * encoding


def train_new_layers(model, space, data):
    """Train what is new in the autoencoder, measure the scale factor. Returns 10^12 operations."""
    operations = 0
    if space == "f = 2":
        operations = train_f2(model, data)
    elif space.startswith("f = 8"):
        operations = train_f8(model, data)
    if space != "f = 4":
        measure_scale_factor(model, data)
    model.eval()
    return 0 if space == "pixels" else operations / 1e12 + shipped_tflop()


STRIPES = [1, 2, 3, 4, 6, 8]  # widths in pixels


def cards():
    """What no training image shows: stripes of 1, 2 and 4 pixels, small letters. (4, 3, 32, 32)."""
    card = Image.new("L", (32, 32), 255)
    for i, word in enumerate(("LATENT", "DIFFU-", "SION")):
        font = ImageFont.load_default(size=9)
        ImageDraw.Draw(card).text((0, 10 * i), word, fill=0, font=font)
    letters = torch.tensor(list(card.tobytes())).view(32, 32) / 127.5 - 1
    lines = [stripes_of(32, width).expand(32, 32) for width in (1, 2, 4)]
    return torch.stack([*lines, letters])[:, None].expand(-1, 3, -1, -1)


def stripes_of(length, width):
    """A line of white and black stripes of this width."""
    return 1 - 2.0 * (torch.arange(length) // width % 2)


@torch.no_grad()
def contrast_kept(restore):
    """The contrast of stripes after the autoencoder, in the same pattern, over that before.

    The mean over upright and level stripes at each position, for each width.
    """
    kept = []
    for width in STRIPES:
        line = stripes_of(48, width)
        upright = torch.stack([line[i : i + 32].expand(32, 32) for i in range(2 * width)])
        x = torch.cat([upright, upright.mT])[:, None].expand(-1, 3, -1, -1)
        pattern = x - x.mean(dim=(1, 2, 3), keepdim=True)
        kept.append(round(((restore(x) * pattern).sum() / (x * pattern).sum()).item(), 4))
    return kept


def ceiling(model, test):
    """What the autoencoder alone loses: scores, and tiles of restored images and cards."""

    def restore(x):
        return model.decode(model.encode(x))

    def with_posterior(x):
        return restore(x), model.autoencoder.encode(x)

    x = test.batch(slice(0, 128))
    scores, x_hat = common.restoration_scores(with_posterior, x, test.rows[:128])
    found = {name: scores[name] for name in ("psnr", "seen", "legible")}
    found["contrast"] = contrast_kept(restore)
    with torch.no_grad():
        return found, {"restored": x_hat[:4], "cards": restore(cards())}


@torch.no_grad()
def space_scores(model, rows, evaluator, reference):
    """Prompt accuracy and Fréchet distance of what is drawn for the captions; and the images."""
    generator = torch.Generator().manual_seed(0)
    drawn = []
    for i in range(0, len(rows), 64):
        captions = [row["text"] for row in rows[i : i + 64]]
        drawn.append(model.generate(captions, steps=20, guidance=3.0, generator=generator))
    x = torch.cat(drawn).nan_to_num()
    accuracy = {name: round(value, 4) for name, value in prompt_accuracy(x, rows).items()}
    frechet = round(frechet_distance(image_features(evaluator, x), reference), 4)
    return {"accuracy": accuracy, "frechet": frechet}, x


def race(space, budgets, batch_size):
    """Train in one space; score whenever the U-Net's 10^12 operations pass one of `budgets`.

    Returns (record, tiles). Seconds are the process's own, scoring left out.
    """
    data, test = one_object("train"), one_object("test")
    rows = test.rows[:128]
    evaluator = load_evaluator()
    model = new_model(space)
    found = {
        "f": model.autoencoder.f,
        "channels": model.autoencoder.latent_channels,
        "parameters": sum(p.numel() for p in model.unet.parameters()),
        "step_flops": unet_step_flops(model),
        "squeeze_tflops": round(train_new_layers(model, space, data), 3),
        "points": [],
    }
    tiles = {}
    if space != "pixels":
        found["ceiling"], tiles = ceiling(model, test)
    with torch.no_grad():
        reference = image_features(evaluator, data.batch(slice(0, 2000)))

    left = sorted(budgets)
    ema = EMA(model.unet)
    # So many steps that the rate hardly falls: each point is the end of a training of that length.
    recipe = TrainConfig(100_000, batch_size, learning_rate=2e-3)
    started = time.process_time()
    for step, _ in train_denoiser(model, data, recipe, ema=ema):
        tflops = step * batch_size * found["step_flops"] / 1e12
        if tflops < left[0]:
            continue
        paused = time.process_time()
        trained, model.unet = model.unet, ema.module
        scores, drawn = space_scores(model, rows, evaluator, reference)
        model.unet = trained
        point = {"steps": step, "tflops": round(tflops, 3), "seconds": round(paused - started)}
        found["points"].append(point | scores)
        tiles[f"{left.pop(0):g}"] = drawn[:8]
        print(space, found["points"][-1], flush=True)
        started += time.process_time() - paused
        if not left:
            break
    return found, tiles


BUDGETS = {  # of the U-Nets, in 10^12 operations; 8 is common to all
    "f = 4": [2, 4, 8, 13],
    "pixels": [8, 16, 24],
    "f = 8": [8],
    "f = 2": [8],
    "f = 8, c = 16": [8],
}


@common.experiment("09/spaces", batch=32, stripes=STRIPES)
def spaces(batch, stripes):
    """The same scenes, captions and budget in five spaces, one training of each."""
    data, test = one_object("train"), one_object("test")
    evaluator = load_evaluator()
    with torch.no_grad():
        real = image_features(evaluator, test.batch(slice(0, 128)))
        reference = image_features(evaluator, data.batch(slice(0, 2000)))
    found = {}
    tiles = [test.batch(slice(0, 8)), cards()]
    names = ["real"] * 8 + ["cards"] * 4
    for space, budgets in BUDGETS.items():
        found[space], drawn = race(space, budgets, batch)
        for name, images in drawn.items():
            tiles.append(images)
            names += [f"{space}: {name}"] * len(images)
    numbers = {
        "pictures_of_training": len(data),
        "common": 8,
        "frechet_floor": round(frechet_distance(real, reference), 4),
        "prompts": test.captions[:8],
        "names": names,
        "spaces": found,
    }
    return numbers, torch.cat(tiles)


@common.beginning("09/spaces")
def counted_again(record):
    """The operations of all trainings, and the ceiling of f = 4."""
    now, before = [shipped_tflop()], [record["spaces"]["f = 4"]["squeeze_tflops"]]
    for space, found in record["spaces"].items():
        now.append(unet_step_flops(new_model(space)))
        before.append(found["step_flops"])
    scores, _ = ceiling(load_model(), one_object("test"))
    for name in ("psnr", "seen", "legible"):
        now.append(scores[name])
        before.append(record["spaces"]["f = 4"]["ceiling"][name])
    return now, before


# ---- what each trick is worth ------------------------------------------------------------------

TRAINING_TRICKS = (
    "latents encoded once",
    "captions encoded once",
    "fused attention",
    "channels last",
    "fused AdamW",
)
DRAWING_TRICKS = (
    "both guesses in one pass",
    "keys and values once",
    "captions encoded once",
    "fused attention",
    "channels last",
)


def new_parts(config, without, device, compiled):
    """A model without some tricks, its U-Net, and the context of its precision."""
    torch.manual_seed(0)
    model = LatentDiffusion(replace(config, scale_factor=1.0)).to(device)
    for weights in model.unet.parameters():
        if not weights.any():
            nn.init.normal_(weights, std=0.1)  # a new U-Net's zeros would hide what they multiply
    for part in model.unet.modules():
        if isinstance(part, Attention):
            part.keep_weights = "fused attention" in without
        if isinstance(part, nn.Conv2d) and "channels last" in without:
            part.to(memory_format=torch.contiguous_format)
            part.register_forward_pre_hook(lambda part, inputs: (inputs[0].contiguous(),))
    unet = model.unet
    if compiled:
        torch._dynamo.reset()  # what it has seen of other sizes would make it compile for any
        unet = torch.compile(unet, dynamic=False)
    return model, unet, torch.autocast(device, torch.bfloat16, enabled=device == "cuda")


class TrainingStep:
    """A training step of the U-Net. A call yields the name of each part when it is done."""

    def __init__(self, config, batch_size, without=(), device="cpu", compiled=False):
        self.model, self.unet, self.autocast = new_parts(config, without, device, compiled)
        self.without = without
        self.x = torch.rand(batch_size, 3, config.image_size, config.image_size, device=device)
        self.tokens = torch.randint(500, (batch_size, 77), device=device)
        how = {"foreach": False} if "fused AdamW" in without else {"fused": True}
        self.optimizer = torch.optim.AdamW(self.unet.parameters(), 1e-4, **how)
        self.loss = None
        with torch.no_grad(), self.autocast:
            self.z = self.model.autoencoder.encode(self.x).mean
            self.context = self.model.text_encoder(self.tokens)

    def __call__(self):
        with torch.no_grad(), self.autocast:
            if "latents encoded once" in self.without:
                self.z = self.model.autoencoder.encode(self.x).mean
            yield "pictures encoded"
            if "captions encoded once" in self.without:
                self.context = self.model.text_encoder(self.tokens)
            yield "captions encoded"
        t = torch.randint(1000, (len(self.x),)).to(self.z.device)
        eps = torch.randn(self.z.shape).to(self.z.device)
        with self.autocast:
            z_t = self.model.schedule.add_noise(self.z, t, eps)
            loss = (self.unet(z_t, t, self.context).float() - eps).square().mean()
        yield "U-Net, forwards"
        loss.backward()
        yield "U-Net, backwards"
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.loss = loss.item()
        yield "AdamW"


class Drawing:
    """Guided DDIM steps and the decoder. A call yields "whole" when it is done."""

    def __init__(self, config, count, without=(), device="cpu", compiled=False):
        self.model, self.unet, self.autocast = new_parts(config, without, device, compiled)
        self.without = without
        side = config.image_size // self.model.autoencoder.f
        self.tokens = torch.randint(500, (2 * count, 77), device=device)
        self.start = torch.randn(count, 4, side, side).to(device)

    def predict(self, z, t, contexts):
        if "captions encoded once" in self.without:
            self.model.text_encoder(self.tokens)
        if len(contexts) == 1:
            return guided_eps(self.unet, z, t, contexts[0], 5.0)
        eps_empty = self.unet(z, t, contexts[0])
        eps_text = self.unet(z, t, contexts[1])
        return eps_empty + 5 * (eps_text - eps_empty)

    def __call__(self):
        with torch.no_grad(), self.autocast:
            passes = 2 if "both guesses in one pass" in self.without else 1
            contexts = self.model.text_encoder(self.tokens).chunk(passes)
            if "keys and values once" not in self.without:
                contexts = [self.model.unet.keys_values(part) for part in contexts]
            predict = partial(self.predict, contexts=contexts)
            *_, (_, z, _) = ddim_sample(predict, self.model.schedule, self.start, steps=10)
            self.model.decode(z)
        yield "whole"


def now(device):
    """Seconds: of the processor, or on a GPU those of the clock."""
    if device == "cpu":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def timed(call, device):
    """{part: its seconds} of a `TrainingStep` or a `Drawing`."""
    laps = {}
    before = now(device)
    for part in call():
        laps[part] = now(device) - before
        before = now(device)
    return laps


def time_variants(kind, tricks, config, size, device, rounds):
    """With all tricks, without each, without any, and compiled, in turns: seconds of each round."""
    calls = {"all": kind(config, size, (), device)}
    for trick in tricks:
        calls[trick] = kind(config, size, (trick,), device)
    calls["none"] = kind(config, size, tricks, device)
    calls["compiled"] = kind(config, size, (), device, compiled=True)
    for call in [*calls.values(), *calls.values()]:  # to warm up, and to compile
        timed(call, device)
    laps = {way: [] for way in calls}
    order = list(calls)
    for _ in range(rounds):
        for way in order:
            laps[way].append(timed(calls[way], device))
        order = order[1:] + order[:1]
    found = {"pictures": size, "seconds": {}, "parts": {}}
    for way, of_rounds in laps.items():
        found["seconds"][way] = [round(sum(lap.values()), 4) for lap in of_rounds]
    for way in ("all", "none"):
        shortest = {part: min(lap[part] for lap in laps[way]) for part in laps[way][0]}
        found["parts"][way] = {part: round(seconds, 4) for part, seconds in shortest.items()}
    return found


@common.experiment("09/paid", rounds=15)
def tricks_that_pay(rounds):
    """Training steps and drawings with and without the tricks, for shapes and emoji.

    On one thread of a CPU, or on a GPU; what the file has of the other kind stays in it.
    """
    torch.set_num_threads(1)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    file = common.RESULTS / "09" / "paid.json"
    machines = json.loads(file.read_text())["machines"] if file.exists() else {}
    jobs = {}
    for config, batch_size, count in ((SHAPES, 64, 16), (EMOJI, 8, 2)):
        if device == "cuda":
            batch_size, count = config.denoiser_training.batch_size, 64
        jobs[f"training, {config.name}"] = time_variants(
            TrainingStep, TRAINING_TRICKS, config, batch_size, device, rounds
        )
        jobs[f"drawing, {config.name}"] = time_variants(
            Drawing, DRAWING_TRICKS, config, count, device, rounds
        )
    machines[device] = {"machine": common.machine(), "torch": torch.__version__, "jobs": jobs}
    return {"machines": machines}, None


if __name__ == "__main__":
    common.main("09")
