"""Reads a compiled program, as XLA prints it: computations, instructions, shapes and loops.

Only what an estimate of traffic and arithmetic needs is read. The text is that of `jax.stages.Compiled.as_text`.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Iterator, Mapping

# Bits of an element. Tokens and opaque values take no memory.
BITS = {"pred": 8, "bf16": 16, "token": 0, "opaque": 0}
_ARRAY = re.compile(r"(\w+)\[([\d,]*)\](?:\{([^{}]*)\})?")
_HEADER = re.compile(r"^(ENTRY )?%?([\w.-]+) \(.*\{$")
_LINE = re.compile(r"^  (ROOT )?%([\w.-]+) = (.*)$")
_CALLED = re.compile(r"(calls|to_apply|condition|body)=%?([\w.-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")


@dataclasses.dataclass(frozen=True)
class Shape:
    """An array in a compiled program.

    Attributes:
      dtype: name of the element type in XLA, such as "bf16".
      dims: sizes of its dims.
      space: memory space: 0 is HBM, the others are on the chip (1 is VMEM) or on the host (5).
    """

    dtype: str
    dims: tuple[int, ...]
    space: int

    @property
    def elements(self) -> int:
        return math.prod(self.dims)

    @property
    def bytes(self) -> int:
        """Size without the padding of tiles."""
        bits = BITS.get(self.dtype) if self.dtype in BITS else int(re.sub(r"^\D+|e\w+$", "", self.dtype) or 0)
        return self.elements * (bits or 0) // 8


@dataclasses.dataclass(frozen=True)
class Instruction:
    """An instruction.

    Attributes:
      name: its name, unique in the program.
      op: its operation, such as "fusion".
      shapes: arrays of its result; several if it is a tuple.
      operands: names of its operands.
      rest: everything after the operands: attributes, metadata and backend config.
      root: whether it is the result of its computation.
    """

    name: str
    op: str
    shapes: tuple[Shape, ...]
    operands: tuple[str, ...]
    rest: str
    root: bool

    @functools.cached_property
    def called(self) -> Mapping[str, str]:
        """Computations that it calls, by attribute."""
        return dict(_CALLED.findall(self.rest))

    @property
    def target(self) -> str:
        """What a custom call calls; empty for other instructions."""
        return self.attribute(r'custom_call_target="([^"]*)"') or ""

    def attribute(self, pattern: str) -> str | None:
        """The first group of a regular expression in `rest`; None without a match."""
        found = re.search(pattern, self.rest)
        return found.group(1) if found else None


@dataclasses.dataclass(frozen=True)
class Computation:
    """A computation: a list of instructions in the order of their execution."""

    name: str
    instructions: tuple[Instruction, ...]

    @functools.cached_property
    def by_name(self) -> Mapping[str, Instruction]:
        return {instruction.name: instruction for instruction in self.instructions}

    @functools.cached_property
    def users(self) -> Mapping[str, tuple[Instruction, ...]]:
        """Instructions that read each instruction."""
        found: dict[str, list[Instruction]] = {}
        for instruction in self.instructions:
            for operand in dict.fromkeys(instruction.operands):
                found.setdefault(operand, []).append(instruction)
        return {name: tuple(users) for name, users in found.items()}

    def operand_shapes(self, instruction: Instruction) -> list[Shape]:
        """The shapes of an instruction's operands; of a tuple, its first array."""
        found = (self.by_name.get(name) for name in instruction.operands)
        return [operand.shapes[0] for operand in found if operand is not None and operand.shapes]

    @property
    def root(self) -> Instruction:
        return next(instruction for instruction in self.instructions if instruction.root)

    @property
    def parameters(self) -> list[Instruction]:
        """Parameters in the order of the caller's operands."""
        return sorted(
            (instruction for instruction in self.instructions if instruction.op == "parameter"),
            key=lambda instruction: int(instruction.attribute(r"^(\d+)") or 0),
        )


@dataclasses.dataclass(frozen=True)
class Program:
    """A compiled program.

    Attributes:
      computations: computations by name.
      entry: name of the first one.
      branch_share: share of a conditional's runs that take its last alternative; the others count nothing.
    """

    computations: Mapping[str, Computation]
    entry: str
    branch_share: float = 1.0

    def executed(self) -> Iterator[tuple[Computation, Instruction, float]]:
        """Every instruction outside fusions, with its computation and how often it runs.

        Loops count as often as they run. Of a branch, the last alternative counts, that of a true condition.

        Raises:
          ValueError: for a loop whose number of iterations is not a constant.
        """
        yield from self._executed(self.entry, 1)

    def _executed(self, name: str, times: float) -> Iterator[tuple[Computation, Instruction, float]]:
        computation = self.computations[name]
        for instruction in computation.instructions:
            yield computation, instruction, times
            if instruction.op == "while":
                yield from self._executed(instruction.called["body"], times * self.iterations(instruction))
            elif instruction.op == "conditional":
                branches = _BRANCHES.search(instruction.rest)
                for branch in re.findall(r"[\w.-]+", branches.group(1))[-1:] if branches else ():
                    yield from self._executed(branch, times * self.branch_share)
            elif instruction.op in ("call", "async-start") and (inner := next(iter(instruction.called.values()), None)):
                yield from self._executed(inner, times)

    def multiplies(self, instruction: Instruction) -> bool:
        """Whether an instruction computes matrix products: itself, in a fusion, in a kernel, or in a loop."""
        if instruction.op == "custom-call":
            return '"tpu_custom_call"' in instruction.rest
        inner = instruction.called.get("calls") or instruction.called.get("body")
        if inner is None:
            return instruction.op in ("convolution", "dot")
        return any(self.multiplies(part) for part in self.computations[inner].instructions)

    def iterations(self, loop: Instruction) -> int:
        """How often a loop runs, which counts from 0 in constant steps up to a constant.

        Raises:
          ValueError: for any other loop.
        """
        condition, body = (self.computations[loop.called[name]] for name in ("condition", "body"))
        compare = condition.root
        counter, limit = (condition.by_name.get(name) for name in (*compare.operands, "", "")[:2])
        less = compare.op == "compare" and compare.attribute(r"direction=(\w+)") == "LT"
        if less and counter and limit and limit.op == "constant":
            index = int(counter.attribute(r"index=(\d+)") or 0)
            if step := _added(body, body.root.operands[index]):
                return math.ceil(_integer(limit) / step)
        raise ValueError(f"the number of iterations of the loop {loop.name} is unknown")


def _added(computation: Computation, name: str) -> int:
    """The sum of the constants that a chain of additions and copies adds to an element of the parameter."""
    total, value = 0, computation.by_name[name]
    while value.op != "get-tuple-element":
        operands = [computation.by_name[operand] for operand in value.operands]
        constants = [operand for operand in operands if operand.op == "constant"]
        if value.op == "add" and len(constants) == 1:
            total += _integer(constants[0])
            value = next(operand for operand in operands if operand.op != "constant")
        elif value.op in ("copy", "copy-start", "copy-done", "bitcast"):
            value = operands[0]
        else:
            return 0
    return total


def _integer(constant: Instruction) -> int:
    return int(constant.attribute(r"^(\d+)") or 0)


def parse(text: str) -> Program:
    """The program that XLA printed.

    Raises:
      ValueError: if the text has no entry computation.
    """
    computations: dict[str, Computation] = {}
    entry, name, lines = "", "", list[str]()
    for line in text.splitlines():
        if header := _HEADER.match(line):
            name, lines = header.group(2), []
            entry = name if header.group(1) else entry
        elif name and (line == "}" or line.startswith("}, execution_thread=")):
            computations[name] = Computation(name, tuple(map(_instruction, lines)))
            name = ""
        elif name and _LINE.match(line):
            lines.append(line)
        elif name and lines:  # the metadata of a kernel takes several lines
            lines[-1] += line
    if not entry:
        raise ValueError("the text is not a program of XLA: it has no entry computation")
    return Program(computations, entry)


def _instruction(line: str) -> Instruction:
    found = _LINE.match(line)
    assert found is not None
    root, name, text = bool(found.group(1)), found.group(2), found.group(3)
    end = _closing(text, 0) if text.startswith("(") else text.index(" ")
    shapes = tuple(_shape(found) for found in _ARRAY.finditer(text[:end]))
    op, _, arguments = text[end:].lstrip().partition("(")
    stop = _closing("(" + arguments, 0) - 1
    operands = tuple(re.findall(r"%([\w.-]+)", arguments[: stop - 1]))
    if op in ("parameter", "constant"):
        return Instruction(name, op, shapes, (), arguments, root)
    return Instruction(name, op, shapes, operands, arguments[stop:], root)


def _closing(text: str, start: int) -> int:
    """Index after the parenthesis that closes the one at `start`."""
    depth = 0
    for index in range(start, len(text)):
        depth += (text[index] == "(") - (text[index] == ")")
        if depth == 0:
            return index + 1
    return len(text)


def _shape(found: re.Match[str]) -> Shape:
    dtype, dims, layout = found.groups()
    space = re.search(r"S\((\d+)\)", layout or "")
    return Shape(dtype, tuple(map(int, filter(None, dims.split(",")))), int(space.group(1)) if space else 0)
