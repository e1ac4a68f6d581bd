"""Reconstructs images with an autoencoder of diffusers, as a process that answers one batch after the other.

    python -m qi2_torch.autoencoder FOLDER CLASS

Standard input receives batches: the number of images, height and width as three little-endian 32-bit integers, and the
RGB pixels, 8 bits each. Standard output gets the pixels of the reconstructions. Messages go to standard error.
"""

import os
import sys
from typing import Any

import diffusers
import numpy as np
import torch

from qi2_jax.evaluation.torch_process import KINDS, SHAPE

OF_VIDEO = ("AutoencoderKLQwenImage", "AutoencoderKLQwenImage21")  # with a time axis, of one frame for an image


class Autoencoder:
    """A published autoencoder in fp32, on a GPU if there is one.

    Args:
      folder: folder with `config.json` and safetensors weights.
      kind: a key of `KINDS`.
    """

    def __init__(self, folder: str, kind: str):
        if kind not in KINDS:
            raise ValueError(f"the class is {kind!r}; choose one of {', '.join(KINDS)}")
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        cls: Any = getattr(diffusers, kind)
        model = cls.from_pretrained(folder, torch_dtype=torch.float32, local_files_only=True, use_safetensors=True)
        self.model, self.is_of_video = model.to(self.device).eval(), kind in OF_VIDEO
        config = model.config
        self.channels = config.get("in_channels", config.get("input_channels", 3))

    @torch.inference_mode()
    def reconstruct(self, images: np.ndarray) -> np.ndarray:
        """Encodes (to the mode of the posterior) and decodes RGB images [B, H, W, 3], rounded to 8 bits.

        A model with alpha gets opaque images, and its decoded alpha is ignored.

        Raises:
          ValueError: if a pixel is not finite.
        """
        x = torch.from_numpy(images).to(self.device).permute(0, 3, 1, 2).float() / 127.5 - 1
        if self.channels == 4:
            x = torch.cat([x, torch.ones_like(x[:, :1])], dim=1)
        x = x.unsqueeze(2) if self.is_of_video else x
        encoded = self.model.encode(x)
        latents = encoded.latent_dist.mode() if hasattr(encoded, "latent_dist") else encoded.latent
        y = self.model.decode(latents).sample
        y = (y[:, :, 0] if self.is_of_video else y)[:, :3]
        if not bool(torch.isfinite(y).all()):
            raise ValueError("the model produced NaN or infinity: its weights are damaged")
        y = (y / 2 + 0.5).clamp(0, 1).mul(255).round().to(torch.uint8)
        return y.permute(0, 2, 3, 1).contiguous().cpu().numpy()


def main() -> None:
    """Answers batches until standard input ends."""
    folder, kind = sys.argv[1:]
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what libraries print must not mix with the answers
    model = Autoencoder(folder, kind)
    while len(head := sys.stdin.buffer.read(SHAPE.size)) == SHAPE.size:
        count, height, width = SHAPE.unpack(head)
        pixels = sys.stdin.buffer.read(count * height * width * 3)
        images = np.frombuffer(bytearray(pixels), np.uint8).reshape(count, height, width, 3)
        answers.write(model.reconstruct(images).tobytes())
        answers.flush()


if __name__ == "__main__":
    main()
