"""Where a step went, by traces whose sums are known."""

import gzip
import io
import json
import os
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dist_lm.errors import ArtefactError
from dist_lm.storage.run_directory import RunDirectory
from dist_lm.tracking.console import Console
from dist_lm.training.profile_summary import length, profile_of, summarize, top_operators, union
from dist_lm.training.step_profiler import LAP, START, STEP

MAIN, GLOO = 1, 2  # threads


def span(name, begin, end, cat="cpu_op", tid=MAIN, external_id=0):
    arguments = {"External id": external_id}
    return {"ph": "X", "name": name, "cat": cat, "tid": tid, "ts": begin, "dur": end - begin, "args": arguments}


def step(number, begin, end):
    return span(f"{STEP}{number}", begin, end, "user_annotation")


def kernel(name, begin, end, external_id=0):
    return span(name, begin, end, "kernel", 7, external_id)


def call(name, begin, end):
    return span(name, begin, end, "cuda_runtime")


# one step of 1 s: computing 100 to 400 ms and 600 to 800 ms, messages 300 to 700 ms
GPU_STEP = [
    {"ph": "M", "name": "process_name"},
    step(10, 0, 1e6),
    span("aten::mm", 50, 60, external_id=3),
    span("autograd::engine::evaluate_function: MmBackward0", 50, 70, external_id=4),
    kernel("nvjet_hsh_128x256", 100e3, 250e3, external_id=3),
    kernel("triton_poi_fused_add", 240e3, 400e3, external_id=4),
    kernel("ncclDevKernel_AllGather_RING_LL(ncclDevKernelArgsStorage<4096ul>)", 300e3, 500e3),
    kernel("ncclDevKernel_ReduceScatter_Sum_f32_RING_LL(x)", 450e3, 700e3),
    span("Memcpy HtoD (Pageable -> Device)", 600e3, 800e3, "gpu_memcpy", 7),
    call("cudaLaunchKernel", 10, 20),
    call("cudaStreamSynchronize", 400e3, 700e3),
    call("cudaMemcpyAsync", 700e3, 710e3),
    call("cudaEventSynchronize", 900e3, 950e3),
]


def test_the_parts_of_a_gpu_step_add_up():
    found = profile_of(GPU_STEP)
    assert found.on_gpu
    assert (found.steps, found.step) == ((10,), 1.0)
    assert found.compute == pytest.approx(0.3 + 0.2)
    assert found.hidden == pytest.approx(0.1 + 0.1)
    assert found.exposed == pytest.approx(0.2)
    assert found.idle == pytest.approx(0.1 + 0.2)
    assert found.compute + found.exposed + found.idle == pytest.approx(found.step)
    assert (found.waits, found.pageable) == (2, 1)
    assert found.waited == pytest.approx(0.35)


def test_a_kernel_counts_for_the_operator_that_launched_it():
    operators = profile_of(GPU_STEP).operators
    assert operators["aten::mm"] == (1, pytest.approx(0.15))
    assert operators["triton_poi_fused_add"] == (1, pytest.approx(0.16))  # its launcher only wraps others
    assert operators["ncclDevKernel_ReduceScatter_Sum_f32_RING_LL"] == (1, pytest.approx(0.25))


# two steps of 0.5 s in two threads; the operators in gloo's thread are part of its message
CPU_STEPS = [
    step(3, 0, 500e3),
    step(4, 500e3, 1e6),
    span("c10d::allreduce_", 90e3, 95e3),
    span("aten::linear", 100e3, 300e3),
    span("aten::addmm", 150e3, 300e3),
    span("CopyBackward", 300e3, 450e3),
    span("gloo:all_reduce", 200e3, 400e3, "user_annotation", GLOO),
    span("aten::copy_", 350e3, 400e3, tid=GLOO),
    span("gloo:recv", 210e3, 390e3, "user_annotation"),  # begun by the main thread
    span("aten::linear", 600e3, 700e3),
    span("aten::linear", 1.1e6, 1.2e6),  # after the last step
    span(START, 20e3, 20e3, "user_annotation"),
    span(LAP + "forward", 299e3, 300e3, "user_annotation"),
    span(LAP + "forward", 700e3, 700e3, "user_annotation"),
]


def test_the_parts_of_a_cpu_step_add_up():
    found = profile_of(CPU_STEPS)
    assert not found.on_gpu
    assert (found.steps, found.step, found.waits) == ((3, 4), 0.5, 0)
    assert found.compute == pytest.approx(0.3 / 2)
    assert found.hidden == pytest.approx(0.1 / 2)
    assert found.exposed == pytest.approx(0.1 / 2)
    assert found.idle == pytest.approx(0.6 / 2)


def test_an_operator_has_its_own_time_without_what_it_calls():
    operators = profile_of(CPU_STEPS).operators
    assert operators["aten::linear"] == (1, pytest.approx((0.05 + 0.1) / 2))
    assert operators["aten::addmm"] == (0.5, pytest.approx(0.15 / 2))
    assert operators["gloo:all_reduce"] == (0.5, pytest.approx(0.2 / 2))
    assert "aten::copy_" not in operators
    assert operators["gloo:recv"] == (0.5, pytest.approx(0.18 / 2))


def test_the_host_has_its_time_by_laps():
    parts = profile_of(CPU_STEPS).parts
    assert parts == {
        "data": pytest.approx(0.01),
        "forward": pytest.approx((0.28 + 0.2) / 2),
        "rest": pytest.approx((0.2 + 0.3) / 2),
    }


def test_a_gpu_that_lags_behind_the_host_lengthens_the_step():
    found = profile_of([step(1, 0, 100), kernel("k", 50, 400)])
    assert found.step == pytest.approx(400e-6)
    assert found.compute == pytest.approx(350e-6)


@given(st.lists(st.tuples(st.integers(0, 40), st.integers(0, 9)), max_size=12))
def test_a_union_has_every_point_once(found):
    merged = union((begin, begin + size) for begin, size in found)
    points = {point for begin, size in found for point in range(begin, begin + size)}
    assert length(merged) == len(points)
    assert {point for begin, end in merged for point in range(int(begin), int(end))} == points
    assert all(one[1] < other[0] for one, other in pairwise(merged))


def made_run(path) -> RunDirectory:
    run = RunDirectory(path)
    run.config.touch()
    return run


def write(run: RunDirectory, rank: int, events) -> None:
    run.profile.mkdir(parents=True, exist_ok=True)
    with gzip.open(run.trace(rank), "wt") as file:
        json.dump({"traceEvents": events}, file)


def test_the_ranks_of_a_run_are_printed_with_their_mean(tmp_path):
    run = made_run(tmp_path)
    write(run, 0, GPU_STEP)
    write(run, 11, [step(10, 0, 1e6), kernel("nvjet", 0, 900e3)])
    out = io.StringIO()
    summarize(run, Console(out))
    lines = [line.split() for line in out.getvalue().splitlines()]
    assert ["0", "1000.0", "500.0", "200.0", "300.0", "200.0", "350.0"] in lines
    assert ["11", "1000.0", "900.0", "0.0", "100.0", "0.0", "0.0"] in lines
    assert ["mean", "1000.0", "700.0", "100.0", "200.0", "100.0", "175.0"] in lines
    assert ["nvjet", "0.5", "450.0", "45%"] in lines
    assert "waits 1.0 times for the GPU and copies 0.5 tensors" in out.getvalue()


def test_operators_are_in_the_order_of_their_time():
    names = [name for name, _, _ in top_operators([profile_of(GPU_STEP), profile_of(CPU_STEPS)])]
    assert names[0] == "ncclDevKernel_ReduceScatter_Sum_f32_RING_LL"


def test_what_is_no_trace_is_refused_with_its_path(tmp_path):
    with pytest.raises(ArtefactError, match="none: not a run: expected a folder such as work/runs/STAGE/RUN_ID"):
        summarize(RunDirectory(tmp_path / "none"), Console(io.StringIO()))
    run = made_run(tmp_path)
    with pytest.raises(ArtefactError, match=r"profile: no traces; .*profile\.steps=\[FIRST,LAST\]"):
        summarize(run, Console(io.StringIO()))
    write(run, 0, [kernel("k", 0, 1)])
    with pytest.raises(ArtefactError, match=r"trace_00000.*no annotation"):
        summarize(run, Console(io.StringIO()))
    run.trace(0).write_bytes(run.trace(0).read_bytes()[:-9])
    with pytest.raises(ArtefactError, match="trace_00000"):
        summarize(run, Console(io.StringIO()))
    with gzip.open(run.trace(0), "wt") as file:
        json.dump([1, 2], file)
    with pytest.raises(ArtefactError, match=r"trace_00000.*not a trace"):
        summarize(run, Console(io.StringIO()))


def test_the_steps_are_named_and_an_older_trace_is_marked(tmp_path):
    run = made_run(tmp_path)
    write(run, 0, CPU_STEPS)
    os.utime(run.config, (1, 1))
    out = io.StringIO()
    summarize(run, Console(out))
    assert "mean of steps 3 to 4" in out.getvalue()
    assert "older than the newest attempt" not in out.getvalue()
    write(run, 0, GPU_STEP)
    os.utime(run.trace(0), (1, 1))
    os.utime(run.config, (2, 2))
    summarize(run, Console(out))
    assert "step 10" in out.getvalue()
    assert "older than the newest attempt" in out.getvalue()
