"""Generates images with diffusers from a request file, for comparisons with our pipeline.

    python -m qi2_torch.generate REQUEST.json OUT.npz

The request contains `folder`, `prompts`, `negative`, `guidance`, `steps`, `sizes` ([width, height] per prompt),
`latents` (an .npz with arrays `0`, `1`, .. of [tokens, channels], one per prompt), `images` (files), `resolution` and
`dtype`. OUT receives arrays `0`, `1`, .. of uint8 pixels [height, width, channels], and `latents_0`, `latents_1`, .. of
normalised latents [tokens, channels], which are not rounded by decoding.
"""

import json
import sys
from typing import Any

import numpy as np
import torch
from PIL import Image

from qi2_torch.load import load_pipeline


def generate(request: dict) -> dict[str, np.ndarray]:
    """Generates one image per prompt, each in a separate call, as a user of diffusers would."""
    pipeline: Any = load_pipeline(request["folder"], getattr(torch, request["dtype"]))
    pipeline.set_progress_bar_config(disable=True)
    latents = np.load(request["latents"], allow_pickle=False)
    images = [Image.open(path) for path in request["images"]]
    results, last = {}, {}

    def remember(pipeline: Any, step: int, time: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        last.update(tensors)
        return tensors

    for index, (prompt, (width, height)) in enumerate(zip(request["prompts"], request["sizes"], strict=True)):
        results[str(index)] = np.asarray(
            pipeline(
                prompt,
                image=images or None,
                negative_prompt=request["negative"],
                true_cfg_scale=request["guidance"],
                width=width,
                height=height,
                num_inference_steps=request["steps"],
                latents=torch.from_numpy(latents[str(index)])[None],
                output_resolution=request["resolution"],
                callback_on_step_end=remember,
                callback_on_step_end_tensor_inputs=["latents"],
            ).images[0]
        )
        results[f"latents_{index}"] = last["latents"][0].float().numpy()
    return results


def main() -> None:
    """Runs the request of the process that started this one."""
    request, out = sys.argv[1:]
    with open(request, encoding="utf-8") as file:
        results = generate(json.load(file))
    np.savez(out, **results)  # type: ignore[arg-type]


if __name__ == "__main__":
    main()
