"""Traces written by hand, whose shares can be counted by hand."""

import pytest

from moetrain.observe.timeline import IDLE, OTHER, format_shares, shares

pytestmark = pytest.mark.unit


def event(cat, name, start, end, tid=1, **args):
    return {"ph": "X", "cat": cat, "name": name, "ts": start, "dur": end - start, "tid": tid, "args": args}


WINDOW = event("user_annotation", "moetrain::steps", 0, 100)


def launch(name, at, tid, correlation):
    return event("cuda_runtime", name, at, at + 1, tid, correlation=correlation)


def test_host_instants_belong_to_the_innermost_part():
    trace = [
        WINDOW,
        event("user_annotation", "moetrain::dispatch", 10, 60),
        event("cpu_op", "aten::index", 12, 15),
        event("user_annotation", "moetrain::experts", 20, 50),
        event("cpu_op", "aten::mm", 25, 45),
        event("user_annotation", "Optimizer.step#AdamW.step", 70, 90),
        event("cpu_op", "aten::mm", 5, 95, tid=2),  # another thread's time is not this one's
    ]
    measured = shares(trace)
    assert measured.parts == {"dispatch": 20, "experts": 30, "optimizer": 20, OTHER: 30}
    assert sum(measured.parts.values()) == measured.total == 100


def test_backward_work_belongs_to_its_forward_operator():
    backward = "autograd::engine::evaluate_function: MmBackward0"
    trace = [
        WINDOW,
        event("user_annotation", "moetrain::router", 0, 10),
        event("cpu_op", "aten::linear", 1, 9, **{"Sequence number": 7}),
        event("cpu_op", "aten::add", 12, 14, **{"Sequence number": 8}),
        event("cpu_op", backward, 40, 60, **{"Sequence number": 7}),
        event("cpu_op", "aten::mm", 42, 58),
        event("cpu_op", backward, 60, 70, **{"Sequence number": 8}),
    ]
    assert shares(trace).parts == {"router": 30, OTHER: 70}


def test_communication_is_charged_only_where_nothing_computes():
    trace = [
        WINDOW,
        event("user_annotation", "moetrain::dispatch", 0, 8),
        launch("cudaLaunchKernel", 1, 1, 1),
        event("user_annotation", "moetrain::experts", 2, 6),
        launch("cuLaunchKernelEx", 3, 1, 2),
        event("kernel", "ncclDevKernel_SendRecv", 10, 50, correlation=1),
        event("kernel", "grouped_gemm", 30, 80, correlation=2),
        event("gpu_memset", "Memset", 85, 90, correlation=99),  # launched by nobody we know
    ]
    measured = shares(trace)
    assert measured.parts == {"dispatch": 20, "experts": 50, OTHER: 5, IDLE: 25}
    assert measured.hidden == {"dispatch": 20}
    table = format_shares(measured, steps=2)
    assert "dispatch (exposed)" in table
    assert "0.010 ms of communication" in table


def test_a_copy_between_ranks_is_communication_and_another_copy_is_not():
    trace = [
        WINDOW,
        event("user_annotation", "moetrain::dispatch", 0, 4),
        launch("cudaMemcpyAsync", 1, 1, 1),
        event("user_annotation", "moetrain::attention", 5, 9),
        launch("cudaMemcpyAsync", 6, 1, 2),
        event("gpu_memcpy", "Memcpy PtoP", 10, 40, correlation=1),
        event("gpu_memcpy", "Memcpy DtoD", 20, 30, correlation=2),
    ]
    measured = shares(trace)
    assert measured.parts == {"dispatch": 20, "attention": 10, IDLE: 70}
    assert measured.hidden == {"dispatch": 10}


def test_work_outside_the_window_does_not_count():
    trace = [
        event("user_annotation", "moetrain::steps", 50, 100),
        launch("cudaLaunchKernel", 1, 1, 1),
        event("kernel", "gemm", 0, 60, correlation=1),
    ]
    assert shares(trace).parts == {OTHER: 10, IDLE: 40}


def test_a_trace_without_the_window_is_refused():
    with pytest.raises(ValueError, match="moetrain::steps"):
        shares([event("cpu_op", "aten::mm", 0, 1)])
