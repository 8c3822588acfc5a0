"""A server of the Open Inference Protocol that runs elsewhere, as a column: `--peer triton=HOST:PORT`.

It is loaded as ours is, over gRPC, by the same generator in the same turns, for every model that it serves under the
name that the benchmark gives it (`--write-models` writes them for it to serve). Its answers are held to the same ones.
What it uses of its machine is not known here.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import grpc

from loadtests.h2load import Load, LoadError
from loadtests.models import BenchModel
from loadtests.peers import NATIVE, SERVICE, Counters, Generator, ServerMeasurement
from loadtests.plan import Case
from loadtests.processes import ServerProcess
from loadtests.results import Key, Target, p50, p99, rate
from sluice_proto.grpc_service_pb2 import (
    ModelReadyRequest,
    ModelReadyResponse,
    ModelStatisticsRequest,
    ModelStatisticsResponse,
    ServerLiveRequest,
    ServerLiveResponse,
)

ANSWER_S = 10.0
"""Long enough for a server that is far away or busy; nobody waits longer to hear of a wrong address."""


@dataclass(frozen=True, slots=True)
class Peer:
    """A server and what it is called in the tables."""

    name: str
    host: str
    port: int

    @property
    def address(self) -> str:
        """HOST:PORT."""
        return f"{self.host}:{self.port}"


def parse(text: str) -> Peer:
    """NAME=HOST:PORT; ValueError says what is wrong with it."""
    name, _, address = text.partition("=")
    host, _, port = address.rpartition(":")
    if not name or not host or not port.isdecimal() or not 0 < int(port) < 1 << 16:
        raise ValueError(f"expected NAME=HOST:PORT, got {text!r}")
    return Peer(name, host, int(port))


def check(peer: Peer) -> None:
    """LoadError unless it says that it is live."""
    try:
        reply = _ask(peer, "ServerLive", ServerLiveRequest().SerializeToString())
    except grpc.RpcError as error:
        raise LoadError(f"--peer {peer.name}: {peer.address} does not answer ServerLive: {_told(error)}") from error
    if not ServerLiveResponse.FromString(reply).live:
        raise LoadError(f"--peer {peer.name}: {peer.address} says that it is not live")


def is_ready(peer: Peer, model: str) -> bool:
    """Whether it serves a model of this name."""
    try:
        reply = _ask(peer, "ModelReady", ModelReadyRequest(name=model).SerializeToString())
    except grpc.RpcError:
        return False
    return bool(ModelReadyResponse.FromString(reply).ready)


def cases(peers: Sequence[Peer], ours: Iterable[Case]) -> tuple[list[Case], list[str]]:
    """A peer's row for each of our native server's, and what is left out, with the reason."""
    found, skipped = [], []
    wanted = [case for case in ours if case.who == NATIVE]
    for peer in peers:
        for model in dict.fromkeys(case.model for case in wanted):
            if is_ready(peer, model):
                found += [Case(model, peer.name, case.load) for case in wanted if case.model == model]
            else:
                skipped.append(f"{model} on {peer.name}: {peer.address} has no model of this name ready")
    return found, skipped


def targets(peers: Sequence[Peer], measured: Iterable[Case], titles: dict[str, str]) -> list[Target]:
    """What our native server is held against: each row of a peer, without a limit."""
    names, found = {peer.name for peer in peers}, []
    for case in measured:
        if case.who in names:
            what = f"{titles[case.model]}, {case.load}"
            ours, theirs = Key(case.model, NATIVE, case.load), Key(case.model, case.who, case.load)
            for text, value, at_least in (("requests/s", rate, True), ("p50", p50, False), ("p99", p99, False)):
                found.append(Target(f"{what}: {text}, native over {case.who}", value, ours, theirs, None, at_least))
    return found


class PeerMeasurement(ServerMeasurement):
    """A server that somebody else started."""

    def __init__(
        self, peer: Peer, model: BenchModel, load: Load, scratch: Path, generator: Generator | None = None
    ) -> None:
        super().__init__(model, ServerProcess(None, peer.port, host=peer.host), load, scratch, generator)
        self.who = peer.name
        self._peer = peer

    def ask(self) -> bytes:
        """The answer to one request; LoadError where it has none."""
        try:
            return super().ask()
        except grpc.RpcError as error:
            raise LoadError(f"{self._peer.name} does not answer {self.model.name}: {_told(error)}") from error

    def check_reply(self, reply: bytes) -> None:
        """The model's answer, as ONNX Runtime alone gives it."""
        if not self.model.is_answered_by(reply):
            raise LoadError(f"the answer of {self.model.name} on {self.who} is not what ONNX Runtime gives")

    def counters(self) -> Counters | None:
        """From ModelStatistics, Triton's extension; None where it is not there."""
        request = ModelStatisticsRequest(name=self.model.name)
        try:
            reply = _ask(self._peer, "ModelStatistics", request.SerializeToString())
        except grpc.RpcError:
            return None
        versions = ModelStatisticsResponse.FromString(reply).model_stats
        if len(versions) != 1:
            return None
        (model,) = versions
        stats = model.inference_stats
        return Counters(stats.success.count, stats.fail.count, model.inference_count, model.execution_count)


def _ask(peer: Peer, method: str, message: bytes) -> bytes:
    with grpc.insecure_channel(peer.address) as channel:
        reply: bytes = channel.unary_unary(f"/{SERVICE}/{method}")(message, timeout=ANSWER_S)
        return reply


def _told(error: grpc.RpcError) -> str:
    return f"{error.code().name}: {error.details()}"
