"""Arithmetic, HBM traffic and collectives of a compiled TPU program, counted from its schedule.

The compiler's own analysis counts the body of a loop once, leaves Pallas kernels out, and counts a whole operand for
each prefetch of a slice. Here loops count as often as they run, kernels by the formula of the caller, and a prefetch as
what it moves.
"""

import collections
import dataclasses
import functools
import re
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from qi2_jax.planning.collectives import ACROSS, KINDS, Collective, Collectives
from qi2_jax.planning.hlo import Computation, Instruction, Program, Shape

HBM = 0  # memory space
# Instructions that move no data: they name, group or place what others compute.
_FREE = {"parameter", "constant", "get-tuple-element", "tuple", "bitcast", "while", "conditional", "call", "after-all"}
_FREE |= {"partition-id", "replica-id", "send-done", "recv-done", "opt-barrier", "add-dependency"}
_BUFFERS = ("AllocateBuffer", "ConcatBitcast", "AsyncCollective", "Sharding", "AssumeGatherIndicesInBound")


@dataclasses.dataclass(frozen=True)
class Analysis:
    """What one chip computes and moves in one run of a program.

    Attributes:
      flops: operations of matrix products, convolutions and kernels; a product of [m, k] and [k, n] counts as 2 m k n.
      hbm_bytes: bytes read from and written to HBM.
      busy_seconds: sum over the instructions of the longer of the times of their arithmetic and of their HBM traffic.
      collectives: collective operations.
    """

    flops: float
    hbm_bytes: float
    busy_seconds: float
    collectives: tuple[Collective, ...]

    @property
    def overlapped(self) -> float:
        """Share of the collectives' bytes within a slice that travel while the chip computes; 1 without any."""
        inside = [collective for collective in self.collectives if collective.kind != ACROSS]
        total = sum(collective.total for collective in inside)
        return sum(collective.total * collective.hidden for collective in inside) / total if total else 1.0

    def bytes_by(self) -> Mapping[tuple[str, tuple[str, ...]], float]:
        """Bytes of the collectives by kind and mesh axes."""
        found: dict[tuple[str, tuple[str, ...]], float] = collections.defaultdict(float)
        for collective in self.collectives:
            found[collective.kind, collective.axes] += collective.total
        return found


def analyse(
    program: Program,
    axes: Mapping[str, int],
    flops_rate: float,
    hbm_bandwidth: float,
    kernel_flops: Callable[[Instruction, Sequence[Shape]], float],
    link_bandwidth: Callable[[tuple[str, ...]], float],
) -> Analysis:
    """Counts what one chip computes and moves.

    Args:
      program: compiled program of one chip.
      axes: name and size of each mesh axis; the program's devices are numbered in this order, the last axis fastest.
      flops_rate: peak operations per second of a chip.
      hbm_bandwidth: bytes per second of a chip.
      kernel_flops: operations of a Pallas kernel, from its instruction and the shapes of its operands.
      link_bandwidth: bytes per second that a chip can receive along mesh axes.

    Raises:
      ValueError: for a loop whose number of iterations is unknown, or a kernel without a formula.
    """
    count = _Counter(program, flops_rate, hbm_bandwidth, kernel_flops)
    flops = traffic = busy = 0.0
    for computation, instruction, times in program.executed():
        flops += times * count.flops(computation, instruction)
        traffic += times * count.traffic(computation, instruction)
        busy += times * count.seconds(computation, instruction)
    return Analysis(flops, traffic, busy, tuple(Collectives(program, axes, count.seconds, link_bandwidth).found()))


class _Counter:
    """FLOPs, HBM traffic and time of instructions."""

    def __init__(
        self,
        program: Program,
        flops_rate: float,
        hbm_bandwidth: float,
        kernel_flops: Callable[[Instruction, Sequence[Shape]], float],
    ):
        self.program, self.kernel_flops = program, kernel_flops
        self.flops_rate, self.hbm_bandwidth = flops_rate, hbm_bandwidth

    def seconds(self, computation: Computation, instruction: Instruction) -> float:
        """Time of an instruction, without those of a loop's body.

        Copies in the background wait for nothing, and collectives have their own time.
        """
        if instruction.op.endswith("-start") or instruction.op in KINDS:
            return 0.0
        arithmetic = self.flops(computation, instruction) / self.flops_rate
        return max(arithmetic, self.traffic(computation, instruction) / self.hbm_bandwidth)

    def flops(self, computation: Computation, instruction: Instruction) -> float:
        if instruction.op == "fusion":
            return self._inner_flops(instruction.called["calls"])
        if instruction.op == "custom-call" and '"tpu_custom_call"' in instruction.rest:
            return self.kernel_flops(instruction, computation.operand_shapes(instruction))
        return _product_flops(computation, instruction)

    @functools.cache  # noqa: B019
    def _inner_flops(self, name: str) -> float:
        computation = self.program.computations[name]
        return sum(self.flops(computation, instruction) for instruction in computation.instructions)

    def traffic(self, computation: Computation, instruction: Instruction) -> float:
        """Bytes that an instruction reads from and writes to HBM."""
        op, operands = instruction.op, computation.operand_shapes(instruction)
        if op in _FREE or op.endswith("-done") or (op == "custom-call" and instruction.target.startswith(_BUFFERS)):
            return 0.0
        if op == "fusion":
            return self._fusion_traffic(computation, instruction)
        if op in ("slice-start", "dynamic-slice-start", "slice", "dynamic-slice"):
            # The result of a start holds the operand, the slice and a context.
            part = instruction.shapes[-2] if op.endswith("-start") and len(instruction.shapes) > 2 else None
            part = part or instruction.shapes[0]
            return part.bytes * ((operands[0].space == HBM) + (part.space == HBM))
        if op in ("call-start", "all-gather-start", "all-to-all-start"):  # their results hold the operands, too
            return _in_hbm(instruction.shapes)
        if op in ("copy-start", "collective-permute-start"):
            result = instruction.shapes[:1] if op == "copy-start" else instruction.shapes[1:2]
            return _in_hbm(operands[:1]) + _in_hbm(result)
        if op == "dynamic-update-slice":
            return 2.0 * _in_hbm(operands[1:2])
        return _in_hbm(operands) + _in_hbm(instruction.shapes)

    def _fusion_traffic(self, computation: Computation, instruction: Instruction) -> float:
        inner = self.program.computations[instruction.called["calls"]]
        moved = 0.0
        for parameter, operand in zip(inner.parameters, computation.operand_shapes(instruction), strict=False):
            if operand.space == HBM:
                moved += min(operand.bytes, self._read(inner.name, parameter.name))
        results = inner.root.operands if inner.root.op == "tuple" else (inner.root.name,)
        for name, shape in zip(results, instruction.shapes, strict=False):
            if shape.space == HBM:
                moved += self._written(inner, name, shape)
        return moved

    @functools.cache  # noqa: B019
    def _read(self, name: str, value: str) -> float:
        """Bytes that a fused computation reads of a value."""
        computation = self.program.computations[name]
        total = 0.0
        for user in computation.users.get(value, ()):
            if user.op in ("dynamic-slice", "slice", "gather"):
                total += user.shapes[0].bytes
            elif user.op in ("bitcast", "reshape"):
                total += self._read(name, user.name)
            elif user.op == "dynamic-update-slice" and user.operands[0] == value and user.operands[1] != value:
                continue  # in place
            elif user.op == "fusion":
                inner = self.program.computations[user.called["calls"]]
                places = [index for index, operand in enumerate(user.operands) if operand == value]
                total += sum(self._read(inner.name, inner.parameters[index].name) for index in places)
            elif user.op == "tuple" or user.op in KINDS or user.op == "custom-call":
                continue  # a buffer of a collective in the background, which is counted with its start
            else:
                return float("inf")
        return total

    def _written(self, computation: Computation, name: str, shape: Shape) -> float:
        """Bytes that a fused computation writes of a result."""
        value = computation.by_name[name]
        while value.op in ("bitcast", "reshape", "convert") and value.operands:
            value = computation.by_name[value.operands[0]]
        if value.op == "dynamic-update-slice":
            return float(computation.by_name[value.operands[1]].shapes[0].bytes)
        if value.op == "fusion":
            inner = self.program.computations[value.called["calls"]]
            return self._written(inner, inner.root.name, shape)
        if value.op in ("parameter", "custom-call") or (value.op in KINDS and "chain_id" in value.rest):
            return 0.0
        return float(shape.bytes)


def _in_hbm(shapes: Sequence[Shape]) -> float:
    return float(sum(shape.bytes for shape in shapes if shape.space == HBM))


def _product_flops(computation: Computation, instruction: Instruction) -> float:
    """Operations of a dot or a convolution; 0 for anything else."""
    if instruction.op == "dot":
        dims = computation.by_name[instruction.operands[0]].shapes[0].dims
        contracted = instruction.attribute(r"lhs_contracting_dims=\{([\d,]*)\}") or ""
        sizes = [dims[int(dim)] for dim in contracted.split(",") if dim]
        return 2.0 * instruction.shapes[0].elements * float(np.prod(sizes))
    if instruction.op != "convolution":
        return 0.0
    lhs, rhs = (computation.by_name[name].shapes[0].dims for name in instruction.operands[:2])
    result = instruction.shapes[0].dims
    labels = instruction.attribute(r"dim_labels=([\w?]+_[\w?]+->[\w?]+)") or ""
    left, right, out = re.split(r"_|->", labels)
    size = dict(zip(out, result, strict=True))
    total = 2.0 * size["b"] * size["f"] * rhs[right.index("i")]
    for dim in filter(str.isdigit, out):
        index = int(dim)
        stride, dilation, spacing = (
            _window(instruction, name, index) for name in ("stride", "lhs_dilate", "rhs_dilate")
        )
        inputs, places = lhs[left.index(dim)], rhs[right.index(dim)]
        total *= _pairs(inputs, size[dim], places, stride, dilation, spacing, _padding(instruction, index))
    return total


def _window(instruction: Instruction, name: str, dim: int) -> int:
    """One number of a convolution's window, 1 if it is not given."""
    values = instruction.attribute(rf"window=\{{[^}}]*\b{name}=([\dx]+)")
    return int(values.split("x")[dim]) if values else 1


def _padding(instruction: Instruction, dim: int) -> int:
    values = instruction.attribute(r"window=\{[^}]*\bpad=([\dx_-]+)")
    return int(values.split("x")[dim].split("_")[0]) if values else 0


def _pairs(inputs: int, outputs: int, kernel: int, stride: int, dilation: int, spacing: int, padding: int) -> int:
    """Pairs of an output and a place of the kernel that meet an input, neither padding nor a hole of dilation."""
    place = np.arange(outputs)[:, None] * stride - padding + np.arange(kernel)[None] * spacing
    return int(((place >= 0) & (place <= (inputs - 1) * dilation) & (place % dilation == 0)).sum())
