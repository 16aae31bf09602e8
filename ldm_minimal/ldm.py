"""Latent diffusion, whole: one file, in the order of the book's chapters.

An autoencoder squeezes an image x into a small latent z. A U-Net learns to remove noise from z; a
caption tells it what the image should show. To draw, start from noise, denoise fifty times,
decode once.

Three trainings make a model:

    train_clip          images and captions meet in one space   -> text encoder, perceptual loss
    train_autoencoder   x -> z -> x, sharp, 12 to 48 x smaller  -> autoencoder, scale factor
    train_denoiser      z_t, t, caption -> the noise in z_t     -> U-Net

The same classes serve every size. With the config SHAPES they train on two CPU cores; with the
config SD1 they are Stable Diffusion 1.x, parameter for parameter.

Notation (section 14.12 of the book; where a paper is cited, its symbols are translated)

    x            image                 (B, 3, H, W), in [-1, 1]
    z, z_t       latent, noised latent (B, c, h, w), about unit variance; f = H / h
    t            timestep              (B,) long, 0 ... T-1; larger is noisier
    eps          the noise             like z; eps_hat is the U-Net's prediction of it
    z0_hat       predicted clean latent; the book's z_0 is z here, and t = 0 has one step of noise
    alpha_bar    share of signal power (T,), falls from about 1 to about 0
    tokens       the caption y, as ids (B, 77) long
    context      the caption y, encoded (B, 77, d)
    guidance     w                     1 = plain conditional, 0 = unconditional

    A name that ends in _hat is a prediction. B is the batch. Comments give shapes; "size shapes" is
    the config SHAPES below: 32 x 32 images, 4 x 8 x 8 latents.

References
    DDPM     Ho, Jain, Abbeel 2020, arXiv 2006.11239   DDIM      Song et al. 2021, arXiv 2010.02502
    cosine   Nichol, Dhariwal 2021, arXiv 2102.09672   guidance  Ho, Salimans 2022, arXiv 2207.12598
    latent   Rombach et al. 2022, arXiv 2112.10752     VQGAN     Esser et al. 2021, arXiv 2012.09841
    CLIP     Radford et al. 2021, arXiv 2103.00020     LPIPS     Zhang et al. 2018, arXiv 1801.03924
    PatchGAN Isola et al. 2017, arXiv 1611.07004       GEGLU     Shazeer 2020, arXiv 2002.05202
    CompVis  github.com/CompVis/latent-diffusion: the code of Rombach et al.
    min-SNR  Hang et al. 2023, arXiv 2303.09556        hinge     Lim, Ye 2017, arXiv 1705.02894
    Muon     Jordan et al. 2024, kellerjordan.github.io/posts/muon; Liu et al. 2025, 2502.16982
"""

from __future__ import annotations

import codecs
import copy
import dataclasses
import functools
import json
import math
import os
import pathlib
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

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
    # sizes
    "TextConfig", "ImageConfig", "AutoencoderConfig", "UNetConfig", "TrainConfig", "Config",
    "SHAPES", "EMOJI", "SD1", "NAMED_SIZES",
    # noise, the denoising loss, DDPM
    "NoiseSchedule", "denoising_loss", "snr_weight",
    "predict_z0", "ddpm_step", "ddpm_sample",
    # autoencoder
    "zero_init", "ResBlock", "Attention", "AttentionBlock", "Downsample", "Upsample",
    "Gaussian", "Autoencoder", "PatchDiscriminator", "PerceptualLoss",
    "adaptive_weight", "autoencoder_loss", "discriminator_loss",
    # data and scaling
    "CaptionedImages", "encode_all", "measure_scale_factor",
    # text, U-Net
    "Tokenizer", "TextBlock", "TextEncoder", "ImageEncoder", "CLIP", "clip_loss",
    "TransformerBlock", "timestep_embedding", "UNetBlock", "UNet",
    # guidance, DDIM, pipeline
    "guided_eps", "ddim_timesteps", "ddim_step", "ddim_sample", "ddim_invert", "LatentDiffusion",
    # training
    "EMA", "Muon", "Trainer", "save_state", "embed_all", "compile_blocks",
    "train_clip", "train_autoencoder", "train_denoiser",
]  # fmt: skip


# ------------------------------------------------------------------------------------------------
#                                              Sizes
# ------------------------------------------------------------------------------------------------
# The shapes of all networks but the discriminator follow from these numbers. The defaults are
# those of Stable Diffusion 1.x.


@dataclasses.dataclass(frozen=True)
class TextConfig:
    """The text encoder: a causal transformer, CLIP's text tower."""

    vocab_size: int = 49408  # rows of the token embedding
    width: int = 768  # d, the size of a token's vector
    num_layers: int = 12  # transformer blocks
    num_heads: int = 12  # attention heads of a block
    length: int = 77  # tokens of a caption, start and end token included


@dataclasses.dataclass(frozen=True)
class ImageConfig:
    """The image encoder of our own small CLIP: a convolutional network."""

    width: int = 32  # channels at full resolution
    channel_mult: tuple[int, ...] = (1, 2, 4)  # channels of each level, in multiples of width
    num_groups: int = 8  # of every GroupNorm
    pool: int = 1  # the last map is averaged to pool x pool cells; with 1, places are lost


@dataclasses.dataclass(frozen=True)
class AutoencoderConfig:
    """Encoder and decoder. The downsampling factor is f = 2 ** (number of levels - 1)."""

    width: int = 128  # channels at full resolution
    channel_mult: tuple[int, ...] = (1, 2, 4, 4)  # channels of each level, in multiples of width
    num_res_blocks: int = 2  # per level; one more on the way up
    latent_channels: int = 4  # c
    num_groups: int = 32  # of every GroupNorm


@dataclasses.dataclass(frozen=True)
class UNetConfig:
    """The noise predictor eps_theta."""

    latent_channels: int = 4  # c
    width: int = 320  # channels at full latent resolution
    channel_mult: tuple[int, ...] = (1, 2, 4, 4)  # channels of each level, in multiples of width
    num_res_blocks: int = 2  # per level; one more on the way up
    attention_levels: tuple[int, ...] = (0, 1, 2)  # levels with transformer blocks
    num_heads: int = 8  # attention heads, whatever the width
    context_width: int = 768  # d of the text encoder
    num_groups: int = 32  # of every GroupNorm


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """The recipe of one training."""

    steps: int  # optimizer steps
    batch_size: int  # images of a step, over all processes
    learning_rate: float  # the peak of the schedule, see `lr`
    warmup_steps: int = 50  # steps until the peak
    grad_accum_steps: int = 1  # parts of a batch that a process computes one after the other
    final_lr: float = 0.02  # the learning rate at the end, as a share of the peak
    muon: bool = False  # Muon instead of AdamW where it can be, see `Trainer`

    def lr(self, step: int) -> float:
        """The learning rate of a step: linear warm-up, then a cosine down to `final_lr`."""
        if step < self.warmup_steps:
            return self.learning_rate * (step + 1) / self.warmup_steps
        progress = (step - self.warmup_steps) / max(self.steps - self.warmup_steps, 1)
        cosine = 0.5 + 0.5 * math.cos(math.pi * progress)  # from 1 to 0
        return self.learning_rate * (self.final_lr + (1 - self.final_lr) * cosine)


@dataclasses.dataclass(frozen=True)
class Config:
    """One size of the whole model, and the recipe that trains it. Plain data, to JSON and back."""

    name: str
    image_size: int  # H and W of the training images, in pixels
    text: TextConfig
    image: ImageConfig | None  # None: no image encoder (Stable Diffusion needs none to draw)
    autoencoder: AutoencoderConfig
    unet: UNetConfig
    clip_training: TrainConfig | None = None
    clip_text_lr_scale: float = 0.1  # of the text tower: its share of CLIP's learning rate
    autoencoder_training: TrainConfig | None = None
    denoiser_training: TrainConfig | None = None
    schedule: str = "scaled-linear"  # kind of NoiseSchedule
    T: int = 1000  # timesteps of the schedule
    spacing: str = "trailing"  # of the timesteps in sampling, see `ddim_timesteps`
    scale_factor: float | None = None  # None until `measure_scale_factor` has run
    kl_weight: float = 1e-6  # of the KL divergence, summed over an image
    perceptual_weight: float = 1.0  # of the perceptual distance, against L1
    adversarial_weight: float = 0.5  # of the adversarial loss, times the adaptive weight
    adversarial_limit: float = 20.0  # of the adaptive weight
    discriminator_start: int = 500  # the step from which on the discriminator is trained
    discriminator_head_start: int = 300  # steps from there to the first adversarial loss
    discriminator_layers: int = 2  # it judges patches of 16, 34 or 70 pixels with 1, 2 or 3
    discriminator_learning_rate: float = 1e-3  # the same in all steps
    discriminator_muon: bool = False  # it learns by Muon; False: by AdamW
    snr_clip: float | None = None  # see `snr_weight`

    def __post_init__(self):
        c, width = self.autoencoder.latent_channels, self.text.width
        if (self.unet.latent_channels, self.unet.context_width) != (c, width):
            raise ValueError(
                f"unet has latent_channels {self.unet.latent_channels} and context_width "
                f"{self.unet.context_width}; they must be those of the autoencoder, {c}, and the "
                f"width of the text encoder, {width}"
            )

    def autoencoder_weights(self) -> dict[str, float]:
        """The weights of the terms of `autoencoder_loss`."""
        return {
            "kl_weight": self.kl_weight,
            "perceptual_weight": self.perceptual_weight,
            "adversarial_weight": self.adversarial_weight,
            "adversarial_limit": self.adversarial_limit,
        }

    @classmethod
    def from_dict(cls, values: dict) -> Config:
        """The inverse of `dataclasses.asdict`; lists from JSON become tuples."""
        kinds = {
            "text": TextConfig,
            "image": ImageConfig,
            "autoencoder": AutoencoderConfig,
            "unet": UNetConfig,
            "clip_training": TrainConfig,
            "autoencoder_training": TrainConfig,
            "denoiser_training": TrainConfig,
        }
        values = dict(values)
        for name, kind in kinds.items():
            if values.get(name) is not None:
                values[name] = _from_json(kind, values[name])
        return cls(**values)


def _from_json(kind: type, values: dict) -> object:
    as_tuples = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
    return kind(**as_tuples)  # JSON has no tuples


# Trains in a quarter of an hour on two CPU cores. Millions of parameters: text 0.30, image 0.11,
# autoencoder 0.68, U-Net 1.74.
SHAPES = Config(
    name="shapes",
    image_size=32,
    text=TextConfig(vocab_size=768, width=96, num_layers=2, num_heads=4),
    image=ImageConfig(width=16, channel_mult=(1, 2, 4), num_groups=8, pool=2),
    autoencoder=AutoencoderConfig(
        width=16, channel_mult=(1, 2, 4), num_res_blocks=1, latent_channels=4, num_groups=4
    ),
    unet=UNetConfig(
        latent_channels=4,
        width=64,
        channel_mult=(1, 1),
        num_res_blocks=1,
        attention_levels=(0, 1),
        num_heads=4,
        context_width=96,
        num_groups=4,
    ),
    clip_training=TrainConfig(steps=800, batch_size=64, learning_rate=2e-3, muon=True),
    clip_text_lr_scale=1.0,
    autoencoder_training=TrainConfig(steps=1500, batch_size=8, learning_rate=3e-3, muon=True),
    denoiser_training=TrainConfig(steps=2000, batch_size=64, learning_rate=8e-3, muon=True),
    perceptual_weight=0.2,
    adversarial_weight=0.25,
    discriminator_start=500,
    discriminator_head_start=400,
    discriminator_layers=1,
    discriminator_learning_rate=3e-4,
    discriminator_muon=True,
    snr_clip=1.0,
)

EMOJI = Config(  # for a GPU
    name="emoji",
    image_size=128,
    text=TextConfig(vocab_size=2048, width=192, num_layers=2, num_heads=6),
    image=ImageConfig(width=24, channel_mult=(1, 2, 4, 6), num_groups=8),
    autoencoder=AutoencoderConfig(
        width=32, channel_mult=(1, 2, 3, 4), num_res_blocks=1, latent_channels=4, num_groups=8
    ),
    unet=UNetConfig(
        latent_channels=4,
        width=64,
        channel_mult=(1, 2),
        num_res_blocks=2,
        attention_levels=(0, 1),
        num_heads=4,
        context_width=192,
        num_groups=8,
    ),
    clip_training=TrainConfig(steps=400, batch_size=512, learning_rate=2e-3, muon=True),
    clip_text_lr_scale=1.0,
    autoencoder_training=TrainConfig(steps=2400, batch_size=64, learning_rate=2e-3, muon=True),
    denoiser_training=TrainConfig(steps=3000, batch_size=256, learning_rate=6e-3, muon=True),
    perceptual_weight=0.1,
    adversarial_weight=0.25,
    discriminator_start=1000,
    discriminator_head_start=400,
    snr_clip=5.0,
)

SD1 = Config(  # Stable Diffusion 1.x; loaded by stable_diffusion.py, not trained here
    name="sd1",
    image_size=512,
    text=TextConfig(),
    image=None,
    autoencoder=AutoencoderConfig(),
    unet=UNetConfig(),
    spacing="leading",
    scale_factor=0.18215,
)

NAMED_SIZES = {size.name: size for size in (SHAPES, EMOJI, SD1)}


# ------------------------------------------------------------------------------------------------
#                                        Noise (chapter 1)
# ------------------------------------------------------------------------------------------------


class NoiseSchedule:
    """How much noise each timestep adds (beta), and how much signal is left after it (alpha_bar).

        q(z_t | z_{t-1}) = N(sqrt(1 - beta_t) z_{t-1}, beta_t I)
        alpha_bar_t      = prod_{s <= t} (1 - beta_s)

    DDPM eq. 2 and 4. The book's t = 1 ... T is t = 0 ... T-1 here. `betas` and `alpha_bars` are
    (T,) float64 on the CPU: float32 would lose the digits of 1 - alpha_bar where alpha_bar is
    nearly 1.

    kind: "linear" (DDPM: beta from 1e-4 to 0.02), "scaled-linear" (Stable Diffusion: sqrt(beta)
    linear, beta from 0.00085 to 0.012) or "cosine" (Nichol & Dhariwal eq. 17). T: timesteps, at
    least 2. The betas of the first two are made for T = 1000; with far fewer steps the last z_t
    still holds much of z. Raises ValueError for another kind or T.
    """

    def __init__(self, kind: str = "scaled-linear", T: int = 1000):
        if T < 2:
            raise ValueError(f"T is {T}; a schedule has at least 2 steps")
        float64 = {"dtype": torch.float64, "device": "cpu"}
        if kind == "linear":
            betas = torch.linspace(1e-4, 0.02, T, **float64)
        elif kind == "scaled-linear":
            betas = torch.linspace(0.00085**0.5, 0.012**0.5, T, **float64) ** 2
        elif kind == "cosine":
            u = torch.arange(T + 1, **float64) / T
            f = torch.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2  # alpha_bar is f(t) / f(0)
            betas = (1 - f[1:] / f[:-1]).clamp(max=0.999)
        else:
            raise ValueError(
                f"kind is {kind!r}; allowed are 'linear', 'scaled-linear' and 'cosine'"
            )
        self.kind = kind
        self.T = T
        self.betas = betas
        self.alpha_bars = torch.cumprod(1 - betas, dim=0)
        self._shares = {}  # of signal and noise, for each device and dtype

    def add_noise(self, z: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        """z_t = sqrt(alpha_bar_t) z + sqrt(1 - alpha_bar_t) eps. DDPM eq. 4: t + 1 steps at once.

        z, eps: (B, ...). t: (B,) long in 0 ... T-1. Returns z_t, like z.
        """
        per_image = (-1,) + (1,) * (z.ndim - 1)  # (B, 1, 1, 1)
        signal, noise = self._signal_and_noise(z.device, z.dtype)
        return signal[t].view(per_image) * z + noise[t].view(per_image) * eps

    def _signal_and_noise(self, device: torch.device, dtype: torch.dtype) -> Tensor:
        """sqrt(alpha_bar) and sqrt(1 - alpha_bar) of all t, (2, T), copied to a device once."""
        if (device, dtype) not in self._shares:
            shares = torch.stack([self.alpha_bars.sqrt(), (1 - self.alpha_bars).sqrt()])
            self._shares[device, dtype] = shares.to(device, dtype)
        return self._shares[device, dtype]

    def snr(self) -> Tensor:
        """Signal-to-noise ratio alpha_bar / (1 - alpha_bar) of unit-variance data. (T,) float64."""
        return self.alpha_bars / (1 - self.alpha_bars)


# ------------------------------------------------------------------------------------------------
#                         The denoising loss and the DDPM sampler (chapter 2)
# ------------------------------------------------------------------------------------------------


def denoising_loss(
    unet: Callable[[Tensor, Tensor, Tensor], Tensor],
    schedule: NoiseSchedule,
    z: Tensor,
    t: Tensor,
    context: Tensor | None,
    eps: Tensor,
) -> Tensor:
    """||eps - eps_theta(z_t, t, y)||^2, averaged over each latent. DDPM eq. 14, in latent space.

    z, eps: (B, c, h, w). t: (B,). context: (B, 77, d), or None for a network without captions.
    Returns (B,): about 1 for a network that always answers 0.
    """
    z_t = schedule.add_noise(z, t, eps)
    eps_hat = unet(z_t, t, context)
    return (eps_hat - eps).square().mean(dim=(1, 2, 3))


def snr_weight(schedule: NoiseSchedule, snr_clip: float | None) -> Tensor:
    """min(SNR, snr_clip) / SNR of every timestep: (T,) float64, all 1 where snr_clip is None.

    Hang et al. 2023. Where there is little noise it is hard to predict, and changes the image
    little; with this weight such timesteps take less of a short training.
    """
    snr = schedule.snr()
    if snr_clip is None:
        return torch.ones_like(snr)
    return snr.clamp(max=snr_clip) / snr


# All samplers have one form; call them under torch.no_grad(). They take predict(z_t, t) ->
# eps_hat with t (B,), the schedule, and the z to start from, (B, c, h, w), scaled to unit
# variance. They are generators that yield (t, z, z0_hat) after each step: the step's t, z after
# the step, and the clean latent that the step predicted.


def predict_z0(z_t: Tensor, eps_hat: Tensor, alpha_bar: float) -> Tensor:
    """z0_hat = (z_t - sqrt(1 - alpha_bar) eps_hat) / sqrt(alpha_bar): add_noise, solved for z."""
    return (z_t - (1 - alpha_bar) ** 0.5 * eps_hat) / alpha_bar**0.5


def ddpm_step(
    schedule: NoiseSchedule, z_t: Tensor, t: int, eps_hat: Tensor, noise: Tensor | None = None
) -> Tensor:
    """One step of DDPM algorithm 2: the mean of eq. 11, plus noise of eq. 7's variance.

        mean_t    = (z_t - beta_t / sqrt(1 - alpha_bar_t) eps_hat) / sqrt(1 - beta_t)
        z_{t-1}   = mean_t + sigma_t noise
        sigma_t^2 = beta_t (1 - alpha_bar_{t-1}) / (1 - alpha_bar_t)

    noise: like z_t, or None for the mean alone, as at t = 0, where sigma is 0.
    """
    beta = schedule.betas[t].item()
    alpha_bar = schedule.alpha_bars[t].item()
    mean = (z_t - beta / (1 - alpha_bar) ** 0.5 * eps_hat) / (1 - beta) ** 0.5
    if t == 0 or noise is None:
        return mean
    alpha_bar_prev = schedule.alpha_bars[t - 1].item()
    sigma = (beta * (1 - alpha_bar_prev) / (1 - alpha_bar)) ** 0.5
    return mean + sigma * noise


def ddpm_sample(
    predict: Callable[[Tensor, Tensor], Tensor],
    schedule: NoiseSchedule,
    z: Tensor,
    *,
    start: int | None = None,
    generator: torch.Generator | None = None,
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """DDPM algorithm 2: all T steps, or those from t = `start` down.

    generator: of the fresh noise of each step. Raises ValueError unless 0 <= start < T.
    """
    first = schedule.T - 1 if start is None else start
    if not 0 <= first < schedule.T:
        raise ValueError(f"start is {start}; allowed are 0 to {schedule.T - 1}")
    for t in range(first, -1, -1):
        eps_hat = predict(z, _full_like_batch(z, t))
        z0_hat = predict_z0(z, eps_hat, schedule.alpha_bars[t].item())
        noise = _noise_like(z, generator) if t > 0 else None
        z = ddpm_step(schedule, z, t, eps_hat, noise)
        yield t, z, z0_hat


def _full_like_batch(z: Tensor, t: int) -> Tensor:
    return torch.full((len(z),), t, device=z.device)


def _noise_like(z: Tensor, generator: torch.Generator | None) -> Tensor:
    # Drawn where the generator lives: a CPU generator gives the same image on every device.
    device = generator.device if generator else z.device
    return torch.randn(z.shape, generator=generator, device=device).to(z)


# ------------------------------------------------------------------------------------------------
#                           The autoencoder and its losses (chapter 3)
# ------------------------------------------------------------------------------------------------
# First the blocks, which the U-Net of chapter 5 uses, too. channels_last is the memory order in
# which convolutions run fastest; results are the same.


def zero_init(layer: nn.Conv2d | nn.Linear) -> nn.Conv2d | nn.Linear:
    """Weight and bias become zero: a residual branch that ends here adds nothing at the start."""
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


class ResBlock(nn.Module):
    """h = conv(silu(norm(x))) + proj(t_emb); out = skip(x) + conv(silu(norm(h))).

    x: (B, c_in, H, W) -> (B, c_out, H, W). t_emb: (B, t_emb_width), projected and added at every
    position (the U-Net applies its SiLU once for all blocks); t_emb_width 0 (the autoencoder's
    blocks) takes none. Stable Diffusion has 32 groups, and eps 1e-5 in the U-Net, 1e-6 in the
    autoencoder.
    """

    def __init__(
        self,
        c_in: int,
        c_out: int,
        t_emb_width: int = 0,
        num_groups: int = 32,
        eps: float = 1e-5,
    ):
        super().__init__()
        self.norm1 = nn.GroupNorm(num_groups, c_in, eps)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.t_proj = nn.Linear(t_emb_width, c_out) if t_emb_width else None
        self.norm2 = nn.GroupNorm(num_groups, c_out, eps)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1)
        self.skip = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()

    def forward(self, x: Tensor, t_emb: Tensor | None = None) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))  # (B, c_out, H, W)
        if self.t_proj is not None:
            h = h + self.t_proj(t_emb)[:, :, None, None]
        h = self.conv2(F.silu(self.norm2(h)))
        return self.skip(x) + h


class Attention(nn.Module):
    """softmax(Q K^T / sqrt(d)) V in `num_heads` heads: self-attention or cross-attention.

    d is width / num_heads here. x: (B, N, width) -> (B, N, width). kv: what `keys_values` made of
    a context (B, M, context_width); None for self-attention, where x is the context. With
    `keep_weights` set, each call leaves its weights, (B, heads, N, M), in `weights`; that is slower
    and meant for looking at them. Raises ValueError unless num_heads divides width.
    """

    def __init__(
        self,
        width: int,
        context_width: int | None = None,
        num_heads: int = 8,
        bias: bool = False,
        causal: bool = False,
    ):
        super().__init__()
        if width % num_heads:
            raise ValueError(f"num_heads is {num_heads}; it must divide width, {width}")
        self.num_heads = num_heads
        self.causal = causal
        self.to_q = nn.Linear(width, width, bias=bias)
        self.to_kv = nn.Linear(
            context_width or width, 2 * width, bias=bias
        )  # K and V in one matrix product
        self.to_out = nn.Linear(width, width)
        self.keep_weights = False
        self.weights = None

    def keys_values(self, context: Tensor) -> tuple[Tensor, Tensor]:
        """context (B, M, context_width) -> k and v, each (B, heads, M, d)."""
        k, v = self.to_kv(context).chunk(2, dim=-1)
        return self._split_heads(k), self._split_heads(v)

    def forward(self, x: Tensor, kv: tuple[Tensor, Tensor] | None = None) -> Tensor:
        q = self._split_heads(self.to_q(x))  # (B, heads, N, d)
        k, v = self.keys_values(x) if kv is None else kv
        if self.keep_weights:
            self.weights = self._softmax_weights(q, k)
            h = self.weights @ v
        else:
            h = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        return self.to_out(h.transpose(1, 2).flatten(2))  # (B, N, width)

    def _softmax_weights(self, q: Tensor, k: Tensor) -> Tensor:
        scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5  # (B, heads, N, M)
        if self.causal:
            future = torch.ones_like(scores, dtype=torch.bool).triu(1)
            scores = scores.masked_fill(future, -math.inf)
        return scores.softmax(dim=-1)

    def _split_heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # (B, heads, N, d)


def _to_sequence(x: Tensor) -> Tensor:
    return x.permute(0, 2, 3, 1).flatten(1, 2)  # (B, C, H, W) -> (B, H*W, C); free if channels_last


def _to_image(x: Tensor, height: int, width: int) -> Tensor:
    return x.unflatten(1, (height, width)).permute(0, 3, 1, 2)  # (B, H*W, C) -> (B, C, H, W)


class AttentionBlock(nn.Module):
    """x + attention(norm(x)) over all positions, in one head: the middle of the autoencoder."""

    def __init__(self, width: int, num_groups: int):
        super().__init__()
        self.norm = nn.GroupNorm(num_groups, width, eps=1e-6)
        self.attn = Attention(width, num_heads=1, bias=True)

    def forward(self, x: Tensor) -> Tensor:
        h = self.attn(_to_sequence(self.norm(x)))  # (B, H*W, C)
        return x + _to_image(h, *x.shape[2:])


class Downsample(nn.Module):
    """Halve height and width. `asymmetric` pads right and below only, as SD's autoencoder does."""

    def __init__(self, channels: int, asymmetric: bool = False):
        super().__init__()
        self.asymmetric = asymmetric
        padding = 0 if asymmetric else 1
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=padding)

    def forward(self, x: Tensor) -> Tensor:
        if self.asymmetric:
            x = F.pad(x, (0, 1, 0, 1))
        return self.conv(x)  # (B, C, H/2, W/2)


class Upsample(nn.Module):
    """Double height and width: each pixel is repeated 2 x 2 times, then a convolution."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))  # (B, C, 2H, 2W)


class Gaussian:
    """N(mean, exp(logvar)) of each latent scalar. moments: (B, 2c, h, w), means, then logvars."""

    def __init__(self, moments: Tensor):
        self.mean, logvar = moments.chunk(2, dim=1)
        self.logvar = logvar.clamp(-30, 20)

    def sample(self, eps: Tensor) -> Tensor:
        """mean + std * eps (the reparameterisation: gradients reach both). eps: like mean."""
        return self.mean + (0.5 * self.logvar).exp() * eps

    def kl(self) -> Tensor:
        """KL(N(mean, var) || N(0, I)) = sum (mean^2 + var - 1 - log var) / 2, in nats. (B,)."""
        mean, logvar = self.mean.float(), self.logvar.float()
        return 0.5 * (mean**2 + logvar.exp() - 1 - logvar).sum(dim=(1, 2, 3))


class Autoencoder(nn.Module):
    """E and D of the book: `encode` x into a Gaussian over z, `decode` z into x_hat.

    The KL-regularised autoencoder of Rombach et al., app. G. Size shapes (f = 4):

        x (3, 32, 32) -> (16, 32, 32) -> (32, 16, 16) -> (64, 8, 8) -> moments (8, 8, 8)
          -> z (4, 8, 8) -> (64, 8, 8) -> (32, 16, 16) -> (16, 32, 32) -> x_hat (3, 32, 32)

    `forward` does both: x and the noise eps of the reparameterisation (None: decode the mean)
    -> (x_hat, posterior). Raises ValueError unless H and W are multiples of f.
    """

    def __init__(self, config: AutoencoderConfig = AutoencoderConfig()):
        super().__init__()
        c = config.latent_channels
        self.f = 2 ** (len(config.channel_mult) - 1)
        self.latent_channels = c
        self.encoder = nn.Sequential(*_encoder_layers(config))
        self.to_moments = nn.Conv2d(2 * c, 2 * c, 1)
        self.from_latent = nn.Conv2d(c, c, 1)
        self.decoder = nn.Sequential(*_decoder_layers(config))
        # The posterior starts with the small standard deviation exp(-3).
        nn.init.constant_(self.to_moments.bias[c:], -6.0)
        self.to(memory_format=torch.channels_last)

    @property
    def last_layer(self) -> Tensor:
        """The weight of the decoder's last convolution, for `adaptive_weight`."""
        return self.decoder[-1].weight

    def encode(self, x: Tensor) -> Gaussian:
        """x (B, 3, H, W) in [-1, 1] -> the posterior of z (B, c, h, w), not scaled."""
        height, width = x.shape[2:]
        if height % self.f or width % self.f:
            raise ValueError(
                f"x is {height} x {width}; height and width must be multiples of f = {self.f}"
            )
        x = x.to(self.from_latent.weight.dtype, memory_format=torch.channels_last)
        return Gaussian(self.to_moments(self.encoder(x)))

    def decode(self, z: Tensor) -> Tensor:
        """z (B, c, h, w), not scaled -> x_hat (B, 3, H, W)."""
        z = z.to(self.from_latent.weight.dtype, memory_format=torch.channels_last)
        return self.decoder(self.from_latent(z))

    def forward(self, x: Tensor, eps: Tensor | None = None) -> tuple[Tensor, Gaussian]:
        posterior = self.encode(x)
        z = posterior.mean if eps is None else posterior.sample(eps)
        return self.decode(z), posterior


def _encoder_layers(config: AutoencoderConfig) -> list[nn.Module]:
    """conv, then per level residual blocks and a Downsample, then the middle and the output."""
    c = config.width * config.channel_mult[0]
    layers = [nn.Conv2d(3, c, 3, padding=1)]
    for level, mult in enumerate(config.channel_mult):
        for _ in range(config.num_res_blocks):
            layers.append(ResBlock(c, config.width * mult, 0, config.num_groups, eps=1e-6))
            c = config.width * mult
        if level < len(config.channel_mult) - 1:
            layers.append(Downsample(c, asymmetric=True))
    layers += _middle_layers(c, config)
    layers += _output_layers(c, 2 * config.latent_channels, config)
    return layers


def _decoder_layers(config: AutoencoderConfig) -> list[nn.Module]:
    """The encoder's mirror image, with one more residual block per level."""
    c = config.width * config.channel_mult[-1]
    layers = [nn.Conv2d(config.latent_channels, c, 3, padding=1)]
    layers += _middle_layers(c, config)
    for level in reversed(range(len(config.channel_mult))):
        c_out = config.width * config.channel_mult[level]
        for _ in range(config.num_res_blocks + 1):
            layers.append(ResBlock(c, c_out, 0, config.num_groups, eps=1e-6))
            c = c_out
        if level > 0:
            layers.append(Upsample(c))
    layers += _output_layers(c, 3, config)
    return layers


def _middle_layers(c: int, config: AutoencoderConfig) -> list[nn.Module]:
    return [
        ResBlock(c, c, 0, config.num_groups, eps=1e-6),
        AttentionBlock(c, config.num_groups),
        ResBlock(c, c, 0, config.num_groups, eps=1e-6),
    ]


def _output_layers(c: int, c_out: int, config: AutoencoderConfig) -> list[nn.Module]:
    return [
        nn.GroupNorm(config.num_groups, c, eps=1e-6),
        nn.SiLU(),
        nn.Conv2d(c, c_out, 3, padding=1),
    ]


class PatchDiscriminator(nn.Module):
    """Real or restored? One logit for each patch of the image (PatchGAN, Isola et al. 2017).

    (B, 3, H, W) -> (B, 1, about H / 2^num_layers, ...). With 1, 2 or 3 layers a logit sees a
    patch of 16, 34 or 70 pixels. GroupNorm instead of BatchNorm: each image is judged
    independently of the batch.
    """

    def __init__(self, width: int = 64, num_layers: int = 3, num_groups: int = 8):
        super().__init__()
        layers = [nn.Conv2d(3, width, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        c = width
        for i in range(1, num_layers + 1):
            c_out = width * min(2**i, 8)
            stride = 1 if i == num_layers else 2
            layers.append(nn.Conv2d(c, c_out, 4, stride, padding=1))
            layers.append(nn.GroupNorm(num_groups, c_out))
            layers.append(nn.LeakyReLU(0.2))
            c = c_out
        layers.append(nn.Conv2d(c, 1, 4, padding=1))
        self.net = nn.Sequential(*layers)
        self.to(memory_format=torch.channels_last)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class PerceptualLoss(nn.Module):
    """The distance of two images in a network's features (LPIPS, Zhang et al. 2018, eq. 1).

        d(x, y) = sum_layers mean_positions sum_channels w (f(x) - f(y))^2

    where f has unit length at each position. (The paper's w stands inside the square.)

    features: x -> list of maps (B, C, h, w). `ImageEncoder.features` gives the form of LPIPS on
    features of our own; `metrics.published_lpips` gives the published LPIPS.
    layer_weights: (C,) for each layer, or None for 1. x, y: (B, 3, H, W) in [-1, 1]. Returns
    (B,).
    """

    def __init__(
        self,
        features: Callable[[Tensor], list[Tensor]],
        layer_weights: list[Tensor] | None = None,
    ):
        super().__init__()
        self.features = features
        self.layer_weights = layer_weights

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        distance = x.new_zeros(len(x))
        for i, (map_x, map_y) in enumerate(zip(self.features(x), self.features(y), strict=True)):
            difference = (_unit_length(map_x) - _unit_length(map_y)) ** 2  # (B, C, h, w)
            if self.layer_weights is not None:
                difference = difference * self.layer_weights[i].to(x).view(1, -1, 1, 1)
            distance = distance + difference.sum(dim=1).mean(dim=(1, 2))
        return distance


def _unit_length(features: Tensor) -> Tensor:
    return features * torch.rsqrt((features**2).sum(dim=1, keepdim=True) + 1e-10)


def adaptive_weight(
    reconstruction: Tensor, adversarial: Tensor, last_layer: Tensor, limit: float = 1e4
) -> Tensor:
    """|grad of reconstruction| / (|grad of adversarial| + 1e-4), both at the decoder's last layer.

    Esser et al. 2021, eq. 7; 1e-4 is CompVis' value. Multiplied by this weight, the adversarial
    loss has a gradient of the same size as the reconstruction. Both losses are scalars, before
    any GradScaler; norms are taken in float32. Returns a scalar in [0, limit], detached.

    limit: 1e4 is CompVis' value. A discriminator that knows little has a small gradient, so the
    weight becomes large, and one step of the autoencoder undoes what the discriminator has just
    learned. With a low limit the discriminator can go on learning.
    """
    reconstruction_norm = _gradient_norm(reconstruction, last_layer)
    adversarial_norm = _gradient_norm(adversarial, last_layer)
    return (reconstruction_norm / (adversarial_norm + 1e-4)).clamp(0, limit).detach()


def _gradient_norm(loss: Tensor, weight: Tensor) -> Tensor:
    (gradient,) = torch.autograd.grad(loss, weight, retain_graph=True)
    return gradient.float().norm()


def autoencoder_loss(
    x: Tensor,
    x_hat: Tensor,
    posterior: Gaussian,
    perceptual: Callable[[Tensor, Tensor], Tensor] | None = None,
    discriminator: nn.Module | None = None,
    last_layer: Tensor | None = None,
    kl_weight: float = 1e-6,
    perceptual_weight: float = 1.0,
    adversarial_weight: float = 0.5,
    adversarial_limit: float = 1e4,
) -> tuple[Tensor, dict[str, Tensor]]:
    """L1 + perceptual + adversarial + a tiny KL. Rombach et al. app. G; Esser et al. eq. 5 to 7.

    L1 and KL are summed over an image, then averaged over the batch, as in CompVis. The
    perceptual distance is one number an image; it is multiplied by the number of scalars, 3 H W,
    to match the summed L1. x, x_hat: (B, 3, H, W). None leaves the perceptual or the adversarial
    term out; a discriminator needs last_layer, a weight of the decoder. Returns the scalar to
    minimise, and its terms: l1 per scalar, perceptual, kl per image, adversarial and its adaptive
    weight.
    """
    l1 = (x - x_hat).abs()
    distance = perceptual(x, x_hat) if perceptual else x.new_zeros(len(x))
    scalars_per_image = x[0].numel()
    per_image = l1.sum(dim=(1, 2, 3)) + perceptual_weight * distance * scalars_per_image
    reconstruction = per_image.mean()
    kl = posterior.kl().mean()
    loss = reconstruction + kl_weight * kl
    terms = {"l1": l1.mean(), "perceptual": distance.mean(), "kl": kl}
    if discriminator is not None:
        adversarial = -discriminator(x_hat).mean()  # small when x_hat is taken for real
        weight = adaptive_weight(reconstruction, adversarial, last_layer, adversarial_limit)
        loss = loss + adversarial_weight * weight * adversarial
        terms |= {"adversarial": adversarial, "weight": weight}
    return loss, {name: term.detach() for name, term in terms.items()}


def discriminator_loss(real: Tensor, restored: Tensor) -> Tensor:
    """The hinge loss (relu(1 - real) + relu(1 + restored)) / 2, averaged. Lim & Ye 2017.

    Logits of any shape -> a scalar: 1 for a discriminator that answers 0 to everything, 0 for a
    perfect one.
    """
    return 0.5 * (F.relu(1 - real).mean() + F.relu(1 + restored).mean())


# ------------------------------------------------------------------------------------------------
#                                          Data
# ------------------------------------------------------------------------------------------------


class CaptionedImages:
    """Images and their captions, held in memory.

    images: (N, 3, size, size) uint8. captions: N strings. rows: a dict of metadata for each
    image, or None. Two rows with the same number as "pair" are hard to tell apart, see
    `train_clip`.
    """

    def __init__(self, images: Tensor, captions: list[str], rows: list[dict] | None = None):
        self.images = images
        self.captions = captions
        self.rows = rows if rows is not None else [{"text": caption} for caption in captions]

    @classmethod
    def from_folder(
        cls, folder: str | os.PathLike, size: int, progress: bool = False
    ) -> CaptionedImages:
        """Read images and their metadata.jsonl: a line {"file_name": ..., "text": ...} for each.

        This is the imagefolder convention. Images are cut to their middle square and resized.

        Raises ValueError naming the line or the file that is wrong, FileNotFoundError without
        metadata.jsonl.
        """
        metadata = pathlib.Path(folder) / "metadata.jsonl"
        if not metadata.is_file():
            raise FileNotFoundError(
                f"{metadata} does not exist; it holds one line for each image: "
                '{"file_name": ..., "text": ...}'
            )
        lines = metadata.read_bytes().removeprefix(codecs.BOM_UTF8).split(b"\n")
        rows = []
        for number, line in enumerate(lines, start=1):
            if line.strip():
                rows.append(_read_row(line, where=f"{metadata}, line {number}"))
        if not rows:
            raise ValueError(f"{metadata} is empty; it needs one line for each image")
        paths = [metadata.parent / row["file_name"] for row in rows]
        images = torch.empty(len(rows), 3, size, size, dtype=torch.uint8)
        bar = tqdm(total=len(rows), desc="reading images", disable=not progress, leave=False)
        with bar, ThreadPoolExecutor() as pool:  # Pillow decodes outside Python's global lock
            for i, image in enumerate(pool.map(lambda path: _read_image(path, size), paths)):
                images[i] = image
                bar.update()
        return cls(images, [row["text"] for row in rows], rows)

    def __len__(self) -> int:
        return len(self.captions)

    def pairs(self) -> Tensor | None:
        """The rows of each pair, (P, 2) long; None where the metadata marks no pairs."""
        members = {}
        for i, row in enumerate(self.rows):
            if isinstance(row.get("pair"), int):
                members.setdefault(row["pair"], []).append(i)
        found = [rows for rows in members.values() if len(rows) == 2]
        return torch.tensor(found) if found else None

    def to(self, device: torch.device) -> CaptionedImages:
        """The same images and captions, the images on `device`."""
        return CaptionedImages(self.images.to(device), self.captions, self.rows)

    def batch(self, index: Tensor | slice) -> Tensor:
        """x of the chosen images: (B, 3, size, size) float32 in [-1, 1]."""
        return _to_x(self.images[index])


def _to_x(images: Tensor) -> Tensor:
    return images.float() / 127.5 - 1  # uint8 0 ... 255 -> [-1, 1]


def _read_row(line: bytes, where: str) -> dict:
    try:
        row = json.loads(line)
    except UnicodeDecodeError as error:
        raise ValueError(f"{where} is not UTF-8: {error}") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{where} is not JSON: {error}") from None
    for key in ("file_name", "text"):
        if not isinstance(row, dict) or not isinstance(row.get(key), str):
            raise ValueError(f"{where} has no {key!r}, or one that is not a string")
    return row


def _read_image(path: pathlib.Path, size: int) -> Tensor:
    try:
        with Image.open(path) as file:
            image = ImageOps.exif_transpose(file).convert("RGBA")
    except FileNotFoundError:
        raise ValueError(f"{path} is named in metadata.jsonl but does not exist") from None
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path} is not an image that can be read: {error}") from None
    white = Image.new("RGBA", image.size, "white")  # behind what is transparent
    image = Image.alpha_composite(white, image).convert("RGB")
    image = ImageOps.fit(image, (size, size), Image.Resampling.LANCZOS)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)  # (3, size, size)


# ------------------------------------------------------------------------------------------------
#                                    Latent rescaling (chapter 4)
# ------------------------------------------------------------------------------------------------


@torch.no_grad()
def encode_all(
    model: LatentDiffusion, data: CaptionedImages, count: int | None = None, batch_size: int = 256
) -> Tensor:
    """The moments of the first `count` images' latents: (N, 2c, h, w), means, then log-variances.

    Unscaled, float32, on the model's device. count None: all images.
    """
    moments = []
    for images in data.images[:count].split(batch_size):
        posterior = model.autoencoder.encode(_to_x(images.to(model.device)))
        moments.append(torch.cat([posterior.mean, posterior.logvar], dim=1).float())
    return torch.cat(moments)


@torch.no_grad()
def measure_scale_factor(model: LatentDiffusion, data: CaptionedImages, seed: int = 0) -> float:
    """1 / std of the sampled latents of 2,048 images (Rombach et al. app. G).

    z * scale_factor then has unit variance, as the noise schedule assumes. The factor is kept in
    the model's config, and returned.
    """
    posterior = Gaussian(encode_all(model, data, count=2048))
    generator = _step_generator(seed, "scale_factor", 0)
    eps = torch.randn(posterior.mean.shape, generator=generator).to(model.device)
    scale_factor = 1 / posterior.sample(eps).std().item()
    model.config = dataclasses.replace(model.config, scale_factor=scale_factor)
    return scale_factor


# ------------------------------------------------------------------------------------------------
#                        Text, cross-attention and the U-Net (chapter 5)
# ------------------------------------------------------------------------------------------------


class Tokenizer:
    """Captions to numbers as CLIP does it: lower case, byte pairs, </w> at the end of a word.

    A caption becomes <|startoftext|>, its tokens, then <|endoftext|> up to `length` (as SD 1.x
    pads). The vocabulary is 256 bytes, 256 bytes that end a word, one entry for each merge, and
    the two marks: any text has tokens. vocab: {token: id}. merges: pairs of tokens, the most
    frequent first.
    """

    START = "<|startoftext|>"
    END = "<|endoftext|>"
    WORDS = (
        r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"  # CLIP's regular expression
    )

    def __init__(self, vocab: dict[str, int], merges: list[tuple[str, str]], length: int = 77):
        self.vocab = vocab
        self.merges = [tuple(p.split(" ") if isinstance(p, str) else p) for p in merges]
        self.length = length
        self.start = vocab[self.START]
        self.end = vocab[self.END]
        bpe = tokenizers.models.BPE(
            vocab, self.merges, unk_token=self.END, end_of_word_suffix="</w>"
        )
        self.engine = self._engine(bpe)
        self.engine.add_special_tokens([self.START, self.END])

    @classmethod
    def train(cls, captions: list[str], vocab_size: int, length: int = 77) -> Tokenizer:
        """Merge the most frequent pair until the vocabulary is full or every word is one token.

        Raises ValueError if vocab_size has no room for the bytes and the marks.
        """
        alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
        alphabet_ends = [letter + "</w>" for letter in alphabet]
        num_merges = vocab_size - 2 * len(alphabet) - 2
        if num_merges < 0:
            raise ValueError(
                f"vocab_size is {vocab_size}; bytes and marks alone take {2 * len(alphabet) + 2}"
            )
        engine = cls._engine(tokenizers.models.BPE(end_of_word_suffix="</w>"))
        trainer = tokenizers.trainers.BpeTrainer(
            vocab_size=vocab_size,
            initial_alphabet=alphabet,
            # Listed here they get fixed ids. Otherwise ids would be random, and pairs that are
            # equally frequent would be merged in another order in each run.
            special_tokens=alphabet_ends,
            end_of_word_suffix="</w>",
            show_progress=False,
        )
        engine.train_from_iterator(captions, trainer)
        merges = json.loads(engine.to_str())["model"]["merges"]
        return cls.from_merges(merges[:num_merges], length)

    @classmethod
    def from_merges(cls, merges: list[tuple[str, str]], length: int = 77) -> Tokenizer:
        """The merges determine the vocabulary: CLIP's file of merges gives CLIP's numbers."""
        alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
        alphabet_ends = [letter + "</w>" for letter in alphabet]
        merged = [first + second for first, second in merges]
        tokens = dict.fromkeys([*alphabet, *alphabet_ends, *merged, cls.START, cls.END])
        vocab = {token: i for i, token in enumerate(tokens)}
        return cls(vocab, merges, length)

    @classmethod
    def _engine(cls, bpe: tokenizers.models.Model) -> tokenizers.Tokenizer:
        normalizers, pre_tokenizers = tokenizers.normalizers, tokenizers.pre_tokenizers
        engine = tokenizers.Tokenizer(bpe)
        engine.normalizer = normalizers.Sequence(
            [
                normalizers.NFC(),
                normalizers.Replace(tokenizers.Regex(r"\s+"), " "),
                normalizers.Lowercase(),
            ]
        )
        engine.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(tokenizers.Regex(cls.WORDS), "removed", invert=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
        return engine

    def pieces(self, caption: str) -> list[str]:
        """The caption's tokens as text, without the marks."""
        return self.engine.encode(caption).tokens

    def __call__(self, captions: list[str]) -> Tensor:
        """(B, length) long. A caption that is too long is cut; a warning says what was cut off."""
        room = self.length - 2
        batch = torch.full((len(captions), self.length), self.end, dtype=torch.long)
        batch[:, 0] = self.start
        for i, caption in enumerate(captions):
            encoding = self.engine.encode(caption)
            ids = encoding.ids[:room]
            if len(encoding.ids) > room:
                cut = caption[encoding.offsets[room][0] :]
                warnings.warn(
                    f"the caption has {len(encoding.ids)} tokens, {room} fit; cut off: {cut!r}",
                    stacklevel=2,
                )
            batch[i, 1 : len(ids) + 1] = torch.tensor(ids, dtype=torch.long)
        return batch

    def save(self, path: str | os.PathLike) -> None:
        """Write a tokenizer.json of the `tokenizers` library."""
        self.engine.save(str(path), pretty=False)

    @classmethod
    def load(cls, path: str | os.PathLike, length: int = 77) -> Tokenizer:
        model = json.loads(pathlib.Path(path).read_text(encoding="utf-8"))["model"]
        return cls(model["vocab"], model["merges"], length)


class TextBlock(nn.Module):
    """x + causal attention, then x + MLP, both on normed x. (B, 77, width) -> the same.

    The MLP's activation is CLIP's quick GELU, h * sigmoid(1.702 h).
    """

    def __init__(self, width: int, num_heads: int):
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attn = Attention(width, num_heads=num_heads, bias=True, causal=True)
        self.norm2 = nn.LayerNorm(width)
        self.mlp_in = nn.Linear(width, 4 * width)
        self.mlp_out = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        h = self.mlp_in(self.norm2(x))
        return x + self.mlp_out(h * torch.sigmoid(1.702 * h))


class TextEncoder(nn.Module):
    """CLIP's text tower: tokens (B, 77) -> context (B, 77, width), after the final norm.

    Size shapes: width 96, two blocks. The padding is not masked, as in Stable Diffusion.
    """

    def __init__(self, config: TextConfig = TextConfig()):
        super().__init__()
        self.config = config
        self.token_embedding = nn.Embedding(config.vocab_size, config.width)
        self.position_embedding = nn.Embedding(config.length, config.width)
        # A word's embedding starts ten times as large as that of its position.
        nn.init.normal_(self.token_embedding.weight, std=0.5)
        nn.init.normal_(self.position_embedding.weight, std=0.05)
        blocks = [TextBlock(config.width, config.num_heads) for _ in range(config.num_layers)]
        self.blocks = nn.Sequential(*blocks)
        self.final_norm = nn.LayerNorm(config.width)

    def forward(self, tokens: Tensor) -> Tensor:
        positions = self.position_embedding.weight[: tokens.shape[1]]
        x = self.token_embedding(tokens) + positions  # (B, 77, width)
        return self.final_norm(self.blocks(x))

    def pool(self, tokens: Tensor, context: Tensor) -> Tensor:
        """The context at the FIRST end token, which has seen the whole caption: (B, width)."""
        return context[torch.arange(len(tokens), device=tokens.device), _first_end(tokens)]


def _first_end(tokens: Tensor) -> Tensor:
    is_end = tokens == tokens[:, -1:]  # the last token of every caption is an end token
    return is_end.int().argmax(dim=1)  # (B,)


class ImageEncoder(nn.Module):
    """The image tower of our small CLIP: convolutions, then means over the fields of a grid.

    x (B, 3, H, W) -> (B, text width). Size shapes: maps (16, 32, 32), (32, 16, 16), (64, 8, 8).
    `features` returns these maps; the perceptual loss compares them. `logit_scale`, log(1 /
    temperature), is learned, as in CLIP.
    """

    def __init__(self, config: ImageConfig, text_width: int):
        super().__init__()
        self.config = config
        self.levels = nn.ModuleList()
        c = config.width * config.channel_mult[0]
        for level, mult in enumerate(config.channel_mult):
            first = nn.Conv2d(3, c, 3, padding=1) if level == 0 else Downsample(c)
            block = ResBlock(c, config.width * mult, num_groups=config.num_groups)
            self.levels.append(nn.Sequential(first, block))
            c = config.width * mult
        self.norm = nn.GroupNorm(config.num_groups, c)
        self.proj = nn.Linear(config.pool**2 * c, text_width)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))
        self.to(memory_format=torch.channels_last)

    def features(self, x: Tensor) -> list[Tensor]:
        maps = []
        h = x.contiguous(memory_format=torch.channels_last)
        for level in self.levels:
            h = level(h)  # (B, C, H/2^level, W/2^level)
            maps.append(h)
        return maps

    def forward(self, x: Tensor) -> Tensor:
        h = F.silu(self.norm(self.features(x)[-1]))  # (B, C, h, w)
        means = F.adaptive_avg_pool2d(h, self.config.pool)  # (B, C, pool, pool)
        return self.proj(means.flatten(1))


class CLIP(nn.Module):
    """A text tower and an image tower whose features agree for an image and its caption.

    `forward(x, tokens)` -> unit-length features of images and captions, (B, width) each, and the
    scale of their products.
    """

    def __init__(
        self, tokenizer: Tokenizer | None, text_encoder: TextEncoder, image_encoder: ImageEncoder
    ):
        super().__init__()
        self.tokenizer = tokenizer
        self.text_encoder = text_encoder
        self.image_encoder = image_encoder

    @classmethod
    def build(cls, text: TextConfig, image: ImageConfig) -> CLIP:
        """Both towers, untrained, without a tokenizer."""
        return cls(None, TextEncoder(text), ImageEncoder(image, text.width))

    def image_features(self, x: Tensor) -> Tensor:
        return F.normalize(self.image_encoder(x), dim=-1)

    def text_features(self, tokens: Tensor) -> Tensor:
        context = self.text_encoder(tokens)
        return F.normalize(self.text_encoder.pool(tokens, context), dim=-1)

    def forward(self, x: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        scale = self.image_encoder.logit_scale.clamp(max=math.log(100)).exp()
        return self.image_features(x), self.text_features(tokens), scale

    def save(self, folder: str | os.PathLike, dtype: torch.dtype = torch.float32) -> None:
        """As `LatentDiffusion.save`."""
        text, image = self.text_encoder.config, self.image_encoder.config
        config = {"text": dataclasses.asdict(text), "image": dataclasses.asdict(image)}
        _save_model(self, config, folder, dtype)

    @classmethod
    def load(cls, folder: str | os.PathLike) -> CLIP:
        """As `LatentDiffusion.load`."""

        def build(config: dict) -> CLIP:
            text = _from_json(TextConfig, config["text"])
            return cls.build(text, _from_json(ImageConfig, config["image"]))

        return _load_model(build, folder)


def clip_loss(image_features: Tensor, text_features: Tensor, scale: Tensor | float) -> Tensor:
    """Find the caption of each image, and the image of each caption (Radford et al. 2021, fig. 3).

    The mean of both cross-entropies over the (B, B) products, times scale. Features: (B, width),
    of unit length. Returns a scalar; log B is chance.
    """
    logits = scale * image_features @ text_features.T  # (B, B), the right pairs on the diagonal
    target = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


class TransformerBlock(nn.Module):
    """Self-attention, cross-attention to the caption, feed-forward; each adds to its input.

    x: (B, C, H, W) -> the same. kv: the caption's keys and values,
    `cross_attn.keys_values(context)`. The feed-forward is GEGLU (Shazeer 2020): value *
    gelu(gate), both linear in x. proj_in and proj_out are Stable Diffusion's 1x1 convolutions,
    here linear layers over positions.
    """

    def __init__(self, width: int, context_width: int, num_heads: int = 8, num_groups: int = 32):
        super().__init__()
        self.norm = nn.GroupNorm(num_groups, width, eps=1e-6)
        self.proj_in = nn.Linear(width, width)
        self.norm_self = nn.LayerNorm(width)
        self.self_attn = Attention(width, num_heads=num_heads)
        self.norm_cross = nn.LayerNorm(width)
        self.cross_attn = Attention(width, context_width, num_heads)
        self.norm_mlp = nn.LayerNorm(width)
        self.mlp_value = nn.Linear(width, 4 * width)  # two products are faster than one here
        self.mlp_gate = nn.Linear(width, 4 * width)
        self.mlp_out = nn.Linear(4 * width, width)
        self.proj_out = nn.Linear(width, width)

    def forward(self, x: Tensor, kv: tuple[Tensor, Tensor]) -> Tensor:
        h = self.proj_in(_to_sequence(self.norm(x)))  # (B, H*W, C)
        h = h + self.self_attn(self.norm_self(h))
        h = h + self.cross_attn(self.norm_cross(h), kv)
        n = self.norm_mlp(h)
        h = h + self.mlp_out(self.mlp_value(n) * F.gelu(self.mlp_gate(n)))
        return x + _to_image(self.proj_out(h), *x.shape[2:])  # (B, C, H, W)


def timestep_embedding(t: Tensor, width: int) -> Tensor:
    """cos(t w_i), then sin(t w_i), for width / 2 frequencies w_i from 1 down to almost 1 / 10000.

    t: (B,). Returns (B, width) float32.
    """
    half = width // 2
    i = torch.arange(half, dtype=torch.float32, device=t.device)
    frequencies = torch.exp(-math.log(10_000) * i / half)
    angles = t[:, None].float() * frequencies  # (B, width / 2)
    return torch.cat([angles.cos(), angles.sin()], dim=1)


class UNetBlock(nn.Module):
    """A residual block that receives t; on levels with attention also a transformer block.

    The residual branches end in zeros, as in DDPM's code: at the start a block only passes on its
    input (through a 1x1 convolution where the number of channels changes).
    """

    def __init__(self, c_in: int, c_out: int, attention: bool, config: UNetConfig):
        super().__init__()
        self.res = ResBlock(c_in, c_out, 4 * config.width, config.num_groups)
        zero_init(self.res.conv2)
        self.transformer = None
        if attention:
            self.transformer = TransformerBlock(
                c_out, config.context_width, config.num_heads, config.num_groups
            )
            zero_init(self.transformer.proj_out)

    def forward(self, h: Tensor, t_emb: Tensor, kv: tuple[Tensor, Tensor] | None) -> Tensor:
        h = self.res(h, t_emb)
        return h if self.transformer is None else self.transformer(h, kv)


class UNet(nn.Module):
    """eps_theta(z_t, t, y): down, middle, up, with skips from down to up (Rombach app. E).

    z_t: (B, c, h, w). t: (B,). context: (B, 77, d), or what `keys_values` made of it. Returns
    eps_hat, like z_t. Size shapes, two levels of width 64, one block going down and two going up:

        z_t (4, 8, 8) -> conv_in (64, 8, 8) -> block (64, 8, 8) -> Downsample (64, 4, 4)
            -> block (64, 4, 4) -> middle (64, 4, 4)
            -> 2 blocks, each of 64 + 64 channels in, (64, 4, 4) -> Upsample (64, 8, 8)
            -> 2 blocks, each of 64 + 64 channels in, (64, 8, 8) -> conv_out (4, 8, 8)

    Raises ValueError unless h and w are multiples of 2 ** (levels - 1).
    """

    def __init__(self, config: UNetConfig = UNetConfig()):
        super().__init__()
        width = config.width
        levels = range(len(config.channel_mult))
        self.width = width
        self.downsampling = 2 ** (len(levels) - 1)
        self.time_mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.SiLU(), nn.Linear(4 * width, 4 * width)
        )
        self.conv_in = nn.Conv2d(config.latent_channels, width, 3, padding=1)

        self.down = nn.ModuleList()
        c = width
        skip_channels = [c]  # of each map that the way up receives
        for level in levels:
            c_out = width * config.channel_mult[level]
            for _ in range(config.num_res_blocks):
                self.down.append(UNetBlock(c, c_out, level in config.attention_levels, config))
                c = c_out
                skip_channels.append(c)
            if level < levels[-1]:
                self.down.append(Downsample(c))
                skip_channels.append(c)

        self.middle = nn.ModuleList([UNetBlock(c, c, True, config), UNetBlock(c, c, False, config)])

        self.up = nn.ModuleList()
        for level in reversed(levels):
            c_out = width * config.channel_mult[level]
            for _ in range(config.num_res_blocks + 1):
                attention = level in config.attention_levels
                self.up.append(UNetBlock(c + skip_channels.pop(), c_out, attention, config))
                c = c_out
            if level > 0:
                self.up.append(Upsample(c))

        self.norm_out = nn.GroupNorm(config.num_groups, c)
        self.conv_out = zero_init(nn.Conv2d(c, config.latent_channels, 3, padding=1))
        self.to(memory_format=torch.channels_last)

    def cross_attentions(self) -> list[Attention]:
        """The layers that read the caption, in the order in which they run."""
        layers = [*self.down, *self.middle, *self.up]
        blocks = [layer for layer in layers if isinstance(layer, UNetBlock)]
        return [block.transformer.cross_attn for block in blocks if block.transformer is not None]

    def keys_values(self, context: Tensor) -> list[tuple[Tensor, Tensor]]:
        """The caption's keys and values for each cross-attention.

        They are the same at all steps of a sampling: made once, they can be given to `forward` in
        place of the context.
        """
        context = context.to(self.conv_in.weight.dtype)
        return [attention.keys_values(context) for attention in self.cross_attentions()]

    def forward(
        self, z_t: Tensor, t: Tensor, context: Tensor | list[tuple[Tensor, Tensor]]
    ) -> Tensor:
        height, width = z_t.shape[2:]
        if height % self.downsampling or width % self.downsampling:
            raise ValueError(
                f"z_t is {height} x {width}; both must be multiples of {self.downsampling}"
            )
        dtype = self.conv_in.weight.dtype
        if isinstance(context, list):
            kvs = iter(context)
        else:  # each is made just before its use, and is still in the cache then
            context = context.to(dtype)
            kvs = (attention.keys_values(context) for attention in self.cross_attentions())
        t_emb = self.time_mlp(timestep_embedding(t, self.width).to(dtype))  # (B, 4 width)
        t_emb = F.silu(t_emb)  # here once, not in each residual block
        h = self.conv_in(z_t.to(dtype, memory_format=torch.channels_last))  # (B, width, h, w)
        skips = [h]
        for layer in self.down:
            h = self._run(layer, h, t_emb, kvs)  # (B, C, H, W), half the size after a Downsample
            skips.append(h)
        for layer in self.middle:
            h = self._run(layer, h, t_emb, kvs)
        for layer in self.up:
            if isinstance(layer, UNetBlock):
                h = torch.cat([h, skips.pop()], dim=1)  # (B, C + C of the skip, H, W)
            h = self._run(layer, h, t_emb, kvs)
        eps_hat = self.conv_out(F.silu(self.norm_out(h)))  # (B, c, h, w)
        return eps_hat.to(z_t.dtype)

    @staticmethod
    def _run(layer: nn.Module, h: Tensor, t_emb: Tensor, kvs: Iterator) -> Tensor:
        if not isinstance(layer, UNetBlock):
            return layer(h)  # Downsample or Upsample
        kv = next(kvs) if layer.transformer is not None else None
        return layer(h, t_emb, kv)


# ------------------------------------------------------------------------------------------------
#                                      Guidance (chapter 6)
# ------------------------------------------------------------------------------------------------


def guided_eps(
    unet: UNet,
    z_t: Tensor,
    t: Tensor,
    context: Tensor | list[tuple[Tensor, Tensor]],
    guidance: float,
) -> Tensor:
    """eps(z_t, t, empty) + w (eps(z_t, t, y) - eps(z_t, t, empty)). Ho & Salimans eq. 6.

    (Their w is ours minus 1.) context: (2B, 77, d), B times that of the empty caption, then those
    of y; or its keys and values. One forward pass of twice the batch makes both predictions.
    """
    both = unet(torch.cat([z_t, z_t]), torch.cat([t, t]), context)
    eps_empty, eps_text = both.chunk(2)
    return eps_empty + guidance * (eps_text - eps_empty)


# ------------------------------------------------------------------------------------------------
#                                        DDIM (chapter 7)
# ------------------------------------------------------------------------------------------------


def ddim_timesteps(
    schedule: NoiseSchedule, steps: int, spacing: str = "trailing", start: int | None = None
) -> list[tuple[int, float, float]]:
    """The (t, alpha_bar_t, alpha_bar after the step) of each step, noisiest first.

    spacing: "trailing" begins at T-1 and ends without noise, at alpha_bar = 1; "leading" is
    Stable Diffusion's: 981, 961, ... 1 for fifty steps, ending at alpha_bar_0; choose steps that
    divide T there, or the first t lies far below T. start: begin at
    this t, so with fewer steps. Raises ValueError unless 1 <= steps <= T and 0 <= start < T.
    """
    T = schedule.T
    if not 1 <= steps <= T:
        raise ValueError(f"steps is {steps}; allowed are 1 to {T}")
    if spacing == "trailing":
        times = [round(T - i * T / steps) - 1 for i in range(steps)]
        last_alpha_bar = 1.0
    elif spacing == "leading":
        offset = 1 if steps < T else 0  # with T steps there is no room for an offset
        times = [i * (T // steps) + offset for i in reversed(range(steps))]
        last_alpha_bar = schedule.alpha_bars[0].item()
    else:
        raise ValueError(f"spacing is {spacing!r}; allowed are 'trailing' and 'leading'")
    if start is not None:
        if not 0 <= start < T:
            raise ValueError(f"start is {start}; allowed are 0 to {T - 1}")
        times = [start] + [t for t in times if t < start]
    alpha_bars = [schedule.alpha_bars[t].item() for t in times]
    return list(zip(times, alpha_bars, [*alpha_bars[1:], last_alpha_bar], strict=True))


def ddim_step(
    z_t: Tensor,
    eps_hat: Tensor,
    alpha_bar: float,
    alpha_bar_prev: float,
    eta: float = 0.0,
    noise: Tensor | None = None,
) -> Tensor:
    """Predict the clean latent, then go straight to another noise level. DDIM eq. 12 and 16.

        z'    = sqrt(a') z0_hat + sqrt(1 - a' - sigma^2) eps_hat + sigma noise
        sigma = eta sqrt((1 - a') / (1 - a)) sqrt(1 - a / a')

    where a and a' are alpha_bar and alpha_bar_prev, of z_t and of the result (the paper's
    alpha). eta: 0 is deterministic; 1 with all T steps is DDPM. noise: like z_t; it is needed
    where sigma is not 0.
    """
    sigma = _ddim_sigma(alpha_bar, alpha_bar_prev, eta)
    z0_hat = predict_z0(z_t, eps_hat, alpha_bar)
    direction = max(1 - alpha_bar_prev - sigma**2, 0.0) ** 0.5  # below 0 only by rounding
    z = alpha_bar_prev**0.5 * z0_hat + direction * eps_hat
    return z + sigma * noise if sigma > 0 else z


def _ddim_sigma(alpha_bar: float, alpha_bar_prev: float, eta: float) -> float:
    if eta == 0:  # also on the way of `ddim_invert`, towards more noise, which has no variance
        return 0.0
    variance = (1 - alpha_bar_prev) / (1 - alpha_bar) * (1 - alpha_bar / alpha_bar_prev)
    return eta * variance**0.5


def ddim_sample(
    predict: Callable[[Tensor, Tensor], Tensor],
    schedule: NoiseSchedule,
    z: Tensor,
    *,
    steps: int = 50,
    eta: float = 0.0,
    spacing: str = "trailing",
    start: int | None = None,
    generator: torch.Generator | None = None,
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """DDIM: one `ddim_step` for each of `ddim_timesteps(schedule, steps, spacing, start)`."""
    for t, alpha_bar, alpha_bar_prev in ddim_timesteps(schedule, steps, spacing, start):
        eps_hat = predict(z, _full_like_batch(z, t))
        z0_hat = predict_z0(z, eps_hat, alpha_bar)
        needs_noise = _ddim_sigma(alpha_bar, alpha_bar_prev, eta) > 0
        noise = _noise_like(z, generator) if needs_noise else None
        z = ddim_step(z, eps_hat, alpha_bar, alpha_bar_prev, eta, noise)
        yield t, z, z0_hat


def ddim_invert(
    predict: Callable[[Tensor, Tensor], Tensor],
    schedule: NoiseSchedule,
    z: Tensor,
    *,
    steps: int = 50,
    spacing: str = "trailing",
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """`ddim_sample` with eta 0, run backwards: from a clean latent to the noise that would draw it.

    The step up to t needs eps_hat at z_t, which is not known yet. The prediction at the less
    noisy z, for the same t, stands in for it; with more steps the error is smaller. Yields (t,
    z_t, z0_hat).
    """
    for t, alpha_bar, alpha_bar_clean in reversed(ddim_timesteps(schedule, steps, spacing)):
        eps_hat = predict(z, _full_like_batch(z, t))
        z0_hat = predict_z0(z, eps_hat, alpha_bar_clean)
        z = ddim_step(z, eps_hat, alpha_bar_clean, alpha_bar)
        yield t, z, z0_hat


# ------------------------------------------------------------------------------------------------
#                                   The pipeline (chapter 8)
# ------------------------------------------------------------------------------------------------


class LatentDiffusion(nn.Module):
    """Everything that draws, at one size.

    tokenizer (None until trained or loaded), text_encoder, image_encoder (None where the config
    has none), autoencoder, unet and schedule.
    """

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.tokenizer = None
        self.text_encoder = TextEncoder(config.text)
        self.image_encoder = None
        if config.image is not None:
            self.image_encoder = ImageEncoder(config.image, config.text.width)
        self.autoencoder = Autoencoder(config.autoencoder)
        self.unet = UNet(config.unet)
        self.schedule = NoiseSchedule(config.schedule, config.T)

    @property
    def scale_factor(self) -> float:
        """1 / std of the autoencoder's latents (0.18215 in Stable Diffusion 1.x)."""
        if self.config.scale_factor is None:
            raise ValueError(
                "scale_factor is not measured yet; run measure_scale_factor after train_autoencoder"
            )
        return self.config.scale_factor

    @property
    def device(self) -> torch.device:
        return self.unet.conv_in.weight.device

    def encode(self, x: Tensor) -> Tensor:
        """x (B, 3, H, W) in [-1, 1] -> z (B, c, h, w): the posterior's mean, at unit variance."""
        return self.scale_factor * self.autoencoder.encode(x).mean.to(x.dtype)

    def decode(self, z: Tensor) -> Tensor:
        """z (B, c, h, w) -> x (B, 3, H, W) in [-1, 1].

        About 512 x 512 pixels at a time, so that a large batch needs no more memory than one
        image.
        """
        pixels = z.shape[2] * z.shape[3] * self.autoencoder.f**2
        images_at_once = max(1, 512 * 512 // pixels)
        parts = []
        for part in z.split(images_at_once):
            parts.append(self.autoencoder.decode(part / self.scale_factor).to(z.dtype))
        return torch.cat(parts).clamp(-1, 1)

    def embed(self, prompts: list[str]) -> Tensor:
        """Prompts -> context (B, 77, d)."""
        if self.tokenizer is None:
            raise ValueError(
                "tokenizer is None; train one with Tokenizer.train or load a model that has one"
            )
        return self.text_encoder(self.tokenizer(prompts).to(self.device))

    @torch.no_grad()
    def denoise(
        self,
        prompts: list[str],
        *,
        steps: int = 50,
        guidance: float = 7.5,
        negative: str = "",
        eta: float = 0.0,
        generator: torch.Generator | None = None,
        z: Tensor | None = None,
        start: int | None = None,
        spacing: str | None = None,
        size: tuple[int, int] | None = None,
    ) -> Iterator[tuple[int, Tensor, Tensor]]:
        """From noise to the prompts' latents: yields (t, z, z0_hat) after each DDIM step.

        steps: 1 ... T. guidance: w; 1 is plain conditional sampling. negative: a caption to steer
        away from (not used at guidance 1). eta: in [0, 1]; 0 is deterministic given the first
        noise, 1 is as random as DDPM. generator: of all noise. z: start from these latents, one
        for each prompt, instead of noise; size is then not used. Image to image:
        z = schedule.add_noise(encode(x), t, eps) and start = t. spacing: of the timesteps, by
        default the config's. size: height and width in pixels, multiples of
        f * 2 ** (U-Net levels - 1), by default the config's. Sampling stays in float32 whatever
        the U-Net's precision. Raises ValueError for what is not allowed.
        """
        size = size or (self.config.image_size, self.config.image_size)
        self._check_arguments(prompts, guidance, eta, size)
        if z is None and start is not None:
            raise ValueError(f"start is {start}, which needs z, the latents noised to that time")
        if z is not None and len(z) != len(prompts):
            raise ValueError(f"z has {len(z)} latents for {len(prompts)} prompts: one for each")
        _ = self.scale_factor  # raises now rather than after all the steps
        if z is None:
            f = self.autoencoder.f
            shape = (len(prompts), self.autoencoder.latent_channels, size[0] // f, size[1] // f)
            z = _noise_like(torch.empty(shape, device=self.device), generator)

        context = self.embed(prompts)
        z = z.to(torch.promote_types(context.dtype, torch.float32))
        if guidance != 1:
            context = torch.cat([self.embed([negative]).expand_as(context), context])
        kvs = self.unet.keys_values(context)

        def predict(z_t: Tensor, t: Tensor) -> Tensor:
            if guidance == 1:
                return self.unet(z_t, t, kvs)
            return guided_eps(self.unet, z_t, t, kvs, guidance)

        yield from ddim_sample(
            predict,
            self.schedule,
            z,
            steps=steps,
            eta=eta,
            spacing=spacing or self.config.spacing,
            start=start,
            generator=generator,
        )

    def _check_arguments(
        self, prompts: list[str], guidance: float, eta: float, size: tuple[int, int]
    ) -> None:
        if isinstance(prompts, str) or not prompts:
            raise ValueError(f"prompts is {prompts!r}; a list of at least one string is needed")
        if not math.isfinite(guidance):
            raise ValueError(f"guidance is {guidance}; a finite number is needed")
        if not 0 <= eta <= 1:
            raise ValueError(f"eta is {eta}; allowed are 0 to 1")
        multiple = self.autoencoder.f * self.unet.downsampling
        if min(size) < multiple or size[0] % multiple or size[1] % multiple:
            raise ValueError(
                f"size is {size[0]} x {size[1]}; height and width must be multiples of {multiple}"
            )

    @torch.no_grad()
    def generate(self, prompts: list[str], **options) -> Tensor:
        """Draw the prompts: fifty denoising steps in latent space, then one decode.

        options: those of `denoise`, such as steps, guidance, negative, generator and size.
        Returns x (B, 3, H, W) in [-1, 1].
        """
        for _, z, _ in self.denoise(prompts, **options):  # noqa: B007
            pass
        return self.decode(z)

    def save(self, folder: str | os.PathLike, dtype: torch.dtype = torch.float32) -> None:
        """Write config.json, tokenizer.json and model.safetensors (in `dtype`) into `folder`."""
        _save_model(self, dataclasses.asdict(self.config), folder, dtype)

    @classmethod
    def load(cls, folder: str | os.PathLike) -> LatentDiffusion:
        """What `save` wrote, in float32 and eval mode. Raises ValueError for another folder."""

        def build(config: dict) -> LatentDiffusion:
            return cls(Config.from_dict(config))

        return _load_model(build, folder)


def _save_model(
    model: CLIP | LatentDiffusion, config: dict, folder: str | os.PathLike, dtype: torch.dtype
) -> None:
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for old in [*folder.glob("model*.safetensors"), folder / "tokenizer.json"]:
        old.unlink(missing_ok=True)  # `_load_model` would read these, too
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    if model.tokenizer is not None:
        model.tokenizer.save(folder / "tokenizer.json")
    weights = {name: value.to(dtype).contiguous() for name, value in model.state_dict().items()}
    safetensors.torch.save_file(weights, folder / "model.safetensors")


def _load_model(build: Callable[[dict], nn.Module], folder: str | os.PathLike) -> nn.Module:
    folder = pathlib.Path(folder)
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} is no saved model: it has no config.json")
    try:
        model = build(json.loads((folder / "config.json").read_text()))
        if (folder / "tokenizer.json").is_file():
            length = model.text_encoder.config.length
            model.tokenizer = Tokenizer.load(folder / "tokenizer.json", length)
        weights = {}
        for file in folder.glob("model*.safetensors"):  # one, or several where files must be small
            weights |= safetensors.torch.load_file(file)
        model.load_state_dict(weights)
    except Exception as error:  # each library raises its own kinds
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"{folder} holds no whole model: {reason}") from None
    return model.eval()


# ------------------------------------------------------------------------------------------------
#                                The three trainings (chapter 8)
# ------------------------------------------------------------------------------------------------
# Each training is a generator that yields (steps done, losses). The loop reads: draw a batch,
# noise it, predict, loss, step. What a loop needs besides (precision, processes, accumulation,
# clipping, averaging) is in `Trainer`.
#
# All randomness of a step comes from (seed, training, step) and is drawn for the whole batch,
# then shared out. So several processes use the same noise as one, and a stopped run goes on as if
# it had never stopped.


class EMA:
    """An average of a module's weights: ema = decay ema + (1 - decay) weights, kept in `module`.

    The decay is at most (1 + step) / (10 + step), so that the first steps are soon forgotten.
    """

    def __init__(self, module: nn.Module, decay: float = 0.999):
        self.module = copy.deepcopy(module).eval().requires_grad_(False)
        self.decay = decay

    @torch.no_grad()
    def update(self, module: nn.Module, step: int) -> None:
        decay = min(self.decay, (1 + step) / (10 + step))
        averages, weights = list(self.module.parameters()), list(module.parameters())
        torch._foreach_lerp_(averages, weights, 1 - decay)


class Muon(torch.optim.Optimizer):
    """Steps in which every direction of a weight matrix learns equally fast (Jordan et al. 2024).

        M <- momentum M + (1 - momentum) gradient
        N  = momentum M + (1 - momentum) gradient = U S V^T   (Nesterov: with the new M; its SVD)
        W <- (1 - lr weight_decay) W - lr 0.2 sqrt(max(rows, columns)) U V^T

    U V^T is N with all its singular values S set to 1: what shows only in small gradients is
    learned as fast as what shows in large ones. 0.2 sqrt(...) makes a step as large as AdamW's,
    so both take the same rates (Liu et al. 2025).

    weights: of linear layers and of convolutions; a kernel (c_out, c_in, k, k) counts as a matrix
    (c_out, c_in k k). `torch.optim.Muon` takes no kernels, and computes in bfloat16, which many
    CPUs do slowly.
    """

    def __init__(
        self,
        weights: list[Tensor],
        lr: float,
        momentum: float = 0.95,
        weight_decay: float = 0.01,
    ):
        defaults = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay}
        super().__init__(weights, defaults)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        device = self.param_groups[0]["params"][0].device
        self.move(*[torch.full((), group["lr"], device=device) for group in self.param_groups])

    def move(self, *rates: Tensor) -> dict[str, Tensor]:
        """The step with the learning rates of the groups as tensors, as a CUDA graph needs them."""
        for group, lr in zip(self.param_groups, rates, strict=True):
            momentum = group["momentum"]
            decay = 1 - lr * group["weight_decay"]
            by_shape = {}  # matrices of one shape become orthogonal together
            for weight in group["params"]:
                if weight.grad is not None:
                    by_shape.setdefault(weight.shape, []).append(weight)
            for weights in by_shape.values():
                gradients = [weight.grad for weight in weights]
                averages = [self._average(weight) for weight in weights]
                torch._foreach_lerp_(averages, gradients, 1 - momentum)
                updates = torch._foreach_lerp(gradients, averages, momentum)
                matrices = torch.stack(updates).flatten(2)  # (N, rows, columns)
                directions = _orthogonal(matrices).view(-1, *weights[0].shape)
                directions = directions * (lr * 0.2 * max(matrices.shape[1:]) ** 0.5)
                torch._foreach_mul_(weights, decay)
                torch._foreach_sub_(weights, list(directions))
        return {}

    def _average(self, weight: Tensor) -> Tensor:
        state = self.state[weight]
        if not state:
            state["average"] = torch.zeros_like(weight)
        return state["average"]


def _orthogonal(matrices: Tensor) -> Tensor:
    """(N, rows, columns) -> about U V^T of each, by a Newton-Schulz iteration.

    Each of its five steps turns every singular value s into a s + b s^3 + c s^5. The coefficients
    of Jordan et al. bring all but the very small ones to between 0.6 and 1.3, which is enough.
    """
    if matrices.shape[1] > matrices.shape[2]:
        return _orthogonal(matrices.mT).mT
    a, b, c = 3.4445, -4.7750, 2.0315
    x = matrices / (matrices.norm(dim=(1, 2), keepdim=True) + 1e-7)  # all singular values <= 1
    for _ in range(5):
        gram = x @ x.mT
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)  # b gram + c gram gram
        x = torch.baddbmm(x, polynomial, x, beta=a)  # a x + polynomial x
    return x


class Trainer:
    """A module and its optimizers, prepared by accelerate: what a loop needs besides the method.

    In a loop: `net` predicts, `backward` takes the loss of each of the `micro_batches`, and
    `update` makes the optimizers' step with gradients clipped to norm 1. The optimizer is AdamW;
    with `config.muon`, Muon for the weights of linear layers and convolutions, and AdamW for the
    rest: embeddings, norms, biases. part: a part of the module that learns at `part_lr_scale` times
    the rate. ema: an average that follows each step.

    On one GPU, what `recorded` wraps is launched as a CUDA graph; `Trainer.records = False`
    launches kernel by kernel.
    """

    records = True

    def __init__(
        self,
        module: nn.Module,
        config: TrainConfig,
        accelerator: Accelerator,
        *,
        part: nn.Module | None = None,
        part_lr_scale: float = 1.0,
        ema: EMA | None = None,
    ):
        self.records = self.records and _on_one_gpu(accelerator)
        module.train().requires_grad_(True).to(accelerator.device)
        in_part = set() if part is None else set(part.parameters())
        layers = [m for m in module.modules() if isinstance(m, nn.Linear | nn.Conv2d)]
        matrices = [layer.weight for layer in layers] if config.muon else []

        def groups(parameters: list[Tensor]) -> list[dict]:
            return [
                {"params": [p for p in parameters if p not in in_part], "lr_scale": 1.0},
                {"params": [p for p in parameters if p in in_part], "lr_scale": part_lr_scale},
            ]

        others = [p for p in module.parameters() if p not in set(matrices)]
        adamw = torch.optim.AdamW(
            groups(others), config.learning_rate, betas=(0.9, 0.99), weight_decay=0.01, fused=True
        )
        optimizers = [adamw]
        if matrices:
            muon = Muon(groups(matrices), config.learning_rate)
            muon.move = self.recorded(muon.move)
            optimizers.append(muon)
        accelerator.gradient_accumulation_steps = config.grad_accum_steps
        self.module = module
        self.config = config
        self.accelerator = accelerator
        self.net, *self.optimizers = accelerator.prepare(module, *optimizers)
        self.ema = ema
        if ema is not None:
            accelerator.prepare_model(ema.module, evaluation_mode=True)  # saved with the rest

    def micro_batches(self, *batch: Tensor) -> Iterator[list[Tensor]]:
        """This process's share of a global batch, in `grad_accum_steps` parts, on its device."""
        parts = self.config.grad_accum_steps
        size = self.config.batch_size // (self.accelerator.num_processes * parts)
        first = self.accelerator.process_index * parts
        for i in range(first, first + parts):
            rows = slice(i * size, (i + 1) * size)
            with self.accelerator.accumulate(self.net):
                yield [self._to_device(values[rows]) for values in batch]

    def _to_device(self, values: Tensor) -> Tensor:
        device = self.accelerator.device
        on_cuda = device.type == "cuda"
        if on_cuda:
            values = values.pin_memory()  # else the copy would wait for all earlier kernels
        return values.to(device, non_blocking=on_cuda)  # a Mac's copy must end before we go on

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of a micro-batch's mean loss; all micro-batches count equally."""
        self.accelerator.backward(loss)

    def recorded(
        self, compute: Callable[..., dict[str, Tensor]]
    ) -> Callable[..., dict[str, Tensor]]:
        """`compute`, launched on one GPU as a single CUDA graph. Elsewhere `compute` itself.

        compute: tensors of the same shapes in each call -> named tensors. It must neither wait
        for the GPU nor draw random numbers. Where it cannot be recorded, a warning says why, and
        it runs kernel by kernel.
        """
        return _Recorded(compute) if self.records else compute

    def update(self, step: int) -> None:
        """The optimizer's step, then the average."""
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = self.config.lr(step) * group["lr_scale"]
        self.accelerator.clip_grad_norm_(self.module.parameters(), 1.0)
        scaler = self.accelerator.scaler  # of the loss, in fp16
        for optimizer in self.optimizers:
            if scaler is None:
                optimizer.step()
            else:  # accelerate's own step would change the scale after each optimizer
                scaler.step(optimizer.optimizer)
        if scaler is not None:
            scaler.update()
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=not self.records)  # a graph adds to these very tensors
        if self.ema is not None:
            self.ema.update(self.module, step)

    def finish(self) -> None:
        """After the last step: take off accelerate's wrapper of mixed precision."""
        self.accelerator.unwrap_model(self.net, keep_fp32_wrapper=False)
        self.module.eval()
        if self.ema is not None:
            self.accelerator.unwrap_model(self.ema.module, keep_fp32_wrapper=False)


def _on_one_gpu(accelerator: Accelerator) -> bool:
    return accelerator.device.type == "cuda" and accelerator.num_processes == 1


class _Recorded:
    """A function whose kernels are recorded in its fourth call and launched as one from then on.

    A training step is some thousand small kernels. To launch them one by one from Python takes
    longer than the GPU needs to run them. In the first three calls kernels are chosen and
    compiled, and gradients and optimizer states get the memory in which they stay.
    """

    def __init__(self, compute: Callable[..., dict[str, Tensor]]):
        self.compute = compute
        self.stream = torch.cuda.Stream()
        self.calls = 0
        self.graph = None

    def __call__(self, *inputs: Tensor) -> dict[str, Tensor]:
        self.calls += 1
        if self.calls <= 3:
            return self._on_another_stream(inputs)
        if self.calls == 4:
            self._record(inputs)
        if self.graph is None:
            return self.compute(*inputs)
        torch._foreach_copy_(self.inputs, list(inputs))
        self.graph.replay()
        return {name: value.clone() for name, value in self.outputs.items()}

    def _on_another_stream(self, inputs: tuple[Tensor, ...]) -> dict[str, Tensor]:
        """`backward` then adds gradients on this stream; a recording must not need the default."""
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            outputs = self.compute(*inputs)
        torch.cuda.current_stream().wait_stream(self.stream)
        return outputs

    def _record(self, inputs: tuple[Tensor, ...]) -> None:
        """Recording runs nothing: the tensors keep their values."""
        self.inputs = [values.clone() for values in inputs]
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                self.outputs = self.compute(*self.inputs)
            self.graph = graph
        except RuntimeError as error:  # such as a copy from the CPU
            reason = str(error).split("\n")[0]
            warnings.warn(f"no CUDA graph, so training is slower: {reason}", stacklevel=2)


def save_state(accelerator: Accelerator, folder: str | os.PathLike, step: int) -> None:
    """Write what a training needs to go on after `step` steps, by `resume_from`."""
    number = pathlib.Path(folder) / "step.json"
    number.unlink(missing_ok=True)  # a killed save is then no state, rather than a mixed one
    accelerator.save_state(str(folder))
    number.write_text(json.dumps(step))


def _begin(
    accelerator: Accelerator | None, config: TrainConfig, data: CaptionedImages
) -> Accelerator:
    """An accelerator with nothing prepared; ValueError for a batch that cannot be shared out."""
    accelerator = accelerator or Accelerator()
    accelerator.free_memory()
    multiple = accelerator.num_processes * config.grad_accum_steps
    if config.batch_size % multiple or config.batch_size > len(data):
        raise ValueError(
            f"batch_size is {config.batch_size}; allowed are multiples of {multiple} "
            f"(processes x grad_accum_steps), up to the {len(data)} images"
        )
    return accelerator


def _steps(
    config: TrainConfig, accelerator: Accelerator, resume_from: str | os.PathLike | None
) -> range:
    """The steps left to do; with resume_from, those after the state that it holds."""
    done = 0
    if resume_from is not None:
        try:
            done = json.loads((pathlib.Path(resume_from) / "step.json").read_text())
            accelerator.load_state(str(resume_from))
        except Exception as error:  # each library raises its own kinds
            raise ValueError(f"{resume_from} holds no state of this training: {error}") from None
    return range(done, config.steps)


def _step_generator(seed: int, training: str, step: int) -> torch.Generator:
    """What it draws depends on these three alone, so a resumed step draws the same."""
    stream = ["clip", "autoencoder", "scale_factor", "denoiser"].index(training)
    (state,) = np.random.SeedSequence([seed, stream, step]).generate_state(1)
    return torch.Generator().manual_seed(int(state))


def _mean_losses(micro_batches: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Over the parts of a batch; with several processes, of this process's share."""
    names = micro_batches[0]
    return {name: torch.stack([m[name].detach() for m in micro_batches]).mean() for name in names}


def train_clip(
    clip: CLIP,
    data: CaptionedImages,
    config: TrainConfig,
    *,
    text_lr_scale: float = 0.1,
    seed: int = 0,
    accelerator: Accelerator | None = None,
    resume_from: str | os.PathLike | None = None,
) -> Iterator[tuple[int, dict[str, Tensor]]]:
    """Bring images and their captions together. Yields (steps done, {"clip": loss}); trains `clip`.

    The loss rewards only what tells the images of one batch apart. Among images chosen at random
    that is which words the caption has, not which word belongs to which (Yuksekgonul et al.
    2022, arXiv 2210.01936), and the U-Net needs both. So a batch is made of `data.pairs()` where
    there are any: images that differ in one thing, such as which of two objects is red. Images
    outside of pairs are not used then. text_lr_scale: learning rate of the text tower, as a share
    of `config.lr`; without pairs, a tenth keeps it from losing what the loss does not reward. Each
    image meets every caption of its batch, so a batch is never computed in parts:
    grad_accum_steps is taken as 1.
    """
    config = dataclasses.replace(config, grad_accum_steps=1)
    accelerator = _begin(accelerator, config, data)
    data = data.to(accelerator.device)
    tokens = _without_padding(clip.tokenizer(data.captions)).to(accelerator.device)
    trainer = Trainer(
        clip, config, accelerator, part=clip.text_encoder, part_lr_scale=text_lr_scale
    )
    pairs = data.pairs()
    if pairs is not None and config.batch_size > pairs.numel():
        raise ValueError(
            f"batch_size is {config.batch_size}; allowed is up to {pairs.numel()}, the images that "
            "lie in pairs"
        )

    @trainer.recorded
    def compute(rows: Tensor) -> dict[str, Tensor]:
        image_features, text_features, scale = trainer.net(data.batch(rows), tokens[rows])
        image_features = _gather_with_gradient(image_features, accelerator)
        text_features = _gather_with_gradient(text_features, accelerator)
        loss = clip_loss(image_features, text_features, scale)
        trainer.backward(loss)
        return {"clip": loss.detach()}

    for step in _steps(config, accelerator, resume_from):
        generator = _step_generator(seed, "clip", step)
        if pairs is None:
            chosen = torch.randperm(len(data), generator=generator)
        else:
            chosen = pairs[torch.randperm(len(pairs), generator=generator)].flatten()
        chosen = chosen[: config.batch_size]
        losses = [compute(rows) for (rows,) in trainer.micro_batches(chosen)]
        trainer.update(step)
        yield step + 1, _mean_losses(losses)
    trainer.finish()


def _without_padding(tokens: Tensor) -> Tensor:
    """Drop the columns that are padding in every caption. `pool` gives the same without them.

    Attention is causal: the first end token sees nothing of what follows it.
    """
    return tokens[:, : _first_end(tokens).max() + 1]


def _gather_with_gradient(features: Tensor, accelerator: Accelerator) -> Tensor:
    """The features of all processes, in the order of the batch. Gradients flow back to each."""
    if accelerator.num_processes == 1:
        return features
    return torch.cat(torch.distributed.nn.functional.all_gather(features))


def train_autoencoder(
    model: LatentDiffusion,
    data: CaptionedImages,
    config: TrainConfig,
    *,
    perceptual: Callable[[Tensor, Tensor], Tensor] | None = None,
    discriminator: nn.Module | None = None,
    seed: int = 0,
    accelerator: Accelerator | None = None,
    resume_from: str | os.PathLike | None = None,
) -> Iterator[tuple[int, dict[str, Tensor]]]:
    """Stage 1: squeeze and restore. Yields (steps done, loss terms); trains `model.autoencoder`.

    perceptual: by default on the features of the model's own image encoder; another's weights must
    lie on the accelerator's device. discriminator: by default a `PatchDiscriminator` (seed torch
    for its first weights). It is trained from step `model.config.discriminator_start` on; the
    adversarial loss begins `discriminator_head_start` steps later. The weights of all terms are the
    config's, too. Over several processes each takes the adaptive weight of its own share, as
    CompVis does. Call `measure_scale_factor` afterwards.
    """
    accelerator = _begin(accelerator, config, data)
    data = data.to(accelerator.device)
    model.to(accelerator.device)
    if perceptual is None and model.image_encoder is None:
        raise ValueError("perceptual is None, and the model has no image encoder to take for it")
    if perceptual is None:
        perceptual = PerceptualLoss(model.image_encoder.eval().requires_grad_(False).features)
    discriminator = discriminator or PatchDiscriminator(32, model.config.discriminator_layers)
    trainer = Trainer(model.autoencoder, config, accelerator)
    discriminator_trainer = _discriminator_trainer(discriminator, model, config, accelerator)
    last_layer = model.autoencoder.last_layer
    weights = model.config.autoencoder_weights()
    side = model.config.image_size // model.autoencoder.f
    latent_shape = (model.autoencoder.latent_channels, side, side)
    discriminator_start = model.config.discriminator_start
    adversarial_start = discriminator_start + model.config.discriminator_head_start

    def restore(adversary: nn.Module | None, rows: Tensor, eps: Tensor) -> dict[str, Tensor]:
        x = data.batch(rows)
        x_hat, posterior = trainer.net(x, eps)
        with accelerator.autocast():
            loss, terms = autoencoder_loss(
                x, x_hat, posterior, perceptual, adversary, last_layer, **weights
            )
        trainer.backward(loss)
        return terms | {"pair": torch.cat([x, x_hat.detach()])}

    @discriminator_trainer.recorded
    def tell_apart(pair: Tensor) -> dict[str, Tensor]:
        real, restored = discriminator_trainer.net(pair).chunk(2)
        loss = discriminator_loss(real, restored)
        discriminator_trainer.backward(loss)
        return {"discriminator": loss.detach()}

    restore_plainly = trainer.recorded(functools.partial(restore, None))
    restore_adversarially = trainer.recorded(functools.partial(restore, discriminator))
    for step in _steps(config, accelerator, resume_from):
        compute = restore_adversarially if step >= adversarial_start else restore_plainly
        generator = _step_generator(seed, "autoencoder", step)
        chosen = torch.randperm(len(data), generator=generator)[: config.batch_size]
        noise = torch.randn(config.batch_size, *latent_shape, generator=generator)
        # Frozen: the autoencoder's step must leave nothing in the discriminator's gradients.
        discriminator.requires_grad_(False)
        losses = [compute(rows, eps) for rows, eps in trainer.micro_batches(chosen, noise)]
        trainer.update(step)
        pairs = [terms.pop("pair") for terms in losses]
        if step >= discriminator_start:
            discriminator.requires_grad_(True)
            for terms, pair in zip(losses, pairs, strict=True):
                with accelerator.accumulate(discriminator_trainer.net):
                    terms |= tell_apart(pair)
            discriminator_trainer.update(step)
        yield step + 1, _mean_losses(losses)
    trainer.finish()
    discriminator_trainer.finish()


def _discriminator_trainer(
    discriminator: nn.Module, model: LatentDiffusion, config: TrainConfig, accelerator: Accelerator
) -> Trainer:
    """The discriminator learns at a constant rate of its own. What tells a good restoration from
    its original shows only in small gradients, which Muon follows sooner than AdamW.
    """
    recipe = dataclasses.replace(
        config,
        learning_rate=model.config.discriminator_learning_rate,
        warmup_steps=0,
        final_lr=1.0,
        muon=model.config.discriminator_muon,
    )
    return Trainer(discriminator, recipe, accelerator)


@torch.no_grad()
def embed_all(
    model: LatentDiffusion, captions: list[str], batch_size: int = 256
) -> tuple[Tensor, Tensor]:
    """The context of every caption, (N, 77, d) in half precision, and of the empty one, (1, 77, d).

    The text encoder is frozen, so each caption needs it only once.
    """
    contexts = []
    for i in range(0, len(captions), batch_size):
        contexts.append(model.embed(captions[i : i + batch_size]).half())
    return torch.cat(contexts), model.embed([""])


def train_denoiser(
    model: LatentDiffusion,
    data: CaptionedImages,
    config: TrainConfig,
    *,
    caption_dropout: float = 0.1,
    ema: EMA | None = None,
    seed: int = 0,
    accelerator: Accelerator | None = None,
    resume_from: str | os.PathLike | None = None,
) -> Iterator[tuple[int, dict[str, Tensor]]]:
    """Stage 2: E ||eps - eps_theta(z_t, t, y)||^2 over latents that are encoded once.

    Yields (steps done, {"mse": loss}); trains `model.unet`, which at the end holds the average of
    its weights. ema: your own `EMA(model.unet)`, to look at the average in between.
    caption_dropout: the share of captions replaced by the empty one, which teaches the
    unconditional prediction that guidance needs. The loss is weighted by `snr_weight` where
    `model.config.snr_clip` is set; "mse" is without that weight.
    """
    accelerator = _begin(accelerator, config, data)
    device = accelerator.device
    scale_factor = model.scale_factor  # raises now rather than after encoding all images
    moments = encode_all(model.to(device).eval(), data)  # (N, 2c, h, w)
    contexts, empty = embed_all(model, data.captions)  # (N, 77, d), (1, 77, d)
    weights = snr_weight(model.schedule, model.config.snr_clip).float().to(device)  # (T,)
    latent_shape = (config.batch_size, model.autoencoder.latent_channels, *moments.shape[2:])
    ema = ema or EMA(model.unet)
    trainer = Trainer(model.unet, config, accelerator, ema=ema)

    @trainer.recorded
    def compute(rows: Tensor, t: Tensor, drop: Tensor, eps_posterior: Tensor, eps: Tensor) -> dict:
        z = scale_factor * Gaussian(moments[rows]).sample(eps_posterior)
        context = torch.where(drop[:, None, None], empty, contexts[rows].float())
        loss = denoising_loss(trainer.net, model.schedule, z, t, context, eps)  # (B,)
        trainer.backward((weights[t] * loss).mean())
        return {"mse": loss.mean().detach()}

    for step in _steps(config, accelerator, resume_from):
        generator = _step_generator(seed, "denoiser", step)
        chosen = torch.randperm(len(data), generator=generator)[: config.batch_size]
        times = torch.randint(model.schedule.T, (config.batch_size,), generator=generator)
        dropped = torch.rand(config.batch_size, generator=generator) < caption_dropout
        noises = torch.randn(2, *latent_shape, generator=generator)  # of the posterior, of z_t
        parts = trainer.micro_batches(chosen, times, dropped, *noises)
        losses = [compute(*part) for part in parts]
        trainer.update(step)
        yield step + 1, _mean_losses(losses)
    trainer.finish()
    model.unet.load_state_dict(ema.module.state_dict())


def compile_blocks(module: nn.Module) -> None:
    """torch.compile each repeated block, in place: a few shapes compile quickly."""
    torch._dynamo.config.recompile_limit = 64  # shapes of one class of blocks; the default is 8
    torch._functorch.config.donated_buffer = False  # `adaptive_weight` uses a graph before backward
    for part in module.modules():
        if isinstance(part, (ResBlock, AttentionBlock, TextBlock, TransformerBlock)):
            part.compile(dynamic=False)
