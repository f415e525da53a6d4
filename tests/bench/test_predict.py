"""Predicted times: arithmetic on the static table, which grows and falls with what the table says."""

from __future__ import annotations

import pytest
from bench_results import STATIC_ROW

from bench import floors, launches, predict, shapes
from dlm_fast.models import native

COPY = floors.CARDS["H200"][0]


def attention(model: shapes.Model, loop: int, registers: int = 250) -> dict:
    """A row of the static table for a model's decode attention."""
    mode = "full" if model.visibility == "full" else "block"
    config = f"bf16 D={model.head_dim} G={model.group} {mode} cache 128x64"
    row = {"kernel": "attention", "config": config, "target": "sm_90", "registers": registers, "shared_bytes": 132096}
    return STATIC_ROW | row | {"loops": [[loop, 4], [loop + 150, 4]]}


def confidence(barriers: int, split: bool = True) -> dict:
    config = "bf16 second" + " split" * split
    return STATIC_ROW | {"kernel": "confidence", "config": config, "target": "sm_90", "registers": 48} | {
        "barriers": barriers, "instructions_per_element": 7.2, "shared_bytes": 1056,
    }  # fmt: skip


@pytest.mark.parametrize("model", [shapes.LLADA, shapes.DREAM, shapes.SDAR_8B], ids=lambda model: model.name)
@pytest.mark.parametrize("B, prefix", [(1, 1024), (8, 4096), (32, 1024)])
def test_no_prediction_is_below_the_floor_and_fewer_instructions_take_no_longer(model, B, prefix):
    before, after = (predict.decode_us([attention(model, n)], model, B, prefix, COPY) for n in (535, 403))
    floor = floors.decode(model, [prefix] * B).floor_us(*floors.CARDS["H200"])
    assert floor < after <= before


def test_a_kernel_that_computes_longer_than_it_reads_gains_from_fewer_instructions():
    """Dream's 224 query rows: 8 rows of 4k."""
    before, after = (predict.decode_us([attention(shapes.DREAM, n)], shapes.DREAM, 8, 4096, COPY) for n in (535, 403))
    assert after < 0.95 * before


def test_the_instructions_of_a_tile_are_those_of_the_shortest_loop():
    row = attention(shapes.DREAM, 403)
    assert predict.code_of([row], "attention", " D=128 ").loop == 403


def test_a_code_of_the_same_head_size_stands_in_for_one_that_the_table_lacks():
    rows = [attention(shapes.SDAR_8B, 403)]
    assert predict.code_of(rows, "attention", " D=128 ", " G=7 ", " full ") is not None
    assert predict.code_of(rows, "attention", " D=64 ", " G=4 ") is None
    assert predict.decode_us([], shapes.DREAM, 1, 1024, COPY) is None


def test_few_registers_let_programs_run_side_by_side():
    code = predict.code_of([attention(shapes.LLADA, 403, registers=168)], "attention", " D=128 ")
    assert code.resident(4) == 1  # shared memory of 132 KB
    assert predict.Code(168, 90_000, 9, 403, None).resident(4) == 2
    assert predict.Code(255, 1_000, 9, 403, None).resident(8) == 1


def test_barriers_cost_most_where_few_rows_are_read():
    def microseconds(N: int, barriers: int) -> float:
        rows = [confidence(barriers), confidence(barriers, split=False)]
        return predict.confidence_us(rows, N, 126_464, 2, ("second",), COPY)

    assert microseconds(32, 10) / microseconds(32, 23) < microseconds(1024, 10) / microseconds(1024, 23) < 1
    assert predict.confidence_us([confidence(23)], 32, 126_464, 2, ("kl",), COPY) is None


def test_a_step_adds_up_its_parts_and_its_small_launches():
    rows = [attention(shapes.LLADA, 403), confidence(10)]
    own, fused = (predict.step_us(rows, shapes.LLADA, 1, 1024, COPY, small) for small in (30, predict.SMALL))
    assert own - fused == pytest.approx(25 * shapes.LLADA.layers * predict.SMALL_US)
    assert fused > floors.step(shapes.LLADA, 1, 1024).floor_us(*floors.CARDS["H200"])


def test_the_small_launches_of_a_layer_are_those_that_are_counted():
    assert {launches.layer_launches(kind, True)["small"] for kind in native.CLASSES} == {predict.SMALL}


@pytest.mark.parametrize(
    "facts",
    [
        {"kind": "unmask", "B": 1, "lanes": 32},
        {"kind": "decode", "equal": False, "B": 8, "prefix": 4096},
        {"kind": "form", "form": "fp8", "B": 1, "prefix": 4096},
    ],
)
def test_what_has_no_model_of_its_time_has_no_prediction(facts):
    assert predict.predicted_us([attention(shapes.LLADA, 403)], shapes.LLADA, facts, COPY) is None
    assert predict.predicted_us([], None, facts, COPY) is None
    assert predict.predicted_us([], shapes.DIFFUSION_GEMMA, {"kind": "decode", "equal": True}, COPY) is None
