"""The timesteps at which validation computes the loss."""

import jax.numpy as jnp
import numpy as np
import pytest

from data_pipeline.loading.batch import Batch
from qi2_jax.diffusion.timesteps import LogitNormal, Shift, Uniform
from qi2_jax.models.mmdit import Conditioning, Execution
from qi2_jax.sequence import Layout
from qi2_jax.tasks.transformer.objective import Objective
from qi2_jax.tasks.transformer.validation import HeldOut, make_validation
from qi2_jax.training.microbatch import Microbatch

TOKENS = (2, 4)  # of two images


class Times(Objective):
    """An objective whose loss is the timestep before the shift."""

    def losses(self, model, frozen, layout, batch, time, noise):
        return (t_B := time(jnp.sum(batch.cond.valid_BS, axis=1))), t_B


@pytest.mark.parametrize("distribution", [LogitNormal(-0.5, 1.2), Uniform(0.1, 0.4)])
def test_validation_reads_quantiles_of_the_timestep_distribution(distribution):
    valid = np.arange(4) < np.array(TOKENS)[:, None]
    batch = Batch(np.zeros((2, 4, 3), np.float32), Conditioning(None, None, valid))
    held_out = HeldOut([Microbatch(Layout((0,), 4), batch)], 2)
    found = make_validation(distribution, Times(Shift(), Execution()), 0)(None, None, held_out)
    np.testing.assert_allclose(found, distribution.quantile(np.linspace(0.1, 0.9, 9)), rtol=1e-6)
