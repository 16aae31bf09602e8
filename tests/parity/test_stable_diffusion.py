"""Stable Diffusion's files: read, written, and refused.

The references are `diffusers`, which reads and writes both layouts by itself, and `transformers`;
here with random weights at small width, in `full_size.py` at full width. The files are made as
CompVis, Runway, Lightning and diffusers make them.
"""

import copy
import dataclasses
import json
import os
import pickle
import shutil
import sys
import types

import numpy as np
import pytest
import safetensors.torch
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from PIL import Image

import reference
from ldm_minimal import (
    SD1,
    AutoencoderConfig,
    Config,
    LatentDiffusion,
    TextConfig,
    Tokenizer,
    UNetConfig,
    ddim_timesteps,
    stable_diffusion,
)
from ldm_minimal.__main__ import main
from ldm_minimal.files import SHIPPED, best_device
from random_weights import randomise, seeded
from reference import assert_same

PROMPTS = ["a photograph of an astronaut riding a horse", "two red circles"]


@pytest.fixture(scope="module")
def small():
    """Stable Diffusion's plan at a tenth of the width, every tensor random."""
    tokenizer = Tokenizer.train(PROMPTS * 3, 600)
    config = Config(
        name="small",
        image_size=64,
        text=TextConfig(len(tokenizer.vocab), width=32, num_layers=2, num_heads=4),
        image=None,
        autoencoder=AutoencoderConfig(width=16, num_groups=8),
        unet=UNetConfig(width=32, context_width=32, num_groups=8),
        spacing="leading",
        scale_factor=0.18215,
    )
    model = randomise(LatentDiffusion(config), seeded())
    model.tokenizer = tokenizer
    return model.eval()


@pytest.fixture(scope="module")
def files(small, tmp_path_factory):
    """The model in both layouts, and in diffusers' as diffusers itself writes it, in two dtypes."""
    folder = tmp_path_factory.mktemp("files")
    stable_diffusion.save(small, folder / "compvis.safetensors", "compvis")
    stable_diffusion.save(small, folder / "diffusers", "diffusers")
    theirs = StableDiffusionPipeline.from_pretrained(folder / "diffusers")
    theirs.save_pretrained(folder / "theirs")
    theirs.to(torch.float16).save_pretrained(folder / "half", variant="fp16")
    return folder


@pytest.fixture
def as_sd1(small, monkeypatch):
    """Official files do not say what they are. Here they are taken to be of the small size."""
    monkeypatch.setattr(stable_diffusion, "SD1", small.config)


@pytest.fixture
def single(files, as_sd1):
    """The tensors of the single file."""
    return safetensors.torch.load_file(files / "compvis.safetensors")


@pytest.fixture(scope="module")
def vocabulary(small, tmp_path_factory):
    """The model's tokenizer by itself, as --tokenizer takes it."""
    folder = tmp_path_factory.mktemp("vocabulary") / "tokenizer"
    stable_diffusion.save_tokenizer(small.tokenizer, folder)
    return folder


def pipeline(folder):
    pipe = StableDiffusionPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def first_noise(model, count):
    """The noise from which `generate` starts with a generator of this seed."""
    side = model.config.image_size // model.autoencoder.f
    return torch.randn(count, 4, side, side, generator=seeded(5))


def assert_same_model(got, expected, dtype=torch.float32):
    ours, theirs = got.state_dict(), expected.state_dict()
    assert ours.keys() == {name for name in theirs if not name.startswith("image_encoder.")}
    for name, tensor in ours.items():
        assert tensor.dtype == dtype, name
        assert torch.equal(tensor, theirs[name].to(dtype)), name
    assert got.tokenizer.vocab == expected.tokenizer.vocab
    assert got.tokenizer.merges == expected.tokenizer.merges
    same_name_and_size = {"name": "", "image": None}
    got_config = dataclasses.replace(got.config, **same_name_and_size)
    assert got_config == dataclasses.replace(expected.config, **same_name_and_size)
    assert not got.training
    assert all(parameter.requires_grad for parameter in got.parameters())
    assert got.unet.conv_in.weight.is_contiguous(memory_format=torch.channels_last)


# ---- there and back ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["compvis.safetensors", "diffusers"])
def test_loading_what_was_saved_is_the_identity(small, files, name):
    assert_same_model(stable_diffusion.load(files / name), small)


def test_loading_what_diffusers_saved_is_the_identity(small, files, as_sd1):
    assert not (files / "theirs" / "ldm_minimal.json").exists()
    assert_same_model(stable_diffusion.load(files / "theirs"), small)


@pytest.mark.parametrize("layout", ["compvis", "diffusers"])
def test_the_model_that_was_trained_here_goes_there_and_back(layout, tmp_path):
    model = LatentDiffusion.load(SHIPPED / "model")
    path = tmp_path / "shapes.safetensors"
    stable_diffusion.save(model, path, layout)
    again = stable_diffusion.load(path)
    assert_same_model(again, model)
    images = again.generate(["a red circle"], steps=4, generator=seeded())
    assert torch.equal(images, model.generate(["a red circle"], steps=4, generator=seeded()))


@pytest.mark.parametrize("name", ["compvis.safetensors", "diffusers", "half"])
def test_weights_come_in_the_precision_asked_for(small, files, name, as_sd1):
    loaded = stable_diffusion.load(files / name, dtype=torch.float16)
    assert_same_model(loaded, small, torch.float16)


def test_the_half_sized_files_are_read_where_there_are_no_others(small, files, as_sd1):
    names = {path.name for path in (files / "half").rglob("*.safetensors")}
    assert names == {"diffusion_pytorch_model.fp16.safetensors", "model.fp16.safetensors"}
    weight = stable_diffusion.load(files / "half").unet.conv_in.weight
    assert torch.equal(weight, small.unet.conv_in.weight.half().float())


def test_every_tensor_has_one_name_in_each_language():
    with torch.device("meta"):
        model = LatentDiffusion(SD1)
    ours, compvis, diffusers = [], [], []
    for row in stable_diffusion.key_map(model):
        for column, names in zip((ours, compvis, diffusers), row):
            column += names.split()
    assert sorted(ours) == sorted(model.state_dict())
    for theirs in (compvis, diffusers):
        assert len(theirs) == len(set(theirs))
        assert len(theirs) == 686 + 248 + 196  # of the U-Net, the autoencoder and the text tower
    assert set(compvis) >= OFFICIAL_NAMES


OFFICIAL_NAMES = {  # some of the official file's, above all where the numbering has a corner
    "model.diffusion_model.input_blocks.3.0.op.weight",
    "model.diffusion_model.input_blocks.11.0.out_layers.3.bias",
    "model.diffusion_model.middle_block.1.transformer_blocks.0.ff.net.0.proj.weight",
    "model.diffusion_model.output_blocks.2.1.conv.weight",
    "model.diffusion_model.output_blocks.5.2.conv.weight",
    "model.diffusion_model.output_blocks.11.1.proj_out.bias",
    "first_stage_model.encoder.down.2.block.0.nin_shortcut.weight",
    "first_stage_model.encoder.down.2.downsample.conv.bias",
    "first_stage_model.decoder.up.1.block.0.nin_shortcut.weight",
    "first_stage_model.decoder.up.3.upsample.conv.weight",
    "first_stage_model.decoder.mid.attn_1.q.weight",
    "cond_stage_model.transformer.text_model.final_layer_norm.bias",
    "cond_stage_model.transformer.text_model.encoder.layers.11.self_attn.k_proj.bias",
}


def test_1x1_convolutions_are_convolutions_where_official_files_have_them(single):
    block = "model.diffusion_model.input_blocks.1.1"
    assert single[f"{block}.proj_in.weight"].shape == (32, 32, 1, 1)
    assert single[f"{block}.transformer_blocks.0.attn1.to_q.weight"].shape == (32, 32)
    assert single["first_stage_model.encoder.mid.attn_1.q.weight"].shape == (64, 64, 1, 1)


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
def test_our_folder_has_the_names_and_shapes_of_diffusers_folder(files, part):
    found = []
    for folder in ("diffusers", "theirs"):
        state = safetensors.torch.load_file(next((files / folder / part).glob("*.safetensors")))
        state.pop("text_model.embeddings.position_ids", None)  # 0 ... 76
        found.append({n.removeprefix("text_model."): t.shape for n, t in state.items()})
    ours, theirs = found
    assert ours == theirs


# ---- other programs read what we write ---------------------------------------------------------


def test_diffusers_draws_the_image_of_the_model_that_was_trained_here(tmp_path):
    model = LatentDiffusion.load(SHIPPED / "model")
    stable_diffusion.save(model, tmp_path / "shapes", "diffusers")
    prompts = ["a red circle above a blue square", "a green star"]
    ours = model.generate(prompts, steps=20, guidance=5.0, generator=seeded(5))
    theirs = pipeline(tmp_path / "shapes")(
        prompts,
        num_inference_steps=20,
        guidance_scale=5.0,
        latents=first_noise(model, 2),
        output_type="pt",
    ).images
    assert ours.std() > 0.3
    assert (ours - (2 * theirs - 1)).abs().max() < 1e-3


@pytest.mark.slow
@torch.no_grad()
def test_a_guided_trajectory_of_fifty_steps_is_diffusers(small, files):
    """With Stable Diffusion's timesteps, 981 ... 1, a negative prompt, and the decode."""
    pipe = pipeline(files / "diffusers")
    steps = []

    def keep(_pipe, _i, t, tensors):
        steps.append((int(t), tensors["latents"]))
        return {}

    last = pipe(
        PROMPTS,
        num_inference_steps=50,
        guidance_scale=7.5,
        negative_prompt=["red"] * 2,
        latents=first_noise(small, 2),
        output_type="latent",
        callback_on_step_end=keep,
    ).images
    trajectory = list(
        small.denoise(PROMPTS, steps=50, guidance=7.5, negative="red", generator=seeded(5))
    )

    assert isinstance(pipe.scheduler, DDIMScheduler)
    assert [t for t, _, _ in trajectory] == [t for t, _ in steps] == list(range(981, 0, -20))
    for (_, ours, _), (_, theirs) in zip(trajectory, steps):
        assert_same(ours, theirs, 1e-4)
    theirs = pipe.vae.decode(last / 0.18215).sample.clamp(-1, 1)
    assert_same(small.decode(trajectory[-1][1]), theirs, 1e-4)


@pytest.mark.parametrize("spacing", ["leading", "trailing"])
def test_the_saved_scheduler_visits_our_timesteps(small, spacing, tmp_path):
    model = copy.copy(small)
    model.config = dataclasses.replace(small.config, spacing=spacing)
    stable_diffusion.save(model, tmp_path / "model", "diffusers")
    scheduler = DDIMScheduler.from_pretrained(tmp_path / "model", subfolder="scheduler")
    for steps in (1, 7, 50):
        scheduler.set_timesteps(steps)
        ours = ddim_timesteps(model.schedule, steps, spacing)
        assert scheduler.timesteps.tolist() == [t for t, _, _ in ours]
        _, _, last_alpha_bar = ours[-1]
        assert scheduler.final_alpha_cumprod.item() == pytest.approx(last_alpha_bar, rel=1e-6)


def test_diffusers_own_converter_understands_our_single_file(small, files):
    """Its code for CompVis' names is not ours: both must find every tensor in the same place."""
    pipe = StableDiffusionPipeline.from_single_file(
        files / "compvis.safetensors", config=str(files / "diffusers"), local_files_only=True
    )
    pairs = [
        (small.unet, pipe.unet),
        (small.autoencoder, pipe.vae),
        (small.text_encoder, pipe.text_encoder),
    ]
    for ours, theirs in pairs:
        got = theirs.state_dict()
        for name, tensor in reference.translate(ours.state_dict(), ours, theirs).items():
            assert torch.equal(tensor, got[name]), name


# ---- files of other ages and makers ------------------------------------------------------------


def with_official_extras(state):
    """Also what else stands in Stable Diffusion's single files."""
    text_tower = "cond_stage_model.transformer.text_model"
    tables = [
        "betas",
        "alphas_cumprod",
        "alphas_cumprod_prev",
        "sqrt_alphas_cumprod",
        "sqrt_one_minus_alphas_cumprod",
        "log_one_minus_alphas_cumprod",
        "sqrt_recip_alphas_cumprod",
        "sqrt_recipm1_alphas_cumprod",
        "posterior_variance",
        "posterior_log_variance_clipped",
        "posterior_mean_coef1",
        "posterior_mean_coef2",
    ]
    return {
        **state,
        **{name: torch.zeros(1000) for name in tables},
        f"{text_tower}.embeddings.position_ids": torch.arange(77)[None],
        "model_ema.decay": torch.tensor(0.9999),
        "model_ema.diffusion_modelinput_blocks00weight": torch.zeros(3),
    }


def write_lightning_checkpoint(state, path):
    """A .ckpt as Lightning writes it: a pickle that names a class and a numpy number."""
    module_name = "pytorch_lightning.callbacks.model_checkpoint"
    module = types.ModuleType(module_name)
    module.ModelCheckpoint = type("ModelCheckpoint", (), {"__module__": module_name})
    callback = module.ModelCheckpoint()
    callback.best = 0.5
    callback_state = {
        "monitor": "val/loss",
        "best_model_score": np.float64(0.5),
        "self": callback,
    }
    checkpoint = {
        "epoch": 0,
        "global_step": 470000,
        "pytorch-lightning_version": "1.4.2",
        "state_dict": state,
        "callbacks": {module.ModelCheckpoint: callback_state},
    }
    with pytest.MonkeyPatch.context() as patch:
        for name in ("pytorch_lightning", "pytorch_lightning.callbacks"):
            patch.setitem(sys.modules, name, types.ModuleType(name))
        patch.setitem(sys.modules, module_name, module)
        torch.save(checkpoint, path)


def test_a_checkpoint_of_lightning_is_read_without_running_it(small, single, vocabulary, tmp_path):
    path = tmp_path / "sd-v1-4.ckpt"
    write_lightning_checkpoint(with_official_extras(single), path)
    assert b"ModelCheckpoint" in path.read_bytes()
    assert_same_model(stable_diffusion.load(path, tokenizer=vocabulary), small)
    assert "pytorch_lightning" not in sys.modules
    assert "ModelCheckpoint" not in str(torch.serialization.get_safe_globals())


def test_a_pickle_without_a_zip_around_it_is_read_too(small, single, vocabulary, tmp_path):
    torch.save(single, tmp_path / "old.ckpt", _use_new_zipfile_serialization=False)
    assert_same_model(stable_diffusion.load(tmp_path / "old.ckpt", tokenizer=vocabulary), small)


def test_a_file_with_official_extras_and_a_short_prefix_is_read(
    small, single, vocabulary, tmp_path
):
    """Some files lack `text_model.` in the text tower's names."""
    state = {}
    for name, tensor in with_official_extras(single).items():
        state[name.replace("transformer.text_model.", "transformer.")] = tensor
    path = tmp_path / "v1-5.safetensors"
    safetensors.torch.save_file(state, path)
    assert_same_model(stable_diffusion.load(path, tokenizer=vocabulary), small)


@pytest.mark.parametrize("linear", [True, False], ids=["linear", "1x1 convolutions"])
def test_the_first_generation_of_vae_names_is_read(small, files, linear, tmp_path):
    shutil.copytree(files / "diffusers", tmp_path / "old")
    path = tmp_path / "old" / "vae" / "diffusion_pytorch_model.safetensors"
    old_names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    state = safetensors.torch.load_file(path)
    for side in ("encoder", "decoder"):
        for new, old in old_names.items():
            layer = f"{side}.mid_block.attentions.0"
            weight = state.pop(f"{layer}.{new}.weight")
            state[f"{layer}.{old}.weight"] = weight if linear else weight[:, :, None, None]
            state[f"{layer}.{old}.bias"] = state.pop(f"{layer}.{new}.bias")
    safetensors.torch.save_file(state, path)
    assert_same_model(stable_diffusion.load(tmp_path / "old"), small)


def test_pickled_weights_in_a_folder_are_read_where_there_is_nothing_better(small, files, tmp_path):
    shutil.copytree(files / "diffusers", tmp_path / "old")
    for path in (tmp_path / "old").rglob("*.safetensors"):
        name = "pytorch_model.bin" if path.stem == "model" else f"{path.stem}.bin"
        torch.save(safetensors.torch.load_file(path), path.with_name(name))
        path.unlink()
    assert_same_model(stable_diffusion.load(tmp_path / "old"), small)


def test_meta_checks_a_file_and_reads_nothing(small, single, tmp_path):
    safetensors.torch.save_file(single, tmp_path / "no tokenizer.safetensors")
    model = stable_diffusion.load(tmp_path / "no tokenizer.safetensors", device="meta")
    assert model.tokenizer is None
    assert all(parameter.is_meta for parameter in model.parameters())
    assert [p.shape for p in model.parameters()] == [p.shape for p in small.parameters()]

    del single["model.diffusion_model.out.2.bias"]
    safetensors.torch.save_file(single, tmp_path / "bad.safetensors")
    with pytest.raises(ValueError, match="1 missing"):
        stable_diffusion.load(tmp_path / "bad.safetensors", device="meta")


# ---- what is refused, in one line, with nothing run --------------------------------------------
# A maker of a bad file takes an empty folder, the tensors of a good single file and a good
# `diffusers` folder. It writes bad.safetensors, bad.ckpt or the folder bad.


class Bomb:
    """A pickle that writes a file when it is opened carelessly."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch '{self.path}'",)


def bomb_among_tensors(folder, state, _):
    torch.save({"state_dict": state, "surprise": Bomb(folder / "executed")}, folder / "bad.ckpt")


def bare_bomb(folder, _state, _folder):
    bomb = pickle.dumps(Bomb(folder / "executed"), protocol=2)
    (folder / "bad.ckpt").write_bytes(bomb)


def bare_bomb_of_todays_protocol(folder, _state, _folder):
    (folder / "bad.ckpt").write_bytes(pickle.dumps(Bomb(folder / "executed")))


def class_among_tensors(folder, state, _):
    torch.save({"state_dict": state, "config": Tokenizer}, folder / "bad.ckpt")


def list_in_a_checkpoint(folder, _state, _folder):
    torch.save([1, 2], folder / "bad.ckpt")


def numbered_tensors(folder, _state, _folder):
    torch.save({"state_dict": {0: torch.zeros(1)}}, folder / "bad.ckpt")


def cut_off_file(folder, state, _):
    safetensors.torch.save_file(state, folder / "bad.safetensors")
    cut_off(folder / "bad.safetensors")


def cut_off_checkpoint(folder, state, _):
    write_lightning_checkpoint(state, folder / "bad.ckpt")
    cut_off(folder / "bad.ckpt")


def cut_off(path):
    path.write_bytes(path.read_bytes()[:-200_000])


def our_own_file(folder, _state, _folder):
    shutil.copy(SHIPPED / "model" / "model.safetensors", folder / "bad.safetensors")


def file_that_says_it_is_ours(folder, state, _):
    metadata = {"ldm_minimal": json.dumps({"config": {"name": "small"}})}
    safetensors.torch.save_file(state, folder / "bad.safetensors", metadata)


def empty_folder(folder, _state, _folder):
    (folder / "bad").mkdir()


def content(name, written):
    def make(folder, _state, _folder):
        (folder / name).write_bytes(written)

    return make


def only(name, shape=(1,)):
    """A single file with one tensor."""

    def make(folder, _state, _folder):
        safetensors.torch.save_file({name: torch.zeros(shape)}, folder / "bad.safetensors")

    return make


def with_tensor(name, shape):
    """The single file with one tensor changed or added."""

    def make(folder, state, _):
        changed = {**state, name: torch.zeros(shape)}
        safetensors.torch.save_file(changed, folder / "bad.safetensors")

    return make


def without_tensor(name):
    def make(folder, state, _):
        rest = {key: tensor for key, tensor in state.items() if key != name}
        safetensors.torch.save_file(rest, folder / "bad.safetensors")

    return make


def with_config(name, **edits):
    """The folder with changes in one of its configs."""

    def make(folder, _state, good):
        shutil.copytree(good, folder / "bad")
        path = folder / "bad" / name
        path.write_text(json.dumps(json.loads(path.read_text()) | edits))

    return make


def with_text(name, text):
    """The folder with another text in one of its files."""

    def make(folder, _state, good):
        shutil.copytree(good, folder / "bad")
        (folder / "bad" / name).write_text(text)

    return make


def without(name):
    """The folder without one of its files or folders."""

    def make(folder, _state, good):
        shutil.copytree(good, folder / "bad")
        path = folder / "bad" / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()

    return make


UNET = "model.diffusion_model"
OF_POSIX = "posix.system, which is code" if os.name == "posix" else "which is code"
THREE_TOKENS = json.dumps({"<|startoftext|>": 0, "<|endoftext|>": 1, "a": 2})
SCHEDULER = "scheduler/scheduler_config.json"
BAD = {  # name: (what makes it, words that the message must contain)
    "a file that is cut off": (cut_off_file, "bad.safetensors cannot be read"),
    "a checkpoint that is cut off": (cut_off_checkpoint, "bad.ckpt cannot be read"),
    "an empty file": (content("bad.safetensors", b""), "cannot be read"),
    "an empty checkpoint": (content("bad.ckpt", b""), "cannot be read"),
    "a web page": (content("bad.ckpt", b"<!DOCTYPE html><title>404</title>"), "cannot be read"),
    "another kind of file": (content("bad.onnx", b"onnx"), "must be a folder, or end in"),
    "a pickle with code in it": (bomb_among_tensors, OF_POSIX),
    "a bare pickle with code in it": (bare_bomb, OF_POSIX),
    "a bare pickle of today's protocol": (bare_bomb_of_todays_protocol, "cannot be read"),
    "a checkpoint with an object of somebody's": (
        class_among_tensors,
        "ldm_minimal.ldm.Tokenizer, which is code",
    ),
    "a checkpoint that is a list": (list_in_a_checkpoint, "missing"),
    "a checkpoint with numbers for names": (numbered_tensors, "1 left over (0)"),
    "a tensor that is missing": (
        without_tensor(f"{UNET}.out.2.bias"),
        f"1 missing ({UNET}.out.2.bias)",
    ),
    "a tensor too many": (
        with_tensor(f"{UNET}.out.3.bias", (4,)),
        f"1 left over ({UNET}.out.3.bias)",
    ),
    "an inpainting model, which also takes the image and its mask": (
        with_tensor(f"{UNET}.input_blocks.0.0.weight", (32, 9, 3, 3)),
        "[32, 9, 3, 3], not [32, 4, 3, 3]",
    ),
    "an autoencoder alone": (
        only("encoder.conv_in.weight"),
        f"missing ({UNET}.time_embed.0.weight",
    ),
    "SDXL": (only("conditioner.embedders.0.transformer.weight"), "Stable Diffusion XL"),
    "Stable Diffusion 2": (only("cond_stage_model.model.ln_final.weight"), "Stable Diffusion 2"),
    "Stable Diffusion 3": (only(f"{UNET}.joint_blocks.0.x.weight"), "Stable Diffusion 3"),
    "Flux": (only("double_blocks.0.img_attn.weight"), "Flux"),
    "a LoRA": (only("lora_unet_down_blocks_0_attentions_0_proj_in__lora_up"), "a LoRA"),
    "a ControlNet": (only("control_model.zero_convs.0.0.weight"), "a ControlNet"),
    "a model of ours, by its file": (our_own_file, "name its folder"),
    "a file that says it is ours": (file_that_says_it_is_ours, "its config cannot be read"),
    "an empty folder": (empty_folder, "no config.json"),
    "SDXL's folder": (
        with_config("model_index.json", _class_name="StableDiffusionXLPipeline"),
        "StableDiffusionXLPipeline",
    ),
    "a folder that predicts v": (
        with_config(SCHEDULER, prediction_type="v_prediction"),
        "prediction_type = 'v_prediction'",
    ),
    "a folder with another schedule": (with_config(SCHEDULER, beta_end=0.02), "beta_end = 0.02"),
    "SD 2's heads": (
        with_config("unet/config.json", attention_head_dim=[5, 10, 20, 20]),
        "attention_head_dim = [5, 10, 20, 20]",
    ),
    "a text tower with plain GELU": (
        with_config("text_encoder/config.json", hidden_act="gelu"),
        "hidden_act = 'gelu'",
    ),
    "a VAE with a shift": (with_config("vae/config.json", shift_factor=0.1), "shift_factor"),
    "attention in another place": (
        with_config("unet/config.json", up_block_types=["UpBlock2D"] * 4),
        "up_block_types",
    ),
    "a config of another width": (
        with_config("unet/config.json", block_out_channels=[64, 128, 256, 256]),
        "block_out_channels = [64, 128, 256, 256]",
    ),
    "a config that is no JSON": (with_text("unet/config.json", "{"), "cannot be read as JSON"),
    "a config that is a list": (with_text("unet/config.json", "[]"), "cannot be read as JSON"),
    "a config without its numbers": (
        with_text("vae/config.json", "{}"),
        "block_out_channels = None",
    ),
    "a config without its noise schedule": (with_text(SCHEDULER, "{}"), "beta_schedule = None"),
    "a description that is no JSON": (with_text("ldm_minimal.json", "{"), "its config cannot"),
    "a folder without its U-Net": (without("unet"), "no unet/config.json"),
    "a folder without weights": (
        without("vae/diffusion_pytorch_model.safetensors"),
        "holds no weights",
    ),
    "weights of another width": (
        with_tensor(f"{UNET}.out.2.weight", (4, 64, 3, 3)),
        "1 of another shape",
    ),
    "a folder without a tokenizer": (without("tokenizer"), "tokenizer"),
    "a folder with half a tokenizer": (without("tokenizer/merges.txt"), "merges.txt"),
    "a tokenizer of another size": (with_text("tokenizer/vocab.json", THREE_TOKENS), "tokenizer"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_file_gives_one_clear_line_and_nothing_of_it_is_run(
    name, files, single, vocabulary, tmp_path, capsys, monkeypatch
):
    make, words = BAD[name]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    make(tmp_path / "here", single, files / "diffusers")
    (bad,) = (tmp_path / "here").glob("bad*")
    command = ["sample", "a horse", "--model", str(bad), "--steps", "1"]
    if bad.is_file():
        command += ["--tokenizer", str(vocabulary)]

    assert main(command) == 1

    errors = capsys.readouterr().err.strip()
    assert errors.startswith("ldm_minimal sample: ")
    assert words in errors
    assert bad.name in errors
    assert "\n" not in errors
    assert len(errors) < 500
    assert not (tmp_path / "here" / "executed").exists()
    assert not (tmp_path / "out.png").exists()


def test_the_bomb_would_go_off_if_it_were_read_carelessly(tmp_path):
    bare_bomb(tmp_path, None, None)
    pickle.loads((tmp_path / "bad.ckpt").read_bytes())
    assert (tmp_path / "executed").exists()


def test_saving_says_what_is_wrong(small, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.txt").write_text("years of work")
    with pytest.raises(ValueError, match="layout is 'onnx'; allowed are"):
        stable_diffusion.save(small, tmp_path / "x", "onnx")
    with pytest.raises(ValueError, match="must end in .safetensors"):
        stable_diffusion.save(small, tmp_path / "x.ckpt", "compvis")
    with pytest.raises(ValueError, match="exists and is no model"):
        stable_diffusion.save(small, other, "diffusers")
    with pytest.raises(ValueError, match="not trained to the end"):
        stable_diffusion.save(LatentDiffusion(small.config), tmp_path / "x", "diffusers")
    assert [path.name for path in tmp_path.rglob("*")] == ["other", "thesis.txt"]


# ---- at the command line -----------------------------------------------------------------------


@pytest.fixture
def sample(tmp_path, monkeypatch):
    """Run `sample` with a prompt, more arguments and two steps, in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def run(*more):
        return main(["sample", "a horse", *map(str, more), "--steps", "2"])

    return run


def test_sample_draws_the_same_from_every_kind_of_file(files, single, vocabulary, sample, tmp_path):
    write_lightning_checkpoint(single, tmp_path / "a.ckpt")
    assert sample("--model", files / "diffusers", "--out", "0.png") == 0
    assert sample("--model", files / "compvis.safetensors", "--out", "1.png") == 0
    assert sample("--model", "a.ckpt", "--tokenizer", vocabulary, "--out", "2.png") == 0
    first, *others = [Image.open(f"{i}.png").convert("RGB").tobytes() for i in range(3)]
    assert others == [first, first]


def test_sample_draws_in_every_size(files, sample, capsys):
    model = ("--model", files / "diffusers")
    assert sample(*model, "--height", 64, "--width", 128, "--negative", "blur", "--seed", 3) == 0
    assert "128 x 64" in capsys.readouterr().out
    assert Image.open("out.png").size == (256, 128)
    assert sample(*model, "--height", 96) == 1
    assert "height and width must be multiples of 64" in capsys.readouterr().err


def test_sample_draws_several_images_in_bf16(files, sample, capsys):
    model = ("--model", files / "diffusers")
    assert sample("two circles", "--count", 2, "--precision", "bf16", *model) == 0
    said = capsys.readouterr()
    assert "4 images of 64 x 64" in said.out
    assert best_device() != "cpu" or "on a CPU bf16" in said.err


@pytest.mark.parametrize("name", ["compvis.safetensors", "diffusers"])
def test_info_reads_a_file_without_its_weights(files, name, capsys):
    assert main(["info", "--model", str(files / name)]) == 0
    assert "unet" in capsys.readouterr().out


def test_a_tokenizer_is_for_files_that_have_none(vocabulary, sample, capsys):
    assert sample("--tokenizer", vocabulary) == 1
    assert "--tokenizer is for files of Stable Diffusion" in capsys.readouterr().err


def test_a_single_file_takes_its_tokenizer_from_the_hub(
    small, single, vocabulary, tmp_path, monkeypatch
):
    def download(repository, name, **_):
        assert repository == "openai/clip-vit-large-patch14"
        return str(vocabulary / name)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    safetensors.torch.save_file(single, tmp_path / "v1-5.safetensors")
    assert_same_model(stable_diffusion.load(tmp_path / "v1-5.safetensors"), small)


def test_without_a_network_a_single_file_asks_for_a_tokenizer(single, tmp_path, monkeypatch):
    def download(_repository, _name, **_):
        raise OSError("no route to host")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    safetensors.torch.save_file(single, tmp_path / "v1-5.safetensors")
    with pytest.raises(ValueError, match="hub cannot be reached.*--tokenizer PATH"):
        stable_diffusion.load(tmp_path / "v1-5.safetensors")
