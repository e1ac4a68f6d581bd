"""Sampling times against the published scheduler's."""

import numpy as np
import pytest
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.qwenimage21.pipeline_qwenimage21 import calculate_shift

from qi2_jax.diffusion.schedule import Schedule
from qi2_jax.diffusion.timesteps import Shift

DYNAMIC = dict(use_dynamic_shifting=True, max_shift=0.9, max_image_seq_len=8192)
CONFIGS = {
    "as_qwen_image": DYNAMIC | dict(shift_terminal=0.02),
    "no_terminal": DYNAMIC,
    "linear": dict(use_dynamic_shifting=True, time_shift_type="linear", base_shift=1.5, max_shift=4.0),
    "other_anchors": DYNAMIC | dict(base_image_seq_len=1024, max_image_seq_len=4096, base_shift=0.3),
    "static": dict(shift=3.0),
    "static_to_terminal": dict(shift=1.7, shift_terminal=0.1),
    "plain": {},
}


def published_times(config, steps, tokens, sigmas=None):
    """The times that the published pipeline sets before its loop."""
    scheduler = FlowMatchEulerDiscreteScheduler(**config)
    values = scheduler.config
    mu = calculate_shift(
        tokens, values.base_image_seq_len, values.max_image_seq_len, values.base_shift, values.max_shift
    )
    sigmas = np.linspace(1.0, 1 / steps, steps) if sigmas is None else sigmas
    scheduler.set_timesteps(sigmas=sigmas, mu=mu)
    return scheduler.sigmas.numpy(), dict(scheduler.config)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize(("steps", "tokens"), [(2, 24), (8, 256), (40, 4096), (50, 16384)])
def test_parity_of_times(name, steps, tokens):
    want, config = published_times(CONFIGS[name], steps, tokens)
    got = Schedule.from_diffusers(config).times(steps, tokens)
    assert got.dtype == np.float32 and got.shape == (steps + 1,)
    assert got[0] == 1 and got[-1] == 0 and np.all(np.diff(got) < 0)
    np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", CONFIGS)
def test_parity_of_given_times(name):
    sigmas = [0.95, 0.6, 0.5, 0.1]
    want, config = published_times(CONFIGS[name], 4, 1024, sigmas)
    for schedule, given in [
        (Schedule.from_diffusers(config, sigmas), None),
        (Schedule.from_diffusers(config), sigmas),
        (Schedule.from_diffusers(config, [0.3]), sigmas),
    ]:
        np.testing.assert_allclose(schedule.times(40, 1024, given), want, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", CONFIGS)
def test_round_trip_of_the_configuration(name):
    published = FlowMatchEulerDiscreteScheduler(**CONFIGS[name])
    schedule = Schedule.from_diffusers(dict(published.config))
    again = FlowMatchEulerDiscreteScheduler.from_config(schedule.to_diffusers())
    own = {key: value for key, value in published.config.items() if not key.startswith("_")}
    assert {key: again.config[key] for key in own} == own
    assert Schedule.from_diffusers(schedule.to_diffusers()) == schedule


def test_parity_of_defaults():
    assert Schedule.from_diffusers({}) == Schedule.from_diffusers(dict(FlowMatchEulerDiscreteScheduler().config))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"_class_name": "DDIMScheduler"}, "DDIMScheduler"),
        ({"use_karras_sigmas": True}, "'use_karras_sigmas': True"),
        ({"use_beta_sigmas": True, "invert_sigmas": True}, "'invert_sigmas': True, 'use_beta_sigmas': True"),
        ({"stochastic_sampling": True}, "stochastic_sampling"),
        ({"num_train_timesteps": 500}, "500"),
        ({"time_shift_type": "cubic"}, "'cubic'"),
    ],
)
def test_schedulers_that_are_refused(config, message):
    with pytest.raises(ValueError, match=message):
        Schedule.from_diffusers(config)


@pytest.mark.parametrize(
    ("schedule", "steps", "sigmas", "message"),
    [
        (Schedule(), 0, None, "at least 1, got 0"),
        (Schedule(), 5, [], r"in \(0, 1\], got \[\]"),
        (Schedule(), 5, [1.0, 0.0], r"got \[1.0, 0.0\]"),
        (Schedule(), 5, [1.5, 0.5], "1.5"),
        (Schedule(), 5, [[1.0, 0.5]], "list of times"),
        (Schedule(), 5, [float("nan")], "nan"),
        (Schedule(terminal=0.02), 5, [1.0, 1.0], "must decrease"),
        (Schedule(Shift(dynamic=False, shift=1e9), 0.02), 5, [1.0, 0.5], "is 1, so they cannot be stretched to end at"),
        (Schedule(terminal=None, sample_sigmas=(0.5, 0.9)), 5, None, r"must decrease .*got \[0.5, 0.8"),
        (Schedule(sample_sigmas=(2.0,)), 5, None, "2.0"),
    ],
)
def test_times_that_are_refused(schedule, steps, sigmas, message):
    with pytest.raises(ValueError, match=message):
        schedule.times(steps, 256, sigmas)


@pytest.mark.parametrize("terminal", [None, 0.02, 0.5])
def test_one_step_goes_from_noise_to_data_at_every_size(terminal):
    """In fp32, the shift of time 1 is slightly below 1 at a quarter of all sizes, such as 64, 2304 and 6032 tokens."""
    schedule = Schedule(Shift(), terminal)
    for tokens in range(1, 7000):
        np.testing.assert_array_equal(schedule.times(1, tokens), np.float32([1, 0]))
    np.testing.assert_array_equal(schedule.times(40, 64, [1.0]), np.float32([1, 0]))


def test_no_size_is_refused_for_a_rounding_of_its_shift():
    for tokens in range(1, 5000):
        assert Schedule().times(4, tokens)[0] == 1
