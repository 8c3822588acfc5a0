//! What Python sees of an RPC: `Call`, and the `Stream` that the messages of one share. The seam's names and promises
//! are in `sluice_server/transport/call.py`.

use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, OnceLock};

use bytes::{BufMut, Bytes, BytesMut};
use http::{HeaderMap, HeaderName, HeaderValue};
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use pyo3::pybacked::PyBackedBytes;
use pyo3::types::{PyBytes, PyDict, PyString, PyTuple};
use pyo3::{PyTraverseError, PyVisit};

use crate::compression::{self, Encoding};
use crate::framing::{PREFIX_BYTES, prefix};
use crate::headers::{MetadataValue, encode_binary, metadata};
use crate::shared::{Body, CallState, End, Held, Item, Shared, Status, StreamState, Trailers, Turn, code, empty, lock};
use crate::turns::{Answer, Over};

/// Answers up to this size are copied into one piece; the pieces of larger ones are sent from where they are.
const JOIN_BYTES_MAX: usize = 64 * 1024;

/// Status messages of at most so many characters fit into a header however they are encoded.
const PLAIN_CHARACTERS_MAX: usize = 256;

/// Messages up to this size become Python's `bytes`, which is what parses fastest; larger ones are not copied.
pub const COPY_BYTES_MAX: usize = 64 * 1024;

/// One unary RPC, or one message of a stream.
#[pyclass(frozen, module = "sluice_native")]
pub struct Call {
    #[pyo3(get)]
    method: Py<PyString>,
    /// The request message; None when the client of a stream has half-closed.
    #[pyo3(get)]
    message: Option<Py<PyAny>>,
    /// When the message was complete, on Python's monotonic clock.
    #[pyo3(get)]
    received_ns: i64,
    #[pyo3(get)]
    deadline_ns: i64,
    #[pyo3(get)]
    stream: Option<Py<Stream>>,
    /// Its place among the requests of its stream, once it has one.
    entered: OnceLock<Entered>,
    state: Arc<CallState>,
    shared: Arc<Shared>,
    _held: Held,
}

struct Entered {
    number: u64,
    turn: Arc<Turn>,
    /// What is sent behind every answer.
    suffix: Option<Py<PyBytes>>,
}

impl Call {
    pub fn new(
        py: Python<'_>,
        shared: &Arc<Shared>,
        method: &Py<PyString>,
        item: (Arc<CallState>, Option<Bytes>, std::time::Instant, Held),
    ) -> PyResult<Self> {
        let (state, message, received, held) = item;
        let message = match message {
            None => None,
            Some(bytes) if bytes.len() <= COPY_BYTES_MAX => Some(PyBytes::new(py, &bytes).into_any().unbind()),
            Some(bytes) => Some(Py::new(py, pyo3_bytes::PyBytes::new(bytes))?.into_any()),
        };
        Ok(Self {
            method: method.clone_ref(py),
            message,
            received_ns: shared.clock.ns(received),
            deadline_ns: shared.clock.deadline_ns(&state),
            stream: Stream::of(py, shared, method, &state)?,
            entered: OnceLock::new(),
            state,
            shared: Arc::clone(shared),
            _held: held,
        })
    }

    fn on_cancel_cell(&self) -> &Mutex<Option<Py<PyAny>>> {
        self.entered.get().map_or(&self.state.on_cancel, |entered| &entered.turn.on_cancel)
    }
}

#[pymethods]
impl Call {
    /// Nobody listens to `describe`.
    #[classattr]
    #[pyo3(name = "sampled")]
    const SAMPLED: bool = false;

    #[getter]
    fn on_cancel(&self, py: Python<'_>) -> Option<Py<PyAny>> {
        lock(self.on_cancel_cell()).as_ref().map(|callback| callback.clone_ref(py))
    }

    #[setter]
    fn set_on_cancel(&self, callback: Option<Py<PyAny>>) {
        set_on_cancel(&self.shared, &self.state, self.on_cancel_cell(), callback);
    }

    #[getter]
    fn metadata<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyTuple>> {
        metadata_tuple(py, &self.state)
    }

    #[getter]
    fn peer(&self) -> &str {
        &self.state.client.address
    }

    #[getter]
    fn peer_names<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyTuple>> {
        PyTuple::new(py, &self.state.client.names)
    }

    #[getter]
    fn peer_credentials(&self) -> Option<(i32, u32, u32)> {
        self.state.client.credentials
    }

    #[pyo3(signature = (**_facts))]
    fn describe(&self, _facts: Option<&Bound<'_, PyDict>>) {}

    fn reply(&self, parts: &Bound<'_, PyAny>) -> PyResult<()> {
        if let Some(stream) = &self.stream {
            return stream.get().reply_to(self, parts);
        }
        let body = match body(&self.shared, &self.state, parts, None, None)? {
            Ok(body) => body,
            Err(status) => {
                end_with(&self.shared, &self.state, status);
                return Ok(());
            }
        };
        self.state.ended.store(true, Ordering::Release);
        // The callback leads back to the call: without it, memory is freed at once and not by the collector.
        let callback = empty(&self.state.on_cancel);
        drop(callback);
        self.shared.outbox.push(End::Reply(self.state.key, body));
        Ok(())
    }

    fn fail(slf: &Bound<'_, Self>, status: &Bound<'_, PyAny>) -> PyResult<()> {
        let call = slf.get();
        if let Some(stream) = &call.stream {
            return stream.get().fail(slf, status);
        }
        end_with(&call.shared, &call.state, read_status(&call.shared, status)?);
        Ok(())
    }

    fn __repr__(&self) -> String {
        format!("<sluice_native.Call {:?}>", self.state.key)
    }
}

/// One bidirectional stream: the same object for all of its messages.
#[pyclass(frozen, module = "sluice_native", weakref)]
pub struct Stream {
    #[pyo3(get)]
    method: Py<PyString>,
    #[pyo3(get)]
    deadline_ns: i64,
    state: Mutex<Option<Py<PyAny>>>,
    /// What gives the bytes that go before an answer of so many; None: answers are sent as they are.
    before: OnceLock<Py<PyAny>>,
    /// What gives the answer for a failure.
    on_failure: OnceLock<Py<PyAny>>,
    call: Arc<CallState>,
    shared: Arc<Shared>,
}

type InTurn = Answer<Body, Status>;

impl Stream {
    fn of(
        py: Python<'_>,
        shared: &Arc<Shared>,
        method: &Py<PyString>,
        call: &Arc<CallState>,
    ) -> PyResult<Option<Py<Self>>> {
        let Some(stream) = &call.stream else {
            return Ok(None);
        };
        if let Some(object) = &*lock(&stream.object) {
            return Ok(Some(object.clone_ref(py)));
        }
        let object = Py::new(
            py,
            Self {
                method: method.clone_ref(py),
                deadline_ns: shared.clock.deadline_ns(call),
                state: Mutex::new(None),
                before: OnceLock::new(),
                on_failure: OnceLock::new(),
                call: Arc::clone(call),
                shared: Arc::clone(shared),
            },
        )?;
        *lock(&stream.object) = Some(object.clone_ref(py));
        Ok(Some(object))
    }

    fn status_or_ok(&self, status: Option<&Bound<'_, PyAny>>) -> PyResult<Status> {
        status.map_or_else(|| Ok(Status::new(code::OK, String::new())), |status| read_status(&self.shared, status))
    }

    fn of_stream(&self) -> &StreamState {
        // Only the calls of streams have this object.
        self.call.stream.as_ref().expect("a stream has the state of one")
    }

    /// Answers a message with another, in turn if it has one.
    fn reply_to(&self, message: &Call, parts: &Bound<'_, PyAny>) -> PyResult<()> {
        let Some(entered) = message.entered.get() else { return self.send(parts) };
        let answer = self.answer(parts, self.before.get(), entered.suffix.as_ref())?;
        self.settle(parts.py(), entered, answer)
    }

    /// Answers a message as failures are told, or ends the stream with the status: in turn, if the message has one.
    fn fail(&self, message: &Bound<'_, Call>, status: &Bound<'_, PyAny>) -> PyResult<()> {
        let Some(entered) = message.get().entered.get() else { return self.finish(Some(status)) };
        if let Some(on_failure) = self.on_failure.get() {
            let parts = on_failure.bind(status.py()).call1((message, status))?;
            if !parts.is_none() {
                return self.settle(status.py(), entered, self.answer(&parts, None, None)?);
            }
        }
        self.settle(status.py(), entered, Answer::End(read_status(&self.shared, status)?))
    }

    fn answer(
        &self,
        parts: &Bound<'_, PyAny>,
        before: Option<&Py<PyAny>>,
        suffix: Option<&Py<PyBytes>>,
    ) -> PyResult<InTurn> {
        Ok(match body(&self.shared, &self.call, parts, before, suffix)? {
            Ok(body) => Answer::Message(body),
            Err(status) => Answer::End(status),
        })
    }

    /// Notes the answer of a request and sends what is due by now.
    fn settle(&self, py: Python<'_>, entered: &Entered, answer: InTurn) -> PyResult<()> {
        // It leads back to the call: without it, memory is freed at once and not by the collector.
        let callback = empty(&entered.turn.on_cancel);
        drop(callback);
        let send = |body| self.shared.outbox.push(End::Send(self.call.key, body));
        let over = lock(&self.of_stream().turns).settle(entered.number, answer, send);
        self.end_in_turn(py, over)
    }

    fn end_in_turn(&self, py: Python<'_>, over: Option<Over<Status, Arc<Turn>>>) -> PyResult<()> {
        let Some(Over { end, unheard }) = over else { return Ok(()) };
        end_with(&self.shared, &self.call, end);
        for turn in unheard {
            if let Some(callback) = empty(&turn.on_cancel) {
                callback.call0(py)?;
            }
        }
        Ok(())
    }
}

#[pymethods]
impl Stream {
    #[getter]
    fn state(&self, py: Python<'_>) -> Option<Py<PyAny>> {
        lock(&self.state).as_ref().map(|state| state.clone_ref(py))
    }

    #[setter]
    fn set_state(&self, state: Option<Py<PyAny>>) {
        let before = std::mem::replace(&mut *lock(&self.state), state);
        drop(before);
    }

    #[getter]
    fn on_cancel(&self, py: Python<'_>) -> Option<Py<PyAny>> {
        lock(&self.call.on_cancel).as_ref().map(|callback| callback.clone_ref(py))
    }

    #[setter]
    fn set_on_cancel(&self, callback: Option<Py<PyAny>>) {
        set_on_cancel(&self.shared, &self.call, &self.call.on_cancel, callback);
    }

    #[getter]
    fn metadata<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyTuple>> {
        metadata_tuple(py, &self.call)
    }

    #[getter]
    fn peer(&self) -> &str {
        &self.call.client.address
    }

    #[getter]
    fn peer_names<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyTuple>> {
        PyTuple::new(py, &self.call.client.names)
    }

    #[getter]
    fn peer_credentials(&self) -> Option<(i32, u32, u32)> {
        self.call.client.credentials
    }

    fn send(&self, parts: &Bound<'_, PyAny>) -> PyResult<()> {
        match body(&self.shared, &self.call, parts, None, None)? {
            Ok(body) => self.shared.outbox.push(End::Send(self.call.key, body)),
            Err(status) => end_with(&self.shared, &self.call, status),
        }
        Ok(())
    }

    #[pyo3(signature = (status = None))]
    fn finish(&self, status: Option<&Bound<'_, PyAny>>) -> PyResult<()> {
        end_with(&self.shared, &self.call, self.status_or_ok(status)?);
        Ok(())
    }

    #[pyo3(signature = (*, before = None, on_failure = None))]
    fn answer_in_turn(&self, before: Option<Py<PyAny>>, on_failure: Option<Py<PyAny>>) {
        for (cell, function) in [(&self.before, before), (&self.on_failure, on_failure)] {
            if let Some(function) = function {
                let _first_counts = cell.set(function);
            }
        }
    }

    #[pyo3(signature = (message, suffix = None))]
    fn enter(&self, message: &Bound<'_, Call>, suffix: Option<Py<PyBytes>>) -> bool {
        let turn = Arc::<Turn>::default();
        let Some(number) = lock(&self.of_stream().turns).enter(Arc::clone(&turn)) else { return false };
        message.get().entered.set(Entered { number, turn, suffix }).is_ok()
    }

    #[pyo3(signature = (status = None))]
    fn close(&self, py: Python<'_>, status: Option<&Bound<'_, PyAny>>) -> PyResult<()> {
        let status = self.status_or_ok(status)?;
        let over = lock(&self.of_stream().turns).close(status);
        self.end_in_turn(py, over)
    }

    fn __traverse__(&self, visit: PyVisit<'_>) -> Result<(), PyTraverseError> {
        // Only Python's threads lock it, and none of them is inside while the collector runs.
        if let Ok(state) = self.state.try_lock() {
            visit.call(&*state)?;
        }
        if let Ok(callback) = self.call.on_cancel.try_lock() {
            visit.call(&*callback)?;
        }
        for function in [self.before.get(), self.on_failure.get()].into_iter().flatten() {
            visit.call(function)?;
        }
        Ok(())
    }

    fn __clear__(&self) {
        let held = (empty(&self.state), empty(&self.call.on_cancel));
        drop(held);
    }

    fn __repr__(&self) -> String {
        format!("<sluice_native.Stream {:?}>", self.call.key)
    }
}

/// Lets go of the Python object of a stream that has ended; the two hold each other until then.
pub fn forget_object(call: &CallState) {
    if let Some(stream) = &call.stream {
        let object = empty(&stream.object);
        drop(object);
    }
}

fn set_on_cancel(shared: &Shared, call: &Arc<CallState>, cell: &Mutex<Option<Py<PyAny>>>, callback: Option<Py<PyAny>>) {
    let is_set = callback.is_some();
    let before = std::mem::replace(&mut *lock(cell), callback);
    drop(before);
    if is_set && call.left.load(Ordering::Acquire) && !call.ended.load(Ordering::Acquire) {
        // The client was faster: the transport's Python thread is told again, and calls what is set by now.
        shared.inbox.push(Item::Left(Arc::clone(call)));
    }
}

/// What is to be called because a client has left.
pub fn callbacks(call: &CallState) -> Vec<Py<PyAny>> {
    let turns = call.stream.as_ref().map(|stream| lock(&stream.turns).abandon()).unwrap_or_default();
    let in_turn = turns.iter().filter_map(|turn| empty(&turn.on_cancel));
    empty(&call.on_cancel).into_iter().chain(in_turn).collect()
}

fn read_status(shared: &Shared, status: &Bound<'_, PyAny>) -> PyResult<Status> {
    let code: u32 = status.getattr("code")?.extract()?;
    let mut message = status.getattr("message")?;
    if message.len()? > PLAIN_CHARACTERS_MAX {
        message = shared.fit_message.bind(status.py()).call1((message,))?;
    }
    let message: String = message.cast::<PyString>()?.to_string_lossy().into_owned();
    Ok(Status { code, message, trailers: trailers(&status.getattr("trailers")?)? })
}

/// Reads the metadata of a status. ValueError for what no header can carry.
fn trailers(metadata: &Bound<'_, PyAny>) -> PyResult<Trailers> {
    if metadata.is_empty()? {
        return Ok(None);
    }
    let mut headers = HeaderMap::new();
    for entry in metadata.try_iter()? {
        let (key, value): (String, Bound<'_, PyAny>) = entry?.extract()?;
        let wrong = |_| PyValueError::new_err(format!("metadata {key:?} cannot be sent: {value:?}"));
        let name = HeaderName::from_bytes(key.as_bytes()).map_err(|_| wrong(()))?;
        let value = match value.cast::<PyBytes>() {
            Ok(bytes) => HeaderValue::from_str(&encode_binary(bytes.as_bytes())).map_err(|_| wrong(()))?,
            Err(_) => HeaderValue::from_str(&value.extract::<String>()?).map_err(|_| wrong(()))?,
        };
        headers.append(name, value);
    }
    Ok(Some(Box::new(headers)))
}

fn end_with(shared: &Shared, call: &CallState, status: Status) {
    call.ended.store(true, Ordering::Release);
    let callback = empty(&call.on_cancel);
    drop(callback);
    forget_object(call);
    shared.outbox.push(End::Finish(call.key, status));
}

fn metadata_tuple<'py>(py: Python<'py>, call: &CallState) -> PyResult<Bound<'py, PyTuple>> {
    let mut entries = Vec::new();
    // Checked when the call came in.
    for (key, value) in metadata(&call.headers).unwrap_or_default() {
        let value = match value {
            MetadataValue::Text(text) => PyString::new(py, &text).into_any(),
            MetadataValue::Binary(bytes) => PyBytes::new(py, &bytes).into_any(),
        };
        entries.push((key, value));
    }
    PyTuple::new(py, entries)
}

/// Joins the parts of an answer, or the small ones among them, behind gRPC's prefix. `before` gives what goes before an
/// answer of so many bytes, and `suffix` goes behind it. One that is too large ends the call with a status instead.
fn body(
    shared: &Arc<Shared>,
    call: &CallState,
    parts: &Bound<'_, PyAny>,
    before: Option<&Py<PyAny>>,
    suffix: Option<&Py<PyBytes>>,
) -> PyResult<Result<Body, Status>> {
    let py = parts.py();
    let mut pieces = Vec::with_capacity(4);
    let mut length = 0;
    for part in parts.try_iter()? {
        let piece = Piece::of(&part?)?;
        length += piece.as_slice().len();
        pieces.push(piece);
    }
    if let Some(suffix) = suffix {
        length += suffix.as_bytes(py).len();
        pieces.push(Piece::Bytes(suffix.bind(py).clone()));
    }
    if let Some(before) = before {
        let piece = Piece::of(&before.bind(py).call1((length,))?)?;
        length += piece.as_slice().len();
        pieces.insert(0, piece);
    }
    let limit = shared.options.max_message_bytes;
    if length > limit {
        let message = format!("the answer has {length} bytes, and {limit} may be sent");
        return Ok(Err(Status::new(code::RESOURCE_EXHAUSTED, message)));
    }
    if call.compression != Encoding::Identity {
        return Ok(Ok(Body::One(compressed(py, shared, call.compression, pieces))));
    }
    let mut joined = BytesMut::with_capacity(PREFIX_BYTES + length.min(JOIN_BYTES_MAX));
    joined.put_slice(&prefix(false, length));
    if length <= JOIN_BYTES_MAX {
        for piece in &pieces {
            joined.put_slice(piece.as_slice());
        }
        return Ok(Ok(Body::One(joined.freeze())));
    }
    let mut bodies = Vec::with_capacity(pieces.len() + 1);
    for piece in pieces {
        if piece.as_slice().len() <= COPY_BYTES_MAX {
            joined.put_slice(piece.as_slice());
        } else {
            if !joined.is_empty() {
                bodies.push(joined.split().freeze());
            }
            bodies.push(piece.into_bytes(shared));
        }
    }
    if !joined.is_empty() {
        bodies.push(joined.freeze());
    }
    Ok(Ok(Body::Many(bodies)))
}

fn compressed(py: Python<'_>, shared: &Shared, encoding: Encoding, pieces: Vec<Piece<'_>>) -> Bytes {
    let mut plain = BytesMut::new();
    for piece in &pieces {
        plain.put_slice(piece.as_slice());
    }
    let plain = [plain.freeze()];
    let level = shared.options.compression_level;
    let packed = py.detach(|| compression::deflate(encoding, level, &plain));
    let mut framed = BytesMut::with_capacity(PREFIX_BYTES + packed.len());
    framed.put_slice(&prefix(true, packed.len()));
    framed.put_slice(&packed);
    framed.freeze()
}

/// One part of an answer: `bytes`, or any other C-contiguous buffer.
enum Piece<'py> {
    Bytes(Bound<'py, PyBytes>),
    Buffer(pyo3_bytes::PyBytes),
}

impl<'py> Piece<'py> {
    fn of(part: &Bound<'py, PyAny>) -> PyResult<Self> {
        match part.cast::<PyBytes>() {
            Ok(bytes) => Ok(Self::Bytes(bytes.clone())),
            Err(_) => Ok(Self::Buffer(part.extract()?)),
        }
    }

    fn as_slice(&self) -> &[u8] {
        match self {
            Self::Bytes(bytes) => bytes.as_bytes(),
            Self::Buffer(buffer) => buffer.as_slice(),
        }
    }

    fn into_bytes(self, shared: &Arc<Shared>) -> Bytes {
        match self {
            Self::Bytes(bytes) => Bytes::from_owner(PyBackedBytes::from(bytes)),
            Self::Buffer(buffer) => Bytes::from_owner(Lent { buffer: Some(buffer), shared: Arc::clone(shared) }),
        }
    }
}

/// A Python buffer on its way out. Releasing it needs the interpreter, for which the transport's thread must never
/// wait: it goes back to the thread that takes calls.
struct Lent {
    buffer: Option<pyo3_bytes::PyBytes>,
    shared: Arc<Shared>,
}

impl AsRef<[u8]> for Lent {
    fn as_ref(&self) -> &[u8] {
        self.buffer.as_ref().map_or(&[], |buffer| buffer.as_slice())
    }
}

impl Drop for Lent {
    fn drop(&mut self) {
        if let Some(buffer) = self.buffer.take() {
            self.shared.inbox.push(Item::Release(buffer));
        }
    }
}
