"""Sizes of generated images. Imports nothing, so that the command line checks them at once."""

SIDE_MULTIPLE = 32  # pixels: one feature of the encoder covers 2 x 2 latents of 16 x 16 pixels
MAX_SIDE = 8192  # pixels: four times the side of the largest training images


def check_size(width: int, height: int) -> None:
    """Raises a ValueError for a size in pixels that cannot be generated."""
    if any(side % SIDE_MULTIPLE or not 0 < side <= MAX_SIDE for side in (width, height)):
        raise ValueError(
            f"size {width}x{height} must have sides that are multiples of {SIDE_MULTIPLE} pixels, up to {MAX_SIDE}"
        )
