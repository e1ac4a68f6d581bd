"""Pictures of a training: samples of its validation, and the config's fixed prompts and edits, drawn from the averaged
weights with the same noise each time.

One grid per stream (area and number of condition images): of each held sample its condition images, its own picture
as the autoencoder gives it back, and what the transformer makes of its text. Likewise of the fixed ones, which have no
picture of their own.
"""

import pathlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from jaxtyping import Float, UInt8
from PIL import Image

from data_pipeline.loading.loader import Row, collate
from data_pipeline.loading.mixture import Mixture
from data_pipeline.samples.schema import Sample
from qi2_jax import sharding
from qi2_jax.diffusion import sampler
from qi2_jax.diffusion.noise import initial_noise
from qi2_jax.diffusion.schedule import Schedule
from qi2_jax.inference import encoders
from qi2_jax.inference.latents import decode_latents
from qi2_jax.interop import components
from qi2_jax.pixels import over_white, to_image
from qi2_jax.reporting import sheet
from qi2_jax.runs import model_folder
from qi2_jax.runtime import processes
from qi2_jax.tasks.transformer.batches import Inputs
from qi2_jax.tasks.transformer.fixed_prompts import Panel
from qi2_jax.tasks.transformer.objective import Objective
from qi2_jax.training.step import TrainState
from qi2_jax.training.telemetry.metrics import Drawing

CELL = 512  # pixels of a picture's longer side: composition shows, and eight rows of five columns stay below 40 MB
COLUMNS = 4  # of pictures, which several samples with few pictures share


def drawer(
    config: Any,
    mixture: Mixture,
    fixed: Mapping[str, Panel],
    objective: Objective,
    frozen: Any,
    model: pathlib.Path,
    mesh: Mesh,
    inputs: Inputs,
) -> Callable[[TrainState, Callable[[], None]], dict[str, Drawing]] | None:
    """A function that draws the grids of a state by name; None where none are asked for, or nothing can decode them.

    Its second argument is called before each step of sampling, and before the pictures of a sample are decoded; what it
    raises ends the drawing.

    Args:
      config: `every`, `count` (held samples per stream), `steps`, `guidance`, `seed`.
      fixed: what is drawn beside the streams, by name.
      model: the run's model folder, whose autoencoder decodes.
      inputs: makes batches of rows.
    """
    if not config.every or not (config.count or fixed):
        return None
    if not (model / "vae").is_dir():
        processes.say(f"{model} has no autoencoder: no sample grids are drawn")
        return None
    # In every process, though the first alone writes: the others would only wait for it.
    vae = encoders.load(model, "vae", local_mesh(), np.float32)
    channels = components.read_config(model / "vae", "vae").latent_channels
    # A run that started from an imported folder samples with that folder's scheduler, as `qi2 sample` does later.
    schedule = model_folder.kept_schedule(model) or Schedule(objective.shift)

    def decode(latents: Float[np.ndarray, "h w C"]) -> UInt8[np.ndarray, "H W c"]:
        return to_image(np.asarray(decode_latents(vae, latents[None], np.float32))[0])

    def draw_panel(state: TrainState, panel: Panel, before_each: Callable[[], None], held: bool = False) -> Drawing:
        """`held`: samples of a stream, whose own pictures stand before the transformer's."""
        layout, count, parts = panel.layout, len(panel.samples), sharding.batch_parts(mesh)
        size = -(-count // parts) * parts
        chosen = [panel.samples[row % count] for row in range(size)]
        own = sharding.own_rows(mesh, size)

        def prompt(texts) -> sampler.Prompt:
            rows = collate(layout, [Row(chosen[row], texts[row]) for row in own])
            batch = sharding.put_batch(mesh, inputs.to_batch(layout, rows), size)
            return sampler.Prompt(layout, objective.complete(frozen, layout, batch).given)

        grids = [sample.latents.shape[:2] for sample in chosen]
        times = np.stack([schedule.times(config.steps, h * w) for h, w in grids], axis=1)
        noise = initial_noise(config.seed, [h * w for h, w in grids], layout.target, channels)
        negative = None
        if config.guidance > 1:
            negative = prompt([sample.empty or panel.empty for sample in chosen])

        def watched(steps: Iterable[int]) -> Iterator[int]:
            for step in steps:
                before_each()
                yield step

        latents = sampler.sample(
            objective.assemble(frozen, state.ema),
            sharding.put_batch(mesh, noise[list(own)], size),
            times,
            prompt([sample.texts[0] for sample in chosen]),
            negative=negative,
            guidance=config.guidance,
            execution=objective.run,
            progress=watched,
        )

        several = jax.process_count() > 1
        made = np.asarray(multihost_utils.process_allgather(latents, tiled=True) if several else latents)
        pictures = []
        for sample, own_latents, (h, w) in zip(chosen[:count], made, grids, strict=False):
            before_each()
            target, *conditions = inputs.latents(sample)
            shown = (*conditions, target) if held else conditions
            pictures.append([decode(part) for part in (*shown, own_latents[: h * w].reshape(h, w, -1))])
        columns = [f"condition {number + 1}" for number in range(len(layout.conditions))]
        columns += ["target"] * held + ["sample"]
        return drawing(columns, pictures, [notes_of(sample, held) for sample in chosen[:count]])

    def draw(state: TrainState, before_each: Callable[[], None]) -> dict[str, Drawing]:
        found = {}
        for stream in mixture.streams if config.count else ():
            held = [stream.held[row] for row in range(min(config.count, len(stream.held)))]
            panel = Panel(stream.loader.layout, held, stream.loader.empty)
            found[stream.name] = draw_panel(state, panel, before_each, held=True)
        return found | {name: draw_panel(state, panel, before_each) for name, panel in fixed.items()}

    return draw


def local_mesh() -> Mesh:
    """One device of this process."""
    return sharding.make_mesh(sharding.MeshShape(), jax.local_devices()[:1])


def notes_of(sample: Sample, held: bool) -> dict[str, Any]:
    """The text that a sample is drawn from, None where it was encoded without; of a held one also its record."""
    return {"text": sample.texts[0].prompt} | ({"record": sample.record} if held else {})


def drawing(
    columns: Sequence[str],
    samples: Sequence[Sequence[UInt8[np.ndarray, "_ _ c"]]],
    notes: Sequence[Mapping[str, Any]],
) -> Drawing:
    """Pictures of samples as a grid of cells of at most `CELL` pixels a side, with numbers and texts as far as the font
    has them; of the last ones, which the transformer drew, those that are larger also as they are, by these numbers.

    Args:
      columns: what the pictures of a sample are.
      samples: pixels 0..255; alpha is laid over white in the grid.
      notes: of each sample `text`, or None and `record`.
    """
    texts = [f"record {note['record']}" if note["text"] is None else sheet.in_ascii(note["text"]) for note in notes]
    numbered = [f"{number}. {text}" for number, text in enumerate(texts, start=1)]
    cells = [[_cell(pixels) for pixels in own] for own in samples]
    pixels = np.asarray(sheet.lay_out(cells, columns, numbered, max(1, COLUMNS // len(columns))))
    whole = {str(number): own[-1] for number, own in enumerate(samples, start=1) if max(own[-1].shape[:2]) > CELL}
    return Drawing(pixels, {"columns": list(columns), "samples": list(notes)}, whole)


def _cell(pixels: UInt8[np.ndarray, "H W c"]) -> Image.Image:
    image = over_white(Image.fromarray(pixels))
    image.thumbnail((CELL, CELL), Image.Resampling.LANCZOS, reducing_gap=None)
    return image
