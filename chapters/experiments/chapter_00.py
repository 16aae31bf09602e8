"""Chapter 0: what flows through the map of the pipeline, from a real image and a prompt."""

import torch

import common
from book import load_data, load_model

PROMPT = "a red circle above a blue square"


def numbers(z: torch.Tensor) -> list[float]:
    """A latent as a list, short enough for a file."""
    return [round(value, 2) for value in z.flatten().tolist()]


@common.experiment("00/map", row=10, t=300, guidance=3.0, steps=50)
def thumbnails(row, t, guidance, steps):
    """A test image restored; its latent, noised; a guess of the noise; and a prompt drawn."""
    model = load_model(version=2)
    test = load_data("test", version=2)
    x = test.batch(slice(row, row + 1))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        z = model.encode(x)
        eps = torch.randn(z.shape, generator=generator)
        at = torch.tensor([t])
        z_t = model.schedule.add_noise(z, at, eps)
        eps_hat = model.unet(z_t, at, model.embed([test.captions[row]]))
        start = torch.randn(z.shape, generator=generator)
        *_, last = model.denoise([PROMPT], steps=steps, guidance=guidance, z=start)
        _, z_0, _ = last
        images = torch.cat([x, model.decode(z), model.decode(z_0)]).clamp(-1, 1)
    latents = {"z": z, "eps": eps, "z_t": z_t, "eps_hat": eps_hat, "z_T": start, "z_0": z_0}
    found = {name: numbers(latent) for name, latent in latents.items()}
    return {"caption": test.captions[row], "prompt": PROMPT, "latents": found}, images


@common.beginning("00/map")
def latent_of_the_image(record):
    row = record["row"]
    with torch.no_grad():
        z = load_model(version=2).encode(load_data("test", version=2).batch(slice(row, row + 1)))
    return [z.abs().mean().item()], [torch.tensor(record["latents"]["z"]).abs().mean().item()]


@common.experiment("00/diagnose", t_index=9)
def three_mistakes(t_index):
    """Exercise 0.4: one prompt drawn with three mistakes, in the order A, B, C."""
    model = load_model(version=2)
    prompt = ["a blue circle above a green star"]
    noise = torch.randn(4, 4, 8, 8, generator=torch.Generator().manual_seed(0))[1:2]
    steps = list(model.denoise(prompt, guidance=3.0, z=noise))
    with torch.no_grad():
        images = [
            model.generate(prompt, guidance=30.0, z=noise),
            model.decode(steps[t_index][1]),
            model.generate(prompt, guidance=0.0, z=noise),
        ]
    return {"prompt": prompt[0]}, torch.cat(images).clamp(-1, 1)


if __name__ == "__main__":
    common.main("00")
