"""The group `samples` of the transformer's config: which images are generated during training."""

import dataclasses
from collections.abc import Sequence

from qi2_jax.config.fields import check_at_least
from qi2_jax.text.qwen_tokenizer import RESERVED
from qi2_jax.training.config import SampleSchedule, check_seed

MAX_CONDITIONS = 3  # condition images of an edit, as in the report's training


@dataclasses.dataclass(frozen=True, kw_only=True)
class Samples(SampleSchedule):
    """Which images are generated during training.

    Attributes:
      count: held-out samples of each stream.
      steps, guidance, seed: as in `qi2 sample`.
      prompts: fixed prompts.
      edits: fixed edits, each an instruction and the paths of its condition images.

    Raises:
      ValueError: for a value out of its range, or a text that cannot be encoded.
    """

    count: int
    steps: int
    guidance: float
    seed: int
    prompts: tuple[str, ...]
    edits: tuple[tuple[str, ...], ...]

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least(self, count=0, steps=2, guidance=1)
        check_seed(self.seed)
        _check_texts(self.prompts, self.edits)


def _check_texts(prompts: Sequence[str], edits: Sequence[Sequence[str]]) -> None:
    """Checks the prompts and edits of a stage's `samples`, except for the images.

    Raises:
      ValueError: naming the text that cannot be encoded, or the edit without condition images or with too many.
    """
    for place, text in enumerate(prompts):
        _check_text(f"prompts[{place}]", text)
    for place, edit in enumerate(edits):
        if not 2 <= len(edit) <= 1 + MAX_CONDITIONS:
            raise ValueError(
                f"edits[{place}] is {edit!r}; an edit is a tuple of an instruction and the paths of one to "
                f"{MAX_CONDITIONS} condition images"
            )
        _check_text(f"edits[{place}]", edit[0])


def _check_text(name: str, text: str) -> None:
    if not text.strip():
        raise ValueError(f"{name} has the text {text!r}; it must not be empty")
    if any("\ud800" <= letter <= "\udfff" for letter in text):
        raise ValueError(f"{name} has the text {text!r}, which is not UTF-8")
    if found := [token for token in RESERVED if token in text]:
        raise ValueError(f"{name} has the text {text!r} with {found[0]}, which stands for pixels; remove it")
