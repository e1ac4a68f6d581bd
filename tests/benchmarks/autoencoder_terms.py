"""What text in the data and the terms of the loss do to a small autoencoder, each beside a run without it.

    python -m tests.benchmarks.autoencoder_terms IMAGES RECORDS LPIPS OUT [STEPS] [FORM...]

IMAGES is the folder that `autoencoder_images` wrote, RECORDS the scored records of its training images (the commands
are in docs/autoencoder.md), and LPIPS a folder of weights. Each form trains `experiments/autoencoder_small.py` for
STEPS updates (default 300) of 8 crops of 128 pixels, in its folder of OUT, where an interrupted run continues. The last
table is that of `qi2 eval vae` on images that no form has seen, with the linear code of the training images:

- "photographs" and "mixed": without and with text among the training images;
- "mixed" and "lpips": without and with LPIPS in the loss;
- "mixed" and "aligned": without and with alignment to a layer of VGG16. For the latter, the similarity of latents and
  features is printed when the margins begin to widen, when they are widest, and at the end.
"""

import subprocess
import sys
from pathlib import Path

from qi2_jax.training.telemetry import metrics

EXPERIMENT = "experiments/autoencoder_small.py"
FORMS: dict[str, list[str]] = {
    "photographs": ["vae.shares.text=0"],
    "mixed": [],
    "lpips": ["vae.perceptual.weight=0.03"],
    "aligned": ["vae.alignment.weight=0.1"],
}


def settings(form: str, steps: int, lpips: Path) -> list[str]:
    """Overrides of the experiment for a form."""
    common = {
        "train.steps": steps,
        "optimizer.decay_steps": steps,
        "optimizer.warmup": max(1, steps // 10),
        "validation.every": steps,
        "checkpoint.every": 100,
        "batch_size": 8,
        "later_phases.perceptual.start": steps,  # never
        "perceptual.weight": 0,
        "perceptual.start": 0,
        "perceptual.folder": lpips,
        "alignment.network": "vgg16",
        "alignment.folder": lpips,
        "alignment.layer": 5,  # relu5_3
        "alignment.strict_steps": steps // 3,
        "alignment.relaxing_steps": steps // 3,
    }
    return [*(f"vae.{key}={value}" for key, value in common.items()), *FORMS[form]]


def similarity(run: Path, steps: int) -> list[str]:
    """Lines about the alignment of a run: from the first third of training to its end."""
    logged = [line for line in metrics.read(run / metrics.FILE) if "alignment/similarity" in line]
    lines = []
    for title, until in (
        ("margins begin to widen", steps // 3),
        ("margins are widest", 2 * steps // 3),
        ("end", steps),
    ):
        line = [line for line in logged if line["step"] <= until][-1]
        lines.append(
            f"  {title:24} update {line['step']:5.0f}: similarity {line['alignment/similarity']:.3f}, "
            f"margins {line['alignment/cosine_margin']:.2f} and {line['alignment/distance_margin']:.2f}"
        )
    return [f"similarity of latents and features of VGG16, from {logged[0]['alignment/similarity']:.3f}", *lines]


def main(images: Path, records: Path, lpips: Path, out: Path, steps: int, forms: list[str]) -> None:
    for form in forms:
        command = ["qi2", "train", EXPERIMENT, "--data", str(records), "--out", str(out / form)]
        if failed := subprocess.run([*command, *settings(form, steps, lpips)]).returncode:
            sys.exit(failed)
    models = [argument for form in forms for argument in ("--model", str(out / form))]
    evaluate = ["qi2", "eval", "vae", "--data", str(images / "unseen"), "--fit", str(images / "train")]
    subprocess.run([*evaluate, *models, "--lpips", str(lpips), "--max-side", "512"], check=True)
    if "aligned" in forms:
        print("\n".join(similarity(out / "aligned", steps)))


if __name__ == "__main__":
    folders = [Path(argument) for argument in sys.argv[1:5]]
    rest = sys.argv[5:]
    main(*folders, int(rest[0]) if rest else 300, rest[1:] or list(FORMS))
