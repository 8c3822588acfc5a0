//! Answers on their way out: from the outbox to HTTP/2, on the transport's thread, and statuses as gRPC writes them.

use std::sync::Arc;
use std::sync::LazyLock;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use bytes::Bytes;
use h2::server::SendResponse;
use http::{HeaderMap, HeaderName, HeaderValue, Response, StatusCode, header};
use tokio::sync::Semaphore;

use crate::compression::{ACCEPTED, Encoding};
use crate::headers::percent_encode;
use crate::shared::{Answer, Body, CallState, Connection, End, Key, Open, Shared, Trailers, code, lock};

const GRPC_STATUS: HeaderName = HeaderName::from_static("grpc-status");
const GRPC_MESSAGE: HeaderName = HeaderName::from_static("grpc-message");
const GRPC_ENCODING: HeaderName = HeaderName::from_static("grpc-encoding");
const GRPC_ACCEPT_ENCODING: HeaderName = HeaderName::from_static("grpc-accept-encoding");
const CONTENT_TYPE_GRPC: HeaderValue = HeaderValue::from_static("application/grpc");

/// Pieces of an answer from this size on are counted while HTTP/2 holds them, and a client that takes none of them is
/// closed. Smaller ones cost less than the streams that they wait in, whose number is bounded.
const COUNTED_BYTES_MIN: usize = 256;

/// Past its deadline a call is ended here. The server's own answer, which knows more, has so long to come first.
const DEADLINE_GRACE: Duration = Duration::from_millis(10);

static OK_TRAILERS: LazyLock<HeaderMap> = LazyLock::new(|| {
    let mut trailers = HeaderMap::with_capacity(1);
    trailers.insert(GRPC_STATUS, HeaderValue::from_static("0"));
    trailers
});

/// A piece of an answer, counted until HTTP/2 has written or dropped it.
struct Counted {
    bytes: Bytes,
    connection: Arc<Connection>,
    credit: Option<Arc<Semaphore>>,
}

impl AsRef<[u8]> for Counted {
    fn as_ref(&self) -> &[u8] {
        &self.bytes
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.connection.unsent.fetch_sub(self.bytes.len(), Ordering::Relaxed);
        if let Some(credit) = &self.credit {
            credit.add_permits(1);
        }
    }
}

fn counted(bytes: Bytes, connection: &Arc<Connection>, credit: Option<Arc<Semaphore>>) -> Bytes {
    if bytes.len() < COUNTED_BYTES_MIN && credit.is_none() {
        return bytes;
    }
    connection.unsent.fetch_add(bytes.len(), Ordering::Relaxed);
    let bytes = Bytes::from_owner(Counted { bytes, connection: Arc::clone(connection), credit });
    connection.lender.note(&bytes);
    bytes
}

/// Takes answers from the outbox, and ends calls whose deadline has passed, for as long as the server runs.
pub async fn run(shared: Arc<Shared>) {
    let mut ends = Vec::new();
    let mut late = Vec::new();
    loop {
        carry_out_all(&shared, &mut ends);
        let now = Instant::now();
        let next = now.checked_sub(DEADLINE_GRACE).and_then(|due| shared.deadlines.due(due, &mut late));
        for key in late.drain(..) {
            end_by_transport(&shared, key, code::DEADLINE_EXCEEDED, "Deadline Exceeded");
        }
        if let Some(next) = next {
            tokio::select! {
                () = shared.outbox.filled.notified() => {}
                () = shared.deadlines.earlier.notified() => {}
                () = tokio::time::sleep_until((next + DEADLINE_GRACE).into()) => {}
            }
        } else {
            tokio::select! {
                () = shared.outbox.filled.notified() => {}
                () = shared.deadlines.earlier.notified() => {}
            }
        }
    }
}

/// Carries out what is in the outbox; `ends` is empty before and after.
pub fn carry_out_all(shared: &Shared, ends: &mut Vec<End>) {
    shared.outbox.drain(ends);
    for end in ends.drain(..) {
        carry_out(shared, end);
    }
}

/// Ends an open call for a reason of the transport's own, and tells Python.
pub fn end_by_transport(shared: &Shared, key: Key, code: u32, message: &str) {
    let open = lock(&shared.calls).remove(&key);
    if let Some(open) = open {
        shared.count(open.call.method, code);
        let call = Arc::clone(&open.call);
        finish(open, code, message, None);
        shared.closed(call);
    }
}

fn carry_out(shared: &Shared, end: End) {
    match end {
        End::Send(key, body) => {
            if let Some(open) = lock(&shared.calls).get_mut(&key) {
                send(open, body);
            }
        }
        End::Reply(key, body) => {
            let open = lock(&shared.calls).remove(&key);
            if let Some(mut open) = open {
                shared.count(open.call.method, code::OK);
                send(&mut open, body);
                finish(open, code::OK, "", None);
                shared.grew_quieter();
            }
        }
        End::Finish(key, code, message, trailers) => {
            let open = lock(&shared.calls).remove(&key);
            if let Some(open) = open {
                shared.count(open.call.method, code);
                open.call.end_reading();
                finish(open, code, &message, trailers);
                shared.grew_quieter();
            }
        }
    }
}

/// Hands one message to HTTP/2, behind the headers when it is the first. A client that is gone makes every call of
/// HTTP/2 fail, which needs no handling: the connection's own task hears of it.
fn send(open: &mut Open, body: Body) {
    if let Answer::Response(response) = &mut open.answer {
        match response.send_response(head(&open.call), false) {
            Ok(stream) => open.answer = Answer::Messages(stream),
            Err(_) => return,
        }
    }
    if let Answer::Messages(stream) = &mut open.answer {
        let credit = open.call.stream.as_ref().map(|stream| Arc::clone(&stream.credit));
        match body {
            Body::One(bytes) => drop(stream.send_data(counted(bytes, &open.connection, credit), false)),
            Body::Many(pieces) => {
                let last = pieces.len() - 1;
                for (place, bytes) in pieces.into_iter().enumerate() {
                    let credit = if place == last { credit.clone() } else { None };
                    drop(stream.send_data(counted(bytes, &open.connection, credit), false));
                }
            }
        }
    }
}

/// Sends the status and ends the stream.
fn finish(open: Open, code: u32, message: &str, trailers: Trailers) {
    match open.answer {
        Answer::Messages(mut stream) => {
            let trailers = if code == code::OK { OK_TRAILERS.clone() } else { status(code, message, trailers) };
            drop(stream.send_trailers(trailers));
        }
        Answer::Response(response) => refuse_with(response, code, message, trailers),
    }
}

/// Answers with a status and nothing else: gRPC's Trailers-Only.
pub fn refuse(response: SendResponse<Bytes>, code: u32, message: &str) {
    refuse_with(response, code, message, None);
}

fn refuse_with(mut response: SendResponse<Bytes>, code: u32, message: &str, trailers: Trailers) {
    let mut headers = status(code, message, trailers);
    headers.insert(header::CONTENT_TYPE, CONTENT_TYPE_GRPC);
    if code == code::UNIMPLEMENTED {
        // For a client that used an encoding that is not known here.
        headers.insert(GRPC_ACCEPT_ENCODING, HeaderValue::from_static(ACCEPTED));
    }
    let mut head = Response::new(());
    *head.headers_mut() = headers;
    drop(response.send_response(head, true));
}

/// Answers what is no gRPC with a status of HTTP.
pub fn refuse_http(mut response: SendResponse<Bytes>, status: StatusCode) {
    let mut head = Response::new(());
    *head.status_mut() = status;
    drop(response.send_response(head, true));
}

fn head(call: &CallState) -> Response<()> {
    let mut head = Response::new(());
    let headers = head.headers_mut();
    headers.reserve(2);
    headers.insert(header::CONTENT_TYPE, CONTENT_TYPE_GRPC);
    if call.compression != Encoding::Identity {
        headers.insert(GRPC_ENCODING, HeaderValue::from_static(call.compression.name()));
    }
    head
}

fn status(code: u32, message: &str, trailers: Trailers) -> HeaderMap {
    let mut headers = trailers.map_or_else(|| HeaderMap::with_capacity(4), |trailers| *trailers);
    headers.insert(GRPC_STATUS, HeaderValue::from(code));
    if !message.is_empty() {
        headers.insert(GRPC_MESSAGE, percent_encode(message));
    }
    headers
}
