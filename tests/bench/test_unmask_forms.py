"""The row of `gpu-check` on the two forms of `unmask`: it forces each form, checks each form, and lets a GPU say which
is faster."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from bench_module import ROOT
from host_timer import host_timer

import dlm_fast
from bench import gates, gpu_check, shapes, sweep, timing
from bench.speed import unmask_forms
from bench.speed.run import OURS, Bench, Ceilings, time_shapes
from dlm_kernels.testing import Failure
from dlm_kernels.tiles import unmask_tile

pytest.importorskip("triton", reason="the forms are two Triton kernels")

CPU = torch.device("cpu")
CEILINGS = Ceilings(copy_tb_s=2.0, gemm_tflop_s=500.0, empty_kernel_us=1.0, empty_graph_us=3.0, empty_launch_us=5.0)
FORMS = (OURS, unmask_forms.MEMORY, unmask_forms.MEMORY_OF_LONG_REGIONS)


def toy_bench() -> Bench:
    return Bench(CPU, host_timer, timing.Budget(1000, 0), CEILINGS, l2_bytes=1000, replays=1)


def toy_shapes(ops: dlm_fast.Ops) -> list:
    return list(unmask_forms.shapes(toy_bench(), ops, shapes.TOY_SHAPES))


def test_the_forms_are_timed_at_32_and_128_lanes_and_the_readme_says_so() -> None:
    for chosen in (shapes.CHECK_SHAPES, shapes.SWEEP_SHAPES):
        listed = sweep.listed(chosen, ("unmask-forms",))
        assert {(s.facts["lanes"], s.facts["rule"]) for s in listed} == {
            (lanes, rule) for lanes in (32, 128) for rule in ("threshold", "quota")
        }
    assert gpu_check.TIMINGS["unmask-forms"][1] == ("unmask",)
    readme = (ROOT / "bench" / "README.md").read_text()
    (first_call,) = [line for line in readme.splitlines() if line.strip().startswith("--times attention-decode")]
    assert "unmask-forms" in first_call.split() and "| `unmask-forms` |" in readme


@pytest.mark.parametrize("lanes", [32, 128])
def test_ours_is_the_form_of_the_table_and_the_others_read_the_same_lanes_from_memory(lanes: int) -> None:
    forms = unmask_forms.tiles(lanes)
    assert tuple(forms) == FORMS
    assert forms[OURS] == unmask_tile(lanes) and forms[OURS].BLOCK_T is None
    assert forms[unmask_forms.MEMORY] == dataclasses.replace(unmask_tile(lanes), BLOCK_T=lanes)
    assert all(forms[name].BLOCK_T for name in FORMS[1:])


def test_every_candidate_launches_its_own_form_and_the_table_stands_afterwards(monkeypatch) -> None:
    from dlm_kernels.unmask import launch

    launched: list[tuple[str, int]] = []

    class Counted:
        def __init__(self, name: str) -> None:
            self.name, self.kernel = name, getattr(launch, name)

        def __getitem__(self, grid):
            def run(**arguments):
                launched.append((self.name, arguments.get("BLOCK_T")))
                return self.kernel[grid](**arguments)

            return run

    for name in ("unmask_kernel", "unmask_memory_kernel"):
        monkeypatch.setattr(launch, name, Counted(name))
    work = toy_shapes(dlm_fast.triton_ops())[0].build()
    for candidate in work.candidates:
        candidate.calls[0]()
    assert launched == [("unmask_kernel", None), ("unmask_memory_kernel", 32), ("unmask_memory_kernel", 1024)]
    assert launch.unmask_tile is unmask_tile


def test_every_form_equals_the_reference_and_is_timed() -> None:
    rows = time_shapes(toy_bench(), toy_shapes(dlm_fast.triton_ops()))
    assert {(r.facts["lanes"], r.facts["rule"], r.candidate) for r in rows} == {
        (lanes, rule, form) for lanes in (32, 128) for rule in ("threshold", "quota") for form in FORMS
    }
    assert {(r.op, r.status, r.reason) for r in rows} == {("unmask-forms", "ok", "")}


@pytest.mark.parametrize("wrong", FORMS)
@pytest.mark.parametrize("rule", unmask_forms.RULES)
def test_one_wrong_form_leaves_no_form_timed(wrong: str, rule: str) -> None:
    """The wrong form moves one token of one row, in the last of the sets of inputs only."""
    from dlm_kernels.unmask import launch

    ops, calls = dlm_fast.triton_ops(), []

    def unmask(state, given_rule, inputs, *, kind):
        changed = ops.unmask(state, given_rule, inputs, kind=kind)
        if launch.unmask_tile(inputs.score.shape[1]) == unmask_forms.tiles(32)[wrong]:
            calls.append(wrong)
            if len(calls) == sets:
                state.tokens[0, -1] += 1
        return changed

    shape = toy_shapes(dataclasses.replace(ops, unmask=unmask))[list(unmask_forms.RULES).index(rule)]
    sets = shape.build().sets
    with pytest.raises(Failure, match=rf"state.tokens, {wrong}: 1 of"):
        shape.build().check()
    calls.clear()
    (row,) = time_shapes(toy_bench(), [shape])
    assert row.status == "FAILED" and row.p50_us is None and f"state.tokens, {wrong}: 1 of" in row.reason


@pytest.mark.parametrize(
    "from_memory, verdict", [((9.0, 12.0), gates.MISSED), ((12.0, 9.0), gates.MISSED), ((11.0, 12.0), gates.MET)]
)
def test_the_gate_says_which_form_is_faster_by_the_worst_row(from_memory: tuple[float, float], verdict: str) -> None:
    rows = []
    for shape in sweep.listed(shapes.CHECK_SHAPES, ("unmask-forms",)):
        slow = (shape.facts["lanes"], shape.facts["rule"]) != (128, "quota")
        for name, p50 in zip(FORMS, (10.0, *((30.0, 40.0) if slow else from_memory))):
            row = {"op": shape.op, "model": shape.model, "shape": shape.label, "candidate": name, "status": "ok"}
            rows.append(row | {"p50_us": p50, "facts": shape.facts})
    found = [gate for gate in gates.evaluate({"timings": rows}) if gate.goal == "unmask forms"]
    assert [gate.verdict for gate in found] == [gates.MET, verdict]
    assert found[1].value == pytest.approx(min(from_memory) / 10)
    assert [gate.verdict for gate in gates.evaluate({"timings": []}) if gate.goal == "unmask forms"] == [
        gates.NOT_MEASURED
    ] * 2
