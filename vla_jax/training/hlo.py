"""What a compiled program sends between devices, counted from its optimised HLO."""

from __future__ import annotations

import math
import re
from collections import defaultdict

import jax

COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.-]+) .*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.-]+) = (.*)$")
_ARRAY = re.compile(r"\b(pred|token|[a-z]+\d+\w*)\[([\d,]*)\]")
_OPERATION = re.compile(r"([a-z][a-z0-9-]*)\(")
_CALLED = re.compile(r"(?:body|condition|to_apply|calls|true_computation|false_computation)=%?([\w.-]+)")
_BRANCHES = re.compile(r"(?:branch_computations|called_computations)=\{([^}]*)\}")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_NAME = re.compile(r"%([\w.-]+)")
_COMMENT = re.compile(r"/\*.*?\*/")


def collective_bytes(program: jax.stages.Compiled | str) -> dict[str, int]:
    """The bytes that each kind of collective carries on one device when a compiled program runs once.

    Counted is the array before it is cut or after it is put together: what an all-reduce sums, what an all-gather
    gives, what a reduce-scatter takes, what an all-to-all or a permutation gives. How many bytes cross a wire for it
    depends on the algorithm. Inside a loop an operation counts as often as the loop runs if the compiler knows that (of
    a ``lax.scan`` it does), and once otherwise. Of a conditional every branch is counted.

    Args:
        program: the compiled program, or the text of its HLO.

    Returns:
        Bytes by operation, one entry for each of :data:`COLLECTIVES`; zero where the program has none.
    """
    text = program if isinstance(program, str) else program.as_text()
    own: dict[str, dict[str, int]] = {}
    calls: dict[str, list[tuple[str, int]]] = {}
    entry = name = ""
    sizes: dict[str, int] = {}
    for line in text.splitlines():
        if head := _COMPUTATION.match(line):
            name = head[2]
            own[name], calls[name], sizes = defaultdict(int), [], {}
            entry = name if head[1] else entry
        elif name and (instruction := _INSTRUCTION.match(line)):
            result, body = instruction[1], _COMMENT.sub("", instruction[2])
            shape, operation, operands, rest = _parts(body)
            sizes[result] = _bytes(shape)
            kind = operation.removesuffix("-start")
            if kind in COLLECTIVES:
                own[name][kind] += _carried(kind, operation != kind, shape, operands, sizes)
            if operation.endswith(("-done", "-update")):
                # They may name the computation again that their start has called.
                continue
            trips = _TRIPS.search(rest) if operation == "while" else None
            called = _CALLED.findall(rest)
            for group in _BRANCHES.findall(rest):
                called += [branch.strip().lstrip("%") for branch in group.split(",")]
            calls[name] += [(other, int(trips[1]) if trips else 1) for other in called]

    total: dict[str, int] = dict.fromkeys(COLLECTIVES, 0)

    def add(computation: str, times: int) -> None:
        for kind, size in own.get(computation, {}).items():
            total[kind] += times * size
        for other, trips in calls.get(computation, []):
            add(other, times * trips)

    add(entry, 1)
    return total


def _parts(body: str) -> tuple[str, str, str, str]:
    """Shape, operation, operands and the rest of an instruction ``shape operation(operands)rest``."""
    operation = _OPERATION.search(body, _closing(body, 0) if body.startswith("(") else 0)
    if operation is None:
        return body, "", "", ""
    end = _closing(body, operation.end() - 1)
    return body[: operation.start()], operation[1], body[operation.end() : end], body[end:]


def _closing(text: str, start: int) -> int:
    """Where the parenthesis that opens at ``start`` closes; tuples of tuples and tiled layouts have them inside."""
    depth = 0
    for position in range(start, len(text)):
        depth += (text[position] == "(") - (text[position] == ")")
        if depth == 0:
            return position
    return len(text)


def _bytes(shape: str) -> int:
    return sum(_array_bytes(dtype, dimensions) for dtype, dimensions in _ARRAY.findall(shape))


def _array_bytes(dtype: str, dimensions: str) -> int:
    if dtype == "token":
        return 0
    bits = 8 if dtype == "pred" else int(re.search(r"\d+", dtype)[0])
    return math.ceil(bits * math.prod(int(size) for size in dimensions.split(",") if size) / 8)


def _carried(kind: str, started: bool, shape: str, operands: str, sizes: dict[str, int]) -> int:
    taken = sum(sizes.get(operand, 0) for operand in _NAME.findall(operands))
    if kind == "reduce-scatter" or (started and kind in ("all-to-all", "collective-permute")):
        # The start of a permutation also returns its operand and two counters; what it gives is as large as it takes.
        return taken
    if started and kind == "all-gather":
        # Its start returns the operands next to the results.
        return _bytes(shape) - taken
    return _bytes(shape)
