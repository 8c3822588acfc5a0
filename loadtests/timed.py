"""Models that take a time that is asked for, whatever the machine: a fixed time for each run and more for each row.

They are a loop of ONNX that does nothing so many times, on one thread; how many times is found out on this machine.
"""

import statistics
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

from loadtests.models import IR_VERSION, OPSET, THREADS
from loadtests.ort_loop import session_options
from sluice_proto.grpc_service_pb2 import ModelInferRequest

TRIAL_ITERATIONS = 5_000
"""Some 5 ms: long next to what a call costs."""

TRIALS = 60


@dataclass(frozen=True, slots=True)
class Times:
    """How long a run takes: `fixed_ms`, and `row_ms` for each row of it."""

    fixed_ms: float
    row_ms: float = 0.0

    def run_ms(self, rows: int) -> float:
        """A run of so many rows."""
        return self.fixed_ms + self.row_ms * rows

    def rows_per_s(self, rows: int) -> float:
        """Runs of so many rows, one after the other."""
        return rows / self.run_ms(rows) * 1000


def write(directory: Path, times: Times, iterations_per_ms: float, config: str) -> None:
    """Write the model, X -> Y FP32 [rows,1] unchanged, with one instance and what `config` says, into its folder."""
    (directory / "1").mkdir(parents=True)
    model = build(round(times.fixed_ms * iterations_per_ms), round(times.row_ms * iterations_per_ms))
    (directory / "1" / "model.onnx").write_bytes(model)
    group = "instance_group { count: 1 kind: KIND_CPU }"
    threads = f'parameters {{ key: "intra_op_thread_count" value {{ string_value: "{THREADS}" }} }}'
    (directory / "config.pbtxt").write_text(f'backend: "onnxruntime"\n{group}\n{threads}\n{config}\n')


def request(model: str, value: float = 0.0) -> bytes:
    """A request of one row."""
    message = ModelInferRequest(model_name=model, raw_input_contents=[np.float32(value).tobytes()])
    message.inputs.add(name="X", datatype="FP32", shape=[1, 1])
    return message.SerializeToString()


def calibrate() -> float:
    """How many iterations this machine does in a millisecond, by the median of some trials."""
    session = onnxruntime.InferenceSession(
        build(TRIAL_ITERATIONS, 0), session_options(THREADS), providers=["CPUExecutionProvider"]
    )
    feeds, times_ms = {"X": np.zeros((1, 1), np.float32)}, []
    for _ in range(TRIALS):
        began_s = time.perf_counter()
        session.run(None, feeds)
        times_ms.append((time.perf_counter() - began_s) * 1e3)
    return TRIAL_ITERATIONS / statistics.median(times_ms)


def build(fixed_iterations: int, row_iterations: int) -> bytes:
    """The bytes of the model file."""
    body = helper.make_graph(
        [
            helper.make_node("Identity", ["going_on_in"], ["going_on"]),
            helper.make_node("Identity", ["value_in"], ["value"]),
        ],
        "body",
        [
            helper.make_tensor_value_info("iteration", TensorProto.INT64, ()),
            helper.make_tensor_value_info("going_on_in", TensorProto.BOOL, ()),
            helper.make_tensor_value_info("value_in", TensorProto.FLOAT, ("rows", 1)),
        ],
        [
            helper.make_tensor_value_info("going_on", TensorProto.BOOL, ()),
            helper.make_tensor_value_info("value", TensorProto.FLOAT, ("rows", 1)),
        ],
    )
    nodes = [
        helper.make_node("Shape", ["X"], ["shape"]),
        helper.make_node("Gather", ["shape", "first"], ["rows"]),
        helper.make_node("Mul", ["rows", "each"], ["of_rows"]),
        helper.make_node("Add", ["of_rows", "fixed"], ["limit"]),
        helper.make_node("Loop", ["limit", "always", "X"], ["Y"], body=body),
    ]
    numbers = {"first": 0, "each": row_iterations, "fixed": fixed_iterations}
    constants = [numpy_helper.from_array(np.array(value, np.int64), name) for name, value in numbers.items()]
    constants.append(numpy_helper.from_array(np.array(True), "always"))
    tensors = [[helper.make_tensor_value_info(name, TensorProto.FLOAT, ("rows", 1))] for name in ("X", "Y")]
    graph = helper.make_graph(nodes, "timed", *tensors, constants)
    model: onnx.ModelProto = helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION
    )
    return bytes(model.SerializeToString())
