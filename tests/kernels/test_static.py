"""The compile-without-GPU report: what it must see in machine code, and what every shipped kernel must show there.

Triton decides between compiling and interpreting when a function is decorated, so everything here runs in processes of
its own.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton's wheels are for Linux; nothing is compiled elsewhere")

from dlm_kernels import sass
from dlm_kernels.static import CompileResult, table, violations

ROOT = Path(__file__).resolve().parents[2]

TOYS = """
import dataclasses, json, sys
import triton
import triton.language as tl
from dlm_kernels.static import CompileCase, compile_case

@triton.jit
def sum_kernel(x_ptr, out_ptr, strides, V, BLOCK_V: tl.constexpr):
    total = tl.zeros([BLOCK_V], tl.float32)
    for start in range(0, V, BLOCK_V):
        offsets = start + tl.arange(0, BLOCK_V)
        x = tl.load(x_ptr + tl.program_id(0).to(tl.int64) * strides[0] + offsets, mask=offsets < V, other=0.0)
        total += x.to(tl.float32)
    tl.store(out_ptr + tl.program_id(0), tl.sum(total, 0))

@triton.jit
def sine_kernel(x_ptr, out_ptr, BLOCK_V: tl.constexpr):
    offsets = tl.arange(0, BLOCK_V)
    tl.store(out_ptr + offsets, tl.sin(tl.load(x_ptr + offsets)))

@triton.jit
def matmul_kernel(a_ptr, b_ptr, out_ptr, K, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    m, n, k = tl.arange(0, BLOCK_M)[:, None], tl.arange(0, BLOCK_N)[None, :], tl.arange(0, BLOCK_K)
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, K, BLOCK_K):
        a = tl.load(a_ptr + m * K + (start + k)[None, :], mask=(start + k)[None, :] < K, other=0.0)
        b = tl.load(b_ptr + (start + k)[:, None] * BLOCK_N + n, mask=(start + k)[:, None] < K, other=0.0)
        total = tl.dot(a, b, total)
    tl.store(out_ptr + m * BLOCK_N + n, total)

def row_sum(config, divisible, block=1024, **changes):
    signature = {"x_ptr": "*bf16", "out_ptr": "*fp32", "strides": ("i64", "i32"), "V": "i32", "BLOCK_V": "constexpr"}
    case = CompileCase("sum", config, sum_kernel, signature, {"BLOCK_V": block}, divisible, 4, 3, block)
    return dataclasses.replace(case, **changes)

def matmul(config, m, n, k, warps, stages):
    signature = {"a_ptr": "*bf16", "b_ptr": "*bf16", "out_ptr": "*fp32", "K": "i32"}
    tiles = {"BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": k}
    signature |= dict.fromkeys(tiles, "constexpr")
    divisible = ("a_ptr", "b_ptr", "out_ptr", "K")
    return CompileCase("matmul", config, matmul_kernel, signature, tiles, divisible, warps, stages)

def sine():
    signature = {"x_ptr": "*fp32", "out_ptr": "*fp32", "BLOCK_V": "constexpr"}
    return CompileCase("sine", "one", sine_kernel, signature, {"BLOCK_V": 1024}, ("x_ptr", "out_ptr"), 4, 3)

ALIGNED = ("x_ptr", "strides.0", "V")
"""

TOY_RUN = """
cases = [
    (row_sum("aligned", ALIGNED), 90), (row_sum("unaligned", ()), 90), (row_sum("aligned, long", ALIGNED, 8192), 90),
    (row_sum("aligned", ALIGNED), 80), (sine(), 90),
    (matmul("one warpgroup", 64, 64, 64, 4, 3), 90), (matmul("one warpgroup", 64, 64, 64, 4, 3), 80),
    (matmul("one tile of tensor memory", 128, 64, 64, 4, 2), 100), (matmul("one warpgroup", 64, 64, 64, 4, 3), 120),
    (matmul("too few registers", 128, 128, 32, 2, 2), 80), (matmul("deep", 64, 64, 64, 4, 8), 86),
]
print(json.dumps([dataclasses.asdict(compile_case(case, capability)) for case, capability in cases]))
"""


def run(arguments: list[str], *, interpret: bool = False, check: bool = True) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT / "kernels"), str(ROOT), os.environ.get("PYTHONPATH", "")])
    if interpret:
        environment["TRITON_INTERPRET"] = "1"
    result = subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True)
    assert not check or result.returncode == 0, result.stderr
    return result


def run_toys(folder: Path, script: str, **options: bool) -> subprocess.CompletedProcess[str]:
    path = folder / "toys.py"  # Triton reads a kernel's source from its file
    path.write_text(TOYS + script)
    return run([str(path)], **options)


@pytest.fixture(scope="module")
def toys(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str, str], CompileResult]:
    lines = run_toys(tmp_path_factory.mktemp("toys"), TOY_RUN).stdout.splitlines()
    results = [CompileResult(**fields) for fields in json.loads(lines[-1])]
    return {(result.kernel, result.config, result.target): result for result in results}


def test_alignment_makes_the_difference_between_scalar_and_128_bit_loads(toys):
    assert toys["sum", "aligned", "sm_90"].widest_load == 128
    assert toys["sum", "unaligned", "sm_90"].widest_load == 16


def test_a_kernel_with_too_few_registers_is_reported_as_spilling(toys):
    spilling = toys["matmul", "too few registers", "sm_80"]
    assert spilling.registers == 255
    assert spilling.spills > 0 and spilling.stack_bytes > 0
    assert [text for text in violations([spilling]) if "spills must be 0" in text]


def test_a_stack_that_holds_no_spill_is_reported_and_is_no_violation(toys):
    sine = toys["sine", "one", "sm_90"]
    assert (sine.spills, sine.stack_bytes > 0) == (0, True)
    assert violations([sine]) == []


def test_shared_memory_beyond_what_a_target_has_is_a_violation(toys):
    deep = toys["matmul", "deep", "sm_86"]
    assert deep.shared_bytes > 99 * 1024 and deep.spills == 0
    assert violations([deep]) == [
        f"matmul deep on sm_86: shared memory must be at most 101376 bytes, got {deep.shared_bytes}",
    ]
    assert violations([dataclasses.replace(deep, shared_bytes=101376)]) == []


def test_every_kind_of_tensor_core_instruction_is_told_apart(toys):
    assert toys["matmul", "one warpgroup", "sm_80"].mma == "mma.sync"
    assert toys["matmul", "one warpgroup", "sm_90"].mma == "wgmma"
    assert toys["matmul", "one tile of tensor memory", "sm_100"].mma == "tcgen05"
    assert toys["matmul", "one warpgroup", "sm_120"].mma == "mma.sync"
    assert toys["sum", "aligned", "sm_90"].mma == "none"


def test_tensor_memory_is_counted_and_limited(toys):
    result = toys["matmul", "one tile of tensor memory", "sm_100"]
    assert 0 < result.tensor_memory <= 512
    assert violations([result]) == []
    assert len(violations([dataclasses.replace(result, tensor_memory=513)])) == 1


def test_instructions_per_element_do_not_depend_on_how_far_the_loop_was_unrolled(toys):
    """ptxas unrolls the short loop by four and the long one not at all. Both do the same for an element: convert,
    select, add."""
    short, long = toys["sum", "aligned", "sm_90"], toys["sum", "aligned, long", "sm_90"]
    assert 2 <= long.instructions_per_element <= 5
    assert short.instructions_per_element == pytest.approx(long.instructions_per_element, rel=0.25)
    assert toys["sum", "unaligned", "sm_90"].instructions_per_element > short.instructions_per_element
    assert toys["sine", "one", "sm_90"].instructions_per_element is None


def test_too_many_instructions_per_element_are_a_violation_on_sm_90_only(toys):
    result = dataclasses.replace(toys["sum", "aligned", "sm_90"], instructions_per_element=10.51)
    assert len(violations([result])) == 1
    assert violations([dataclasses.replace(result, instructions_per_element=10.5)]) == []
    assert violations([dataclasses.replace(result, target="sm_80")]) == []


REFUSALS = """
from triton import knobs

def tell(case, capability=90):
    try:
        compile_case(case, capability)
        print("compiled")
    except (RuntimeError, ValueError) as error:
        print(type(error).__name__, error)

good = row_sum("aligned", ALIGNED)
tell(dataclasses.replace(good, signature={"x_ptr": "*bf16"}))
tell(dataclasses.replace(good, constexprs={}))
tell(dataclasses.replace(good, divisible_by_16=("y_ptr",)))
tell(dataclasses.replace(good, fn=sum_kernel.fn))
tell(dataclasses.replace(sine(), elements_per_iteration=1024))
tell(good, 70)
type(knobs.nvidia).__dict__["cuobjdump"].default_path = "/nonexistent/cuobjdump"
tell(good)
"""


def test_a_case_that_does_not_fit_and_a_missing_binary_are_refused_by_name(tmp_path):
    lines = run_toys(tmp_path, REFUSALS).stdout.splitlines()
    expected = [
        "ValueError sum aligned: signature must name exactly the function's arguments, "
        "differs in ['BLOCK_V', 'V', 'out_ptr'",
        "ValueError sum aligned: constexprs must be exactly the 'constexpr' arguments, differs in ['BLOCK_V']",
        "ValueError sum aligned: divisible_by_16 must name arguments of the function, got 'y_ptr'",
        "RuntimeError sum aligned: fn must be a @triton.jit function, got function;",
        "RuntimeError sine one: elements_per_iteration is given, but no loop loads from global memory",
        "ValueError compile_case: capability must be one of 80, 86, 87, 89, 90, 100, 103, 120, 121, got 70",
        "RuntimeError static: cuobjdump not found; the official Triton wheels for Linux have it in",
    ]
    assert [line[: len(start)] for line, start in zip(lines, expected, strict=True)] == expected


def test_the_interpreter_is_refused(tmp_path):
    script = """
from dlm_kernels.static import main
try:
    compile_case(sine(), 90)
except RuntimeError as error:
    print(error)
print(main([]))
"""
    result = run_toys(tmp_path, script, interpret=True)
    refusal = "static: Triton's interpreter is on, so nothing compiles; run in a process without TRITON_INTERPRET"
    assert result.stdout.splitlines() == [refusal, "2"]
    assert result.stderr == f"error: {refusal}\n"


LISTING = """
//--------------------- .text.other          --------------------------
        /*0000*/                   LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0010*/                   EXIT ;
//--------------------- .text.toy          --------------------------
.text.toy:
        /*0000*/                   ULDC UR4, c[0x0][0x220] ;
        /*0010*/                   ISETP.GE.AND P0, PT, R3, 0x1, PT ;
        /*0020*/              @!P0 BRA `(.L_x_9) ;
.L_x_1:
        /*0030*/                   LDG.E.U16 R4, desc[UR4][R2.64] ;
.L_x_2:
        /*0040*/               @P1 LDG.E.128.CONSTANT R4, desc[UR4][R2.64] ;
        /*0050*/               @P2 BRA `(.L_x_7) ;
.L_x_3:
        /*0060*/                   HFMA2.MMA R13, -RZ, RZ, 0, 0 ;
        /*0070*/              @!P0 BRA `(.L_x_2) ;
        /*0080*/                   LDGSTS.E.BYPASS.LTC128B.64 [R4], desc[UR4][R2.64] ;
        /*0090*/                   BRA P3, `(.L_x_1) ;
.L_x_9:
        /*00a0*/                   EXIT ;
.L_x_7:
        /*00b0*/                   FADD R4, R4, R5 ;
        /*00c0*/                   BRA `(.L_x_3) ;
.L_x_8:
        /*00d0*/                   BRA `(.L_x_8);
"""


def test_loops_are_found_with_what_was_moved_out_of_line_and_without_the_trap_at_the_end():
    """Inner loop: 4 instructions and the 2 that were moved behind the EXIT. Outer loop: those, its own load, copy and
    jump. The jump of the out-of-line part back into the loop makes no loop, nor does the endless one that nothing
    reaches."""
    instructions, labels = sass.parse(LISTING, "toy")
    assert len(instructions) == 14
    found = sorted(sass.loops(instructions, labels), key=lambda loop: loop.instructions)
    assert found == [sass.Loop(instructions=6, load_bytes=16), sass.Loop(instructions=9, load_bytes=10)]


def test_the_loops_that_stream_multiply_or_load_most():
    scan, masked, whole = sass.Loop(94, 64), sass.Loop(557, 32, 4, True), sass.Loop(420, 32, 4, True)
    assert sass.streaming_loops([scan, masked, whole, sass.Loop(9, 0)]) == [whole, masked]
    assert sass.streaming_loops([sass.Loop(30, 16), sass.Loop(20, 16), scan]) == [scan]
    assert sass.streaming_loops([sass.Loop(9, 0, 0, True)]) == []


def test_barriers_are_counted_in_the_code_and_in_its_loops():
    listing = LISTING.replace("FADD R4, R4, R5", "BAR.SYNC.DEFER_BLOCKING 0x0")
    instructions, labels = sass.parse(listing, "toy")
    assert sass.barriers(instructions) == 1 and sass.barriers(sass.parse(LISTING, "toy")[0]) == 0
    assert {loop.barriers for loop in sass.loops(instructions, labels)} == {1}


def test_load_widths_and_tensor_core_names_are_read_from_the_right_part_of_the_opcode():
    instructions, _ = sass.parse(LISTING, "toy")
    assert [item.global_load_bits for item in instructions if item.global_load_bits] == [16, 128, 64]
    assert sass.mma_kind(instructions) == "none"  # HFMA2.MMA is no tensor-core instruction
    assert sass.mma_kind([sass.Instruction("HMMA.16816.F32.BF16", "", "")]) == "mma.sync"


def test_bytes_of_a_source_loop_leave_out_the_loops_inside_it():
    ttir = """
    %0 = tt.load %p : tensor<4096x!tt.ptr<f32>>
    scf.for %i = %a to %b step %c  : i32 {
      %1 = tt.load %q {cache = 1 : i32} : tensor<8x512x!tt.ptr<bf16>>
      scf.for %j = %a to %b step %c  : i32 {
        %2 = tt.load %r, %m, %o : tensor<16x!tt.ptr<f8E4M3FN>>
      }
      %3 = tt.load %r : tensor<16x!tt.ptr<i64>>
      %4 = tt.load %s : !tt.ptr<i32>
    }
"""
    assert sass.ttir_loop_bytes(ttir) == 8 * 512 * 2 + 16 * 8
    assert sass.ttir_loop_bytes("tt.load %p : tensor<64x!tt.ptr<f32>>") == 0


def test_the_table_has_a_line_for_every_result(toys):
    lines = table(list(toys.values())).splitlines()
    assert len(lines) == 1 + len(toys)
    columns = "kernel config target registers spills stack shared mma load barriers loops instr/element"
    assert lines[0].split() == columns.split()
    assert "128-bit" in lines[1]


# wgmma and 227 KiB of shared memory; mma.sync and 99.
TARGETS = (90, 86)


ONE_OF_EACH_TILE = """
from dlm_kernels import static
found = []
for capability in map(int, sys.argv[1:]):
    of_tile = {}
    for case in (case for op in static.KERNEL_MODULES for case in static.shipped(op, capability)):
        blocks = tuple(sorted((name, value) for name, value in case.constexprs.items() if name.startswith("BLOCK_")))
        of_tile[case.kernel, blocks, case.num_warps, case.num_stages, case.maxnreg] = case
    found += [dataclasses.asdict(compile_case(case, capability)) for case in of_tile.values()]
print(json.dumps(found))
"""


def test_shipped_tiles_compile_for_two_unlike_targets_without_spills(tmp_path):
    """One configuration of each. All of them, on all six targets, take half an hour of two cores: .ci/run does that."""
    path = tmp_path / "tiles.py"
    path.write_text(TOYS + ONE_OF_EACH_TILE)
    lines = run([str(path), *map(str, TARGETS)]).stdout.splitlines()
    shipped = [CompileResult(**fields) for fields in json.loads(lines[-1])]
    assert violations(shipped) == []
    targets = {f"sm_{capability}" for capability in TARGETS}
    ops = ("attention", "prefill", "combine", "confidence", "unmask", "draft_build", "verify", "uniform_scores")
    ops += ("rms_norm", "add_rms_norm", "qk_norm_rope", "swiglu")
    for op in ops:
        assert {result.target for result in shipped if op in result.kernel} == targets, op
    streams = ("attention", "attention prefill", "attention combine", "confidence")
    assert {result.widest_load for result in shipped if result.kernel in streams} == {128}
    large = [result for result in shipped if "attention" in result.kernel and result.tiles.get("BLOCK_M", 0) >= 64]
    assert {result.mma for result in large if result.target == "sm_90"} == {"wgmma"}


CANDIDATES = """
from dlm_kernels.attention.cases import candidate_cases
from dlm_kernels.static import violations
for capability in map(int, sys.argv[1:]):
    found = [compile_case(case, capability) for case in candidate_cases(capability)]
    print(json.dumps([capability, [result.config for result in found], violations(found)]))
"""


def test_the_candidates_of_attention_compile_for_two_unlike_targets_without_spills(tmp_path):
    """No launcher runs them, so the report does not list them."""
    path = tmp_path / "candidates.py"
    path.write_text(TOYS + CANDIDATES)
    lines = run([str(path), *map(str, TARGETS)]).stdout.splitlines()
    for target, line in zip(TARGETS, lines, strict=True):
        capability, configs, found = json.loads(line)
        assert (capability, found) == (target, [])
        assert {"G=1", "G=4", "G=7"} <= {word for config in configs for word in config.split()}


BORROWED = """
from dlm_kernels import static, tiles
from dlm_kernels.static import violations
chosen = {
    "attention": "bf16 D=64 G=1 full cache", "confidence": "bf16 second", "unmask": "threshold", "draft_build": "",
    "add_rms_norm": "bf16", "qk_norm_rope": "bf16", "swiglu": "bf16",
}
found = []
for capability in sorted(set(tiles.TARGETS) - set(static.CAPABILITIES)):
    cases = [case for op in static.KERNEL_MODULES for case in static.shipped(op, capability)]
    for kernel, config in chosen.items():
        case = next(case for case in cases if case.kernel == kernel and case.config.startswith(config))
        found.append(compile_case(case, capability))
print(json.dumps([[result.target, result.kernel, violations([result])] for result in found]))
print(static.main(["--target", "103", "--target", "sm_121", "--kernel", "verify", "--jobs", "1"]))
"""


def test_targets_that_borrow_tiles_compile_each_op_with_them(tmp_path):
    """One configuration of each: those of the targets that lend them are all compiled."""
    lines = run_toys(tmp_path, BORROWED).stdout.splitlines()
    found = json.loads(lines[0])
    assert {target for target, _, _ in found} == {"sm_87", "sm_103", "sm_121"}
    assert {kernel for _, kernel, _ in found} == {
        "attention", "confidence", "unmask", "draft_build", "add_rms_norm", "qk_norm_rope", "swiglu"
    }  # fmt: skip
    assert [result for result in found if result[2]] == []
    assert lines[-2].startswith("6 binaries, 2 targets, ") and lines[-1] == "0"
