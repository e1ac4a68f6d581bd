"""Random mattes: transparency for training on images, nearly all of which are opaque.

Dims: `H` `W` pixels.
"""

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image

MAX_CELLS = 6  # cells per side of the random field; more give smaller spots
SOFTNESS = (0.01, 0.5)  # range, between the lowest and highest value of the field, in which a matte is half transparent
COVERED = (0.3, 0.7)  # range of the level of the field at which a matte is cut


def random_matte(height: int, width: int, rng: np.random.Generator) -> Float[np.ndarray, "H W"]:
    """A smooth random matte, 0 (transparent) to 1, with edges from hard to wide gradients."""
    cells = Image.fromarray(rng.random((int(rng.integers(2, MAX_CELLS + 1)),) * 2, np.float32))
    field = np.asarray(cells.resize((width, height), Image.Resampling.BICUBIC))
    low, high = field.min(), field.max()
    level = rng.uniform(*COVERED)
    softness = np.exp(rng.uniform(*np.log(SOFTNESS)))
    relative = (field - low) / max(high - low, 1e-6)
    return np.clip((relative - level) / softness + 0.5, 0, 1).astype(np.float32)


def with_matte(pixels: UInt8[np.ndarray, "H W 4"], rng: np.random.Generator) -> UInt8[np.ndarray, "H W 4"]:
    """RGBA pixels whose alpha is multiplied by a random matte. Fully transparent pixels are white, as in `prepare`."""
    matted = pixels.copy()
    matted[..., 3] = np.round(pixels[..., 3] * random_matte(pixels.shape[0], pixels.shape[1], rng))
    matted[matted[..., 3] == 0] = (255, 255, 255, 0)
    return matted
