"""Sequences through a server: controls, state, slots, refusals, streams, cancel, and sequences that are idle."""

from __future__ import annotations

import functools
import queue
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import grpc
import numpy as np
import pytest
import tritonclient.grpc as triton
from onnx import helper, numpy_helper

from sluice_proto import grpc_service_pb2 as pb
from sluice_server.repository.manager import ControlMode
from support import models
from support.conversation import Conversation
from support.fakes import eventually, held
from support.requests import answer_arrays, infer_request
from support.rest import post_infer
from support.server import CALL_TIMEOUT_S

if TYPE_CHECKING:
    from collections.abc import Iterator

    from support.fakes import HeldSession
    from support.server import RunningServer

pytestmark = pytest.mark.usefixtures("no_errors_logged")

OLDEST = "oldest { max_candidate_sequences: 8 }"
STRATEGIES = ["", "direct { }", OLDEST]
FOREVER = "max_sequence_idle_microseconds: 3600000000"


@pytest.fixture
def serve(start_server, repository):
    """Start a server on a repository with an accumulator, as `models.write_accumulator` has it."""

    def start(**how: Any) -> RunningServer:
        how.setdefault("more", FOREVER)
        models.write_accumulator(repository, **how)
        server: RunningServer = start_server(repository)
        return server

    return start


def step(
    sequence: int | str, value: int, *, start: bool = False, end: bool = False, rows: int = 4, **how: Any
) -> pb.ModelInferRequest:
    array = np.array([[value]] if rows else [value], np.int64)
    parameters: dict[str, Any] = {"sequence_id": sequence}
    parameters |= {"sequence_start": True} if start else {}
    parameters |= {"sequence_end": True} if end else {}
    return infer_request("sums", {"INPUT": array}, parameters=parameters, **how)


def numbers(answer: pb.ModelInferResponse) -> tuple[int, int, Any]:
    """What an answer says: the sum, the flags, the id."""
    arrays = answer_arrays(answer)
    assert arrays["OUT"].item() == arrays["OUTPUT"].item()
    return arrays["OUTPUT"].item(), arrays["FLAGS"].item(), arrays["ID"].item()


def sum_of(answer: pb.ModelInferResponse) -> int:
    return numbers(answer)[0]


def refused(server: RunningServer, request: pb.ModelInferRequest) -> str:
    code, text = server.refusal("ModelInfer", request)
    assert code is grpc.StatusCode.INVALID_ARGUMENT, text
    return text


@contextmanager
def busy(server: RunningServer, sequence: int | str = 999) -> Iterator[HeldSession]:
    """Hold the only instance with a request of a sequence of its own."""
    model = server.model("sums")
    with held(model) as session:
        call = server.begin("ModelInfer", step(sequence, 1, start=True))
        session.wait_for_runs(1)
        yield session
        session.release()
        call.result()


@pytest.mark.parametrize("rows", [0, 4])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_model_is_told_what_each_request_is_and_gets_its_sequences_state(strategy, rows, serve):
    server = serve(strategy=strategy, rows=rows, instances=2)
    say = functools.partial(step, rows=rows)
    assert numbers(server.infer(say(7, 5, start=True))) == (5, 101, 7)
    assert numbers(server.infer(say(8, 50, start=True))) == (50, 101, 8)
    assert numbers(server.infer(say(7, 1))) == (6, 100, 7)
    assert numbers(server.infer(say(8, 1, end=True))) == (51, 110, 8)
    assert numbers(server.infer(say(7, 1, end=True))) == (7, 110, 7)
    assert numbers(server.infer(say(7, 2, start=True, end=True))) == (2, 111, 7)
    assert server.model("sums").queue.live == 0


@pytest.mark.parametrize(
    ("ids", "sequence", "told"),
    [
        ("BYTES", "a name", b"a name"),
        ("UINT64", 5, 5),
        ("UINT64", -1, 2**64 - 1),
        ("INT64", -1, -1),
        ("UINT32", 2**32 - 1, 2**32 - 1),
        ("INT32", 2**31 - 1, 2**31 - 1),
    ],
)
def test_a_model_is_told_the_id_in_the_data_type_that_it_wants(ids, sequence, told, serve):
    server = serve(ids=ids)
    assert numbers(server.infer(step(sequence, 1, start=True))) == (1, 101, told)
    assert numbers(server.infer(step(sequence, 1))) == (2, 100, told)


def test_what_cannot_be_part_of_a_sequence_is_refused(serve):
    server = serve()
    for parameters in ({}, {"sequence_id": 0}, {"sequence_id": ""}, {"sequence_start": True}):
        request = infer_request("sums", {"INPUT": np.array([[1]], np.int64)}, parameters=parameters)
        text = refused(server, request)
        assert text.startswith("inference request to model 'sums' must specify a non-zero or non-empty correlation ID")
    two = infer_request("sums", {"INPUT": np.ones((2, 1), np.int64)}, parameters={"sequence_id": 3})
    assert "must specify batch-size 1 due to requirements of sequence batcher, got 2" in refused(server, two)
    assert "unexpected inference input 'START'" in refused(
        server,
        infer_request("sums", {"START": np.ones((1, 1), np.float32)}, parameters={"sequence_id": 3}),
    )
    text = refused(server, step("text", 1, start=True))
    assert "sequence batching control 'CORRID' data-type is 'BYTES', but model 'sums' expects 'UINT64'" in text
    begin = "inference request for sequence 42 to model 'sums' must specify the START flag on the first request"
    assert refused(server, step(42, 1)).startswith(begin)
    server.infer(step(42, 1, start=True, end=True))
    assert refused(server, step(42, 1)).startswith(begin), "it has ended"
    assert server.model("sums").statistics.snapshot().fail.count == 0


@pytest.mark.parametrize(("ids", "first_wrong"), [("UINT32", 2**32), ("INT32", 2**31), ("INT32", -1)])
def test_an_id_that_the_model_cannot_be_told_is_refused(ids, first_wrong, serve):
    server = serve(ids=ids)
    assert f"expects '{ids}', which ends below" in refused(server, step(first_wrong, 1, start=True))


def test_metadata_tells_clients_of_their_own_tensors_and_the_configuration_has_the_defaults(serve):
    server = serve(strategy="oldest { max_candidate_sequences: 3 }", more="")
    metadata = server.call("ModelMetadata", pb.ModelMetadataRequest(name="sums"))
    assert [tensor.name for tensor in metadata.inputs] == ["INPUT"]
    assert [tensor.name for tensor in metadata.outputs] == ["OUTPUT", "OUT", "FLAGS", "ID"]
    config = server.call("ModelConfig", pb.ModelConfigRequest(name="sums")).config
    assert config.sequence_batching.max_sequence_idle_microseconds == 1_000_000
    assert list(config.sequence_batching.oldest.preferred_batch_size) == [4]


def test_a_start_in_the_middle_begins_the_sequence_anew(serve):
    server = serve()
    server.infer(step(7, 5, start=True))
    assert numbers(server.infer(step(7, 1, start=True))) == (1, 101, 7)
    assert sum_of(server.infer(step(7, 1))) == 2


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_sequences_interleaved_on_a_stream_are_answered_in_order_each_with_its_own_state(strategy, serve):
    server = serve(strategy=strategy, instances=2)
    conversation = Conversation(server)
    expected = []
    for turn in range(10):
        for sequence in range(1, 6):
            request = step(sequence, sequence, start=turn == 0, end=turn == 9, request_id=f"{sequence}-{turn}")
            conversation.say(request)
            expected.append((f"{sequence}-{turn}", sequence * (turn + 1)))
    heard = []
    for _ in expected:
        message = conversation.hear()
        assert not message.error_message
        heard.append((message.infer_response.id, sum_of(message.infer_response)))
    assert heard == expected
    assert conversation.end() is grpc.StatusCode.OK
    found = server.model("sums").statistics.snapshot()
    assert found.inference_count == 50
    assert server.model("sums").queue.live == 0


@pytest.mark.parametrize(("ids", "sequence"), [("UINT64", 9), ("BYTES", "nine")])
def test_triton_s_own_client_runs_sequences_alone_and_on_a_stream(ids, sequence, serve):
    server = serve(ids=ids)
    tensor = triton.InferInput("INPUT", [1, 1], "INT64")
    tensor.set_data_from_numpy(np.array([[4]], np.int64))
    answers: queue.SimpleQueue[Any] = queue.SimpleQueue()
    with triton.InferenceServerClient(server.target) as client:
        first = client.infer("sums", [tensor], sequence_id=sequence, sequence_start=True)
        client.start_stream(lambda result, error: answers.put((result, error)))
        for place in range(3):
            client.async_stream_infer("sums", [tensor], sequence_id=sequence, sequence_end=place == 2)
        heard = [answers.get(timeout=CALL_TIMEOUT_S) for _ in range(3)]
        client.stop_stream()
    assert first.as_numpy("OUTPUT").item() == 4
    assert [error for _, error in heard] == [None] * 3
    assert [result.as_numpy("OUTPUT").item() for result, _ in heard] == [8, 12, 16]


def test_sequences_over_rest(serve):
    server = serve(ids="BYTES")
    for value, flag, total in ((3, "sequence_start", 3), (4, "sequence_end", 7)):
        item = {"name": "INPUT", "shape": [1, 1], "datatype": "INT64", "data": [value]}
        told = post_infer(server, "sums", {"parameters": {"sequence_id": "r", flag: True}, "inputs": [item]}).json()
        assert told["outputs"][0]["data"] == [total]


def test_a_batch_of_direct_sequences_keeps_their_rows_and_says_which_have_no_request(serve):
    server = serve(instances=1)
    for sequence in (1, 2, 3):
        server.infer(step(sequence, 10 * sequence, start=True))
    with busy(server) as session:
        calls = [server.begin("ModelInfer", step(sequence, 1)) for sequence in (3, 1)]
        eventually(lambda: len(server.model("sums").queue) == 2, "both wait")
        session.release()
        assert [sum_of(call.result()) for call in calls] == [31, 11]
        feeds = session.runs[1]
    assert feeds["INPUT"].tolist() == [[1], [0], [1]]
    assert feeds["IN"].tolist() == [[10], [0], [30]]
    assert feeds["READY"].tolist() == [[True], [False], [True]]
    assert feeds["CORRID"].tolist() == [[1], [0], [3]]
    assert server.model("sums").statistics.snapshot().inference_count == 6, "rows without a request do not count"


def test_a_batch_of_oldest_sequences_has_no_row_without_a_request_and_one_request_of_each(serve):
    server = serve(strategy=OLDEST)
    for sequence in (1, 2, 3):
        server.infer(step(sequence, 10 * sequence, start=True))
    with busy(server) as session:
        conversation = Conversation(server)
        conversation.say(*(step(sequence, 1) for sequence in (3, 1, 3)))
        eventually(lambda: len(server.model("sums").queue) == 3, "all wait")
        session.release()
        assert [sum_of(conversation.hear().infer_response) for _ in range(3)] == [31, 11, 32]
        assert session.runs[1]["IN"].tolist() == [[30], [10]]
        assert session.runs[1]["READY"].tolist() == [[True], [True]]
    assert conversation.end() is grpc.StatusCode.OK


def test_sequences_beyond_the_slots_wait_for_one(serve):
    server = serve(rows=1)
    server.infer(step(1, 1, start=True))
    waiting = server.begin("ModelInfer", step(2, 2, start=True, end=True))
    eventually(lambda: len(server.model("sums").queue) == 1, "it waits for the slot")
    assert sum_of(server.infer(step(1, 1))) == 2, "the one that has it goes on"
    assert not waiting.done()
    server.infer(step(1, 1, end=True))
    assert sum_of(waiting.result()) == 2


def test_a_sequence_that_is_idle_for_too_long_ends_and_makes_room(serve):
    server = serve(rows=1, more="max_sequence_idle_microseconds: 50000")
    server.infer(step(1, 1, start=True))
    assert sum_of(server.infer(step(2, 2, start=True))) == 2, "it got the slot of the idle one"
    assert "must specify the START flag" in refused(server, step(1, 1))
    eventually(lambda: server.model("sums").queue.live == 0, "the state is freed without any request")


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_request_that_fails_leaves_its_own_state_and_its_neighbours_go_on(strategy, serve):
    server = serve(strategy=strategy)
    for sequence in (1, 2, 3):
        server.infer(step(sequence, 10 * sequence, start=True))
    with busy(server) as session:
        calls = [server.begin("ModelInfer", step(sequence, 1 if sequence != 2 else -1)) for sequence in (1, 2, 3)]
        eventually(lambda: len(server.model("sums").queue) == 3, "all wait")
        session.release()
        assert [sum_of(calls[place].result()) for place in (0, 2)] == [11, 31]
        assert calls[1].exception().code() is grpc.StatusCode.INTERNAL
    assert [sum_of(server.infer(step(sequence, 1))) for sequence in (1, 2, 3)] == [12, 21, 32]


def test_a_start_that_fails_is_made_good_by_the_next_request(serve):
    server = serve()
    server.infer(step(1, 5, start=True))
    for sequence in (1, 2):
        assert server.refusal("ModelInfer", step(sequence, -1, start=True))[0] is grpc.StatusCode.INTERNAL
        assert numbers(server.infer(step(sequence, 3))) == (3, 101, sequence)


def test_a_client_may_leave_in_the_middle_of_a_sequence(serve):
    server = serve()
    server.infer(step(1, 1, start=True))
    with busy(server) as session:
        left = server.begin("ModelInfer", step(1, 100))
        eventually(lambda: len(server.model("sums").queue) == 1, "it waits")
        left.cancel()
        eventually(lambda: len(server.model("sums").queue) == 0, "it has left")
        late = server.begin("ModelInfer", step(1, 100), timeout_s=0.05)
        assert late.exception().code() is grpc.StatusCode.DEADLINE_EXCEEDED
        eventually(lambda: len(server.model("sums").queue) == 0, "it has expired")
        session.release()
    assert sum_of(server.infer(step(1, 1))) == 2, "the state is as it was"


def test_what_waits_is_bounded(serve, start_server, repository):
    models.write_accumulator(repository)
    server = start_server(repository, models={"queue_rows": 2})
    with busy(server):
        calls = [server.begin("ModelInfer", step(sequence, 1, start=True)) for sequence in (1, 2)]
        eventually(lambda: len(server.model("sums").queue) == 2, "both wait")
        code, text = server.refusal("ModelInfer", step(3, 1, start=True))
        assert (code, text[:26]) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "Exceeds maximum queue size")
    assert [sum_of(call.result()) for call in calls] == [1, 1]


def test_an_unload_answers_what_waits_and_ends_the_sequences(start_server, repository):
    models.write_accumulator(repository)
    server = start_server(repository, models={"control_mode": ControlMode.EXPLICIT, "load_models": ("sums",)})
    server.infer(step(1, 1, start=True))
    with busy(server) as session:
        conversation = Conversation(server)
        conversation.say(*(step(1, 1) for _ in range(3)))
        eventually(lambda: len(server.model("sums").queue) == 3, "all wait")
        server.call("RepositoryModelUnload", pb.RepositoryModelUnloadRequest(model_name="sums"))
        session.release()
        assert [sum_of(conversation.hear().infer_response) for _ in range(3)] == [2, 3, 4]
    assert server.refusal("ModelInfer", step(1, 1))[0] is grpc.StatusCode.NOT_FOUND
    server.call("RepositoryModelLoad", pb.RepositoryModelLoadRequest(model_name="sums"))
    assert "must specify the START flag" in refused(server, step(1, 1))


def test_a_model_without_sequences_ignores_their_parameters(start_server, repository):
    models.write_model(repository, "plain", models.identity("INT64", ("N", 1)), max_batch_size=8)
    server = start_server(repository)
    array = np.arange(3).reshape(3, 1)
    answer = server.infer(infer_request("plain", {"X": array}, parameters={"sequence_id": 0, "sequence_end": True}))
    np.testing.assert_array_equal(answer_arrays(answer)["Y"], array)


def growing(model_rows: bool) -> bytes:
    """OUT = IN with X behind it, and OUTPUT = how many values that are: a state that grows."""
    dims: models.Dims = ("N", "T") if model_rows else ("T",)
    nodes = [
        helper.make_node("Concat", ["IN", "X"], ["OUT"], axis=-1),
        helper.make_node("ReduceSum", ["OUT", "axis"], ["OUTPUT"], keepdims=1),
    ]
    axis = numpy_helper.from_array(np.array([-1], np.int64), "axis")
    one: models.Dims = ("N", 1) if model_rows else (1,)
    inputs = [models.tensor("X", "FP32", one), models.tensor("IN", "FP32", dims)]
    outputs = [models.tensor("OUT", "FP32", dims), models.tensor("OUTPUT", "FP32", one)]
    return models.build(nodes, inputs, outputs, [axis])


def growing_config(rows: int, initial: str = "", strategy: str = OLDEST) -> str:
    state = f'state {{ input_name: "IN" output_name: "OUT" data_type: TYPE_FP32 dims: [ -1 ] {initial} }}'
    tensors = 'input { name: "X" data_type: TYPE_FP32 dims: [ 1 ] }'
    tensors += 'output { name: "OUTPUT" data_type: TYPE_FP32 dims: [ 1 ] }'
    return f"max_batch_size: {rows} {tensors} sequence_batching {{ {strategy} {FOREVER} {state} }}"


def grow(server: RunningServer, sequence: int, value: float, *, rows: int, **how: Any) -> float:
    return answer_arrays(server.infer(growth(sequence, value, rows=rows, **how)))["OUTPUT"].item()


def growth(sequence: int, value: float, *, rows: int, start: bool = False) -> pb.ModelInferRequest:
    array = np.array([[value]] if rows else [value], np.float32)
    return infer_request("grows", {"X": array}, parameters={"sequence_id": sequence, "sequence_start": start})


@pytest.mark.parametrize("rows", [0, 8])
def test_a_state_may_grow_and_begin_with_what_a_file_holds(rows, start_server, repository):
    initial = 'initial_state { name: "i" data_type: TYPE_FP32 dims: [ 2 ] data_file: "two" }'
    directory = models.write_configured(repository, "grows", growing(rows > 0), growing_config(rows, initial))
    (directory / "initial_state").mkdir()
    (directory / "initial_state" / "two").write_bytes(np.array([10, 20], np.float32).tobytes())
    server = start_server(repository)
    assert grow(server, 1, 1, rows=rows, start=True) == 31
    assert grow(server, 1, 2, rows=rows) == 33
    assert grow(server, 2, 5, rows=rows, start=True) == 35


def test_states_of_different_sizes_are_run_apart(start_server, repository):
    models.write_configured(repository, "grows", growing(model_rows=True), growing_config(8))
    server = start_server(repository)
    for sequence in (1, 2, 3):
        grow(server, sequence, sequence, rows=8, start=True)
    grow(server, 1, 1, rows=8)
    model = server.model("grows")
    with held(model) as session:
        first = server.begin("ModelInfer", growth(9, 1, rows=8, start=True))
        session.wait_for_runs(1)
        calls = [server.begin("ModelInfer", growth(sequence, 0, rows=8)) for sequence in (1, 2, 3)]
        eventually(lambda: len(model.queue) == 3, "all wait")
        session.release()
        assert [answer_arrays(call.result())["OUTPUT"].item() for call in calls] == [2, 2, 3]
        first.result()


@pytest.mark.parametrize(
    ("content", "problem"),
    [(None, "'initial_state/two': No such file"), (b"abc", "does not hold FP32 of shape [1,2]")],
)
def test_an_initial_state_that_cannot_be_had_fails_the_load(content, problem, start_server, repository):
    initial = 'initial_state { name: "i" data_type: TYPE_FP32 dims: [ 2 ] data_file: "two" }'
    directory = models.write_configured(repository, "grows", growing(model_rows=True), growing_config(8, initial))
    if content is not None:
        (directory / "initial_state").mkdir()
        (directory / "initial_state" / "two").write_bytes(content)
    server = start_server(repository, models={"control_mode": ControlMode.EXPLICIT})
    load = pb.RepositoryModelLoadRequest(model_name="grows")
    code, text = server.refusal("RepositoryModelLoad", load)
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert problem in text


def test_an_initial_state_without_measure_fails_the_load(start_server, repository):
    initial = 'initial_state { name: "i" data_type: TYPE_FP32 dims: [ 9000000000000000000 ] zero_data: true }'
    models.write_configured(repository, "grows", growing(model_rows=True), growing_config(8, initial))
    server = start_server(repository, models={"control_mode": ControlMode.EXPLICIT})
    _, text = server.refusal("RepositoryModelLoad", pb.RepositoryModelLoadRequest(model_name="grows"))
    assert "begins with shape [1,9000000000000000000], which takes more than 1073741824 bytes" in text


@pytest.mark.parametrize("ids", ["UINT64", "BYTES"])
def test_a_warm_up_is_a_sequence_of_its_own(ids, start_server, repository):
    directory = models.write_accumulator(repository, ids=ids)
    sample = 'inputs { key: "INPUT" value { data_type: TYPE_INT64 dims: [ 1 ] zero_data: true } }'
    with (directory / "config.pbtxt").open("a") as config:
        config.write(f'model_warmup {{ name: "w" batch_size: 1 count: 3 {sample} }}')
    server = start_server(repository)
    assert server.model("sums").statistics.snapshot().execution_count == 3
    assert server.model("sums").queue.live == 0
