"""peft's configuration of an adapter: from a file's header, as diffusers writes it, or from the JSON file beside it.

It gives the scale of each layer's change, `alpha / rank`, or `alpha / sqrt(rank)` for rank-stabilised LoRA.
"""

import dataclasses
import json
import math
import pathlib
import re
from collections.abc import Mapping
from typing import Any

from safetensors import safe_open

from qi2_jax.interop import files

METADATA = "lora_adapter_metadata"  # key of the configuration in a header; each key within has the prefix
PREFIX = "transformer."
CONFIG_FILE = "adapter_config.json"

READ = ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora")
# Settings that do not change what the trained factors mean. All others must be unset.
WITHOUT_EFFECT = (
    *("peft_type", "peft_version", "task_type", "auto_mapping", "base_model_name_or_path", "revision"),
    *("inference_mode", "runtime_config", "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"),
    *("lora_dropout", "bias", "fan_in_fan_out", "init_lora_weights", "qalora_group_size", "ensure_weight_tying"),
    *("megatron_config", "megatron_core", "loftq_config", "eva_config", "corda_config", "lora_ga_config"),
)
# Other initialisations also change the weights that are adapted, so the factors do not fit the published ones.
PLAIN_INITS = (True, False, None, "gaussian", "eva", "orthogonal")

_PATTERN = re.compile(r"(?:\.[*+]|\\d\+?|\\\.|[\w.()|^$-])+")
MAX_BRANCHES = 4  # wildcards and groups of one pattern: the time to match grows exponentially with them


@dataclasses.dataclass(frozen=True)
class Settings:
    """The scales of an adapter's changes.

    Attributes:
      where: file with the settings, for messages.
      rank: rank of the layers that `rank_pattern` does not name; None: not given.
      alpha: alpha of the layers that `alpha_pattern` does not name; None: not given.
      rank_pattern: {pattern of layer paths: rank}.
      alpha_pattern: {pattern of layer paths: alpha}.
      rank_stabilised: whether alpha is divided by the root of the rank.
    """

    where: str
    rank: Any
    alpha: Any
    rank_pattern: Mapping[str, Any]
    alpha_pattern: Mapping[str, Any]
    rank_stabilised: bool

    @classmethod
    def from_peft(cls, values: Mapping[str, Any], where: str) -> "Settings":
        """Reads peft's configuration.

        Raises:
          ValueError: naming every setting under which the factors do not give the change, or whose value is unusable.
        """
        kind, init = values.get("peft_type") or "LORA", values.get("init_lora_weights", True)
        other = {key: value for key, value in values.items() if value and key not in (*READ, *WITHOUT_EFFECT)}
        other |= {} if kind == "LORA" else {"peft_type": kind}
        other |= {} if init in PLAIN_INITS else {"init_lora_weights": init}
        other |= {} if values.get("bias", "none") in ("none", None) else {"bias": values["bias"]}
        if other:
            raise ValueError(
                f"{where} describes an adapter with {other}; only plain LoRA, whose change is B A with a factor, can "
                "be merged"
            )
        ranks, alphas = (_patterns(values.get(key) or {}, key, where) for key in ("rank_pattern", "alpha_pattern"))
        return cls(where, values.get("r"), values.get("lora_alpha"), ranks, alphas, bool(values.get("use_rslora")))

    def scale(self, layer: str, rank: int) -> float:
        """Scale of a layer's change, by its published path and the rank of its tensors.

        Raises:
          ValueError: if the rank differs from the configuration's, or alpha is not a positive number.
        """
        expected = _matched(self.rank_pattern, layer, self.rank)
        if expected is not None and (type(expected) is not int or expected != rank):
            raise ValueError(f"{layer} has tensors of rank {rank}, but {self.where} gives it the rank {expected!r}")
        alpha = _matched(self.alpha_pattern, layer, self.alpha)
        if alpha is None:
            alpha = rank
        check_alpha(alpha, f"{self.where}: the alpha of {layer}")
        return alpha / (math.sqrt(rank) if self.rank_stabilised else rank)


def check_alpha(alpha: Any, name: str) -> None:
    """Raises a ValueError unless alpha is a positive finite number."""
    if type(alpha) not in (int, float) or not 0 < alpha < math.inf:
        raise ValueError(f"{name} is {alpha!r}; it must be a finite number above 0")


def read_settings(path: pathlib.Path, *, peft: bool) -> Settings | None:
    """The configuration that belongs to an adapter file; None if it has none.

    Args:
      path: safetensors file.
      peft: whether peft wrote the file; the configuration is then in a separate file.

    Raises:
      ValueError: if the configuration cannot be read, or as `Settings.from_peft`.
    """
    with safe_open(path, framework="numpy") as file:
        text = (file.metadata() or {}).get(METADATA)
    if text is None:
        beside = path.with_name(CONFIG_FILE)
        return Settings.from_peft(files.read_json(beside), str(beside)) if peft and beside.is_file() else None
    where = f"{METADATA} in the header of {path}"
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} is not valid JSON: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{where} is a {type(values).__name__}, not an object")
    return Settings.from_peft({key.removeprefix(PREFIX): value for key, value in values.items()}, where)


def _patterns(values: Any, key: str, where: str) -> Mapping[str, Any]:
    """Patterns that are safe to match: a regular expression from an untrusted file could take for ever."""
    if not isinstance(values, dict):
        raise ValueError(f"{where}: {key} is a {type(values).__name__}, not an object")
    for pattern in values:
        safe = _PATTERN.fullmatch(pattern) and len(re.findall(r"[*+(]", pattern)) <= MAX_BRANCHES
        try:
            re.compile(pattern if safe else "(")
        except re.error:
            raise ValueError(
                f"{where}: {key} has the pattern {pattern!r}; names with at most {MAX_BRANCHES} "
                "wildcards such as .* and groups such as (to_q|to_k) are understood"
            ) from None
    return values


def _matched(patterns: Mapping[str, Any], layer: str, default: Any) -> Any:
    """The value of the first pattern that matches the end of a layer's path, as in peft's `get_pattern_key`."""
    for pattern, value in patterns.items():
        if re.match(rf"(?:.*\.)?(?:{pattern})$", layer):
            return value
    return default
