"""LatentDiffusion as a whole: what it draws, what it saves, what it refuses."""

import dataclasses
import json

import pytest
import safetensors.torch
import torch
import torch.nn.functional as F

from conftest import TINY, clip_of, seeded
from ldm_minimal import (
    CLIP,
    NAMED_SIZES,
    Config,
    LatentDiffusion,
    NoiseSchedule,
    Tokenizer,
    ddim_sample,
    guided_eps,
)
from ldm_minimal.files import recover_folder, save_in_files_of, whole_folder

PROMPTS = ["a red circle", "a small blue star"]
close = torch.testing.assert_close


def draw(model, seed=0, steps=4, **options):
    return model.generate(PROMPTS, generator=seeded(seed), steps=steps, **options)


def assert_same_weights(model, other):
    weights, other_weights = model.state_dict(), other.state_dict()
    assert weights.keys() == other_weights.keys()
    for name, value in weights.items():
        assert torch.equal(value, other_weights[name]), name


# ---- drawing -----------------------------------------------------------------------------------


def test_an_image_is_decided_by_generator_prompt_and_options(tiny):
    x = draw(tiny)
    assert x.shape == (2, 3, 16, 16)
    assert x.min() >= -1 and x.max() <= 1
    assert torch.equal(x, draw(tiny))


@pytest.mark.parametrize(
    "changed",
    [
        {"seed": 1},
        {"guidance": 2.0},
        {"negative": "a heart"},
        {"steps": 5},
        {"eta": 1.0},
        {"spacing": "leading"},
    ],
)
def test_every_option_changes_the_image(tiny, changed):
    assert not torch.equal(draw(tiny), draw(tiny, **changed))


def test_noise_of_eta_comes_from_the_generator(tiny):
    torch.manual_seed(1)
    x = draw(tiny, eta=1.0)
    torch.manual_seed(2)
    assert torch.equal(x, draw(tiny, eta=1.0))


@torch.no_grad()
def test_generate_is_embed_denoise_decode(tiny):
    """The same image from the parts, with nothing prepared and nothing cached."""
    z = torch.randn(2, 4, 8, 8, generator=seeded())
    context = torch.cat([tiny.embed(["", ""]), tiny.embed(PROMPTS)])

    def predict(z, t):
        return guided_eps(tiny.unet, z, t, context, 7.5)

    *_, (_, z, _) = ddim_sample(predict, tiny.schedule, z, steps=4)
    close(draw(tiny), tiny.autoencoder.decode(z / 0.5).clamp(-1, 1), atol=1e-4, rtol=0)


def test_guidance_one_is_the_plain_conditional_prediction(tiny):
    """It has code of its own, with half the work; guidance close to 1 must agree with it."""
    batches = []

    def unet_called(module, inputs):
        batches.append(len(inputs[0]))

    tiny.unet.register_forward_pre_hook(unet_called)
    one = draw(tiny, guidance=1.0)
    near = draw(tiny, guidance=1.0 + 1e-6)
    assert batches == [2] * 4 + [4] * 4
    close(one, near, atol=1e-4, rtol=0)


def test_guidance_zero_ignores_the_prompt(tiny):
    x = draw(tiny, guidance=0.0)
    prompts = ["a heart", "a cross"]
    other = tiny.generate(prompts, steps=4, guidance=0.0, generator=seeded())
    close(x, other, atol=1e-5, rtol=0)


@torch.no_grad()
def test_encode_scales_and_decode_unscales(tiny):
    x = torch.rand(2, 3, 16, 16, generator=seeded()) * 2 - 1
    close(tiny.encode(x), 0.5 * tiny.autoencoder.encode(x).mean)
    close(tiny.decode(tiny.encode(x)), tiny.autoencoder(x)[0].clamp(-1, 1))


def test_a_large_batch_is_decoded_in_parts(tiny, monkeypatch):
    """Images of 256 x 512 pixels, two at a time; nothing is lost and nothing changes its order."""
    z = torch.randn(5, 4, 128, 256, generator=seeded())
    batches = []

    def cheap_decode(z):
        batches.append(len(z))
        return F.interpolate(z[:, :3], scale_factor=2)

    monkeypatch.setattr(tiny.autoencoder, "decode", cheap_decode)
    x = tiny.decode(z)
    assert batches == [2, 2, 1]
    assert torch.equal(x, cheap_decode(z / 0.5).clamp(-1, 1))


def test_image_to_image_starts_in_the_middle(tiny):
    z = torch.zeros(2, 4, 8, 8)
    times = [t for t, _, _ in tiny.denoise(PROMPTS, steps=10, z=z, start=500)]
    assert times == [500, 499, 399, 299, 199, 99]


def test_spacing_is_the_configs_unless_it_is_given(tiny):
    tiny.config = dataclasses.replace(tiny.config, spacing="leading")
    times = [t for t, _, _ in tiny.denoise(PROMPTS, steps=2)]
    given = [t for t, _, _ in tiny.denoise(PROMPTS, steps=2, spacing="trailing")]
    assert times == [501, 1]
    assert given == [999, 499]


def test_size_is_height_and_width_in_pixels(tiny):
    assert draw(tiny, steps=1, size=(8, 24)).shape == (2, 3, 8, 24)


def test_keys_and_values_prepared_once_give_the_same_prediction(tiny):
    z, t = torch.randn(2, 4, 8, 8, generator=seeded()), torch.tensor([10, 900])
    with torch.no_grad():
        context = tiny.embed(PROMPTS)
        prepared = tiny.unet.keys_values(context)
        assert len(prepared) == len(tiny.unet.cross_attentions())
        close(tiny.unet(z, t, prepared), tiny.unet(z, t, context))


# ---- what is refused ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, message",
    [
        ({"steps": 0}, "steps is 0; allowed are 1 to 1000"),
        ({"steps": 1001}, "steps is 1001"),
        ({"eta": 1.5}, "eta is 1.5; allowed are 0 to 1"),
        ({"guidance": float("nan")}, "guidance is nan"),
        ({"prompts": []}, r"prompts is \[\]"),
        ({"prompts": "a red circle"}, "a list of"),
        ({"size": (16, 18)}, "size is 16 x 18; .* multiples of 4"),
        ({"size": (0, 16)}, "size is 0 x 16; .* multiples of 4"),
        ({"start": 300}, "start is 300, which needs z"),
        ({"z": torch.zeros(1, 4, 8, 8)}, f"z has 1 latents for {len(PROMPTS)} prompts"),
    ],
)
def test_what_is_not_allowed_is_named(tiny, options, message):
    options = {"prompts": PROMPTS, "steps": 2, **options}
    with pytest.raises(ValueError, match=message):
        tiny.generate(**options)


def test_images_must_be_multiples_of_f(tiny):
    message = "x is 16 x 15; height and width must be multiples of f = 2"
    with pytest.raises(ValueError, match=message):
        tiny.autoencoder.encode(torch.zeros(1, 3, 16, 15))


def test_latents_must_be_multiples_of_the_unets_downsampling(tiny):
    with pytest.raises(ValueError, match="z_t is 8 x 7; both must be multiples of 2"):
        tiny.unet(torch.zeros(1, 4, 8, 7), torch.tensor([0]), torch.zeros(1, 77, 16))


def test_a_model_without_a_tokenizer_says_so():
    model = LatentDiffusion(dataclasses.replace(TINY, scale_factor=0.5))
    with pytest.raises(ValueError, match="tokenizer is None"):
        model.generate(PROMPTS)


def test_a_model_without_a_scale_factor_says_so_before_it_denoises(tiny):
    tiny.config = dataclasses.replace(tiny.config, scale_factor=None)
    with pytest.raises(ValueError, match="scale_factor is not measured"):
        next(tiny.denoise(PROMPTS))


# ---- files -------------------------------------------------------------------------------------


def test_saved_and_loaded_it_is_the_same_model(tiny, tmp_path):
    tiny.save(tmp_path / "model")
    loaded = LatentDiffusion.load(tmp_path / "model")
    assert loaded.config == tiny.config
    assert not loaded.training
    assert_same_weights(loaded, tiny)
    assert torch.equal(draw(tiny), draw(loaded))


def test_a_loaded_model_reads_captions_of_its_own_length(tiny, tmp_path):
    text = dataclasses.replace(TINY.text, length=12)
    model = LatentDiffusion(dataclasses.replace(TINY, text=text, scale_factor=0.5))
    model.tokenizer = Tokenizer.from_merges(list(tiny.tokenizer.merges), length=12)
    model.save(tmp_path / "model")
    loaded = LatentDiffusion.load(tmp_path / "model")
    assert loaded.tokenizer(["a red circle"]).shape == (1, 12)
    assert torch.equal(loaded.embed(PROMPTS), model.eval().embed(PROMPTS))


def test_half_precision_halves_the_file_and_keeps_three_digits(tiny, tmp_path):
    tiny.save(tmp_path / "single")
    tiny.save(tmp_path / "half", dtype=torch.float16)
    single = (tmp_path / "single" / "model.safetensors").stat().st_size
    half = (tmp_path / "half" / "model.safetensors").stat().st_size
    assert 0.45 < half / single < 0.6
    loaded = LatentDiffusion.load(tmp_path / "half")
    assert loaded.unet.conv_in.weight.dtype == torch.float32
    close(loaded.unet.conv_in.weight, tiny.unet.conv_in.weight, atol=1e-3, rtol=1e-3)


def test_large_weights_go_into_several_files_none_too_large(tiny, tmp_path):
    """A model can be kept where files must be small. One file missing is no whole model."""
    limit = 20_000
    tiny.half().float()  # what half precision keeps exactly
    save_in_files_of(limit, tiny, tmp_path / "model")
    files = sorted((tmp_path / "model").glob("*.safetensors"))
    contents = [safetensors.torch.load_file(file) for file in files]
    assert len(files) > 3
    for content in contents:
        assert len(content) == 1 or sum(value.nbytes for value in content.values()) <= limit
    assert sum(len(content) for content in contents) == len(tiny.state_dict())
    assert_same_weights(LatentDiffusion.load(tmp_path / "model"), tiny)
    files[1].unlink()
    with pytest.raises(ValueError, match="holds no whole model"):
        LatentDiffusion.load(tmp_path / "model")


def test_a_model_saved_over_another_leaves_nothing_of_it(tiny, tmp_path):
    """Weights in several files, or a tokenizer, of the other would be loaded with the new ones."""
    save_in_files_of(1e5, tiny, tmp_path / "model")
    new = LatentDiffusion(tiny.config)
    new.save(tmp_path / "model")
    loaded = LatentDiffusion.load(tmp_path / "model")
    assert_same_weights(loaded, new)
    assert loaded.tokenizer is None
    save_in_files_of(1e9, tiny, tmp_path / "model")
    assert [file.name for file in (tmp_path / "model").glob("*.safetensors")] == [
        "model-0.safetensors"
    ]


def test_a_config_whose_parts_do_not_fit_is_refused():
    wide = dataclasses.replace(TINY.text, width=2 * TINY.text.width)
    with pytest.raises(ValueError, match=f"width of the text encoder, {wide.width}"):
        dataclasses.replace(TINY, text=wide)
    flat = dataclasses.replace(TINY.unet, latent_channels=3)
    with pytest.raises(ValueError, match="latent_channels 3"):
        dataclasses.replace(TINY, unet=flat)


def test_a_unet_in_another_precision_draws(tiny):
    """The other networks stay in float32, as does the sampler."""
    x, eps_hat = draw(tiny), denoiser_answer(tiny)
    tiny.unet.to(torch.bfloat16)
    y = draw(tiny)
    close(y, x, atol=0.1, rtol=0)
    assert not torch.equal(y, x)
    close(denoiser_answer(tiny), eps_hat, atol=0.1, rtol=0)  # in float32, too


def denoiser_answer(model):
    """Of the U-Net on a context in float32, given as it is."""
    side = model.config.image_size // model.autoencoder.f
    z_t = torch.randn(2, model.autoencoder.latent_channels, side, side, generator=seeded(1))
    return model.unet(z_t, torch.tensor([10, 900]), model.embed(PROMPTS))


def test_a_save_that_fails_leaves_the_old_model_and_nothing_else(tiny, tmp_path):
    tiny.save(tmp_path / "model")
    before = (tmp_path / "model" / "model.safetensors").read_bytes()
    with pytest.raises(OSError, match="no space left"):
        with whole_folder(tmp_path / "model") as partial:
            (partial / "model.safetensors").write_bytes(b"half")
            raise OSError("no space left on device")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert (tmp_path / "model" / "model.safetensors").read_bytes() == before


def test_a_backup_that_the_user_made_is_left_alone(tiny, tmp_path):
    (tmp_path / "model.old").mkdir()
    with whole_folder(tmp_path / "model") as partial:
        tiny.save(partial)
    recover_folder(tmp_path / "model")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "model.old"]


def test_a_save_killed_between_its_two_renames_is_still_readable(tiny, tmp_path):
    tiny.save(tmp_path / ".model.old")
    recover_folder(tmp_path / "model")
    assert LatentDiffusion.load(tmp_path / "model").config == tiny.config


@torch.no_grad()
def test_a_clip_is_saved_and_loaded(tiny, tmp_path):
    clip = clip_of(tiny)
    clip.save(tmp_path / "evaluator")
    loaded = CLIP.load(tmp_path / "evaluator")
    tokens = tiny.tokenizer(PROMPTS)
    assert_same_weights(loaded, clip)
    assert torch.equal(loaded.text_features(tokens), clip.text_features(tokens))


@pytest.mark.parametrize("name", ["shapes", "emoji", "sd1", "tiny"])
def test_a_config_survives_json(name):
    config = {**NAMED_SIZES, "tiny": TINY}[name]
    written = json.dumps(dataclasses.asdict(config))
    assert Config.from_dict(json.loads(written)) == config


# ---- precision ---------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nothing_but_the_schedules_table_is_float64(tiny, dtype):
    """Apple's GPU has no float64. Sampling stays in float32 between the passes of a half U-Net."""
    seen = set()

    def module_called(module, inputs, output):
        if isinstance(output, torch.Tensor):
            seen.add(output.dtype)

    tiny.to(dtype)
    for module in tiny.modules():
        module.register_forward_hook(module_called)
    x = tiny.generate(PROMPTS, steps=2, generator=seeded())
    assert seen == {dtype, torch.float32}
    assert x.dtype == torch.float32
    x = x.to(dtype)
    assert NoiseSchedule().add_noise(x, torch.tensor([3, 5]), x).dtype == dtype
