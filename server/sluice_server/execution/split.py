"""Requests of more rows than max_batch_size: cut into parts that are queued as ordinary requests, and answered once.

A configuration asks for it in its `parameters`: `split_requests` as `true`. Without it such requests are refused, as in
Triton. Invariants:

* the parts of a request are queued all at once, or, where the bounds of the queue do not allow that, none of them;
* they run like any other requests, in batches with others and on several instances side by side;
* the request is answered when the last of them has run, or fails with the first of them that fails; when it fails, or
  its client leaves, those that still wait leave the queue;
* it counts once: with the batch of its last part, or as one failure. Rows and executions count where they were run.

Made in place of the runner and the model without splitting by the loader, so that others do nothing for it.
"""

from __future__ import annotations

import functools
import threading
import time
from typing import TYPE_CHECKING, Any

from sluice_batching import Draining
from sluice_proto import wire
from sluice_proto.grpc_service_pb2 import ModelInferResponse
from sluice_server.errors import Internal, InvalidArgument
from sluice_server.execution.instance import BatchRunner
from sluice_server.execution.model import ServedModel
from sluice_server.execution.parameters import BadOption, parameter_values, read_switch
from sluice_server.execution.request import InferRequest
from sluice_server.graph import format_shape
from sluice_server.observability.statistics import FailureReason, Outcome
from sluice_server.protocol.encode import answer_of
from sluice_server.protocol.interface import has_queue_policy

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import numpy as np
    from typing_extensions import Buffer

    from sluice_proto.model_config_pb2 import ModelConfig
    from sluice_server.execution.instance import Answers, Encode

SPLIT = "split_requests"
"""The key in `parameters`."""

PARTS_MAX = 1024
"""Of one request. A part takes a kilobyte of memory, and its row perhaps a single byte of the message."""

_RAW_FIELD = ModelInferResponse.DESCRIPTOR.fields_by_name["raw_output_contents"].number


def read_split(config: ModelConfig) -> bool:
    """Whether a complete configuration asks for splitting; BadOption where that cannot be."""
    value = parameter_values(config).get(SPLIT)
    if value is None or not read_switch(config.name, SPLIT, value):
        return False
    if not config.max_batch_size:
        raise BadOption(config.name, SPLIT, value, "false, as max_batch_size is 0")
    if config.HasField("sequence_batching"):
        raise BadOption(config.name, SPLIT, value, "false, as sequence_batching takes one row at a time")
    if has_queue_policy(config):
        raise BadOption(config.name, SPLIT, value, "false, as dynamic_batching has priorities or queue policies")
    if config.response_cache.enable:
        raise BadOption(config.name, SPLIT, value, "false, as response_cache is enabled")
    return True


class Whole:
    """A request that was split. Any thread may call it; the lock guards what is kept of the answers, and the end."""

    __slots__ = ("_answers", "_is_over", "_lock", "parts", "request")

    def __init__(self, request: InferRequest, max_rows: int) -> None:
        self.request = request
        self._lock = threading.Lock()
        self._is_over = False
        self._answers: dict[int, list[Buffer]] = {}
        self.parts = tuple(
            Part(self, place, start, min(start + max_rows, request.rows))
            for place, start in enumerate(range(0, request.rows, max_rows))
        )

    def put(self, place: int, answer: list[Buffer]) -> list[Buffer] | None:
        """Keep the answer of a part; gives the whole one, without its id, when this was the last that was missing.

        Internal when the parts have answers that do not fit together.
        """
        with self._lock:
            if self._is_over:
                return None
            self._answers[place] = answer
            if len(self._answers) < len(self.parts):
                return None
            answers = [self._answers[each] for each in range(len(self.parts))]
        return joined(self.request.output_names, answers)

    def end(self) -> tuple[Part, ...]:
        """Be over. Gives its parts, to the first who calls it only: to that one it is left to say how it ended."""
        with self._lock:
            if self._is_over:
                return ()
            self._is_over = True
            parts, self.parts = self.parts, ()  # they lead here: without them memory is freed at once
            self._answers.clear()
            return parts


class Part(InferRequest):
    """Some rows of a request, queued and run like a request. `call` is that of the whole."""

    __slots__ = ("ends_whole", "place", "whole")

    def __init__(self, whole: Whole, place: int, start: int, stop: int) -> None:
        request = whole.request
        super().__init__(
            request.call,
            "",
            {name: array[start:stop] for name, array in request.arrays.items()},
            request.output_names,
            stop - start,
            request.key,
            request.deadline_ns,
            classes=request.classes,
        )
        self.model = request.model
        # All of them together have the whole's bytes.
        self.size_bytes = request.size_bytes * stop // request.rows - request.size_bytes * start // request.rows
        self.whole = whole
        self.place = place
        self.ends_whole = False
        """Whether the whole is answered by what this part brought."""


def joined(names: tuple[str, ...], answers: Sequence[Sequence[Buffer]]) -> list[Buffer]:
    """The answer, without id, of the answers to a request's parts: of each a head, and a prefix and a raw tensor for
    each output.

    Internal when an output has other dimensions, rows aside, in one than in another.
    """
    count = 2 * len(names)
    response = ModelInferResponse.FromString(b"".join(answers[0][:-count]))
    for answer in answers[1:]:
        other = ModelInferResponse.FromString(b"".join(answer[:-count]))
        for output, more in zip(response.outputs, other.outputs, strict=True):
            if output.shape[1:] != more.shape[1:]:
                raise Internal(
                    f"output '{output.name}' came out with shape {format_shape(output.shape)} for the first rows, and"
                    f" with {format_shape(more.shape)} for others: such answers cannot be joined; turn {SPLIT} off"
                )
            output.shape[0] += more.shape[0]
    parts: list[Buffer] = [response.SerializeToString()]
    for place in range(-count + 1, 0, 2):
        raws = [answer[place] for answer in answers]
        size_bytes = sum(map(len, raws))  # type: ignore[arg-type] # every part is bytes, or a view of bytes
        parts += [wire.length_delimited(_RAW_FIELD, size_bytes), *raws]
    return parts


class SplittingRunner(BatchRunner):
    """Runs batches with parts of requests in them."""

    def __init__(self, encode: Encode, *others: Any, **named: Any) -> None:
        """The arguments are those of `BatchRunner`."""
        super().__init__(functools.partial(_encode, encode), *others, **named)

    def give_up(self, batch: Sequence[InferRequest], error: Exception) -> None:
        """End whatever of a batch, and of the requests that it has parts of, has not ended."""
        for request in batch:
            if isinstance(request, Part):
                take_out(request.whole)
        super().give_up(batch, error)

    def _record(self, batch: list[InferRequest], *times_ns: int, other_rows: int = 0) -> bool:
        for request in batch:
            if isinstance(request, Part) and request.ends_whole:
                request.ends_whole = bool(request.whole.end())
        counted = [request for request in batch if _is_answered(request)]
        other_rows += sum(request.rows for request in batch if not _is_answered(request))
        return super()._record(counted, *times_ns, other_rows=other_rows)

    def _answered(self, batch: list[InferRequest], answers: list[list[Buffer]]) -> Answers:
        pairs = [pair for pair in zip(batch, answers, strict=True) if _is_answered(pair[0])]
        return super()._answered([request for request, _ in pairs], [answer for _, answer in pairs])

    def _fail(self, requests: Sequence[InferRequest], error: Exception, reason: FailureReason) -> None:
        failed = [
            request.whole.request if isinstance(request, Part) else request
            for request in requests
            if not isinstance(request, Part) or take_out(request.whole)
        ]
        if failed:
            super()._fail(failed, error, reason)


def _encode(encode: Encode, batch: Sequence[InferRequest], arrays: Sequence[np.ndarray]) -> list[list[Buffer]]:
    """As the encoder does; the answer of a part is the whole one, or empty when it is not the last."""
    answers = encode(batch, arrays)
    for place, request in enumerate(batch):
        if isinstance(request, Part):
            payload = request.whole.put(request.place, answers[place])
            request.ends_whole = payload is not None
            answers[place] = [] if payload is None else answer_of(request.whole.request, payload)
    return answers


def _is_answered(request: InferRequest) -> bool:
    return not isinstance(request, Part) or request.ends_whole


def take_out(whole: Whole) -> bool:
    """End a whole, and take what still waits of it out of the queue; False when it has ended before."""
    parts = whole.end()
    for part in parts:
        assert isinstance(part.model, ServedModel), "it makes them"
        part.model.queue.cancel(part)
    return bool(parts)


class SplittingModel(ServedModel):
    """A served version that takes requests of more rows than its batches have."""

    def submit(self, requests: Sequence[InferRequest]) -> list[InferRequest]:
        """Queue requests as the base does, the large ones in parts; gives those that came too late."""
        limit = self.interface.max_batch_rows
        if all(request.rows <= limit for request in requests):
            return super().submit(requests)
        late = []
        for request in requests:
            late += super().submit((request,)) if request.rows <= limit else self._submit_split(request)
        return late

    def submit_one(self, request: InferRequest) -> tuple[list[InferRequest], Callable[[], None] | None]:
        """As the base; a large request is never run by the caller."""
        if request.rows > self.interface.max_batch_rows:
            return self._submit_split(request), None
        return super().submit_one(request)

    def _submit_split(self, request: InferRequest) -> list[InferRequest]:
        request.model = self
        if request.shared is not None:
            self.statistics.record_refused(Outcome.INVALID)
            refusal = InvalidArgument(
                f"inference request batch-size must be <= {self.interface.max_batch_rows} for '{self.interface.name}'"
                f" with tensors in shared memory, got {request.rows}: such a request is not split"
            )
            self._turn_away(request, refusal)
            return []
        whole = Whole(request, self.interface.max_batch_rows)
        request.call.on_cancel = functools.partial(self._cancel_whole, whole)
        error = self.queue.offer_together(whole.parts)
        if error is None:
            return []
        whole.end()
        if isinstance(error, Draining):
            return [request]
        self._refuse(request, error)
        return []

    def _cancel_whole(self, whole: Whole) -> None:
        """Take a request out whose client has left, unless all of its parts run or have ended."""
        waiting = [part for part in whole.parts if self.queue.cancel(part)]
        if waiting and take_out(whole):
            total_ns = time.monotonic_ns() - whole.request.call.received_ns
            self.statistics.record_failure(FailureReason.CANCELED, total_ns=total_ns)
