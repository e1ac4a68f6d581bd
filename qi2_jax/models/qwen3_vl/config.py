"""Configuration of a Qwen3-VL condition encoder, as in its published `config.json`.

Field names are the published ones. What our modules cannot represent is refused here, so that no module has
to check it.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, Self

_DEFAULT_MROPE_SECTION = (24, 20, 20)
_VISION_ROPE_THETA = 10_000.0


def _require(holds: bool, problem: str) -> None:
    if not holds:
        raise ValueError(f"Qwen3-VL configuration: {problem}")


def _pick(fields: Mapping[str, Any], names: tuple[str, ...], where: str) -> dict[str, Any]:
    missing = sorted(set(names) - set(fields))
    _require(not missing, f"{where} lacks {missing}; save it again with a current transformers")
    return {name: fields[name] for name in names}


def _integers(fields: Mapping[str, Any], names: tuple[str, ...], where: str) -> dict[str, int]:
    values = _pick(fields, names, where)
    wrong = {name: value for name, value in values.items() if type(value) is not int or value < 1}
    _require(not wrong, f"{where} must contain positive integers, got {wrong}")
    return values


@dataclasses.dataclass(frozen=True)
class VisionConfig:
    """Shapes of the vision tower.

    Attributes:
      num_position_embeddings: entries of the learned position table, a square number.
      deepstack_visual_indexes: blocks whose output also goes to the text tower, strictly increasing; the n-th output is
        added after text layer n.
    """

    depth: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    in_channels: int
    patch_size: int
    temporal_patch_size: int
    spatial_merge_size: int
    out_hidden_size: int
    num_position_embeddings: int
    deepstack_visual_indexes: tuple[int, ...]
    rope_theta: float = _VISION_ROPE_THETA

    def __post_init__(self) -> None:
        _require(
            self.hidden_size % (4 * self.num_heads) == 0,
            f"vision hidden_size {self.hidden_size} must be num_heads {self.num_heads} times a multiple of 4",
        )
        _require(
            self.table_side**2 == self.num_position_embeddings,
            f"num_position_embeddings {self.num_position_embeddings} is not a square number",
        )
        taps = self.deepstack_visual_indexes
        _require(
            len(taps) > 0 and sorted(set(taps)) == list(taps) and taps[0] >= 0 and taps[-1] < self.depth,
            f"deepstack_visual_indexes {taps} must be increasing block numbers below depth {self.depth}",
        )

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def table_side(self) -> int:
        """Rows, and columns, of the learned position table."""
        return int(self.num_position_embeddings**0.5)

    @property
    def patch_dim(self) -> int:
        """Numbers in one patch: channels x frames x rows x columns."""
        return self.in_channels * self.temporal_patch_size * self.patch_size**2

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Self:
        """Reads the `vision_config` part of a published configuration; errors as `Qwen3VLConfig.from_dict`."""
        where = "vision_config"
        model_type = fields.get("model_type", "qwen3_vl_vision")
        _require(model_type in ("qwen3_vl_vision", "qwen3_vl"), f"{where} is a {model_type!r}, not a Qwen3-VL tower")
        act = fields.get("hidden_act", "gelu_pytorch_tanh")
        _require(act == "gelu_pytorch_tanh", f"{where} hidden_act {act!r} is not supported, only gelu_pytorch_tanh")
        rope = fields.get("rope_parameters") or {}
        rope_type = rope.get("rope_type", "axial")
        _require(rope_type == "axial", f"{where} rope type {rope_type!r} is not supported, only axial")
        shapes = tuple(
            field.name
            for field in dataclasses.fields(cls)
            if field.name not in ("deepstack_visual_indexes", "rope_theta")
        )
        taps = _pick(fields, ("deepstack_visual_indexes",), where)["deepstack_visual_indexes"]
        return cls(
            **_integers(fields, shapes, where),
            deepstack_visual_indexes=tuple(taps),
            rope_theta=float(rope.get("rope_theta", _VISION_ROPE_THETA)),
        )


@dataclasses.dataclass(frozen=True)
class TextConfig:
    """Shapes of the text tower.

    Attributes:
      mrope_section: rotary frequencies given to the frame, height and width positions; see `text.frequency_axes`.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_theta: float
    mrope_section: tuple[int, int, int] = _DEFAULT_MROPE_SECTION

    def __post_init__(self) -> None:
        _require(self.head_dim % 2 == 0, f"text head_dim {self.head_dim} must be even")
        _require(
            self.num_attention_heads % self.num_key_value_heads == 0,
            f"num_attention_heads {self.num_attention_heads} must be a multiple of num_key_value_heads "
            f"{self.num_key_value_heads}",
        )
        _require(len(self.mrope_section) == 3, f"mrope_section {self.mrope_section} must have three entries")

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Self:
        """Reads the `text_config` part of a published configuration; errors as `Qwen3VLConfig.from_dict`."""
        where = "text_config"
        model_type = fields.get("model_type", "qwen3_vl_text")
        _require(model_type == "qwen3_vl_text", f"{where} is a {model_type!r}, not a dense Qwen3-VL tower")
        act = fields.get("hidden_act", "silu")
        _require(act == "silu", f"{where} hidden_act {act!r} is not supported, only silu")
        _require(not fields.get("attention_bias"), f"{where} has attention_bias, which is not supported")
        # Older files have rope_theta and rope_scaling instead of rope_parameters.
        rope = fields.get("rope_parameters") or {**(fields.get("rope_scaling") or {}), **fields}
        rope_type = rope.get("rope_type", rope.get("type", "default"))
        _require(rope_type in ("default", "mrope"), f"{where} rope type {rope_type!r} is not supported, only default")
        _require(rope.get("mrope_interleaved", True), f"{where} has mrope_interleaved false, an older rotary layout")
        integers = (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
            "num_key_value_heads",
            "head_dim",
        )
        heads = fields.get("num_key_value_heads") or fields.get("num_attention_heads")
        return cls(
            **_integers({**fields, "num_key_value_heads": heads}, integers, where),
            **_pick(fields, ("rms_norm_eps",), where),
            rope_theta=float(_pick(rope, ("rope_theta",), f"{where} rope_parameters")["rope_theta"]),
            mrope_section=tuple(rope.get("mrope_section", _DEFAULT_MROPE_SECTION)),
        )


@dataclasses.dataclass(frozen=True)
class Qwen3VLConfig:
    """Configuration of both towers, and ids of the tokens that stand for visual input."""

    vision: VisionConfig
    text: TextConfig
    image_token_id: int
    video_token_id: int

    def __post_init__(self) -> None:
        _require(
            self.vision.out_hidden_size == self.text.hidden_size,
            f"vision out_hidden_size {self.vision.out_hidden_size} differs from text hidden_size "
            f"{self.text.hidden_size}",
        )
        taps, layers = len(self.vision.deepstack_visual_indexes), self.text.num_hidden_layers
        _require(taps <= layers, f"{taps} deepstack features need as many text layers, there are {layers}")

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Self:
        """Reads the contents of a published `config.json`.

        Raises:
          ValueError: naming the field, for another architecture, a missing field, or a value that our modules cannot
            represent (biases, other activations, rotary scaling).
        """
        model_type = fields.get("model_type")
        _require(model_type == "qwen3_vl", f"model_type is {model_type!r}; give the folder of a dense Qwen3-VL model")
        parts = _pick(fields, ("vision_config", "text_config"), "config.json")
        tokens = _integers(fields, ("image_token_id", "video_token_id"), "config.json")
        return cls(
            vision=VisionConfig.from_dict(parts["vision_config"]),
            text=TextConfig.from_dict(parts["text_config"]),
            **tokens,
        )
