"""A model that batches make slower, on a server: requests are merged to the cap, and the curve is shown and kept."""

from __future__ import annotations

import http.client

import numpy as np
import pytest

from sluice_proto import grpc_service_pb2 as pb
from support import models
from support.fakes import eventually, held

ITERATIONS = 2000
"""Some milliseconds for one row: more than what a disturbance takes."""

REQUESTS = 5
LARGEST = 4

PREFERRED = "dynamic_batching { preferred_batch_size: 4 }"


def request(*values: float) -> pb.ModelInferRequest:
    message = pb.ModelInferRequest(model_name="m", raw_input_contents=[np.array(values, np.float32).tobytes()])
    message.inputs.add(name="X", datatype="FP32", shape=[len(values), 1])
    return message


def run_together(server) -> int:
    """How many executions it takes to answer requests of which all but the first wait together."""
    before = server.executions("m")
    with held(server.model("m")) as session:
        calls = [server.begin("ModelInfer", request(0.0))]
        session.wait_for_runs(1)
        calls += [server.begin("ModelInfer", request(float(number))) for number in range(1, REQUESTS)]
        eventually(lambda: server.model("m").queue.rows == REQUESTS - 1, "the others wait")
        session.release()
        got = [float(np.frombuffer(call.result().raw_output_contents[0], np.float32)[0]) for call in calls]
    assert got == [float(number) for number in range(REQUESTS)]
    return server.executions("m") - before


def metrics(server) -> dict[str, float]:
    connection = http.client.HTTPConnection("127.0.0.1", server.server.metrics_port)
    connection.request("GET", "/metrics")
    lines = connection.getresponse().read().decode().splitlines()
    connection.close()
    return {name: float(value) for line in lines if line[0] != "#" for name, value in [line.rsplit(" ", 1)]}


def write(repository, more: str = "") -> None:
    model = models.slower_in_batches(ITERATIONS)
    models.write_model(repository, "m", model, max_batch_size=LARGEST, more=more)


def test_requests_are_not_merged_where_that_is_slower_and_the_curve_is_shown(repository, start_server):
    write(repository)
    server = start_server(repository)
    assert run_together(server) == REQUESTS
    properties = server.call("ModelMetadata", pb.ModelMetadataRequest(name="m")).properties
    assert properties["batch_curve"].startswith("rows/s by batch size: 1: ")
    assert properties["batch_curve"].endswith("; requests are merged to 1 row(s) at most, as more are slower")
    shown = metrics(server)
    labels = 'model="m",version="1"'
    assert shown[f"sluice_batch_cap_rows{{{labels}}}"] == 1
    rates = [shown[f'sluice_batch_curve_rows_per_second{{{labels},rows="{rows}"}}'] for rows in (1, 2, 4)]
    assert rates[0] > rates[1] > rates[2] > 0


def test_one_request_may_have_more_rows_than_are_merged(repository, start_server):
    write(repository)
    server = start_server(repository)
    values = [float(number) for number in range(LARGEST)]
    answer = server.infer(request(*values))
    assert np.frombuffer(answer.raw_output_contents[0], np.float32).tolist() == values
    assert server.executions("m") == 1
    code, text = server.refusal("ModelInfer", request(*values, 9.0))
    assert (code.name, "4" in text) == ("INVALID_ARGUMENT", True)


@pytest.mark.parametrize(
    ("more", "is_shown"),
    [
        ('parameters { key: "batch_curve" value { string_value: "off" } }', False),
        (PREFERRED, False),
        (f'{PREFERRED} parameters {{ key: "batch_curve" value {{ string_value: "on" }} }}', True),
    ],
)
def test_a_configuration_can_have_them_merged_all_the_same(repository, start_server, more, is_shown):
    write(repository, more)
    server = start_server(repository)
    assert run_together(server) == 2
    properties = server.call("ModelMetadata", pb.ModelMetadataRequest(name="m")).properties
    assert ("batch_curve" in properties) is is_shown


def test_a_curve_is_measured_once_and_kept(repository, start_server, tmp_path):
    write(repository)
    kept = {"curve_directory": tmp_path / "cache"}

    def curve() -> str:
        server = start_server(repository, models=kept)
        text: str = server.call("ModelMetadata", pb.ModelMetadataRequest(name="m")).properties["batch_curve"]
        return text

    first = curve()
    (file,) = (tmp_path / "cache" / "batch-curves").iterdir()
    written = file.read_text()
    assert curve() == first
    assert file.read_text() == written
    file.write_text(written.replace('"points": [[1, ', '"points": [[1, 9'))
    assert curve() != first  # what is kept is what counts
    file.write_text("broken")
    assert "merged to 1 row(s)" in curve()
    assert file.read_text().startswith("{")


def test_the_cache_is_the_users_unless_told_otherwise(repository, start_server, tmp_path):
    write(repository)
    start_server(repository, environ={"XDG_CACHE_HOME": str(tmp_path / "xdg")})
    assert len(list((tmp_path / "xdg" / "sluice" / "batch-curves").iterdir())) == 1


def test_a_curve_that_there_was_no_time_for_is_not_kept(repository, start_server, tmp_path):
    model = models.slower_in_batches(ITERATIONS)  # 64 rows take 4,096 times what one does
    models.write_model(repository, "m", model, max_batch_size=64)
    server = start_server(repository, models={"curve_directory": tmp_path / "cache"})
    assert ", 64: " not in server.call("ModelMetadata", pb.ModelMetadataRequest(name="m")).properties["batch_curve"]
    assert not (tmp_path / "cache").exists()
