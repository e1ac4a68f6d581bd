"""Error of sums of gradients over the chips of a slice in bf16, as a reduce-scatter around a ring makes them.

    python -m tests.benchmarks.sums_in_bf16

Each chip adds its gradient to the partial sum that it receives, and sends the result on, rounded to bf16. The gradients
of chips are drawn: a common part, the signal, and noise of each chip that is larger by a factor. The error is that of
the sum, relative to the exact sum; beside it stands the deviation of the exact sum from the signal, which the noise
causes anyway.
"""

import ml_dtypes
import numpy as np

CHIPS, NOISES, WEIGHTS = (16, 64, 256), (1, 10, 100), 20_000


def main() -> None:
    rng = np.random.default_rng(0)
    print(f"{'chips':>6} {'noise / signal':>15} {'error of bf16':>14} {'noise in the exact sum':>23}")
    for chips in CHIPS:
        for noise in NOISES:
            signal = rng.normal(size=WEIGHTS)
            given = (signal + noise * rng.normal(size=(chips, WEIGHTS))).astype(ml_dtypes.bfloat16)
            total = given[0]
            for gradient in given[1:]:
                total = (total.astype(np.float32) + gradient.astype(np.float32)).astype(ml_dtypes.bfloat16)
            exact = given.astype(np.float64).sum(axis=0)
            error = np.linalg.norm(total.astype(np.float64) - exact) / np.linalg.norm(exact)
            spread = np.linalg.norm(exact - chips * signal) / np.linalg.norm(exact)
            print(f"{chips:>6} {noise:>15} {error:>14.2%} {spread:>23.2%}")


if __name__ == "__main__":
    main()
