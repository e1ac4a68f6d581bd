"""The configs of whole jobs: a stage or an autoencoder that is trained alone, the demo, and the curriculum."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from data_pipeline.config import DataConfig
from data_pipeline.samples.schema import ONLINE
from qi2_jax import sharding
from qi2_jax.config import loading
from qi2_jax.config.fields import as_typed, changeable, check_at_least, check_one_of, choice, fixed
from qi2_jax.config.parsing import parse
from qi2_jax.sharding import MeshShape
from qi2_jax.tasks.autoencoder.config import AutoencoderConfig
from qi2_jax.tasks.devices import COMPUTE_DTYPES, make_mesh
from qi2_jax.tasks.transformer.config import StageConfig, StartConfig
from qi2_jax.training.config import check_seed


@dataclasses.dataclass(frozen=True, kw_only=True)
class EncodeConfig:
    """The encoding of selected records into samples.

    Attributes:
      online: what training computes in every step instead of reading it from the samples: "nothing", "text" or
        "text_and_images".
      dtype: dtype of the encoders and their outputs.
      batch_size: images or prompts that are encoded at once.
      mesh: devices of each process.
      records_per_unit: records that are encoded and stored together.

    Raises:
      ValueError: for a value out of its range.
    """

    online: str
    dtype: jnp.dtype = choice(COMPUTE_DTYPES)
    batch_size: int = changeable()
    mesh: MeshShape = changeable()
    records_per_unit: int

    def __post_init__(self) -> None:
        check_one_of(self, "online", ONLINE)
        check_at_least(self, records_per_unit=1)

    def check(self) -> None:
        """Raises a ValueError if the devices of this process cannot encode with this config."""
        try:
            sharding.local_rows(make_mesh(self.mesh, jax.local_devices()), self.batch_size)
        except ValueError as error:
            raise ValueError(f"encode: {error}") from None


@dataclasses.dataclass(frozen=True)
class EncoderConfig:
    """The condition encoder of a job without a model folder.

    Attributes:
      folder: folder of a Qwen3-VL as transformers saves it; "": a tiny one with random weights.
      width, layers, heads, seed: shape and seed of the tiny encoder.
    """

    folder: str
    width: int
    layers: int
    heads: int
    seed: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class JobConfig:
    """The config that all jobs share.

    Attributes:
      platform: "cpu", or "" for the devices that JAX finds.
      compilation_cache: folder in which compiled programs are kept, absolute or below the job's folder; "": none.
      as_typed: config as plain JSON, which a job records.

    Raises:
      ValueError: for an unknown platform.
    """

    platform: str
    compilation_cache: str = changeable(default="")
    as_typed: Mapping[str, Any] = as_typed()

    def __post_init__(self) -> None:
        if self.platform not in ("", "cpu"):
            raise ValueError(
                f"platform is {self.platform!r}; choose 'cpu', or '' for the devices that JAX finds, which "
                "JAX_PLATFORMS restricts"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class StageExperiment(JobConfig, StageConfig):
    """One stage: how its data is encoded, and how the transformer is trained on it."""

    encode: EncodeConfig

    def __post_init__(self) -> None:
        JobConfig.__post_init__(self)
        StageConfig.__post_init__(self)


@dataclasses.dataclass(frozen=True)
class SampleConfig:
    """The images that the demo generates at its end.

    Attributes:
      steps, seed, batch_size: as in `qi2 sample`.
      captions: number of captions, from the first on, for which images are generated; 0: all.

    Raises:
      ValueError: for a value out of its range.
    """

    steps: int
    seed: int
    batch_size: int
    captions: int

    def __post_init__(self) -> None:
        check_at_least(self, steps=1, batch_size=1, captions=0)
        check_seed(self.seed)


@dataclasses.dataclass(frozen=True)
class CompareConfig:
    """The demo's comparison with diffusers.

    Attributes:
      images: number of images that both generate; 0: no comparison.
      steps: denoising steps.

    Raises:
      ValueError: for a value out of its range.
    """

    images: int
    steps: int

    def __post_init__(self) -> None:
        check_at_least(self, images=0, steps=1)


@dataclasses.dataclass(frozen=True)
class ExpectConfig:
    """Metrics that the demo must reach.

    Attributes:
      nearest_to_own: smallest share of generated images that are nearest to the image of their own caption.
      difference_to_pytorch: largest difference of a pixel to diffusers, of 255.
    """

    nearest_to_own: float
    difference_to_pytorch: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class DemoExperiment(StageExperiment):
    """The demo: data, autoencoder, transformer, images, and the comparison with diffusers.

    Only the last training and what follows it may change when the job continues.

    Raises:
      ValueError: for a value out of its range.
    """

    encode: EncodeConfig = fixed()
    encoder: EncoderConfig
    vae: AutoencoderConfig = fixed()
    sample: SampleConfig = changeable()
    compare: CompareConfig = changeable()
    expect: ExpectConfig = changeable()

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.data.channels != self.vae.model.in_channels:
            raise ValueError(
                f"data.channels is {self.data.channels}; the autoencoder reads {self.vae.model.in_channels}"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class AutoencoderExperiment(JobConfig):
    """A run that trains the autoencoder alone, on records.

    Raises:
      ValueError: if the autoencoder does not read as many channels as the images have.
    """

    data: DataConfig = fixed()
    vae: AutoencoderConfig

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_channels(self.vae)


def _check_channels(vae: AutoencoderConfig) -> None:
    if vae.channels != vae.model.in_channels:
        raise ValueError(
            f"vae.channels is {vae.channels}; the autoencoder reads {vae.model.in_channels}: make vae.channels and "
            "vae.model.in_channels equal"
        )


@dataclasses.dataclass(frozen=True)
class CorpusConfig:
    """The records that a curriculum makes if it is not given any.

    Attributes:
      edits, texts: number of synthetic edits and of text-rich images.
      side: longest side of these, in pixels.
      workers: processes that make and score them; 0: one for each core.

    Raises:
      ValueError: for a value out of its range.
    """

    edits: int
    texts: int
    side: int
    workers: int = changeable()

    def __post_init__(self) -> None:
        check_at_least(self, edits=0, texts=0, workers=0)


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The encoders that a curriculum uses.

    Attributes:
      folder: model folder with the condition encoder and the autoencoder; "": those of the groups `encoder` and `vae`.
    """

    folder: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class CurriculumExperiment(JobConfig):
    """Stages that are trained one after the other.

    Attributes:
      corpus: records that are made if none are given.
      start: source of the first stage's weights.
      order: names of the stages in the order in which they are trained.
      stages: config of each stage by name.

    Raises:
      ValueError: for a value out of its range, or stages that cannot follow each other.
    """

    corpus: CorpusConfig
    model: ModelConfig
    encoder: EncoderConfig
    vae: AutoencoderConfig
    start: StartConfig = changeable()
    order: tuple[str, ...]
    stages: Mapping[str, StageExperiment]

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_channels(self.vae)
        if not self.order or sorted(self.order) != sorted(self.stages):
            raise ValueError(f"order is {self.order}; it must name each of the stages {sorted(self.stages)} once")
        for name, stage in self.stages.items():
            if folder := stage.transformer.start.folder:
                raise ValueError(
                    f"stages.{name}.transformer.start.folder is {folder}, but a stage starts from the weights of the "
                    "stage before it; set start.folder for the first stage"
                )
        fractions = {name: stage.data.held_out for name, stage in self.stages.items()}
        if len(set(fractions.values())) > 1:
            raise ValueError(f"data.held_out differs: {fractions}; a stage would train on what another one holds out")

    @property
    def ordered(self) -> dict[str, StageExperiment]:
        """The stages by name, in the order in which they are trained."""
        return {name: self.stages[name] for name in self.order}


Experiment = StageExperiment | DemoExperiment | AutoencoderExperiment | CurriculumExperiment


def load_experiment(name: str, overrides: Sequence[str] = ()) -> Experiment:
    """Loads an experiment, see `loading.load`, and parses it. Its groups determine its kind.

    Raises:
      ValueError: as `loading.load`, and for anything that the config's dataclasses refuse.
    """
    values = loading.to_dict(loading.load(name, overrides))
    if "stages" in values:
        return parse(CurriculumExperiment, values)
    if "vae" in values and "transformer" not in values:
        return parse(AutoencoderExperiment, values)
    return parse(DemoExperiment if "vae" in values else StageExperiment, values)
