"""Stable Diffusion 1 at its full width, with random weights: is ours theirs, and what does loading need?

    python tests/full_size.py [--only parity | memory]     # about 10 GB of memory, and 15 GB of disk in the temporary folder

parity: the three networks beside `diffusers` and `transformers`, one forward pass each at 512 x 512, every tensor random, then fifty
guided steps and the decode (at 128 x 128, for the time's sake). memory: a full-size checkpoint is written in four forms, and each is
loaded in fp16 in a fresh process; its peak above the imports, file pages included, over the bytes of the weights. Prints a table
and exits with 1 if any row fails.
"""

import argparse
import importlib.util
import os
import pathlib
import re
import subprocess
import sys
import tempfile
import time

import torch

TESTS = pathlib.Path(__file__).parent
sys.path[:0] = [str(TESTS), str(TESTS.parent)]

from ldm_minimal import SD1, LatentDiffusion, stable_diffusion  # noqa: E402

FORWARD, TRAJECTORY, MEMORY = 5e-5, 3e-4, 1.3  # the most that is allowed: of the largest output; of the weights' bytes


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def row(name, value, most, seconds, unit=""):
    print(f"{name:<66}{value:>10.3g}{unit:<9} at most {most:<8g}{'ok' if value <= most else 'FAILS':<7}{seconds:>6.0f} s", flush=True)
    return value <= most


def full_model():
    """Stable Diffusion 1, every tensor random."""
    import reference

    with torch.device("meta"):
        model = LatentDiffusion(SD1)
    model.to_empty(device="cpu").eval()
    for part in (model.unet, model.autoencoder, model.text_encoder):
        reference.randomise(part, seeded(0))
    return model


def clip_tokenizer():
    spec = importlib.util.find_spec("open_clip")
    if spec is None:
        sys.exit("full_size: CLIP's vocabulary is not there; pip install --no-deps open_clip_torch==3.3.0 (make test does)")
    return stable_diffusion.load_tokenizer(pathlib.Path(spec.submodule_search_locations[0]) / "bpe_simple_vocab_16e6.txt.gz")


# ---- parity --------------------------------------------------------------------------------------------------------

def error(ours, theirs):
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


def twin(build, config, ours):
    """Their network with our tensors in it, not copied."""
    import reference

    with torch.device("meta"):
        theirs = build(config)
    theirs.load_state_dict(reference.translate(ours.state_dict(), ours, theirs), assign=True, strict=False)
    for module in theirs.modules():  # a buffer that is no weight: 0 ... 76
        if "position_ids" in module._buffers:
            module._buffers["position_ids"] = torch.arange(SD1.text.length)[None]
    assert not any(p.is_meta for p in theirs.parameters())
    return theirs.eval()


@torch.no_grad()
def parity():
    import diffusers
    import reference

    model, good = full_model(), []
    model.tokenizer = clip_tokenizer()
    counts = [sum(p.numel() for p in part.parameters()) for part in (model.unet, model.autoencoder, model.text_encoder)]
    print("parameters of U-Net, autoencoder, text tower:", ", ".join(f"{n:,}" for n in counts))
    good.append(counts == [859_520_964, 83_653_863, 123_060_480])
    unet, vae, text = (twin(build, config, ours) for build, config, ours in (
        (reference.unet, SD1.unet, model.unet), (reference.autoencoder, SD1.autoencoder, model.autoencoder), (reference.text_encoder, SD1.text, model.text_encoder)))
    z, x = torch.randn(2, 4, 64, 64, generator=seeded(1)), torch.rand(1, 3, 512, 512, generator=seeded(2)) * 2 - 1
    tokens, t = model.tokenizer(["a photograph of an astronaut riding a horse", ""]), torch.tensor([981, 1])
    context = model.text_encoder(tokens)
    started = time.time()
    good.append(row("text tower, 77 positions, error of the largest", error(context, text(tokens).last_hidden_state), FORWARD, time.time() - started))
    started = time.time()
    good.append(row("U-Net, two 64 x 64 latents", error(model.unet(z, t, context), unet(z, t, context).sample), FORWARD, time.time() - started))
    started = time.time()
    moments, theirs = model.autoencoder.encode(x), vae.encode(x).latent_dist
    good.append(row("autoencoder, encode 512 x 512, mean", error(moments.mean, theirs.mean), FORWARD, time.time() - started))
    good.append(row("autoencoder, encode 512 x 512, log-variance", error(moments.logvar, theirs.logvar), FORWARD, 0))
    started = time.time()
    good.append(row("autoencoder, decode to 512 x 512", error(model.autoencoder.decode(z[:1]), vae.decode(z[:1]).sample), FORWARD, time.time() - started))
    scheduler = diffusers.DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False,
                                        timestep_spacing="leading", steps_offset=1, set_alpha_to_one=False)
    scheduler.set_timesteps(50)
    started, prompt = time.time(), ["a photograph of an astronaut riding a horse"]
    ours = model.generate(prompt, generator=seeded(3), size=(128, 128))
    z = torch.randn(1, 4, 16, 16, generator=seeded(3))
    context = text(model.tokenizer(["", *prompt])).last_hidden_state
    for t in scheduler.timesteps:
        empty, conditional = unet(torch.cat([z, z]), t, context).sample.chunk(2)
        z = scheduler.step(empty + 7.5 * (conditional - empty), t, z).prev_sample
    theirs = vae.decode(z / 0.18215).sample.clamp(-1, 1)
    good.append(theirs.std() > 0.05 and row("50 guided steps and decode, 128 x 128", error(ours, theirs), TRAJECTORY, time.time() - started))
    return all(good)


# ---- memory --------------------------------------------------------------------------------------------------------

def status(name):
    return int(re.search(rf"{name}:\s+(\d+) kB", pathlib.Path("/proc/self/status").read_text())[1]) * 1024


def load_one(path):
    """In a fresh process: bytes at the peak above the imports, bytes of the weights, seconds."""
    before, started = status("VmHWM"), time.time()
    model = stable_diffusion.load(path, dtype=torch.float16, tokenizer=clip_tokenizer())
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    print(status("VmHWM") - before, weights, time.time() - started)


def memory():
    if not pathlib.Path("/proc/self/status").is_file():
        print("memory: only Linux tells the peak of a process; left out")
        return True
    good = []
    with tempfile.TemporaryDirectory() as folder:
        folder, model = pathlib.Path(folder), full_model()
        model.tokenizer = clip_tokenizer()
        stable_diffusion.save(model, folder / "fp32.safetensors", "compvis")
        torch.save({"state_dict": stable_diffusion.in_their_names(model, 1)}, folder / "fp32.ckpt")
        stable_diffusion.save(model, folder / "folder", "diffusers")
        stable_diffusion.save(model.half(), folder / "fp16.safetensors", "compvis")
        del model
        for name in ("fp16.safetensors", "fp32.safetensors", "fp32.ckpt", "folder"):
            done = subprocess.run([sys.executable, __file__, "--load", str(folder / name)], capture_output=True, text=True)
            if done.returncode:
                print(done.stderr)
                return False
            peak, weights, seconds = map(float, done.stdout.split())
            size = sum(f.stat().st_size for f in (folder / name).rglob("*") if f.is_file()) if (folder / name).is_dir() else (folder / name).stat().st_size
            good.append(row(f"load {name} ({size / 1e9:.2f} GB) in fp16: peak {peak / 1e9:.2f} of {weights / 1e9:.2f} GB", peak / weights, MEMORY, seconds, " times"))
    return all(good)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=["parity", "memory"])
    parser.add_argument("--load", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.load:
        return load_one(options.load)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} thread(s), {os.cpu_count()} cores")
    parts = {"parity": parity, "memory": memory}
    results = [part() for name, part in parts.items() if options.only in (None, name)]  # both run, whatever the first says
    return 0 if all(results) else 1


if __name__ == "__main__":
    sys.exit(main())
