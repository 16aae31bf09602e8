"""Latent diffusion, whole: one file, top to bottom in the order of the chapters.

A picture x is squeezed by an autoencoder into a small latent z; a U-Net learns to remove noise from z, told by a caption
what to make of it; to draw, start from noise, denoise fifty times, and decode once. Three trainings make it:

    stage 0   train_clip          pictures and captions meet in one space     -> text encoder, perceptual loss
    stage 1   train_autoencoder   x -> z -> x, sharp though 12 to 48 x smaller -> autoencoder, scale factor
    stage 2   train_denoiser      z_t, t, caption -> the noise in z_t          -> U-Net

One set of classes serves every size: as `SHAPES` they train on two CPU cores, as `SD1` they are Stable Diffusion 1.x, parameter for parameter.

Notation (section 14.12 of the book; a paper's own symbol is translated where the paper is cited)

    x         picture                (B, 3, H, W), in [-1, 1]
    z, z_t    latent, noised latent  (B, c, h, w), about unit variance; f = H / h
    t         timestep               (B,) long, 0 ... T-1; larger is noisier
    eps       the noise              like z; eps_hat is the U-Net's guess at it (predictions end in _hat)
    alpha_bar share of signal power  (T,), falling from about 1 to about 0
    tokens    the caption y, cut     (B, 77) long
    context   the caption y, encoded (B, 77, d)
    guidance  w                      1 = plain conditional, 0 = unconditional

References
    DDPM        Ho, Jain, Abbeel 2020, arXiv 2006.11239        DDIM      Song, Meng, Ermon 2021, arXiv 2010.02502
    cosine      Nichol, Dhariwal 2021, arXiv 2102.09672        guidance  Ho, Salimans 2022, arXiv 2207.12598
    latent      Rombach et al. 2022, arXiv 2112.10752          VQGAN     Esser et al. 2021, arXiv 2012.09841
    CLIP        Radford et al. 2021, arXiv 2103.00020          LPIPS     Zhang et al. 2018, arXiv 1801.03924
    PatchGAN    Isola et al. 2017, arXiv 1611.07004            GEGLU     Shazeer 2020, arXiv 2002.05202
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import json
import math
import os
import pathlib
import shutil
import warnings
from collections.abc import Callable, Iterator

import numpy as np
import safetensors.torch
import tokenizers
import torch
import torch.distributed.nn.functional
import torch.nn.functional as F
from accelerate import Accelerator
from PIL import Image, ImageOps
from torch import Tensor, nn
from tqdm.auto import tqdm

__all__ = [
    "NoiseSchedule", "timestep_embedding", "ResBlock", "Attention", "TransformerBlock", "Downsample", "Upsample",
    "AutoencoderConfig", "Gaussian", "AttentionBlock", "Autoencoder", "PatchDiscriminator", "PerceptualLoss",
    "adaptive_weight", "autoencoder_loss", "discriminator_loss",
    "CaptionedImages", "Tokenizer", "TextConfig", "TextLayer", "TextEncoder", "ImageConfig", "ImageEncoder", "CLIP", "clip_loss",
    "UNetConfig", "UNetBlock", "UNet", "guided_eps", "ddim_timesteps", "ddpm_sample", "ddim_sample", "ddim_invert",
    "LatentDiffusion", "Stage", "Trainee", "EMA", "train_clip", "train_autoencoder", "encode_all", "measure_scale_factor", "embed_all",
    "train_denoiser", "Config", "SHAPES", "EMOJI", "SD1", "NAMED_SIZES",
]


# ---------------------------------------------------------------------------------------------- noise (chapter 1) ----

class NoiseSchedule:
    """How fast a picture drowns in noise: beta_t, and alpha_bar_t, the share of signal power that is left at step t.

        q(z_t | z_{t-1}) = N(sqrt(1 - beta_t) z_{t-1}, beta_t I)        alpha_bar_t = prod_{s <= t} (1 - beta_s)

    DDPM eq. 2 and 4; the book's t = 1 ... T is t = 0 ... T-1 here. `betas` and `alpha_bars` are (T,) float64 on the CPU,
    where 1 - alpha_bar keeps its digits when alpha_bar is nearly 1.

    kind: "linear" (DDPM: 1e-4 to 0.02), "scaled-linear" (Stable Diffusion: sqrt(beta) linear, 0.00085 to 0.012) or
    "cosine" (Nichol & Dhariwal eq. 17). T: number of steps, at least 2. Raises ValueError otherwise."""

    def __init__(self, kind: str = "scaled-linear", T: int = 1000):
        if T < 2:
            raise ValueError(f"T is {T}; a schedule has at least 2 steps")
        if kind == "linear":
            betas = torch.linspace(1e-4, 0.02, T, dtype=torch.float64, device="cpu")
        elif kind == "scaled-linear":
            betas = torch.linspace(0.00085**0.5, 0.012**0.5, T, dtype=torch.float64, device="cpu") ** 2
        elif kind == "cosine":
            u = torch.arange(T + 1, dtype=torch.float64, device="cpu") / T
            wave = torch.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2
            betas = (1 - wave[1:] / wave[:-1]).clamp(max=0.999)
        else:
            raise ValueError(f"kind is {kind!r}; allowed are 'linear', 'scaled-linear' and 'cosine'")
        self.kind, self.T, self.betas = kind, T, betas
        self.alpha_bars = torch.cumprod(1 - betas, dim=0)

    def add_noise(self, z: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        """z_t = sqrt(alpha_bar_t) z + sqrt(1 - alpha_bar_t) eps: all t steps of noise in one (DDPM eq. 4).

        z, eps: (B, ...); t: (B,) long in 0 ... T-1. Returns z_t like z."""
        shape = (-1,) + (1,) * (z.ndim - 1)
        signal = self.alpha_bars.sqrt().to(z.dtype).to(z.device)[t].view(shape)
        noise = (1 - self.alpha_bars).sqrt().to(z.dtype).to(z.device)[t].view(shape)
        return signal * z + noise * eps

    def snr(self) -> Tensor:
        """Signal-to-noise ratio alpha_bar / (1 - alpha_bar) of every step, (T,) float64, for data of unit variance."""
        return self.alpha_bars / (1 - self.alpha_bars)


# ------------------------------------------------------------------------------------- blocks (chapters 2, 3, 5) ----

def timestep_embedding(t: Tensor, width: int) -> Tensor:
    """Each t as cosines, then sines, of `width` / 2 frequencies from 1 down to nearly 1/10000. (B,) -> (B, width)."""
    half = width // 2
    frequencies = torch.exp(-math.log(10_000) * torch.arange(half, dtype=torch.float32, device=t.device) / half)
    angles = t[:, None].float() * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=1)


class ResBlock(nn.Module):
    """h = conv(silu(norm(x))) + time; out = skip(x) + conv(silu(norm(h))). (B, C_in, H, W) -> (B, C_out, H, W).

    time: (B, time_width), silu(MLP(embedding of t)), added to every position; time_width 0 (autoencoder) for none.
    groups, eps: of both GroupNorms; Stable Diffusion has 32 groups, and eps 1e-5 in the U-Net, 1e-6 in the autoencoder."""

    def __init__(self, c_in: int, c_out: int, time_width: int = 0, groups: int = 32, eps: float = 1e-5):
        super().__init__()
        self.norm_in = nn.GroupNorm(groups, c_in, eps)
        self.conv_in = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.time = nn.Linear(time_width, c_out) if time_width else None
        self.norm_out = nn.GroupNorm(groups, c_out, eps)
        self.conv_out = nn.Conv2d(c_out, c_out, 3, padding=1)
        self.skip = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()

    def forward(self, x: Tensor, time: Tensor | None = None) -> Tensor:
        h = self.conv_in(F.silu(self.norm_in(x)))                                           # (B, C_out, H, W)
        if self.time is not None:
            h = h + self.time(time)[:, :, None, None]
        return self.skip(x) + self.conv_out(F.silu(self.norm_out(h)))


class Attention(nn.Module):
    """softmax(Q K^T / sqrt(d)) V in `heads` heads, queries from x, keys and values from `context` (x itself if None).

    x: (B, N, width); context: (B, M, context_width), or a dict {attention: (k, v)} as `UNet.prepare` makes once per prompt. Returns (B, N, width).
    Set `keep_weights` and each call leaves its weights, (B, heads, N, M), in `weights`: slower, for looking at. Raises ValueError unless `heads` divides `width`."""

    def __init__(self, width: int, context_width: int | None = None, heads: int = 8, bias: bool = False, causal: bool = False):
        super().__init__()
        if width % heads:
            raise ValueError(f"heads is {heads}; it must divide width, {width}")
        self.heads, self.causal = heads, causal
        self.query = nn.Linear(width, width, bias=bias)
        self.key_value = nn.Linear(context_width or width, 2 * width, bias=bias)            # both in one product
        self.out = nn.Linear(width, width)
        self.keep_weights, self.weights = False, None

    def split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)                            # (B, heads, N, d)

    def keys_values(self, context: Tensor) -> tuple[Tensor, Tensor]:
        k, v = self.key_value(context).chunk(2, dim=-1)
        return self.split(k), self.split(v)

    def forward(self, x: Tensor, context: Tensor | dict | None = None) -> Tensor:
        q = self.split(self.query(x))
        # Prepared, the context is a dict in which each layer finds the keys and values it made of the prompt.
        k, v = context[self] if isinstance(context, dict) else self.keys_values(x if context is None else context)
        if self.keep_weights:
            scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5                           # (B, heads, N, M)
            if self.causal:
                scores = scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(1), -math.inf)
            self.weights = scores.softmax(dim=-1)
            h = self.weights @ v
        else:
            h = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        return self.out(h.transpose(1, 2).flatten(2))                                       # (B, N, width)


class TransformerBlock(nn.Module):
    """Self-attention, cross-attention to the caption, GEGLU feed-forward; each adds to its input. (B, C, H, W) -> same.

    GEGLU (Shazeer 2020): value * gelu(gate), both linear in x. The projections at the ends are Stable Diffusion's 1x1 convolutions, over rows."""

    def __init__(self, width: int, context_width: int, heads: int = 8, groups: int = 32):
        super().__init__()
        self.norm = nn.GroupNorm(groups, width, eps=1e-6)
        self.project_in = nn.Linear(width, width)
        self.norm_self, self.attend_self = nn.LayerNorm(width), Attention(width, heads=heads)
        self.norm_cross, self.attend_cross = nn.LayerNorm(width), Attention(width, context_width, heads)
        self.norm_mlp, self.mlp_out, self.project_out = nn.LayerNorm(width), nn.Linear(4 * width, width), nn.Linear(width, width)
        self.mlp_value, self.mlp_gate = nn.Linear(width, 4 * width), nn.Linear(width, 4 * width)  # two small products beat one large

    def forward(self, x: Tensor, context: Tensor | dict) -> Tensor:
        h = self.project_in(_rows(self.norm(x)))                                             # (B, H*W, C)
        h = h + self.attend_self(self.norm_self(h))
        h = h + self.attend_cross(self.norm_cross(h), context)
        n = self.norm_mlp(h)
        h = h + self.mlp_out(self.mlp_value(n) * F.gelu(self.mlp_gate(n)))
        return x + _grid(self.project_out(h), x.shape)                                       # (B, C, H, W)


def _rows(x: Tensor) -> Tensor:
    return x.permute(0, 2, 3, 1).flatten(1, 2)  # (B, C, H, W) -> (B, H*W, C); no copy where x is channels_last


def _grid(x: Tensor, shape: torch.Size) -> Tensor:
    return x.unflatten(1, shape[2:]).permute(0, 3, 1, 2)  # (B, H*W, C) -> (B, C, H, W)


class Downsample(nn.Module):
    """Halve height and width; `asymmetric` pads right and below only, as Stable Diffusion's autoencoder does."""

    def __init__(self, channels: int, asymmetric: bool = False):
        super().__init__()
        self.asymmetric = asymmetric
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=0 if asymmetric else 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)) if self.asymmetric else x)


class Upsample(nn.Module):
    """Double height and width: every pixel four times, then a convolution."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


# --------------------------------------------------------------------------------------- autoencoder (chapter 3) ----

@dataclasses.dataclass(frozen=True)
class AutoencoderConfig:
    """width: channels at full resolution; mult: their multiple at each level, so f = 2 ** (levels - 1); blocks: residual
    blocks a level (one more on the way up); channels: c of the latent; groups: of every GroupNorm."""
    width: int = 128
    mult: tuple[int, ...] = (1, 2, 4, 4)
    blocks: int = 2
    channels: int = 4
    groups: int = 32


class Gaussian:
    """N(mean, exp(logvar)), one for every latent scalar, from the encoder's (B, 2c, h, w); logvar in [-30, 20]."""

    def __init__(self, moments: Tensor):
        self.mean, logvar = moments.chunk(2, dim=1)
        self.logvar = logvar.clamp(-30, 20)

    def sample(self, eps: Tensor) -> Tensor:
        """mean + std * eps: random in eps, differentiable in mean and std (the reparameterisation). eps like mean."""
        return self.mean + (0.5 * self.logvar).exp() * eps

    def kl(self) -> Tensor:
        """KL(N(mean, var) || N(0, I)) = sum (mean^2 + var - 1 - log var) / 2, in nats. Returns (B,)."""
        mean, logvar = self.mean.float(), self.logvar.float()
        return 0.5 * (mean**2 + logvar.exp() - 1 - logvar).sum(dim=(1, 2, 3))


class AttentionBlock(nn.Module):
    """x + attention(norm(x)) over all positions, in one head: the middle of the autoencoder."""

    def __init__(self, width: int, groups: int):
        super().__init__()
        self.norm = nn.GroupNorm(groups, width, eps=1e-6)
        self.attention = Attention(width, heads=1, bias=True)

    def forward(self, x: Tensor) -> Tensor:
        return x + _grid(self.attention(_rows(self.norm(x))), x.shape)


class Autoencoder(nn.Module):
    """E and D of the book: `encode` x (B, 3, H, W) into a Gaussian over z (B, c, H/f, W/f), `decode` z into x_hat.

    The KL-regularised autoencoder of Rombach et al., app. G. H and W must be multiples of f. `forward` does both: x and
    the reparameterisation's eps (or None, for the mean) -> (x_hat, posterior)."""

    def __init__(self, config: AutoencoderConfig = AutoencoderConfig()):
        super().__init__()
        widths, groups = [config.width * m for m in config.mult], config.groups
        conv = functools.partial(nn.Conv2d, kernel_size=3, padding=1)
        block = functools.partial(ResBlock, groups=groups, eps=1e-6)
        middle = lambda c: [block(c, c), AttentionBlock(c, groups), block(c, c)]  # noqa: E731
        end = lambda c, c_out: [nn.GroupNorm(groups, c, eps=1e-6), nn.SiLU(), conv(c, c_out)]  # noqa: E731
        self.f, self.channels = 2 ** (len(widths) - 1), config.channels
        down, c = [conv(3, widths[0])], widths[0]
        for level, width in enumerate(widths):
            for _ in range(config.blocks):
                down, c = down + [block(c, width)], width
            if level < len(widths) - 1:
                down.append(Downsample(c, asymmetric=True))
        up = [conv(config.channels, c), *middle(c)]
        for level, width in reversed(list(enumerate(widths))):
            for _ in range(config.blocks + 1):
                up, c = up + [block(c, width)], width
            if level > 0:
                up.append(Upsample(c))
        self.encoder = nn.Sequential(*down, *middle(widths[-1]), *end(widths[-1], 2 * config.channels))
        self.to_moments = nn.Conv2d(2 * config.channels, 2 * config.channels, 1)
        self.from_latent = nn.Conv2d(config.channels, config.channels, 1)
        self.decoder = nn.Sequential(*up, *end(c, 3))
        nn.init.constant_(self.to_moments.bias[config.channels:], -6.0)  # a latent starts nearly sure of itself: std e^-3
        self.to(memory_format=torch.channels_last)

    def encode(self, x: Tensor) -> Gaussian:
        if x.shape[-1] % self.f or x.shape[-2] % self.f:
            raise ValueError(f"x is {x.shape[-2]} x {x.shape[-1]}; height and width must be multiples of f = {self.f}")
        return Gaussian(self.to_moments(self.encoder(x.to(self.from_latent.weight.dtype, memory_format=torch.channels_last))))

    def decode(self, z: Tensor) -> Tensor:
        h = self.from_latent(z.to(self.from_latent.weight.dtype, memory_format=torch.channels_last))
        for layer in list(self.decoder)[:-1]:
            h = layer(h)
        return self._last(h)

    @torch.compiler.disable  # `adaptive_weight` asks for gradients at this layer alone; compiled with the rest, it would cost a whole way back
    def _last(self, h: Tensor) -> Tensor:
        return self.decoder[-1](h)

    def forward(self, x: Tensor, eps: Tensor | None = None) -> tuple[Tensor, Gaussian]:
        posterior = self.encode(x)
        return self.decode(posterior.mean if eps is None else posterior.sample(eps)), posterior


class PatchDiscriminator(nn.Module):
    """Real or made, judged patch by patch (PatchGAN, Isola et al. 2017). (B, 3, H, W) -> logits (B, 1, about H/2^layers).

    GroupNorm in place of BatchNorm: no picture's verdict depends on its neighbours in the batch. 1, 2, 3 layers see patches of 16, 34, 70 pixels."""

    def __init__(self, width: int = 64, layers: int = 3, groups: int = 8):
        super().__init__()
        net, c = [nn.Conv2d(3, width, 4, stride=2, padding=1), nn.LeakyReLU(0.2)], width
        for layer in range(1, layers + 1):
            c_out, stride = width * min(2**layer, 8), 1 if layer == layers else 2
            net += [nn.Conv2d(c, c_out, 4, stride, 1), nn.GroupNorm(groups, c_out), nn.LeakyReLU(0.2)]
            c = c_out
        self.net = nn.Sequential(*net, nn.Conv2d(c, 1, 4, padding=1)).to(memory_format=torch.channels_last)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class PerceptualLoss(nn.Module):
    """Distance of two pictures in the eyes of a network: the LPIPS form (Zhang et al. 2018, eq. 1, whose w is inside the square).

        d(x, y) = sum_layers mean_positions sum_channels w (f(x) - f(y))^2,  f = features of unit length per position

    features: x -> list of (B, C, h, w), such as `ImageEncoder.features` (then this is the LPIPS *form*, not LPIPS) or
    VGG16's, by `stable_diffusion.published_lpips`. weights: per layer (C,), or None for 1. x, y in [-1, 1]; returns (B,)."""

    def __init__(self, features: Callable[[Tensor], list[Tensor]], weights: list[Tensor] | None = None):
        super().__init__()
        self.features, self.layer_weights = features, weights

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        distance = x.new_zeros(len(x))
        for i, (a, b) in enumerate(zip(self.features(x), self.features(y))):
            a, b = [m * torch.rsqrt((m**2).sum(dim=1, keepdim=True) + 1e-10) for m in (a, b)]  # (B, C, h, w)
            weight = 1 if self.layer_weights is None else self.layer_weights[i].to(x).view(1, -1, 1, 1)
            distance = distance + (weight * (a - b) ** 2).sum(dim=1).mean(dim=(1, 2))
        return distance


def adaptive_weight(reconstruction: Tensor, adversarial: Tensor, last_weight: Tensor) -> Tensor:
    """Esser et al. 2021, eq. 7: |grad reconstruction| / (|grad adversarial| + 1e-4, CompVis' value) at the last layer.

    Both losses scalar and unscaled (before any GradScaler); norms in float32. Returns a scalar, detached, in [0, 1e4]: multiplied by it, the
    adversary pulls on the decoder as hard as the reconstruction does."""
    norm = lambda loss: torch.autograd.grad(loss, last_weight, retain_graph=True)[0].float().norm()  # noqa: E731
    return (norm(reconstruction) / (norm(adversarial) + 1e-4)).clamp(0, 1e4).detach()


def autoencoder_loss(x: Tensor, x_hat: Tensor, posterior: Gaussian, perceptual: Callable | None = None,
                     adversary: nn.Module | None = None, last_weight: Tensor | None = None, kl_weight: float = 1e-6,
                     perceptual_weight: float = 1.0, adversarial_weight: float = 0.5) -> tuple[Tensor, dict[str, Tensor]]:
    """L1 + perceptual + adversarial + a tiny KL (Rombach et al. app. G; Esser et al. eq. 5 to 7).

    Reconstruction and KL are summed over a picture and averaged over the batch, as in CompVis' code, so the perceptual distance counts once for every
    scalar. None leaves a term out. Returns the scalar to minimise and the parts: l1 per scalar, perceptual, kl per picture, adversarial, weight."""
    l1 = (x - x_hat).abs()
    distance = perceptual(x, x_hat) if perceptual else x.new_zeros(len(x))
    reconstruction = (l1.sum(dim=(1, 2, 3)) + perceptual_weight * distance * x[0].numel()).mean()
    kl = posterior.kl().mean()
    loss = reconstruction + kl_weight * kl
    parts = {"l1": l1.mean(), "perceptual": distance.mean(), "kl": kl}
    if adversary is not None:
        parts["adversarial"] = -adversary(x_hat).mean()  # the decoder wants its pictures called real
        parts["weight"] = adaptive_weight(reconstruction, parts["adversarial"], last_weight)
        loss = loss + adversarial_weight * parts["weight"] * parts["adversarial"]
    return loss, {name: part.detach() for name, part in parts.items()}


def discriminator_loss(real: Tensor, fake: Tensor) -> Tensor:
    """Hinge loss (Lim & Ye 2017, arXiv 1705.02894): mean of relu(1 - real) and relu(1 + fake), logits of any shape -> scalar."""
    return 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())


# ------------------------------------------------------------------------------------------------------- data ----

class CaptionedImages:
    """A folder of pictures with a `metadata.jsonl` of {"file_name": ..., "text": ...} lines (the imagefolder convention).

    Pictures are cut to their middle square, resized to `size` and held in memory: `images` (N, 3, size, size) uint8, `captions` list of N strings.
    Raises ValueError naming the file and line that is wrong, FileNotFoundError where there is no metadata.jsonl."""

    def __init__(self, folder: str | os.PathLike, size: int, progress: bool = False):
        folder = pathlib.Path(folder)
        metadata = folder / "metadata.jsonl"
        if not metadata.is_file():
            raise FileNotFoundError(f'no captions: {metadata} does not exist; it holds one {{"file_name": ..., "text": ...}} line for each picture')
        lines = metadata.read_bytes().decode("utf-8-sig", errors="replace").split("\n")
        self.rows = [self.parse(line, f"{metadata}, line {n}") for n, line in enumerate(lines, 1) if line.strip()]
        if not self.rows:
            raise ValueError(f"{metadata} is empty; it needs one line for each picture")
        self.captions = [row["text"] for row in self.rows]
        self.images = torch.empty(len(self.rows), 3, size, size, dtype=torch.uint8)
        for i, row in enumerate(tqdm(self.rows, desc="reading pictures", disable=not progress, leave=False)):
            self.images[i] = self.read(folder / row["file_name"], size)

    @staticmethod
    def parse(line: str, where: str) -> dict:
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{where} is not JSON: {error}") from None
        for key in ("file_name", "text"):
            if not isinstance(row, dict) or not isinstance(row.get(key), str):
                raise ValueError(f"{where} has no {key!r}, or one that is not a string")
        return row

    @staticmethod
    def read(path: pathlib.Path, size: int) -> Tensor:
        """One picture, (3, size, size) uint8; transparent pixels become white."""
        try:
            with Image.open(path) as file:
                picture = ImageOps.exif_transpose(file).convert("RGBA")
        except FileNotFoundError:
            raise ValueError(f"{path} is named in metadata.jsonl but does not exist") from None
        except (OSError, SyntaxError, Image.DecompressionBombError) as error:
            raise ValueError(f"{path} is not a picture that can be read: {error}") from None
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB")
        picture = ImageOps.fit(picture, (size, size), Image.Resampling.LANCZOS)
        return torch.from_numpy(np.array(picture)).permute(2, 0, 1)                         # (3, size, size)

    def __len__(self) -> int:
        return len(self.captions)

    def pictures(self, index: Tensor | slice) -> Tensor:
        """x of the chosen rows, (B, 3, size, size) float32 in [-1, 1]."""
        return self.images[index].float() / 127.5 - 1


# ---------------------------------------------------------------------------------------------- text (chapter 5) ----

class Tokenizer:
    """Captions to numbers as CLIP does it: lower case, byte pairs that end words with </w>, 77 tokens.

    A caption is <|startoftext|>, its pairs, <|endoftext|>, and more <|endoftext|> up to `length` (as SD 1.x pads). The vocabulary is 256 bytes, 256
    bytes that end a word, an entry for each merge, then the two marks: any text has tokens. vocab: {token: id}; merges: pairs, most frequent first."""

    START, END = "<|startoftext|>", "<|endoftext|>"
    WORDS = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"

    def __init__(self, vocab: dict[str, int], merges: list[tuple[str, str]], length: int = 77):
        self.vocab, self.merges, self.length = vocab, [tuple(pair) for pair in merges], length
        self.start, self.end = vocab[self.START], vocab[self.END]
        self.engine = self.build(tokenizers.models.BPE(vocab, self.merges, unk_token=self.END, end_of_word_suffix="</w>"))
        self.engine.add_special_tokens([self.START, self.END])

    @classmethod
    def build(cls, model: tokenizers.models.Model) -> tokenizers.Tokenizer:
        engine = tokenizers.Tokenizer(model)
        clean = tokenizers.normalizers
        engine.normalizer = clean.Sequence([clean.NFC(), clean.Replace(tokenizers.Regex(r"\s+"), " "), clean.Lowercase()])
        cut = tokenizers.pre_tokenizers
        engine.pre_tokenizer = cut.Sequence([cut.Split(tokenizers.Regex(cls.WORDS), "removed", invert=True), cut.ByteLevel(add_prefix_space=False, use_regex=False)])
        return engine

    @classmethod
    def train(cls, captions: list[str], vocab_size: int, length: int = 77) -> Tokenizer:
        """Merge the most frequent neighbours in `captions` until the vocabulary is full, or every word is one token."""
        alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
        if (room := vocab_size - 2 * len(alphabet) - 2) < 0:
            raise ValueError(f"vocab_size is {vocab_size}; bytes and marks alone take {2 * len(alphabet) + 2}")
        engine = cls.build(tokenizers.models.BPE(end_of_word_suffix="</w>"))
        ends = [a + "</w>" for a in alphabet]  # named beforehand: else they are numbered by a random hash, which then settles ties
        trainer = tokenizers.trainers.BpeTrainer(vocab_size=vocab_size, initial_alphabet=alphabet, special_tokens=ends,
                                                 end_of_word_suffix="</w>", show_progress=False)
        engine.train_from_iterator(captions, trainer)
        merges = [tuple(pair) for pair in json.loads(engine.to_str())["model"]["merges"]][:room]
        return cls.from_merges(merges, length)

    @classmethod
    def from_merges(cls, merges: list[tuple[str, str]], length: int = 77) -> Tokenizer:
        """The vocabulary follows from the merges: CLIP's own file of them gives CLIP's own numbers."""
        alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
        names = alphabet + [a + "</w>" for a in alphabet] + ["".join(pair) for pair in merges] + [cls.START, cls.END]
        return cls({name: i for i, name in enumerate(dict.fromkeys(names))}, merges, length)

    def pieces(self, caption: str) -> list[str]:
        """The caption's byte pairs as text, without the marks."""
        return self.engine.encode(caption).tokens

    def __call__(self, captions: list[str]) -> Tensor:
        """(B, length) long. A caption too long is cut, with a warning that says what was cut."""
        batch = torch.full((len(captions), self.length), self.end, dtype=torch.long)
        for i, caption in enumerate(captions):
            encoding = self.engine.encode(caption)
            ids, room = encoding.ids, self.length - 2
            if len(ids) > room:
                cut = caption[encoding.offsets[room][0]:]
                warnings.warn(f"the caption has {len(ids)} tokens, {room} fit; cut off: {cut!r}", stacklevel=2)
            batch[i, 0] = self.start
            batch[i, 1:len(ids[:room]) + 1] = torch.tensor(ids[:room], dtype=torch.long)
        return batch

    def save(self, path: str | os.PathLike) -> None:
        """Write a tokenizer.json of the `tokenizers` library."""
        self.engine.save(str(path))

    @classmethod
    def load(cls, path: str | os.PathLike, length: int = 77) -> Tokenizer:
        model = json.loads(pathlib.Path(path).read_text(encoding="utf-8"))["model"]
        return cls(model["vocab"], model["merges"], length)


@dataclasses.dataclass(frozen=True)
class TextConfig:
    """vocab_size: rows of the embedding; width: d; layers, heads: of the transformer; length: tokens of a caption."""
    vocab_size: int = 49408
    width: int = 768
    layers: int = 12
    heads: int = 12
    length: int = 77


class TextLayer(nn.Module):
    """x + causal attention, then x + MLP with quick-GELU, x * sigmoid(1.702 x), both on normed x. (B, N, width) -> same."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.norm_attention, self.attention = nn.LayerNorm(width), Attention(width, heads=heads, bias=True, causal=True)
        self.norm_mlp, self.mlp_in, self.mlp_out = nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm_attention(x))
        h = self.mlp_in(self.norm_mlp(x))
        return x + self.mlp_out(h * torch.sigmoid(1.702 * h))


class TextEncoder(nn.Module):
    """The text tower of CLIP: tokens (B, 77) -> context (B, 77, width), after the final norm; padding is not masked."""

    def __init__(self, config: TextConfig = TextConfig()):
        super().__init__()
        self.config = config
        self.token = nn.Embedding(config.vocab_size, config.width)
        self.position = nn.Embedding(config.length, config.width)
        self.layers = nn.Sequential(*[TextLayer(config.width, config.heads) for _ in range(config.layers)])
        self.norm = nn.LayerNorm(config.width)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.norm(self.layers(self.token(tokens) + self.position.weight[:tokens.shape[1]]))

    def pool(self, tokens: Tensor, context: Tensor) -> Tensor:
        """The context at the FIRST end token, which has seen the whole caption. -> (B, width)."""
        return context[torch.arange(len(tokens), device=tokens.device), _first_end(tokens)]


def _first_end(tokens: Tensor) -> Tensor:
    return (tokens == tokens[:, -1:]).int().argmax(dim=1)  # every caption's last token is an end token


@dataclasses.dataclass(frozen=True)
class ImageConfig:
    """width: channels at full resolution; mult: their multiple at each level; groups: of every GroupNorm."""
    width: int = 32
    mult: tuple[int, ...] = (1, 2, 4)
    groups: int = 8


class ImageEncoder(nn.Module):
    """The picture tower of our small CLIP: x (B, 3, H, W) -> (B, width of the text tower). Convolutions, then a mean.

    `features` gives each level's map: what the perceptual loss compares. `log_scale`, CLIP's temperature, is kept here."""

    def __init__(self, config: ImageConfig, width: int):
        super().__init__()
        self.config, widths = config, [config.width * m for m in config.mult]
        self.levels, c = nn.ModuleList(), widths[0]
        for i, c_out in enumerate(widths):
            first = nn.Conv2d(3, c, 3, padding=1) if i == 0 else Downsample(c)
            self.levels.append(nn.Sequential(first, ResBlock(c, c_out, groups=config.groups)))
            c = c_out
        self.norm, self.out = nn.GroupNorm(config.groups, c), nn.Linear(c, width)
        self.log_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))
        self.to(memory_format=torch.channels_last)

    def features(self, x: Tensor) -> list[Tensor]:
        maps, h = [], x.contiguous(memory_format=torch.channels_last)
        for level in self.levels:
            h = level(h)                                                                    # (B, C, H/2^i, W/2^i)
            maps.append(h)
        return maps

    def forward(self, x: Tensor) -> Tensor:
        return self.out(F.silu(self.norm(self.features(x)[-1])).mean(dim=(2, 3)))


class CLIP(nn.Module):
    """A text tower and a picture tower that meet: features of a picture and of its caption point the same way.

    `forward(x, tokens)` -> unit-length features (B, width) of pictures and captions, and the scale of their products."""

    def __init__(self, tokenizer: Tokenizer | None, text_encoder: TextEncoder, image_encoder: ImageEncoder):
        super().__init__()
        self.tokenizer, self.text_encoder, self.image_encoder = tokenizer, text_encoder, image_encoder

    def save(self, folder: str | os.PathLike, dtype: torch.dtype = torch.float32, shard: float = math.inf) -> None:
        """As `LatentDiffusion.save`."""
        towers = {"text": self.text_encoder.config, "image": self.image_encoder.config}
        _save_model(self, {name: dataclasses.asdict(config) for name, config in towers.items()}, folder, dtype, shard)

    @classmethod
    def load(cls, folder: str | os.PathLike) -> CLIP:
        """What `save` wrote, in float32, in eval mode. Raises ValueError saying which folder is wrong and why."""
        return _load_model(lambda config: cls.build(_from_json(TextConfig, config["text"]), _from_json(ImageConfig, config["image"])), folder)

    @classmethod
    def build(cls, text: TextConfig, image: ImageConfig) -> CLIP:
        """Both towers, untrained, with no tokenizer yet."""
        return cls(None, TextEncoder(text), ImageEncoder(image, text.width))

    def image_features(self, x: Tensor) -> Tensor:
        return F.normalize(self.image_encoder(x), dim=-1)

    def text_features(self, tokens: Tensor) -> Tensor:
        if not torch.compiler.is_compiling():  # a compiled network wants one length
            tokens = tokens[:, :_first_end(tokens).max() + 1]  # attention is causal: what follows the first end token is not seen
        return F.normalize(self.text_encoder.pool(tokens, self.text_encoder(tokens)), dim=-1)

    def forward(self, x: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.image_features(x), self.text_features(tokens), self.image_encoder.log_scale.clamp(max=math.log(100)).exp()


def clip_loss(image_features: Tensor, text_features: Tensor, scale: Tensor | float) -> Tensor:
    """Find the caption of each picture and the picture of each caption (Radford et al. 2021, fig. 3).

    Mean of the two cross-entropies over the (B, B) products, times `scale`. Features (B, width) of unit length -> scalar."""
    logits = scale * image_features @ text_features.T
    target = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


# ------------------------------------------------------------------------------------ denoiser (chapters 2 and 5) ----

@dataclasses.dataclass(frozen=True)
class UNetConfig:
    """channels: c of the latent; width: channels at full resolution; mult: their multiple at each level; blocks: residual
    blocks a level (one more on the way up); attention: levels with transformer blocks; context_width: d of the text."""
    channels: int = 4
    width: int = 320
    mult: tuple[int, ...] = (1, 2, 4, 4)
    blocks: int = 2
    attention: tuple[int, ...] = (0, 1, 2)
    heads: int = 8
    context_width: int = 768
    groups: int = 32


class UNetBlock(nn.Module):
    """A residual block told the time and, on a level with attention, a transformer block told the caption."""

    def __init__(self, c_in: int, c_out: int, attention: bool, config: UNetConfig):
        super().__init__()
        self.res = ResBlock(c_in, c_out, 4 * config.width, config.groups)
        self.transformer = TransformerBlock(c_out, config.context_width, config.heads, config.groups) if attention else None

    def forward(self, h: Tensor, time: Tensor, context: Tensor | dict) -> Tensor:
        h = self.res(h, time)
        return h if self.transformer is None else self.transformer(h, context)


class UNet(nn.Module):
    """eps_theta(z_t, t, y): down, middle and up, with every map on the way down handed across (Rombach et al. app. E).

    z_t (B, c, h, w), t (B,), context (B, 77, d) or what `prepare` made of it -> eps_hat like z_t, in whatever precision the
    weights are. h and w must be multiples of 2 ** (levels - 1). The last layer of every block, and of all, starts at zero, as in DDPM's code."""

    def __init__(self, config: UNetConfig = UNetConfig()):
        super().__init__()
        widths, self.width = [config.width * m for m in config.mult], config.width
        block = functools.partial(UNetBlock, config=config)
        self.time = nn.Sequential(nn.Linear(config.width, 4 * config.width), nn.SiLU(), nn.Linear(4 * config.width, 4 * config.width))
        self.conv_in, self.down, self.up = nn.Conv2d(config.channels, config.width, 3, padding=1), nn.ModuleList(), nn.ModuleList()
        c, handed = config.width, [config.width]
        for level, width in enumerate(widths):
            for _ in range(config.blocks):
                self.down.append(block(c, width, level in config.attention))
                c = width
                handed.append(c)
            if level < len(widths) - 1:
                self.down.append(Downsample(c))
                handed.append(c)
        self.middle = nn.ModuleList([block(c, c, True), block(c, c, False)])
        for level, width in reversed(list(enumerate(widths))):
            for _ in range(config.blocks + 1):
                self.up.append(block(c + handed.pop(), width, level in config.attention))
                c = width
            if level > 0:
                self.up.append(Upsample(c))
        self.norm, self.conv_out = nn.GroupNorm(config.groups, c), nn.Conv2d(c, config.channels, 3, padding=1)
        for last in [getattr(m, name) for m in self.modules() for name in ("conv_out", "project_out") if hasattr(m, name)]:
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)
        self.to(memory_format=torch.channels_last)

    def cross_attentions(self) -> list[Attention]:
        """The layers that read the caption, in the order in which they run."""
        parts = [*self.down.modules(), *self.middle.modules(), *self.up.modules()]
        return [m.attend_cross for m in parts if isinstance(m, TransformerBlock)]

    def prepare(self, context: Tensor) -> dict[Attention, tuple[Tensor, Tensor]]:
        """The caption's keys and values in every layer: they are the same at all steps, so one computation serves all."""
        return {attention: attention.keys_values(context) for attention in self.cross_attentions()}

    def forward(self, z_t: Tensor, t: Tensor, context: Tensor | dict) -> Tensor:
        times = 2 ** sum(isinstance(layer, Downsample) for layer in self.down)
        if z_t.shape[-1] % times or z_t.shape[-2] % times:
            raise ValueError(f"z_t is {z_t.shape[-2]} x {z_t.shape[-1]}; height and width must be multiples of {times}")
        # Every residual block wants silu(time): once here, not once in each.
        dtype = self.conv_in.weight.dtype
        time = F.silu(self.time(timestep_embedding(t, self.width).to(dtype)))               # (B, 4 width)
        h = self.conv_in(z_t.to(dtype, memory_format=torch.channels_last))                  # (B, width, h, w)
        handed = [h]
        for layer in self.down:
            h = layer(h) if isinstance(layer, Downsample) else layer(h, time, context)
            handed.append(h)
        for layer in self.middle:
            h = layer(h, time, context)
        for layer in self.up:
            h = layer(h) if isinstance(layer, Upsample) else layer(torch.cat([h, handed.pop()], dim=1), time, context)
        return self.conv_out(F.silu(self.norm(h))).to(z_t.dtype)                            # (B, c, h, w)


# ------------------------------------------------------------------------------------------ guidance (chapter 6) ----

def guided_eps(unet: UNet, z_t: Tensor, t: Tensor, context: Tensor | dict, guidance: float) -> Tensor:
    """eps(z_t, t, empty) + w (eps(z_t, t, y) - eps(z_t, t, empty)), both from one forward pass of twice the batch.

    Ho & Salimans eq. 6, whose w is ours minus 1. context: (2B, 77, d), the unconditional half first, or that prepared."""
    eps_empty, eps_text = unet(torch.cat([z_t, z_t]), torch.cat([t, t]), context).chunk(2)
    return eps_empty + guidance * (eps_text - eps_empty)


# ------------------------------------------------------------------------------------- samplers (chapters 2 and 7) ----
# One signature: predict(z_t, t) -> eps_hat with t (B,); the schedule; z to start from. Each is a generator that yields
# (t, z, z0_hat) after every step: the step's time, the less noisy z, and the clean latent guessed on the way.

def ddpm_sample(predict: Callable[[Tensor, Tensor], Tensor], schedule: NoiseSchedule, z: Tensor, *, start: int | None = None,
                generator: torch.Generator | None = None) -> Iterator[tuple[int, Tensor, Tensor]]:
    """DDPM algorithm 2: all T steps, or those from t = `start` down; sigma is the posterior's; no noise at the last.

        z_{t-1} = (z_t - beta_t / sqrt(1 - alpha_bar_t) eps_hat) / sqrt(1 - beta_t) + sigma_t noise
        sigma_t^2 = beta_t (1 - alpha_bar_{t-1}) / (1 - alpha_bar_t)"""
    for t, a, a_before in ddim_timesteps(schedule, schedule.T, start=start):
        eps_hat, beta = predict(z, torch.full((len(z),), t, device=z.device)), schedule.betas[t].item()
        z0_hat = (z - (1 - a) ** 0.5 * eps_hat) / a**0.5
        z = (z - beta / (1 - a) ** 0.5 * eps_hat) / (1 - beta) ** 0.5
        if t > 0:
            z = z + (beta * (1 - a_before) / (1 - a)) ** 0.5 * _noise_like(z, generator)
        yield t, z, z0_hat


def ddim_timesteps(schedule: NoiseSchedule, steps: int, spacing: str = "trailing", start: int | None = None) -> list[tuple[int, float, float]]:
    """The (t, alpha_bar_t, alpha_bar after the step) of each of `steps` steps, noisiest first.

    spacing: "trailing" begins at T-1 and ends at alpha_bar = 1, no noise left; "leading" is Stable Diffusion's: 981, 961,
    ... 1 for fifty, ending at alpha_bar_0. start: begin at this t, not earlier. Raises ValueError for what is not allowed."""
    T = schedule.T
    if not 1 <= steps <= T:
        raise ValueError(f"steps is {steps}; allowed are 1 to {T}")
    if spacing == "trailing":
        times, last = [round(T - i * T / steps) - 1 for i in range(steps)], 1.0
    elif spacing == "leading":
        times = [i * (T // steps) + (steps < T) for i in reversed(range(steps))]  # at T steps there is no room for the offset
        last = schedule.alpha_bars[0].item()
    else:
        raise ValueError(f"spacing is {spacing!r}; allowed are 'trailing' and 'leading'")
    if start is not None:
        if not 0 <= start < T:
            raise ValueError(f"start is {start}; allowed are 0 to {T - 1}")
        times = [start] + [t for t in times if t < start]
    alpha_bars = [schedule.alpha_bars[t].item() for t in times]
    return list(zip(times, alpha_bars, alpha_bars[1:] + [last]))


def ddim_sample(predict: Callable[[Tensor, Tensor], Tensor], schedule: NoiseSchedule, z: Tensor, *, steps: int = 50,
                eta: float = 0.0, spacing: str = "trailing", start: int | None = None,
                generator: torch.Generator | None = None) -> Iterator[tuple[int, Tensor, Tensor]]:
    """DDIM eq. 12 and 16, whose alpha is our alpha_bar: guess the clean latent, go straight to the next noise level.

        z0_hat = (z_t - sqrt(1 - a) eps_hat) / sqrt(a)                       a, a' = alpha_bar now and after the step
        z'     = sqrt(a') z0_hat + sqrt(1 - a' - sigma^2) eps_hat + sigma noise
        sigma  = eta sqrt((1 - a') / (1 - a)) sqrt(1 - a / a')

    eta: 0 is deterministic, 1 with all T steps is DDPM. steps, spacing, start: as in `ddim_timesteps`."""
    for t, a, a_next in ddim_timesteps(schedule, steps, spacing, start):
        eps_hat = predict(z, torch.full((len(z),), t, device=z.device))
        z0_hat = (z - (1 - a) ** 0.5 * eps_hat) / a**0.5
        sigma = eta * ((1 - a_next) / (1 - a) * (1 - a / a_next)) ** 0.5
        z = a_next**0.5 * z0_hat + max(1 - a_next - sigma**2, 0.0) ** 0.5 * eps_hat
        if sigma > 0:
            z = z + sigma * _noise_like(z, generator)
        yield t, z, z0_hat


def ddim_invert(predict: Callable[[Tensor, Tensor], Tensor], schedule: NoiseSchedule, z: Tensor, *, steps: int = 50,
                spacing: str = "trailing") -> Iterator[tuple[int, Tensor, Tensor]]:
    """`ddim_sample` (eta 0) run backwards: from a clean latent to the noise that would have drawn it.

    The step up to t needs eps_hat at z_t, which is not there yet; eps_hat at the z we have, and the same t, stands in
    for it. More steps, smaller error. Yields (t, z_t, z0_hat)."""
    for t, a, a_clean in reversed(ddim_timesteps(schedule, steps, spacing)):
        eps_hat = predict(z, torch.full((len(z),), t, device=z.device))
        z0_hat = (z - (1 - a_clean) ** 0.5 * eps_hat) / a_clean**0.5
        z = a**0.5 * z0_hat + (1 - a) ** 0.5 * eps_hat
        yield t, z, z0_hat


def _noise_like(z: Tensor, generator: torch.Generator | None) -> Tensor:
    # Drawn where the generator lives: a CPU generator gives the same picture on every device.
    return torch.randn(z.shape, generator=generator, device=generator.device if generator else z.device).to(z)


# ------------------------------------------------------------------------------------------- pipeline (chapter 8) ----

class LatentDiffusion(nn.Module):
    """Everything that draws: tokenizer (None until trained or loaded), text_encoder, image_encoder (None at size SD1),
    autoencoder, unet and schedule, of the sizes that `config` names."""

    def __init__(self, config: Config):
        super().__init__()
        self.config, self.tokenizer = config, None
        self.text_encoder = TextEncoder(config.text)
        self.image_encoder = ImageEncoder(config.image, config.text.width) if config.image else None
        self.autoencoder = Autoencoder(config.autoencoder)
        self.unet = UNet(config.unet)
        self.schedule = NoiseSchedule(config.schedule, config.T)

    @property
    def scale_factor(self) -> float:
        """1 / std of the autoencoder's latents, measured after stage 1 (0.18215 in Stable Diffusion 1.x)."""
        if self.config.scale_factor is None:
            raise ValueError("scale_factor is not measured yet; it is set after train_autoencoder, by measure_scale_factor")
        return self.config.scale_factor

    @property
    def device(self) -> torch.device:
        return self.unet.conv_in.weight.device

    def encode(self, x: Tensor) -> Tensor:
        """x (B, 3, H, W) in [-1, 1] -> z (B, c, h, w), the posterior's mean, scaled to about unit variance."""
        return self.scale_factor * self.autoencoder.encode(x).mean.to(x.dtype)

    def decode(self, z: Tensor) -> Tensor:
        """z (B, c, h, w) -> x (B, 3, H, W) in [-1, 1], like z; about 512 x 512 pixels at a time, so that a batch needs no more memory."""
        few = max(1, 512 * 512 // (z.shape[-1] * z.shape[-2] * self.autoencoder.f ** 2))
        return torch.cat([self.autoencoder.decode(part / self.scale_factor).to(z.dtype) for part in z.split(few)]).clamp(-1, 1)

    def embed(self, prompts: list[str]) -> Tensor:
        """Prompts -> context (B, 77, d)."""
        if self.tokenizer is None:
            raise ValueError("tokenizer is None; train one with Tokenizer.train or load a model that has one")
        return self.text_encoder(self.tokenizer(prompts).to(self.device))

    @torch.no_grad()
    def denoise(self, prompts: list[str], *, steps: int = 50, guidance: float = 7.5, negative: str = "", eta: float = 0.0,
                generator: torch.Generator | None = None, z: Tensor | None = None, start: int | None = None,
                spacing: str | None = None, size: tuple[int, int] | None = None) -> Iterator[tuple[int, Tensor, Tensor]]:
        """The way from noise to the prompts' latents: yields (t, z, z0_hat) after every DDIM step, in float32.

        z: start here, not from fresh noise; with `start`, at that timestep (picture to picture). spacing: of the timesteps, by
        default the config's. Else as `generate`."""
        if isinstance(prompts, str) or not prompts:
            raise ValueError(f"prompts is {prompts!r}; a list of at least one string is needed")
        if not (math.isfinite(guidance) and math.isfinite(eta) and 0 <= eta <= 1):
            raise ValueError(f"guidance is {guidance}, eta {eta}; both must be finite, eta in [0, 1]")
        f, times = self.autoencoder.f, self.autoencoder.f * 2 ** (len(self.config.unet.mult) - 1)
        size = size or (self.config.image_size, self.config.image_size)
        if min(size) < times or size[0] % times or size[1] % times:
            raise ValueError(f"size is {size[0]} x {size[1]}; height and width must be multiples of {times}")
        if z is None:
            z = _noise_like(torch.empty(len(prompts), self.autoencoder.channels, size[0] // f, size[1] // f, device=self.device), generator)
        context, _ = self.embed(prompts), self.scale_factor  # which raises here, not after all the steps
        if guidance != 1:
            context = torch.cat([self.embed([negative]).expand_as(context), context])
        prepared = self.unet.prepare(context)
        predict = functools.partial(self.unet, context=prepared) if guidance == 1 else functools.partial(
            guided_eps, self.unet, context=prepared, guidance=guidance)
        dtype = torch.promote_types(context.dtype, torch.float32)  # the walk keeps its digits, whatever the U-Net's precision
        yield from ddim_sample(predict, self.schedule, z.to(dtype), steps=steps, eta=eta, spacing=spacing or self.config.spacing, start=start,
                               generator=generator)

    @torch.no_grad()
    def generate(self, prompts: list[str], *, steps: int = 50, guidance: float = 7.5, negative: str = "", eta: float = 0.0,
                 generator: torch.Generator | None = None, size: tuple[int, int] | None = None) -> Tensor:
        """Draw the prompts: fifty denoising steps in latent space, one decode. Returns x (B, 3, H, W) in [-1, 1].

        steps: 1 ... T. guidance: w; 1 = plain conditional. negative: what to steer away from. eta: 0 = deterministic
        given the first noise, 1 = as random as DDPM. generator: of all noise. size: height and width, multiples of f times
        what the U-Net halves (64 for Stable Diffusion), by default the config's. Raises ValueError for what is not allowed."""
        for _, z, _ in self.denoise(prompts, steps=steps, guidance=guidance, negative=negative, eta=eta, generator=generator, size=size):
            pass
        return self.decode(z)

    def save(self, folder: str | os.PathLike, dtype: torch.dtype = torch.float32, shard: float = math.inf) -> None:
        """Write config.json, tokenizer.json and model.safetensors into `folder`, whole or not at all; weights in `dtype`, at most `shard` bytes a file."""
        _save_model(self, dataclasses.asdict(self.config), folder, dtype, shard)

    @classmethod
    def load(cls, folder: str | os.PathLike) -> LatentDiffusion:
        """A model that `save` wrote, in float32, in eval mode. Raises ValueError saying which folder is wrong and why."""
        return _load_model(lambda config: cls(Config.from_dict(config)), folder)


def _save_model(model: CLIP | LatentDiffusion, config: dict, folder: str | os.PathLike, dtype: torch.dtype, shard: float) -> None:
    with _whole_folder(folder) as partial:
        (partial / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        if model.tokenizer:
            model.tokenizer.save(partial / "tokenizer.json")
        shards, room = [], 0.0
        for name, value in model.state_dict().items():
            value = value.to(dtype).contiguous()
            if not shards or value.nbytes > room:
                shards, room = shards + [{}], shard
            shards[-1][name], room = value, room - value.nbytes
        for i, weights in enumerate(shards):
            safetensors.torch.save_file(weights, partial / f"model{f'-{i}' * (i > 0)}.safetensors")


def _load_model(build: Callable[[dict], nn.Module], folder: str | os.PathLike) -> nn.Module:
    folder = pathlib.Path(folder)
    if not folder.exists() and (old := folder.with_name(folder.name + ".old")).exists():
        folder = old  # a save was killed between its two renames
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} is no saved model: it has no config.json")
    try:
        model = build(json.loads((folder / "config.json").read_text()))
        if (folder / "tokenizer.json").is_file():
            model.tokenizer = Tokenizer.load(folder / "tokenizer.json")
        model.load_state_dict({k: v for file in folder.glob("model*.safetensors") for k, v in safetensors.torch.load_file(file).items()})
    except Exception as error:  # whatever is wrong in there, it is no model of ours
        raise ValueError(f"{folder} is not a whole model of ours: {' '.join(str(error).split())[:300]}") from None
    return model.eval()


def _from_json(kind: type, values: dict) -> object:
    return kind(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})  # JSON knows no tuples


@contextlib.contextmanager
def _whole_folder(folder: str | os.PathLike) -> Iterator[pathlib.Path]:
    # A folder beside `folder` to write into, moved into its place when all is written; else removed.
    folder = pathlib.Path(folder)
    partial, old = folder.with_name(folder.name + ".partial"), folder.with_name(folder.name + ".old")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    if folder.exists():
        shutil.rmtree(old, ignore_errors=True)
        folder.rename(old)
    partial.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


# ------------------------------------------------------------------------------------------- training (chapter 8) ----
# Each stage is a generator that yields (steps done, losses). All randomness of a step comes from (seed, stage, step), drawn
# for the whole batch, then shared out: many processes see the noise of one, and a killed run goes on as if never killed.
# `resume` is handed the stage's stateful parts by name, may load a state into them, and returns the step to go on from.

@dataclasses.dataclass(frozen=True)
class Stage:
    """steps, batch (over all processes) and learning_rate of a training; `warmup` steps of rising rate, then a cosine. A process
    computes its share of a batch in so many `parts`, one after the other: the same step in less memory."""
    steps: int
    batch: int
    learning_rate: float
    warmup: int = 50
    parts: int = 1

    def rate(self, step: int) -> float:
        """The learning rate of a step: up in a line over `warmup` steps, then down a cosine to a fiftieth."""
        if step < self.warmup:
            return self.learning_rate * (step + 1) / self.warmup
        done = (step - self.warmup) / max(self.steps - self.warmup, 1)
        return self.learning_rate * (0.51 + 0.49 * math.cos(math.pi * done))


class Trainee:
    """A module with its AdamW, prepared by accelerate: `backward(loss)` once or more, then `step`, gradients clipped to norm 1.

    slow: the part of the module that learns at a tenth of the rate."""

    def __init__(self, module: nn.Module, stage: Stage, accelerator: Accelerator, slow: nn.Module | None = None):
        self.module, self.stage, self.accelerator = module.train().requires_grad_(True).to(accelerator.device), stage, accelerator
        tenth = {*slow.parameters()} if slow else {}
        groups = [{"params": [p for p in module.parameters() if (p in tenth) == (share < 1)], "share": share} for share in (1, 0.1)]
        adamw = torch.optim.AdamW(groups, stage.learning_rate, betas=(0.9, 0.99), fused=True)
        self.net, self.optimizer = accelerator.prepare(module, adamw)

    def backward(self, loss: Tensor) -> None:
        self.accelerator.backward(loss / self.stage.parts)

    def step(self, step: int) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = self.stage.rate(step) * group["share"]
        self.accelerator.unscale_gradients(self.optimizer)
        nn.utils.clip_grad_norm_(self.module.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def done(self) -> None:  # after the last step
        self.accelerator.unwrap_model(self.net, keep_fp32_wrapper=False)  # take off the wrapper of mixed precision
        self.module.eval()


class EMA:
    """A copy, `module`, that follows: ema = decay ema + (1 - decay) weights, the decay at most (1 + step) / (10 + step)."""

    def __init__(self, module: nn.Module, decay: float = 0.999):
        self.module, self.decay = copy.deepcopy(module).eval().requires_grad_(False), decay

    @torch.no_grad()
    def update(self, module: nn.Module, step: int) -> None:
        decay = min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(list(self.module.parameters()), list(module.parameters()), 1 - decay)


def _step_generator(seed: int, stage: int, step: int) -> torch.Generator:
    return torch.Generator().manual_seed(int(np.random.SeedSequence([seed, stage, step]).generate_state(1)[0]))


def _my_share(accelerator: Accelerator, stage: Stage, count: int) -> list[slice]:
    # The parts of the global batch, out of `count` pictures, that this process computes, one after the other.
    share, rest = divmod(stage.batch, accelerator.num_processes * stage.parts)
    if rest or stage.batch > count:
        raise ValueError(f"batch is {stage.batch}; allowed are multiples of {accelerator.num_processes * stage.parts} (processes x parts), up to the {count} pictures")
    first = accelerator.process_index * stage.parts
    return [slice(i * share, (i + 1) * share) for i in range(first, first + stage.parts)]


def _mean(parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.stack([part[name].detach() for part in parts]).mean() for name in parts[0]}


def _gather_with_gradient(features: Tensor, accelerator: Accelerator) -> Tensor:
    # Everybody's features, in the order of the global batch; gradients flow back to the process they came from.
    if accelerator.num_processes == 1:
        return features
    return torch.cat(torch.distributed.nn.functional.all_gather(features))


def train_clip(clip: CLIP, data: CaptionedImages, stage: Stage, *, seed: int = 0, accelerator: Accelerator | None = None,
               resume: Callable[[dict], int] = lambda parts: 0) -> Iterator[tuple[int, dict[str, Tensor]]]:
    """Stage 0: bring pictures and their captions together. Yields (step, {"clip": loss}); updates `clip` in place.

    The text tower learns slowly: what does not help to tell a batch apart, such as which of two things is above, is soon
    forgotten, and the U-Net will want it. Every picture meets every caption of its batch, so there are no parts here."""
    accelerator, stage = accelerator or Accelerator(), dataclasses.replace(stage, parts=1)
    trainee, tokens = Trainee(clip, stage, accelerator, slow=clip.text_encoder), clip.tokenizer(data.captions)
    mine, = _my_share(accelerator, stage, len(data))
    for step in range(resume({"clip": clip, "optimizer": trainee.optimizer}), stage.steps):
        rows = torch.randperm(len(data), generator=_step_generator(seed, 0, step))[:stage.batch][mine]
        x, y = data.pictures(rows).to(accelerator.device), tokens[rows].to(accelerator.device)
        image_features, text_features, scale = trainee.net(x, y)
        loss = clip_loss(*[_gather_with_gradient(f, accelerator) for f in (image_features, text_features)], scale)
        trainee.backward(loss)
        trainee.step(step)
        yield step + 1, {"clip": loss.detach()}
    trainee.done()


def train_autoencoder(model: LatentDiffusion, data: CaptionedImages, stage: Stage, *, perceptual: nn.Module | None = None,
                      discriminator: PatchDiscriminator | None = None, seed: int = 0, accelerator: Accelerator | None = None,
                      resume: Callable[[dict], int] = lambda parts: 0) -> Iterator[tuple[int, dict[str, Tensor]]]:
    """Stage 1: squeeze and restore. Yields (step, parts of the loss); updates `model.autoencoder` in place.

    perceptual: by default the features of the model's own picture tower. The discriminator (two layers, 32 wide; seed torch for
    its first weights) joins at step `config.adversarial_start`; weights of all terms are the config's. Over several processes each
    takes the adaptive weight of its own share, as CompVis does. Call `measure_scale_factor` afterwards."""
    accelerator, config = accelerator or Accelerator(), model.config
    model.to(accelerator.device)
    perceptual = perceptual or PerceptualLoss(model.image_encoder.eval().requires_grad_(False).features)
    trainee = Trainee(model.autoencoder, stage, accelerator)
    critic = Trainee(discriminator or PatchDiscriminator(32, 2), stage, accelerator)
    weights = dict(kl_weight=config.kl_weight, perceptual_weight=config.perceptual_weight, adversarial_weight=config.adversarial_weight)
    mine, side = _my_share(accelerator, stage, len(data)), config.image_size // model.autoencoder.f
    for step in range(resume({"autoencoder": model.autoencoder, "discriminator": critic.module, "optimizer": trainee.optimizer,
                              "discriminator_optimizer": critic.optimizer}), stage.steps):
        random, kept, judged = _step_generator(seed, 1, step), [], []
        rows = torch.randperm(len(data), generator=random)[:stage.batch]
        eps = torch.randn(stage.batch, model.autoencoder.channels, side, side, generator=random)
        for part in mine:
            x = data.pictures(rows[part]).to(accelerator.device)
            # Frozen, and outside its DDP wrapper: the autoencoder's step must leave nothing in the critic's gradients.
            adversary = critic.module.requires_grad_(False) if step >= config.adversarial_start else None
            x_hat, posterior = trainee.net(x, eps[part].to(accelerator.device))
            loss, parts = autoencoder_loss(x, x_hat, posterior, perceptual, adversary, model.autoencoder.decoder[-1].weight, **weights)
            trainee.backward(loss)
            kept.append(parts)
            judged.append((x, x_hat.detach()))
        trainee.step(step)
        if adversary is not None:
            critic.module.requires_grad_(True)
            for parts, pair in zip(kept, judged):
                parts["discriminator"] = discriminator_loss(*critic.net(torch.cat(pair)).chunk(2))
                critic.backward(parts["discriminator"])
            critic.step(step)
        yield step + 1, _mean(kept)
    trainee.done()
    critic.done()


@torch.no_grad()
def encode_all(model: LatentDiffusion, data: CaptionedImages, count: int | None = None, batch: int = 256) -> Tensor:
    """The latents' Gaussians of the first `count` pictures: (N, 2c, h, w) of means and log-variances, on the model's device."""
    parts = data.images[:count].split(batch)
    gaussians = [model.autoencoder.encode((part.float() / 127.5 - 1).to(model.device)) for part in parts]
    return torch.cat([torch.cat([g.mean, g.logvar], dim=1).float() for g in gaussians])


@torch.no_grad()
def measure_scale_factor(model: LatentDiffusion, data: CaptionedImages, seed: int = 0) -> float:
    """1 / std of the sampled latents of 2,048 pictures (Rombach et al. app. G): kept in the model's config, and returned."""
    posterior = Gaussian(encode_all(model, data, 2048))
    z = posterior.sample(torch.randn(posterior.mean.shape, generator=_step_generator(seed, 2, 0)).to(model.device))
    model.config = dataclasses.replace(model.config, scale_factor=1 / z.std().item())
    return model.scale_factor


@torch.no_grad()
def embed_all(model: LatentDiffusion, captions: list[str], batch: int = 256) -> tuple[Tensor, Tensor]:
    """The frozen text encoder's context of every caption, once: (N, 77, d) half; and (1, 77, d) of the empty one. On the model's device."""
    contexts = [model.embed(captions[i:i + batch]).half() for i in range(0, len(captions), batch)]
    return torch.cat(contexts), model.embed([""])


def train_denoiser(model: LatentDiffusion, data: CaptionedImages, stage: Stage, *, caption_dropout: float = 0.1, seed: int = 0,
                   ema_decay: float = 0.999, accelerator: Accelerator | None = None,
                   resume: Callable[[dict], int] = lambda parts: 0) -> Iterator[tuple[int, dict[str, Tensor]]]:
    """Stage 2: E || eps - eps_theta(z_t, t, y) ||^2 over latents encoded once. Yields (step, {"mse": plain error}).

    At the end `model.unet` holds the averaged weights. Dropping captions (for the empty one) teaches the unconditional
    prediction that guidance needs. Where `config.snr_clip` is a number, an error weighs min(SNR, snr_clip) / SNR (Hang et
    al. 2023, arXiv 2303.09556): faint noise, easily removed, takes less of a short training."""
    accelerator, snr = accelerator or Accelerator(), model.schedule.snr()
    device, mine = accelerator.device, _my_share(accelerator, stage, len(data))
    moments = encode_all(model.to(device).eval(), data)
    contexts, empty = embed_all(model, data.captions)
    weights = (snr.clamp(max=model.config.snr_clip or math.inf) / snr).float().to(device)   # (T,), all 1 without snr_clip
    shape = (model.autoencoder.channels, *moments.shape[2:])
    ema, trainee = EMA(model.unet, ema_decay), Trainee(model.unet, stage, accelerator)
    for step in range(resume({"unet": model.unet, "optimizer": trainee.optimizer, "ema": ema.module}), stage.steps):
        random, kept = _step_generator(seed, 3, step), []
        drawn = [torch.randperm(len(data), generator=random)[:stage.batch], torch.randint(model.schedule.T, (stage.batch,), generator=random),
                 torch.rand(stage.batch, generator=random) < caption_dropout, *torch.randn(2, stage.batch, *shape, generator=random)]
        for part in mine:
            rows, t, drop, eps_posterior, eps = [values[part].to(device) for values in drawn]
            z = model.scale_factor * Gaussian(moments[rows]).sample(eps_posterior)          # (B, c, h, w)
            context = torch.where(drop[:, None, None], empty, contexts[rows].float())       # (B, 77, d)
            error = (trainee.net(model.schedule.add_noise(z, t, eps), t, context).float() - eps).square().mean(dim=(1, 2, 3))
            trainee.backward((weights[t] * error).mean())
            kept.append({"mse": error.mean()})
        trainee.step(step)
        ema.update(model.unet, step)
        yield step + 1, _mean(kept)
    trainee.done()
    model.unet.load_state_dict(ema.module.state_dict())


# ---------------------------------------------------------------------------------------------------------- sizes ----

@dataclasses.dataclass(frozen=True)
class Config:
    """One size of the whole model, and the recipe that trains it: plain data for asdict, JSON and back by `from_dict`.

    image: None for no picture tower. spacing: of `ddim_timesteps`. scale_factor: None until measured. snr_clip: of `train_denoiser`."""
    name: str
    image_size: int
    text: TextConfig
    image: ImageConfig | None
    autoencoder: AutoencoderConfig
    unet: UNetConfig
    clip_stage: Stage | None = None
    autoencoder_stage: Stage | None = None
    denoiser_stage: Stage | None = None
    schedule: str = "scaled-linear"
    T: int = 1000
    spacing: str = "trailing"
    scale_factor: float | None = None
    kl_weight: float = 1e-6
    perceptual_weight: float = 1.0
    adversarial_weight: float = 0.5
    adversarial_start: int = 500  # the first step of the discriminator
    snr_clip: float | None = None

    @classmethod
    def from_dict(cls, values: dict) -> Config:
        kinds = {"text": TextConfig, "image": ImageConfig, "autoencoder": AutoencoderConfig, "unet": UNetConfig,
                 "clip_stage": Stage, "autoencoder_stage": Stage, "denoiser_stage": Stage}
        return cls(**{k: _from_json(kinds[k], v) if k in kinds and v is not None else v for k, v in values.items()})


SHAPES = Config(
    name="shapes", image_size=32,
    text=TextConfig(vocab_size=768, width=96, layers=2, heads=4), image=ImageConfig(width=16, mult=(1, 2, 4), groups=8),
    autoencoder=AutoencoderConfig(width=16, mult=(1, 2, 4), blocks=1, channels=4, groups=4),
    unet=UNetConfig(channels=4, width=64, mult=(1, 1), blocks=1, attention=(0, 1), heads=4, context_width=96, groups=4),
    clip_stage=Stage(steps=400, batch=128, learning_rate=2e-3),
    autoencoder_stage=Stage(steps=3000, batch=16, learning_rate=1.5e-3),
    denoiser_stage=Stage(steps=2200, batch=64, learning_rate=4e-3),
    perceptual_weight=0.1, adversarial_weight=0.25, adversarial_start=2000, snr_clip=1.0,
)

EMOJI = Config(
    name="emoji", image_size=128,
    text=TextConfig(vocab_size=2048, width=192, layers=2, heads=6), image=ImageConfig(width=24, mult=(1, 2, 4, 6), groups=8),
    autoencoder=AutoencoderConfig(width=32, mult=(1, 2, 3, 4), blocks=1, channels=4, groups=8),
    unet=UNetConfig(channels=4, width=64, mult=(1, 2), blocks=2, attention=(0, 1), heads=4, context_width=192, groups=8),
    clip_stage=Stage(steps=1500, batch=512, learning_rate=1e-3),
    autoencoder_stage=Stage(steps=4000, batch=64, learning_rate=1e-3),
    denoiser_stage=Stage(steps=8000, batch=256, learning_rate=2e-3),
    perceptual_weight=0.1, adversarial_weight=0.25, adversarial_start=2000,
)

SD1 = Config(
    name="sd1", image_size=512, spacing="leading", scale_factor=0.18215,
    text=TextConfig(), image=None, autoencoder=AutoencoderConfig(), unet=UNetConfig(),
)

NAMED_SIZES = {size.name: size for size in (SHAPES, EMOJI, SD1)}
