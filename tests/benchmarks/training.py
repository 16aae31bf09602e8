"""How fast the three trainings are: pictures a second, and the share of the machine's matrix rate, eager and compiled.

    python tests/benchmarks/training.py                                # size shapes, on the CPU
    python tests/benchmarks/training.py --size emoji --device cuda     # bf16; compiled too, by CUDA's inductor

The stages run by the library's own generators, on random pictures; the denoiser's step beside the same step with diffusers' U-Net, in the
faster of its memory layouts, takes turns with ours (eager against eager, compiled against compiled). FLOPs are counted over one real step,
forward and backward, with attention in its plain form; the matrix rate is that of a large product in the same precision, measured first.
"""

import argparse
import dataclasses
import pathlib
import sys
import time

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch.utils.flop_counter import FlopCounterMode

TESTS = pathlib.Path(__file__).parents[1]
sys.path[:0] = [str(TESTS), str(TESTS.parent)]

import reference  # noqa: E402
from unet import LAYOUTS, interleaved, report  # noqa: E402

from ldm_minimal import (CLIP, NAMED_SIZES, Attention, CaptionedImages, LatentDiffusion, Tokenizer, UNet, train_autoencoder,  # noqa: E402
                         train_clip, train_denoiser)


class Noise(CaptionedImages):
    """Random pictures with captions: what they show does not change how long a step takes."""

    def __init__(self, count, size, device):
        self.captions = [f"a picture of number {i}" for i in range(count)]
        self.images = torch.randint(256, (count, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)).to(device)


def finished(device):
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def ways(options):
    return ("eager", "compiled") if options.device == "cuda" or options.compiled else ("eager",)


def matrix_rate(device, dtype):
    """FLOP a second of a large matrix product, the best of 10."""
    n = 8192 if device == "cuda" else 1024
    a, b = torch.randn(2, n, n, device=device, dtype=dtype)
    times = []
    for _ in range(13):
        start = finished(device)
        a @ b
        times.append(finished(device) - start)
    return 2 * n**3 / min(times[3:])


def stages(config, data, accelerator):
    """Each stage's generator, made anew: {name: (function that starts it, its recipe)}."""
    model = LatentDiffusion(dataclasses.replace(config, scale_factor=1.0, adversarial_start=0)).to(accelerator.device)  # with the opponent, from the first
    model.tokenizer = Tokenizer.train(data.captions, config.text.vocab_size)
    clip = CLIP(model.tokenizer, model.text_encoder, model.image_encoder)
    return model, {"clip": (lambda stage: train_clip(clip, data, stage, accelerator=accelerator), config.clip_stage),
                   "autoencoder": (lambda stage: train_autoencoder(model, data, stage, accelerator=accelerator), config.autoencoder_stage),
                   "denoiser": (lambda stage: train_denoiser(model, data, stage, accelerator=accelerator), config.denoiser_stage)}


def compare_stages(config, options, rate):
    precision = {"cuda": "bf16", "cpu": "no"}[options.device]
    count = max(stage.batch for stage in (config.clip_stage, config.autoencoder_stage, config.denoiser_stage))
    data, flops = Noise(count, config.image_size, options.device), {}
    for how in ways(options):
        AcceleratorState._reset_state(True)  # else the second Accelerator is the first once more
        accelerator = Accelerator(cpu=options.device == "cpu", mixed_precision=precision, dynamo_backend="inductor" if how == "compiled" else None)
        model, started = stages(config, data, accelerator)
        for name, (start, stage) in started.items():
            training = start(dataclasses.replace(stage, steps=options.steps + 5))
            next(training)  # the denoiser's first comes with the encoding of all pictures
            plain = [module for module in model.modules() if isinstance(module, Attention)]
            for module in plain:
                module.keep_weights = how == "eager"
            with FlopCounterMode(display=False) as counter:
                next(training)
            if how == "eager":  # a compiled step hides them
                flops[name] = counter.get_total_flops()
            for module in plain:
                module.keep_weights, module.weights = False, None
            for _ in range(3):
                next(training)
            begun = finished(options.device)
            for _ in range(options.steps):
                next(training)
            seconds = (finished(options.device) - begun) / options.steps
            print(f"{how:9}{name:12} batch {stage.batch:4}: {stage.batch / seconds:9.1f} pictures a second, {flops[name] / 1e9 / stage.batch:7.3f} GFLOP a picture, "
                  f"{flops[name] / seconds / rate:.0%} of the measured matrix rate", flush=True)
    return {name: value / getattr(config, f"{name}_stage").batch for name, value in flops.items()}


def compare_denoisers(config, options):
    """Our U-Net's training step and diffusers', forward, backward and fused AdamW, taking turns."""
    side, random = config.image_size // 2 ** (len(config.autoencoder.mult) - 1), torch.Generator().manual_seed(0)
    batch, device = config.denoiser_stage.batch, options.device
    z, eps = torch.randn(2, batch, config.autoencoder.channels, side, side, generator=random).to(device)
    t, context = torch.randint(1000, (batch,), generator=random).to(device), torch.randn(batch, 77, config.text.width, generator=random).to(device)
    ours = reference.randomise(UNet(config.unet), random)
    nets = {"ours": (ours, torch.channels_last)} | {name: (reference.put(ours, reference.unet(config.unet)), layout) for name, layout in LAYOUTS.items()}

    def step(net, layout, how):
        net = net.to(device).to(memory_format=layout).train()
        forward = torch.compile(net) if how == "compiled" else net
        optimizer = torch.optim.AdamW(net.parameters(), 1e-5, fused=True)

        def run():
            with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
                eps_hat = forward(z.contiguous(memory_format=layout), t, context)
            torch.nn.functional.mse_loss(getattr(eps_hat, "sample", eps_hat).float(), eps).backward()
            optimizer.step()
            optimizer.zero_grad()
            finished(device)
        return run
    for how in ways(options):
        report(f"{how}: U-Net training step, batch {batch}", *interleaved({name: step(net, layout, how) for name, (net, layout) in nets.items()}, options.repeats))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=["shapes", "emoji"], default="shapes")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--compiled", action="store_true", help="on the CPU, too; minutes more, and a C++ compiler is needed")
    parser.add_argument("--batch", type=int, help="of every stage, for a rehearsal (default: each its own)")
    parser.add_argument("--steps", type=int, default=10, help="timed, of each stage")
    parser.add_argument("--repeats", type=int, default=15)
    options = parser.parse_args()
    config, dtype = NAMED_SIZES[options.size], torch.bfloat16 if options.device == "cuda" else torch.float32
    for stage in ("clip_stage", "autoencoder_stage", "denoiser_stage") if options.batch else ():
        config = dataclasses.replace(config, **{stage: dataclasses.replace(getattr(config, stage), batch=options.batch)})
    rate = matrix_rate(options.device, dtype)
    name = torch.cuda.get_device_name() if options.device == "cuda" else f"{torch.get_num_threads()} thread(s) of a CPU"
    print(f"torch {torch.__version__}, {name}, size {config.name}, matrix rate {rate / 1e12:.3g} TFLOP/s in {str(dtype).split('.')[1]}")
    whole = NAMED_SIZES[options.size]
    flops = compare_stages(config, options, rate)
    stages_of = {"clip": (whole.clip_stage, 2), "autoencoder": (whole.autoencoder_stage, 1), "denoiser": (whole.denoiser_stage, 1)}  # CLIP and its judge
    work = {name: times * stage.steps * stage.batch * flops[name] for name, (stage, times) in stages_of.items()}
    print("the whole recipe:", ", ".join(f"{name} {value / 1e15:.2f}" for name, value in work.items()), f"= {sum(work.values()) / 1e15:.2f} PFLOP", flush=True)
    compare_denoisers(config, options)


if __name__ == "__main__":
    main()
