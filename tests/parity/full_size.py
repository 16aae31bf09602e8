"""Stable Diffusion 1 at its full width, with random weights: is ours theirs, and what does it need?

    python tests/parity/full_size.py [--only parity | memory]

It takes about 10 GB of memory, and 15 GB of disk in the temporary folder.

parity: the three networks beside those of `diffusers` and `transformers`, one forward pass each at
512 x 512; then fifty guided steps and the decode, at 128 x 128 to save time. memory: a full-size
checkpoint is written in four forms, and each is loaded in fp16 in a new process. Its peak above the
imports, file pages included, is compared with the bytes of the weights. Prints a table; the exit
status is 1 if a row fails.
"""

import argparse
import os
import pathlib
import re
import subprocess
import sys
import tempfile

import diffusers
import torch

import reference
from ldm_minimal import SD1, LatentDiffusion, stable_diffusion
from random_weights import randomise, seeded

# The most that is allowed.
FORWARD = 5e-5  # of the largest output, after one forward pass
TRAJECTORY = 3e-4  # of the largest output, after fifty steps and the decode
MEMORY = 1.3  # of the weights' bytes
PROMPT = "a photograph of an astronaut riding a horse"


def print_row(name, value, most, unit=""):
    """One line of the table. Returns whether the value is allowed."""
    verdict = "ok" if value <= most else "FAILS"
    print(f"{name:<66}{value:>10.3g}{unit:<9} at most {most:<8g}{verdict}", flush=True)
    return value <= most


def full_model():
    """Stable Diffusion 1, every tensor random."""
    with torch.device("meta"):
        model = LatentDiffusion(SD1)
    model.to_empty(device="cpu").eval()
    randomise(model, seeded())
    model.tokenizer = stable_diffusion.load_tokenizer(reference.clip_vocabulary())
    return model


# ---- parity ------------------------------------------------------------------------------------


def twin(build, config, ours):
    """Their network with our tensors in it, which are not copied."""
    with torch.device("meta"):
        theirs = build(config)
    state = reference.translate(ours.state_dict(), ours, theirs)
    theirs.load_state_dict(state, assign=True, strict=False)
    for module in theirs.modules():
        if "position_ids" in module._buffers:  # not a weight: 0 ... 76
            module.position_ids = torch.arange(SD1.text.length)[None]
    assert not any(parameter.is_meta for parameter in theirs.parameters())
    return theirs.eval()


def compare(name, ours, theirs, most=FORWARD):
    """The row of two tensors."""
    assert theirs.std() > 0.01, "nothing to compare"
    return print_row(name, reference.relative_error(ours, theirs), most)


@torch.no_grad()
def parity():
    """Whether all of our numbers are theirs."""
    model = full_model()
    unet = twin(reference.unet, SD1.unet, model.unet)
    vae = twin(reference.autoencoder, SD1.autoencoder, model.autoencoder)
    text = twin(reference.text_encoder, SD1.text, model.text_encoder)
    results = []

    tokens = model.tokenizer([PROMPT, ""])
    context = model.text_encoder(tokens)
    expected = text(tokens).last_hidden_state
    results.append(compare("text tower, 77 positions, error of the largest", context, expected))

    z = torch.randn(2, 4, 64, 64, generator=seeded(1))
    t = torch.tensor([981, 1])
    eps_hat = model.unet(z, t, context)
    expected = unet(z, t, context).sample
    results.append(compare("U-Net, two 64 x 64 latents", eps_hat, expected))

    x = torch.rand(1, 3, 512, 512, generator=seeded(2)) * 2 - 1
    posterior = model.autoencoder.encode(x)
    expected = vae.encode(x).latent_dist
    name = "autoencoder, encode 512 x 512"
    results.append(compare(f"{name}, mean", posterior.mean, expected.mean))
    results.append(compare(f"{name}, log-variance", posterior.logvar, expected.logvar))

    x_hat = model.autoencoder.decode(z[:1])
    expected = vae.decode(z[:1]).sample
    results.append(compare("autoencoder, decode to 512 x 512", x_hat, expected))

    images = model.generate([PROMPT], generator=seeded(3), size=(128, 128))
    expected = generated(unet, vae, text, model.tokenizer)
    name = "50 guided steps and decode, 128 x 128"
    results.append(compare(name, images, expected, TRAJECTORY))
    return all(results)


def generated(unet, vae, text, tokenizer):
    """What diffusers' and transformers' parts draw from our first noise."""
    scheduler = diffusers.DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        timestep_spacing="leading",
        steps_offset=1,
        set_alpha_to_one=False,
    )
    scheduler.set_timesteps(50)
    z = torch.randn(1, 4, 16, 16, generator=seeded(3))
    context = text(tokenizer(["", PROMPT])).last_hidden_state
    for t in scheduler.timesteps:
        eps_empty, eps_text = unet(torch.cat([z, z]), t, context).sample.chunk(2)
        z = scheduler.step(eps_empty + 7.5 * (eps_text - eps_empty), t, z).prev_sample
    return vae.decode(z / 0.18215).sample.clamp(-1, 1)


# ---- memory ------------------------------------------------------------------------------------


def peak_bytes():
    """The most memory that this process has had, file pages included."""
    status = pathlib.Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) * 1024


def load_one(path):
    """In a new process. Prints the bytes of the peak above the imports, and of the weights."""
    before = peak_bytes()
    tokenizer = reference.clip_vocabulary()
    model = stable_diffusion.load(path, dtype=torch.float16, tokenizer=tokenizer)
    weights = sum(parameter.nbytes for parameter in model.parameters())
    print(peak_bytes() - before, weights)


def memory():
    """Whether each of the four forms is loaded within MEMORY."""
    if not pathlib.Path("/proc/self/status").is_file():
        print("memory: only Linux tells the peak of a process; left out")
        return True
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        model = full_model()
        stable_diffusion.save(model, folder / "fp32.safetensors", "compvis")
        state = stable_diffusion.layout_state(model, stable_diffusion.COMPVIS)
        torch.save({"state_dict": state}, folder / "fp32.ckpt")
        stable_diffusion.save(model, folder / "folder", "diffusers")
        stable_diffusion.save(model.half(), folder / "fp16.safetensors", "compvis")
        del model, state
        results = []
        for name in ("fp16.safetensors", "fp32.safetensors", "fp32.ckpt", "folder"):
            results.append(measure_load(folder / name))
        return all(results)


def measure_load(path):
    """The row of one file or folder."""
    command = [sys.executable, __file__, "--load", str(path)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        print(done.stderr)
        return False
    peak, weights = (float(number) for number in done.stdout.split())
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    size = sum(file.stat().st_size for file in files) / 1e9
    peaks = f"peak {peak / 1e9:.2f} of {weights / 1e9:.2f} GB"
    name = f"load {path.name} ({size:.2f} GB) in fp16: {peaks}"
    return print_row(name, peak / weights, MEMORY, " times")


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", choices=["parity", "memory"])
    parser.add_argument("--load", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.load:
        load_one(options.load)
        return 0
    print(f"torch {torch.__version__}, {torch.get_num_threads()} thread(s), {os.cpu_count()} cores")
    parts = {"parity": parity, "memory": memory}
    results = [part() for name, part in parts.items() if options.only in (None, name)]
    return 0 if all(results) else 1


if __name__ == "__main__":
    sys.exit(main())
