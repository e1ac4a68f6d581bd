"""The linear code is the one with the smallest squared error."""

import numpy as np
import pytest
from sklearn.decomposition import PCA

from qi2_jax.evaluation import linear_code


def images(count: int = 3) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    waves = [np.cumsum(np.cumsum(rng.normal(size=(32, 48, 3)), axis=0), axis=1) for _ in range(count)]
    return [np.clip(127 + 2 * wave, 0, 255).astype(np.uint8) for wave in waves]


def patches(image: np.ndarray) -> np.ndarray:
    return np.stack([image[y : y + 8, x : x + 8].ravel() for y in range(0, 32, 8) for x in range(0, 48, 8)])


def test_reconstruction_equals_principal_component_analysis():
    (code,) = linear_code.fit(images(), [(8, 10)])
    together = np.concatenate([patches(image) for image in images()]).astype(float)
    reference = PCA(10, svd_solver="full").fit(together)
    assert (code.factor, code.channels, code.num_patches) == (8, 10, len(together))
    image = images()[1]
    expected = np.round(reference.inverse_transform(reference.transform(patches(image).astype(float))))
    (rebuilt,) = code.reconstruct(image[None])
    difference = np.abs(patches(rebuilt).astype(int) - np.clip(expected, 0, 255))
    assert difference.max() <= 1 and np.mean(difference > 0) < 1e-3  # rounding of halves


def test_more_components_are_closer_and_all_are_exact():
    codes = linear_code.fit(images(), [(8, 1), (8, 16), (4, 48), (8, 500)])
    image = np.stack(images())
    errors = [np.mean((code.reconstruct(image).astype(float) - image) ** 2) for code in codes]
    assert errors[0] > errors[1] > 0 and errors[2] == errors[3] == 0
    assert [code.channels for code in codes] == [1, 16, 48, 192]


def test_what_cannot_be_fitted_is_refused():
    with pytest.raises(ValueError, match="at least one image"):
        linear_code.fit([], [(8, 4)])
    with pytest.raises(ValueError, match="patches of 64 x 64 pixels have 12288 values; at most 3072"):
        linear_code.fit(images(), [(64, 4)])
