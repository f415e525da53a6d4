"""What a kernel's machine code says: its loops, loads and tensor-core instructions, from the text of `nvdisasm -c`."""

from __future__ import annotations

import dataclasses
import re

_LABEL = re.compile(r"^(\.L_\w+):")
_INSTRUCTION = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(.*?)\s*;")
_TARGET = re.compile(r"`\((\.L_\w+)\)")
_BARRIER = re.compile(r"\bB\d+\b")

# Components of a load's opcode that give its width; a load without such a component is 32 bits wide. The last component
# counts: LDGSTS.E.BYPASS.LTC128B.128 is 128 bits wide, and its LTC128B is a prefetch size.
_WIDTHS = {"U8": 8, "S8": 8, "U16": 16, "S16": 16, "64": 64, "128": 128, "256": 256}

# The first component of the opcode. HFMA2.MMA is in no set: that is a plain half-precision multiply-add.
_WGMMA = frozenset({"HGMMA", "IGMMA", "QGMMA", "BGMMA"})
_TCGEN05 = frozenset({"UTCHMMA", "UTCQMMA", "UTCIMMA", "UTCOMMA", "UTCMXQMMA"})
_MMA_SYNC = frozenset({"HMMA", "IMMA", "QMMA", "BMMA", "DMMA", "OMMA"})


@dataclasses.dataclass(frozen=True)
class Instruction:
    """`opcode` without its guard ("LDG.E.128"), `guard` ("@!P0" or ""), and the whole text."""

    opcode: str
    guard: str
    text: str

    @property
    def name(self) -> str:
        return self.opcode.partition(".")[0]

    @property
    def global_load_bits(self) -> int:
        """Bits that a thread loads from global memory, 0 for anything else."""
        if self.name not in ("LDG", "LDGSTS"):
            return 0
        return next((_WIDTHS[part] for part in reversed(self.opcode.split(".")) if part in _WIDTHS), 32)


@dataclasses.dataclass(frozen=True)
class Loop:
    """A natural loop. `instructions` and `barriers` count its body once, nested loops' bodies included; `load_bytes` is
    what a thread loads from global memory in one iteration, nested loops excluded; `multiplies` says whether the body
    has tensor-core instructions."""

    instructions: int
    load_bytes: int
    barriers: int = 0
    multiplies: bool = False


def parse(disassembly: str, kernel: str) -> tuple[list[Instruction], dict[str, int]]:
    """The instructions of `kernel`, and where its labels point: label to index of the instruction that follows it."""
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    pending: list[str] = []  # labels that no instruction has followed yet, like the one at the end of the code
    inside = False
    for line in disassembly.splitlines():
        if line.startswith("//--------------------- ."):
            inside = line.split()[1] == f".text.{kernel}"
        elif inside and (match := _LABEL.match(line)):
            pending.append(match[1])
        elif inside and (match := _INSTRUCTION.match(line)):
            text = match[2].strip("{} \t")
            guard, _, rest = text.partition(" ") if text.startswith("@") else ("", "", text)
            labels.update((label, len(instructions)) for label in pending)
            pending.clear()
            instructions.append(Instruction(rest.split(None, 1)[0], guard, text))
    if not instructions:
        raise RuntimeError(f"static: nvdisasm printed no instruction of {kernel}")
    return instructions, labels


def mma_kind(instructions: list[Instruction]) -> str:
    """Which tensor-core instructions the kernel uses: "wgmma", "tcgen05", "mma.sync" or "none", the newest if
    several."""
    names = {instruction.name for instruction in instructions}
    for kind, members in (("tcgen05", _TCGEN05), ("wgmma", _WGMMA), ("mma.sync", _MMA_SYNC)):
        if names & members:
            return kind
    return "none"


def widest_load(instructions: list[Instruction]) -> int:
    """Bits of the widest load from global memory that a thread issues; 0 if threads load nothing, or TMA does."""
    return max((instruction.global_load_bits for instruction in instructions), default=0)


def barriers(instructions: list[Instruction]) -> int:
    """Barriers in the code at which all warps of a program wait for one another."""
    return sum(instruction.name == "BAR" for instruction in instructions)


def streaming_loops(found: list[Loop]) -> list[Loop]:
    """The loops that stream: those that load from global memory and multiply, the shortest first; where none
    multiplies, the one that loads most."""
    loading = sorted((loop for loop in found if loop.load_bytes), key=lambda loop: loop.instructions)
    multiplying = [loop for loop in loading if loop.multiplies]
    return multiplying or loading and [max(loading, key=lambda loop: loop.load_bytes)]


def _successors(instructions: list[Instruction], labels: dict[str, int]) -> list[list[int]]:
    """Control flow, instruction by instruction."""
    reconverges: dict[str, int] = {}
    successors: list[list[int]] = []
    for index, instruction in enumerate(instructions):
        after = [index + 1] if index + 1 < len(instructions) else []
        target = [labels[name] for name in _TARGET.findall(instruction.text) if name in labels]
        operands = instruction.text.split("`")[0].removeprefix(instruction.guard).split()[1:]
        conditional = bool(instruction.guard) and instruction.guard not in ("@PT", "@UPT") or bool(operands)
        if instruction.name == "BSSY":  # names where the threads that a branch splits meet again
            for barrier in _BARRIER.findall(instruction.text):
                reconverges[barrier] = target[0]
            successors.append(after)
        elif instruction.name == "BSYNC":
            meeting = [reconverges[barrier] for barrier in _BARRIER.findall(instruction.text) if barrier in reconverges]
            successors.append(meeting or after)
        elif instruction.name in ("BRA", "JMP"):
            successors.append(target + (after if conditional else []))
        elif instruction.name in ("EXIT", "RET"):
            successors.append(after if instruction.guard else [])
        else:
            successors.append(after)
    return successors


def loops(instructions: list[Instruction], labels: dict[str, int]) -> list[Loop]:
    """The natural loops of the kernel: for every header, what reaches a jump back to it without passing through it."""
    # 1. Basic blocks, and the edges between them.
    successors = _successors(instructions, labels)
    starts = {0} | {target for index, targets in enumerate(successors) for target in targets if targets != [index + 1]}
    starts |= {
        index + 1
        for index, targets in enumerate(successors)
        if targets != [index + 1] and index + 1 < len(instructions)
    }
    ordered = sorted(starts)
    end = dict(zip(ordered, [*ordered[1:], len(instructions)], strict=True))  # blocks: [start, end)
    after = {start: successors[end[start] - 1] for start in ordered}
    before: dict[int, list[int]] = {start: [] for start in ordered}
    for start, targets in after.items():
        for target in targets:
            before[target].append(start)

    # 2. Dominators by the plain fixed point: there are a few hundred blocks at most. A block that nothing reaches stays
    # out.
    order, seen, stack = [], {0}, [(0, iter(after[0]))]
    while stack:
        block, rest = stack[-1]
        child = next((target for target in rest if target not in seen), None)
        if child is None:
            order.append(stack.pop()[0])
        else:
            seen.add(child)
            stack.append((child, iter(after[child])))
    dominators = {block: set(seen) for block in seen} | {0: {0}}
    changed = True
    while changed:
        changed = False
        for block in reversed(order[:-1]):
            new = {block} | set.intersection(*(dominators[previous] for previous in before[block] if previous in seen))
            changed, dominators[block] = changed or new != dominators[block], new

    # 3. The body of every loop: what reaches a jump back to its header.
    bodies: dict[int, set[int]] = {}
    for block in order:
        for header in after[block]:
            if header in dominators[block]:
                body, todo = bodies.setdefault(header, {header}), [block]
                while todo:
                    member = todo.pop()
                    if member not in body:
                        body.add(member)
                        todo += [previous for previous in before[member] if previous in seen]

    # 4. What each loop counts.
    found = []
    for header, body in bodies.items():
        nested = set().union(*(other for inner, other in bodies.items() if inner != header and other < body))
        outside_nested = [index for start in body - nested for index in range(start, end[start])]
        bits = sum(instructions[index].global_load_bits for index in outside_nested)
        inside = [instructions[index] for start in body for index in range(start, end[start])]
        found.append(Loop(len(inside), bits // 8, barriers(inside), mma_kind(inside) != "none"))
    return found


_IR_LOAD = re.compile(r"\btt\.load\b.*tensor<((?:\d+x)+)!tt\.ptr<[a-z]+(\d+)")


def ttir_loop_bytes(ttir: str) -> int:
    """Bytes that a program reads in one iteration of the source's loading loop: the largest over the loops, nested ones
    excluded.

    The compilers below unroll loops as they like. The bytes that an iteration of the machine's loop loads, divided by
    these, say how far they did.
    """
    largest, depth, open_loops = 0, 0, []
    for line in ttir.splitlines():
        if re.search(r"\bscf\.(for|while)\b", line):
            open_loops.append([depth, 0])
        elif open_loops and (match := _IR_LOAD.search(line)):
            elements = 1
            for extent in match[1].split("x")[:-1]:
                elements *= int(extent)
            open_loops[-1][1] += elements * int(match[2]) // 8
        depth += line.count("{") - line.count("}")
        while open_loops and depth <= open_loops[-1][0]:
            largest = max(largest, open_loops.pop()[1])
    return largest
