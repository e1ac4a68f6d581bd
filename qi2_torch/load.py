"""Loads a published pipeline folder with diffusers."""

import importlib.util
import pathlib
from typing import Any

import torch
from diffusers import QwenImage21Pipeline
from transformers import Qwen2Tokenizer, Qwen3VLProcessor
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil


class _ImageOnlyProcessor(Qwen3VLProcessor):
    """Qwen3-VL's processor without its video part, which needs torchvision and is not used for images."""

    def check_argument_for_proper_class(self, argument_name: str, argument: Any) -> None:
        if argument_name != "video_processor":
            super().check_argument_for_proper_class(argument_name, argument)


def load_pipeline(folder: str | pathlib.Path, dtype: torch.dtype = torch.float32) -> QwenImage21Pipeline:
    """Loads the pipeline in `folder` from local safetensors files.

    Without torchvision, the processor is assembled from its tokenizer and image processor.
    """
    parts = {}
    if importlib.util.find_spec("torchvision") is None:
        processor = pathlib.Path(folder) / "processor"
        tokenizer = Qwen2Tokenizer.from_pretrained(processor, local_files_only=True)
        parts["processor"] = _ImageOnlyProcessor(
            image_processor=Qwen2VLImageProcessorPil.from_pretrained(processor, local_files_only=True),
            tokenizer=tokenizer,
            video_processor=None,
            chat_template=tokenizer.chat_template,
        )
    return QwenImage21Pipeline.from_pretrained(
        folder, dtype=dtype, local_files_only=True, use_safetensors=True, **parts
    )
