//! Requests on their way in: what is refused at once, and the messages of what is not, read, joined and decompressed.

use std::collections::VecDeque;
use std::pin::pin;
use std::sync::Arc;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll, Waker};
use std::time::{Duration, Instant};

use bytes::Bytes;
use h2::server::SendResponse;
use h2::{Reason, RecvStream};
use http::request::Parts;
use http::{HeaderMap, Method, Request, StatusCode, header};
use tokio::sync::{Semaphore, SemaphorePermit};

use crate::answer::{end_by_transport, refuse, refuse_http};
use crate::compression::{self, Encoding, InflateError};
use crate::framing::{Deframer, Frame, FramingError};
use crate::headers;
use crate::shared::{
    Answer, CallState, Connection, Counted, Held, Item, Key, Open, Shared, StreamState, code, code_of_leaving,
};

/// Compressed messages up to this size are decompressed in place: even a bomb of it (zlib's best is 1 : 1032) takes no
/// more than a few milliseconds.
const INFLATE_HERE_BYTES_MAX: usize = 4 * 1024;

/// An RPC whose headers were accepted.
struct Incoming {
    connection: Arc<Connection>,
    key: Key,
    method: usize,
    headers: HeaderMap,
    opened: Instant,
    timeout: Option<Duration>,
    encoding: Encoding,
    compression: Encoding,
}

/// Why reading a request ended early.
enum Failure {
    /// The client is gone, or has taken the request back.
    Gone,
    Status(u32, String),
}

impl From<FramingError> for Failure {
    fn from(error: FramingError) -> Self {
        let code = match error {
            FramingError::TooLarge { .. } => code::RESOURCE_EXHAUSTED,
            _ => code::INTERNAL,
        };
        Self::Status(code, error.to_string())
    }
}

impl From<InflateError> for Failure {
    fn from(error: InflateError) -> Self {
        let code = match error {
            InflateError::TooLarge { .. } => code::RESOURCE_EXHAUSTED,
            InflateError::Corrupt(_) => code::INTERNAL,
        };
        Self::Status(code, error.to_string())
    }
}

enum Refusal {
    Http(StatusCode),
    Status(u32, String),
    /// The client may send it again elsewhere: it has had no effect.
    Retry,
}

/// Takes a request over; gives what is to be handed up when it is complete already.
pub fn open(
    connection: &Arc<Connection>,
    request: Request<RecvStream>,
    mut response: SendResponse<Bytes>,
) -> Option<Item> {
    let (parts, body) = request.into_parts();
    let key = (connection.id, response.stream_id().as_u32());
    match admit(connection, parts, key) {
        Err(Refusal::Http(status)) => refuse_http(response, status),
        Err(Refusal::Status(code, message)) => refuse(response, code, &message),
        Err(Refusal::Retry) => response.send_reset(Reason::REFUSED_STREAM),
        Ok(incoming) if connection.shared.methods[incoming.method].streams => {
            tokio::spawn(read_stream(incoming, body, response));
        }
        Ok(incoming) => {
            let mut reading = Box::pin(read_unary(incoming, body, response));
            // Mostly the whole request is there already, and no task is needed.
            match reading.as_mut().poll(&mut Context::from_waker(Waker::noop())) {
                Poll::Ready(item) => return item,
                Poll::Pending => {
                    let shared = Arc::clone(&connection.shared);
                    tokio::spawn(async move {
                        if let Some(item) = reading.await {
                            shared.inbox.push(item);
                        }
                    });
                }
            }
        }
    }
    None
}

fn admit(connection: &Arc<Connection>, parts: Parts, key: Key) -> Result<Incoming, Refusal> {
    let shared = &connection.shared;
    let headers = parts.headers;
    if parts.method != Method::POST {
        return Err(Refusal::Http(StatusCode::METHOD_NOT_ALLOWED));
    }
    if !headers::is_grpc(headers.get(header::CONTENT_TYPE)) {
        return Err(Refusal::Http(StatusCode::UNSUPPORTED_MEDIA_TYPE));
    }
    let header_bytes = headers::list_bytes(&headers) + parts.uri.path().len();
    if header_bytes > shared.options.max_header_bytes as usize {
        let limit = shared.options.max_header_bytes;
        let message = format!("the request's headers take {header_bytes} bytes, and {limit} are allowed");
        return Err(Refusal::Status(code::RESOURCE_EXHAUSTED, message));
    }
    if shared.draining.load(Ordering::Relaxed) {
        return Err(Refusal::Retry);
    }
    let path = parts.uri.path();
    let Some(&method) = shared.paths.get(path) else {
        return Err(Refusal::Status(code::UNIMPLEMENTED, format!("there is no method {path} here")));
    };
    let encoding = match headers.get("grpc-encoding") {
        None => Encoding::Identity,
        Some(name) => Encoding::parse(name.as_bytes()).ok_or_else(|| {
            Refusal::Status(
                code::UNIMPLEMENTED,
                format!("grpc-encoding {name:?} is not known: {}", compression::ACCEPTED),
            )
        })?,
    };
    let timeout = match headers.get("grpc-timeout") {
        None => None,
        Some(value) => Some(headers::timeout(value).ok_or_else(|| {
            Refusal::Status(
                code::INTERNAL,
                format!("grpc-timeout {value:?} is no timeout: digits and a unit of HMSmun"),
            )
        })?),
    };
    if headers.keys().any(|key| key.as_str().ends_with("-bin")) {
        headers::metadata(&headers).map_err(|error| Refusal::Status(code::INTERNAL, error.to_string()))?;
    }
    let compression = match shared.options.compression_level {
        0 => Encoding::Identity,
        _ => compression::choose(headers.get("grpc-accept-encoding")).unwrap_or(Encoding::Identity),
    };
    Ok(Incoming {
        connection: Arc::clone(connection),
        key,
        method,
        headers,
        opened: Instant::now(),
        timeout,
        encoding,
        compression,
    })
}

impl Incoming {
    fn shared(&self) -> &Shared {
        &self.connection.shared
    }

    /// Makes it a call that Python may know; None when its client has left.
    fn register(self, mut response: SendResponse<Bytes>) -> Option<Arc<CallState>> {
        // A reset that comes later finds the call; one that came before it was registered is found here. The body does
        // not tell: behind its end it is complete, reset or not.
        if response.poll_reset(&mut Context::from_waker(Waker::noop())).is_ready() {
            self.count_as_left();
            return None;
        }
        let shared = Arc::clone(&self.connection.shared);
        let streams = shared.methods[self.method].streams;
        let stream = streams.then(|| StreamState::new(shared.options.stream_ahead));
        let call = Arc::new(CallState {
            key: self.key,
            method: self.method,
            headers: self.headers,
            client: Arc::clone(&self.connection.client),
            opened: self.opened,
            timeout: self.timeout,
            compression: self.compression,
            left: AtomicBool::new(false),
            ended: AtomicBool::new(false),
            on_cancel: Mutex::new(None),
            stream,
        });
        shared.register(Open {
            call: Arc::clone(&call),
            answer: Answer::Response(response),
            connection: self.connection,
        });
        Some(call)
    }

    fn count_as_left(&self) {
        self.shared().count(self.method, code_of_leaving(self.opened, self.timeout, Instant::now()));
    }
}

/// Reads the one message of a unary call. Nothing comes of a call that ends before it is complete.
async fn read_unary(incoming: Incoming, mut body: RecvStream, mut response: SendResponse<Bytes>) -> Option<Item> {
    let read = tokio::select! {
        biased;
        read = read_message(&incoming, &mut body) => read,
        // A client that leaves while its message waits to be decompressed is not waited for.
        _ = std::future::poll_fn(|context| response.poll_reset(context)) => Err(Failure::Gone),
    };
    match read {
        Ok((message, held)) => {
            let call = incoming.register(response)?;
            Some(Item::Call { call, message: Some(message), received: Instant::now(), held })
        }
        Err(Failure::Gone) => {
            incoming.count_as_left();
            None
        }
        Err(Failure::Status(code, message)) => {
            incoming.shared().count(incoming.method, code);
            refuse(response, code, &message);
            None
        }
    }
}

async fn read_message(incoming: &Incoming, body: &mut RecvStream) -> Result<(Bytes, Held), Failure> {
    let shared = incoming.shared();
    let _counted = Counted::new(&shared.gauges.reading);
    let mut reader = Reader::new(&incoming.connection, incoming.encoding);
    let deadline = incoming.timeout.and_then(|timeout| incoming.opened.checked_add(timeout));
    loop {
        let stalled = Instant::now() + shared.options.stall_timeout;
        let until = deadline.map_or(stalled, |deadline| deadline.min(stalled));
        match tokio::time::timeout_at(until.into(), reader.read(body)).await {
            Ok(more) => {
                if !more? {
                    break;
                }
            }
            Err(_) if deadline == Some(until) => {
                return Err(Failure::Status(code::DEADLINE_EXCEEDED, "Deadline Exceeded".into()));
            }
            Err(_) => return Err(stall(shared)),
        }
        if reader.frames.len() > 1 {
            return Err(Failure::Status(code::UNIMPLEMENTED, "a unary call has one message, and this has more".into()));
        }
    }
    match reader.next().await? {
        Some(whole) => Ok(whole),
        None => Err(Failure::Status(code::INTERNAL, "a unary call has one message, and this has none".into())),
    }
}

/// Reads a stream until either side has ended it.
async fn read_stream(incoming: Incoming, body: RecvStream, response: SendResponse<Bytes>) {
    let connection = Arc::clone(&incoming.connection);
    let shared = &*connection.shared;
    let _counted = Counted::new(&shared.gauges.reading);
    let reader = Reader::new(&connection, incoming.encoding);
    let Some(call) = incoming.register(response) else { return };
    let Some(stream) = &call.stream else { return };
    tokio::select! {
        biased;
        () = stream.over.notified() => {}
        result = hand_up_messages(shared, &call, &stream.credit, reader, body) => match result {
            Ok(()) => {}
            Err(Failure::Gone) => shared.leave(call.key),
            Err(Failure::Status(code, message)) => end_by_transport(shared, call.key, code, &message),
        },
    }
}

async fn hand_up_messages(
    shared: &Shared,
    call: &Arc<CallState>,
    credit: &Semaphore,
    mut reader: Reader<'_>,
    mut body: RecvStream,
) -> Result<(), Failure> {
    let item = |message: Option<Bytes>, held: Held| Item::Call {
        call: Arc::clone(call),
        message,
        received: Instant::now(),
        held,
    };
    // What has come by now goes up at once, with one wake-up for all of it.
    let mut arrived = Vec::new();
    loop {
        let more = match poll_now(reader.read(&mut body)) {
            Some(more) => more?,
            None => {
                shared.inbox.extend(arrived.drain(..));
                wait_for_more(shared, &mut reader, &mut body).await?
            }
        };
        loop {
            if reader.is_next_slow() {
                shared.inbox.extend(arrived.drain(..));
            }
            let Some((message, held)) = reader.next().await? else { break };
            if credit.try_acquire().map(SemaphorePermit::forget).is_err() {
                shared.inbox.extend(arrived.drain(..));
                match credit.acquire().await {
                    Ok(permit) => permit.forget(),
                    Err(_closed) => return Ok(()),
                }
            }
            arrived.push(item(Some(message), held));
        }
        if !more {
            arrived.push(item(None, Held::new(&shared.gauges.held_bytes)));
            shared.inbox.extend(arrived);
            // The stream stays open until the server ends it, and the client may still take it back.
            return match std::future::poll_fn(|context| body.poll_trailers(context)).await {
                Ok(_) => std::future::pending().await,
                Err(_) => Err(Failure::Gone),
            };
        }
    }
}

/// Reads the next piece of a stream, which between its messages may be silent as long as it likes.
async fn wait_for_more(shared: &Shared, reader: &mut Reader<'_>, body: &mut RecvStream) -> Result<bool, Failure> {
    if reader.deframer.held_bytes() == 0 {
        return reader.read(body).await;
    }
    let read = tokio::time::timeout(shared.options.stall_timeout, reader.read(body));
    read.await.map_err(|_| stall(shared))?
}

/// What a future that loses nothing when it is dropped gives without any waiting.
fn poll_now<T>(future: impl Future<Output = T>) -> Option<T> {
    match pin!(future).poll(&mut Context::from_waker(Waker::noop())) {
        Poll::Ready(value) => Some(value),
        Poll::Pending => None,
    }
}

fn stall(shared: &Shared) -> Failure {
    let seconds = shared.options.stall_timeout.as_secs_f64();
    Failure::Status(code::UNAVAILABLE, format!("the message is not complete, and nothing came for {seconds} s"))
}

/// Cuts a body into messages.
struct Reader<'a> {
    shared: &'a Shared,
    inflating: &'a Arc<Semaphore>,
    encoding: Encoding,
    deframer: Deframer,
    frames: VecDeque<Frame>,
    held: Held,
}

impl<'a> Reader<'a> {
    fn new(connection: &'a Connection, encoding: Encoding) -> Self {
        let shared = &*connection.shared;
        Self {
            shared,
            inflating: &connection.inflating,
            encoding,
            deframer: Deframer::new(shared.options.max_message_bytes),
            frames: VecDeque::new(),
            held: Held::new(&shared.gauges.held_bytes),
        }
    }

    /// Reads the next piece of the body; false at its end.
    async fn read(&mut self, body: &mut RecvStream) -> Result<bool, Failure> {
        match body.data().await {
            None => {
                self.deframer.finish()?;
                Ok(false)
            }
            Some(Err(_)) => Err(Failure::Gone),
            Some(Ok(chunk)) => {
                // What came is ours to bound from here on. Only a client that is gone makes this fail.
                drop(body.flow_control().release_capacity(chunk.len()));
                hold(self.shared, &mut self.held, chunk.len())?;
                self.deframer.push(chunk, &mut self.frames)?;
                Ok(true)
            }
        }
    }

    /// Whether the next message is decompressed on another thread, which others had better not wait for.
    fn is_next_slow(&self) -> bool {
        self.frames.front().is_some_and(|frame| frame.compressed && frame.payload.len() > INFLATE_HERE_BYTES_MAX)
    }

    /// The next complete message, decompressed.
    async fn next(&mut self) -> Result<Option<(Bytes, Held)>, Failure> {
        let Some(frame) = self.frames.pop_front() else {
            return Ok(None);
        };
        let mut held = std::mem::replace(&mut self.held, Held::new(&self.shared.gauges.held_bytes));
        if !frame.compressed {
            return Ok(Some((frame.payload, held)));
        }
        if self.encoding == Encoding::Identity {
            let message = "a message is marked as compressed, and there is no grpc-encoding".into();
            return Err(Failure::Status(code::INTERNAL, message));
        }
        let limit = self.shared.options.max_message_bytes;
        let message = inflate(self.inflating, self.encoding, frame.payload, limit).await?;
        hold(self.shared, &mut held, message.len())?;
        Ok(Some((message, held)))
    }
}

/// Counts bytes as held, unless the server holds too many.
fn hold(shared: &Shared, held: &mut Held, bytes: usize) -> Result<(), Failure> {
    let limit = shared.options.max_held_bytes;
    if held.grow(bytes) > limit {
        let message = format!("the server holds as many bytes of requests as it may: {limit}");
        return Err(Failure::Status(code::RESOURCE_EXHAUSTED, message));
    }
    Ok(())
}

/// Decompresses a message, a large one on another thread when it is the connection's turn.
async fn inflate(turn: &Arc<Semaphore>, encoding: Encoding, data: Bytes, limit: usize) -> Result<Bytes, Failure> {
    if data.len() <= INFLATE_HERE_BYTES_MAX {
        return Ok(compression::inflate(encoding, &data, limit)?);
    }
    let turn = Arc::clone(turn).acquire_owned().await;
    let inflated = tokio::task::spawn_blocking(move || {
        let _until_the_end = turn;
        compression::inflate(encoding, &data, limit)
    });
    match inflated.await {
        Ok(result) => Ok(result?),
        Err(_) => Err(Failure::Status(code::INTERNAL, "the message could not be decompressed".into())),
    }
}
