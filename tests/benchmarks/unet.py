"""Our U-Net and sampler beside `diffusers`, at size SHAPES, with the same weights: ratios from one interleaved run.

    python tests/benchmarks/unet.py [--threads N] [--repeats N]

Prints ours / theirs for (a) the U-Net, forward and a whole training step of 64 latents, (b) pictures a second, 16 prompts in
fifty guided DDIM steps, (c) peak memory. Theirs is taken in the faster of its two memory layouts.
"""

import argparse
import dataclasses
import pathlib
import resource
import statistics
import subprocess
import sys
import time

import diffusers
import torch

TESTS = pathlib.Path(__file__).parents[1]
sys.path[:0] = [str(TESTS), str(TESTS.parent)]

import reference  # noqa: E402

from ldm_minimal import SHAPES, LatentDiffusion, Tokenizer, UNet  # noqa: E402

PROMPTS, BATCH, STEPS, GUIDANCE = ["a red circle"] * 16, 64, 50, 4.0
LAYOUTS = {"diffusers": torch.contiguous_format, "diffusers channels_last": torch.channels_last}
TOKENIZER = Tokenizer.train(["a red circle"], 520)


def interleaved(runs, repeats):
    """{name: median seconds}, with all runs taking turns, after one warm-up each; and the CPU seconds per second."""
    seconds = {name: [] for name in runs}
    for run in runs.values():
        run()
    wall, cpu = time.perf_counter(), time.process_time()
    for _ in range(repeats):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
    busy = (time.process_time() - cpu) / (time.perf_counter() - wall)
    return {name: statistics.median(values) for name, values in seconds.items()}, busy


def report(title, seconds, busy, pictures=None):
    best = min((name for name in seconds if name != "ours"), key=seconds.get)
    ratio = seconds["ours"] / seconds[best]
    print(f"{title}: ours / {best} = {ratio:.3f} in time" + (f", {1 / ratio:.2f} times the pictures a second" if pictures else ""))
    print("".join(f"    {name} {1000 * value:.1f} ms" for name, value in seconds.items()), f"   CPU / wall time {busy:.2f}", flush=True)


def batch(config):
    random = torch.Generator().manual_seed(0)
    z, eps = torch.randn(2, BATCH, config.channels, 8, 8, generator=random)
    return z, torch.randint(1000, (BATCH,), generator=random), torch.randn(BATCH, 77, config.context_width, generator=random), eps


def forward(predict, inputs):
    return torch.no_grad()(lambda: predict(*inputs[:3]))


def training_step(net, predict, inputs):
    optimizer = torch.optim.AdamW(net.train().parameters(), 1e-5, fused=True)

    def run():
        torch.nn.functional.mse_loss(predict(*inputs[:3]), inputs[3]).backward()
        optimizer.step()
        optimizer.zero_grad()
    return run


def theirs_in(net, layout):
    net = net.to(memory_format=layout)
    return net, lambda z, t, context: net(z.contiguous(memory_format=layout), t, context).sample


def compare_unets(repeats):
    ours, inputs = reference.randomise(UNet(SHAPES.unet), torch.Generator().manual_seed(0)), batch(SHAPES.unet)
    pairs = {"ours": (ours, ours)} | {name: theirs_in(reference.put(ours, reference.unet(SHAPES.unet)), layout) for name, layout in LAYOUTS.items()}
    runs = {name: forward(predict, inputs) for name, (_, predict) in pairs.items()}
    expected = runs["ours"]()
    for run in runs.values():
        torch.testing.assert_close(run(), expected, rtol=0, atol=5e-5 * expected.abs().max().item())
    report(f"(a) U-Net, forward, batch {BATCH}", *interleaved(runs, repeats))
    runs = {name: training_step(net, predict, inputs) for name, (net, predict) in pairs.items()}
    report("(a) U-Net, forward + backward + AdamW", *interleaved(runs, repeats))


def our_pipeline():
    model = reference.randomise(LatentDiffusion(dataclasses.replace(SHAPES, scale_factor=1.0)), torch.Generator().manual_seed(0)).eval()
    model.tokenizer = TOKENIZER
    return model, lambda: model.generate(PROMPTS, steps=STEPS, guidance=GUIDANCE, generator=torch.Generator().manual_seed(1))


def their_pipeline(layout, model=None):
    """The loop that everybody writes with diffusers: text, fifty times U-Net and scheduler, VAE. With the weights of `model`."""
    end = TOKENIZER.end
    unet, vae, text = reference.unet(SHAPES.unet), reference.autoencoder(SHAPES.autoencoder), reference.text_encoder(SHAPES.text, end)
    if model is not None:
        for ours, theirs in ((model.unet, unet), (model.autoencoder, vae), (model.text_encoder, text)):
            reference.put(ours, theirs)
    (unet, predict), vae = theirs_in(unet, layout), vae.to(memory_format=layout)
    scheduler = diffusers.DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False,
                                        timestep_spacing="trailing", set_alpha_to_one=True)

    @torch.no_grad()
    def run():
        context = text(TOKENIZER([""] * len(PROMPTS) + PROMPTS)).last_hidden_state
        z = torch.randn(len(PROMPTS), 4, 8, 8, generator=torch.Generator().manual_seed(1))
        scheduler.set_timesteps(STEPS)
        for t in scheduler.timesteps:
            eps_empty, eps_text = predict(torch.cat([z] * 2), t, context).chunk(2)
            z = scheduler.step(eps_empty + GUIDANCE * (eps_text - eps_empty), t, z).prev_sample
        return vae.decode(z.contiguous(memory_format=layout)).sample.clamp(-1, 1)
    return unet, predict, run


def compare_pipelines(repeats):
    model, draw = our_pipeline()
    runs = {"ours": draw} | {name: their_pipeline(layout, model)[-1] for name, layout in LAYOUTS.items()}
    expected = runs["diffusers"]()
    difference = (draw() - expected).abs().mean().item()
    assert difference < 1e-2 < expected.std().item(), f"the pictures differ by {difference}"
    report(f"(b) {STEPS} guided steps and decode, {len(PROMPTS)} prompts", *interleaved(runs, repeats), pictures=len(PROMPTS))


def peak_memory(whose):
    """MB above what the imports took, at the peak: after a training step of 64, then after drawing 16 pictures. In a fresh process."""
    peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024  # noqa: E731
    before = peak()
    if whose == "ours":
        model, draw = our_pipeline()
        net = predict = model.unet
    else:
        net, predict, draw = their_pipeline(LAYOUTS[whose])
    training_step(net, predict, batch(SHAPES.unet))()
    trained = peak()
    draw()
    return f"{trained - before:.0f} {peak() - before:.0f}"


def compare_memory(threads):
    script = [sys.executable, __file__, "--threads", str(threads), "--memory"]
    for whose in ("ours", *LAYOUTS):
        trained, drawn = subprocess.run([*script, whose], capture_output=True, text=True, check=True).stdout.split()
        print(f"(c) peak memory above the imports, {whose:24} training step {trained} MB, and drawing {drawn} MB", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--memory", choices=["ours", *LAYOUTS], help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.memory:
        return print(peak_memory(options.memory))
    print(f"torch {torch.__version__}, {options.threads} thread(s), {options.repeats} repeats")
    compare_memory(options.threads)  # first, while this process is small: a child's peak begins at its parent's
    compare_unets(options.repeats)
    compare_pipelines(options.repeats)


if __name__ == "__main__":
    main()
