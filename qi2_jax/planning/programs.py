"""What one compiled program of a training run needs: memory, arithmetic, traffic, and a bound of its time.

The bound is a roofline: on chips with these peak rates nothing can be faster, if instructions run one after the other
as the compiler scheduled them. Real programs are slower; how much is unknown until they run.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from qi2_jax import sharding
from qi2_jax.attention.splash import computed_pairs
from qi2_jax.models.flops import Flops, flops_per_step
from qi2_jax.models.mmdit import Execution, MMDiTConfig
from qi2_jax.planning import hlo
from qi2_jax.planning.analysis import Analysis, analyse
from qi2_jax.planning.compile import Memory, memory_of
from qi2_jax.runtime.chips import Chip, chip_of
from qi2_jax.sequence import Layout


@dataclasses.dataclass(frozen=True)
class Bound:
    """Lower bounds of the time of a program, in seconds.

    Attributes:
      arithmetic: operations at the peak rate.
      memory: additional time of instructions that wait for HBM.
      exposed: time of the collectives that the schedule does not overlap with arithmetic.
      links: time of all collectives along the mesh axes that take the most. Others may share their links.
      hbm: all HBM traffic at full bandwidth, with that of copies in the background.
    """

    arithmetic: float
    memory: float
    exposed: float
    links: float
    hbm: float

    @property
    def seconds(self) -> float:
        return max(self.arithmetic + self.memory + self.exposed, self.links, self.hbm)

    @property
    def binding(self) -> str:
        """The term that binds: what would have to shrink first."""
        if self.seconds == self.links:
            return "links"
        if self.seconds == self.hbm:
            return "HBM"
        terms = {"arithmetic": self.arithmetic, "HBM": self.memory, "collectives": self.exposed}
        return max(terms, key=lambda name: terms[name])


@dataclasses.dataclass(frozen=True)
class ProgramPlan:
    """A compiled program.

    Attributes:
      name: such as "256-0, 64 text slots".
      chip: kind of chip.
      chips: number of chips.
      images: images that it computes at once.
      keep: what its backward pass keeps of the blocks; None: everything.
      divided: what the mesh axis `tensor` divides, see `sharding.DIVIDED`.
      memory: memory of one chip.
      flops: operations by formula, of all slots; None for a program without a formula.
      analysis: what one chip computes and moves.
      bound: lower bound of its time.
      compile_seconds: time of the compilation.
      resident: bytes of a chip that the job keeps while this program runs, besides the program's memory.
    """

    name: str
    chip: Chip
    chips: int
    images: int
    keep: str | None
    divided: str | None
    memory: Memory
    flops: Flops | None
    analysis: Analysis
    bound: Bound
    compile_seconds: float
    resident: int = 0

    @property
    def memory_total(self) -> int:
        """Bytes that the chip must have while the program runs."""
        return self.memory.total + self.resident

    @property
    def compiled_ratio(self) -> float | None:
        """Operations of a chip over its share of the model FLOPs of all slots; None without a formula."""
        return self.analysis.flops * self.chips / self.flops.model if self.flops else None

    @property
    def slots_bound(self) -> float | None:
        """Upper bound of the utilisation, with padding counted as work; None without a formula."""
        return self.flops.model / (self.chips * self.chip.flops * self.bound.seconds) if self.flops else None


def plan_train_program(
    name: str,
    config: MMDiTConfig,
    layout: Layout,
    images: int,
    execution: Execution,
    divided: sharding.Divided,
    mesh: Mesh,
    compiled: jax.stages.Compiled,
    compile_seconds: float,
) -> ProgramPlan:
    """The plan of a compiled program that computes the gradient of a batch.

    Args:
      name: see `ProgramPlan`.
      config: architecture of the transformer.
      layout: slots of the sequence.
      images: global number of images.
      execution: result of `Trainer.execution_of`.
      divided: result of `Trainer.divided`.
      mesh: chips.
      compiled: result of `Trainer.compile_update` or `compile_microbatch`.
      compile_seconds: time of the compilation.
    """
    flops, keep = flops_per_step(config, layout, images), execution.keep if execution.remat else None
    kernel = kernel_flops(layout.visible_until(config.attention))
    plan = plan_program(name, images, mesh, compiled, compile_seconds, kernel)
    return dataclasses.replace(plan, keep=keep, divided=divided, flops=flops)


def plan_program(
    name: str,
    images: int,
    mesh: Mesh,
    compiled: jax.stages.Compiled,
    compile_seconds: float,
    kernel: Callable[[hlo.Instruction, Sequence[hlo.Shape]], float],
    branch_share: float = 1.0,
) -> ProgramPlan:
    """The plan of any compiled program; see `plan_train_program`, and `hlo.Program` for `branch_share`."""
    chip = chip_of(mesh)
    links = functools.partial(bandwidth, mesh, chip=chip)
    program = dataclasses.replace(hlo.parse(text_of(compiled)), branch_share=branch_share)
    analysis = analyse(program, mesh.shape, chip.flops, chip.hbm_bandwidth, kernel, links)
    return ProgramPlan(
        name,
        chip,
        mesh.size,
        images,
        keep=None,
        divided=None,
        memory=memory_of(compiled),
        flops=None,
        analysis=analysis,
        bound=bound_of(analysis, chip),
        compile_seconds=compile_seconds,
    )


def text_of(compiled: jax.stages.Compiled) -> str:
    """The compiled program as HLO text."""
    text = compiled.as_text()
    assert text is not None  # the TPU compiler always has it
    return text


def bound_of(analysis: Analysis, chip: Chip) -> Bound:
    """Lower bounds of a program's time. Traffic between slices is not in them: its bandwidth is unknown."""
    exposed, by_axes = 0.0, dict[tuple[str, ...], float]()
    for collective in analysis.collectives:
        seconds = collective.seconds * collective.times
        by_axes[collective.axes] = by_axes.get(collective.axes, 0.0) + seconds
        exposed += seconds * (1 - collective.hidden)
    arithmetic = analysis.flops / chip.flops
    return Bound(
        arithmetic,
        memory=max(analysis.busy_seconds - arithmetic, 0.0),
        exposed=exposed,
        links=max(by_axes.values(), default=0.0),
        hbm=analysis.hbm_bytes / chip.hbm_bandwidth,
    )


def bandwidth(mesh: Mesh, axes: tuple[str, ...], chip: Chip) -> float:
    """Bytes per second that a chip can receive in a collective along mesh axes of one slice.

    Each dim of the torus along which the chips of a group differ has its share of the links. A group that covers only
    part of the dim is a line without a link from its end to its start, and has half of the share.

    Args:
      mesh: chips with coordinates.
      axes: mesh axes of the collective.
      chip: kind of chip.
    """
    index = tuple(slice(None) if axis in axes else 0 for axis in mesh.axis_names)
    coords = np.array([device.coords for device in mesh.devices[index].flat])
    whole = np.array([device.coords for device in mesh.devices.flat])
    dims = sum(len(set(column)) > 1 for column in whole.T)
    shares = [
        (1.0 if set(part) == set(column) and len(set(column)) % chip.ring == 0 else 0.5) / dims
        for part, column in zip(coords.T, whole.T, strict=True)
        if len(set(part)) > 1
    ]
    return chip.ici_bandwidth * sum(shares) if shares else math.inf


def kernel_flops(visible_until: np.ndarray | None) -> Callable[[hlo.Instruction, Sequence[hlo.Shape]], float]:
    """A function for `analyse`: the operations of splash attention.

    Its forward pass has 2 products for each computed pair of query and key, its fused backward pass 5.

    Args:
      visible_until: number of leading keys that each query of the sequence sees; None: all keys.
    """

    def operations(call: hlo.Instruction, operands: Sequence[hlo.Shape]) -> float:
        if "splash_mha" not in call.name:
            raise ValueError(f"the kernel {call.name} has no formula for its operations; add it to {__name__}")
        backward = "dkv" in call.name
        q, k = [shape.dims for shape in operands if len(shape.dims) >= 3 and shape.dtype in ("bf16", "f32")][:2]
        suffix = "_dkv" if backward else ""
        queries, keys = (int(_number(call.rest, f"{name}{suffix}")) for name in ("block_q", "block_kv"))
        until = np.full(q[-2], k[-2]) if visible_until is None else np.minimum(visible_until, k[-2])
        pairs = computed_pairs(until, queries, keys)
        return (5 if backward else 2) * 2.0 * math.prod(q[:-2]) * pairs * q[-1]

    return operations


def no_kernels(call: hlo.Instruction, operands: Sequence[hlo.Shape]) -> float:
    """A function for `analyse`: a program that has no Pallas kernel."""
    raise ValueError(f"the kernel {call.name} is not expected in this program")


def _number(text: str, name: str) -> str:
    """A number in the metadata of a Pallas kernel."""
    found = re.search(rf'\\*"{name}\\*": *(\d+)', text)
    if not found:
        raise ValueError(f"the kernel's metadata has no {name}: {text[:200]}")
    return found.group(1)


def as_json(plan: Any) -> Any:
    """A plan as plain JSON, with the values that its properties compute."""
    return {
        **{name: value for name, value in dataclasses.asdict(plan).items() if name != "analysis"},
        "chip_flops": plan.analysis.flops,
        "hbm_bytes": plan.analysis.hbm_bytes,
        "collectives": [
            {"kind": kind, "axes": axes, "bytes": size} for (kind, axes), size in plan.analysis.bytes_by().items()
        ],
        "compiled_ratio": plan.compiled_ratio,
        "slots_bound": plan.slots_bound,
        "overlapped": plan.analysis.overlapped,
        "bound_seconds": plan.bound.seconds,
        "binding": plan.bound.binding,
        "memory_total": plan.memory_total,
    }
