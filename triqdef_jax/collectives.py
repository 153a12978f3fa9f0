"""What a compiled program sends between devices, counted from the text of its optimised HLO.

Names and bytes only; what sending takes is modelled in `step_model`. A collective inside a loop counts once, as it stands in the text.
"""

import dataclasses
import math
import re

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute", "collective-broadcast")
_BITS = {"pred": 8, "bf16": 16, "token": 0}  # All other types end in their number of bits: f32, s8, c64.
_INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%?([\w.-]+) = (.*)$")
# The type of an instruction ends before the first blank that is followed by a name and a bracket; layouts of TPUs have brackets, `T(8,128)`.
_CALL = re.compile(r"^(.*?) ([a-z][\w-]*)\((.*)$")
_ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,<=]*)\]")
_PURPOSE = re.compile(r'op_name="([^"]*)"')


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective of a program.

    Attributes:
      kind: one of `KINDS`. arrays: (type, shape) of what each device hands in; several where XLA combined several into one.
      purpose: the operation of the source that it comes from, '' where the text does not say; of combined ones the first names.
    """

    kind: str
    arrays: tuple[tuple[str, tuple[int, ...]], ...]
    purpose: str = ""

    @property
    def num_bytes(self) -> int:
        """Bytes that each device hands in; of an all-gather it gets as many from every device."""
        return sum(array_bytes(array) for array in self.arrays)


def array_bytes(array: tuple[str, tuple[int, ...]]) -> int:
    """Return the bytes of a (type, shape)."""
    dtype, shape = array
    bits = _BITS.get(dtype) if dtype in _BITS else int(re.search(r"\d+", dtype)[0])
    return math.ceil(bits * math.prod(shape) / 8)


def find(hlo_text: str) -> list[Collective]:
    """Return the collectives of a program in the order of its text (`compiled.as_text()`).

    Asynchronous ones are counted at their start; arrays are those of the operands, for a start's own type also names results and contexts.
    """
    arrays, calls = {}, []
    for line in hlo_text.splitlines():
        instruction = _INSTRUCTION.match(line)
        call = instruction and _CALL.match(instruction[2])
        if not call:
            continue
        arrays[instruction[1]] = _arrays(call[1])
        if call[2].removesuffix("-start") in KINDS:
            calls.append((call[2].removesuffix("-start"), call[3]))
    return [
        Collective(kind, tuple(x for name in _operands(rest) for x in arrays[name]), _purpose(rest))
        for kind, rest in calls
    ]


def _arrays(type_text):
    found = _ARRAY.findall(type_text)
    return [(dtype, tuple(int(n.lstrip("<=")) for n in shape.split(",") if n)) for dtype, shape in found]


def _operands(rest):
    """Return the names of the operands of a call, given what follows its opening bracket; their types may stand before them."""
    return re.findall(r"%([\w.-]+)", rest[: _closing(rest)])


def _closing(text):
    depth = 1
    for place, character in enumerate(text):
        depth += (character == "(") - (character == ")")
        if not depth:
            return place
    return len(text)


def _purpose(rest):
    found = _PURPOSE.search(rest)
    return found[1] if found else ""


def summarize(collectives: list[Collective]) -> dict:
    """Return, of each kind that occurs, `count`, `bytes` in all and `largest_bytes` of one."""
    summary = {}
    for kind in KINDS:
        sizes = [collective.num_bytes for collective in collectives if collective.kind == kind]
        if sizes:
            summary[kind] = {"count": len(sizes), "bytes": sum(sizes), "largest_bytes": max(sizes)}
    return summary
