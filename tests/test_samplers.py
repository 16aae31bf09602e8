"""Noise and its removal, against `diffusers`' schedulers and against what can be written down.

Every step of a sampler is linear: z' = c_z z + c_eps eps_hat + sigma noise. `update` measures the three numbers on the
sampler itself; with them means and variances go through a thousand steps exactly, with no Monte Carlo.
"""

import dataclasses

import diffusers
import pytest
import torch

from ldm_minimal import (SHAPES, AutoencoderConfig, LatentDiffusion, NoiseSchedule, TextConfig, Tokenizer, UNetConfig,
                         ddim_invert, ddim_sample, ddim_timesteps, ddpm_sample, guided_eps)

KINDS = {"linear": dict(beta_schedule="linear", beta_start=1e-4, beta_end=0.02),
         "scaled-linear": dict(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012),
         "cosine": dict(beta_schedule="squaredcos_cap_v2")}
SPACINGS = {"leading": dict(timestep_spacing="leading", steps_offset=1, set_alpha_to_one=False),
            "trailing": dict(timestep_spacing="trailing", set_alpha_to_one=True)}
SAMPLERS = {"ddpm": ddpm_sample, "ddim": ddim_sample}
MU, S = 1.7, 0.6
close = torch.testing.assert_close


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def noise(*shape, seed=0):
    return torch.randn(shape, generator=seeded(seed)).double()


def last(steps):
    return list(steps)[-1][1]


def nonlinear(z, t):
    """Some prediction that depends on everything: all of a picture's numbers, and the time."""
    return torch.tanh(z.flip(-1) + 0.3 * z.mean(dim=(1, 2, 3), keepdim=True)) * (0.5 + t.view(-1, 1, 1, 1) / 1000) + 0.1 * z


def gaussian_eps(schedule, mu=MU, s=S):
    """E[eps | z_t] for z ~ N(mu, s^2): sqrt(1 - a) (z_t - sqrt(a) mu) / (a s^2 + 1 - a), with a = alpha_bar_t."""
    def predict(z, t):
        a = schedule.alpha_bars[t].view(-1, *[1] * (z.ndim - 1))
        return (1 - a).sqrt() * (z - a.sqrt() * mu) / (a * s**2 + 1 - a)
    return predict


# ---- schedules ----

@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("T", [2, 10, 1000])
def test_schedule_tables_are_diffusers(kind, T):
    schedule, expected = NoiseSchedule(kind, T), diffusers.DDPMScheduler(num_train_timesteps=T, **KINDS[kind])
    close(schedule.betas.float(), expected.betas, rtol=2e-6, atol=1e-7)
    close(schedule.alpha_bars.float(), expected.alphas_cumprod, rtol=2e-5, atol=1e-9)
    assert schedule.betas.dtype == schedule.alpha_bars.dtype == torch.float64 and schedule.betas.shape == (T,)


@pytest.mark.parametrize("kind, first, final", [("linear", 1e-4, 0.02), ("scaled-linear", 0.00085, 0.012)])
def test_first_and_last_beta_are_the_papers(kind, first, final):
    betas = NoiseSchedule(kind).betas
    assert betas[[0, -1]].tolist() == pytest.approx([first, final], rel=1e-12)
    straight = betas if kind == "linear" else betas.sqrt()
    close(straight.diff(), straight.diff().mean().expand(999), rtol=1e-8, atol=0)


def test_default_schedule_is_stable_diffusion():
    close(NoiseSchedule().betas, NoiseSchedule("scaled-linear", 1000).betas)


@pytest.mark.parametrize("kind", KINDS)
def test_noise_step_by_step_is_noise_in_one(kind):
    """q(z_t | z_{t-1}) applied t times, as signal and variance, against add_noise's coefficients."""
    schedule, signal, variance = NoiseSchedule(kind), 1.0, 0.0
    for t, beta in enumerate(schedule.betas.tolist()):
        signal, variance = signal * (1 - beta) ** 0.5, (1 - beta) * variance + beta
        one, zero, now = torch.ones(1).double(), torch.zeros(1).double(), torch.tensor([t])
        assert schedule.add_noise(one, now, zero).item() == pytest.approx(signal, rel=1e-9)
        assert schedule.add_noise(zero, now, one).item() == pytest.approx(variance**0.5, rel=1e-9)


def test_noise_step_by_step_by_monte_carlo():
    schedule, random = NoiseSchedule("linear", 300), seeded()
    z = torch.full((100_000,), 2.0)
    for beta in schedule.betas.tolist():
        z = (1 - beta) ** 0.5 * z + beta**0.5 * torch.randn(z.shape, generator=random)
    one_step = schedule.add_noise(torch.full((100_000,), 2.0), torch.full((100_000,), 299), torch.randn(z.shape, generator=random))
    assert z.mean().item() == pytest.approx(one_step.mean().item(), abs=0.02)
    assert z.std().item() == pytest.approx(one_step.std().item(), abs=0.01)


def test_add_noise_gives_every_picture_its_own_t():
    schedule, z, eps, t = NoiseSchedule(), noise(3, 4, 2, 2), noise(3, 4, 2, 2, seed=1), torch.tensor([0, 500, 999])
    for i in range(3):
        a = schedule.alpha_bars[t[i]].item()
        close(schedule.add_noise(z, t, eps)[i], a**0.5 * z[i] + (1 - a) ** 0.5 * eps[i])
    assert schedule.add_noise(z.float(), t, eps.float()).dtype == torch.float32


def test_snr_is_signal_power_over_noise_power():
    schedule = NoiseSchedule("cosine", 50)
    t, one, zero = torch.arange(50), torch.ones(50).double(), torch.zeros(50).double()
    close(schedule.snr(), (schedule.add_noise(one, t, zero) / schedule.add_noise(zero, t, one)) ** 2)


# ---- diffusers' schedulers ----

def in_double(scheduler, schedule):
    """diffusers keeps its tables in float32; with ours in float64 a wrong formula cannot hide in the rounding."""
    to_one = scheduler.config.get("set_alpha_to_one", True)
    scheduler.betas, scheduler.alphas_cumprod = schedule.betas, schedule.alpha_bars
    scheduler.alphas = 1 - schedule.betas
    scheduler.final_alpha_cumprod = torch.tensor(1.0).double() if to_one else schedule.alpha_bars[0]
    return scheduler


def diffusers_ddim(schedule, kind, spacing, steps):
    scheduler = in_double(diffusers.DDIMScheduler(clip_sample=False, **KINDS[kind], **SPACINGS[spacing]), schedule)
    scheduler.set_timesteps(steps)
    return scheduler


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("steps", [1, 4, 50, 200])
@pytest.mark.parametrize("eta", [0.0, 0.6, 1.0])
def test_ddim_trajectory_is_diffusers(kind, spacing, steps, eta):
    schedule, random = NoiseSchedule(kind), seeded(7)
    scheduler, z = diffusers_ddim(schedule, kind, spacing, steps), noise(2, 4, 3, 3)
    ours = ddim_sample(nonlinear, schedule, z, steps=steps, eta=eta, spacing=spacing, generator=seeded(7))
    for (t, mine, z0_hat), time in zip(ours, scheduler.timesteps, strict=True):
        final = spacing == "trailing" and time == scheduler.timesteps[-1]
        variance_noise = None if eta == 0 else torch.zeros_like(z) if final else torch.randn(z.shape, generator=random).double()
        done = scheduler.step(nonlinear(z, time.expand(2)), time, z, eta=eta, variance_noise=variance_noise)
        z = done.prev_sample
        assert t == time
        close(mine, z, rtol=1e-9, atol=1e-9)
        close(z0_hat, done.pred_original_sample, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("spacing", SPACINGS)
def test_ddim_agrees_with_diffusers_own_float32_tables(spacing):
    scheduler = diffusers.DDIMScheduler(clip_sample=False, **KINDS["scaled-linear"], **SPACINGS[spacing])
    scheduler.set_timesteps(50)
    z = start = noise(2, 4, 3, 3).float()
    for t in scheduler.timesteps:
        z = scheduler.step(nonlinear(z, t.expand(2)), t, z).prev_sample
    mine = last(ddim_sample(nonlinear, NoiseSchedule(), start, spacing=spacing))
    close(mine, z, rtol=0, atol=1e-4 * z.abs().max().item())


@pytest.mark.parametrize("kind", KINDS)
def test_ddpm_trajectory_is_diffusers(kind, monkeypatch):
    random, schedule = seeded(7), NoiseSchedule(kind)
    monkeypatch.setattr(diffusers.schedulers.scheduling_ddpm, "randn_tensor",
                        lambda shape, **_: torch.randn(shape, generator=random).double())
    scheduler = diffusers.DDPMScheduler(variance_type="fixed_small", clip_sample=False, **KINDS[kind])
    scheduler, z = in_double(scheduler, schedule), noise(2, 4, 3, 3)
    for (t, mine, z0_hat), time in zip(ddpm_sample(nonlinear, schedule, z, generator=seeded(7)), scheduler.timesteps, strict=True):
        done = scheduler.step(nonlinear(z, time.expand(2)), time, z)
        z = done.prev_sample
        assert t == time
        close(mine, z, rtol=1e-8, atol=1e-8)
        close(z0_hat, done.pred_original_sample, rtol=1e-8, atol=1e-8)


# ---- closed forms ----

def update(sampler, schedule, t, **options):
    """(c_z, c_eps, sigma) of the sampler's step at t, and how well they explain it; its noise is its generator's."""
    z, eps_hat = noise(9, 1, seed=1), noise(9, 1, seed=2)
    _, after, _ = next(iter(sampler(lambda z, t: eps_hat, schedule, z, start=t, generator=seeded(3), **options)))
    known = torch.cat([z, eps_hat, noise(9, 1, seed=3)], dim=1)
    numbers = torch.linalg.lstsq(known, after).solution
    close(known @ numbers, after, rtol=0, atol=1e-9)
    return numbers.flatten().tolist()


def propagate(sampler, schedule, times, mean, variance, mu, s, **options):
    """Mean and variance after each step, exactly, for data N(mu, s^2) and the optimal eps_hat = slope (z - sqrt(a) mu)."""
    for t in times:
        a = schedule.alpha_bars[t].item()
        slope = (1 - a) ** 0.5 / (a * s**2 + 1 - a)
        c_z, c_eps, sigma = update(sampler, schedule, t, **options)
        mean, variance = (c_z + c_eps * slope) * mean - c_eps * slope * a**0.5 * mu, (c_z + c_eps * slope) ** 2 * variance + sigma**2
        yield mean, variance


def a_before(schedule, t):
    return schedule.alpha_bars[t - 1].item() if t else 1.0


@pytest.mark.parametrize("sampler, options", [(ddpm_sample, {}), (ddim_sample, dict(eta=1.0, steps=1000))], ids=["ddpm", "ddim eta=1"])
@pytest.mark.parametrize("kind", KINDS)
def test_step_is_the_posterior_of_the_noising(sampler, options, kind):
    """DDPM eq. 6 and 7: q(z_{t-1} | z_t, z_0), with z_0 guessed from eps_hat. DDIM with eta 1 and all steps is the same."""
    schedule = NoiseSchedule(kind)
    for t in [0, 1, 2, 10, 300, 998, 999]:
        a, before, beta = schedule.alpha_bars[t].item(), a_before(schedule, t), schedule.betas[t].item()
        of_z0, of_z = before**0.5 * beta / (1 - a), (1 - beta) ** 0.5 * (1 - before) / (1 - a)
        expected = [of_z + of_z0 / a**0.5, -of_z0 * ((1 - a) / a) ** 0.5, (beta * (1 - before) / (1 - a)) ** 0.5]
        assert update(sampler, schedule, t, **options) == pytest.approx(expected, rel=1e-8, abs=1e-9)


@pytest.mark.parametrize("sampler, options", [
    (ddpm_sample, {}), *[(ddim_sample, dict(eta=eta, steps=60)) for eta in (0.0, 0.4, 1.0)]], ids=["ddpm", "ddim", "eta=0.4", "eta=1"])
def test_for_a_point_every_marginal_is_exact(sampler, options):
    """Data of a single point: z after the step is N(sqrt(a') mu, 1 - a') at every step, for any eta (DDIM lemma 1)."""
    schedule = NoiseSchedule("cosine", 60)
    a = schedule.alpha_bars.tolist()
    moments = propagate(sampler, schedule, range(59, -1, -1), a[59] ** 0.5 * MU, 1 - a[59], MU, 0.0, **options)
    expected = [(a_before(schedule, t) ** 0.5 * MU, 1 - a_before(schedule, t)) for t in range(59, -1, -1)]
    close(torch.tensor(list(moments)).double(), torch.tensor(expected).double(), rtol=1e-6, atol=1e-9)


def test_ddpm_reaches_mean_and_variance_of_the_data_exactly_propagated():
    schedule = NoiseSchedule("linear")
    *_, (mean, variance) = propagate(ddpm_sample, schedule, range(999, -1, -1), 0.0, 1.0, MU, S)
    assert mean == pytest.approx(MU, rel=0.005)
    assert variance == pytest.approx(S**2, rel=0.02)


def test_ddpm_reaches_mean_and_variance_of_the_data_by_monte_carlo():
    schedule = NoiseSchedule("linear")
    z = last(ddpm_sample(gaussian_eps(schedule), schedule, noise(20_000, 1), generator=seeded(1)))
    *_, (mean, variance) = propagate(ddpm_sample, schedule, range(999, -1, -1), 0.0, 1.0, MU, S)
    assert z.mean().item() == pytest.approx(mean, abs=0.02)  # 4 standard errors are 0.017
    assert z.var().item() == pytest.approx(variance, abs=0.02)


@pytest.mark.parametrize("steps", [1, 2, 5, 20])
@pytest.mark.parametrize("spacing", SPACINGS)
def test_ddim_is_the_product_of_its_linear_steps(steps, spacing):
    """With d = z - sqrt(a) mu and V = a s^2 + 1 - a, one step is d' = d (sqrt(a a') s^2 + sqrt((1 - a)(1 - a'))) / V."""
    schedule, z = NoiseSchedule("cosine"), noise(5, 1)
    pairs = [(a, after) for _, a, after in ddim_timesteps(schedule, steps, spacing)]
    d = z - pairs[0][0] ** 0.5 * MU
    for a, after in pairs:
        d = d * ((a * after) ** 0.5 * S**2 + ((1 - a) * (1 - after)) ** 0.5) / (a * S**2 + 1 - a)
    close(last(ddim_sample(gaussian_eps(schedule), schedule, z, steps=steps, spacing=spacing)), pairs[-1][1] ** 0.5 * MU + d)


def test_ddim_with_many_steps_reaches_the_data():
    schedule, z = NoiseSchedule("cosine"), noise(5, 1)
    close(last(ddim_sample(gaussian_eps(schedule), schedule, z, steps=1000)), MU + S * z, rtol=0, atol=0.01)


@pytest.mark.parametrize("steps", [1, 3, 50])
@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_for_a_point_ddim_lands_on_the_point(steps, eta):
    schedule = NoiseSchedule()
    z = last(ddim_sample(gaussian_eps(schedule, s=0.0), schedule, noise(5, 1), steps=steps, eta=eta, generator=seeded()))
    close(z, torch.full_like(z, MU))


@pytest.mark.parametrize("name, options", [("ddpm", {}), ("ddim", dict(steps=1000)), ("ddim", dict(steps=7, eta=0.5))])
def test_z0_hat_is_exact_when_eps_is(name, options):
    """Told the true noise between z_t and a known z, every guess on the way is z."""
    schedule, clean = NoiseSchedule(), noise(3, 4, seed=5)
    a = lambda t: schedule.alpha_bars[t].view(-1, 1)  # noqa: E731
    truth = lambda z, t: (z - a(t).sqrt() * clean) / (1 - a(t)).sqrt()  # noqa: E731
    for _, _, z0_hat in SAMPLERS[name](truth, schedule, noise(3, 4), generator=seeded(), **options):
        close(z0_hat, clean, rtol=0, atol=1e-6)


# ---- randomness ----

@pytest.mark.parametrize("name, options", [("ddpm", {}), ("ddim", dict(eta=1.0, steps=1000))])
def test_no_noise_at_the_last_step_and_some_before(name, options):
    run = lambda start, seed: last(SAMPLERS[name](nonlinear, NoiseSchedule(), noise(2, 4, 3, 3), start=start,  # noqa: E731
                                                  generator=seeded(seed), **options))
    assert torch.equal(run(0, 1), run(0, 2))
    assert not torch.equal(run(1, 1), run(1, 2))


@pytest.mark.parametrize("name, options", [("ddpm", dict(start=40)), ("ddim", dict(eta=0.3, steps=20))])
def test_a_generator_fixes_the_result(name, options):
    run = lambda seed: last(SAMPLERS[name](nonlinear, NoiseSchedule(), noise(2, 4, 3, 3), generator=seeded(seed), **options))  # noqa: E731
    assert torch.equal(run(1), run(1))
    assert not torch.equal(run(1), run(2))


@pytest.mark.parametrize("name, options", [("ddim", {}), ("ddim", dict(eta=1.0, steps=1000, start=0)), ("ddpm", dict(start=0))])
def test_where_there_is_no_noise_none_is_drawn(name, options):
    random = seeded()
    before = random.get_state()
    last(SAMPLERS[name](nonlinear, NoiseSchedule(), noise(1, 1, 2, 2), generator=random, **options))
    assert torch.equal(random.get_state(), before)


def test_samplers_tell_the_model_the_time_of_every_picture():
    asked = []
    def predict(z, t):
        asked.append(t)
        return z
    for sampler, options, times in ((ddpm_sample, dict(start=2), [2, 1, 0]), (ddim_sample, dict(steps=2), [999, 499]),
                                    (ddim_invert, dict(steps=2), [499, 999])):
        asked.clear()
        assert [t for t, _, _ in sampler(predict, NoiseSchedule(), noise(3, 1), **options)] == times
        assert [t.tolist() for t in asked] == [[t] * 3 for t in times]
        assert all(t.dtype == torch.long for t in asked)


# ---- timesteps ----

def test_leading_is_stable_diffusions_own():
    times = ddim_timesteps(NoiseSchedule(), 50, "leading")
    assert [t for t, _, _ in times] == list(range(981, 0, -20))
    assert times[-1][2] == NoiseSchedule().alpha_bars[0].item()


def test_trailing_begins_in_pure_noise_and_ends_clean():
    times = ddim_timesteps(NoiseSchedule(), 50)
    assert [t for t, _, _ in times] == list(range(999, 0, -20))
    assert times[-1][2] == 1.0


@pytest.mark.parametrize("spacing, steps", [("leading", 3), ("leading", 7), ("trailing", 3), ("trailing", 7), ("trailing", 300)])
def test_steps_that_do_not_divide_T_are_spaced_as_diffusers_spaces_them(spacing, steps):
    scheduler = diffusers.DDIMScheduler(**SPACINGS[spacing])
    scheduler.set_timesteps(steps)
    assert [t for t, _, _ in ddim_timesteps(NoiseSchedule(), steps, spacing)] == scheduler.timesteps.tolist()


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("steps", [1, 3, 7, 50, 999, 1000])
def test_timesteps_are_distinct_and_their_alpha_bars_chain(spacing, steps):
    schedule = NoiseSchedule()
    times = ddim_timesteps(schedule, steps, spacing)
    numbers = [t for t, _, _ in times]
    assert len(times) == steps and 0 <= numbers[-1] and numbers[0] <= 999
    assert all(a > b for a, b in zip(numbers, numbers[1:]))
    assert [a for _, a, _ in times] == schedule.alpha_bars[numbers].tolist()
    assert [after for *_, after in times[:-1]] == [a for _, a, _ in times[1:]]


def test_one_step_and_all_steps():
    assert [t for t, _, _ in ddim_timesteps(NoiseSchedule(), 1)] == [999]
    assert [t for t, _, _ in ddim_timesteps(NoiseSchedule(), 1, "leading")] == [1]
    assert [t for t, _, _ in ddim_timesteps(NoiseSchedule(T=8), 8)] == [7, 6, 5, 4, 3, 2, 1, 0]


@pytest.mark.parametrize("start, expected", [(500, [500, 399, 199]), (599, [599, 399, 199]), (600, [600, 599, 399, 199]), (0, [0])])
def test_start_leaves_out_what_is_noisier(start, expected):
    schedule = NoiseSchedule()
    times = ddim_timesteps(schedule, 5, start=start)
    assert [t for t, _, _ in times] == expected
    assert times[0][1] == schedule.alpha_bars[start].item() and times[-1][2] == 1.0


def test_ddpm_from_the_middle_is_the_rest_of_the_whole():
    middle = [z for t, z, _ in ddpm_sample(nonlinear, NoiseSchedule(T=20), noise(1, 1, 2, 2), generator=seeded(1))]
    random = seeded(1)
    for _ in range(10):
        torch.randn(1, 1, 2, 2, generator=random)
    assert torch.equal(last(ddpm_sample(nonlinear, NoiseSchedule(T=20), middle[9], start=9, generator=random)), middle[-1])


@pytest.mark.parametrize("call, message", [
    (lambda: NoiseSchedule("quadratic"), "kind is 'quadratic'.*linear.*scaled-linear.*cosine"),
    (lambda: NoiseSchedule(T=1), "T is 1;.*2"),
    *[(lambda steps=steps: ddim_timesteps(NoiseSchedule(T=100), steps), f"steps is {steps};.*1 to 100") for steps in (0, -1, 101)],
    *[(lambda start=start: ddim_timesteps(NoiseSchedule(T=100), 5, start=start), f"start is {start};.*0 to 99") for start in (-1, 100)],
    (lambda: ddim_timesteps(NoiseSchedule(), 5, "linspace"), "spacing is 'linspace';.*trailing.*leading"),
    (lambda: last(ddim_sample(nonlinear, NoiseSchedule(), noise(1, 1, 2, 2), steps=0)), "steps is 0"),
    (lambda: last(ddpm_sample(nonlinear, NoiseSchedule(), noise(1, 1, 2, 2), start=1000)), "start is 1000;.*0 to 999"),
    (lambda: last(ddim_invert(nonlinear, NoiseSchedule(), noise(1, 1, 2, 2), steps=1001)), "steps is 1001"),
])
def test_error_names_the_argument_what_came_and_what_is_allowed(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# ---- inversion ----

@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("steps", [1, 6, 50])
def test_inversion_is_exact_where_the_prediction_does_not_depend_on_z(spacing, steps):
    schedule, clean, directions = NoiseSchedule(), noise(2, 4), noise(1000, 4, seed=1)
    predict = lambda z, t: directions[t]  # noqa: E731
    noisy = last(ddim_invert(predict, schedule, clean, steps=steps, spacing=spacing))
    assert (noisy - clean).abs().max() > 0.01
    close(last(ddim_sample(predict, schedule, noisy, steps=steps, spacing=spacing)), clean)


def test_inversion_error_falls_as_steps_grow():
    schedule, clean, errors = NoiseSchedule(), MU + S * noise(64, 1), []
    for steps in (10, 40, 160, 640):
        noisy = last(ddim_invert(gaussian_eps(schedule), schedule, clean, steps=steps))
        again = last(ddim_sample(gaussian_eps(schedule), schedule, noisy, steps=steps))
        errors.append((again - clean).abs().max().item())
    assert all(after < before / 2 for before, after in zip(errors, errors[1:])), errors
    assert errors[-1] < 0.01


def test_inversion_finds_the_noise_of_gaussian_data():
    schedule, eps = NoiseSchedule("cosine"), noise(64, 1)
    close(last(ddim_invert(gaussian_eps(schedule), schedule, MU + S * eps, steps=1000)), eps, rtol=0, atol=0.03)


def test_inversion_guesses_z0_from_where_it_stands():
    schedule, clean, direction = NoiseSchedule(), noise(2, 4), noise(2, 4, seed=1)
    for _, _, z0_hat in ddim_invert(lambda z, t: direction, schedule, clean, steps=7):
        close(z0_hat, clean)


# ---- guidance ----

class Counted:
    """A U-Net of three lines, which knows how often it was called."""

    def __init__(self):
        self.batches = []

    def __call__(self, z, t, context):
        self.batches.append(len(z))
        return torch.sin(z + context.mean(dim=(1, 2)).view(-1, 1, 1, 1)) + t.view(-1, 1, 1, 1) / 1000


@pytest.mark.parametrize("w", [0.0, 1.0, 7.5, -2.0])
def test_guidance_extrapolates_from_one_batched_call(w):
    unet, z, t, empty, text = Counted(), noise(3, 4, 2, 2), torch.tensor([1, 500, 999]), noise(3, 77, 5, seed=1), noise(3, 77, 5, seed=2) + 1
    eps = guided_eps(unet, z, t, torch.cat([empty, text]), w)
    assert unet.batches == [6]
    close(eps, (1 - w) * unet(z, t, empty) + w * unet(z, t, text))
    if w in (0.0, 1.0):
        close(eps, unet(z, t, text if w else empty))


@pytest.fixture(scope="module")
def model():
    import reference

    config = dataclasses.replace(
        SHAPES, image_size=8, scale_factor=0.5, text=TextConfig(520, 16, 1, 2), image=None,
        autoencoder=AutoencoderConfig(8, (1, 2), 1, 4, 4), unet=UNetConfig(4, 16, (1, 2), 1, (0, 1), 2, 16, 4))
    model = reference.randomise(LatentDiffusion(config), seeded()).double().eval()
    model.tokenizer = Tokenizer.train(["a red circle", "a blue square"], 520)
    return model


def by_hand(model, prompts, negative, w, z, **options):
    """The guided trajectory with two separate passes of the U-Net, and no prepared keys and values."""
    text, empty = model.embed(prompts), model.embed([negative] * len(prompts))
    predict = lambda z, t: (1 - w) * model.unet(z, t, empty) + w * model.unet(z, t, text)  # noqa: E731
    return [z for _, z, _ in ddim_sample(predict, model.schedule, z, **options)]


@pytest.mark.parametrize("w, negative", [(0.0, ""), (1.0, ""), (3.0, ""), (3.0, "a blue square")])
@torch.no_grad()
def test_denoise_is_guided_ddim(model, w, negative):
    prompts, z = ["a red circle", "two"], noise(2, 4, 4, 4)
    options = dict(steps=4, eta=0.5, spacing="leading", start=800)
    steps = model.denoise(prompts, guidance=w, negative=negative, z=z, generator=seeded(1), **options)
    for (_, mine, _), expected in zip(steps, by_hand(model, prompts, negative, w, z, generator=seeded(1), **options), strict=True):
        close(mine, expected)


@pytest.mark.parametrize("w, batch", [(1.0, 2), (2.0, 4)])
def test_generate_calls_the_unet_once_a_step_and_decodes_once(model, w, batch):
    calls, decoded = [], []
    hooks = [model.unet.register_forward_hook(lambda m, inputs, out: calls.append(len(inputs[0]))),
             model.autoencoder.decoder[-1].register_forward_hook(lambda m, inputs, out: decoded.append(len(out)))]
    x = model.generate(["a red circle", "two"], steps=3, guidance=w, generator=seeded())
    for hook in hooks:
        hook.remove()
    assert calls == [batch] * 3 and decoded == [2] and x.shape == (2, 3, 8, 8)


@torch.no_grad()
def test_generate_starts_from_the_generators_noise_and_decodes_the_last_z(model):
    z = by_hand(model, ["a red circle"], "", 2.0, noise(1, 4, 4, 4, seed=9), steps=3)[-1]
    expected = model.autoencoder.decode(z / 0.5).clamp(-1, 1)
    close(model.generate(["a red circle"], steps=3, guidance=2.0, generator=seeded(9)), expected)
    assert not torch.allclose(model.generate(["a red circle"], steps=3, guidance=2.0, generator=seeded(8)), expected)
