"""The order of a stream's answers, for transports in Python: the native one keeps it in Rust (`turns.rs`).

`StreamInTurn._lock` guards the order: whoever holds it is the only one to send.
"""

from __future__ import annotations

import threading
from collections import deque
from typing import TYPE_CHECKING

from sluice_server.status import OK, Status
from sluice_server.transport.call import Call, Stream

if TYPE_CHECKING:
    from collections.abc import Sequence

    from typing_extensions import Buffer

    from sluice_server.transport.call import Before, Metadata, OnFailure


class MessageInTurn(Call):
    """One message of a `StreamInTurn`, or None for the end of the client's side."""

    __slots__ = ("answer", "has_turn", "stream", "suffix")

    stream: StreamInTurn

    def __init__(self, stream: StreamInTurn, message: bytes | None, received_ns: int) -> None:
        self.stream = stream
        self.method = stream.method
        self.message = message
        self.received_ns = received_ns
        self.deadline_ns = stream.deadline_ns
        self.on_cancel = None
        self.has_turn = False
        self.suffix: bytes | None = None
        self.answer: Sequence[Buffer] | Status | None = None

    @property
    def metadata(self) -> Metadata:
        """The stream's headers."""
        return self.stream.metadata

    @property
    def peer(self) -> str:
        """The client's address."""
        return self.stream.peer

    @property
    def peer_names(self) -> tuple[str, ...]:
        """The names in the client's certificate."""
        return self.stream.peer_names

    def reply(self, parts: Sequence[Buffer]) -> None:
        """Answer with a message, in turn if this has one."""
        self.stream.reply_to(self, parts)

    def fail(self, status: Status) -> None:
        """Answer in turn as the stream tells of failures; without a turn, end the stream."""
        self.stream.fail(self, status)


class StreamInTurn(Stream):
    """A stream that answers the requests which entered it in their order, by the `send` and `finish` of a transport."""

    __slots__ = ("_before", "_closing", "_due", "_is_over", "_lock", "_on_failure")

    def __init__(self) -> None:
        self.state = None
        self.on_cancel = None
        self._due: deque[MessageInTurn] = deque()
        self._closing: Status | None = None
        self._is_over = False
        self._before: Before | None = None
        self._on_failure: OnFailure | None = None
        self._lock = threading.Lock()

    def answer_in_turn(self, *, before: Before | None = None, on_failure: OnFailure | None = None) -> None:
        """As `Stream`."""
        self._before, self._on_failure = before, on_failure
        self.on_cancel = self._abandon

    def enter(self, message: Call, suffix: bytes | None = None) -> bool:
        """As `Stream`; the message is one of this stream."""
        assert isinstance(message, MessageInTurn)
        with self._lock:
            if self._is_over or self._closing is not None:
                return False
            message.has_turn, message.suffix = True, suffix
            self._due.append(message)
            return True

    def close(self, status: Status = OK) -> None:
        """As `Stream`."""
        with self._lock:
            if self._is_over or self._closing is not None:
                return
            self._closing = status
            end = self._send_due()
        self._end(end)

    def reply_to(self, message: MessageInTurn, parts: Sequence[Buffer]) -> None:
        """Answer a message with another, in turn if it has one."""
        if not message.has_turn:
            self.send(parts)
            return
        if message.suffix is not None:
            parts = [*parts, message.suffix]
        if self._before is not None:
            size_bytes = sum(map(len, parts))  # type: ignore[arg-type] # every part is bytes, or a view of bytes
            parts = [self._before(size_bytes), *parts]
        self._settle(message, parts)

    def fail(self, message: MessageInTurn, status: Status) -> None:
        """Answer a message as failures are told, or end the stream with the status: in turn, if the message has one."""
        if not message.has_turn:
            self.finish(status)
            return
        parts = None if self._on_failure is None else self._on_failure(message, status)
        self._settle(message, status if parts is None else parts)

    def _settle(self, message: MessageInTurn, answer: Sequence[Buffer] | Status) -> None:
        """Note an answer and send what is due by now. A second answer has no effect."""
        message.on_cancel = None
        with self._lock:
            if self._is_over or message.answer is not None:
                return
            message.answer = answer
            end = self._send_due()
        self._end(end)

    def _send_due(self) -> Status | None:
        """Send the answers that are there up to the first that is not; gives the end of the stream, if that is there.

        What is left in `_due` then is what nobody will hear of.
        """
        due = self._due
        while due and (answer := due[0].answer) is not None:
            due.popleft()
            if isinstance(answer, Status):
                self._is_over = True
                return answer
            self.send(answer)
        if due or self._closing is None:
            return None
        self._is_over = True
        return self._closing

    def _end(self, status: Status | None) -> None:
        if status is None:
            return
        self.on_cancel = None  # it leads back here: without it memory is freed at once, and not by the collector
        self._cancel_due()
        self.finish(status)

    def _abandon(self) -> None:
        """Cancel what still waits: the client has left."""
        with self._lock:
            if self._is_over:
                return
            self._is_over = True
        self._cancel_due()

    def _cancel_due(self) -> None:
        """For the one thread that has ended the stream."""
        while self._due:
            message = self._due.popleft()
            on_cancel, message.on_cancel = message.on_cancel, None
            if on_cancel is not None:
                on_cancel()
