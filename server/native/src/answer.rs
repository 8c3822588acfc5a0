//! Answers on their way out: from the outbox to HTTP/2, on the transport's thread, and statuses as gRPC writes them.

use std::iter::Peekable;
use std::sync::Arc;
use std::sync::LazyLock;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};
use std::vec::Drain;

use bytes::{BufMut, Bytes, BytesMut};
use h2::server::SendResponse;
use http::{HeaderMap, HeaderName, HeaderValue, Response, StatusCode, header};
use tokio::sync::Semaphore;

use crate::compression::{ACCEPTED, Encoding};
use crate::headers::percent_encode;
use crate::shared::{Answer, Body, CallState, Connection, End, Key, Open, Shared, Status, Trailers, code, lock};

const GRPC_STATUS: HeaderName = HeaderName::from_static("grpc-status");
const GRPC_MESSAGE: HeaderName = HeaderName::from_static("grpc-message");
const GRPC_ENCODING: HeaderName = HeaderName::from_static("grpc-encoding");
const GRPC_ACCEPT_ENCODING: HeaderName = HeaderName::from_static("grpc-accept-encoding");
const CONTENT_TYPE_GRPC: HeaderValue = HeaderValue::from_static("application/grpc");

/// Pieces of an answer from this size on are counted while HTTP/2 holds them, and a client that takes none of them is
/// closed. Smaller ones cost less than the streams that they wait in, whose number is bounded.
const COUNTED_BYTES_MIN: usize = 256;

/// As many bytes of small messages are sent as one piece at most: a frame of HTTP/2 holds no more by default.
const JOINED_BYTES_MAX: usize = 16 * 1024;

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
    /// Room that the client's stream gets back.
    credit: Option<Credit>,
}

/// The room of a stream, and how many messages' it is.
type Credit = (Arc<Semaphore>, usize);

impl AsRef<[u8]> for Counted {
    fn as_ref(&self) -> &[u8] {
        &self.bytes
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.connection.unsent.fetch_sub(self.bytes.len(), Ordering::Relaxed);
        if let Some((credit, messages)) = &self.credit {
            credit.add_permits(*messages);
        }
    }
}

fn counted(bytes: Bytes, connection: &Arc<Connection>, credit: Option<Credit>) -> Bytes {
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
    let mut ends = ends.drain(..).peekable();
    while let Some(end) = ends.next() {
        match end {
            End::Send(key, body) => {
                let (body, messages) = match body {
                    Body::One(first) => join(key, first, &mut ends),
                    many => (many, 1),
                };
                if let Some(open) = lock(&shared.calls).get_mut(&key) {
                    send(open, body, messages);
                }
            }
            End::Reply(key, body) => {
                let open = lock(&shared.calls).remove(&key);
                if let Some(mut open) = open {
                    shared.count(open.call.method, code::OK);
                    send(&mut open, body, 1);
                    finish(open, code::OK, "", None);
                    shared.grew_quieter();
                }
            }
            End::Finish(key, Status { code, message, trailers }) => {
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
}

/// Joins the small messages of one stream that follow each other: one frame of HTTP/2 costs more than copying them.
fn join(key: Key, first: Bytes, ends: &mut Peekable<Drain<'_, End>>) -> (Body, usize) {
    let mut joined: Option<BytesMut> = None;
    let mut messages = 1;
    let mut length = first.len();
    while let Some(End::Send(_, Body::One(next))) = ends.next_if(|end| match end {
        End::Send(other, Body::One(next)) => *other == key && length + next.len() <= JOINED_BYTES_MAX,
        _ => false,
    }) {
        length += next.len();
        joined.get_or_insert_with(|| BytesMut::from(&first[..])).put_slice(&next);
        messages += 1;
    }
    (Body::One(joined.map_or(first, BytesMut::freeze)), messages)
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

/// Hands messages to HTTP/2, behind the headers when they are the first. A client that is gone makes every call of
/// HTTP/2 fail, which needs no handling: the connection's own task hears of it.
fn send(open: &mut Open, body: Body, messages: usize) {
    if let Answer::Response(response) = &mut open.answer {
        match response.send_response(head(&open.call), false) {
            Ok(stream) => open.answer = Answer::Messages(stream),
            Err(_) => return,
        }
    }
    if let Answer::Messages(stream) = &mut open.answer {
        let credit = open.call.stream.as_ref().map(|stream| (Arc::clone(&stream.credit), messages));
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

#[cfg(test)]
mod tests {
    use proptest::collection::vec;
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn joined_messages_are_those_of_one_stream_in_their_order(
            messages in vec((0..3_u32, 1..JOINED_BYTES_MAX), 1..40),
        ) {
            let filled = |place: usize, length: usize| vec![u8::try_from(place).unwrap(); length];
            let mut ends: Vec<End> = messages
                .iter()
                .enumerate()
                .map(|(place, &(stream, length))| End::Send((1, stream), Body::One(filled(place, length).into())))
                .collect();
            let mut left = ends.drain(..).peekable();
            let mut place = 0;
            while let Some(End::Send(key, Body::One(first))) = left.next() {
                let (Body::One(bytes), count) = join(key, first, &mut left) else { unreachable!() };
                let of_them = &messages[place..place + count];
                prop_assert!(of_them.iter().all(|&(stream, _)| key == (1, stream)));
                let expected: Vec<u8> =
                    of_them.iter().enumerate().flat_map(|(more, &(_, length))| filled(place + more, length)).collect();
                prop_assert_eq!(&bytes[..], &expected[..]);
                prop_assert!(bytes.len() <= JOINED_BYTES_MAX);
                place += count;
                if let Some(&(stream, length)) = messages.get(place) {
                    prop_assert!(key != (1, stream) || bytes.len() + length > JOINED_BYTES_MAX);
                }
            }
            prop_assert_eq!(place, messages.len());
        }
    }
}
