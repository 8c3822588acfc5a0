"""A real model with a state: silero-vad on several audio streams at once, equal to ONNX Runtime on each alone."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import grpc
import numpy as np
import onnxruntime
import pytest

from support import models
from support.conversation import Conversation
from support.requests import answer_arrays, infer_request

ROOT = Path(__file__).parents[2]
TOOLS = ROOT / ".tools"
MODEL = TOOLS / "silero_vad.onnx"

CHUNKS, SAMPLES, RATE = 12, 512, 16_000
CONTEXT = 64
"""Samples of the chunk before that the model wants in front of each."""

STREAMS = 3

# The model's state has the batch in its second dimension, so it is served without one: each run is one request.
CONFIG = """
max_batch_size: 0
input [
  { name: "input" data_type: TYPE_FP32 dims: [ 1, 576 ] },
  { name: "sr" data_type: TYPE_INT64 dims: [ 1 ] }
]
output [ { name: "output" data_type: TYPE_FP32 dims: [ 1, 1 ] } ]
sequence_batching {
  STRATEGY
  state [
    {
      input_name: "state" output_name: "stateN" data_type: TYPE_FP32 dims: [ 2, 1, 128 ]
      initial_state: { name: "silence" data_type: TYPE_FP32 dims: [ 2, 1, 128 ] zero_data: true }
    }
  ]
}
"""


@pytest.fixture(scope="session")
def silero() -> bytes:
    if not MODEL.exists() and os.environ.get("CI") == "true":
        subprocess.run([sys.executable, str(ROOT / "tests" / "models" / "get_silero.py"), str(TOOLS)])
    if not MODEL.exists():
        pytest.skip("silero_vad.onnx is not there: `make silero` gets it")
    return MODEL.read_bytes()


def audio(stream: int) -> np.ndarray:
    """Chunks of a tone that comes and goes in noise, each behind the end of the one before."""
    random = np.random.default_rng(stream)
    time_s = np.arange(CHUNKS * SAMPLES) / RATE
    tone = np.sin(2 * np.pi * 150 * (stream + 1) * time_s) * (np.sin(2 * np.pi * 4 * time_s) > 0)
    samples = (0.3 * tone + 0.02 * random.standard_normal(len(time_s))).astype(np.float32)
    padded = np.concatenate([np.zeros(CONTEXT, np.float32), samples])
    return np.stack([padded[place * SAMPLES :][: CONTEXT + SAMPLES] for place in range(CHUNKS)])


def alone(model: bytes, chunks: np.ndarray) -> list[float]:
    """What the model says of each chunk when nothing is between it and its caller."""
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    state, said = np.zeros((2, 1, 128), np.float32), []
    for chunk in chunks:
        feeds = {"input": chunk[None], "state": state, "sr": np.array(RATE, np.int64)}
        output, state = session.run(["output", "stateN"], feeds)
        said.append(output.item())
    return said


@pytest.mark.usefixtures("no_errors_logged")
@pytest.mark.parametrize("strategy", ["oldest { max_candidate_sequences: 8 }", "direct { }"])
def test_audio_streams_that_share_a_connection_are_heard_as_if_each_were_alone(
    strategy, silero, start_server, repository
):
    models.write_configured(repository, "silero", silero, CONFIG.replace("STRATEGY", strategy))
    server = start_server(repository)
    chunks = [audio(stream) for stream in range(STREAMS)]
    conversation = Conversation(server)
    for place in range(CHUNKS):
        for stream in range(STREAMS):
            flags = {"sequence_start": place == 0, "sequence_end": place == CHUNKS - 1}
            parameters = {"sequence_id": f"stream-{stream}", **flags}
            feeds = {"input": chunks[stream][place][None], "sr": np.array([RATE], np.int64)}
            conversation.say(infer_request("silero", feeds, parameters=parameters))
    heard: list[list[float]] = [[] for _ in range(STREAMS)]
    for _ in range(CHUNKS):
        for stream in range(STREAMS):
            answer = conversation.hear()
            assert not answer.error_message
            heard[stream].append(answer_arrays(answer.infer_response)["output"].item())
    assert conversation.end() is grpc.StatusCode.OK
    for stream in range(STREAMS):
        expected = alone(silero, chunks[stream])
        np.testing.assert_allclose(heard[stream], expected, rtol=1e-5, atol=1e-6)
        assert len({round(value, 5) for value in expected}) > 3, "it says something"
    assert server.model("silero").queue.live == 0
