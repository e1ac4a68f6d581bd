"""The table of docs/planning.md: what the stages need on three kinds of chips, by `qi2 plan`.

    python -m tests.benchmarks.stage_plans FOLDER [s4_1024p:v5p ...]

Compiles the programs that bind memory and time of every stage on every topology for which experiments/qwen_image_2
has a choice: about ten minutes each on two cores. Stage 6 is left out: its programs are those of stage 5. Every plan is
stored as JSON in FOLDER, and one that is there is not made again. Prints the table of all plans in FOLDER, in Markdown.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

from experiments.qwen_image_2.chips import CHOICES

TOPOLOGIES = {"": ("v6e:16x16", 4), "v5p": ("v5p:8x8x4", 1), "v5e": ("v5e:16x16", 4)}
STAGES = {
    "s1_256p_t2i": 256,
    "s2_256p_edits": 256,
    "s3_512p_synthetic": 512,
    "s4_1024p": 1024,
    "s5_2048p": 2048,
}
GIB = 2**30


def make(stage: str, form: str, path: Path) -> None:
    topology, slices = TOPOLOGIES[form]
    experiment = f"experiments/qwen_image_2/{stage}.py" + (f":{form}" if form else "")
    command = ["plan", experiment, "--topology", topology, "--slices", str(slices), "--json", str(path)]
    print("qi2", *command, flush=True)
    subprocess.run([sys.executable, "-m", "qi2_jax", *command], check=True)


def row(plan: dict) -> str:
    """One line of the table: the largest memory, and the figures of the program that takes the most time."""
    programs = [program for program in plan["programs"] if program["flops"]]
    by_name = {part["name"]: part["bound_seconds"] * part["microbatches_per_update"] for part in plan["parts"]}
    first = max(programs, key=lambda program: by_name[program["name"]])
    memory = max(program["memory_total"] for program in plan["programs"]) / GIB
    mesh = " x ".join(str(size) for size in plan["mesh"].values())
    ratios = ", ".join(f"{program['compiled_ratio']:.2f} ({program['keep']})" for program in programs)
    cells = (
        plan["stage"],
        plan["topology"],
        mesh,
        f"{memory:.1f} of {first['chip']['hbm_bytes'] / GIB:.1f}",
        ratios,
        f"{min(program['overlapped'] for program in programs):.0%}",
        f"{plan['bound']['mfu']:.0%}",
        first["binding"],
        f"{plan['bound']['days']:.1f}",
        f"{plan['at_utilisation']['days']:.1f}",
    )
    return "| " + " | ".join(cells) + " |"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("plans", nargs="*", help="STAGE or STAGE:FORM (default: all)")
    arguments = parser.parse_args()
    every = [
        stage + (f":{form}" if form else "")
        for form, choices in CHOICES.items()
        for stage, side in STAGES.items()
        if side <= max(choices)
    ]
    if unknown := sorted(set(arguments.plans) - set(every)):
        raise SystemExit(f"plans {unknown} are unknown; choose among {every}")
    arguments.folder.mkdir(parents=True, exist_ok=True)
    for name in arguments.plans or every:
        stage, _, form = name.partition(":")
        path = arguments.folder / f"{stage}-{form or 'v6e'}.json"
        if not path.exists():
            make(stage, form, path)
    print(
        "\n| stage | chips | data x fsdp x tensor | HBM GiB | compiled / model FLOPs of slots | collectives "
        "overlapped | MFU of tokens, at most | bound by | days, at least | days at 40% |"
    )
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    for path in sorted(arguments.folder.glob("*.json")):
        print(row(json.loads(path.read_text())))


if __name__ == "__main__":
    main()
