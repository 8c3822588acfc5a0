"""What sends the requests of a load with the project's client, on a real server; Locust's process has its own test."""

from __future__ import annotations

import numpy as np
import pytest
from made_up import REQUEST, write_repository, write_scenario

from loadtests.payloads import Payload, PayloadError, cut_payloads
from loadtests.scenario import read_scenario
from loadtests.senders import NUMBERS, Sender, open_sender
from sluice_client import Unimplemented
from sluice_client.load.latencies import OK
from sluice_server.transport.options import TransportOptions
from support.fakes import eventually

OPEN_LIMIT = 4


def sender_for(folder, address: str, protocol: str, *, model: str = "double", answer: float = 2.0) -> Sender:
    """A sender with the project's client; what it holds answers against is `answer` times the input."""
    golden = folder / "models" / "double" / "golden.npz"
    request = f'[[requests]]\nmodel = "{model}"\nclient = "sluice"\nprotocol = "{protocol}"\ngolden = "{golden}"'
    (kind,) = read_scenario(write_scenario(folder, request)).requests
    payloads = cut_payloads(golden, ["X"], ["Y"], [1, 3])
    payloads = [Payload(each.inputs, {"Y": each.inputs["X"] * np.float32(answer)}) for each in payloads]
    return open_sender(kind, payloads, address, "", OPEN_LIMIT)


@pytest.fixture
def server(start_server, tmp_path):
    return start_server(write_repository(tmp_path), allow_client_shm=True, http=None, metrics=None)


PROTOCOLS = pytest.mark.parametrize("protocol", ["unary", "stream", "shared_memory"])


@PROTOCOLS
def test_requests_are_sent_and_their_answers_held_against_the_sample(server, tmp_path, protocol):
    sender = sender_for(tmp_path, server.target, protocol)
    for index in range(len(sender.payloads)):
        sender.check(index)
        assert sender.send(index) == OK
    sender.close()
    other = sender_for(tmp_path, server.target, protocol, answer=3.0)
    with pytest.raises(PayloadError, match="output 'Y' differs from the golden sample"):
        other.check(1)  # the first has a zero alone
    other.close()


@PROTOCOLS
def test_a_refusal_is_told_by_its_code(server, tmp_path, protocol):
    sender = sender_for(tmp_path, server.target, protocol, model="triple")
    assert sender.send(0) == NUMBERS["NOT_FOUND"]
    sender.close()


def test_shared_memory_needs_a_server_that_has_it_and_a_sample_with_answers(start_server, tmp_path):
    server = start_server(write_repository(tmp_path), http=None, metrics=None)
    with pytest.raises(Unimplemented, match="start it with --allow-client-shm"):
        sender_for(tmp_path, server.target, "shared_memory")
    golden = tmp_path / "models" / "double" / "golden.npz"
    np.savez(golden, X=np.ones((4, 1), np.float32))
    (kind,) = read_scenario(write_scenario(tmp_path, REQUEST + 'protocol = "shared_memory"')).requests
    payloads = cut_payloads(golden, ["X"], ["Y"], [1])
    with pytest.raises(PayloadError, match="has no array for any output of 'double', which shared memory needs"):
        open_sender(kind, payloads, server.target, "", OPEN_LIMIT)


@pytest.mark.parametrize("protocol", ["unary", "stream"])
def test_a_server_that_comes_back_is_found_again(server, start_server, tmp_path, protocol):
    sender = sender_for(tmp_path, server.target, protocol)
    assert sender.send(0) == OK
    server.server.stop()
    eventually(lambda: sender.send(0) == NUMBERS["UNAVAILABLE"], "nobody answers")
    start_server(tmp_path / "models", grpc=TransportOptions(server.target), http=None, metrics=None)
    eventually(lambda: sender.send(0) == OK, "the new server answers")
    sender.close()
