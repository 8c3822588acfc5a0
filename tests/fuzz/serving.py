"""A server in this process without transports: what inference requests, streams, REST and RPCs are sent to."""

from __future__ import annotations

import re
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from protocol.any_requests import VALID, check_answer, write_models
from sluice_batching import ExpiryTimer
from sluice_proto import grpc_service_pb2 as pb
from sluice_server.execution.cuda_driver import LibCuda
from sluice_server.execution.loader import ModelLoader
from sluice_server.execution.served import Waiting
from sluice_server.execution.shared_memory import RegionTable
from sluice_server.observability.logs import LogControl, LogOptions
from sluice_server.observability.trace_control import TraceConfig, TraceControl
from sluice_server.protocol import health, reflection
from sluice_server.protocol.dispatch import Dispatcher
from sluice_server.protocol.log_settings import LogSettings
from sluice_server.protocol.rest import Rest
from sluice_server.protocol.rpcs import SERVICE, ServerIdentity, rpc_table, settings_table
from sluice_server.protocol.shared_memory import SharedMemory
from sluice_server.protocol.trace_settings import TraceSettings
from sluice_server.repository.layout import Repositories
from sluice_server.repository.manager import ModelManager
from sluice_server.security.control import ControlPolicy
from sluice_server.settings import ModelSettings
from sluice_server.status import Code, StatusMapper
from support.cuda import FakeCuda
from support.fakes import PATIENCE_S, RecordingCall
from support.requests import answer_arrays, infer_request
from support.shared_memory import Object, put_into_region

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Iterator
    from pathlib import Path

    from sluice_server.execution.response_cache import ResponseCache
    from sluice_server.execution.served import Served

MEMORY = "memory"
"""The folder of the shared memory objects."""

REGION = "region"
REGION_BYTES = 4096

GPU_BYTES = 256
"""Of the one memory that a client shares on a GPU."""

GPU_HANDLE = FakeCuda().export(1).handle
"""That of the first memory, wherever it is."""

REFUSALS = frozenset((Code.INVALID_ARGUMENT, Code.NOT_FOUND, Code.UNIMPLEMENTED, Code.DEADLINE_EXCEEDED))
"""What an inference request may be refused with. DEADLINE_EXCEEDED: its own `timeout`, which may be a microsecond."""

PICKY = "picky"
"""The one of them that fails by the values of valid tensors: an index that its table does not have."""

RUN_FAILED = re.compile(r"(in ensemble '\w+', )*onnx runtime error")
"""How the text of a run that failed begins."""

NO_ROOM = "shared memory size specified with the request for output"
"""How the text begins when a region has no room for an output, which is INTERNAL in Triton."""

FINAL_RESPONSE = "triton_enable_empty_final_response"


class InlinePool:
    """The pool for slow calls, without its threads: what it is given has happened when it returns."""

    def submit(self, function: Callable[..., object], *arguments: object) -> None:
        """Do it now."""
        function(*arguments)


class Serving(NamedTuple):
    """The parts that inputs go to."""

    manager: ModelManager
    dispatcher: Dispatcher
    rest: Rest
    gpu: FakeCuda

    def end_of(self, message: bytes, path: str = "", *, lend: bool = False) -> RecordingCall:
        """Send a message to an RPC, inference by default; the call, ended. With `lend` it is run on this thread."""
        call = RecordingCall(message, path) if path else RecordingCall(message)
        work = self.dispatcher([call], lend=lend)
        if work is not None:
            work()
        status, _ = call.wait()
        status.message.encode()  # so that it can be sent
        call.on_cancel = None  # as transports do: it leads back to the call, and what it uses is to be let go at once
        return call


@contextmanager
def serving(
    directory: Path, cache: ResponseCache | None = None, write: Callable[[Path], None] = write_models
) -> Iterator[Serving]:
    """The models of tests/protocol, loaded and started, with one shared memory region, its objects in a folder.

    With `cache` all of the models ask for it. `write` puts others into the repository, and `simple` among them.
    """
    repository, memory = directory / "models", directory / MEMORY
    repository.mkdir(parents=True)
    memory.mkdir()
    write(repository)
    if cache is not None:
        for config in repository.glob("*/config.pbtxt"):
            config.write_text(f"{config.read_text()}\nresponse_cache {{ enable: true }}\n")
    timer, to_status, control = ExpiryTimer(), StatusMapper(), ControlPolicy()
    settings = ModelSettings(repositories=(repository,))
    manager = ModelManager(Repositories([repository]), ModelLoader(settings, to_status, timer, {}, cache=cache))
    assert not manager.start(())
    table = RegionTable(memory)
    gpu = FakeCuda()
    gpu.export(GPU_BYTES)
    regions = SharedMemory(table, control, LibCuda(gpu))
    with Object(REGION_BYTES, memory) as shared:
        table.register(REGION, shared.key, 0, REGION_BYTES)
        traces = TraceControl(TraceConfig())
        statuses = health.Health()
        log = LogSettings(LogControl(LogOptions(), lambda _options: None), control)
        rpcs: dict[str, Any] = {
            **rpc_table(manager, ServerIdentity("triton", "0"), control, regions),
            **settings_table(TraceSettings(traces, manager, control), log),
            health.CHECK: statuses.check,
        }
        reflected = reflection.Reflection((SERVICE.full_name, health.SERVICE.full_name))
        streams = {health.WATCH: statuses.watch, reflection.INFO: reflected.answer}

        def dispatcher(**more: Any) -> Dispatcher:
            return Dispatcher(manager, rpcs, to_status, InlinePool(), regions=regions, traces=traces, **more)  # type: ignore[arg-type]

        rest = Rest(dispatcher(), manager, to_status, "0")
        try:
            yield Serving(manager, dispatcher(streams=streams), rest, gpu)
        finally:
            assert manager.stop(PATIENCE_S)
            timer.stop()


# --- good requests


def good_requests() -> list[pb.ModelInferRequest]:
    """For every model: raw and typed, with ids, parameters, outputs, classification and shared memory."""
    requests = []
    for model, arrays in VALID.items():
        requests.append(infer_request(model, arrays(), request_id="7"))
        if model != "half":
            requests.append(infer_request(model, arrays(), typed=True, parameters={"timeout": 30_000_000, "mine": "x"}))
    requests.append(infer_request("bias", {"X": np.ones(2, np.float32)}, outputs=["Y"], version="1"))
    classified = infer_request("simple", VALID["simple"](), outputs=["OUTPUT1", "OUTPUT0"])
    classified.outputs[0].parameters["classification"].int64_param = 3
    labelled = infer_request("reshaped", VALID["reshaped"](), outputs=["Y"])
    labelled.outputs[0].parameters["classification"].int64_param = 1
    shared = infer_request("any", {"X": np.ones((2, 3), np.float32)}, outputs=["Y"])
    del shared.raw_input_contents[:]
    put_into_region(shared.inputs[0], REGION, 24)
    put_into_region(shared.outputs[0], REGION, 64, offset=64)
    text = infer_request(
        "text", VALID["text"](), outputs=["Y"], parameters={"triton_enable_empty_final_response": True}
    )
    put_into_region(text.outputs[0], REGION, 64, offset=128)
    return [*requests, classified, labelled, shared, text]


def seeds() -> list[bytes]:
    """Their bytes."""
    return [request.SerializeToString() for request in good_requests()]


def check_good(serving: Serving) -> None:
    """A good request is answered with the right values."""
    ones = np.ones((1, 16), np.int32)
    message = infer_request("simple", {"INPUT0": ones * 3, "INPUT1": ones}, request_id="good").SerializeToString()
    for lend in (True, False):
        status, payload = serving.end_of(message, lend=lend).ends[0]
        assert status.code is Code.OK, status
        answer = pb.ModelInferResponse.FromString(payload)
        assert answer.id == "good"
        outputs = answer_arrays(answer)
        np.testing.assert_array_equal(outputs["OUTPUT0"], ones * 4)
        np.testing.assert_array_equal(outputs["OUTPUT1"], ones * 2)


def check_at_rest(models: Iterable[Served]) -> None:
    """Nothing waits in any model."""
    for model in models:
        assert model.waiting() == Waiting(0, 0, 0), model


def judge(
    message: bytes, code: Code, text: str, failing: Collection[str] = (PICKY,), others: Collection[Code] = ()
) -> None:
    """A refusal of an inference request is one for the client, or a model that can fail has, and that is told.

    `failing` are those models. `others` are the codes that a refusal may have next to REFUSALS.
    """
    if code is Code.INTERNAL and not text.startswith(NO_ROOM):
        assert RUN_FAILED.match(text), text
        assert pb.ModelInferRequest.FromString(message).model_name in failing, text
    else:
        assert code in REFUSALS or code in others or code is Code.INTERNAL, f"{code.name}: {text}"
    assert text


def judge_answer(message: bytes, payload: bytes) -> None:
    """An answer is whole: what was asked for, each tensor of as many bytes as its shape says."""
    request = pb.ModelInferRequest.FromString(message)
    answer = pb.ModelInferResponse.FromString(payload)
    if any("shared_memory_region" in output.parameters for output in request.outputs):
        assert answer.id == request.id
        return
    check_answer(request, answer)
