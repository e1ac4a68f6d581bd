"""The autoencoder's config."""

import dataclasses
import functools
import itertools
from collections.abc import Mapping

import jax.numpy as jnp

from data_pipeline.buckets import Buckets
from data_pipeline.loading.kinds import check_kinds
from data_pipeline.loading.turns import MAX_CYCLE
from qi2_jax.config.fields import changeable, check_at_least, check_one_of, choice
from qi2_jax.models.discriminator import MIN_SIDE
from qi2_jax.models.vae import VAEConfig
from qi2_jax.tasks.autoencoder import linear_start
from qi2_jax.tasks.devices import COMPUTE_DTYPES, check_batch_sizes
from qi2_jax.training.config import TrainingConfig, ValidationSchedule

ERRORS = {"absolute": jnp.abs, "squared": jnp.square}
NETWORKS = ("dinov2", "vgg16")


@dataclasses.dataclass(frozen=True)
class PerceptualConfig:
    """The perceptual term of the loss: LPIPS of images and reconstructions.

    Attributes:
      weight: weight of LPIPS beside the error of the pixels; 0: without this term.
      folder: folder with the weights of LPIPS, see `qi2_jax.interop.frozen`.
      start: number of updates at the beginning of the run in which the term is neither computed nor counted. In a
        small model, it takes most of an update.

    Raises:
      ValueError: for a value out of its range, a weight without a folder, or a start without a weight.
    """

    weight: float = 0.0
    folder: str = changeable(default="")  # the hash of the weights, not their place, belongs to a run
    start: int = 0

    def __post_init__(self) -> None:
        check_at_least(self, weight=0, start=0)
        if self.start and not self.weight:
            raise ValueError(f"perceptual.start is {self.start}, but perceptual.weight is 0; give a weight above 0")
        _check_folder("perceptual", self.weight, self.folder)


@dataclasses.dataclass(frozen=True)
class AlignmentConfig:
    """The alignment of latents with the features of a frozen network; see `alignment`.

    Attributes:
      weight: size of the alignment's gradient at the encoder's last layer, in units of that of the reconstruction,
        while the alignment is strict; 0: without this term.
      relaxed_weight: the same once the alignment is relaxed; 0: `weight` throughout.
      folder: folder with the weights of the network, see `qi2_jax.interop.frozen`.
      network: "dinov2", or "vgg16" from a folder of LPIPS.
      layer: layer whose output is compared: a transformer layer of DINOv2, counted from 1, without the final norm; 0:
        the last layer of DINOv2 after the final norm, as in VA-VAE; or a block of VGG16, 1..5.
      cosine_margin: difference from a cosine of 1 between latent and feature that costs nothing once it is relaxed.
      distance_margin: difference between cosines within latents and within features that costs nothing once it is
        relaxed.
      strict_steps: updates in which both margins are 0 and `weight` holds.
      relaxing_steps: updates after these in which the margins and the weight move linearly to their relaxed values; 0:
        at once.

    Raises:
      ValueError: for a value out of its range, or a weight without a folder.
    """

    weight: float = 0.0
    folder: str = changeable(default="")
    network: str = "dinov2"
    layer: int = 12  # the middle of DINOv2-L; the report names a middle layer without its number
    cosine_margin: float = 0.5
    distance_margin: float = 0.25
    strict_steps: int = 0
    relaxing_steps: int = 0
    relaxed_weight: float = 0.0

    def __post_init__(self) -> None:
        check_one_of(self, "network", NETWORKS)
        check_at_least(self, weight=0, relaxed_weight=0, layer=0, cosine_margin=0, distance_margin=0)
        check_at_least(self, strict_steps=0, relaxing_steps=0)
        _check_folder("alignment", self.weight, self.folder)


@dataclasses.dataclass(frozen=True)
class AdversarialConfig:
    """A late phase in which the decoder's head alone is trained, also against a discriminator; see `adversary`.

    Attributes:
      weight: size of the adversarial term's gradient at the decoder's last layer, in units of that of the
        reconstruction; 0: without this phase.
      start: number of updates before the phase.
      levels: number of levels of the decoder, the last ones, that its head includes besides the output layers.
      width: channels of the discriminator's first layer.

    Raises:
      ValueError: for a value out of its range, or a weight without a start or the reverse.
    """

    weight: float = 0.0
    start: int = 0
    levels: int = 1
    width: int = 64

    def __post_init__(self) -> None:
        check_at_least(self, weight=0, start=0, levels=0, width=1)
        if bool(self.start) != bool(self.weight):
            raise ValueError(
                f"adversarial.weight is {self.weight} and adversarial.start {self.start}; the phase needs a weight "
                "and, since it does not train the encoder, updates before it: set both above 0, or both to 0"
            )

    def is_active(self, step: int) -> bool:
        """Whether the update after `step` updates belongs to the phase."""
        return bool(self.weight) and step >= self.start


@dataclasses.dataclass(frozen=True)
class ExecutionConfig:
    """How the networks compute in training and validation.

    Attributes:
      dtype: dtype of activations of the autoencoder and the frozen networks, "float32" or "bfloat16". Parameters,
        latents, and the terms of the loss are fp32.
      remat_levels: number of levels of encoder and decoder, highest resolution first, whose blocks the backward pass
        recomputes one by one, which saves memory; 0: none, all levels or more: also the mid blocks. Above 0, those of
        LPIPS are recomputed too.
      remat_from: side of a square in pixels; crops of a smaller area keep everything.

    Raises:
      ValueError: for a negative value.
    """

    dtype: jnp.dtype = choice(COMPUTE_DTYPES, default=COMPUTE_DTYPES["float32"])
    remat_levels: int = changeable(default=0)
    remat_from: int = changeable(default=0)

    def __post_init__(self) -> None:
        check_at_least(self, remat_levels=0, remat_from=0)

    def levels(self, height: int, width: int) -> int:
        """The value of `remat_levels` that holds for crops of this size."""
        return self.remat_levels if height * width >= self.remat_from**2 else 0


def _check_folder(group: str, weight: float, folder: str) -> None:
    if weight and not folder:
        raise ValueError(
            f"{group}.weight is {weight}, but {group}.folder is empty; give the folder with the weights of the frozen "
            f"network (docs/perceptual_weights.md says where they come from), or set {group}.weight=0"
        )


SQUARE = ("1:1",)
BATCH_METRICS = ("phase", "height", "width")  # logged as batch/NAME, as the share of each kind is


@dataclasses.dataclass(frozen=True, kw_only=True)
class PhaseConfig:
    """A phase of training: from its first update on, crops have other sizes and kinds of images other shares.

    Attributes:
      start: number of updates before the phase.
      crop: side of a square with the area of the crops, in pixels.
      batch_size: crops per batch.
      ratios: aspect ratios of the crops, width to height, such as "16:9"; each batch has one of them.
      shares: share of each of `kinds`, a whole number; none without kinds.

    Raises:
      ValueError: for a value out of its range.
    """

    start: int
    crop: int
    batch_size: int
    ratios: tuple[str, ...] = SQUARE
    shares: Mapping[str, int] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        check_at_least(self, start=0, crop=1, batch_size=1)
        values = self.shares.values()
        if values and (min(values) < 0 or not 0 < sum(values) <= MAX_CYCLE):
            raise ValueError(
                f"shares is {dict(self.shares)}; shares are at least 0, not all 0, and at most {MAX_CYCLE} together"
            )
        if not self.ratios:
            raise ValueError("ratios is (); name at least one, such as '1:1'")
        _ = self.sizes

    @functools.cached_property
    def sizes(self) -> tuple[tuple[int, int], ...]:
        """Height and width of the crops of each ratio."""
        if self.ratios == SQUARE:
            return ((self.crop, self.crop),)
        multiple = 32 if self.crop % 32 == 0 else 16
        return tuple((size.height, size.width) for size in Buckets.for_area(self.crop, self.ratios, multiple).sizes)

    @property
    def kind_shares(self) -> Mapping[str, int]:
        """The share of each kind; without kinds, all images are of one without a name."""
        return self.shares or {"": 1}


@dataclasses.dataclass(frozen=True)
class Validation(ValidationSchedule):
    """When and on how many images a run is validated.

    Attributes:
      images: largest number of held-out images; kinds in use have equal numbers of them.

    Raises:
      ValueError: for a value out of its range.
    """

    images: int = changeable(default=16)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least(self, images=1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class AutoencoderConfig(TrainingConfig):
    """Config of a run that trains the autoencoder.

    Attributes:
      model: shape of the autoencoder.
      crop: side of a square with the area of the crops on which it trains, in pixels; and of the square crops of
        validation.
      crop_step: number of pixels of which the positions of crops are multiples.
      mirrored: share of crops that are mirrored; images with boxes of lines of text never are.
      unmirrored_kinds: names of `kinds` whose images are never mirrored.
      linear_start: training batches on which the linear code is fitted from which training starts, see `linear_start`;
        0: it starts from random weights.
      loss: error of the reconstruction, "absolute" or "squared".
      perceptual: perceptual term of the loss.
      alignment: alignment of the latents with the features of a frozen network.
      adversarial: late adversarial phase of the decoder's head.
      kl: weight of the KL divergence between the posterior and the standard normal; above 0, training decodes samples
        of the posterior instead of its mode.
      batch_size: crops per batch.
      execution: dtype of the computation, and what the backward pass recomputes.
      statistics_batches: batches of crops over which the mean and standard deviation of the latents are measured; 0:
        they are measured over whole images.
      statistics_images: number of training images over which they are measured instead, evenly spaced among all of
        them and each at the size of its bucket; 0: all.
      channels: channels of the training images, 3 (RGB) or 4 (RGBA); the curriculum reads it.
      mattes: share of training crops that a random matte makes partly transparent, for an autoencoder of RGBA images.
      kinds: kinds of training images by name, each with the beginnings of its labels, see
        `data_pipeline.loading.kinds`. Without any, all images are of one kind.
      ratios: as in `PhaseConfig`.
      shares: as in `PhaseConfig`.
      later_phases: phases by name after the first one, which `crop`, `batch_size`, `ratios` and `shares` describe.

    Raises:
      ValueError: for a value out of its range.
    """

    model: VAEConfig
    crop: int
    loss: str
    perceptual: PerceptualConfig = dataclasses.field(default_factory=PerceptualConfig)
    alignment: AlignmentConfig = dataclasses.field(default_factory=AlignmentConfig)
    adversarial: AdversarialConfig = dataclasses.field(default_factory=AdversarialConfig)
    kl: float = 0.0
    batch_size: int
    validation: Validation
    execution: ExecutionConfig = dataclasses.field(default_factory=ExecutionConfig)
    statistics_batches: int = changeable(default=0)
    statistics_images: int = changeable(default=0)
    channels: int = 4
    mattes: float = 0.0
    crop_step: int = 1
    mirrored: float = 0.5
    unmirrored_kinds: tuple[str, ...] = ()
    linear_start: int = 0
    kinds: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    ratios: tuple[str, ...] = SQUARE
    shares: Mapping[str, int] = dataclasses.field(default_factory=dict)
    later_phases: Mapping[str, PhaseConfig] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_one_of(self, "loss", tuple(ERRORS))
        check_at_least(self, statistics_batches=0, statistics_images=0, kl=0, crop_step=1, mirrored=0, linear_start=0)
        if self.statistics_batches and self.statistics_images:
            raise ValueError(
                f"statistics_batches is {self.statistics_batches} and statistics_images {self.statistics_images}; the "
                "latents are measured over batches of crops or over whole images: set one of them to 0"
            )
        if self.mirrored > 1:
            raise ValueError(f"mirrored is {self.mirrored}; it is a share of crops from 0 to 1")
        self._check_names_of_kinds()
        if self.linear_start:
            linear_start.check(self.model)
        check_kinds(self.kinds)
        self._check_phases()
        if self.adversarial.weight:
            self._check_adversary()
        if not 0 <= self.mattes <= 1 or (self.mattes and self.model.in_channels != 4):
            raise ValueError(
                f"mattes is {self.mattes}; it is a share of crops from 0 to 1, and above 0 the autoencoder must read "
                f"four channels instead of {self.model.in_channels}"
            )
        if self.model.in_channels != self.model.out_channels:
            raise ValueError(
                f"model.in_channels is {self.model.in_channels} and model.out_channels {self.model.out_channels}; "
                "training compares the output with the input: give both the same number"
            )

    @functools.cached_property
    def phases(self) -> dict[str, PhaseConfig]:
        """All phases by name, in order; the first one has no name."""
        first = PhaseConfig(start=0, crop=self.crop, batch_size=self.batch_size, ratios=self.ratios, shares=self.shares)
        return {"": first, **dict(sorted(self.later_phases.items(), key=lambda item: item[1].start))}

    def _check_names_of_kinds(self) -> None:
        if reserved := sorted(self.kinds.keys() & set(BATCH_METRICS)):
            raise ValueError(
                f"kinds has {reserved}, but the metrics {', '.join(f'batch/{name}' for name in reserved)} describe the "
                "size of a batch, not the share of a kind; rename these kinds"
            )
        if "raw" in self.kinds:
            raise ValueError(
                "kinds has 'raw', but the metrics validation_loss/raw and the like are those of the weights without "
                "EMA; rename this kind"
            )
        if unknown := sorted(set(self.unmirrored_kinds) - self.kinds.keys()):
            raise ValueError(f"unmirrored_kinds has {unknown}; name some of kinds, {sorted(self.kinds)}")

    def _check_phases(self) -> None:
        starts = [phase.start for phase in self.phases.values()]
        if len(set(starts)) < len(starts):
            raise ValueError(f"later_phases start after {starts[1:]} updates; these must be above 0 and differ")
        for name, phase in self.phases.items():
            key, factor = f"later_phases.{name}." if name else "", self.model.factor
            if any(side % factor for size in ((phase.crop,), *phase.sizes) for side in size):
                raise ValueError(
                    f"{key}crop is {phase.crop}; it must be a multiple of {factor}, the pixels of a latent, as must "
                    f"the sides of crops of the ratios {phase.ratios}"
                )
            if phase.shares.keys() != self.kinds.keys():
                raise ValueError(
                    f"{key}shares has the kinds {sorted(phase.shares)}; it must have those of kinds, "
                    f"{sorted(self.kinds)}"
                )

    def _check_adversary(self) -> None:
        levels, count = self.adversarial.levels, len(self.model.multipliers)
        if levels > count:
            raise ValueError(f"adversarial.levels is {levels}; it must be at most {count}, the levels of the decoder")
        starts = [*(phase.start for phase in self.phases.values())][1:]
        for (name, phase), end in itertools.zip_longest(self.phases.items(), starts):
            reaches = end is None or end > self.adversarial.start
            if reaches and (side := min(min(size) for size in phase.sizes)) < MIN_SIDE:
                raise ValueError(
                    f"{f'later_phases.{name}.' if name else ''}crop is {phase.crop}, and its crops have a side of "
                    f"{side} pixels; with adversarial.weight above 0, sides must be at least {MIN_SIDE}"
                )


def check_autoencoder(config: AutoencoderConfig) -> None:
    """Raises a ValueError if the devices of this job cannot train the autoencoder with this config."""
    check_batch_sizes("vae", config.mesh, [phase.batch_size for phase in config.phases.values()])
