"""Every loss, against its definition, brute force, or the package that published it."""

import copy
import math
import sys
import types

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import reference
from ldm_minimal import (Gaussian, ImageConfig, ImageEncoder, PatchDiscriminator, PerceptualLoss, adaptive_weight, autoencoder_loss,
                         clip_loss, discriminator_loss)
from ldm_minimal.stable_diffusion import published_lpips

close = torch.testing.assert_close


def noise(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).double()


# ---- the posterior ----

def test_kl_is_that_of_torch_distributions():
    posterior = Gaussian(noise(3, 8, 2, 5))
    expected = torch.distributions.kl_divergence(torch.distributions.Normal(posterior.mean, (posterior.logvar / 2).exp()),
                                                 torch.distributions.Normal(0.0, 1.0))
    close(posterior.kl(), expected.sum(dim=(1, 2, 3)).float())


@pytest.mark.parametrize("mean, logvar, nats", [
    (0.0, 0.0, 0.0), (2.0, 0.0, 2.0), (0.0, 1.0, (math.e - 2) / 2), (-1.0, -30.0, (1 + math.exp(-30) - 1 + 30) / 2)])
def test_kl_by_hand(mean, logvar, nats):
    moments = torch.tensor([mean, logvar]).view(1, 2, 1, 1)
    assert Gaussian(moments).kl().item() == pytest.approx(nats)
    assert Gaussian(moments.expand(2, 2, 3, 4)).kl().tolist() == pytest.approx([12 * nats] * 2)


def test_kl_in_half_precision_is_summed_in_float32():
    moments = noise(1, 8, 64, 64).half()
    assert Gaussian(moments).kl().item() == pytest.approx(Gaussian(moments.double()).kl().item(), rel=1e-4)


def test_logvar_is_clamped():
    posterior = Gaussian(torch.tensor([0.0, 0, 0, 0, -99, -30, 20, 99]).view(1, 8, 1, 1))
    assert posterior.logvar.flatten().tolist() == [-30, -30, 20, 20]


def test_sample_is_mean_and_std_of_the_noise():
    moments, eps = noise(2, 6, 4, 4).requires_grad_(), noise(2, 3, 4, 4, seed=1)
    mean, logvar = moments[:, :3], moments[:, 3:]
    z = Gaussian(moments).sample(eps)
    close(z, mean + logvar.exp().sqrt() * eps)
    gradient, = torch.autograd.grad(z.sum(), moments)
    close(gradient, torch.cat([torch.ones_like(eps), (eps * (logvar / 2).exp() / 2).detach()], dim=1))


# ---- the adaptive weight ----

def two_losses():
    """A last layer w, and two losses of it whose gradients are known: 2 w and the constant c."""
    w, c = noise(3, 4, 2, 2).requires_grad_(), noise(3, 4, 2, 2, seed=1)
    return w, c, (w**2).sum(), (c * w).sum()


def test_adaptive_weight_is_the_ratio_of_gradients():
    w, c, reconstruction, adversarial = two_losses()
    weight = adaptive_weight(reconstruction, adversarial, w)
    close(weight, (2 * w).detach().norm().float() / (c.norm().float() + 1e-4))
    assert weight.shape == () and not weight.requires_grad


def test_adaptive_weight_makes_the_adversary_pull_as_hard():
    w, _, reconstruction, adversarial = two_losses()
    pull = torch.autograd.grad(adaptive_weight(reconstruction, adversarial, w) * adversarial, w)[0].norm()
    assert pull.item() == pytest.approx((2 * w).norm().item(), rel=1e-3)


@pytest.mark.parametrize("scale", [1e-2, 1e3])
def test_adaptive_weight_ignores_a_scale_of_both(scale):
    w, c, reconstruction, adversarial = two_losses()
    expected = 2 * scale * w.detach().norm() / (scale * c.norm() + 1e-4)
    assert adaptive_weight(scale * reconstruction, scale * adversarial, w).item() == pytest.approx(expected.item(), rel=1e-5)
    assert expected.item() == pytest.approx((2 * w.norm() / c.norm()).item(), rel=2e-3)


def test_adaptive_weight_is_at_most_ten_thousand():
    w, _, reconstruction, adversarial = two_losses()
    assert adaptive_weight(reconstruction, 1e-9 * adversarial, w).item() == 1e4
    assert adaptive_weight(0 * reconstruction, adversarial, w).item() == 0


# ---- the autoencoder's loss ----

class Judge(nn.Module):
    def forward(self, x):
        return (x[:, :1] ** 2 - x[:, 1:2])[:, :, ::2, ::2]


@pytest.fixture
def drawn():
    """A picture, its reconstruction by a linear last layer, and the posterior."""
    w, h, x = noise(3, 5, 1, 1).requires_grad_(), noise(2, 5, 4, 6, seed=1), noise(2, 3, 4, 6, seed=2)
    return x, F.conv2d(h, w), Gaussian(noise(2, 8, 2, 3, seed=3)), w


def distance(x, y):
    return ((x - y) ** 4).mean(dim=(1, 2, 3))


def test_autoencoder_loss_by_hand(drawn):
    x, x_hat, posterior, w = drawn
    reconstruction = sum((x[b] - x_hat[b]).abs().sum() + 0.3 * 72 * ((x[b] - x_hat[b]) ** 4).mean() for b in range(2)) / 2
    kl = sum(0.5 * (posterior.mean[b] ** 2 + posterior.logvar[b].exp() - 1 - posterior.logvar[b]).sum() for b in range(2)) / 2
    adversarial = -Judge()(x_hat).mean()
    gradients = [torch.autograd.grad(loss, w, retain_graph=True)[0].norm() for loss in (reconstruction, adversarial)]
    weight = gradients[0] / (gradients[1] + 1e-4)
    loss, parts = autoencoder_loss(x, x_hat, posterior, distance, Judge(), w, kl_weight=0.01, perceptual_weight=0.3, adversarial_weight=0.2)
    assert loss.item() == pytest.approx((reconstruction + 0.01 * kl + 0.2 * weight * adversarial).item(), rel=1e-5)
    expected = {"l1": (x - x_hat).abs().mean(), "perceptual": distance(x, x_hat).mean(), "kl": kl, "adversarial": adversarial, "weight": weight}
    assert {k: v.item() for k, v in parts.items()} == pytest.approx({k: v.item() for k, v in expected.items()}, rel=1e-5)
    assert not any(part.requires_grad for part in parts.values())


def test_autoencoder_loss_sends_no_gradient_through_the_weight(drawn):
    x, x_hat, posterior, w = drawn
    loss, parts = autoencoder_loss(x, x_hat, posterior, None, Judge(), w, kl_weight=0.0)
    plain = (x - x_hat).abs().sum() / 2 - 0.5 * parts["weight"] * Judge()(x_hat).mean()
    close(*[torch.autograd.grad(l, w, retain_graph=True)[0] for l in (loss, plain)])


def test_autoencoder_loss_defaults(drawn):
    x, x_hat, posterior, w = drawn
    default, _ = autoencoder_loss(x, x_hat, posterior, distance, Judge(), w)
    given, _ = autoencoder_loss(x, x_hat, posterior, distance, Judge(), w, kl_weight=1e-6, perceptual_weight=1.0, adversarial_weight=0.5)
    assert default.item() == given.item()


def test_autoencoder_loss_without_network_or_adversary_is_l1_and_kl(drawn):
    x, x_hat, posterior, _ = drawn
    loss, parts = autoencoder_loss(x, x_hat, posterior, kl_weight=0.5)
    assert loss.item() == pytest.approx(((x - x_hat).abs().sum() / 2 + 0.5 * posterior.kl().mean()).item())
    assert set(parts) == {"l1", "perceptual", "kl"} and parts["perceptual"] == 0


def test_autoencoder_loss_does_not_grow_with_the_batch(drawn):
    x, x_hat, posterior, w = drawn
    twice = Gaussian(torch.cat([torch.cat([posterior.mean, posterior.logvar], dim=1)] * 2))
    once = autoencoder_loss(x, x_hat, posterior, distance, kl_weight=0.1)[0]
    close(autoencoder_loss(torch.cat([x, x]), torch.cat([x_hat, x_hat]), twice, distance, kl_weight=0.1)[0], once)


# ---- the discriminator ----

def test_discriminator_loss_by_hand():
    real, fake = torch.tensor([2.0, 1.0, 0.5, -1.0]), torch.tensor([[-3.0], [0.0]])
    assert discriminator_loss(real, fake).item() == pytest.approx(0.5 * ((0 + 0 + 0.5 + 2) / 4 + (0 + 1) / 2))


def test_discriminator_loss_leaves_alone_who_is_right_by_a_margin():
    real, fake = torch.tensor([1.5, 0.9]).requires_grad_(), torch.tensor([-1.5, -0.9]).requires_grad_()
    discriminator_loss(real, fake).backward()
    assert real.grad.tolist() == [0, -0.25] and fake.grad.tolist() == [0, 0.25]


def test_a_pictures_verdict_does_not_depend_on_its_neighbours():
    judge = reference.randomise(PatchDiscriminator(16, 2), torch.Generator().manual_seed(0)).double().train()
    x = noise(4, 3, 32, 32)
    close(judge(x)[1:2], judge(x[1:2]))
    assert judge(x).shape == (4, 1, 6, 6) and judge(x).std() > 0.1


@pytest.mark.parametrize("layers, patch", [(1, 16), (2, 34), (3, 70)])
def test_a_logit_sees_a_patch(layers, patch):
    """Isola et al., app. 6.1: three layers see 70 x 70. Measured without the norms, whose statistics are the whole picture's."""
    judge = reference.randomise(PatchDiscriminator(8, layers), torch.Generator().manual_seed(0))
    judge.net = nn.Sequential(*[nn.Identity() if isinstance(part, nn.GroupNorm) else part for part in copy.deepcopy(judge.net)]).double()
    x = noise(1, 3, 160, 160).requires_grad_()
    logits = judge(x)
    middle = logits.shape[-1] // 2
    seen = torch.autograd.grad(logits[0, 0, middle, middle], x)[0][0].abs().sum(dim=0) > 0
    rows, columns = seen.any(dim=1).nonzero().flatten(), seen.any(dim=0).nonzero().flatten()
    assert [len(rows), len(columns)] == [patch, patch] and rows[-1] - rows[0] == columns[-1] - columns[0] == patch - 1
    assert rows[0] > 0 and rows[-1] < 159


# ---- CLIP's loss ----

def clip_loss_by_loops(images, captions, scale):
    score, n, total = lambda i, j: scale * sum(a * b for a, b in zip(images[i], captions[j])), len(images), 0.0  # noqa: E731
    for i in range(n):
        total -= score(i, i) - math.log(sum(math.exp(score(i, j)) for j in range(n)))  # the caption of picture i
        total -= score(i, i) - math.log(sum(math.exp(score(j, i)) for j in range(n)))  # the picture of caption i
    return total / (2 * n)


@pytest.mark.parametrize("scale", [1.0, 7.5])
def test_clip_loss_by_loops(scale):
    images, captions = F.normalize(noise(5, 8), dim=-1), F.normalize(noise(5, 8, seed=1), dim=-1)
    assert clip_loss(images, captions, scale).item() == pytest.approx(clip_loss_by_loops(images.tolist(), captions.tolist(), scale))


def test_clip_loss_is_least_where_features_match():
    captions = torch.eye(6).double()
    best = clip_loss(captions, captions, 10.0).item()
    assert best == pytest.approx(math.log(1 + 5 * math.exp(-10)))
    for shift in range(1, 6):
        assert clip_loss(captions.roll(shift, 0), captions, 10.0) > best + 1
    for seed in range(5):
        assert clip_loss(F.normalize(captions + 0.3 * noise(6, 6, seed=seed), dim=-1), captions, 10.0) > best


def test_clip_loss_of_features_that_say_nothing_is_a_guess():
    same = F.normalize(torch.ones(6, 4), dim=-1)
    assert clip_loss(same, same, 10.0).item() == pytest.approx(math.log(6))


# ---- the perceptual loss ----

def vgg16_features():
    layers, c = [], 3
    for width in [64, 64, "pool", 128, 128, "pool", 256, 256, 256, "pool", 512, 512, 512, "pool", 512, 512, 512, "pool"]:
        layers += [nn.MaxPool2d(2)] if width == "pool" else [nn.Conv2d(c, width, 3, padding=1), nn.ReLU()]
        c = c if width == "pool" else width
    return nn.Sequential(*layers)


@pytest.fixture(scope="module")
def published():
    """The `lpips` package with its own linear weights, on a random VGG16; and that VGG16, named as torchvision names it."""
    features = reference.randomise(vgg16_features(), torch.Generator().manual_seed(0))
    with torch.no_grad():
        for layer in features:
            if isinstance(layer, nn.Conv2d):
                layer.weight.mul_(2**0.5)  # He's initialisation: activations keep their size through ReLU
    package, models = types.ModuleType("torchvision"), types.ModuleType("torchvision.models")
    package.models, models.vgg16 = models, lambda pretrained: types.SimpleNamespace(features=features)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "torchvision", package)
        patch.setitem(sys.modules, "torchvision.models", models)
        lpips = pytest.importorskip("lpips", reason="the Makefile installs lpips alone: pip install --no-deps lpips")
        theirs = lpips.LPIPS(net="vgg", version="0.1", pnet_rand=True, verbose=False).double()
    return theirs, {f"features.{name}": tensor for name, tensor in features.state_dict().items()}


@pytest.fixture(scope="module")
def ours(published):
    return published_lpips(published[1], published[0].state_dict())


@pytest.mark.parametrize("size", [(32, 32), (48, 35)])
@torch.no_grad()
def test_vgg_distance_is_lpips(published, ours, size):
    x, y = (noise(3, 3, *size, seed=seed).clamp(-1, 1) for seed in (0, 1))
    expected = published[0](x, y).flatten()
    assert (expected > 0.01).all()
    close(ours(x, y), expected, rtol=1e-6, atol=0)
    close(ours(x.float(), y.float()), expected.float(), rtol=1e-5, atol=1e-6)


def test_vgg_features_are_read_before_each_pooling(published, ours):
    x = noise(1, 3, 32, 32)
    expected = published[0].net(published[0].scaling_layer(x))
    maps = ours.features(x)
    assert [tuple(m.shape[1:]) for m in maps] == [(64, 32, 32), (128, 16, 16), (256, 8, 8), (512, 4, 4), (512, 2, 2)]
    for mine, theirs in zip(maps, expected, strict=True):
        close(mine, theirs, rtol=1e-5, atol=1e-6)  # lpips keeps its shift and scale in float32


def test_vgg_says_what_is_missing(published):
    with pytest.raises(ValueError, match="lacks lin3.model.1.weight;"):
        published_lpips(published[1], {k: v for k, v in published[0].state_dict().items() if not k.startswith("lin3")})
    with pytest.raises(ValueError, match="lacks features.0.weight"):
        published_lpips({}, published[0].state_dict())


@pytest.fixture(scope="module")
def clip_distance():
    tower = ImageEncoder(ImageConfig(8, (1, 2, 4), 4), 16)
    return PerceptualLoss(reference.randomise(tower, torch.Generator().manual_seed(0)).double().features)


@pytest.mark.parametrize("network", ["ours", "clip_distance"])
def test_perceptual_loss_is_a_distance(network, request):
    distance = request.getfixturevalue(network)
    x, y = noise(3, 3, 16, 16), noise(3, 3, 16, 16, seed=1)
    with torch.no_grad():
        assert torch.equal(distance(x, x), torch.zeros(3).double())
        close(distance(x, y), distance(y, x))
        assert (distance(x, y) > 1e-3).all()
        near = distance(x, x + 0.05 * (y - x))
        assert (near > 0).all() and (near < distance(x, y) / 2).all()


def test_perceptual_loss_by_hand():
    """Two layers; unit vectors at each position, weighted squares, channels summed, positions averaged, layers added."""
    maps = lambda x: [x[:, :2], 3 * x[:, 1:, ::2]]  # noqa: E731
    x, y, weights = noise(2, 3, 4, 4), noise(2, 3, 4, 4, seed=1), [torch.tensor([0.5, 2.0]), torch.tensor([1.0, 0.25])]
    for given, used in ((weights, weights), (None, [torch.ones(2)] * 2)):
        expected = torch.zeros(2).double()
        for a, b, w in zip(maps(x), maps(y), used):
            for i in range(a.shape[2]):
                for j in range(a.shape[3]):
                    u, v = (m[:, :, i, j] / m[:, :, i, j].norm(dim=1, keepdim=True) for m in (a, b))
                    expected += (w * (u - v) ** 2).sum(dim=1) / (a.shape[2] * a.shape[3])
        close(PerceptualLoss(maps, given)(x, y), expected, rtol=1e-6, atol=1e-8)


def test_perceptual_loss_does_not_see_brightness_of_features():
    maps = lambda x: [x]  # noqa: E731
    x = noise(2, 3, 4, 4)
    close(PerceptualLoss(maps)(x, 5 * x), torch.zeros(2).double(), rtol=0, atol=1e-7)
