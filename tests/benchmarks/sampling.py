"""Drawing with Stable Diffusion 1 or with size emoji, ours beside `diffusers`, with the same random weights: ratios from one interleaved run.

    python tests/benchmarks/sampling.py                             # CPU: one guided pass of the full-size U-Net (13 GB, 10 minutes)
    python tests/benchmarks/sampling.py --device cuda               # whole pictures: 512 x 512, 50 guided steps, bf16, eager and compiled
    python tests/benchmarks/sampling.py --device cuda --batch 16
    python tests/benchmarks/sampling.py --size emoji --pictures     # CPU: whole pictures of 128 x 128, eager
    python tests/benchmarks/sampling.py --size emoji --device cuda --batch 64
    python tests/benchmarks/sampling.py --needs                     # peak memory of drawing in fp16, for small cards

Theirs is taken in the faster of its two memory layouts, eager against eager and compiled against compiled. On a GPU the last line
of each gives the picture's seconds, its peak memory, and its share of the card's matrix rate, which is measured beforehand.
--pictures --width 32 --side 64 --steps 2 --repeats 1 rehearses the whole path of Stable Diffusion on a CPU; --compiled adds the compiled form there, which needs a C++ compiler.
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

TESTS = pathlib.Path(__file__).parents[1]
sys.path[:0] = [str(TESTS), str(TESTS.parent)]

import reference  # noqa: E402
from training import matrix_rate, ways  # noqa: E402
from unet import LAYOUTS, interleaved, report  # noqa: E402

from ldm_minimal import EMOJI, SD1, Attention, LatentDiffusion, Tokenizer  # noqa: E402

GUIDANCE, PROMPT = 7.5, "a photograph of an astronaut riding a horse"


def config_of(options):
    """Stable Diffusion 1, or, for a rehearsal, the same plan at another width and picture size; or size emoji, with its walk and scale."""
    if options.size == "emoji":
        return dataclasses.replace(EMOJI, image_size=options.side, spacing=SD1.spacing, scale_factor=SD1.scale_factor)
    wide = lambda config: dataclasses.replace(config, width=max(32, config.width * options.width // 320))  # noqa: E731
    return dataclasses.replace(SD1, image_size=options.side, unet=wide(SD1.unet), autoencoder=wide(SD1.autoencoder))


def our_model(options):
    with torch.device("meta"):
        model = LatentDiffusion(config_of(options))
    model.to_empty(device="cpu")
    for part in (model.unet, model.autoencoder, model.text_encoder):
        reference.randomise(part, torch.Generator().manual_seed(0))
    model.tokenizer = Tokenizer.train([PROMPT], 520)
    return model.eval().to(options.device, options.dtype)


def their_parts(model, layout):
    """diffusers' U-Net, VAE and text tower with our weights, in one of the two memory layouts."""
    config, parts = model.config, []
    for build, sizes, ours in ((reference.unet, config.unet, model.unet), (reference.autoencoder, config.autoencoder, model.autoencoder),
                               (reference.text_encoder, config.text, model.text_encoder)):
        with torch.device("meta"):
            theirs = build(sizes)
        theirs.to_empty(device=model.device).to(next(ours.parameters()).dtype)
        theirs.load_state_dict(reference.translate(ours.state_dict(), ours, theirs), strict=False)
        for name, buffer in theirs.named_buffers():
            if name.endswith("position_ids"):
                buffer.copy_(torch.arange(buffer.shape[-1]))
        parts.append(theirs.eval().to(memory_format=layout) if build is not reference.text_encoder else theirs.eval())
    return parts


def waiting(run, device):
    """A GPU works on by itself: wait for it before the clock is read."""
    def timed():
        result = run()
        if device == "cuda":
            torch.cuda.synchronize()
        return result
    return timed


def compiling(options):
    """One graph of fixed sizes; on a GPU in a CUDA graph."""
    return {"fullgraph": True, "dynamic": False} | ({"mode": "reduce-overhead"} if options.device == "cuda" else {})


def our_picture(model, options):
    return lambda: model.generate([PROMPT] * options.batch, steps=options.steps, guidance=GUIDANCE, generator=torch.Generator().manual_seed(1))


def their_picture(model, layout, options, compile_it=False):
    """The loop that everybody writes with diffusers; the guided pair in one batch, as in its own pipeline."""
    unet, vae, text = their_parts(model, layout)
    forward = torch.compile(unet, **compiling(options)) if compile_it else unet
    scheduler = diffusers.DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False,
                                        timestep_spacing="leading", steps_offset=1, set_alpha_to_one=False)

    @torch.no_grad()
    def run():
        context = text(model.tokenizer([""] * options.batch + [PROMPT] * options.batch).to(model.device)).last_hidden_state
        z = torch.randn(options.batch, 4, options.side // 8, options.side // 8, generator=torch.Generator().manual_seed(1)).to(context)
        scheduler.set_timesteps(options.steps)
        for t in scheduler.timesteps:
            eps_empty, eps_text = forward(torch.cat([z] * 2).contiguous(memory_format=layout), t.to(z.device), context).sample.chunk(2)
            z = scheduler.step(eps_empty + GUIDANCE * (eps_text - eps_empty), t, z).prev_sample
        return vae.decode((z / SD1.scale_factor).contiguous(memory_format=layout)).sample.clamp(-1, 1)
    return run


@torch.no_grad()
def compare_pass(options):
    """One guided evaluation, two latents: what a step costs."""
    model, side = our_model(options), options.side // 8
    width = model.config.unet.context_width
    random = torch.Generator().manual_seed(0)
    z, t = torch.randn(2 * options.batch, 4, side, side, generator=random).to(options.device, options.dtype), torch.tensor(981, device=options.device)
    context = torch.randn(2 * options.batch, 77, width, generator=random).to(z)
    prepared, times = model.unet.prepare(context), t.expand(2 * options.batch)
    runs = {"ours": lambda: model.unet(z, times, prepared)}
    for name, layout in LAYOUTS.items():
        unet, _, _ = their_parts(model, layout)
        runs[name] = lambda unet=unet, layout=layout: unet(z.contiguous(memory_format=layout), t, context).sample
    runs = {name: torch.no_grad()(waiting(run, options.device)) for name, run in runs.items()}
    expected = runs["diffusers"]()
    error = ((runs["ours"]() - expected).abs().max() / expected.abs().max()).item()
    assert error < (5e-5 if options.dtype == torch.float32 else 5e-2), f"they differ by {error:.2g}"
    report(f"U-Net, one guided pass of {options.batch} at {options.side} x {options.side}", *interleaved(runs, options.repeats))


def picture_flops(options):
    """Of one picture, counted on the meta device with attention in its plain form, which the counter sees."""
    with torch.device("meta"):
        model = LatentDiffusion(config_of(options))
        z, context = torch.empty(1, 4, options.side // 8, options.side // 8), torch.empty(1, 77, model.config.unet.context_width)
        for module in model.modules():
            if isinstance(module, Attention):
                module.keep_weights = True
        counts = []
        for call in (lambda: model.unet(z, torch.empty(1), context), lambda: model.autoencoder.decode(z)):
            with torch.no_grad(), FlopCounterMode(display=False) as counter:
                call()
            counts.append(counter.get_total_flops())
    return 2 * options.steps * counts[0] + counts[1]


def compare_pictures(options):
    """Whole pictures, eager and compiled."""
    model, cuda = our_model(options), options.device == "cuda"
    flops = options.batch * picture_flops(options)
    rate = matrix_rate(options.device, options.dtype) if cuda else None
    for how in ways(options):
        if how == "compiled":
            model.unet.compile(**compiling(options))
        runs = {"ours": our_picture(model, options)} | {name: their_picture(model, layout, options, how == "compiled") for name, layout in LAYOUTS.items()}
        runs = {name: waiting(run, options.device) for name, run in runs.items()}
        expected = runs["diffusers"]().float()
        difference = (runs["ours"]() - expected).abs().mean().item()
        assert difference < (1e-3 if options.dtype == torch.float32 else 0.1) < expected.std().item(), f"the pictures differ by {difference:.2g}"
        seconds, busy = interleaved(runs, options.repeats)
        report(f"{how}: {options.batch} picture(s) of {options.side} x {options.side}, {options.steps} guided steps and decode", seconds, busy, pictures=options.batch)
        for name, run in runs.items() if cuda else ():
            torch.cuda.reset_peak_memory_stats()
            run()
            print(f"    {name:<24} {seconds[name] / options.batch:.3f} s a picture, {flops / seconds[name] / rate:.0%} of the measured matrix rate "
                  f"({rate / 1e12:.0f} TFLOP/s), peak {torch.cuda.max_memory_allocated() / 1e9:.2f} GB (the weights of all that is held included)", flush=True)


# ---- what a small card needs ---------------------------------------------------------------------------------------

class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all tensors alive, and their peak, operation by operation; `weights` are counted elsewhere."""

    def __init__(self, weights):
        super().__init__()
        self.live, self.peak, self.known = 0, 0, {tensor.untyped_storage()._cdata for tensor in weights}

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
    """GB of weights; GB alive at the peak of a guided step, and of the decode, weights included. Fake tensors: sizes without contents."""
    with torch.device("meta"):
        model = LatentDiffusion(SD1)
    with FakeTensorMode(), torch.no_grad():
        for module in model.modules():
            for name, p in module.named_parameters(recurse=False):
                module._parameters[name] = torch.empty_strided(p.shape, p.stride(), dtype=dtype)
        weights = sum(p.nbytes for p in model.parameters())
        z = torch.empty(batch, 4, height // 8, width // 8)
        prepared = model.unet.prepare(torch.empty(2 * batch, 77, SD1.unet.context_width, dtype=dtype))
        peaks = []
        for run in (lambda: model.unet(torch.cat([z, z]), torch.zeros(2 * batch), prepared), lambda: model.decode(z)):
            with LiveBytes(model.parameters()) as counter:
                run()
            peaks.append((weights + counter.peak) / 1e9)
    return weights / 1e9, *peaks


def measure_need(what):
    """In a fresh process, on the CPU in float32: GB at the peak of a guided step or of the decode, above the imports."""
    status = lambda: int(re.search(r"VmHWM:\s+(\d+)", pathlib.Path("/proc/self/status").read_text())[1]) / 1e6  # noqa: E731
    base = status()
    with torch.device("meta"):
        model = LatentDiffusion(SD1)
    model.to_empty(device="cpu")
    for part in (model.unet, model.autoencoder, model.text_encoder):
        for p in part.parameters():
            torch.nn.init.normal_(p, std=0.01)
    z, context = torch.randn(1, 4, 64, 64), torch.randn(2, 77, SD1.unet.context_width)
    with torch.no_grad():
        model.unet(torch.cat([z, z]), torch.zeros(2), model.unet.prepare(context)) if what == "step" else model.decode(z)
    print(status() - base)


def table_of_needs():
    print("Peak memory, weights included, in GB. Counted: all tensors alive; a GPU's libraries and context come on top (some 0.5 GB).")
    for height, width, batch in ((512, 512, 1), (512, 768, 1), (512, 512, 4), (768, 768, 1), (1024, 1024, 1)):
        weights, step, decode = count_needs(torch.float16, height, width, batch)
        print(f"    fp16, {batch} of {height} x {width}: weights {weights:.2f}, guided step {step:.2f}, decode {decode:.2f}", flush=True)
    _, step, decode = count_needs(torch.float32, 512, 512, 1)
    for what, counted in (("step", step), ("decode", decode)):
        done = subprocess.run([sys.executable, __file__, "--needs", what], capture_output=True, text=True, check=True)
        print(f"    fp32, 1 of 512 x 512, {what}: counted {counted:.2f}, measured on the CPU {float(done.stdout.splitlines()[-1]):.2f}", flush=True)


def main():
    diffusers.utils.logging.set_verbosity_error()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=["sd1", "emoji"], default="sd1")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--dtype", help="float32 on the CPU, bfloat16 on a GPU by default")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--side", type=int, help="of the picture, in pixels (default 512, emoji 128)")
    parser.add_argument("--width", type=int, default=320, help="of Stable Diffusion's U-Net, which has 320")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--pictures", action="store_true", help="whole pictures on the CPU, too: a rehearsal")
    parser.add_argument("--compiled", action="store_true", help="compiled there, too")
    parser.add_argument("--needs", nargs="?", const="table", choices=["table", "step", "decode"])
    options = parser.parse_args()
    options.side = options.side or (EMOJI if options.size == "emoji" else SD1).image_size
    options.dtype = getattr(torch, options.dtype or ("bfloat16" if options.device == "cuda" else "float32"))
    if options.needs:
        return table_of_needs() if options.needs == "table" else measure_need(options.needs)
    name = torch.cuda.get_device_name() if options.device == "cuda" else f"{torch.get_num_threads()} thread(s) of a CPU"
    print(f"size {options.size}, torch {torch.__version__}, diffusers {diffusers.__version__}, {name}, {options.repeats} repeats")
    compare_pass(options)
    if options.device == "cuda" or options.pictures:
        compare_pictures(options)


if __name__ == "__main__":
    main()
