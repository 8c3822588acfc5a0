"""What a request asks of the queue reaches the parts of an ensemble that have priorities; padded parts take steps."""

from __future__ import annotations

import json

import numpy as np

from support import models
from support.fakes import eventually, held
from support.requests import answer_arrays, infer_request

ENSEMBLE = """
platform: "ensemble"
max_batch_size: 8
input {{ name: "{input}" data_type: {datatype} dims: {dims} }}
output {{ name: "OUT" data_type: TYPE_FP32 dims: {out_dims} }}
ensemble_scheduling {{ step {{ model_name: "part" model_version: -1
  input_map {{ key: "{taken}" value: "{input}" }} output_map {{ key: "{made}" value: "OUT" }} }} }}
"""


def write_ensemble(repository, **values: object) -> None:
    directory = repository / "whole"
    (directory / "1").mkdir(parents=True)
    (directory / "config.pbtxt").write_text(ENSEMBLE.format(**values))


def test_a_request_of_a_higher_priority_overtakes_in_the_part(start_server, repository):
    more = "dynamic_batching { priority_levels: 2 default_priority_level: 2 preferred_batch_size: 1 }"
    models.write_model(repository, "part", models.identity(), max_batch_size=1, more=more)
    write_ensemble(
        repository,
        input="IN",
        datatype="TYPE_FP32",
        dims=4,
        out_dims=4,
        taken="X",
        made="Y",
    )
    config = repository / "whole" / "config.pbtxt"
    config.write_text(config.read_text().replace("max_batch_size: 8", "max_batch_size: 1"))
    server = start_server(repository, http=None, metrics=None)
    part = server.model("part")

    def ask(value: float, priority: int):
        inputs = {"IN": np.full((1, 4), value, np.float32)}
        return server.begin("ModelInfer", infer_request("whole", inputs, parameters={"priority": priority}))

    with held(part) as session:
        calls = [ask(0, 2)]
        session.wait_for_runs(1)
        for value, priority in ((1, 2), (2, 1)):
            calls.append(ask(value, priority))
            eventually(lambda: len(part.queue) == len(calls) - 1, "it waits in the part")
        session.release()
        for call in calls:
            call.result()
    assert [feeds["X"][0, 0] for feeds in session.runs] == [0, 2, 1]


def test_a_part_may_have_shape_buckets(start_server, repository):
    shapes = {"s": {"sizes": [4, 8], "axes": {"IDS": 0, "MASK": 0, "EACH": 0}, "mask": "MASK"}}
    more = f'parameters {{ key: "shape_buckets" value {{ string_value: {json.dumps(json.dumps(shapes))} }} }}'
    models.write_model(repository, "part", models.attention(), max_batch_size=8, more=more)
    models.write_model(repository, "alone", models.attention(), max_batch_size=8)
    write_ensemble(
        repository, input="IN", datatype="TYPE_INT64", dims=-1, out_dims="[ -1, 8 ]", taken="IDS", made="EACH"
    )
    config = repository / "whole" / "config.pbtxt"
    mask = 'input { name: "SHOWN" data_type: TYPE_INT64 dims: -1 }\noutput'
    taken = 'input_map { key: "MASK" value: "SHOWN" } output_map'
    config.write_text(config.read_text().replace("output", mask, 1).replace("output_map", taken, 1))
    server = start_server(repository, http=None, metrics=None)
    for length in (3, 5, 9):
        ids = np.arange(length).reshape(1, length)
        found = answer_arrays(server.infer(infer_request("whole", {"IN": ids, "SHOWN": np.ones_like(ids)})))["OUT"]
        alone = infer_request("alone", {"IDS": ids, "MASK": np.ones_like(ids)}, outputs=["EACH"])
        np.testing.assert_allclose(found, answer_arrays(server.infer(alone))["EACH"], rtol=1e-5, atol=1e-5)
