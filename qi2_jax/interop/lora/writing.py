"""From an adapter of ours to one safetensors file that diffusers' `load_lora_weights` reads.

A tensor is called `transformer.` + the published path of its layer + `.lora_A.weight` [rank, in] or `.lora_B.weight`
[out, rank]. Rank and alpha are in the file's header, as diffusers' `save_lora_weights` writes them. Programs that do
not read them assume that alpha equals the rank.
"""

import json
import pathlib
import re
from typing import Any

import numpy as np

from qi2_jax.interop import files, tensor_names
from qi2_jax.interop.components import COMPONENTS
from qi2_jax.interop.lora import merging
from qi2_jax.interop.lora.merging import Changes
from qi2_jax.interop.lora.reading import FILE
from qi2_jax.interop.lora.settings import METADATA, PREFIX
from qi2_jax.interop.mmdit import NAMES
from qi2_jax.interop.tensors import Writer
from qi2_jax.models import lora, tree
from qi2_jax.models.lora import LoRAConfig
from qi2_jax.models.mmdit import MMDiTConfig
from qi2_jax.runtime.dtypes import CODES, DTYPES


def expected(base_config: MMDiTConfig, config: LoRAConfig) -> tensor_names.Shapes:
    """{our name: shape} of every parameter of an adapter.

    Raises:
      ValueError: for targets that match nothing.
    """
    adapter = lora.abstract(COMPONENTS["transformer"].abstract(base_config), config)
    return {name: tuple(leaf.shape) for name, leaf in tree.to_dict(adapter).items()}


def export_lora(adapter: Any, config: LoRAConfig, out: pathlib.Path, code: str | None = None) -> pathlib.Path:
    """Writes an adapter into a new folder; equal values give equal bytes.

    Args:
      adapter: an adapter, or its leaves as {our name: array}.
      config: rank and alpha of the adapter.
      out: folder to create; must be empty or missing.
      code: dtype of safetensors to convert to; None: dtype of the adapter.

    Returns:
      The file, for `pipe.load_lora_weights(file)`.

    Raises:
      ValueError: if `out` is not empty.
    """
    parts: dict[str, np.ndarray] = {}
    for ours, leaf in tree.to_dict(adapter).items():
        array = np.asarray(leaf)
        published = NAMES.to_published(ours, array.shape)
        stacked = NAMES.is_stacked(published[0])
        parts |= {name: array[layer] if stacked else array for layer, name in enumerate(published)}
    alpha = int(config.alpha) if config.alpha == int(config.alpha) else config.alpha
    return _write(parts, out, code, config.rank, alpha)


def export_changes(changes: Changes, out: pathlib.Path, code: str | None = None) -> pathlib.Path:
    """Writes the sum of several adapters, whose ranks may differ between layers, as `export_lora` does.

    The scales move into B, so that alpha equals the rank in every layer. Where the ranks differ, the header names none:
    diffusers, peft and ComfyUI then take them from the tensors.

    Args:
      changes: changes to write, for example `merging.concatenated([...])`.
      out: folder to create; must be empty or missing.
      code: dtype of safetensors to convert to; None: fp32.
    """
    parts: dict[str, np.ndarray] = {}
    for path, layer, change in merging.each(merging.concatenated([changes])):
        published = NAMES.to_published(f"{path}.weight", ((layer or 0) + 1,))[-1].removesuffix("weight")
        parts |= {f"{published}lora_A.weight": change.a, f"{published}lora_B.weight": change.b}
    ranks = {change.rank for _, _, change in merging.each(changes)}
    rank = ranks.pop() if len(ranks) == 1 else None
    return _write(parts, out, code, rank, rank)


def _write(
    parts: dict[str, np.ndarray], out: pathlib.Path, code: str | None, rank: int | None, alpha: float | None
) -> pathlib.Path:
    """Writes factors, by their published names; a rank of None writes no configuration into the header."""
    metadata = None
    if rank is not None:
        layers = {re.sub(r"^transformer_blocks\.\d+\.", "", name.rpartition(".lora_")[0]) for name in parts}
        values = {"r": rank, "lora_alpha": alpha, "target_modules": sorted(layers)}
        metadata = {METADATA: json.dumps({PREFIX + key: value for key, value in values.items()})}
    if code is not None:
        parts = {name: part.astype(DTYPES[code]) for name, part in parts.items()}
    specs = {PREFIX + name: (CODES[part.dtype], part.shape) for name, part in parts.items()}
    with (
        files.building(out, sum(part.nbytes for part in parts.values())) as place,
        Writer(place / FILE, specs, metadata=metadata) as writer,
    ):
        for name, part in parts.items():
            writer.write(PREFIX + name, part)
    return out / FILE
