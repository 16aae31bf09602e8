"""Our networks beside those of `diffusers` and `transformers`, number for number.

All weights are random: a fresh network has zeros in it, and zeros agree with anything. Each network
is compared in float32, to the digits that a forward pass keeps, and in float64, where one wrong eps
in one norm shows.
"""

import math

import pytest
import torch
import torch.nn.functional as F

import reference
from ldm_minimal import (
    SD1,
    SHAPES,
    Attention,
    Autoencoder,
    AutoencoderConfig,
    TextConfig,
    TextEncoder,
    TransformerBlock,
    UNet,
    UNetConfig,
    timestep_embedding,
)
from random_weights import randomise, seeded
from reference import assert_same

PRECISIONS = [
    pytest.param(torch.float32, 2e-5, id="float32"),
    pytest.param(torch.float64, 1e-12, id="float64"),
]
UNETS = {
    "shapes": SHAPES.unet,
    "sd1-like": UNetConfig(width=32, num_heads=4, context_width=24, num_groups=8),
    "no attention above": UNetConfig(
        latent_channels=3,
        width=16,
        channel_mult=(1, 3),
        attention_levels=(1,),
        num_heads=2,
        context_width=8,
        num_groups=4,
    ),
    "one level": UNetConfig(
        latent_channels=8,
        width=32,
        channel_mult=(1,),
        num_res_blocks=1,
        attention_levels=(),
        context_width=40,
    ),
}
AUTOENCODERS = {
    "f=4": SHAPES.autoencoder,
    "f=8": AutoencoderConfig(width=16, num_groups=8),
    "f=2, c=6": AutoencoderConfig(
        width=8, channel_mult=(2, 1), num_res_blocks=1, latent_channels=6, num_groups=4
    ),
}
TEXT = TextConfig(vocab_size=600, width=32, num_layers=3, num_heads=4)


def with_same_weights(ours, theirs, dtype):
    theirs = reference.put(randomise(ours, seeded()), theirs)
    return ours.to(dtype), theirs.to(dtype)


# ---- U-Net -------------------------------------------------------------------------------------


def unets(name, dtype):
    config = UNETS[name]
    return with_same_weights(UNet(config), reference.unet(config), dtype)


def unet_inputs(config, dtype, batch=3, size=(8, 16)):
    generator = seeded(1)
    z = torch.randn(batch, config.latent_channels, *size, generator=generator).to(dtype)
    t = torch.tensor([0, 501, 999])[:batch]
    context = torch.randn(batch, 77, config.context_width, generator=generator).to(dtype)
    return z, t, context


@pytest.mark.parametrize("name", UNETS)
@pytest.mark.parametrize("dtype, tolerance", PRECISIONS)
@torch.no_grad()
def test_unet_is_diffusers_unet(name, dtype, tolerance):
    ours, theirs = unets(name, dtype)
    z, t, context = unet_inputs(UNETS[name], dtype)
    assert_same(ours(z, t, context), theirs(z, t, context).sample, tolerance)


@pytest.mark.parametrize("name", ["shapes", "sd1-like"])
@torch.no_grad()
def test_unet_with_keys_and_values_made_beforehand_is_diffusers_unet(name):
    ours, theirs = unets(name, torch.float64)
    z, t, context = unet_inputs(UNETS[name], torch.float64)
    kvs = ours.keys_values(context)
    assert len(kvs) == len(ours.cross_attentions())
    assert_same(ours(z, t, kvs), theirs(z, t, context).sample, 1e-12)


@pytest.mark.parametrize("name", ["shapes", "sd1-like"])
def test_unet_gradients_are_diffusers_gradients(name):
    ours, theirs = unets(name, torch.float64)
    z, t, context = unet_inputs(UNETS[name], torch.float64, batch=2, size=(8, 8))
    direction = torch.randn(z.shape, generator=seeded(2)).double()
    our_z, our_context = z.clone().requires_grad_(), context.clone().requires_grad_()
    their_z, their_context = z.clone().requires_grad_(), context.clone().requires_grad_()

    (ours(our_z, t, our_context) * direction).sum().backward()
    (theirs(their_z, t, their_context).sample * direction).sum().backward()

    assert_same(our_z.grad, their_z.grad, 1e-12)
    assert_same(our_context.grad, their_context.grad, 1e-12)
    gradients = {name: parameter.grad for name, parameter in ours.named_parameters()}
    expected = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    torch.testing.assert_close(
        reference.translate(gradients, ours, theirs), expected, rtol=1e-9, atol=1e-12
    )


@pytest.mark.slow
@torch.no_grad()
def test_unet_compiles_to_one_graph():
    """Several graphs could not be one CUDA graph. Only traced: kernels take minutes to build."""
    unet = randomise(UNet(SHAPES.unet), seeded()).eval()
    z, t, context = unet_inputs(SHAPES.unet, torch.float32)
    kvs = unet.keys_values(context)
    compiled = torch.compile(unet, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(z, t, kvs), unet(z, t, kvs))


def test_timestep_embedding_by_hand():
    expected = []
    for t in (0, 1, 999):
        angles = [t * 10_000 ** (-i / 4) for i in range(4)]
        expected.append([math.cos(a) for a in angles] + [math.sin(a) for a in angles])
    embedding = timestep_embedding(torch.tensor([0, 1, 999]), 8)
    float32_at_999 = 2e-4
    torch.testing.assert_close(embedding, torch.tensor(expected), rtol=0, atol=float32_at_999)


# ---- autoencoder -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", AUTOENCODERS)
@pytest.mark.parametrize("dtype, tolerance", PRECISIONS)
@torch.no_grad()
def test_autoencoder_is_diffusers_autoencoder(name, dtype, tolerance):
    config = AUTOENCODERS[name]
    ours, theirs = with_same_weights(Autoencoder(config), reference.autoencoder(config), dtype)
    x = torch.rand(2, 3, 32, 48, generator=seeded(1)).to(dtype) * 2 - 1
    posterior = ours.encode(x)
    expected = theirs.encode(x).latent_dist
    assert ours.f == int(name[2])
    assert posterior.mean.shape[2:] == (32 // ours.f, 48 // ours.f)
    assert_same(posterior.mean, expected.mean, tolerance)
    assert_same(posterior.logvar, expected.logvar, tolerance)
    assert_same(ours.decode(expected.mean), theirs.decode(expected.mean).sample, tolerance)


@torch.no_grad()
def test_autoencoder_forward_decodes_the_mean_or_a_sample():
    autoencoder = randomise(Autoencoder(SHAPES.autoencoder), seeded())
    x = torch.rand(2, 3, 16, 16, generator=seeded(1)) * 2 - 1
    eps = torch.randn(2, 4, 4, 4, generator=seeded(2))
    posterior = autoencoder.encode(x)
    sample = posterior.mean + (posterior.logvar / 2).exp() * eps
    for given, z in ((None, posterior.mean), (eps, sample)):
        x_hat, same_posterior = autoencoder(x, given)
        torch.testing.assert_close(x_hat, autoencoder.decode(z))
        torch.testing.assert_close(same_posterior.logvar, posterior.logvar)


def test_autoencoder_says_which_sizes_fit():
    with pytest.raises(ValueError, match="32 x 30.*multiples of f = 4"):
        Autoencoder(SHAPES.autoencoder).encode(torch.zeros(1, 3, 32, 30))


# ---- text tower --------------------------------------------------------------------------------


def token_batch():
    """77 tokens: start, some, end, and end for padding; the last caption fills its row."""
    start, end = 598, 599
    tokens = torch.full((4, 77), end)
    for row, length in zip(tokens, (0, 1, 20, 75)):
        row[0] = start
        row[1 : length + 1] = torch.randint(start, (length,), generator=seeded(length))
    return tokens


@pytest.mark.parametrize("dtype, tolerance", PRECISIONS)
@torch.no_grad()
def test_text_encoder_is_transformers_clip(dtype, tolerance):
    ours, theirs = with_same_weights(TextEncoder(TEXT), reference.text_encoder(TEXT), dtype)
    tokens = token_batch()
    context = ours(tokens)
    expected = theirs(tokens)
    assert context.shape == (4, 77, 32)
    assert_same(context, expected.last_hidden_state, tolerance)
    assert_same(ours.pool(tokens, context), expected.pooler_output, tolerance)


@torch.no_grad()
def test_text_encoder_sees_only_the_past():
    encoder = randomise(TextEncoder(TEXT), seeded()).double()
    tokens = token_batch()[2:3]
    changed = tokens.clone()
    changed[0, 12] = (tokens[0, 12] + 1) % 598
    before, after = encoder(tokens)[0], encoder(changed)[0]
    torch.testing.assert_close(before[:12], after[:12], rtol=0, atol=1e-12)
    assert ((before[12:] - after[12:]).abs().amax(dim=-1) > 1e-4).all()


# ---- full size ---------------------------------------------------------------------------------


def shapes(state):
    return {name: tensor.shape for name, tensor in state.items()}


@pytest.mark.parametrize(
    "build, config, count, build_theirs",
    [
        pytest.param(UNet, SD1.unet, 859_520_964, reference.unet, id="unet"),
        pytest.param(
            Autoencoder, SD1.autoencoder, 83_653_863, reference.autoencoder, id="autoencoder"
        ),
        pytest.param(TextEncoder, SD1.text, 123_060_480, reference.text_encoder, id="text encoder"),
    ],
)
def test_full_size_is_stable_diffusion_1(build, config, count, build_theirs):
    with torch.device("meta"):
        ours, theirs = build(config), build_theirs(config)
    assert sum(parameter.numel() for parameter in ours.parameters()) == count
    translated = reference.translate(ours.state_dict(), ours, theirs)
    assert shapes(translated) == shapes(theirs.state_dict())


# ---- attention ---------------------------------------------------------------------------------


def attention_by_loops(attention, x, context):
    """softmax(q k / sqrt(d)) v, one number at a time. Returns the output and the weights."""
    q = attention.to_q(x)
    k, v = attention.to_kv(context).chunk(2, dim=-1)
    batch, queries, width = x.shape
    d = width // attention.num_heads
    h = torch.zeros_like(q)
    weights = torch.zeros(batch, attention.num_heads, queries, context.shape[1], dtype=x.dtype)
    for b in range(batch):
        for head in range(attention.num_heads):
            own = slice(head * d, (head + 1) * d)
            for n in range(queries):
                seen = n + 1 if attention.causal else context.shape[1]
                scores = [sum(q[b, n, own] * k[b, m, own]) / math.sqrt(d) for m in range(seen)]
                total = sum(math.exp(score) for score in scores)
                for m, score in enumerate(scores):
                    weights[b, head, n, m] = math.exp(score) / total
                    h[b, n, own] += weights[b, head, n, m] * v[b, m, own]
    return attention.to_out(h), weights


@pytest.mark.parametrize("case", ["self", "cross", "causal"])
@torch.no_grad()
def test_attention_by_loops_by_matrices_and_fused(case):
    causal = case == "causal"
    context_width = 10 if case == "cross" else None
    attention = Attention(12, context_width, num_heads=3, bias=causal, causal=causal)
    randomise(attention, seeded()).double()
    x = torch.randn(2, 5, 12, generator=seeded(1)).double()
    context, kv = x, None
    if case == "cross":
        context = torch.randn(2, 7, 10, generator=seeded(2)).double()
        kv = attention.keys_values(context)
    expected, weights = attention_by_loops(attention, x, context)

    torch.testing.assert_close(attention(x, kv), expected)
    assert attention.weights is None
    attention.keep_weights = True
    torch.testing.assert_close(attention(x, kv), expected)
    torch.testing.assert_close(attention.weights, weights)
    torch.testing.assert_close(attention.weights.sum(dim=-1), torch.ones(2, 3, 5).double())
    if causal:
        past = torch.ones(5, 5).tril().bool()
        assert torch.equal(attention.weights > 0, past.expand(2, 3, 5, 5))


@torch.no_grad()
def test_kept_weights_do_not_change_the_unet():
    unet = randomise(UNet(SHAPES.unet), seeded()).double()
    z, t, context = unet_inputs(SHAPES.unet, torch.float64)
    expected = unet(z, t, context)
    for attention in unet.cross_attentions():
        attention.keep_weights = True
    assert_same(unet(z, t, context), expected, 1e-12)
    positions = [128, 32, 32, 32, 32, 128, 128]  # of 8 x 16: down, the middle, and up again
    shapes_of_weights = [attention.weights.shape for attention in unet.cross_attentions()]
    assert shapes_of_weights == [(3, 4, n, 77) for n in positions]


@torch.no_grad()
def test_cross_attentions_are_listed_in_the_order_in_which_they_run():
    unet = UNet(UNETS["sd1-like"])
    listed = unet.cross_attentions()
    ran = []
    for attention in listed:
        attention.register_forward_hook(lambda module, *_: ran.append(module))
    unet(*unet_inputs(UNETS["sd1-like"], torch.float32))
    assert len(ran) == 16
    assert [listed.index(attention) for attention in ran] == list(range(16))


def test_attention_says_when_heads_do_not_divide_width():
    with pytest.raises(ValueError, match="num_heads is 5.*width, 12"):
        Attention(12, num_heads=5)


def test_geglu_is_value_times_gelu_of_gate():
    block = randomise(TransformerBlock(8, 4, num_heads=2, num_groups=2), seeded()).double()
    for attention in (block.self_attn, block.cross_attn):
        torch.nn.init.zeros_(attention.to_out.weight)
        torch.nn.init.zeros_(attention.to_out.bias)
    torch.nn.init.zeros_(block.norm_mlp.weight)
    torch.nn.init.constant_(block.norm_mlp.bias, 0.5)  # then n is 0.5 everywhere
    x = torch.randn(1, 8, 2, 3, generator=seeded(1)).double()
    context = torch.randn(1, 5, 4, generator=seeded(2)).double()

    n = torch.full((8,), 0.5).double()
    geglu = block.mlp_out(block.mlp_value(n) * F.gelu(block.mlp_gate(n)))
    h = block.proj_in(block.norm(x).permute(0, 2, 3, 1)) + geglu
    expected = x + block.proj_out(h).permute(0, 3, 1, 2)
    torch.testing.assert_close(block(x, block.cross_attn.keys_values(context)), expected)
