"""Our networks, layer for layer and number for number, beside those of `diffusers` and `transformers`.

All weights are random (a fresh network is full of zeros, and zeros agree with anything). Each comparison runs in float32, to
the digits a forward pass keeps, and in float64, where one wrong eps in one norm shows.
"""

import json
import math
import warnings

import pytest
import torch
import torch.nn.functional as F
from transformers import CLIPTokenizer

import reference
from ldm_minimal import (SD1, SHAPES, Attention, Autoencoder, AutoencoderConfig, TextConfig, TextEncoder, Tokenizer,
                         TransformerBlock, UNet, UNetConfig)
from ldm_minimal.ldm import timestep_embedding

PRECISIONS = [pytest.param(torch.float32, 5e-5, id="float32"), pytest.param(torch.float64, 1e-10, id="float64")]
UNETS = {
    "shapes": SHAPES.unet,
    "sd1-like": UNetConfig(width=32, mult=(1, 2, 4, 4), blocks=2, attention=(0, 1, 2), heads=4, context_width=24, groups=8),
    "no attention above": UNetConfig(channels=3, width=16, mult=(1, 3), blocks=2, attention=(1,), heads=2, context_width=8, groups=4),
    "one level": UNetConfig(channels=8, width=32, mult=(1,), blocks=1, attention=(), heads=8, context_width=40, groups=32),
}
AUTOENCODERS = {
    "f=4": SHAPES.autoencoder,
    "f=8": AutoencoderConfig(width=16, mult=(1, 2, 4, 4), blocks=2, channels=4, groups=8),
    "f=2, c=6": AutoencoderConfig(width=8, mult=(2, 1), blocks=1, channels=6, groups=4),
}
TEXT = TextConfig(vocab_size=600, width=32, layers=3, heads=4)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def pair(ours, theirs, dtype):
    """Both with the same random weights."""
    reference.put(reference.randomise(ours, seeded()), theirs)
    return ours.to(dtype), theirs.to(dtype)


def assert_same(ours, theirs, tolerance):
    """Largest difference at most `tolerance` of the largest number."""
    assert ours.shape == theirs.shape
    assert theirs.std() > 0.01, "nothing to compare"
    error = ((ours - theirs).abs().max() / theirs.abs().max()).item()
    assert error <= tolerance, f"relative error {error:.2g}"


# ---- U-Net ----

def unets(name, dtype):
    return pair(UNet(UNETS[name]), reference.unet(UNETS[name]), dtype)


def unet_inputs(config, dtype, batch=3, size=(8, 16)):
    random = seeded(1)
    z = torch.randn(batch, config.channels, *size, generator=random).to(dtype)
    context = torch.randn(batch, 77, config.context_width, generator=random).to(dtype)
    return z, torch.tensor([0, 501, 999])[:batch], context


@pytest.mark.parametrize("name", UNETS)
@pytest.mark.parametrize("dtype, tolerance", PRECISIONS)
@torch.no_grad()
def test_unet_is_diffusers_unet(name, dtype, tolerance):
    ours, theirs = unets(name, dtype)
    z, t, context = unet_inputs(UNETS[name], dtype)
    assert_same(ours(z, t, context), theirs(z, t, context).sample, tolerance)


@pytest.mark.parametrize("name", ["shapes", "sd1-like"])
@torch.no_grad()
def test_unet_with_prepared_keys_and_values_is_diffusers_unet(name):
    ours, theirs = unets(name, torch.float64)
    z, t, context = unet_inputs(UNETS[name], torch.float64)
    prepared = ours.prepare(context)
    assert set(prepared) == set(ours.cross_attentions())
    assert_same(ours(z, t, prepared), theirs(z, t, context).sample, 1e-10)


@pytest.mark.parametrize("name", ["shapes", "sd1-like"])
def test_unet_gradients_are_diffusers_gradients(name):
    ours, theirs = unets(name, torch.float64)
    z, t, context = unet_inputs(UNETS[name], torch.float64, batch=2, size=(8, 8))
    weights = torch.randn(z.shape, generator=seeded(2)).double()
    inputs = [[x.clone().requires_grad_() for x in (z, context)] for _ in range(2)]
    (ours(inputs[0][0], t, inputs[0][1]) * weights).sum().backward()
    (theirs(inputs[1][0], t, inputs[1][1]).sample * weights).sum().backward()
    for mine, other in zip(*inputs):
        assert_same(mine.grad, other.grad, 1e-9)
    gradients = reference.translate({n: p.grad for n, p in ours.named_parameters()}, ours, theirs)
    expected = {n: p.grad for n, p in theirs.named_parameters()}
    assert gradients.keys() == expected.keys()
    for parameter, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[parameter], rtol=1e-7, atol=1e-9, msg=lambda m: f"{parameter}: {m}")  # noqa: B023


@torch.no_grad()
def test_unet_compiles_to_one_graph():
    """One that breaks in pieces cannot be a CUDA graph. Traced only: kernels take minutes to build."""
    unet = reference.randomise(UNet(SHAPES.unet), seeded()).eval()
    z, t, context = unet_inputs(SHAPES.unet, torch.float32)
    prepared = unet.prepare(context)
    compiled = torch.compile(unet, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(z, t, prepared), unet(z, t, prepared))


def test_timestep_embedding_by_hand():
    t = [0, 1, 999]
    expected = [[f(k * 10_000 ** (-i / 4)) for f in (math.cos, math.sin) for i in range(4)] for k in t]
    torch.testing.assert_close(timestep_embedding(torch.tensor(t), 8), torch.tensor(expected), rtol=0, atol=2e-4)  # 999 in float32


# ---- autoencoder ----

@pytest.mark.parametrize("name", AUTOENCODERS)
@pytest.mark.parametrize("dtype, tolerance", PRECISIONS)
@torch.no_grad()
def test_autoencoder_is_diffusers_autoencoder(name, dtype, tolerance):
    ours, theirs = pair(Autoencoder(AUTOENCODERS[name]), reference.autoencoder(AUTOENCODERS[name]), dtype)
    x = torch.rand(2, 3, 32, 48, generator=seeded(1)).to(dtype) * 2 - 1
    posterior, expected = ours.encode(x), theirs.encode(x).latent_dist
    assert ours.f == int(name[2]) and posterior.mean.shape[2:] == (32 // ours.f, 48 // ours.f)
    assert_same(posterior.mean, expected.mean, tolerance)
    assert_same(posterior.logvar, expected.logvar, tolerance)
    assert_same(ours.decode(expected.mean), theirs.decode(expected.mean).sample, tolerance)


@torch.no_grad()
def test_autoencoder_forward_decodes_the_mean_or_a_sample():
    autoencoder = reference.randomise(Autoencoder(SHAPES.autoencoder), seeded())
    x, eps = torch.rand(2, 3, 16, 16, generator=seeded(1)) * 2 - 1, torch.randn(2, 4, 4, 4, generator=seeded(2))
    posterior = autoencoder.encode(x)
    for given, z in ((None, posterior.mean), (eps, posterior.mean + (posterior.logvar / 2).exp() * eps)):
        x_hat, same = autoencoder(x, given)
        torch.testing.assert_close(x_hat, autoencoder.decode(z))
        torch.testing.assert_close(same.logvar, posterior.logvar)


def test_autoencoder_says_which_sizes_fit():
    with pytest.raises(ValueError, match="32 x 30.*multiples of f = 4"):
        Autoencoder(SHAPES.autoencoder).encode(torch.zeros(1, 3, 32, 30))


# ---- text tower ----

def token_batch():
    """77 tokens: start, some, end, and end for padding; the last caption fills its row."""
    tokens = torch.full((4, 77), 599)
    for row, n in zip(tokens, (0, 1, 20, 75)):
        row[0] = 598
        row[1:n + 1] = torch.randint(598, (n,), generator=seeded(n))
    return tokens


@pytest.mark.parametrize("dtype, tolerance", PRECISIONS)
@torch.no_grad()
def test_text_encoder_is_transformers_clip(dtype, tolerance):
    ours, theirs = pair(TextEncoder(TEXT), reference.text_encoder(TEXT), dtype)
    tokens = token_batch()
    context, expected = ours(tokens), theirs(tokens)
    assert context.shape == (4, 77, 32)
    assert_same(context, expected.last_hidden_state, tolerance)
    assert_same(ours.pool(tokens, context), expected.pooler_output, tolerance)


@torch.no_grad()
def test_text_encoder_sees_only_the_past():
    encoder, tokens = reference.randomise(TextEncoder(TEXT), seeded()).double(), token_batch()[2:3]
    changed = tokens.clone()
    changed[0, 12] = (tokens[0, 12] + 1) % 598
    before, after = encoder(tokens)[0], encoder(changed)[0]
    torch.testing.assert_close(before[:12], after[:12], rtol=0, atol=1e-12)
    assert ((before[12:] - after[12:]).abs().max(dim=-1).values > 1e-4).all()


# ---- tokenizer ----

CAPTIONS = [
    "a red circle", "A Red Circle", "a large blue striped square to the left of a small green star", "", " ", "   ", "\n", "a",
    "a  red\tcircle\n\non   grey", "  leading and trailing  ", "no\u00a0break\u2003space", "zero\u200bwidth", "tab\tand\r\nreturn",
    "don't", "it's we've I'm they'll he'd you're can't", "IT'S WE'VE", "''s", "'", "rock 'n' roll", "the 1990s' best", "o'clock", "don\u2019t",
    "3 circles and 12 squares", "1234567890", "3.14159", "\u00bd cup, \u2163 kings", "1,000,000", "v2.0-beta", "x1y2z3", "\u0663\u0664\u0665",
    "caf\u00e9 cre\u0300me br\u00fbl\u00e9e", "na\u00efve fa\u00e7ade", "e\u0301 and \u00e9", "STRA\u00dfE \u0130stanbul \u01c5", "\u00c5ngstr\u00f6m \u212b", "A\u0308",
    "\u732b\u3068\u72ac", "\u041a\u0440\u0430\u0441\u043d\u044b\u0439 \u043a\u0440\u0443\u0433", "\u0645\u0631\u0628\u0639 \u0623\u062d\u0645\u0631", "\u0928\u092e\u0938\u094d\u0924\u0947", "\ud55c\uad6d\uc5b4 \uadf8\ub9bc",
    "\U0001f600", "a cat \U0001f431\U0001f408 and a family \U0001f468\u200d\U0001f469\u200d\U0001f467", "\U0001f44d\U0001f3fd thumbs", "\u2764\ufe0f", "\U0001f1ec\U0001f1e7",
    "hello, world!", "wait... what?!", "(red) [green] {blue}", "50% off & more", "a/b\\c|d", "#hash @at $5 ^ ~ `", "\"quoted\" \u201ccurly\u201d \u2014 dash",
    "semi;colon:colon", "under_score", "well-known state-of-the-art", "!!!???...", "C++ and C#", "http://example.com/a?b=c",
    "<|startoftext|>", "a <|endoftext|> b", "a <|EndOfText|> b", "</w>", "a</w> b</w>", "supercalifragilisticexpialidocious", "aaaaaaaaaaaaaaaaaaaaaaaa",
    "\x00\x01 control", "\ufeffbom", "\ufffd", "word " * 100, "circle," * 50, "x" * 300, "\U0001f600" * 30,
]


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    """Ours, trained on captions; and CLIP's, reading our vocabulary from the two files in which CLIP's is published."""
    corpus = [c for c in CAPTIONS for _ in range(3)] + [f"a {s} {c} square" for s in ("large", "small") for c in ("red", "blue", "green")]
    ours, folder = Tokenizer.train(corpus, 720), tmp_path_factory.mktemp("clip")
    (folder / "vocab.json").write_text(json.dumps(ours.vocab), encoding="utf-8")
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2"] + [" ".join(m) for m in ours.merges]) + "\n", encoding="utf-8")
    return ours, CLIPTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("caption", CAPTIONS, ids=lambda c: ascii(c)[:30])
def test_tokens_are_clip_tokens(tokenizers, caption):
    ours, theirs = tokenizers
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # too long: said, and tested, elsewhere
        tokens = ours([caption])
    expected = theirs([caption], padding="max_length", truncation=True, max_length=77).input_ids
    assert tokens.tolist() == expected


def test_tokenizer_merges_and_numbers_its_vocabulary_like_clip(tokenizers):
    ours, theirs = tokenizers
    assert sorted(ours.vocab.values()) == list(range(720)) and len(ours.merges) == 720 - 514
    assert ours.vocab == theirs.get_vocab()
    single = sorted(ours.vocab, key=ours.vocab.get)[:512]
    assert single[:256] == sorted(single[:256]) and single[256:] == [byte + "</w>" for byte in single[:256]]
    assert (ours.start, ours.end) == (718, 719)
    assert ours.pieces("a large square") == ["a</w>", "large</w>", "square</w>"]


def test_tokenizer_says_what_it_cut_off(tokenizers):
    with pytest.warns(UserWarning, match="80 tokens, 75 fit; cut off: 'a a a a a'"):
        tokens = tokenizers[0](["a " * 79 + "a"])
    assert tokens.shape == (1, 77) and tokens[0, -1] == tokenizers[0].end and (tokens[0, 1:76] == tokenizers[0].vocab["a</w>"]).all()


# ---- full size ----

@pytest.mark.parametrize("build, config, count, theirs", [
    pytest.param(UNet, SD1.unet, 859_520_964, reference.unet, id="unet"),
    pytest.param(Autoencoder, SD1.autoencoder, 83_653_863, reference.autoencoder, id="autoencoder"),
    pytest.param(TextEncoder, SD1.text, 123_060_480, reference.text_encoder, id="text encoder"),
])
def test_full_size_is_stable_diffusion_1(build, config, count, theirs):
    with torch.device("meta"):
        ours, theirs = build(config), theirs(config)
    assert sum(p.numel() for p in ours.parameters()) == count
    shapes = lambda state: {name: tensor.shape for name, tensor in state.items()}  # noqa: E731
    assert shapes(reference.translate(ours.state_dict(), ours, theirs)) == shapes(theirs.state_dict())


# ---- attention ----

def attention_by_loops(attention, x, context):
    """softmax(q k / sqrt(d)) v, one number at a time."""
    (q, (k, v)), d = (attention.query(x), attention.key_value(context).chunk(2, dim=-1)), x.shape[-1] // attention.heads
    h, weights = torch.zeros_like(q), torch.zeros(len(x), attention.heads, x.shape[1], context.shape[1], dtype=x.dtype)
    for b in range(len(x)):
        for head in range(attention.heads):
            mine = slice(head * d, (head + 1) * d)
            for n in range(x.shape[1]):
                seen = n + 1 if attention.causal else context.shape[1]
                powers = [math.exp(sum(q[b, n, mine] * k[b, m, mine]) / math.sqrt(d)) for m in range(seen)]
                for m in range(seen):
                    weights[b, head, n, m] = powers[m] / sum(powers)
                    h[b, n, mine] += weights[b, head, n, m] * v[b, m, mine]
    return attention.out(h), weights


@pytest.mark.parametrize("case", ["self", "cross", "causal"])
@torch.no_grad()
def test_attention_by_loops_by_matrices_and_fused(case):
    context_width = 10 if case == "cross" else None
    attention = Attention(12, context_width, heads=3, bias=case == "causal", causal=case == "causal")
    reference.randomise(attention, seeded()).double()
    x = torch.randn(2, 5, 12, generator=seeded(1)).double()
    context = torch.randn(2, 7, 10, generator=seeded(2)).double() if case == "cross" else None
    expected, weights = attention_by_loops(attention, x, x if context is None else context)
    fused = attention(x, context)
    assert attention.weights is None
    attention.keep_weights = True
    matrices = attention(x, context)
    torch.testing.assert_close(fused, expected)
    torch.testing.assert_close(matrices, expected)
    torch.testing.assert_close(attention.weights, weights)
    torch.testing.assert_close(attention.weights.sum(dim=-1), torch.ones(2, 3, 5).double())
    if case == "causal":
        assert torch.equal(attention.weights > 0, torch.ones(5, 5).tril().bool().expand(2, 3, 5, 5))


@torch.no_grad()
def test_kept_weights_do_not_change_the_unet():
    unet = reference.randomise(UNet(SHAPES.unet), seeded()).double()
    z, t, context = unet_inputs(SHAPES.unet, torch.float64)
    expected = unet(z, t, context)
    for attention in unet.cross_attentions():
        attention.keep_weights = True
    assert_same(unet(z, t, context), expected, 1e-10)
    positions = [128, 32, 32, 32, 32, 128, 128]  # of 8 x 16: down, the middle, and up again
    assert [a.weights.shape for a in unet.cross_attentions()] == [(3, 4, n, 77) for n in positions]


@torch.no_grad()
def test_cross_attentions_are_listed_in_the_order_in_which_they_run():
    unet, ran = UNet(UNETS["sd1-like"]), []
    for attention in unet.cross_attentions():
        attention.register_forward_hook(lambda module, *_: ran.append(module))
    unet(*unet_inputs(UNETS["sd1-like"], torch.float32))
    assert len(ran) == 16 and all(a is b for a, b in zip(ran, unet.cross_attentions(), strict=True))


def test_attention_says_when_heads_do_not_divide_width():
    with pytest.raises(ValueError, match="heads is 5.*width, 12"):
        Attention(12, heads=5)


def test_geglu_is_value_times_gelu_of_gate():
    block = reference.randomise(TransformerBlock(8, 4, heads=2, groups=2), seeded()).double()
    for silent in (block.attend_self.out, block.attend_cross.out, block.norm_mlp):
        torch.nn.init.zeros_(silent.weight)
    for silent in (block.attend_self.out, block.attend_cross.out):
        torch.nn.init.zeros_(silent.bias)
    torch.nn.init.constant_(block.norm_mlp.bias, 0.5)  # so the input of the feed-forward is 0.5 everywhere
    x, context = torch.randn(1, 8, 2, 3, generator=seeded(1)).double(), torch.randn(1, 5, 4, generator=seeded(2)).double()
    n = torch.full((8,), 0.5).double()
    h = block.project_in(block.norm(x).permute(0, 2, 3, 1)) + block.mlp_out(block.mlp_value(n) * F.gelu(block.mlp_gate(n)))
    torch.testing.assert_close(block(x, context), x + block.project_out(h).permute(0, 3, 1, 2))
