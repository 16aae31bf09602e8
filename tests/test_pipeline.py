"""LatentDiffusion as a whole: what it draws, what it saves, what it refuses."""

import dataclasses
import json

import pytest
import torch
from conftest import TINY

import ldm_minimal
from ldm_minimal import CLIP, SD1, SHAPES, Config, LatentDiffusion, NoiseSchedule, ddim_sample, guided_eps

PROMPTS = ["a red circle", "a small blue star"]


def draw(model, seed=0, **settings):
    return model.generate(PROMPTS, generator=torch.Generator().manual_seed(seed), **{"steps": 4, **settings})


def test_a_picture_is_decided_by_generator_prompt_and_settings(tiny):
    x = draw(tiny)
    assert x.shape == (2, 3, 16, 16) and x.min() >= -1 and x.max() <= 1
    assert torch.equal(x, draw(tiny))
    for changed in (draw(tiny, seed=1), draw(tiny, guidance=2.0), draw(tiny, negative="a heart"), draw(tiny, steps=5), draw(tiny, eta=1.0)):
        assert not torch.equal(x, changed)


@torch.no_grad()
def test_generate_is_embed_denoise_decode(tiny):
    """The same picture from the parts, with nothing prepared and nothing cached."""
    z = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    context = torch.cat([tiny.embed(["", ""]), tiny.embed(PROMPTS)])
    predict = lambda z, t: guided_eps(tiny.unet, z, t, context, 7.5)  # noqa: E731
    *_, (_, z, _) = ddim_sample(predict, tiny.schedule, z, steps=4)
    torch.testing.assert_close(draw(tiny), tiny.autoencoder.decode(z / 0.5).clamp(-1, 1), atol=1e-4, rtol=0)


def test_guidance_one_is_the_plain_conditional_prediction(tiny):
    """It takes a way of its own, with half the work; guidance close to 1 must agree with it."""
    calls = []
    hook = tiny.unet.register_forward_pre_hook(lambda module, args: calls.append(len(args[0])))
    one = draw(tiny, guidance=1.0)
    assert calls == [2] * 4
    near = draw(tiny, guidance=1.0 + 1e-6)
    assert calls[4:] == [4] * 4
    hook.remove()
    torch.testing.assert_close(one, near, atol=1e-4, rtol=0)


def test_guidance_zero_ignores_the_prompt(tiny):
    x = draw(tiny, guidance=0.0)
    other = tiny.generate(["a heart", "a cross"], steps=4, guidance=0.0, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(x, other, atol=1e-5, rtol=0)


@torch.no_grad()
def test_encode_scales_and_decode_unscales(tiny):
    x = torch.rand(2, 3, 16, 16) * 2 - 1
    torch.testing.assert_close(tiny.encode(x), 0.5 * tiny.autoencoder.encode(x).mean)
    torch.testing.assert_close(tiny.decode(tiny.encode(x)), tiny.autoencoder(x)[0].clamp(-1, 1))


def test_picture_to_picture_starts_in_the_middle(tiny):
    z = torch.zeros(2, 4, 8, 8)
    times = [t for t, _, _ in tiny.denoise(PROMPTS, steps=10, z=z, start=500)]
    assert times == [500, 499, 399, 299, 199, 99]


@pytest.mark.parametrize("settings, message", [
    ({"steps": 0}, "steps is 0; allowed are 1 to 1000"), ({"steps": 1001}, "steps is 1001"), ({"eta": 1.5}, "eta 1.5"),
    ({"guidance": float("nan")}, "guidance is nan"), ({"prompts": []}, r"prompts is \[\]"), ({"prompts": "a red circle"}, "a list of"),
])
def test_what_is_not_allowed_is_named(tiny, settings, message):
    with pytest.raises(ValueError, match=message):
        tiny.generate(**{"prompts": PROMPTS, "steps": 2, **settings})


def test_pictures_must_be_multiples_of_f(tiny):
    with pytest.raises(ValueError, match="x is 16 x 15; height and width must be multiples of f = 2"):
        tiny.autoencoder.encode(torch.zeros(1, 3, 16, 15))


def test_a_model_without_a_tokenizer_says_so():
    with pytest.raises(ValueError, match="tokenizer is None"):
        LatentDiffusion(TINY).generate(PROMPTS)


# ---- files ----

def test_saved_and_loaded_it_is_the_same_model(tiny, tmp_path):
    tiny.save(tmp_path / "model")
    again = LatentDiffusion.load(tmp_path / "model")
    assert again.config == tiny.config and not again.training
    assert all(torch.equal(a, b) for a, b in zip(tiny.state_dict().values(), again.state_dict().values()))
    assert torch.equal(draw(tiny), draw(again))


def test_half_precision_halves_the_file_and_hardly_moves_a_weight(tiny, tmp_path):
    tiny.save(tmp_path / "whole")
    tiny.save(tmp_path / "half", dtype=torch.float16)
    sizes = [(tmp_path / name / "model.safetensors").stat().st_size for name in ("whole", "half")]
    assert 0.45 < sizes[1] / sizes[0] < 0.6
    again = LatentDiffusion.load(tmp_path / "half")
    assert again.unet.conv_in.weight.dtype == torch.float32
    torch.testing.assert_close(again.unet.conv_in.weight, tiny.unet.conv_in.weight, atol=1e-3, rtol=1e-3)


def test_large_weights_go_into_several_files_none_too_large(tiny, tmp_path):
    """So can a model be kept where files must be small; one file missing is one model missing."""
    limit = 20_000
    tiny.save(tmp_path / "model", shard=limit)
    files = sorted((tmp_path / "model").glob("*.safetensors"))
    contents = [ldm_minimal.ldm.safetensors.torch.load_file(file) for file in files]
    sizes = [sum(value.nbytes for value in content.values()) for content in contents]
    assert len(files) > 3 and all(size <= limit or len(content) == 1 for size, content in zip(sizes, contents))
    assert sum(map(len, contents)) == len(tiny.state_dict()), "a tensor is in two files, or in none"
    again = LatentDiffusion.load(tmp_path / "model")
    assert all(torch.equal(a, b) for a, b in zip(tiny.state_dict().values(), again.state_dict().values()))
    files[1].unlink()
    with pytest.raises(ValueError, match="not a whole model"):
        LatentDiffusion.load(tmp_path / "model")


def test_a_save_that_fails_leaves_the_old_model_and_nothing_else(tiny, tmp_path, monkeypatch):
    tiny.save(tmp_path / "model")
    before = (tmp_path / "model" / "model.safetensors").read_bytes()

    def fail(state, path):
        path.write_bytes(b"half")
        raise OSError("no space left on device")
    monkeypatch.setattr(ldm_minimal.ldm.safetensors.torch, "save_file", fail)
    with pytest.raises(OSError, match="no space left"):
        tiny.save(tmp_path / "model")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert (tmp_path / "model" / "model.safetensors").read_bytes() == before


def test_a_save_killed_between_its_two_renames_is_still_readable(tiny, tmp_path):
    tiny.save(tmp_path / "model")
    (tmp_path / "model").rename(tmp_path / "model.old")
    assert LatentDiffusion.load(tmp_path / "model").config == tiny.config


def test_the_judge_is_saved_and_loaded(tiny, tmp_path):
    clip = CLIP(tiny.tokenizer, tiny.text_encoder, tiny.image_encoder)
    clip.save(tmp_path / "judge")
    again, tokens = CLIP.load(tmp_path / "judge"), tiny.tokenizer(PROMPTS)
    with torch.no_grad():
        assert torch.equal(again.text_features(tokens), clip.text_features(tokens))


@pytest.mark.parametrize("config", [SHAPES, SD1, TINY], ids=lambda config: config.name)
def test_a_config_survives_json(config):
    assert Config.from_dict(json.loads(json.dumps(dataclasses.asdict(config)))) == config


# ---- Apple's GPU has no float64, half-precision models exist ----

@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nothing_but_the_schedules_table_is_float64(tiny, dtype):
    seen = set()
    model = tiny.to(dtype)
    for module in model.modules():
        module.register_forward_hook(lambda module, args, out: seen.update({out.dtype} if isinstance(out, torch.Tensor) else ()))
    x = model.generate(PROMPTS, steps=2, generator=torch.Generator().manual_seed(0))
    assert seen == {dtype, torch.float32} and x.dtype == torch.float32  # the walk between the U-Net's passes keeps its digits
    x = x.to(dtype)
    noised = NoiseSchedule().add_noise(x, torch.tensor([3, 5]), x)
    assert noised.dtype == dtype
