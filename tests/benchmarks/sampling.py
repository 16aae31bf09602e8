"""Drawing beside `diffusers`, at the size of Stable Diffusion 1 or emoji, same random weights.

    python tests/benchmarks/sampling.py                            # CPU: one guided pass, full size
    python tests/benchmarks/sampling.py --device cuda              # images, 50 guided steps, bf16
    python tests/benchmarks/sampling.py --device cuda --batch 16
    python tests/benchmarks/sampling.py --size emoji --images      # CPU: whole images of 128 x 128
    python tests/benchmarks/sampling.py --size emoji --device cuda --batch 64
    python tests/benchmarks/sampling.py --needs                    # peak memory in fp16

The first takes 13 GB and 10 minutes. Ours and theirs take turns; theirs is taken in the faster of
its two memory layouts, eager against eager and compiled against compiled. On a GPU the last line
of each gives the seconds of an image, its peak memory, and its share of the card's matrix rate,
measured beforehand. To rehearse Stable Diffusion on a CPU: --images --width 32 --side 64 --steps
2 --repeats 1.
"""

import argparse
import dataclasses
import pathlib
import re
import subprocess
import sys
import weakref

import diffusers
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

sys.path.append(str(pathlib.Path(__file__).parents[1] / "parity"))  # a script, not a test

import reference
from common import LAYOUTS, interleaved, machine, matrix_rate, report
from ldm_minimal import EMOJI, SD1, Attention, LatentDiffusion, Tokenizer

GUIDANCE = 7.5
PROMPT = "a photograph of an astronaut riding a horse"


def config_of(options):
    """Stable Diffusion 1, for a rehearsal at another width and image size; or size emoji."""
    if options.size == "emoji":
        return dataclasses.replace(
            EMOJI,
            image_size=options.side,
            spacing=SD1.spacing,
            scale_factor=SD1.scale_factor,
        )
    unet_width = max(32, SD1.unet.width * options.width // 320)
    autoencoder_width = max(32, SD1.autoencoder.width * options.width // 320)
    return dataclasses.replace(
        SD1,
        image_size=options.side,
        unet=dataclasses.replace(SD1.unet, width=unet_width),
        autoencoder=dataclasses.replace(SD1.autoencoder, width=autoencoder_width),
    )


def our_model(options):
    with torch.device("meta"):
        model = LatentDiffusion(config_of(options))
    model.to_empty(device="cpu")
    for part in (model.unet, model.autoencoder, model.text_encoder):
        reference.randomise(part, torch.Generator().manual_seed(0))
    model.tokenizer = Tokenizer.train([PROMPT], 520)
    return model.eval().to(options.device, options.dtype)


def their_part(build, config, ours, device):
    """diffusers' network of our config, with our weights, on our device."""
    with torch.device("meta"):
        theirs = build(config)
    theirs.to_empty(device=device).to(next(ours.parameters()).dtype)
    theirs.load_state_dict(reference.translate(ours.state_dict(), ours, theirs), strict=False)
    for name, buffer in theirs.named_buffers():
        if name.endswith("position_ids"):
            buffer.copy_(torch.arange(buffer.shape[-1]))
    return theirs.eval()


def compiling(options):
    """Fixed sizes; on a GPU in a CUDA graph."""
    settings = {"fullgraph": True, "dynamic": False}
    if options.device == "cuda":
        settings["mode"] = "reduce-overhead"
    return settings


def ways(options):
    if options.device == "cuda" or options.compiled:
        return ("eager", "compiled")
    return ("eager",)


def our_image(model, options):
    """A function that draws `options.batch` images."""

    def draw():
        generator = torch.Generator().manual_seed(1)
        prompts = [PROMPT] * options.batch
        return model.generate(prompts, steps=options.steps, guidance=GUIDANCE, generator=generator)

    return draw


def their_image(model, layout, options, compiled=False):
    """What people write with diffusers, the guided pair in one batch, as in its own pipeline."""
    config = model.config
    unet = their_part(reference.unet, config.unet, model.unet, model.device)
    vae = their_part(reference.autoencoder, config.autoencoder, model.autoencoder, model.device)
    text = their_part(reference.text_encoder, config.text, model.text_encoder, model.device)
    unet.to(memory_format=layout)
    vae.to(memory_format=layout)
    forward = torch.compile(unet, **compiling(options)) if compiled else unet
    scheduler = diffusers.DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        timestep_spacing="leading",
        steps_offset=1,
        set_alpha_to_one=False,
    )
    captions = [""] * options.batch + [PROMPT] * options.batch
    shape = (options.batch, 4, options.side // 8, options.side // 8)

    @torch.no_grad()
    def draw():
        context = text(model.tokenizer(captions).to(model.device)).last_hidden_state
        z = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(context)
        scheduler.set_timesteps(options.steps)
        for t in scheduler.timesteps:
            both = torch.cat([z, z]).contiguous(memory_format=layout)
            eps_empty, eps_text = forward(both, t.to(z.device), context).sample.chunk(2)
            eps = eps_empty + GUIDANCE * (eps_text - eps_empty)
            z = scheduler.step(eps, t, z).prev_sample
        z = (z / SD1.scale_factor).contiguous(memory_format=layout)
        return vae.decode(z).sample.clamp(-1, 1)

    return draw


def compare_pass(options):
    """One guided evaluation, two latents an image: what a step costs."""
    model = our_model(options)
    side = options.side // 8
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(2 * options.batch, 4, side, side, generator=generator)
    z = z.to(options.device, options.dtype)
    context = torch.randn(
        2 * options.batch, 77, model.config.unet.context_width, generator=generator
    )
    context = context.to(z)
    t = torch.tensor(981, device=options.device)
    times = t.expand(2 * options.batch)
    with torch.no_grad():
        kvs = model.unet.keys_values(context)

    @torch.no_grad()
    def our_pass():
        return model.unet(z, times, kvs)

    calls = {"ours": our_pass}
    for name, layout in LAYOUTS.items():
        unet = their_part(reference.unet, model.config.unet, model.unet, model.device)
        unet.to(memory_format=layout)

        @torch.no_grad()
        def their_pass(unet=unet, layout=layout):
            return unet(z.contiguous(memory_format=layout), t, context).sample

        calls[name] = their_pass
    expected = calls["diffusers"]()
    error = ((our_pass() - expected).abs().max() / expected.abs().max()).item()
    allowed = 5e-5 if options.dtype == torch.float32 else 5e-2
    assert error < allowed, f"they differ by {error:.2g}"
    title = f"U-Net, one guided pass of {options.batch} at {options.side} x {options.side}"
    report(title, *interleaved(calls, options.repeats, options.device))


@torch.no_grad()
def flops_of_an_image(options):
    """Counted on the meta device, with attention in its plain form, which the counter sees."""
    with torch.device("meta"):
        model = LatentDiffusion(config_of(options))
        z = torch.empty(1, 4, options.side // 8, options.side // 8)
        context = torch.empty(1, 77, model.config.unet.context_width)
        t = torch.empty(1)
    for module in model.modules():
        if isinstance(module, Attention):
            module.keep_weights = True
    with FlopCounterMode(display=False) as unet_counter:
        model.unet(z, t, context)
    with FlopCounterMode(display=False) as decoder_counter:
        model.autoencoder.decode(z)
    evaluations = 2 * options.steps
    return evaluations * unet_counter.get_total_flops() + decoder_counter.get_total_flops()


def compare_images(options):
    """Whole images, eager and compiled."""
    model = our_model(options)
    flops = options.batch * flops_of_an_image(options)
    on_gpu = options.device == "cuda"
    rate = matrix_rate(options.device, options.dtype) if on_gpu else None
    for way in ways(options):
        if way == "compiled":
            model.unet.compile(**compiling(options))
        calls = {"ours": our_image(model, options)}
        for name, layout in LAYOUTS.items():
            calls[name] = their_image(model, layout, options, way == "compiled")
        expected = calls["diffusers"]().float()
        difference = (calls["ours"]() - expected).abs().mean().item()
        allowed = 1e-3 if options.dtype == torch.float32 else 0.1
        assert difference < allowed < expected.std().item(), f"they differ by {difference:.2g}"
        seconds, busy = interleaved(calls, options.repeats, options.device)
        size = f"{options.side} x {options.side}"
        report(f"{way}: {options.batch} of {size}, {options.steps} guided steps", seconds, busy)
        if on_gpu:
            for name, call in calls.items():
                torch.cuda.reset_peak_memory_stats()
                call()
                peak = torch.cuda.max_memory_allocated() / 1e9
                print(
                    f"    {name:<24} {seconds[name] / options.batch:.3f} s an image, "
                    f"{flops / seconds[name] / rate:.0%} of the matrix rate "
                    f"({rate / 1e12:.0f} TFLOP/s), peak {peak:.2f} GB, all weights included",
                    flush=True,
                )


# ---- what a small card needs -------------------------------------------------------------------


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all tensors alive, and their peak; `weights` are counted elsewhere."""

    def __init__(self, weights):
        super().__init__()
        self.live = 0
        self.peak = 0
        self.known = {tensor.untyped_storage()._cdata for tensor in weights}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self.see(tensor.untyped_storage())
        return result

    def see(self, storage):
        if storage._cdata not in self.known:
            self.known.add(storage._cdata)
            self.live += storage.nbytes()
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self.gone, storage._cdata, storage.nbytes())

    def gone(self, key, size):
        self.known.discard(key)
        self.live -= size


def count_needs(dtype, height, width, batch):
    """GB of the weights, and GB alive at the peak of a guided step and of the decode, with them.

    Fake tensors: they have sizes and no contents.
    """
    with torch.device("meta"):
        model = LatentDiffusion(SD1)
    with FakeTensorMode(), torch.no_grad():
        for module in model.modules():
            for name, p in module.named_parameters(recurse=False):
                module._parameters[name] = torch.empty_strided(p.shape, p.stride(), dtype=dtype)
        weights = sum(p.nbytes for p in model.parameters())
        z = torch.empty(batch, 4, height // 8, width // 8)
        context = torch.empty(2 * batch, 77, SD1.unet.context_width, dtype=dtype)
        kvs = model.unet.keys_values(context)
        with LiveBytes(model.parameters()) as step:
            model.unet(torch.cat([z, z]), torch.zeros(2 * batch), kvs)
        with LiveBytes(model.parameters()) as decode:
            model.decode(z)
    return weights / 1e9, (weights + step.peak) / 1e9, (weights + decode.peak) / 1e9


def peak_gigabytes():
    status = pathlib.Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\s+(\d+)", status)[1]) / 1e6


@torch.no_grad()
def measure_need(what):
    """In a fresh process, on the CPU in float32: GB at the peak, above the imports."""
    base = peak_gigabytes()
    with torch.device("meta"):
        model = LatentDiffusion(SD1)
    model.to_empty(device="cpu")
    for part in (model.unet, model.autoencoder, model.text_encoder):
        for p in part.parameters():
            torch.nn.init.normal_(p, std=0.01)
    z = torch.randn(1, 4, 64, 64)
    if what == "step":
        kvs = model.unet.keys_values(torch.randn(2, 77, SD1.unet.context_width))
        model.unet(torch.cat([z, z]), torch.zeros(2), kvs)
    else:
        model.decode(z)
    print(peak_gigabytes() - base)


def print_needs():
    print(
        "Peak memory in GB, weights included. Counted: all tensors alive. A GPU's libraries and "
        "context come on top (some 0.5 GB)."
    )
    for height, width, batch in (
        (512, 512, 1),
        (512, 768, 1),
        (512, 512, 4),
        (768, 768, 1),
        (1024, 1024, 1),
    ):
        weights, step, decode = count_needs(torch.float16, height, width, batch)
        print(
            f"    fp16, {batch} of {height} x {width}: weights {weights:.2f}, "
            f"guided step {step:.2f}, decode {decode:.2f}",
            flush=True,
        )
    _, step, decode = count_needs(torch.float32, 512, 512, 1)
    for what, counted in (("step", step), ("decode", decode)):
        command = [sys.executable, __file__, "--needs", what]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        measured = float(done.stdout.splitlines()[-1])
        print(
            f"    fp32, 1 of 512 x 512, {what}: counted {counted:.2f}, "
            f"measured on the CPU {measured:.2f}",
            flush=True,
        )


def main():
    diffusers.utils.logging.set_verbosity_error()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", choices=["sd1", "emoji"], default="sd1")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--dtype", help="default: float32 on the CPU, bfloat16 on a GPU")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--side", type=int, help="of the image in pixels (default 512, emoji 128)")
    parser.add_argument("--width", type=int, default=320, help="of Stable Diffusion's U-Net")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--images", action="store_true", help="whole images on the CPU, too")
    parser.add_argument("--compiled", action="store_true", help="compiled there, too")
    parser.add_argument("--needs", nargs="?", const="table", choices=["table", "step", "decode"])
    options = parser.parse_args()
    size = EMOJI if options.size == "emoji" else SD1
    options.side = options.side or size.image_size
    on_gpu = options.device == "cuda"
    options.dtype = getattr(torch, options.dtype or ("bfloat16" if on_gpu else "float32"))
    if options.needs == "table":
        print_needs()
        return
    if options.needs:
        measure_need(options.needs)
        return
    print(
        f"size {options.size}, torch {torch.__version__}, diffusers {diffusers.__version__}, "
        f"{machine(options.device)}, {options.repeats} repeats"
    )
    compare_pass(options)
    if on_gpu or options.images:
        compare_images(options)


if __name__ == "__main__":
    main()
