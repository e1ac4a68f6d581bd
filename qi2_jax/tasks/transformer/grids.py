"""Sample grids of a training run, drawn from the EMA weights with the same noise each time.

There is one grid per stream (area and number of condition images). For each held-out sample it shows the condition
images, the target as the autoencoder reconstructs it, and what the transformer draws for the text. Fixed prompts and
edits have separate grids, without a target.

Dims: `B` batch, `N` target slots, `C` latent channels; `h`, `w` rows and columns of latents, `H`, `W` of pixels; `c`
image channels.
"""

import dataclasses
import pathlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from jaxtyping import Float, UInt8
from PIL import Image

from data_pipeline.loading.batch import collate, with_text
from data_pipeline.loading.mixture import Stream
from data_pipeline.samples.schema import Sample, Text
from qi2_jax import sharding
from qi2_jax.diffusion import sampler
from qi2_jax.diffusion.noise import initial_noise
from qi2_jax.diffusion.schedule import Schedule
from qi2_jax.inference import encoders, tiling
from qi2_jax.interop import components
from qi2_jax.models.vae import VAE
from qi2_jax.pixels import over_white, to_image
from qi2_jax.reporting.grid import in_ascii, lay_out
from qi2_jax.runs import model_folder
from qi2_jax.runtime import processes
from qi2_jax.tasks.transformer.batches import Inputs
from qi2_jax.tasks.transformer.fixed_prompts import Panel
from qi2_jax.tasks.transformer.objective import Objective
from qi2_jax.tasks.transformer.samples_config import Samples
from qi2_jax.training.step import TrainState
from qi2_jax.training.task import CheckSignals
from qi2_jax.training.telemetry.metrics import Drawing

# Pixels of an image's longer side: large enough to judge composition; a grid of 8 x 5 images stays below 40 MB.
CELL = 512
COLUMNS = 4  # images in a row of the grid, which several samples with few images share


@dataclasses.dataclass(frozen=True, kw_only=True)
class Grids:
    """Draws the grids of a run.

    Attributes:
      config: group `samples` with `count` (held-out samples per stream), `steps`, `guidance` and `seed`.
      streams: streams whose held-out samples are drawn.
      fixed: further panels by name.
      objective: objective of the training.
      frozen: parameters that are not trained.
      schedule: times of the sampler's steps.
      vae: autoencoder that decodes, on one device of this process.
      channels: number of latent channels.
      mesh: devices of the run.
      inputs: encoders that complete batches.
    """

    config: Samples
    streams: Sequence[Stream]
    fixed: Mapping[str, Panel]
    objective: Objective
    frozen: Any
    schedule: Schedule
    vae: VAE
    channels: int
    mesh: Mesh
    inputs: Inputs

    def draw(self, state: TrainState, check_signals: CheckSignals) -> dict[str, Drawing]:
        """All grids by name.

        Args:
          state: training state.
          check_signals: callback before each step of sampling and before the images of a sample are decoded. It may
            raise to end the drawing.
        """
        grids = {}
        for stream in self.streams if self.config.count else ():
            samples = [stream.held_out[row] for row in range(min(self.config.count, len(stream.held_out)))]
            panel = Panel(stream.loader.layout, samples, stream.loader.empty)
            grids[stream.name] = self._draw_panel(state, panel, check_signals, held_out=True)
        return grids | {name: self._draw_panel(state, panel, check_signals) for name, panel in self.fixed.items()}

    def _draw_panel(
        self, state: TrainState, panel: Panel, check_signals: CheckSignals, held_out: bool = False
    ) -> Drawing:
        """One grid. Held-out samples are shown with their targets."""
        size = sharding.padded_size(self.mesh, len(panel.samples))
        samples = [panel.samples[row % len(panel.samples)] for row in range(size)]
        latents = self._sample(state, panel, samples, check_signals)
        rows = []
        for sample, drawn in zip(panel.samples, latents, strict=False):
            check_signals()
            h, w = sample.latents.shape[:2]
            target, *conditions = self.inputs.latents(sample)
            shown = (*conditions, target) if held_out else conditions
            rows.append([self._decode(part) for part in (*shown, drawn[: h * w].reshape(h, w, -1))])
        columns = [f"condition {number + 1}" for number in range(len(panel.layout.conditions))]
        columns += ["target"] * held_out + ["sample"]
        return drawing(columns, rows, [notes_of(sample, held_out) for sample in panel.samples])

    def _sample(
        self, state: TrainState, panel: Panel, samples: Sequence[Sample], check_signals: CheckSignals
    ) -> Float[np.ndarray, "B N C"]:
        """Latents that the EMA weights draw, in every process."""
        config, rows = self.config, sharding.local_rows(self.mesh, len(samples))
        sizes = [sample.latents.shape[:2] for sample in samples]
        times = np.stack([self.schedule.times(config.steps, h * w) for h, w in sizes], axis=1)
        noise = initial_noise(config.seed, [h * w for h, w in sizes], panel.layout.target, self.channels)

        def watched(steps: Iterable[int]) -> Iterator[int]:
            for step in steps:
                check_signals()
                yield step

        negative = None
        if config.guidance > 1:
            negative = self._prompt(panel, samples, [sample.empty or panel.empty for sample in samples])
        latents = sampler.sample(
            self.objective.assemble(self.frozen, state.ema),
            sharding.put_batch(self.mesh, noise[list(rows)], len(samples)),
            times,
            self._prompt(panel, samples, [sample.texts[0] for sample in samples]),
            negative=negative,
            guidance=config.guidance,
            execution=self.objective.execution,
            progress=watched,
        )
        several = jax.process_count() > 1
        return np.asarray(multihost_utils.process_allgather(latents, tiled=True) if several else latents)

    def _prompt(self, panel: Panel, samples: Sequence[Sample], texts: Sequence[Text]) -> sampler.Prompt:
        """The samples with these texts, as one side of guidance."""
        rows = sharding.local_rows(self.mesh, len(samples))
        batch = collate(panel.layout, [with_text(samples[row], texts[row]) for row in rows])
        batch = self.inputs.complete_on_host(panel.layout, batch)
        batch = sharding.put_batch(self.mesh, batch, len(samples))
        return sampler.Prompt(panel.layout, self.objective.complete(self.frozen, panel.layout, batch).cond)

    def _decode(self, latents: Float[np.ndarray, "h w C"]) -> UInt8[np.ndarray, "H W c"]:
        return to_image(tiling.decode(self.vae, latents[None], np.float32)[0])


def make_grids(
    config: Samples,
    streams: Sequence[Stream],
    fixed: Mapping[str, Panel],
    objective: Objective,
    frozen: Any,
    model: pathlib.Path,
    mesh: Mesh,
    inputs: Inputs,
) -> Grids | None:
    """The grids of a run; None if the config asks for none, or the model folder has no autoencoder.

    Args:
      config: group `samples` with `every`, and as for `Grids`.
      streams: as for `Grids`.
      fixed: as for `Grids`.
      objective: as for `Grids`.
      frozen: as for `Grids`.
      model: model folder of the run, whose autoencoder decodes.
      mesh: as for `Grids`.
      inputs: as for `Grids`.
    """
    if not config.every or not (config.count or fixed):
        return None
    if not (model / "vae").is_dir():
        processes.log_on_main(f"{model} has no autoencoder: no sample grids are drawn")
        return None
    return Grids(
        config=config,
        streams=streams,
        fixed=fixed,
        objective=objective,
        frozen=frozen,
        # A run that started from an imported folder samples with that folder's scheduler, as `qi2 sample` does later.
        schedule=model_folder.kept_schedule(model) or Schedule(objective.shift),
        # Every process decodes although only the first one writes, because the others would just wait for it.
        vae=encoders.load(model, "vae", local_mesh(), np.float32),
        channels=components.read_config(model / "vae", "vae").latent_channels,
        mesh=mesh,
        inputs=inputs,
    )


def local_mesh() -> Mesh:
    """One device of this process."""
    return sharding.make_mesh(sharding.MeshShape(), jax.local_devices()[:1])


def notes_of(sample: Sample, held_out: bool) -> dict[str, Any]:
    """The text of a sample (None if it was encoded without), and the record of a held-out one."""
    return {"text": sample.texts[0].prompt} | ({"record": sample.record} if held_out else {})


def drawing(
    columns: Sequence[str],
    samples: Sequence[Sequence[UInt8[np.ndarray, "_ _ c"]]],
    notes: Sequence[Mapping[str, Any]],
) -> Drawing:
    """Arranges images as a grid with numbers and texts. Cells have at most `CELL` pixels a side.

    The texts are shown as far as the font has their characters. Where the last image of a sample, which the transformer
    drew, is larger than its cell, the drawing also keeps it at full size under the sample's number.

    Args:
      columns: titles of the images of a sample.
      samples: images of each sample with values 0..255; the grid composites alpha over white.
      notes: `text` of each sample, and its `record` if the text is None.
    """
    texts = [f"record {note['record']}" if note["text"] is None else in_ascii(note["text"]) for note in notes]
    numbered = [f"{number}. {text}" for number, text in enumerate(texts, start=1)]
    cells = [[_cell(pixels) for pixels in images] for images in samples]
    pixels = np.asarray(lay_out(cells, columns, numbered, max(1, COLUMNS // len(columns))))
    whole = {
        str(number): images[-1] for number, images in enumerate(samples, start=1) if max(images[-1].shape[:2]) > CELL
    }
    return Drawing(pixels, {"columns": list(columns), "samples": list(notes)}, whole)


def _cell(pixels: UInt8[np.ndarray, "H W c"]) -> Image.Image:
    image = over_white(Image.fromarray(pixels))
    image.thumbnail((CELL, CELL), Image.Resampling.LANCZOS, reducing_gap=None)
    return image
