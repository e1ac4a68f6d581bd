"""Inputs of the encoder, prepared on the host.

Whatever depends on prompts and image sizes is data in arrays; the caller can fix their shapes.

Dims: `B` prompts, `S` tokens, `I` images of all prompts, `P` patches per image, `C` numbers per patch, `M` visual
features per image (P / m^2, with m the side of the square of patches that are merged).
"""

import dataclasses
from collections.abc import Iterator, Sequence

import jax
import numpy as np
from jaxtyping import Bool, Float, Int

from qi2_jax.models.layers import AnyArray
from qi2_jax.models.qwen3_vl.config import Qwen3VLConfig, VisionConfig


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class VisionInputs:
    """Images, one per row, padded to a common number of patches.

    Attributes:
      patches: pixels, fp32, normalised; patches in merge order.
      valid: False marks padding.
      coordinates: int32, row and column of each patch.
      table_index, table_weight: four entries of the learned position table around each patch, and their weights.
      slots: int32, the flat position b * S + s of every feature among the tokens; B * S where there is none.
    """

    patches: Float[AnyArray, "I P C"]
    valid: Bool[AnyArray, "I P"]
    coordinates: Int[AnyArray, "I P 2"]
    table_index: Int[AnyArray, "I P 4"]
    table_weight: Float[AnyArray, "I P 4"]
    slots: Int[AnyArray, "I M"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class EncoderInputs:
    """A batch of prompts, padded on the left.

    Attributes:
      input_ids: int32; an image is one image token per feature.
      valid: False marks padding.
      positions: int32, frame, height and width position of every token; 0 at padding.
      vision: images of the batch; None if it has none.
    """

    input_ids: Int[AnyArray, "B S"]
    valid: Bool[AnyArray, "B S"]
    positions: Int[AnyArray, "3 B S"]
    vision: VisionInputs | None


def prepare_inputs(
    config: Qwen3VLConfig,
    token_ids: Sequence[Sequence[int]],
    patches: Float[np.ndarray, "patches C"] | None = None,
    grids: Int[np.ndarray, "I 3"] | None = None,
    *,
    length: int | None = None,
    image_count: int | None = None,
    patch_count: int | None = None,
) -> EncoderInputs:
    """Pads a batch and computes positions and indices, as NumPy arrays.

    Args:
      token_ids: prompts without padding; their images are in the order of `grids`.
      patches: patches of all images, concatenated, in merge order.
      grids: (frames, rows, columns) of each image in patches; one frame.
      length, image_count, patch_count: S, I and P to pad to, so that different batches run the same compiled program;
        by default the largest in the batch. With `image_count`, a batch without images has rows of padding instead.

    Raises:
      ValueError: if something does not fit, or images and image tokens disagree.
    """
    vision, merge = config.vision, config.vision.spatial_merge_size
    grids = np.zeros((0, 3), np.int64) if grids is None else np.asarray(grids)
    if grids.size and (np.any(grids[:, 0] != 1) or np.any(grids[:, 1:] % merge)):
        raise ValueError(f"image grids must have one frame and sides that are multiples of {merge}, got {grids}")
    if not all(len(ids) for ids in token_ids):
        raise ValueError("a prompt has no tokens; an empty prompt is the single blank ' '")

    batch, longest = len(token_ids), max(len(ids) for ids in token_ids)
    length = _fitted("length", length, longest, "tokens in the longest prompt")
    input_ids, valid = np.zeros((batch, length), np.int32), np.zeros((batch, length), bool)
    positions = np.zeros((3, batch, length), np.int32)
    merged = iter([(int(rows) // merge, int(columns) // merge) for _, rows, columns in grids])
    for b, ids in enumerate(token_ids):
        start = length - len(ids)
        input_ids[b, start:], valid[b, start:] = ids, True
        positions[:, b, start:] = mrope_positions(np.asarray(ids), config.image_token_id, merged)
    if (unused := len(list(merged))) > 0:
        raise ValueError(f"{unused} of {len(grids)} images have no image tokens in the prompts")

    if image_count is None and len(grids) == 0:
        return EncoderInputs(input_ids, valid, positions, vision=None)
    slots = np.flatnonzero(valid & (input_ids == config.image_token_id))
    images = _vision_inputs(vision, patches, grids, slots, batch * length, image_count, patch_count)
    return EncoderInputs(input_ids, valid, positions, images)


def _vision_inputs(
    vision: VisionConfig,
    patches: Float[np.ndarray, "patches C"] | None,
    grids: Int[np.ndarray, "I 3"],
    slots: Int[np.ndarray, "features"],
    no_slot: int,
    image_count: int | None,
    patch_count: int | None,
) -> VisionInputs:
    """Pads the images of a batch.

    Args:
      slots: flat position among the tokens of each feature of all images.
      no_slot: position that marks padding.
    """
    merge, counts = vision.spatial_merge_size, grids[:, 1] * grids[:, 2]
    if len(grids) and (patches is None or patches.shape != (counts.sum(), vision.patch_dim)):
        found = None if patches is None else patches.shape
        raise ValueError(f"patches must have shape {(counts.sum(), vision.patch_dim)} for grids {grids}, got {found}")
    rows = _fitted("image_count", image_count, len(grids), "images")
    columns = _fitted("patch_count", patch_count, int(counts.max(initial=merge**2)), "patches in the largest image")
    if columns % merge**2:
        raise ValueError(f"patch_count {columns} must be a multiple of {merge**2}, the patches of one feature")
    filled = VisionInputs(
        patches=np.zeros((rows, columns, vision.patch_dim), np.float32),
        valid=np.zeros((rows, columns), bool),
        coordinates=np.zeros((rows, columns, 2), np.int32),
        table_index=np.zeros((rows, columns, 4), np.int32),
        table_weight=np.zeros((rows, columns, 4), np.float32),
        slots=np.full((rows, columns // merge**2), no_slot, np.int32),
    )
    ends = np.cumsum(counts)
    for i, (_, height, width) in enumerate(grids.tolist()):
        count, before = counts[i], ends[i] - counts[i]
        here = np.s_[i, :count]
        assert patches is not None
        filled.patches[here], filled.valid[here] = patches[before : ends[i]], True
        filled.coordinates[here] = coordinates = patch_coordinates(height, width, merge)
        filled.table_index[here], filled.table_weight[here] = table_corners(coordinates, height, width, vision)
        filled.slots[i, : count // merge**2] = slots[before // merge**2 : ends[i] // merge**2]
    return filled


def _fitted(name: str, wanted: int | None, needed: int, what: str) -> int:
    if wanted is not None and wanted < needed:
        raise ValueError(f"{name} {wanted} is less than the {needed} {what}")
    return needed if wanted is None else wanted


def mrope_positions(
    ids: Int[np.ndarray, "S"], image_token_id: int, grids: Iterator[tuple[int, int]]
) -> Int[np.ndarray, "3 S"]:
    """Frame, height and width positions of one prompt without padding, as Qwen3-VL counts them.

    A text token has position (p, p, p) and advances p by one. An image keeps frame = p, counts its rows and columns
    from p, and then advances p by the larger of its sides.

    Args:
      ids: token ids of the prompt.
      image_token_id: id of the token that stands for one image feature.
      grids: (rows, columns) in features of this prompt's images, and of the prompts after it.

    Raises:
      ValueError: if a run of image tokens is not exactly one image.
    """
    positions = np.zeros((3, len(ids)), np.int32)
    is_image = ids == image_token_id
    start, p = 0, 0
    while start < len(ids):
        if not is_image[start]:
            stop = start + int(next(iter(np.flatnonzero(is_image[start:])), len(ids) - start))
            positions[:, start:stop] = p + np.arange(stop - start)
            p += stop - start
        else:
            rows, columns = next(grids, (0, 0))
            stop = start + rows * columns
            if start == stop or not is_image[start:stop].all() or len(ids) < stop or is_image[stop : stop + 1].any():
                raise ValueError(
                    f"the run of image tokens at token {start} does not have the {rows} x {columns} features of its "
                    "image; every image needs its own run"
                )
            positions[0, start:stop] = p
            positions[1, start:stop] = p + np.repeat(np.arange(rows), columns)
            positions[2, start:stop] = p + np.tile(np.arange(columns), rows)
            p += max(rows, columns)
        start = stop
    return positions


def patch_coordinates(height: int, width: int, merge: int) -> Int[np.ndarray, "P 2"]:
    """Row and column of every patch of an image, in merge order."""
    grid = np.stack(np.meshgrid(np.arange(height), np.arange(width), indexing="ij"), axis=-1)
    blocks = grid.reshape(height // merge, merge, width // merge, merge, 2)
    return blocks.transpose(0, 2, 1, 3, 4).reshape(-1, 2)


def table_corners(
    coordinates: Int[np.ndarray, "P 2"], height: int, width: int, vision: VisionConfig
) -> tuple[Int[np.ndarray, "P 4"], Float[np.ndarray, "P 4"]]:
    """Bilinear resampling of the square position table to an image's grid, corners on corners.

    Returns:
      Flat indices into the table and fp32 weights that sum to one.
    """
    side = vision.table_side
    source = (
        coordinates.astype(np.float32) * np.float32(side - 1) / np.maximum(np.array([height, width], np.float32) - 1, 1)
    )
    low = np.floor(source).astype(np.int64)
    high, share = np.minimum(low + 1, side - 1), source - low
    rows, columns = np.stack([low[:, 0], high[:, 0]], 1), np.stack([low[:, 1], high[:, 1]], 1)
    row_weight, column_weight = (np.stack([1 - share[:, axis], share[:, axis]], 1) for axis in range(2))
    index = rows[:, :, None] * side + columns[:, None, :]
    return index.reshape(-1, 4), (row_weight[:, :, None] * column_weight[:, None, :]).reshape(-1, 4)
