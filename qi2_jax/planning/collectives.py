"""Collectives of a compiled TPU program, and what the chip computes while their bytes travel."""

import collections
import dataclasses
import re
from collections.abc import Callable, Iterator, Mapping

import numpy as np

from qi2_jax.planning.hlo import Computation, Instruction, Program

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute")
ACROSS = "across slices"


@dataclasses.dataclass(frozen=True)
class Collective:
    """A collective operation of one chip.

    Attributes:
      kind: XLA's name, such as "all-gather"; "across slices" for traffic on the data-center network.
      axes: mesh axes along which its chips differ.
      bytes: bytes that the chip receives each time, by a ring algorithm.
      times: how often it runs.
      seconds: time of the bytes of one run over the links of its axes; 0 for traffic across slices.
      hidden: share of that time during which the schedule has other work for the chip, at the chip's peak rates.
        Collectives that run at the same time are each compared with all of that work.
    """

    kind: str
    axes: tuple[str, ...]
    bytes: float
    times: float
    seconds: float
    hidden: float

    @property
    def total(self) -> float:
        return self.bytes * self.times


_CHAIN = r'chain_id="(\d+)"'  # marks the parts of a collective in the background


def _channel(collective: Instruction) -> str:
    return collective.attribute(r"channel_id=(\d+)") or collective.name


class Collectives:
    """Finds the collectives of a program, and what the chip computes meanwhile."""

    def __init__(
        self,
        program: Program,
        axes: Mapping[str, int],
        seconds: Callable[[Computation, Instruction], float],
        link_bandwidth: Callable[[tuple[str, ...]], float],
    ):
        self.program, self.axes, self.seconds, self.link_bandwidth = program, axes, seconds, link_bandwidth
        # By channel: the time of the fusions with matrix products in which a collective advances.
        self._fused: dict[str, float] = collections.defaultdict(float)
        for computation, instruction, _ in program.executed():
            for part in self._parts(instruction):
                if program.multiplies(instruction):
                    self._fused[_channel(part)] += seconds(computation, instruction)

    def found(self) -> Iterator[Collective]:
        """The collectives in the order of the schedule."""
        for computation, instruction, times in self.program.executed():
            if instruction.op == "send" and "megascale" in instruction.rest:
                size = float(computation.operand_shapes(instruction)[0].bytes)
                yield Collective(ACROSS, (), size, times, 0.0, 0.0)
            elif instruction.op.removesuffix("-start") in KINDS:
                meanwhile = self._meanwhile(computation, instruction) if instruction.op.endswith("-start") else 0.0
                yield self._collective(computation, instruction, times, meanwhile)
            elif parts := self._parts(instruction):
                inner = self.program.computations[_inner(instruction)]
                targets = [part.target for part in inner.instructions if part.op == "custom-call"]
                for part in parts:
                    # One in the background has a fusion for its start, some for its progress, and one for its end.
                    if "AsyncCollectiveStart" in targets or not part.attribute(_CHAIN):
                        meanwhile = self._fused[_channel(part)] + self._meanwhile(computation, instruction)
                        yield self._collective(inner, part, times, meanwhile)

    def _parts(self, instruction: Instruction) -> list[Instruction]:
        """Collectives inside a fusion, or inside a call that a SparseCore runs."""
        if instruction.op not in ("fusion", "call-start"):
            return []
        inner = self.program.computations[_inner(instruction)]
        return [part for part in inner.instructions if part.op in KINDS]

    def _meanwhile(self, computation: Computation, start: Instruction) -> float:
        """Time of the instructions between a start and the end of its last user in the background."""
        names, seconds = {start.name}, 0.0
        begun = False
        for instruction in computation.instructions:
            if instruction.name == start.name:
                begun = True
            elif begun and names & set(instruction.operands):
                if instruction.op not in ("get-tuple-element", "bitcast", "tuple"):
                    return seconds
                names.add(instruction.name)
            elif begun:
                seconds += self._whole_seconds(computation, instruction)
        return 0.0

    def _whole_seconds(self, computation: Computation, instruction: Instruction) -> float:
        """Time of an instruction, with all iterations of a loop."""
        if instruction.op != "while":
            return self.seconds(computation, instruction)
        body = self.program.computations[instruction.called["body"]]
        once = sum(self._whole_seconds(body, part) for part in body.instructions)
        return once * self.program.iterations(instruction)

    def _collective(
        self, computation: Computation, instruction: Instruction, times: float, meanwhile: float
    ) -> Collective:
        kind = instruction.op.removesuffix("-start")
        members = _group(instruction, tuple(self.axes.values()))
        size = len(members)
        given = float(sum(shape.bytes for shape in computation.operand_shapes(instruction)))
        received = {
            "all-gather": given * (size - 1),
            "all-reduce": 2 * given * (size - 1) / size,
            "collective-permute": given,
        }.get(kind, given * (size - 1) / size)
        places = np.array(np.unravel_index(members, tuple(self.axes.values()))).T
        along = tuple(name for name, column in zip(self.axes, places.T, strict=True) if len(set(column)) > 1)
        seconds = received / self.link_bandwidth(along) if along else 0.0
        return Collective(kind, along, received, times, seconds, min(meanwhile / seconds, 1.0) if seconds else 1.0)


def _inner(instruction: Instruction) -> str:
    """Name of the computation of a fusion or call."""
    return instruction.called.get("calls") or instruction.called["to_apply"]


# mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'a'}
_NAMED_GROUPS = re.compile(
    r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))? \{([^}]*)\}"
)
# [4,2]<=[2,4]T(1,0)
_TILED_GROUPS = re.compile(r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")


def _group(instruction: Instruction, sizes: tuple[int, ...]) -> list[int]:
    """Devices of the first group of a collective, or of its first pair."""
    if pair := instruction.attribute(r"source_target_pairs=\{\{(\d+,\d+)\}"):
        return [int(device) for device in pair.split(",")]
    if listed := instruction.attribute(r"replica_groups=\{\{([\d,]+)\}"):
        return [int(device) for device in listed.split(",")]
    if named := _NAMED_GROUPS.search(instruction.rest):
        dims = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", named.group(1))}
        chosen, shape = re.findall(r"'([^']+)'", named.group(4)), tuple(dims.values())
        devices = _iota(named.group(2) or str(np.prod(shape)), named.group(3)).reshape(shape)
        return devices[tuple(slice(None) if name in chosen else 0 for name in dims)].ravel().tolist()
    if tiled := _TILED_GROUPS.search(instruction.rest):
        return _iota(tiled.group(3), tiled.group(4)).reshape(int(tiled.group(1)), int(tiled.group(2)))[0].tolist()
    return list(range(int(np.prod(sizes))))


def _iota(dims: str, order: str | None) -> np.ndarray:
    """Numbers from 0 on in an array of these dims, transposed to another order of its dims."""
    shape = [int(size) for size in dims.split(",")]
    numbers = np.arange(np.prod(shape)).reshape(shape)
    return numbers.transpose([int(dim) for dim in order.split(",")]) if order else numbers
