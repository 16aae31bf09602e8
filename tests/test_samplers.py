"""Noise and its removal, against `diffusers`' schedulers and against what can be written down.

Every step of a sampler is linear: z' = c_z z + c_eps eps_hat + sigma noise. `coefficients` measures
the three numbers on the sampler itself. With them, means and variances go through a thousand steps
exactly, with no Monte Carlo.
"""

import dataclasses

import diffusers
import pytest
import torch

from conftest import noise, randomise, seeded
from ldm_minimal import (
    SHAPES,
    AutoencoderConfig,
    LatentDiffusion,
    NoiseSchedule,
    TextConfig,
    Tokenizer,
    UNetConfig,
    ddim_invert,
    ddim_sample,
    ddim_step,
    ddim_timesteps,
    ddpm_sample,
    ddpm_step,
    guided_eps,
    predict_z0,
)

KINDS = {
    "linear": {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02},
    "scaled-linear": {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
    "cosine": {"beta_schedule": "squaredcos_cap_v2"},
}
SPACINGS = {
    "leading": {"timestep_spacing": "leading", "steps_offset": 1, "set_alpha_to_one": False},
    "trailing": {"timestep_spacing": "trailing", "set_alpha_to_one": True},
}
SAMPLERS = {"ddpm": ddpm_sample, "ddim": ddim_sample}
MU = 1.7  # mean and standard deviation of the data, where they are Gaussian
S = 0.6
close = torch.testing.assert_close


def last(steps):
    """The z after the last step."""
    return list(steps)[-1][1]


def nonlinear(z, t):
    """Some prediction that depends on everything: all of an image's numbers, and the time."""
    mean = z.mean(dim=(1, 2, 3), keepdim=True)
    return torch.tanh(z.flip(-1) + 0.3 * mean) * (0.5 + t.view(-1, 1, 1, 1) / 1000) + 0.1 * z


def gaussian_eps(schedule, mu=MU, s=S):
    """E[eps | z_t] for data N(mu, s^2), with a = alpha_bar_t.

    It is sqrt(1 - a) (z_t - sqrt(a) mu) / (a s^2 + 1 - a).
    """

    def predict(z, t):
        a = schedule.alpha_bars[t].view(-1, *[1] * (z.ndim - 1))
        return (1 - a).sqrt() * (z - a.sqrt() * mu) / (a * s**2 + 1 - a)

    return predict


def alpha_bar_before(schedule, t):
    return schedule.alpha_bars[t - 1].item() if t else 1.0


# ---- schedules ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("T", [2, 10, 1000])
def test_schedule_tables_are_diffusers(kind, T):
    schedule = NoiseSchedule(kind, T)
    expected = diffusers.DDPMScheduler(num_train_timesteps=T, **KINDS[kind])
    close(schedule.betas.float(), expected.betas, rtol=2e-6, atol=1e-7)
    close(schedule.alpha_bars.float(), expected.alphas_cumprod, rtol=2e-5, atol=1e-9)
    assert schedule.betas.shape == (T,)
    assert schedule.betas.dtype == torch.float64
    assert schedule.alpha_bars.dtype == torch.float64


@pytest.mark.parametrize(
    "kind, first, final", [("linear", 1e-4, 0.02), ("scaled-linear", 0.00085, 0.012)]
)
def test_first_and_last_beta_are_the_papers(kind, first, final):
    betas = NoiseSchedule(kind).betas
    assert betas[[0, -1]].tolist() == pytest.approx([first, final], rel=1e-12)
    straight = betas if kind == "linear" else betas.sqrt()
    close(straight.diff(), straight.diff().mean().expand(999), rtol=1e-8, atol=0)


def test_default_schedule_is_stable_diffusion():
    close(NoiseSchedule().betas, NoiseSchedule("scaled-linear", 1000).betas)


@pytest.mark.parametrize("kind", KINDS)
def test_noise_step_by_step_is_noise_in_one(kind):
    """q(z_t | z_{t-1}) applied t times, as signal and variance, against add_noise's numbers."""
    schedule = NoiseSchedule(kind)
    one, zero = torch.ones(1).double(), torch.zeros(1).double()
    signal, variance = 1.0, 0.0
    for t, beta in enumerate(schedule.betas.tolist()):
        signal = signal * (1 - beta) ** 0.5
        variance = (1 - beta) * variance + beta
        now = torch.tensor([t])
        assert schedule.add_noise(one, now, zero).item() == pytest.approx(signal, rel=1e-9)
        assert schedule.add_noise(zero, now, one).item() == pytest.approx(variance**0.5, rel=1e-9)


def test_noise_step_by_step_by_monte_carlo():
    count = 100_000
    schedule, generator = NoiseSchedule("linear", 300), seeded()
    start = torch.full((count,), 2.0)
    z = start
    for beta in schedule.betas.tolist():
        z = (1 - beta) ** 0.5 * z + beta**0.5 * torch.randn(count, generator=generator)
    eps = torch.randn(count, generator=generator)
    in_one = schedule.add_noise(start, torch.full((count,), 299), eps)
    assert z.mean().item() == pytest.approx(in_one.mean().item(), abs=0.02)
    assert z.std().item() == pytest.approx(in_one.std().item(), abs=0.01)


def test_add_noise_gives_every_image_its_own_t():
    schedule, t = NoiseSchedule(), torch.tensor([0, 500, 999])
    z, eps = noise(3, 4, 2, 2), noise(3, 4, 2, 2, seed=1)
    z_t = schedule.add_noise(z, t, eps)
    for i in range(3):
        a = schedule.alpha_bars[t[i]].item()
        close(z_t[i], a**0.5 * z[i] + (1 - a) ** 0.5 * eps[i])
    assert schedule.add_noise(z.float(), t, eps.float()).dtype == torch.float32


def test_snr_is_signal_power_over_noise_power():
    schedule, t = NoiseSchedule("cosine", 50), torch.arange(50)
    one, zero = torch.ones(50).double(), torch.zeros(50).double()
    signal = schedule.add_noise(one, t, zero)
    noise_level = schedule.add_noise(zero, t, one)
    close(schedule.snr(), (signal / noise_level) ** 2)


# ---- diffusers' schedulers ---------------------------------------------------------------------


def in_double(scheduler, schedule):
    """diffusers' float32 tables replaced by ours: a wrong formula cannot hide in the rounding."""
    to_one = scheduler.config.get("set_alpha_to_one", True)
    scheduler.betas = schedule.betas
    scheduler.alphas = 1 - schedule.betas
    scheduler.alphas_cumprod = schedule.alpha_bars
    scheduler.final_alpha_cumprod = torch.tensor(1.0).double() if to_one else schedule.alpha_bars[0]
    return scheduler


def diffusers_ddim(schedule, kind, spacing, steps):
    theirs = diffusers.DDIMScheduler(clip_sample=False, **KINDS[kind], **SPACINGS[spacing])
    scheduler = in_double(theirs, schedule)
    scheduler.set_timesteps(steps)
    return scheduler


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("steps", [1, 4, 50, 200])
@pytest.mark.parametrize("eta", [0.0, 0.6, 1.0])
def test_ddim_trajectory_is_diffusers(kind, spacing, steps, eta):
    schedule, generator = NoiseSchedule(kind), seeded(7)
    scheduler, z = diffusers_ddim(schedule, kind, spacing, steps), noise(2, 4, 3, 3)
    options = {"steps": steps, "eta": eta, "spacing": spacing}
    ours = ddim_sample(nonlinear, schedule, z, generator=seeded(7), **options)
    for (t, our_z, our_z0_hat), their_t in zip(ours, scheduler.timesteps, strict=True):
        if eta == 0:
            fresh = None
        elif spacing == "trailing" and their_t == scheduler.timesteps[-1]:
            fresh = torch.zeros_like(z)  # the last step to alpha_bar = 1 adds none
        else:
            fresh = torch.randn(z.shape, generator=generator).double()
        eps_hat = nonlinear(z, their_t.expand(2))
        theirs = scheduler.step(eps_hat, their_t, z, eta=eta, variance_noise=fresh)
        z = theirs.prev_sample
        assert t == their_t
        close(our_z, z, rtol=1e-9, atol=1e-9)
        close(our_z0_hat, theirs.pred_original_sample, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("spacing", SPACINGS)
def test_ddim_agrees_with_diffusers_own_float32_tables(spacing):
    options = KINDS["scaled-linear"] | SPACINGS[spacing]
    scheduler = diffusers.DDIMScheduler(clip_sample=False, **options)
    scheduler.set_timesteps(50)
    z = start = noise(2, 4, 3, 3).float()
    for t in scheduler.timesteps:
        z = scheduler.step(nonlinear(z, t.expand(2)), t, z).prev_sample
    ours = last(ddim_sample(nonlinear, NoiseSchedule(), start, spacing=spacing))
    close(ours, z, rtol=0, atol=1e-4 * z.abs().max().item())


@pytest.mark.parametrize("kind", KINDS)
def test_ddpm_trajectory_is_diffusers(kind, monkeypatch):
    generator, schedule = seeded(7), NoiseSchedule(kind)

    def from_our_generator(shape, **_):
        return torch.randn(shape, generator=generator).double()

    monkeypatch.setattr(diffusers.schedulers.scheduling_ddpm, "randn_tensor", from_our_generator)
    theirs = diffusers.DDPMScheduler(variance_type="fixed_small", clip_sample=False, **KINDS[kind])
    scheduler, z = in_double(theirs, schedule), noise(2, 4, 3, 3)
    ours = ddpm_sample(nonlinear, schedule, z, generator=seeded(7))
    for (t, our_z, our_z0_hat), their_t in zip(ours, scheduler.timesteps, strict=True):
        theirs = scheduler.step(nonlinear(z, their_t.expand(2)), their_t, z)
        z = theirs.prev_sample
        assert t == their_t
        close(our_z, z, rtol=1e-8, atol=1e-8)
        close(our_z0_hat, theirs.pred_original_sample, rtol=1e-8, atol=1e-8)


# ---- one step, against its definition ----------------------------------------------------------


@pytest.mark.parametrize("t", [0, 500, 999])
def test_predict_z0_undoes_add_noise(t):
    schedule, z, eps = NoiseSchedule(), noise(2, 4, 3, 3), noise(2, 4, 3, 3, seed=1)
    z_t = schedule.add_noise(z, torch.full((2,), t), eps)
    close(predict_z0(z_t, eps, schedule.alpha_bars[t].item()), z)


def posterior_on_a_grid(schedule, z0, z_t, t):
    """Mean and variance of q(z_{t-1} | z_t, z_0), by Bayes' rule on a grid of numbers z_{t-1}.

    It is proportional to q(z_t | z_{t-1}) q(z_{t-1} | z_0), two Gaussians that define the noising.
    """
    beta = schedule.betas[t]
    before = schedule.alpha_bars[t - 1]
    grid = torch.linspace(-9, 9, 400_001, dtype=torch.float64)
    log_forward = -((z_t - (1 - beta).sqrt() * grid) ** 2) / (2 * beta)
    log_prior = -((grid - before.sqrt() * z0) ** 2) / (2 * (1 - before))
    probability = (log_forward + log_prior).softmax(dim=0)
    mean = (probability * grid).sum()
    variance = (probability * (grid - mean) ** 2).sum()
    return mean.item(), variance.item()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("t", [1, 2, 30, 500, 990])
def test_ddpm_step_is_the_posterior_by_brute_force(kind, t):
    """DDPM eq. 6 and 7, where the z_0 that eps_hat stands for is known."""
    schedule, z0 = NoiseSchedule(kind), 0.8
    eps = 0.7
    a = schedule.alpha_bars[t].item()
    z_t = a**0.5 * z0 + (1 - a) ** 0.5 * eps
    mean, variance = posterior_on_a_grid(schedule, z0, z_t, t)
    tensor_z_t, eps_hat = torch.tensor([z_t]).double(), torch.tensor([eps]).double()
    without_noise = ddpm_step(schedule, tensor_z_t, t, eps_hat)
    with_noise = ddpm_step(schedule, tensor_z_t, t, eps_hat, torch.ones(1).double())
    assert without_noise.item() == pytest.approx(mean, abs=1e-6)
    assert (with_noise - without_noise).item() == pytest.approx(variance**0.5, rel=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_the_last_ddpm_step_gives_z0_hat_and_adds_no_noise(kind):
    schedule, z, eps_hat = NoiseSchedule(kind), noise(5), noise(5, seed=1)
    fresh = noise(5, seed=2)
    expected = predict_z0(z, eps_hat, schedule.alpha_bars[0].item())
    close(ddpm_step(schedule, z, 0, eps_hat, fresh), expected)


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_ddim_step_by_hand(eta):
    """DDIM eq. 12 and 16 for z_t = 2, eps_hat = 1, from alpha_bar 0.36 to 0.64, noise 3."""
    z0_hat = (2 - 0.8 * 1) / 0.6  # sqrt(0.36) = 0.6, sqrt(1 - 0.36) = 0.8
    sigma = eta * ((1 - 0.64) / (1 - 0.36)) ** 0.5 * (1 - 0.36 / 0.64) ** 0.5
    expected = 0.8 * z0_hat + (1 - 0.64 - sigma**2) ** 0.5 * 1 + sigma * 3
    z_t, eps_hat, fresh = (torch.tensor([value]).double() for value in (2.0, 1.0, 3.0))
    z = ddim_step(z_t, eps_hat, 0.36, 0.64, eta, fresh)
    assert z.item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("t", [0, 1, 2, 10, 300, 998, 999])
def test_ddim_step_with_eta_one_is_a_ddpm_step(kind, t):
    schedule, z, eps_hat = NoiseSchedule(kind), noise(5), noise(5, seed=1)
    fresh = noise(5, seed=2)
    a, a_next = schedule.alpha_bars[t].item(), alpha_bar_before(schedule, t)
    ddim = ddim_step(z, eps_hat, a, a_next, eta=1.0, noise=fresh)
    close(ddim, ddpm_step(schedule, z, t, eps_hat, fresh), rtol=1e-8, atol=1e-8)


# ---- closed forms ------------------------------------------------------------------------------


def coefficients(sampler, schedule, t, **options):
    """(c_z, c_eps, sigma) of the sampler's step at t, whose noise is drawn from its generator."""
    z, eps_hat, fresh = noise(9, 1, seed=1), noise(9, 1, seed=2), noise(9, 1, seed=3)

    def predict(z, t):
        return eps_hat

    steps = sampler(predict, schedule, z, start=t, generator=seeded(3), **options)
    _, after, _ = next(iter(steps))
    known = torch.cat([z, eps_hat, fresh], dim=1)
    numbers = torch.linalg.lstsq(known, after).solution
    close(known @ numbers, after, rtol=0, atol=1e-9)  # they explain all of the step
    return numbers.flatten().tolist()


def propagate(sampler, schedule, times, mean, variance, mu, s, **options):
    """Mean and variance after each step, exactly, for data N(mu, s^2).

    The optimal prediction is linear: eps_hat = slope (z - sqrt(a) mu).
    """
    for t in times:
        a = schedule.alpha_bars[t].item()
        slope = (1 - a) ** 0.5 / (a * s**2 + 1 - a)
        c_z, c_eps, sigma = coefficients(sampler, schedule, t, **options)
        factor = c_z + c_eps * slope
        mean = factor * mean - c_eps * slope * a**0.5 * mu
        variance = factor**2 * variance + sigma**2
        yield mean, variance


@pytest.mark.parametrize(
    "sampler, options",
    [(ddpm_sample, {}), (ddim_sample, {"eta": 1.0, "steps": 1000})],
    ids=["ddpm", "ddim eta=1"],
)
@pytest.mark.parametrize("kind", KINDS)
def test_step_is_the_posterior_of_the_noising(sampler, options, kind):
    """DDPM eq. 6 and 7 as formulas, with the z_0 that eps_hat predicts in place of z_0."""
    schedule = NoiseSchedule(kind)
    for t in [0, 1, 2, 10, 300, 998, 999]:
        a, before = schedule.alpha_bars[t].item(), alpha_bar_before(schedule, t)
        beta = schedule.betas[t].item()
        of_z0 = before**0.5 * beta / (1 - a)
        of_z = (1 - beta) ** 0.5 * (1 - before) / (1 - a)
        expected = [
            of_z + of_z0 / a**0.5,
            -of_z0 * ((1 - a) / a) ** 0.5,
            (beta * (1 - before) / (1 - a)) ** 0.5,
        ]
        found = coefficients(sampler, schedule, t, **options)
        assert found == pytest.approx(expected, rel=1e-8, abs=1e-9)


@pytest.mark.parametrize(
    "sampler, options",
    [
        (ddpm_sample, {}),
        (ddim_sample, {"eta": 0.0, "steps": 60}),
        (ddim_sample, {"eta": 0.4, "steps": 60}),
        (ddim_sample, {"eta": 1.0, "steps": 60}),
    ],
    ids=["ddpm", "ddim", "eta=0.4", "eta=1"],
)
def test_for_a_point_every_marginal_is_exact(sampler, options):
    """Data of a single point mu: z after a step is N(sqrt(a') mu, 1 - a'), for any eta.

    This is lemma 1 of the DDIM paper.
    """
    schedule = NoiseSchedule("cosine", 60)
    times = range(59, -1, -1)
    a = schedule.alpha_bars[59].item()
    start = {"mean": a**0.5 * MU, "variance": 1 - a}
    moments = list(propagate(sampler, schedule, times, mu=MU, s=0.0, **start, **options))
    expected = []
    for t in times:
        after = alpha_bar_before(schedule, t)
        expected.append((after**0.5 * MU, 1 - after))
    close(torch.tensor(moments).double(), torch.tensor(expected).double(), rtol=1e-6, atol=1e-9)


def test_ddpm_reaches_mean_and_variance_of_the_data_exactly_propagated():
    schedule = NoiseSchedule("linear")
    times = range(999, -1, -1)
    *_, (mean, variance) = propagate(ddpm_sample, schedule, times, 0.0, 1.0, MU, S)
    assert mean == pytest.approx(MU, rel=0.005)
    assert variance == pytest.approx(S**2, rel=0.02)


def test_ddpm_reaches_mean_and_variance_of_the_data_by_monte_carlo():
    schedule = NoiseSchedule("linear")
    times = range(999, -1, -1)
    start = noise(10_000, 1)
    z = last(ddpm_sample(gaussian_eps(schedule), schedule, start, generator=seeded(1)))
    *_, (mean, variance) = propagate(ddpm_sample, schedule, times, 0.0, 1.0, MU, S)
    assert z.mean().item() == pytest.approx(mean, abs=0.03)  # 4 standard errors are 0.024
    assert z.var().item() == pytest.approx(variance, abs=0.03)


@pytest.mark.parametrize("steps", [1, 2, 5, 20])
@pytest.mark.parametrize("spacing", SPACINGS)
def test_ddim_is_the_product_of_its_linear_steps(steps, spacing):
    """For Gaussian data, with d = z - sqrt(a) mu and V = a s^2 + 1 - a, one step is

    d' = d (sqrt(a a') s^2 + sqrt((1 - a)(1 - a'))) / V.
    """
    schedule, z = NoiseSchedule("cosine"), noise(5, 1)
    pairs = [(a, after) for _, a, after in ddim_timesteps(schedule, steps, spacing)]
    first, final = pairs[0][0], pairs[-1][1]
    d = z - first**0.5 * MU
    for a, after in pairs:
        V = a * S**2 + 1 - a
        d = d * ((a * after) ** 0.5 * S**2 + ((1 - a) * (1 - after)) ** 0.5) / V
    predict = gaussian_eps(schedule)
    ours = last(ddim_sample(predict, schedule, z, steps=steps, spacing=spacing))
    close(ours, final**0.5 * MU + d)


def test_ddim_with_many_steps_reaches_the_data():
    schedule, z = NoiseSchedule("cosine"), noise(5, 1)
    ours = last(ddim_sample(gaussian_eps(schedule), schedule, z, steps=1000))
    close(ours, MU + S * z, rtol=0, atol=0.01)


@pytest.mark.parametrize("steps", [1, 3, 50])
@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_for_a_point_ddim_lands_on_the_point(steps, eta):
    schedule = NoiseSchedule()
    predict = gaussian_eps(schedule, s=0.0)
    options = {"steps": steps, "eta": eta, "generator": seeded()}
    z = last(ddim_sample(predict, schedule, noise(5, 1), **options))
    close(z, torch.full_like(z, MU))


@pytest.mark.parametrize(
    "name, options",
    [("ddpm", {}), ("ddim", {"steps": 1000}), ("ddim", {"steps": 7, "eta": 0.5})],
)
def test_z0_hat_is_exact_when_eps_is(name, options):
    """Told the true noise between z_t and a known z, every z0_hat on the way is z."""
    schedule, clean = NoiseSchedule(), noise(3, 4, seed=5)

    def true_eps(z, t):
        a = schedule.alpha_bars[t].view(-1, 1)
        return (z - a.sqrt() * clean) / (1 - a).sqrt()

    steps = SAMPLERS[name](true_eps, schedule, noise(3, 4), generator=seeded(), **options)
    for _, _, z0_hat in steps:
        close(z0_hat, clean, rtol=0, atol=1e-6)


# ---- randomness --------------------------------------------------------------------------------


def end_of(name, seed, **options):
    start = noise(2, 4, 3, 3)
    return last(
        SAMPLERS[name](nonlinear, NoiseSchedule(), start, generator=seeded(seed), **options)
    )


@pytest.mark.parametrize("name, options", [("ddpm", {}), ("ddim", {"eta": 1.0, "steps": 1000})])
def test_no_noise_at_the_last_step_and_some_before(name, options):
    assert torch.equal(end_of(name, 1, start=0, **options), end_of(name, 2, start=0, **options))
    assert not torch.equal(end_of(name, 1, start=1, **options), end_of(name, 2, start=1, **options))


@pytest.mark.parametrize(
    "name, options", [("ddpm", {"start": 40}), ("ddim", {"eta": 0.3, "steps": 20})]
)
def test_a_generator_fixes_the_result(name, options):
    assert torch.equal(end_of(name, 1, **options), end_of(name, 1, **options))
    assert not torch.equal(end_of(name, 1, **options), end_of(name, 2, **options))


@pytest.mark.parametrize(
    "name, options",
    [("ddim", {}), ("ddim", {"eta": 1.0, "steps": 1000, "start": 0}), ("ddpm", {"start": 0})],
)
def test_where_there_is_no_noise_none_is_drawn(name, options):
    generator = seeded()
    before = generator.get_state()
    sampler = SAMPLERS[name]
    last(sampler(nonlinear, NoiseSchedule(), noise(1, 1, 2, 2), generator=generator, **options))
    assert torch.equal(generator.get_state(), before)


@pytest.mark.parametrize(
    "sampler, options, times",
    [
        (ddpm_sample, {"start": 2}, [2, 1, 0]),
        (ddim_sample, {"steps": 2}, [999, 499]),
        (ddim_invert, {"steps": 2}, [499, 999]),
    ],
)
def test_samplers_tell_the_model_the_time_of_every_image(sampler, options, times):
    asked = []

    def predict(z, t):
        asked.append(t)
        return z

    steps = sampler(predict, NoiseSchedule(), noise(3, 1), **options)
    assert [t for t, _, _ in steps] == times
    assert [t.tolist() for t in asked] == [[t] * 3 for t in times]
    assert all(t.dtype == torch.long for t in asked)


# ---- timesteps ---------------------------------------------------------------------------------


def times_of(schedule, steps, *options, **more):
    return [t for t, _, _ in ddim_timesteps(schedule, steps, *options, **more)]


def test_leading_is_stable_diffusions_own():
    steps = ddim_timesteps(NoiseSchedule(), 50, "leading")
    assert [t for t, _, _ in steps] == list(range(981, 0, -20))
    assert steps[-1][2] == NoiseSchedule().alpha_bars[0].item()


def test_trailing_begins_in_pure_noise_and_ends_clean():
    steps = ddim_timesteps(NoiseSchedule(), 50)
    assert [t for t, _, _ in steps] == list(range(999, 0, -20))
    assert steps[-1][2] == 1.0


@pytest.mark.parametrize(
    "spacing, steps",
    [("leading", 3), ("leading", 7), ("trailing", 3), ("trailing", 7), ("trailing", 300)],
)
def test_steps_that_do_not_divide_T_are_spaced_as_diffusers_spaces_them(spacing, steps):
    scheduler = diffusers.DDIMScheduler(**SPACINGS[spacing])
    scheduler.set_timesteps(steps)
    assert times_of(NoiseSchedule(), steps, spacing) == scheduler.timesteps.tolist()


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("steps", [1, 3, 7, 50, 999, 1000])
def test_timesteps_are_distinct_and_their_alpha_bars_chain(spacing, steps):
    schedule = NoiseSchedule()
    triples = ddim_timesteps(schedule, steps, spacing)
    times = [t for t, _, _ in triples]
    alpha_bars = [a for _, a, _ in triples]
    alpha_bars_after = [after for _, _, after in triples]
    assert len(times) == steps
    assert times[0] <= 999
    assert times[-1] >= 0
    assert all(a > b for a, b in zip(times, times[1:]))
    assert alpha_bars == schedule.alpha_bars[times].tolist()
    assert alpha_bars_after[:-1] == alpha_bars[1:]


def test_one_step_and_all_steps():
    assert times_of(NoiseSchedule(), 1) == [999]
    assert times_of(NoiseSchedule(), 1, "leading") == [1]
    assert times_of(NoiseSchedule(T=8), 8) == [7, 6, 5, 4, 3, 2, 1, 0]


@pytest.mark.parametrize(
    "start, expected",
    [
        (500, [500, 399, 199]),
        (599, [599, 399, 199]),
        (600, [600, 599, 399, 199]),
        (0, [0]),
    ],
)
def test_start_leaves_out_what_is_noisier(start, expected):
    schedule = NoiseSchedule()
    steps = ddim_timesteps(schedule, 5, start=start)
    assert [t for t, _, _ in steps] == expected
    assert steps[0][1] == schedule.alpha_bars[start].item()
    assert steps[-1][2] == 1.0


def test_ddpm_from_the_middle_is_the_rest_of_the_whole():
    schedule = NoiseSchedule(T=20)
    whole = ddpm_sample(nonlinear, schedule, noise(1, 1, 2, 2), generator=seeded(1))
    z_after = [z for _, z, _ in whole]
    generator = seeded(1)
    for _ in range(10):
        torch.randn(1, 1, 2, 2, generator=generator)
    rest = ddpm_sample(nonlinear, schedule, z_after[9], start=9, generator=generator)
    assert torch.equal(last(rest), z_after[-1])


@pytest.mark.parametrize(
    "function, arguments, message",
    [
        (
            NoiseSchedule,
            {"kind": "quadratic"},
            "kind is 'quadratic'.*linear.*scaled-linear.*cosine",
        ),
        (NoiseSchedule, {"T": 1}, "T is 1;.*2"),
        (ddim_timesteps, {"steps": 0}, "steps is 0;.*1 to 100"),
        (ddim_timesteps, {"steps": -1}, "steps is -1;.*1 to 100"),
        (ddim_timesteps, {"steps": 101}, "steps is 101;.*1 to 100"),
        (ddim_timesteps, {"steps": 5, "start": -1}, "start is -1;.*0 to 99"),
        (ddim_timesteps, {"steps": 5, "start": 100}, "start is 100;.*0 to 99"),
        (ddim_timesteps, {"steps": 5, "spacing": "linspace"}, "'linspace';.*trailing.*leading"),
        (ddim_sample, {"steps": 0}, "steps is 0"),
        (ddpm_sample, {"start": 100}, "start is 100;.*0 to 99"),
        (ddim_invert, {"steps": 101}, "steps is 101"),
    ],
)
def test_error_names_the_argument_what_came_and_what_is_allowed(function, arguments, message):
    schedule = NoiseSchedule(T=100)
    with pytest.raises(ValueError, match=message):
        if function is NoiseSchedule:
            NoiseSchedule(**arguments)
        elif function is ddim_timesteps:
            ddim_timesteps(schedule, **arguments)
        else:
            last(function(nonlinear, schedule, noise(1, 1, 2, 2), **arguments))


# ---- inversion ---------------------------------------------------------------------------------


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("steps", [1, 6, 50])
def test_inversion_is_exact_where_the_prediction_does_not_depend_on_z(spacing, steps):
    schedule, clean, directions = NoiseSchedule(), noise(2, 4), noise(1000, 4, seed=1)

    def predict(z, t):
        return directions[t]

    options = {"steps": steps, "spacing": spacing}
    noisy = last(ddim_invert(predict, schedule, clean, **options))
    assert (noisy - clean).abs().max() > 0.01
    close(last(ddim_sample(predict, schedule, noisy, **options)), clean)


def test_inversion_error_falls_as_steps_grow():
    schedule, clean = NoiseSchedule(), MU + S * noise(64, 1)
    predict = gaussian_eps(schedule)
    errors = []
    for steps in (10, 40, 160, 640):
        noisy = last(ddim_invert(predict, schedule, clean, steps=steps))
        again = last(ddim_sample(predict, schedule, noisy, steps=steps))
        errors.append((again - clean).abs().max().item())
    assert all(after < before / 2 for before, after in zip(errors, errors[1:])), errors
    assert errors[-1] < 0.01


def test_inversion_finds_the_noise_of_gaussian_data():
    schedule, eps = NoiseSchedule("cosine"), noise(64, 1)
    found = last(ddim_invert(gaussian_eps(schedule), schedule, MU + S * eps, steps=1000))
    close(found, eps, rtol=0, atol=0.03)


def test_inversion_predicts_z0_from_where_it_stands():
    schedule, clean, direction = NoiseSchedule(), noise(2, 4), noise(2, 4, seed=1)

    def predict(z, t):
        return direction

    for _, _, z0_hat in ddim_invert(predict, schedule, clean, steps=7):
        close(z0_hat, clean)


# ---- guidance ----------------------------------------------------------------------------------


class ThreeLineUNet:
    """A U-Net in three lines, which remembers the batches it was called with."""

    def __init__(self):
        self.batches = []

    def __call__(self, z, t, context):
        self.batches.append(len(z))
        caption = context.mean(dim=(1, 2)).view(-1, 1, 1, 1)
        return torch.sin(z + caption) + t.view(-1, 1, 1, 1) / 1000


@pytest.mark.parametrize("w", [0.0, 1.0, 7.5, -2.0])
def test_guidance_extrapolates_from_one_batched_call(w):
    unet, z, t = ThreeLineUNet(), noise(3, 4, 2, 2), torch.tensor([1, 500, 999])
    empty, text = noise(3, 77, 5, seed=1), noise(3, 77, 5, seed=2) + 1
    eps = guided_eps(unet, z, t, torch.cat([empty, text]), w)
    assert unet.batches == [6]
    close(eps, (1 - w) * unet(z, t, empty) + w * unet(z, t, text))
    if w == 0:
        close(eps, unet(z, t, empty))
    if w == 1:
        close(eps, unet(z, t, text))


@pytest.fixture(scope="module")
def model():
    """A whole model in float64, every tensor random."""
    config = dataclasses.replace(
        SHAPES,
        image_size=8,
        scale_factor=0.5,
        text=TextConfig(vocab_size=520, width=16, num_layers=1, num_heads=2),
        image=None,
        autoencoder=AutoencoderConfig(
            width=8, channel_mult=(1, 2), num_res_blocks=1, latent_channels=4, num_groups=4
        ),
        unet=UNetConfig(
            latent_channels=4,
            width=16,
            channel_mult=(1, 2),
            num_res_blocks=1,
            attention_levels=(0, 1),
            num_heads=2,
            context_width=16,
            num_groups=4,
        ),
    )
    model = randomise(LatentDiffusion(config), seeded()).double().eval()
    model.tokenizer = Tokenizer.train(["a red circle", "a blue square"], 520)
    return model


def guided_by_hand(model, prompts, negative, w, z, **options):
    """The guided trajectory with two passes of the U-Net, and no prepared keys and values."""
    text, empty = model.embed(prompts), model.embed([negative] * len(prompts))

    def predict(z, t):
        return (1 - w) * model.unet(z, t, empty) + w * model.unet(z, t, text)

    return [z for _, z, _ in ddim_sample(predict, model.schedule, z, **options)]


@pytest.mark.parametrize("w, negative", [(0.0, ""), (1.0, ""), (3.0, ""), (3.0, "a blue square")])
@torch.no_grad()
def test_denoise_is_guided_ddim(model, w, negative):
    prompts, z = ["a red circle", "two"], noise(2, 4, 4, 4)
    options = {"steps": 4, "eta": 0.5, "spacing": "leading", "start": 800}
    expected = guided_by_hand(model, prompts, negative, w, z, generator=seeded(1), **options)
    options |= {"guidance": w, "negative": negative, "generator": seeded(1)}
    steps = model.denoise(prompts, z=z, **options)
    for (_, our_z, _), expected_z in zip(steps, expected, strict=True):
        close(our_z, expected_z)


@pytest.mark.parametrize("w, batch", [(1.0, 2), (2.0, 4)])
def test_generate_calls_the_unet_once_a_step_and_decodes_once(model, w, batch):
    unet_batches, decoded = [], []

    def unet_called(module, inputs, output):
        unet_batches.append(len(inputs[0]))

    def decoder_called(module, inputs, output):
        decoded.append(len(output))

    hooks = [
        model.unet.register_forward_hook(unet_called),
        model.autoencoder.decoder[-1].register_forward_hook(decoder_called),
    ]
    x = model.generate(["a red circle", "two"], steps=3, guidance=w, generator=seeded())
    for hook in hooks:
        hook.remove()
    assert unet_batches == [batch] * 3
    assert decoded == [2]
    assert x.shape == (2, 3, 8, 8)


@torch.no_grad()
def test_generate_starts_from_the_generators_noise_and_decodes_the_last_z(model):
    prompts, start = ["a red circle"], noise(1, 4, 4, 4, seed=9)
    z = guided_by_hand(model, prompts, "", 2.0, start, steps=3)[-1]
    expected = model.autoencoder.decode(z / 0.5).clamp(-1, 1)
    options = {"steps": 3, "guidance": 2.0}
    close(model.generate(prompts, generator=seeded(9), **options), expected)
    assert not torch.allclose(model.generate(prompts, generator=seeded(8), **options), expected)
