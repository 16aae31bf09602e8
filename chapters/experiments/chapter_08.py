"""Chapter 8: the losses of other seeds, the average of the weights, and wrong learning rates."""

import dataclasses

import torch

import common
from book import load_data, load_recipe
from ldm_minimal import (
    CLIP,
    EMA,
    LatentDiffusion,
    Tokenizer,
    measure_scale_factor,
    train_autoencoder,
    train_clip,
    train_denoiser,
)

SHAPES = load_recipe()


# The chapter shows these definitions; tests/test_experiments.py compares them.
def new_model(data, seed, discriminator_start):
    torch.manual_seed(seed)
    starts = {"discriminator_start": discriminator_start, "discriminator_head_start": 0}
    model = LatentDiffusion(dataclasses.replace(SHAPES, **starts))
    model.tokenizer = Tokenizer.train(data.captions, SHAPES.text.vocab_size)
    return model


def whole_recipe(model, data, seed, steps):
    """All three trainings, of so many steps each. Yields (training, step, losses)."""
    recipes = (SHAPES.clip_training, SHAPES.autoencoder_training, SHAPES.denoiser_training)
    configs = []
    for recipe, count in zip(recipes, steps):
        configs.append(dataclasses.replace(recipe, steps=count, warmup_steps=10))
    torch.manual_seed(seed)
    clip = CLIP(model.tokenizer, model.text_encoder, model.image_encoder)
    for step, losses in train_clip(clip, data, configs[0], seed=seed):
        yield "clip", step, losses
    for step, losses in train_autoencoder(model, data, configs[1], seed=seed):
        yield "autoencoder", step, losses
    measure_scale_factor(model, data, seed)
    for step, losses in train_denoiser(model, data, configs[2], seed=seed):
        yield "denoiser", step, losses


def training(seed):
    """The chapter's short recipe. Yields (training, its main loss)."""
    main_loss = {"clip": "clip", "autoencoder": "l1", "denoiser": "mse"}
    data = load_data("train")
    model = new_model(data, seed, discriminator_start=100)
    for name, _, losses in whole_recipe(model, data, seed, (60, 150, 100)):
        yield name, losses[main_loss[name]].item()


@common.experiment("08/reference", seeds=[1, 2, 3, 4, 5])
def reference(seeds):
    """The chapter's recipe with other seeds than its own: the means of every ten steps."""
    found = {"clip": [], "autoencoder": [], "denoiser": []}
    for seed in seeds:
        losses = {name: [] for name in found}
        for name, loss in training(seed):
            losses[name].append(loss)
        for name, values in losses.items():
            found[name].append(common.means(values, 10))
    return {"losses": found}, None


@common.beginning("08/reference")
def first_losses_of_seed_1(record):
    losses = (loss for _, loss in training(1))
    now = [common.first_mean(losses, 10), common.first_mean(losses, 10)]
    return now, record["losses"]["clip"][0][:2]


@common.experiment("08/ema", steps=500)
def ema(steps):
    """One U-Net on the shipped latents: errors of its weights and of their average."""
    model = common.model_with_new_unet()
    average = EMA(model.unet)
    # Stopped half way through its schedule, where the learning rate is still high.
    config = dataclasses.replace(model.config.denoiser_training, steps=2 * steps)
    test = load_data("test")
    with torch.no_grad():
        z = model.encode(test.batch(slice(0, 64)))
        context = model.embed(test.captions[:64])

    def error(unet):
        times = range(25, 1000, 50)
        errors = common.error_by_timestep(unet, model.schedule, z, context, times)
        return common.short(sum(errors) / len(errors))

    found = {"at": [], "raw": [], "ema": []}
    for step, _ in train_denoiser(model, load_data("train"), config, ema=average):
        if step % 25 == 0:
            found["at"].append(step)
            found["raw"].append(error(model.unet))
            found["ema"].append(error(average.module))
        if step == steps:
            break
    return found, None


@common.experiment("08/rates", steps=300, at=list(range(5, 300, 10)))
def rates(steps, at):
    """Three U-Nets that differ in the learning rate: errors of every ten steps, four images."""
    prompts = ["a red circle", "a blue square", "a large yellow star", "a green heart"]
    found = {}
    tiles = []
    for rate in ("4e-5", "4e-3", "4e-1"):
        model = common.model_with_new_unet()
        losses = list(common.denoiser_losses(model, steps=steps, learning_rate=float(rate)))
        found[rate] = common.means(losses, 10)
        generator = torch.Generator().manual_seed(0)
        tiles.append(model.generate(prompts, guidance=3.0, generator=generator).nan_to_num())
    return {"mse": found}, torch.cat(tiles)


if __name__ == "__main__":
    common.main("08")
