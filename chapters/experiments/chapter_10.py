"""Chapter 10: seconds at full size, and right weights in networks with one thing wrong."""

import collections
import statistics
import time
from dataclasses import replace
from functools import partial
from unittest import mock

import torch
import torch.nn.functional as F
from torch import nn

import common
from book import load_data, load_model
from ldm_minimal import (
    SD1,
    Attention,
    Downsample,
    LatentDiffusion,
    NoiseSchedule,
    TextBlock,
    TransformerBlock,
)
from ldm_minimal.metrics import prompt_accuracy

# ---- seconds -----------------------------------------------------------------------------------

KINDS = ["convolution", "self-attention", "feed-forward", "cross-attention", "other"]


def kind(name, layer):
    """Which of KINDS a layer's work is. None for what only holds layers, or is in an attention."""
    if isinstance(layer, Attention):
        return "self-attention" if name.endswith("self_attn") else "cross-attention"
    if "_attn." in name or not isinstance(layer, (nn.Conv2d, nn.Linear)):
        return None
    if isinstance(layer, nn.Conv2d):
        return "convolution"
    return "feed-forward" if "mlp_" in name else "other"


@torch.no_grad()
def full_size():
    """Stable Diffusion 1 with random weights: matrices of variance 1 / inputs.

    All are cut from one line of noise, which is quick.
    """
    with torch.device("meta"):
        model = LatentDiffusion(SD1)
    model.to_empty(device="cpu")
    longest = max(p.numel() for p in model.parameters())
    noise = torch.randn(longest, generator=torch.Generator().manual_seed(0))
    for name, p in model.named_parameters():
        if p.ndim > 1:
            in_memory = p.permute(0, 2, 3, 1) if p.ndim == 4 else p
            values = noise[: p.numel()].view(in_memory.shape)
            torch.mul(values, p[0].numel() ** -0.5, out=in_memory)
        else:
            p.fill_(1.0 if name.endswith("weight") else 0.0)  # norms; biases
    return model.eval()


def clock_layers(unet):
    """{kind of layer: the processor's seconds}, which every call of the U-Net adds to."""
    started = {}
    spent = collections.defaultdict(float)

    def start(layer, inputs):
        started[layer] = time.process_time()

    def stop(layer, inputs, output, name):
        spent[name] += time.process_time() - started[layer]

    for name, layer in unet.named_modules():
        if kind(name, layer):
            layer.register_forward_pre_hook(start)
            layer.register_forward_hook(partial(stop, name=kind(name, layer)))
    return spent


@common.experiment("10/time", side=64)
@torch.no_grad()
def seconds_at_full_size(side):
    """On one thread: medians of the processor's seconds, by part and by kind of layer."""
    torch.set_num_threads(1)
    model = full_size()
    spent = clock_layers(model.unet)
    z, t, tokens = torch.randn(1, 4, side, side), torch.tensor([500]), torch.randint(49408, (1, 77))
    context = model.text_encoder(tokens)
    parts = {
        "text tower": lambda: model.text_encoder(tokens),
        "U-Net": lambda: model.unet(z, t, context),
        "decoder": lambda: model.autoencoder.decode(z),
    }
    rounds = {part: [] for part in parts}
    kinds = collections.defaultdict(list)
    for _ in range(5):  # in turns, so that a busy minute of the machine meets all parts
        spent.clear()
        for part, call in parts.items():
            before = time.process_time()
            call()
            rounds[part].append(round(time.process_time() - before, 3))
        for name, seconds in spent.items():
            kinds[name].append(round(seconds, 3))
    numbers = {
        "rounds": rounds,
        "seconds": {part: statistics.median(values) for part, values in rounds.items()},
        "kinds": {name: statistics.median(values) for name, values in kinds.items()},
    }
    return numbers, None


# ---- traps -------------------------------------------------------------------------------------


class TanhBlock(TransformerBlock):
    """With the usual approximation of GELU."""

    def forward(self, x, kv):
        with mock.patch.object(F, "gelu", partial(F.gelu, approximate="tanh")):
            return super().forward(x, kv)


class GELUBlock(TextBlock):
    """With GELU itself, where CLIP has x * sigmoid(1.702 x)."""

    def forward(self, x):
        x = x + self.attn(self.norm1(x))
        return x + self.mlp_out(F.gelu(self.mlp_in(self.norm2(x))))


TRAPS = [
    "nothing wrong",
    "U-Net: norms' eps 1e-6 for 1e-5",
    "VAE: norms' eps 1e-5 for 1e-6",
    "U-Net: GELU by tanh",
    "VAE: 4 heads for 1",
    "VAE: encoder pads all round",
    "text: GELU for quick-GELU",
    "text: padded with 0",
    "text: without the last norm",
    "sampler: leading for trailing",
    "schedule: linear for scaled-linear",
    "U-Net: sine before cosine",
    "U-Net: 16 heads for 4",
    "VAE: latents not unscaled",
    "U-Net: GEGLU's halves swapped",
]


def set_trap(model, trap):
    """Change one thing in the model's networks, so that all weights still fit."""

    def layers(part, kind):
        return [layer for layer in part.modules() if isinstance(layer, kind)]

    def pad_with_0(text_encoder, inputs):
        (tokens,) = inputs
        after_first_end = (tokens == tokens[:, -1:]).cumsum(dim=1) > 1
        return tokens.masked_fill(after_first_end, 0)

    match trap:
        case "nothing wrong":
            pass
        case "U-Net: norms' eps 1e-6 for 1e-5":
            for norm in layers(model.unet, nn.GroupNorm):
                norm.eps = 1e-6
        case "VAE: norms' eps 1e-5 for 1e-6":
            for norm in layers(model.autoencoder, nn.GroupNorm):
                norm.eps = 1e-5
        case "U-Net: GELU by tanh":
            for block in layers(model.unet, TransformerBlock):
                block.__class__ = TanhBlock
        case "VAE: 4 heads for 1":
            for attention in layers(model.autoencoder, Attention):
                attention.num_heads = 4
        case "VAE: encoder pads all round":
            for layer in layers(model.autoencoder.encoder, Downsample):
                layer.asymmetric = False
                layer.conv.padding = (1, 1)
        case "text: GELU for quick-GELU":
            for block in layers(model.text_encoder, TextBlock):
                block.__class__ = GELUBlock
        case "text: padded with 0":
            model.text_encoder.register_forward_pre_hook(pad_with_0)
        case "text: without the last norm":
            model.text_encoder.final_norm = nn.Identity()
        case "sampler: leading for trailing":
            model.config = replace(model.config, spacing="leading")
        case "schedule: linear for scaled-linear":
            model.schedule = NoiseSchedule("linear")
        case "U-Net: sine before cosine":
            weight = model.unet.time_mlp[0].weight
            weight.data = weight.data.roll(model.unet.width // 2, dims=1)
        case "U-Net: 16 heads for 4":
            for attention in layers(model.unet, Attention):
                attention.num_heads = 16
        case "VAE: latents not unscaled":
            model.config = replace(model.config, scale_factor=1.0)
        case "U-Net: GEGLU's halves swapped":
            for block in layers(model.unet, TransformerBlock):
                block.mlp_value, block.mlp_gate = block.mlp_gate, block.mlp_value
        case _:
            raise ValueError(f"trap is {trap!r}; allowed are {TRAPS}")


def noise(captions):
    return torch.randn(captions, 4, 8, 8, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def model_and_prediction(trap, captions):
    """The model with one thing wrong, and its U-Net's prediction at t = 500."""
    model = load_model()
    set_trap(model, trap)
    t = torch.full((len(captions),), 500)
    return model, model.unet(noise(len(captions)), t, model.embed(captions))


def change(wrong, right):
    """The root mean square of the difference, in standard deviations of what is right."""
    return float(f"{(wrong - right).square().mean().sqrt() / right.std():.3g}")


@common.experiment("10/traps", captions=64, guidance=5.0)
@torch.no_grad()
def traps(captions, guidance):
    """How far images and one prediction change, how many images are right; four images each."""
    test = load_data("test")
    prompts, rows = test.captions[:captions], test.rows[:captions]
    real = test.batch(slice(0, captions))
    some = slice(3, 7)
    found, tiles, right = {}, [], {}
    for trap in TRAPS:
        model, prediction = model_and_prediction(trap, prompts)
        steps = model.denoise(prompts, steps=20, guidance=guidance, z=noise(captions))
        *_, (_, z, _) = steps
        images = {"drawn": model.decode(z), "redrawn": model.decode(model.encode(real))}
        right = right or {**images, "guess": prediction}  # the first trap is none
        way = "redrawn" if "encoder" in trap else "drawn"  # drawing does not use the encoder
        each = (images[way] - right[way]).square().mean(dim=(1, 2, 3)).sqrt() / right[way].std()
        found[trap] = {
            "way": way,
            "guess": change(prediction, right["guess"]),
            "error": change(images[way], right[way]),
            "median": float(f"{each.median():.3g}"),
            "others": int((each > 0.1).sum()),
            "right": round(prompt_accuracy(images[way], rows)["all"], 4),
        }
        tiles.append(images[way][some])
        print(trap, found[trap])
    redrawn_right = round(prompt_accuracy(right["redrawn"], rows)["all"], 4)
    numbers = {"prompts": prompts[some], "redrawn_right": redrawn_right, "traps": found}
    return numbers, torch.cat(tiles)


@common.beginning("10/traps")
def predictions_changed(record):
    prompts = load_data("test").captions[: record["captions"]]
    _, right = model_and_prediction("nothing wrong", prompts)
    now, before = [], []
    for trap in (TRAPS[6], TRAPS[12], TRAPS[14]):
        _, wrong = model_and_prediction(trap, prompts)
        now.append(change(wrong, right))
        before.append(record["traps"][trap]["guess"])
    return now, before


if __name__ == "__main__":
    common.main("10")
