"""Our U-Net and sampler beside `diffusers`, at size SHAPES, with the same weights.

    python tests/benchmarks/unet.py [--threads N] [--repeats N]

Prints ours / theirs, from one run in which both take turns, for (a) the U-Net, forward and a
whole training step of 64 latents, (b) images a second, 16 prompts in fifty guided DDIM steps, (c)
peak memory. Theirs is taken in the faster of its two memory layouts.
"""

import argparse
import dataclasses
import pathlib
import resource
import subprocess
import sys

import diffusers
import torch
import torch.nn.functional as F

sys.path.append(str(pathlib.Path(__file__).parents[1] / "parity"))  # a script, not a test

import reference
from common import LAYOUTS, interleaved, report
from ldm_minimal import SHAPES, LatentDiffusion, Tokenizer, UNet

PROMPTS = ["a red circle"] * 16
BATCH = 64
STEPS = 50
GUIDANCE = 4.0
TOKENIZER = Tokenizer.train(["a red circle"], 520)


def random_batch(config):
    """z_t, t, context and eps of BATCH images."""
    generator = torch.Generator().manual_seed(0)
    z_t, eps = torch.randn(2, BATCH, config.latent_channels, 8, 8, generator=generator)
    t = torch.randint(1000, (BATCH,), generator=generator)
    context = torch.randn(BATCH, 77, config.context_width, generator=generator)
    return z_t, t, context, eps


def their_forward(net, layout):
    """diffusers' U-Net in a memory layout, called as ours is."""
    net.to(memory_format=layout)

    def predict(z_t, t, context):
        return net(z_t.contiguous(memory_format=layout), t, context).sample

    return predict


def training_step(net, predict, batch):
    """A function that makes one training step: forward, backward, AdamW."""
    z_t, t, context, eps = batch
    optimizer = torch.optim.AdamW(net.train().parameters(), 1e-5, fused=True)

    def step():
        F.mse_loss(predict(z_t, t, context), eps).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def compare_unets(repeats):
    generator = torch.Generator().manual_seed(0)
    ours = reference.randomise(UNet(SHAPES.unet), generator)
    nets = {"ours": ours}
    predictors = {"ours": ours}
    for name, layout in LAYOUTS.items():
        nets[name] = reference.put(ours, reference.unet(SHAPES.unet))
        predictors[name] = their_forward(nets[name], layout)
    batch = random_batch(SHAPES.unet)

    def forward_only(predict):
        with torch.no_grad():
            return predict(*batch[:3])

    expected = forward_only(ours)
    calls = {}
    for name, predict in predictors.items():
        error = (forward_only(predict) - expected).abs().max().item()
        assert error < 5e-5 * expected.abs().max().item(), f"{name} differs by {error}"
        calls[name] = lambda predict=predict: forward_only(predict)
    report(f"(a) U-Net, forward, batch {BATCH}", *interleaved(calls, repeats))
    steps = {name: training_step(nets[name], predictors[name], batch) for name in nets}
    report("(a) U-Net, forward + backward + AdamW", *interleaved(steps, repeats))


def our_pipeline():
    """A model of size SHAPES with random weights, and a function that draws PROMPTS."""
    model = LatentDiffusion(dataclasses.replace(SHAPES, scale_factor=1.0))
    reference.randomise(model, torch.Generator().manual_seed(0)).eval()
    model.tokenizer = TOKENIZER

    def draw():
        generator = torch.Generator().manual_seed(1)
        return model.generate(PROMPTS, steps=STEPS, guidance=GUIDANCE, generator=generator)

    return model, draw


def their_pipeline(layout, model=None):
    """What people write with diffusers: text, fifty times U-Net and scheduler, then the VAE.

    With the weights of `model`, or random ones. Returns the U-Net, its forward, and the function.
    """
    unet = reference.unet(SHAPES.unet)
    vae = reference.autoencoder(SHAPES.autoencoder)
    text = reference.text_encoder(SHAPES.text, TOKENIZER.end)
    if model is not None:
        reference.put(model.unet, unet)
        reference.put(model.autoencoder, vae)
        reference.put(model.text_encoder, text)
    predict = their_forward(unet, layout)
    vae.to(memory_format=layout)
    scheduler = diffusers.DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        timestep_spacing="trailing",
        set_alpha_to_one=True,
    )

    @torch.no_grad()
    def draw():
        context = text(TOKENIZER([""] * len(PROMPTS) + PROMPTS)).last_hidden_state
        z = torch.randn(len(PROMPTS), 4, 8, 8, generator=torch.Generator().manual_seed(1))
        scheduler.set_timesteps(STEPS)
        for t in scheduler.timesteps:
            eps_empty, eps_text = predict(torch.cat([z, z]), t, context).chunk(2)
            eps = eps_empty + GUIDANCE * (eps_text - eps_empty)
            z = scheduler.step(eps, t, z).prev_sample
        return vae.decode(z.contiguous(memory_format=layout)).sample.clamp(-1, 1)

    return unet, predict, draw


def compare_pipelines(repeats):
    model, draw = our_pipeline()
    calls = {"ours": draw}
    for name, layout in LAYOUTS.items():
        *_, calls[name] = their_pipeline(layout, model)
    expected = calls["diffusers"]()
    difference = (draw() - expected).abs().mean().item()
    assert difference < 1e-2 < expected.std().item(), f"the images differ by {difference}"
    title = f"(b) {STEPS} guided steps and decode, {len(PROMPTS)} prompts"
    report(title, *interleaved(calls, repeats))


def peak_megabytes():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measure_memory(whose):
    """In a fresh process: MB above the imports after a training step, then after drawing."""
    before = peak_megabytes()
    if whose == "ours":
        model, draw = our_pipeline()
        net = predict = model.unet
    else:
        net, predict, draw = their_pipeline(LAYOUTS[whose])
    training_step(net, predict, random_batch(SHAPES.unet))()
    trained = peak_megabytes()
    draw()
    print(f"{trained - before:.0f} {peak_megabytes() - before:.0f}")


def compare_memory(threads):
    for whose in ("ours", *LAYOUTS):
        command = [sys.executable, __file__, "--threads", str(threads), "--memory", whose]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        trained, drawn = done.stdout.split()
        print(
            f"(c) peak memory above the imports, {whose:24} training step {trained} MB, "
            f"and drawing {drawn} MB",
            flush=True,
        )


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--memory", choices=["ours", *LAYOUTS], help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.memory:
        measure_memory(options.memory)
        return
    print(f"torch {torch.__version__}, {options.threads} thread(s), {options.repeats} repeats")
    compare_memory(options.threads)  # first: a child's peak begins at its parent's
    compare_unets(options.repeats)
    compare_pipelines(options.repeats)


if __name__ == "__main__":
    main()
