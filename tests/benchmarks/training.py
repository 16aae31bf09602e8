"""How fast the trainings are: images a second, share of the matrix rate, operators dispatched.

    python tests/benchmarks/training.py                              # size shapes, on the CPU
    python tests/benchmarks/training.py --size emoji --device cuda   # bf16, three ways

The stages run by the library's own generators, on random images. The denoiser's step takes turns
with the same step of diffusers' U-Net, eager against eager and compiled against compiled. FLOPs
are counted over one real step, forward and backward, with attention in its plain form. The matrix
rate is that of a large product in the same precision. Operators are what PyTorch dispatches in a
step, each a kernel or more on a GPU. On a GPU a step is launched in three ways: kernel by kernel,
as a CUDA graph, and as a CUDA graph of compiled blocks.
"""

import argparse
import dataclasses
import pathlib
import sys

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

sys.path.append(str(pathlib.Path(__file__).parents[1] / "parity"))  # a script, not a test

from common import LAYOUTS, interleaved, machine, matrix_rate, now, report
from ldm_minimal import (
    CLIP,
    NAMED_SIZES,
    Attention,
    CaptionedImages,
    LatentDiffusion,
    Tokenizer,
    Trainer,
    UNet,
    compile_blocks,
    train_autoencoder,
    train_clip,
    train_denoiser,
)

TRAININGS = ("clip", "autoencoder", "denoiser")
WAYS = ("eager", "graph", "compiled graph")


class DispatchCounter(TorchDispatchMode):
    """Counts the operators that reach a device; views cost it nothing and do not count."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if not function.is_view:
            self.count += 1
        return function(*args, **(kwargs or {}))


def random_images(count, size, device):
    """What images show does not change how long a step takes."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (count, 3, size, size), dtype=torch.uint8, generator=generator)
    captions = [f"an image of number {i}" for i in range(count)]
    return CaptionedImages(images.to(device), captions)


def recipe_of(config, training):
    return {
        "clip": config.clip_training,
        "autoencoder": config.autoencoder_training,
        "denoiser": config.denoiser_training,
    }[training]


def start(training, model, data, recipe, accelerator):
    """The library's generator of one training."""
    options = {"accelerator": accelerator}
    if training == "clip":
        clip = CLIP(model.tokenizer, model.text_encoder, model.image_encoder)
        return train_clip(clip, data, recipe, **options)
    if training == "autoencoder":
        return train_autoencoder(model, data, recipe, **options)
    return train_denoiser(model, data, recipe, **options)


def flops_of_a_step(model, steps):
    """Of the next step, forward and backward; the counter does not see inside fused attention."""
    attentions = [module for module in model.modules() if isinstance(module, Attention)]
    for attention in attentions:
        attention.keep_weights = True
    with FlopCounterMode(display=False) as counter:
        next(steps)
    for attention in attentions:
        attention.keep_weights = False
        attention.weights = None
    return counter.get_total_flops()


def time_stages(config, options, rate):
    """Print a line for each training, eager and compiled; return the FLOPs of one image in each."""
    precision = "bf16" if options.device == "cuda" else "no"
    count = max(recipe_of(config, training).batch_size for training in TRAININGS)
    data = random_images(count, config.image_size, options.device)
    flops = {}
    for way in options.ways or ways(options, graphs=True):
        Trainer.records = way != "eager"
        AcceleratorState._reset_state(True)  # else the second Accelerator is the first once more
        accelerator = Accelerator(cpu=options.device == "cpu", mixed_precision=precision)
        # With the discriminator from the first step on.
        model = LatentDiffusion(
            dataclasses.replace(
                config, scale_factor=1.0, discriminator_start=0, discriminator_head_start=0
            )
        )
        model.to(accelerator.device)
        model.tokenizer = Tokenizer.train(data.captions, config.text.vocab_size)
        if way.startswith("compiled"):
            compile_blocks(model)
        for training in options.only or TRAININGS:
            recipe = recipe_of(config, training)
            steps = start(
                training,
                model,
                data,
                dataclasses.replace(recipe, steps=options.steps + 6),
                accelerator,
            )
            begun = now(options.device)
            next(steps)  # the denoiser's first comes with the encoding of all images
            first = now(options.device) - begun
            if way == "eager":
                flops[training] = flops_of_a_step(model, steps) / recipe.batch_size
            dispatched = DispatchCounter()
            if way == "eager":  # under the counter, dynamo would give up compiling for good
                with dispatched:
                    next(steps)
            for _ in range(3):
                next(steps)
            begun = now(options.device)
            for _ in range(options.steps):
                next(steps)
            seconds = (now(options.device) - begun) / options.steps
            share = flops[training] * recipe.batch_size / seconds / rate if training in flops else 0
            print(
                f"{way:16}{training:12} batch {recipe.batch_size:4}: "
                f"{1000 * seconds:8.1f} ms a step, "
                f"{recipe.batch_size / seconds:9.1f} images a second, {share:.0%} of the rate, "
                f"{dispatched.count} operators, first step {first:.1f} s",
                flush=True,
            )
            del steps
    return flops


def compare_denoisers(config, options):
    """Our U-Net's training step and diffusers', forward, backward and fused AdamW, in turns."""
    import reference  # here: a borrowed GPU machine may lack diffusers

    device = options.device
    batch = config.denoiser_training.batch_size
    side = config.image_size // 2 ** (len(config.autoencoder.channel_mult) - 1)
    generator = torch.Generator().manual_seed(0)
    shape = (2, batch, config.autoencoder.latent_channels, side, side)
    z, eps = torch.randn(shape, generator=generator).to(device)
    t = torch.randint(1000, (batch,), generator=generator).to(device)
    context = torch.randn(batch, 77, config.text.width, generator=generator).to(device)
    ours = reference.randomise(UNet(config.unet), generator)

    def training_step(net, layout, way):
        net.to(device).to(memory_format=layout).train()
        forward = net
        if way == "compiled" and net is ours:
            compile_blocks(net)
        elif way == "compiled":
            forward = torch.compile(net, dynamic=False)
        optimizer = torch.optim.AdamW(net.parameters(), 1e-5, fused=True)

        def step():
            with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
                eps_hat = forward(z.contiguous(memory_format=layout), t, context)
            eps_hat = getattr(eps_hat, "sample", eps_hat)
            F.mse_loss(eps_hat.float(), eps).backward()
            optimizer.step()
            optimizer.zero_grad()

        return step

    for way in ways(options):
        steps = {"ours": training_step(ours, torch.channels_last, way)}
        for name, layout in LAYOUTS.items():
            theirs = reference.put(ours.to("cpu"), reference.unet(config.unet))
            steps[name] = training_step(theirs, layout, way)
        ours.to(device)
        title = f"{way}: U-Net training step, batch {batch}"
        report(title, *interleaved(steps, options.repeats, device))


def ways(options, graphs=False):
    if options.device == "cuda" and graphs:
        return WAYS
    if options.device == "cuda" or options.compiled:
        return ("eager", "compiled")
    return ("eager",)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", choices=["shapes", "emoji"], default="shapes")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument(
        "--compiled", action="store_true", help="on the CPU, too (it needs a C++ compiler)"
    )
    parser.add_argument("--batch", type=int, help="of every stage, for a rehearsal")
    parser.add_argument("--steps", type=int, default=10, help="timed, of each stage")
    parser.add_argument("--only", nargs="+", choices=TRAININGS, help="these stages")
    parser.add_argument("--ways", nargs="+", choices=WAYS, help="only these")
    parser.add_argument("--no-diffusers", action="store_true", help="without the comparison")
    parser.add_argument("--repeats", type=int, default=15)
    options = parser.parse_args()
    config = NAMED_SIZES[options.size]
    if options.batch:
        small = {}
        for training in TRAININGS:
            recipe = recipe_of(config, training)
            small[f"{training}_training"] = dataclasses.replace(recipe, batch_size=options.batch)
        config = dataclasses.replace(config, **small)
    dtype = torch.bfloat16 if options.device == "cuda" else torch.float32
    rate = matrix_rate(options.device, dtype)
    print(
        f"torch {torch.__version__}, {machine(options.device)}, size {config.name}, "
        f"matrix rate {rate / 1e12:.3g} TFLOP/s in {str(dtype).removeprefix('torch.')}",
        flush=True,
    )
    flops = time_stages(config, options, rate)
    total = 0
    for training, flops_of_an_image in flops.items():
        recipe = recipe_of(NAMED_SIZES[options.size], training)
        times = 2 if training == "clip" else 1  # CLIP and the evaluator
        work = times * recipe.steps * recipe.batch_size * flops_of_an_image
        total += work
        print(f"the whole recipe: {training} {work / 1e15:.2f} PFLOP")
    print(f"the whole recipe: {total / 1e15:.2f} PFLOP", flush=True)
    if not options.no_diffusers:
        compare_denoisers(config, options)


if __name__ == "__main__":
    main()
