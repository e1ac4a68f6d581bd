"""The thresholds that a training stage applies to scores."""

from dataclasses import dataclass

from data_pipeline.filters import CASCADE
from data_pipeline.filters.alignment import ALIGNMENT
from data_pipeline.filters.label_alignment import LABEL_ALIGNMENT
from data_pipeline.scoring.candidates import MAX_DISTANCE, MAX_GRADIENT
from data_pipeline.scoring.pair_scores import MIN_ENTROPY
from data_pipeline.scoring.pairs import MAX_DIFFERENCE


@dataclass(frozen=True)
class Thresholds:
    """What a training stage asks of its records. Broken images never pass.

    Those of image quality, compression and borders ask for nothing by default: they belong to later stages.

    Attributes:
      pairs, edits: whether image-text pairs, and whether edits are wanted.
      synthetic: whether pairs tagged `synthetic/..` are, too.
      min_side: pixels of the shorter side, upright.
      max_aspect: longer over shorter side.
      drop_contradictory_orientation: drop files that contradict themselves about which side is up.
      min_bits, min_edges: a picture with less entropy *and* fewer edges is empty (`filters.entropy`).
      max_roughness: a rougher picture is noise.
      min_tokens, max_tokens: of a caption; a pair stays as long as one of its captions does, an edit as long as one of
        its instructions.
      max_instruction_tokens: of an instruction, which is shorter than the longest captions.
      min_script: share of an instruction's letters in the script of the language that it claims; names and brands of
        other scripts are few.
      name_sources: leave out instructions of an edit tagged `edit/compose` that do not name all of several sources.
      max_edit_aspect: ratio of the aspects of source and target, of edits tagged `edit/local`, `edit/global` or
        `edit/background`, whose target is the source's picture.
      min_shared: share of the target's blocks that the source shows too, of local and global edits.
      max_shift: of the target of these, as a share of its longer side.
      min_changed: share of the picture that an edit changes strongly.
      min_difference: grey levels by which any but a local edit may change the picture in the mean instead.
      max_changed: share of the picture that a local edit changes.
      min_unchanged_psnr: decibels, of what a local edit leaves alone.
      alignment_by: the filter whose cosines the next two cut: `alignment`, or for a trial without a CLIP
        `label_alignment`, which is no ground for a decision about data.
      min_alignment: cosine of a caption with its picture; depends on the model that scored.
      min_alignment_percentile: leaves out this percentage of all scored captions of each language and class, the worst
        aligned (`percentiles`).
      max_run: longest run of one character in a caption.
      min_compressed: smallest ratio of compression of a caption of at least `repetitive_tokens` tokens; one that
        repeats itself compresses to less.
      repetitive_tokens: see there; shorter captions compress too little to tell.
      min_clarity: variance of the Laplacian; pictures below `near_min_entropy` bits are flat by design and exempt.
      min_brightness, max_brightness: mean grey level, 0..1; the same are exempt.
      max_noise: grey levels.
      min_jpeg_quality: 1..100.
      min_bits_per_pixel: of JPEG files; pictures below `near_min_entropy` bits are exempt.
      max_nsfw: probability of an unsafe picture from which it is dropped.
      min_aesthetic: of the head's scale; 0 asks for nothing.
      min_aesthetic_percentile: leaves out this percentage of the pictures of each class, the least beautiful.
      max_per_class: records of one class (tag) that are kept, drawn by the hash of their keys; 0: all. Of several
        classes, every one must have room; records without a class always stay.
      max_per_cluster: records of one cluster (`filters.cluster`) that are kept, drawn likewise; 0: all.
      require: filters whose absent scores are an error; others without scores drop nothing and are named.
      max_repetition: of fine structure at a distance, as tiled watermarks have it (`filters.watermark`); pictures below
        `near_min_entropy` bits are exempt.
      max_border: share of the picture that bars on opposite sides take; exempt are pictures below `near_min_entropy`
        bits, such as pages of text, and those tagged `design/..` or `synthetic/..`.
      drop_exact_duplicates: keep only the best of files with the same bytes or the same pixels: the one with most
        pixels, then the best quality, then the first key.
      drop_near_duplicates: likewise keep only the best of each group of near duplicates (`pairs`): two whose hashes
        are within one of the next two bounds, and whose thumbnails are within the third.
      near_distance: largest distance of the 64-bit perceptual hashes.
      near_gradient: largest distance of the 64-bit gradient hashes.
      near_difference: largest difference of the thumbnails, in grey levels of 255 (`pairs.differences`).
      near_min_entropy: bits; flatter pictures are never called near duplicates.

    Raises:
      ValueError: for a value out of its range.
    """

    pairs: bool = True
    edits: bool = True
    synthetic: bool = True
    min_side: int = 256
    max_aspect: float = 3.0
    drop_contradictory_orientation: bool = True
    min_bits: float = 1.0
    min_edges: float = 0.0005
    max_roughness: float = 0.8
    min_tokens: int = 3
    max_tokens: int = 1024
    max_instruction_tokens: int = 512
    min_script: float = 0.2
    name_sources: bool = True
    max_edit_aspect: float = 1.03
    min_shared: float = 0.2
    max_shift: float = 0.004
    min_changed: float = 0.0005
    max_changed: float = 0.7
    min_difference: float = 1.0
    min_unchanged_psnr: float = 32.0
    alignment_by: str = ALIGNMENT.name
    min_alignment: float = -1.0
    min_alignment_percentile: float = 0.0
    max_run: int = 20
    min_compressed: float = 0.2
    repetitive_tokens: int = 50
    min_clarity: float = 0.0
    min_brightness: float = 0.0
    max_brightness: float = 1.0
    max_noise: float = 255.0
    min_jpeg_quality: float = 0.0
    min_bits_per_pixel: float = 0.0
    max_border: float = 1.0
    max_repetition: float = 1.0
    max_nsfw: float = 0.5
    min_aesthetic: float = 0.0
    min_aesthetic_percentile: float = 0.0
    max_per_class: int = 0
    max_per_cluster: int = 0
    require: tuple[str, ...] = ()
    drop_exact_duplicates: bool = True
    drop_near_duplicates: bool = True
    near_distance: int = 8
    near_gradient: int = 4
    near_difference: float = 9.0
    near_min_entropy: float = 3.0

    def __post_init__(self):
        for name, (low, high) in _RANGES.items():
            if not low <= getattr(self, name) <= high:
                raise ValueError(f"{name} is {getattr(self, name)}; choose between {low} and {high}")
        for least, most in (("min_tokens", "max_tokens"), ("min_brightness", "max_brightness")):
            low, high = getattr(self, least), getattr(self, most)
            if low > high:
                raise ValueError(f"{least} is {low}, above {most} {high}: nothing would be left")
        if self.alignment_by not in ALIGNMENTS:
            raise ValueError(f"alignment_by is {self.alignment_by!r}; choose one of {sorted(ALIGNMENTS)}")
        if unknown := sorted(set(self.require) - {filter.name for filter in CASCADE}):
            raise ValueError(f"require names filters {unknown} that do not exist")


_RANGES = {
    "min_side": (1, 1 << 20),
    "max_aspect": (1, 1e6),
    "min_bits": (0, 8),
    "min_edges": (0, 1),
    "max_roughness": (0, 2),
    "min_tokens": (0, 1 << 20),
    "max_tokens": (1, 1 << 20),
    "max_instruction_tokens": (1, 1 << 20),
    "min_script": (0, 1),
    "max_edit_aspect": (1, 1e6),
    "min_shared": (0, 1),
    "max_shift": (0, 1),
    "min_changed": (0, 1),
    "max_changed": (0, 1),
    "min_difference": (0, 255),
    "min_unchanged_psnr": (0, 99),
    "min_alignment": (-1, 1),
    "min_alignment_percentile": (0, 100),
    "max_run": (1, 1 << 20),
    "min_compressed": (0, 1),
    "repetitive_tokens": (0, 1 << 20),
    "min_clarity": (0, 1e6),
    "min_brightness": (0, 1),
    "max_brightness": (0, 1),
    "max_noise": (0, 255),
    "min_jpeg_quality": (0, 100),
    "min_bits_per_pixel": (0, 1e3),
    "max_border": (0, 1),
    "max_repetition": (0, 1),
    "max_nsfw": (0, 1),
    "min_aesthetic": (0, 100),
    "min_aesthetic_percentile": (0, 100),
    "max_per_class": (0, 1 << 62),
    "max_per_cluster": (0, 1 << 62),
    "near_distance": (0, MAX_DISTANCE),
    "near_gradient": (0, MAX_GRADIENT),
    "near_difference": (0, MAX_DIFFERENCE),
    "near_min_entropy": (MIN_ENTROPY, 8),
}

ALIGNMENTS = {filter.name: filter for filter in (ALIGNMENT, LABEL_ALIGNMENT)}
