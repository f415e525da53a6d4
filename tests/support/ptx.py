"""The few PTX instructions of the kernels' inline assembly, run on numpy arrays: Triton's interpreter runs none."""

from __future__ import annotations

import numpy as np
import torch


def run(code: str, words: np.ndarray) -> list[np.ndarray]:
    """The results $0 and $1 of assembly whose only operand is $2, for every uint32 of `words`."""
    registers: dict[str, np.ndarray] = {"$2": words.astype(np.uint32)}
    for line in code.strip().strip("{}").split(";"):
        line = line.strip()
        if not line or line.startswith(".reg"):
            continue
        opcode, _, operands = line.partition(" ")
        target, *sources = [operand.strip() for operand in operands.split(",")]
        values = [registers[s] if s in registers else np.full_like(registers["$2"], int(s, 0)) for s in sources]
        registers[target] = _OPCODES[opcode](*values)
    return [registers["$0"], registers["$1"]]


def _prmt(a: np.ndarray, b: np.ndarray, selector: np.ndarray) -> np.ndarray:
    """Four bytes out of the eight of b and a; a selector with bit 3 set repeats the sign of its byte."""
    both, result = (b.astype(np.uint64) << np.uint64(32)) | a, np.zeros_like(a)
    for place in range(4):
        choice = int(selector.flat[0]) >> (4 * place) & 0xF
        byte = (both >> np.uint64(8 * (choice & 7)) & np.uint64(0xFF)).astype(np.uint32)
        if choice & 8:
            byte = np.where(byte & 0x80, 0xFF, 0).astype(np.uint32)
        result |= byte << np.uint32(8 * place)
    return result


def _lop3(a: np.ndarray, b: np.ndarray, c: np.ndarray, table: np.ndarray) -> np.ndarray:
    result = np.zeros_like(a)
    for index in range(8):
        if int(table.flat[0]) >> index & 1:
            terms = [x if index >> (2 - place) & 1 else ~x for place, x in enumerate((a, b, c))]
            result |= terms[0] & terms[1] & terms[2]
    return result


def _fma_bf16x2(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    a, b, c = (torch.from_numpy(x.view(np.int16).copy()).view(torch.bfloat16).double() for x in (a, b, c))
    return (a * b + c).bfloat16().view(torch.int16).numpy().view(np.uint32)


_OPCODES = {
    "mov.b32": lambda a: a,
    "and.b32": lambda a, b: a & b,
    "add.u32": lambda a, b: a + b,
    "shr.u32": lambda a, b: a >> b,
    "prmt.b32": _prmt,
    "lop3.b32": _lop3,
    "fma.rn.bf16x2": _fma_bf16x2,
}
