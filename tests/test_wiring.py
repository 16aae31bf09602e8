"""How the networks are put together, where no other implementation is needed to know it.

tests/parity compares every output with other implementations.
"""

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F

from conftest import TINY, clip_of, randomise, seeded
from ldm_minimal import Attention, Autoencoder, ImageEncoder, LatentDiffusion, UNet, ldm, zero_init

close = torch.testing.assert_close


# ---- how networks start ------------------------------------------------------------------------


def test_zero_init_sets_weight_and_bias_to_zero():
    layer = torch.nn.Conv2d(3, 4, 3)
    assert zero_init(layer) is layer
    assert not layer.weight.any()
    assert not layer.bias.any()


@torch.no_grad()
def test_each_block_of_a_new_unet_is_the_identity():
    """Or its skip, where the number of channels changes; whatever the time and the caption."""
    unet = UNet(TINY.unet)
    t_emb, context = torch.randn(2, 128, generator=seeded()), torch.randn(2, 77, 16)
    blocks = [part for part in unet.modules() if isinstance(part, ldm.UNetBlock)]
    assert len(blocks) == 2 + 2 + 4  # down, middle, up
    for block in blocks:
        channels = block.res.norm1.num_channels
        h = torch.randn(2, channels, 8, 8, generator=seeded(1))
        kv = None
        if block.transformer is not None:
            kv = block.transformer.cross_attn.keys_values(context)
        assert torch.equal(block(h, t_emb, kv), block.res.skip(h))


@torch.no_grad()
def test_a_new_unet_predicts_no_noise():
    unet = UNet(TINY.unet)
    context = torch.randn(2, 77, 16)
    eps_hat = unet(torch.randn(2, 4, 8, 8), torch.tensor([1, 2]), context)
    assert torch.equal(eps_hat, torch.zeros(2, 4, 8, 8))


@torch.no_grad()
def test_a_new_posterior_has_a_small_standard_deviation():
    posterior = Autoencoder(TINY.autoencoder).encode(torch.randn(4, 3, 16, 16, generator=seeded()))
    assert posterior.logvar.mean().item() == pytest.approx(-6, abs=0.5)
    assert posterior.mean.mean().abs() < 0.5


def test_last_layer_is_the_weight_that_makes_the_pixels():
    autoencoder = Autoencoder(TINY.autoencoder)
    x_hat = autoencoder.decode(torch.randn(1, 4, 8, 8))
    (bias_gradient,) = torch.autograd.grad(x_hat.sum(), autoencoder.decoder[-1].bias)
    close(bias_gradient, torch.full((3,), 256.0))  # the last layer: each pixel has its bias in it
    assert autoencoder.last_layer is autoencoder.decoder[-1].weight


# ---- what reaches what -------------------------------------------------------------------------


@torch.no_grad()
def test_every_image_has_its_own_time_and_caption(tiny):
    z = torch.randn(3, 4, 8, 8, generator=seeded())
    t, context = torch.tensor([0, 500, 999]), tiny.embed(["a circle", "a red star", ""])
    together = tiny.unet(z, t, context)
    for i in range(3):
        one = slice(i, i + 1)
        close(together[one], tiny.unet(z[one], t[one], context[one]), atol=1e-5, rtol=1e-4)
    assert (together - tiny.unet(z, t.flip(0), context)).abs().amax(dim=(1, 2, 3))[0] > 1e-3
    assert (together - tiny.unet(z, t, context.flip(0))).abs().amax(dim=(1, 2, 3))[0] > 1e-4


@torch.no_grad()
def test_every_block_hears_of_the_time_and_every_transformer_of_the_caption(tiny):
    blocks = [part for part in tiny.unet.modules() if isinstance(part, ldm.UNetBlock)]
    for block in blocks:
        h = torch.randn(1, block.res.norm1.num_channels, 4, 4, generator=seeded())
        t_emb, other_t_emb = torch.randn(2, 1, 128, generator=seeded(1))
        assert not torch.allclose(block.res(h, t_emb), block.res(h, other_t_emb), atol=1e-4)
        if block.transformer is None:
            continue
        h = block.res(h, t_emb)
        kv, other_kv = (
            block.transformer.cross_attn.keys_values(torch.randn(1, 77, 16, generator=seeded(i)))
            for i in (2, 3)
        )
        assert not torch.allclose(block.transformer(h, kv), block.transformer(h, other_kv))


@torch.no_grad()
def test_the_way_up_receives_what_the_way_down_made_last_in_first_out():
    """Each map that is joined on the way up has the size of the level, and none is left over."""
    unet = randomise(UNet(TINY.unet), seeded())
    made, joined = [], []

    def down_called(module, inputs, output):
        made.append(output)

    def up_called(module, inputs):
        joined.append(inputs[0])

    unet.conv_in.register_forward_hook(down_called)
    for layer in unet.down:
        layer.register_forward_hook(down_called)
    for layer in unet.up:
        if isinstance(layer, ldm.UNetBlock):
            layer.register_forward_pre_hook(up_called)
    unet(torch.randn(1, 4, 8, 8, generator=seeded(1)), torch.tensor([7]), torch.randn(1, 77, 16))
    assert len(joined) == len(made)
    for skip, both in zip(reversed(made), joined):
        assert torch.equal(both[:, -skip.shape[1] :], skip)


@torch.no_grad()
def test_kept_attention_weights_are_those_that_were_used():
    attention = randomise(Attention(8, 6, num_heads=2), seeded())
    x, context = torch.randn(2, 5, 8, generator=seeded(1)), torch.randn(2, 7, 6)
    kv = attention.keys_values(context)
    plain = attention(x, kv)
    attention.keep_weights = True
    close(attention(x, kv), plain)
    assert attention.weights.shape == (2, 2, 5, 7)
    close(attention.weights.sum(dim=-1), torch.ones(2, 2, 5))


def test_heads_must_divide_the_width():
    with pytest.raises(ValueError, match="num_heads is 3; it must divide width, 8"):
        Attention(8, num_heads=3)


# ---- CLIP --------------------------------------------------------------------------------------


@torch.no_grad()
def test_text_features_are_those_of_the_first_end_token_among_all_77(tiny):
    """They are computed on the caption alone; what follows the first end token changes nothing."""
    clip = clip_of(tiny)
    captions = ["", "a star", "a small red circle above a large blue square"]
    tokens = tiny.tokenizer(captions)
    context = tiny.text_encoder(tokens)
    assert context.shape == (3, 77, 16)
    rows = []
    for i in range(3):
        first_end = tokens[i].tolist().index(tiny.tokenizer.end)
        rows.append(context[i, first_end])
    close(tiny.text_encoder.pool(tokens, context), torch.stack(rows))
    close(clip.text_features(tokens), F.normalize(torch.stack(rows), dim=-1))


@torch.no_grad()
def test_a_clip_gives_image_features_text_features_and_the_scale(tiny):
    clip = clip_of(tiny)
    x = torch.rand(2, 3, 16, 16, generator=seeded()) * 2 - 1
    tokens = tiny.tokenizer(["a star", "a red circle"])
    images, texts, scale = clip(x, tokens)
    close(images, F.normalize(tiny.image_encoder(x), dim=-1))
    close(texts, clip.text_features(tokens))
    assert scale.item() == pytest.approx(1 / 0.07)
    tiny.image_encoder.logit_scale.fill_(10.0)
    assert clip(x, tokens)[2].item() == pytest.approx(100)  # at most


@torch.no_grad()
def test_image_features_are_the_mean_over_positions(tiny):
    """So an image moved by a whole step of the last level, on a plain background, keeps them."""
    x = torch.zeros(2, 3, 64, 64)
    x[0, :, 24:32, 24:32] = 1
    x[1, :, 32:40, 28:36] = 1
    features = tiny.image_encoder(x)
    close(features[0], features[1], atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_pooled_in_fields_image_features_know_what_is_where():
    """pool 2: the projection sees the means of the four quarters, channel by channel."""
    config = dataclasses.replace(TINY.image, pool=2)
    encoder = ImageEncoder(config, TINY.text.width)
    x = torch.rand(2, 3, 16, 16, generator=seeded()) * 2 - 1
    h = F.silu(encoder.norm(encoder.features(x)[-1]))  # (2, 16, 8, 8)
    quarters = []
    for channel in range(h.shape[1]):
        for rows in (slice(0, 4), slice(4, 8)):
            for columns in (slice(0, 4), slice(4, 8)):
                quarters.append(h[:, channel, rows, columns].mean(dim=(1, 2)))
    expected = encoder.proj(torch.stack(quarters, dim=1))
    close(encoder(x), expected, rtol=1e-4, atol=1e-5)
    mirrored = encoder(x.flip(3))
    assert (encoder(x) - mirrored).abs().max() > 1e-3


def test_the_sizes_of_a_whole_model_fit_together():
    """f, latent size and widths follow from the config alone."""
    model = LatentDiffusion(TINY)
    assert model.autoencoder.f == 2
    assert model.unet.downsampling == 2
    assert model.image_encoder.proj.out_features == TINY.text.width
    assert model.image_encoder.logit_scale.item() == pytest.approx(math.log(1 / 0.07))
