"""The tiny curriculum, once as it is and once killed three times at random moments, and what PyTorch makes of its end.

    python -m tests.benchmarks.curriculum_killed [--seed N] [--folder DIR]

Prints the time of the uninterrupted run, when and in what the other was killed, the largest difference of their final
parameters, averages and moments, which must be 0, how the validation loss moved in every stage, and writes a real
picture edited by diffusers with the exported model.
"""

import argparse
import json
import pathlib
import random
import signal
import subprocess
import sys
import tempfile
import time

import numpy as np
from PIL import Image

from qi2_jax.runs import locating
from qi2_jax.training.checkpoints import contents

CURRICULUM = "experiments/qwen_image_2/curriculum.py:tiny"
ITEMS = ("model", "ema", "optimizer")


def start(out: pathlib.Path) -> subprocess.Popen:
    log = out.with_suffix(".log").open("a")
    command = [sys.executable, "-m", "qi2_jax", "run", CURRICULUM, "--out", str(out)]
    return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)


def leaves(out: pathlib.Path) -> dict[str, np.ndarray]:
    located = locating.locate(out)
    assert located.checkpoint is not None
    return {
        f"{item}/{name}": weight.read()
        for item in ITEMS
        for name, weight in contents.weights(located.checkpoint, item).items()
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seed", type=int, default=int(time.time()), help="of the moments of the kills")
    parser.add_argument("--folder", type=pathlib.Path, default=pathlib.Path(tempfile.mkdtemp()))
    arguments = parser.parse_args()
    whole, killed = arguments.folder / "whole", arguments.folder / "killed"

    arguments.folder.mkdir(parents=True, exist_ok=True)
    begun = time.monotonic()
    assert start(whole).wait() == 0, whole.with_suffix(".log").read_text()[-3000:]
    duration = time.monotonic() - begun
    print(f"uninterrupted: {duration / 60:.1f} min")

    draw = random.Random(arguments.seed)
    for moment in (draw.uniform(0.1, 0.4) * duration for _ in range(3)):
        process = start(killed)
        try:
            process.wait(moment)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
            said = killed.with_suffix(".log").read_text(errors="replace").replace("\r", "\n").strip().splitlines()[-1]
            print(f"killed after {moment:.0f} s, in: {said[:100]}")
    assert start(killed).wait() == 0, killed.with_suffix(".log").read_text()[-3000:]
    print(f"killed three times: {(time.monotonic() - begun - duration) / 60:.1f} min")

    expected, found = leaves(whole), leaves(killed)
    assert expected.keys() == found.keys()
    largest = max(float(np.abs(expected[name].astype(np.float64) - found[name]).max()) for name in expected)
    print(f"largest difference of {len(expected)} final leaves: {largest}")

    for name, figures in json.loads((whole / "report.json").read_text())["stages"].items():
        before, after = figures["validation_loss_before"], figures["validation_loss_after"]
        print(f"{name}: validation loss {before:.4f} -> {after:.4f}, {figures['minutes']:.1f} min")

    picture = sorted((whole / "corpus" / "demo_set" / "clean").glob("coffee*"))[0]
    source, edited = arguments.folder / "source.png", arguments.folder / "edited.png"
    Image.open(picture).convert("RGBA").resize((256, 192)).save(source)
    request = {
        "folder": str(whole / "diffusers"),
        "prompts": ["Make it night."],
        "sizes": [[256, 192]],
        "negative": None,
        "guidance": 1.0,
        "steps": 8,
        "latents": str(arguments.folder / "noise.npz"),
        "images": [str(source)],
        "resolution": 320,
        "dtype": "float32",
    }
    noise = np.random.default_rng(0).normal(size=(256 // 16 * 192 // 16, 64)).astype(np.float32)
    np.savez(arguments.folder / "noise.npz", **{"0": noise})  # type: ignore[arg-type]
    (arguments.folder / "request.json").write_text(json.dumps(request))
    command = [sys.executable, "-m", "qi2_torch.generate", str(arguments.folder / "request.json")]
    subprocess.run([*command, str(arguments.folder / "out.npz")], check=True, capture_output=True)
    with np.load(arguments.folder / "out.npz", allow_pickle=False) as made:
        Image.fromarray(made["0"]).save(edited)
    print(f"a real picture edited by diffusers: {source} -> {edited}")
    sys.exit(largest != 0)


if __name__ == "__main__":
    main()
