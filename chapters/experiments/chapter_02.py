"""Chapter 2: a simple U-Net in pixel space, trained for longer than a reader would wait."""

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import nn

import common
from book import load_data
from ldm_minimal import (
    EMA,
    CaptionedImages,
    NoiseSchedule,
    TrainConfig,
    Trainer,
    ddpm_sample,
    predict_z0,
    timestep_embedding,
)

schedule = NoiseSchedule("linear")


# The chapter shows these definitions; tests/test_experiments.py compares them.
class Block(nn.Module):
    """x + convolutions of x, with t_emb added in between. (B, c_in, H, W) -> (B, c_out, H, W)."""

    def __init__(self, c_in, c_out):
        super().__init__()
        self.t_proj = nn.Linear(64, c_out)
        self.shortcut = nn.Conv2d(c_in, c_out, 1)  # the library has none where c_in = c_out
        norm, conv = nn.GroupNorm(8, c_in), nn.Conv2d(c_in, c_out, 3, padding=1)
        self.first = nn.Sequential(norm, nn.SiLU(), conv)
        norm, conv = nn.GroupNorm(8, c_out), nn.Conv2d(c_out, c_out, 3, padding=1)
        self.second = nn.Sequential(norm, nn.SiLU(), conv)

    def forward(self, x, t_emb):
        h = self.first(x) + self.t_proj(t_emb)[:, :, None, None]
        return self.shortcut(x) + self.second(h)


class SimpleUNet(nn.Module):
    """eps_theta for images: x_t (B, 3, 32, 32), t (B,) -> eps_hat like x_t."""

    def __init__(self, c=32):
        super().__init__()
        self.conv_in = nn.Conv2d(3, c, 3, padding=1)
        self.conv_out = nn.Conv2d(c, 3, 3, padding=1)
        self.down = nn.ModuleList([Block(c, c), Block(c, 2 * c), Block(2 * c, 4 * c)])
        self.middle = Block(4 * c, 4 * c)
        self.up = nn.ModuleList([Block(8 * c, 2 * c), Block(4 * c, c), Block(2 * c, c)])
        self.to(memory_format=torch.channels_last)

    def forward(self, x_t, t):
        t_emb = timestep_embedding(t, 64)
        h = self.conv_in(x_t)
        skips = []
        for block in self.down:
            h = block(h, t_emb)  # (B, c, 32, 32), (B, 2c, 16, 16), (B, 4c, 8, 8)
            skips.append(h)
            h = F.avg_pool2d(h, 2)
        h = self.middle(h, t_emb)  # (B, 4c, 4, 4)
        for block in self.up:
            h = F.interpolate(h, scale_factor=2.0)
            h = torch.cat([h, skips.pop()], dim=1)  # pop: the last one put in, of the same size
            h = block(h, t_emb)  # (B, 2c, 8, 8), (B, c, 16, 16), (B, c, 32, 32)
        return self.conv_out(F.silu(h))


def train(net, draw, steps, batch_size, learning_rate):
    """DDPM's algorithm 1. Yields the loss of each step."""
    optimizer = torch.optim.AdamW(net.parameters(), learning_rate)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * (1 - step / steps)
        x = draw(batch_size)
        t = torch.randint(schedule.T, (batch_size,))
        eps = torch.randn_like(x)
        x_t = schedule.add_noise(x, t, eps)
        eps_hat = net(x_t, t)
        loss = F.mse_loss(eps_hat, eps)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        yield loss.item()


def new_training(steps, batch_size):
    """An untrained U-Net of seed 0, and the generator that trains it."""
    draw = common.batches(load_data("train"))
    torch.manual_seed(0)
    unet = SimpleUNet()
    return unet, train(unet, draw, steps, batch_size, learning_rate=2e-3)


def error_by_timestep(unet):
    x = load_data("test").batch(slice(0, 128))

    def predict(x_t, t, context):
        return unet(x_t, t)

    return common.error_by_timestep(predict, schedule, x, None, range(0, 1000, 50))


@common.experiment("02/pixels", steps=1200, batch=32)
def pixels(steps, batch):
    """The loss at each t after 300 steps and after all of them, and 16 samples."""
    short_unet, training = new_training(300, batch)
    for _ in training:
        pass
    unet, training = new_training(steps, batch)
    losses = list(training)
    with torch.no_grad():
        *_, (_, drawn, _) = ddpm_sample(unet, schedule, torch.randn(16, 3, 32, 32))
    numbers = {
        "losses_of_50_steps": common.means(losses, 50),
        "loss_by_t": error_by_timestep(unet),
        "loss_by_t_short": error_by_timestep(short_unet),
    }
    return numbers, drawn.clamp(-1, 1)


@common.beginning("02/pixels")
def first_fifty_steps(record):
    _, training = new_training(record["steps"], record["batch"])
    return [common.first_mean(training, 50)], record["losses_of_50_steps"][:1]


def single_objects():
    """The training images of version 2 with one object."""
    data = load_data("train", version=2)
    rows = [i for i, row in enumerate(data.rows) if len(row["scene"]["things"]) == 1]
    return CaptionedImages(data.images[rows], [data.captions[i] for i in rows])


def long_training(steps, batch, rate):
    """The averaged U-Net of a longer training, and the generator of its losses.

    It differs from `train` by the optimizer, Muon, and by averaging the weights (chapter 8).
    """
    draw = common.batches(single_objects())
    torch.manual_seed(0)
    unet = SimpleUNet()
    average = EMA(unet, decay=0.995)
    config = TrainConfig(steps=steps, batch_size=batch, learning_rate=rate, muon=True)
    trainer = Trainer(unet, config, Accelerator(cpu=True), ema=average)

    def training():
        for step in range(steps):
            x = draw(batch)
            t = torch.randint(schedule.T, (batch,))
            eps = torch.randn_like(x)
            loss = F.mse_loss(unet(schedule.add_noise(x, t, eps), t), eps)
            trainer.backward(loss)
            trainer.update(step)
            yield loss.item()

    return average.module, training()


# The chapter shows this definition; tests/test_experiments.py compares them.
def clipped(eps_hat, x_t, alpha_bar):
    """The noise that leads from x_t to a predicted image whose pixels are cut to [-1, 1]."""
    x_0_hat = predict_z0(x_t, eps_hat, alpha_bar).clamp(-1, 1)
    return (x_t - alpha_bar**0.5 * x_0_hat) / (1 - alpha_bar) ** 0.5


@common.experiment(
    "02/film", steps=3000, batch=32, rate=4e-3, at=[999, 700, 500, 400, 300, 200, 150, 100, 50, 0]
)
def film(steps, batch, rate, at):
    """Images of one object: eight samples at several t, then 16 clipped and 16 not clipped."""
    unet, training = long_training(steps, batch, rate)
    losses = []
    for loss in training:
        losses.append(loss)
        if len(losses) % 100 == 0:
            print(len(losses), sum(losses[-100:]) / 100, flush=True)

    def unet_clipped(x_t, t):
        alpha_bar = schedule.alpha_bars[t[0]].item()  # all images of a step have the same t
        return clipped(unet(x_t, t), x_t, alpha_bar)

    start = torch.randn(16, 3, 32, 32)
    tiles, ends = [], []
    with torch.no_grad():
        for guess in (unet_clipped, unet):
            generator = torch.Generator().manual_seed(1)
            for t, x, _ in ddpm_sample(guess, schedule, start, generator=generator):
                if guess is not unet and t in at:
                    tiles.append(x[:8])
            ends.append(x)
    numbers = {
        "losses_of_50_steps": common.means(losses, 50),
        "mean_of_each": [[common.short(v) for v in x.mean(dim=(1, 2, 3)).tolist()] for x in ends],
    }
    return numbers, torch.cat([*tiles, *ends]).clamp(-1, 1)


@common.beginning("02/film")
def first_fifty_steps_of_the_film(record):
    _, training = long_training(record["steps"], record["batch"], record["rate"])
    return [common.first_mean(training, 50)], record["losses_of_50_steps"][:1]


if __name__ == "__main__":
    common.main("02")
