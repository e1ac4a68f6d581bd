"""Proof of scale: compiles the 7B training step for TPU pods on this CPU and prints what it needs.

Run `python tests/benchmarks/compile_train_step.py [CASE ...]`; without arguments every case, some minutes each.
"""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import argparse
import dataclasses

from qi2_jax.models.mmdit import MMDiTConfig
from qi2_jax.planning.compile import compile_train_step, topology_mesh
from qi2_jax.sequence import Layout
from qi2_jax.sharding import MeshShape


@dataclasses.dataclass(frozen=True)
class Case:
    topology: str
    mesh: MeshShape
    layout: Layout
    images: int | None = None  # None: one per device along data and fsdp


CASES = {
    "512p_v5e": Case("v5e:16x16", MeshShape(fsdp=256), Layout((256,), 1056)),
    "1024p_v6e": Case("v6e:16x16", MeshShape(fsdp=256), Layout((1024,), 4160)),
    "2048p_v6e": Case("v6e:16x16", MeshShape(fsdp=256), Layout((1024,), 16448)),
    "1024p_edit_v6e": Case("v6e:16x16", MeshShape(fsdp=256), Layout((512, 512), 4160, (4160,))),
}


def main(names: list[str]) -> None:
    if unknown := sorted(set(names) - set(CASES)):
        raise SystemExit(f"cases {unknown} are unknown; choose among {list(CASES)}")
    for name in names or CASES:
        case = CASES[name]
        mesh = topology_mesh(case.topology, case.mesh)
        report, _ = compile_train_step(MMDiTConfig(), case.layout, mesh, images=case.images)
        print(name, f"{case.mesh}, {case.layout}", *report.lines(), sep="\n  ", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Compile the 7B training step for TPU pods and print what it needs.")
    parser.add_argument("cases", nargs="*", metavar="CASE", help=f"some of {', '.join(CASES)} (default: all)")
    main(parser.parse_args().cases)
