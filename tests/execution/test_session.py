"""Sessions on real, tiny models: every datatype, both ways to run, and everything that ONNX Runtime refuses."""

import threading
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx_models
import pytest
from onnx import TensorProto, helper

from sluice_proto.model_config_pb2 import ModelConfig
from sluice_server.errors import BackendError, InvalidArgument, Unimplemented
from sluice_server.execution import runtime
from sluice_server.execution.options import OptionPlan, plan_options
from sluice_server.execution.providers import CPU, CUDA, MissingProvider, ProviderChoice, count_gpus
from sluice_server.execution.session import NotText, Session, backend_error, not_started
from sluice_server.execution.threads import ThreadPlan
from sluice_server.graph import GraphSignature, TensorSpec

OPTIONS = plan_options(ModelConfig(name="m"), ThreadPlan(1, 1, 1))
ON_CPU = (ProviderChoice(CPU),)

TYPES = {
    "BOOL": (TensorProto.BOOL, np.dtype(bool)),
    "INT8": (TensorProto.INT8, np.dtype(np.int8)),
    "INT16": (TensorProto.INT16, np.dtype(np.int16)),
    "INT32": (TensorProto.INT32, np.dtype(np.int32)),
    "INT64": (TensorProto.INT64, np.dtype(np.int64)),
    "UINT8": (TensorProto.UINT8, np.dtype(np.uint8)),
    "UINT16": (TensorProto.UINT16, np.dtype(np.uint16)),
    "UINT32": (TensorProto.UINT32, np.dtype(np.uint32)),
    "UINT64": (TensorProto.UINT64, np.dtype(np.uint64)),
    "FP16": (TensorProto.FLOAT16, np.dtype(np.float16)),
    "BF16": (TensorProto.BFLOAT16, np.dtype(ml_dtypes.bfloat16)),
    "FP32": (TensorProto.FLOAT, np.dtype(np.float32)),
    "FP64": (TensorProto.DOUBLE, np.dtype(np.float64)),
}


def load(model: bytes | str | Path, options: OptionPlan = OPTIONS) -> Session:
    return Session(model, options, ON_CPU)


def texts(*elements: bytes) -> np.ndarray:
    array = np.empty(len(elements), dtype=object)
    array[:] = elements
    return array


@pytest.mark.parametrize("datatype", TYPES)
def test_each_datatype_comes_back_as_it_went_in(datatype: str) -> None:
    onnx_type, dtype = TYPES[datatype]
    session = load(onnx_models.identity(onnx_type))
    assert session.signature.inputs == (TensorSpec("X", datatype, (-1, 2)),)
    for array in (np.array([[0, 1], [1, 0], [1, 1]]).astype(dtype), np.empty((0, 2), dtype)):
        (result,) = session.run(["Y"], {"X": array})
        assert result.dtype == dtype
        np.testing.assert_array_equal(result, array)


@pytest.mark.parametrize("datatype", TYPES)
def test_each_datatype_passes_with_bound_inputs_and_outputs(datatype: str) -> None:
    # This is the way on a GPU; binding to the CPU takes the same steps.
    onnx_type, dtype = TYPES[datatype]
    session = load(onnx_models.identity(onnx_type))
    for array in (np.array([[0, 1], [1, 0]]).astype(dtype), np.array([[0, 1], [1, 0]]).astype(dtype).T):
        (result,) = session._run_bound(["Y"], {"X": array})
        assert result.dtype == dtype
        np.testing.assert_array_equal(result, array)


@pytest.mark.parametrize("datatype", ["FP32", "BF16"])
def test_a_scalar_stays_a_scalar(datatype: str) -> None:
    onnx_type, dtype = TYPES[datatype]
    session = load(onnx_models.identity(onnx_type, dims=[]))
    assert session.signature.inputs[0].shape == ()
    for run in (session.run, session._run_bound):
        (result,) = run(["Y"], {"X": np.array(1, dtype)})
        assert (result.shape, result.dtype, result[()]) == ((), dtype, 1)


def test_views_that_are_read_only_misaligned_or_strided_are_taken_as_they_are() -> None:
    session = load(onnx_models.identity())
    expected = np.arange(6, dtype=np.float32).reshape(3, 2)
    message = b"\0" + expected.tobytes()
    misaligned = np.frombuffer(message, np.uint8)[1:].view(np.float32).reshape(3, 2)
    strided = np.ascontiguousarray(expected.T).T
    for array in (misaligned, strided):
        for run in (session.run, session._run_bound):
            np.testing.assert_array_equal(run(["Y"], {"X": array})[0], expected)


def test_the_outputs_do_not_share_memory_with_the_inputs() -> None:
    session = load(onnx_models.identity())
    array = np.ones((1, 2), np.float32)
    (result,) = session.run(["Y"], {"X": array})
    assert not np.shares_memory(result, array)


def test_text_of_any_language_passes_with_nul_characters_and_empty_elements() -> None:
    session = load(onnx_models.identity(TensorProto.STRING, dims=["N"]))
    array = texts(b"plain", b"", b"nul\0inside", b"nul at the end\0", "Ünï\U0001f600".encode())
    (result,) = session.run(["Y"], {"X": array})
    assert result.dtype == object
    assert result.tolist() == array.tolist()
    assert all(type(element) is bytes for element in result)


def test_text_keeps_its_shape() -> None:
    session = load(onnx_models.identity(TensorProto.STRING))
    array = texts(b"a", b"b", b"c", b"d", b"e", b"f").reshape(3, 2)
    for given in (array, array[:0], array[::2]):
        (result,) = session.run(["Y"], {"X": given})
        assert result.shape == given.shape
        assert result.tolist() == given.tolist()


@pytest.mark.parametrize("bad", [b"\xff\xfe", b"\xc3", b"\xed\xa0\x80"])
def test_bytes_that_are_not_utf_8_are_refused_with_input_and_element(bad: bytes) -> None:
    session = load(onnx_models.identity(TensorProto.STRING))
    with pytest.raises(NotText, match="element 3 of input 'X' is not UTF-8") as caught:
        session.run(["Y"], {"X": texts(b"a", b"b", b"c", bad).reshape(2, 2)})
    assert (caught.value.input_name, caught.value.element) == ("X", 3)
    assert isinstance(caught.value, InvalidArgument)


def test_numbers_and_text_come_out_of_one_model() -> None:
    session = load(onnx_models.constant_text(b"label"))
    number, text = session.run(["Y", "S"], {"X": np.ones((1, 2), np.float32)})
    assert number.tolist() == [[1, 1]]
    assert text.tolist() == [b"label"]


def test_a_model_that_makes_text_of_bad_bytes_fails_its_run_and_no_more() -> None:
    session = load(onnx_models.constant_text(b"\xff\xfe"))
    feeds = {"X": np.ones((1, 2), np.float32)}
    with pytest.raises(BackendError, match="a BYTES output is not UTF-8"):
        session.run(["Y", "S"], feeds)
    assert session.run(["Y"], feeds)[0].tolist() == [[1, 1]]


def test_an_input_with_a_default_may_be_left_out() -> None:
    session = load(onnx_models.add_bias())
    assert session.signature == GraphSignature(
        inputs=(TensorSpec("X", "FP32", (-1, 2)), TensorSpec("B", "FP32", (2,), optional=True)),
        outputs=(TensorSpec("Y", "FP32", (-1, 2)),),
    )
    feeds = {"X": np.zeros((1, 2), np.float32)}
    assert session.run(["Y"], feeds)[0].tolist() == [[1, 2]]
    assert session.run(["Y"], feeds | {"B": np.array([5, 6], np.float32)})[0].tolist() == [[5, 6]]


def test_an_open_dimension_is_minus_one_whether_named_or_not() -> None:
    signature = load(onnx_models.identity(dims=["N", None, 3])).signature
    assert signature.inputs[0].shape == (-1, -1, 3)
    assert signature.batchable


def test_what_a_session_runs_on_is_read_back_from_it() -> None:
    session = load(onnx_models.identity())
    assert session.providers == (CPU,)
    assert session.fallbacks == ()


def test_a_provider_that_is_not_in_the_build_is_an_error_or_a_fallback() -> None:
    asked = (ProviderChoice("NoSuchExecutionProvider"), ProviderChoice(CPU))
    with pytest.raises(MissingProvider) as caught:
        Session(onnx_models.identity(), OPTIONS, asked)
    assert caught.value.provider == "NoSuchExecutionProvider"
    session = Session(onnx_models.identity(), OPTIONS, asked, allow_fallback=True)
    assert session.providers == (CPU,)
    assert session.fallbacks == ("NoSuchExecutionProvider is not in this build of ONNX Runtime",)


@pytest.mark.skipif("AzureExecutionProvider" not in runtime.available_providers(), reason="a CPU build has Azure's")
def test_a_broken_model_stays_an_error_where_fallback_is_allowed() -> None:
    asked = (ProviderChoice("AzureExecutionProvider"), ProviderChoice(CPU))
    assert Session(onnx_models.identity(), OPTIONS, asked).providers == ("AzureExecutionProvider", CPU)
    with pytest.raises(BackendError, match="protobuf parsing failed"):
        Session(b"this is not an ONNX file" * 10, OPTIONS, asked, allow_fallback=True)


def test_a_provider_that_a_session_has_not_is_found_by_comparing() -> None:
    asked = (ProviderChoice(CUDA), ProviderChoice(CPU))
    assert not_started(asked, [CPU]) == (CUDA,)
    assert not_started(asked, [CUDA, CPU]) == ()


def test_a_file_loads_with_its_weights_beside_it(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    onnx_models.save_with_external_data(path)
    assert (tmp_path / "weights.bin").exists()
    session = load(path)
    assert session.run(["Y"], {"X": np.zeros((1, 2), np.float32)})[0].tolist() == [[1, 2]]


def test_missing_external_weights_are_an_error(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    onnx_models.save_with_external_data(path)
    (tmp_path / "weights.bin").unlink()
    with pytest.raises(BackendError, match=r"weights\.bin"):
        load(path)


@pytest.mark.parametrize(
    ("model", "code", "text"),
    [
        (onnx_models.identity()[:-5], 7, "protobuf parsing failed"),
        (b"this is not an ONNX file" * 10, 7, "protobuf parsing failed"),
        (b"", 2, "No graph was found"),
        (onnx_models.identity(opset=999), 1, "Opset 999"),
        (onnx_models.identity(ir_version=999), 1, "Unsupported model IR version: 999"),
    ],
    ids=["truncated", "not ONNX", "empty", "unknown opset", "unknown IR version"],
)
def test_a_broken_model_is_a_backend_error_with_onnx_runtime_s_text(
    model: bytes, code: int, text: str, tmp_path: Path
) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(model)
    with pytest.raises(BackendError, match=text) as caught:
        load(model)
    assert caught.value.code == code
    assert "ONNXRuntimeError" not in str(caught.value)
    with pytest.raises(BackendError):
        load(path)


def test_a_file_that_is_not_there_is_a_backend_error(tmp_path: Path) -> None:
    with pytest.raises(BackendError) as caught:
        load(tmp_path / "none.onnx")
    assert caught.value.code == 3
    with pytest.raises(BackendError):
        load(tmp_path)


def test_an_operator_that_does_not_exist_is_a_backend_error() -> None:
    nodes = [helper.make_node("Nonsense", ["X"], ["Y"])]
    model = onnx_models.model([onnx_models.tensor("X")], [onnx_models.tensor("Y")], nodes)
    with pytest.raises(BackendError, match="Nonsense") as caught:
        load(model)
    assert caught.value.code == 10


@pytest.mark.parametrize(
    ("model", "kind"),
    [
        (onnx_models.sequence_output(), r"output 'Y' has type seq\(tensor\(float\)\)"),
        (onnx_models.optional_output(), r"output 'Y' has type optional\(tensor\(float\)\)"),
        (onnx_models.identity(TensorProto.FLOAT8E4M3FN, opset=21, ir_version=10), r"input 'X' has type .*float8e4m3fn"),
        (onnx_models.bfloat16_and_text(), "mixes BF16 tensors with BYTES inputs"),
    ],
)
def test_types_that_cannot_be_served_are_refused_by_name(model: bytes, kind: str) -> None:
    with pytest.raises(Unimplemented, match=kind):
        load(model)


def test_a_failing_run_is_a_backend_error_and_the_session_goes_on(capfd: pytest.CaptureFixture[str]) -> None:
    session = load(onnx_models.gather())
    data = np.arange(4, dtype=np.float32).reshape(2, 2)
    for run in (session.run, session._run_bound):
        with pytest.raises(Exception, match="idx=9 must be within"):
            run(["Y"], {"X": data, "J": np.array([9])})
    with pytest.raises(BackendError) as caught:
        session.run(["Y"], {"X": data, "J": np.array([9])})
    assert caught.value.code == 2
    assert str(caught.value).startswith("onnx runtime error 2: Non-zero status code returned while running Gather")
    assert session.run(["Y"], {"X": data, "J": np.array([1])})[0].tolist() == [[2, 3]]
    assert capfd.readouterr() == ("", "")


def test_wrong_feeds_are_errors_and_never_a_crash() -> None:
    session = load(onnx_models.gather())
    data, index = np.zeros((2, 2), np.float32), np.array([0])
    with pytest.raises(InvalidArgument, match=r"missing required input\(s\) \['J'\]"):
        session.run(["Y"], {"X": data})
    for feeds in (
        {"X": data, "Z": index},
        {"X": data, "J": index, "Z": index},
        {"X": data[0], "J": index},
        {"X": data.astype(np.float64), "J": index},
        {"X": data.astype(np.complex64), "J": index},
        {"X": np.zeros((2, 3), np.float32), "J": index},
    ):
        with pytest.raises(BackendError):
            session.run(["Y"], feeds)
    with pytest.raises(BackendError, match="Q"):
        session.run(["Q"], {"X": data, "J": index})


def test_a_model_that_gives_another_shape_than_it_declares_does_not_write_to_stderr(
    capfd: pytest.CaptureFixture[str],
) -> None:
    session = load(onnx_models.identity(dims=["N"], output_dims=[1]))
    session.run(["Y"], {"X": np.zeros(3, np.float32)})
    assert capfd.readouterr() == ("", "")


def test_a_shape_that_asks_for_terabytes_is_an_error() -> None:
    nodes = [helper.make_node("ConstantOfShape", ["X"], ["Y"])]
    tensors = [onnx_models.tensor("X", TensorProto.INT64, ["N"])], [onnx_models.tensor("Y", dims=["A", "B"])]
    session = load(onnx_models.model(*tensors, nodes))
    for size in (2**45, 2**62):
        with pytest.raises(BackendError):
            session.run(["Y"], {"X": np.array([size, 8])})


def test_options_that_onnx_runtime_refuses_are_a_backend_error() -> None:
    config = ModelConfig(name="m")
    config.parameters["use_per_session_threads"].string_value = "0"
    with pytest.raises(BackendError, match="thread"):
        load(onnx_models.identity(), plan_options(config, ThreadPlan(1, 1, 1)))


def test_a_session_gives_each_thread_its_own_answer() -> None:
    session = load(onnx_models.identity())
    wrong: list[int] = []

    def call(number: int) -> None:
        array = np.full((1, 2), number, np.float32)
        wrong.extend(number for _ in range(200) if session.run(["Y"], {"X": array})[0][0, 0] != number)

    threads = [threading.Thread(target=call, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_an_exception_without_a_status_has_the_code_of_a_runtime_exception() -> None:
    error = backend_error(RuntimeError("something in C++"))
    assert (error.code, error.text) == (6, "something in C++")
    assert backend_error(MemoryError()).text == "MemoryError"


def test_the_runtime_knows_its_version_and_the_cpu() -> None:
    runtime.configure_runtime()
    assert runtime.runtime_version().count(".") == 2
    assert CPU in runtime.available_providers()


@pytest.mark.skipif(CUDA not in runtime.available_providers() or not count_gpus(None), reason="no GPU here")
@pytest.mark.parametrize("datatype", TYPES)
def test_each_datatype_comes_back_from_a_gpu(datatype: str) -> None:
    onnx_type, dtype = TYPES[datatype]
    asked = (ProviderChoice(CUDA, {"device_id": "0"}), ProviderChoice(CPU))
    session = Session(onnx_models.identity(onnx_type), OPTIONS, asked)
    assert session.providers[0] == CUDA
    array = np.array([[0, 1], [1, 0]]).astype(dtype)
    np.testing.assert_array_equal(session.run(["Y"], {"X": array})[0], array)
