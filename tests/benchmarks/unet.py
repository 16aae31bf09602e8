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

import torch

TESTS = pathlib.Path(__file__).parents[1]
sys.path[:0] = [str(TESTS), str(TESTS.parent)]

from ldm_minimal import SHAPES, LatentDiffusion, NoiseSchedule, Tokenizer, UNet  # noqa: E402

PROMPTS, BATCH, STEPS, GUIDANCE = ["a red circle"] * 16, 64, 50, 4.0


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
    for name, value in seconds.items():
        print(f"    {name:24} {1000 * value:9.1f} ms" + (f" {pictures / value:9.1f} pictures/s" if pictures else ""))
    print(f"    CPU time / wall time     {busy:9.2f}", flush=True)


def batch(config):
    random = torch.Generator().manual_seed(0)
    z, eps = torch.randn(2, BATCH, config.channels, 8, 8, generator=random)
    return z, torch.randint(1000, (BATCH,), generator=random), torch.randn(BATCH, 77, config.context_width, generator=random), eps


def forward(predict, inputs):
    z, t, context, _ = inputs

    @torch.no_grad()
    def run():
        return predict(z, t, context)
    return run


def training_step(net, predict, inputs):
    z, t, context, eps = inputs
    optimizer = torch.optim.AdamW(net.parameters(), 1e-5, fused=True)

    def run():
        torch.nn.functional.mse_loss(predict(z, t, context), eps).backward()
        optimizer.step()
        optimizer.zero_grad()
    return run


def theirs_in(net, layout):
    net = net.to(memory_format=layout)
    as_layout = lambda z: z.contiguous(memory_format=layout)  # noqa: E731
    return net, lambda z, t, context: net(as_layout(z), t, context).sample


def compare_unets(repeats):
    import reference

    ours, inputs = reference.randomise(UNet(SHAPES.unet), torch.Generator().manual_seed(0)), batch(SHAPES.unet)
    pairs = {"ours": (ours, ours)}
    for name, layout in (("diffusers", torch.contiguous_format), ("diffusers channels_last", torch.channels_last)):
        pairs[name] = theirs_in(reference.put(ours, reference.unet(SHAPES.unet)), layout)
    runs = {name: forward(predict, inputs) for name, (_, predict) in pairs.items()}
    expected = runs["ours"]()
    for run in runs.values():
        torch.testing.assert_close(run(), expected, rtol=0, atol=5e-5 * expected.abs().max().item())
    report(f"(a) U-Net, forward, batch {BATCH}", *interleaved(runs, repeats))
    for net, _ in pairs.values():
        net.train()
    runs = {name: training_step(net, predict, inputs) for name, (net, predict) in pairs.items()}
    report("(a) U-Net, forward + backward + AdamW", *interleaved(runs, repeats))


def our_pipeline():
    import reference

    model = reference.randomise(LatentDiffusion(dataclasses.replace(SHAPES, scale_factor=1.0)), torch.Generator().manual_seed(0))
    model.tokenizer = Tokenizer.train(["a red circle"], 520)
    return model.eval()


def their_pipeline(model, layout):
    """The loop that everybody writes with diffusers: text, fifty times U-Net and scheduler, VAE."""
    import diffusers
    import reference

    unet, predict = theirs_in(reference.put(model.unet, reference.unet(SHAPES.unet)), layout)
    vae = reference.put(model.autoencoder, reference.autoencoder(SHAPES.autoencoder)).to(memory_format=layout)
    text = reference.put(model.text_encoder, reference.text_encoder(SHAPES.text, model.tokenizer.end))
    scheduler = diffusers.DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False,
                                        timestep_spacing="trailing", set_alpha_to_one=True)

    @torch.no_grad()
    def run():
        context = text(model.tokenizer([""] * len(PROMPTS) + PROMPTS)).last_hidden_state
        z = torch.randn(len(PROMPTS), 4, 8, 8, generator=torch.Generator().manual_seed(1))
        scheduler.set_timesteps(STEPS)
        for t in scheduler.timesteps:
            eps_empty, eps_text = predict(torch.cat([z] * 2), t, context).chunk(2)
            z = scheduler.step(eps_empty + GUIDANCE * (eps_text - eps_empty), t, z).prev_sample
        return vae.decode(z.contiguous(memory_format=layout)).sample.clamp(-1, 1)
    return run


def generate(model):
    return lambda: model.generate(PROMPTS, steps=STEPS, guidance=GUIDANCE, generator=torch.Generator().manual_seed(1))


def compare_pipelines(repeats):
    assert NoiseSchedule(SHAPES.schedule).kind == "scaled-linear"
    model = our_pipeline()
    runs = {"ours": generate(model), "diffusers": their_pipeline(model, torch.contiguous_format),
            "diffusers channels_last": their_pipeline(model, torch.channels_last)}
    expected = runs["diffusers"]()
    difference = (runs["ours"]() - expected).abs().mean().item()
    assert difference < 1e-2 < expected.std().item(), f"the pictures differ by {difference}"
    report(f"(b) {STEPS} guided steps and decode, {len(PROMPTS)} prompts", *interleaved(runs, repeats), pictures=len(PROMPTS))


def peak_memory(whose):
    """MB that a training step of 64 and then drawing 16 pictures add to what the imports took. Run in a fresh process."""
    import diffusers  # noqa: F401, both import all, so that neither pays for it later
    import reference

    peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024  # noqa: E731
    model = our_pipeline()
    draw = generate(model) if whose == "ours" else their_pipeline(model, torch.contiguous_format)
    net, predict = (model.unet, model.unet) if whose == "ours" else theirs_in(reference.unet(SHAPES.unet), torch.contiguous_format)
    before = peak()
    training_step(net, predict, batch(SHAPES.unet))()
    trained = peak()
    draw()
    return f"{trained - before:.0f} {peak() - before:.0f}"


def compare_memory(threads):
    script = [sys.executable, __file__, "--threads", str(threads), "--memory"]
    megabytes = {w: subprocess.run([*script, w], capture_output=True, text=True, check=True).stdout.split() for w in ("ours", "diffusers")}
    for what, (ours, theirs) in zip(("training step", "training step and drawing"), zip(*megabytes.values())):
        print(f"(c) peak memory, {what}: ours {ours} MB, diffusers {theirs} MB")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--memory", choices=["ours", "diffusers"], help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.memory:
        return print(peak_memory(options.memory))
    print(f"torch {torch.__version__}, {options.threads} thread(s), {options.repeats} repeats; smaller is better for us, except pictures")
    compare_unets(options.repeats)
    compare_pipelines(options.repeats)
    compare_memory(options.threads)


if __name__ == "__main__":
    main()
