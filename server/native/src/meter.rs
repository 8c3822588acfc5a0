//! Reads frame headers as they pass between HTTP/2 and its socket, as the `h2` crate tells nobody about them: resets,
//! floods, whether the client is alive, and whether anything moves.
//!
//! What `h2` bounds itself, each with a GOAWAY of its own: CONTINUATION frames of one header block, header lists by
//! size, empty DATA frames (100 in a connection's life), small DATA frames that are not consumed (by bytes), streams
//! that are reset before they are accepted, and its own resets for what clients do wrong (both by number; the caller
//! sets them). It remembers one PING and one SETTINGS frame to acknowledge, so that none of the floods here takes
//! memory. What they take is time on the one thread that all connections share; the bounds of `Limits` are on that.
//!
//! Invariants: bytes pass unchanged, but for two frames (`Meter::poll_goaway`, and what `h2` must not see in a graceful
//! shutdown: `Scanner::scan`); no payload but that of a PING is looked at; nothing is allocated, but for ids of resets;
//! the first verdict stays.

mod limits;
mod scan;

use std::io::{self, IoSlice};
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, ready};
use std::time::{Duration, Instant};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

pub use limits::{Flood, Limits};
use scan::{HEADER_BYTES, Heads, Scanner, kind};

/// What has passed over one connection, for whoever serves it.
#[derive(Debug)]
pub struct Traffic {
    began: Instant,
    last_read_ns: AtomicU64,
    bytes_written: AtomicU64,
    /// Frames with HEADERS or DATA that were written.
    frames_written: AtomicU64,
    busy: AtomicBool,
    /// The number of a `Flood`, from 1; 0 for none.
    flood: AtomicU8,
    resets: Mutex<Resets>,
}

/// Streams that the client has reset, in the order of the frames.
#[derive(Debug, Default)]
struct Resets {
    streams: Vec<u32>,
    /// How many of them HTTP/2 has dealt with.
    known: usize,
}

impl Traffic {
    fn new() -> Self {
        Self {
            began: Instant::now(),
            last_read_ns: AtomicU64::new(0),
            bytes_written: AtomicU64::new(0),
            frames_written: AtomicU64::new(0),
            busy: AtomicBool::new(false),
            flood: AtomicU8::new(0),
            resets: Mutex::default(),
        }
    }

    /// Moves the streams that the client has reset since the last time to the end of `into`, once HTTP/2 knows of it:
    /// what asks it afterwards whether a stream is reset misses none, nor does whoever was told of the stream before.
    ///
    /// None is missed: as many as the bound of a second that nobody takes are a flood too.
    pub fn take_resets(&self, into: &mut Vec<u32>) {
        let mut resets = self.resets();
        let known = std::mem::take(&mut resets.known);
        into.extend(resets.streams.drain(..known));
    }

    /// What the client sent too much of, once it has.
    pub fn flood(&self) -> Option<Flood> {
        let number = usize::from(self.flood.load(Ordering::Relaxed));
        number.checked_sub(1).and_then(|index| Flood::ALL.get(index)).copied()
    }

    /// When the client was last heard of.
    pub fn last_read(&self) -> Instant {
        self.began + Duration::from_nanos(self.last_read_ns.load(Ordering::Relaxed))
    }

    pub fn bytes_written(&self) -> u64 {
        self.bytes_written.load(Ordering::Relaxed)
    }

    /// Frames with HEADERS or DATA that were written.
    pub fn frames_written(&self) -> u64 {
        self.frames_written.load(Ordering::Relaxed)
    }

    /// Says whether calls are open, which decides how often the client may ping.
    pub fn set_busy(&self, busy: bool) {
        self.busy.store(busy, Ordering::Relaxed);
    }

    fn now_ns(&self) -> u64 {
        self.began.elapsed().as_nanos() as u64
    }

    fn judge(&self, flood: Flood) {
        let _ = self.flood.compare_exchange(0, flood as u8 + 1, Ordering::Relaxed, Ordering::Relaxed);
    }

    fn resets(&self) -> MutexGuard<'_, Resets> {
        self.resets.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A GOAWAY that is written in place of HTTP/2's own.
#[derive(Debug)]
struct Goaway {
    frame: Vec<u8>,
    written: usize,
}

/// The reason of a GOAWAY to a client that sends too much (RFC 9113, section 7).
const ENHANCE_YOUR_CALM: [u8; 4] = 11_u32.to_be_bytes();

/// The last stream and the reason of a GOAWAY, before its debug data.
const GOAWAY_BYTES: usize = 8;

impl Goaway {
    /// The frame with the verdict as its debug data.
    fn with_reason(payload: &[u8; GOAWAY_BYTES], flood: Flood) -> Self {
        let text = flood.text().as_bytes();
        let length = (GOAWAY_BYTES + text.len()) as u8;
        Self { frame: [&[0, 0, length, kind::GOAWAY, 0, 0, 0, 0, 0], &payload[..], text].concat(), written: 0 }
    }
}

/// A socket whose frames are counted as they pass.
///
/// Once there is a verdict it reads nothing more, for ever: whoever polls the connection must look at
/// `Traffic::flood` whenever that gives `Pending`, and close it with ENHANCE_YOUR_CALM.
#[derive(Debug)]
pub struct Meter<T> {
    io: T,
    scanner: Scanner,
    /// The header that is read or passed on, once headers are read apart.
    header: Header,
    written: Heads,
    goaway: Option<Goaway>,
    traffic: Arc<Traffic>,
}

/// A frame header on its way: what has come of it, and what of that has been passed on.
#[derive(Debug, Default)]
struct Header {
    bytes: [u8; HEADER_BYTES],
    filled: usize,
    passed: usize,
}

impl Header {
    /// Passes on what there is room for; forgets the header once all of it is gone.
    fn pass(&mut self, into: &mut ReadBuf<'_>) {
        let count = into.remaining().min(self.filled - self.passed);
        into.put_slice(&self.bytes[self.passed..self.passed + count]);
        self.passed += count;
        if self.passed == HEADER_BYTES {
            *self = Self::default();
        }
    }
}

impl<T> Meter<T> {
    /// A meter for a connection that begins now, and what it counts.
    pub fn new(io: T, limits: Limits) -> (Self, Arc<Traffic>) {
        let traffic = Arc::new(Traffic::new());
        let meter = Self {
            io,
            scanner: Scanner::new(&limits),
            header: Header::default(),
            written: Heads::after(0),
            goaway: None,
            traffic: Arc::clone(&traffic),
        };
        (meter, traffic)
    }

    fn note_read(&mut self, bytes: &mut [u8]) {
        if bytes.is_empty() {
            return;
        }
        let now_ns = self.traffic.now_ns();
        self.traffic.last_read_ns.store(now_ns, Ordering::Relaxed);
        self.scanner.scan(bytes, now_ns, &self.traffic);
    }

    fn note_written(&mut self, mut bytes: &[u8]) {
        self.traffic.bytes_written.fetch_add(bytes.len() as u64, Ordering::Relaxed);
        while let Some(head) = self.written.next(&mut bytes) {
            if matches!(head.kind, kind::DATA | kind::HEADERS) {
                self.traffic.frames_written.fetch_add(1, Ordering::Relaxed);
            }
        }
    }

    /// Where in bytes that are about to be written HTTP/2 closes the connection for a flood, and the frame to do so.
    fn find_goaway(&self, bytes: &[u8], flood: Flood) -> Option<(usize, Goaway)> {
        let (mut heads, mut rest) = (self.written.clone(), bytes);
        while let Some(head) = heads.next(&mut rest) {
            let Some(payload) = rest.first_chunk::<GOAWAY_BYTES>() else {
                continue;
            };
            if head.kind == kind::GOAWAY && head.length == GOAWAY_BYTES && payload[4..] == ENHANCE_YOUR_CALM {
                // None when the header's beginning is on its way already: then it goes without a reason.
                let at = (bytes.len() - rest.len()).checked_sub(HEADER_BYTES)?;
                return Some((at, Goaway::with_reason(payload, flood)));
            }
        }
        None
    }
}

impl<T: AsyncWrite + Unpin> Meter<T> {
    fn poll_plain(&mut self, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let count = ready!(Pin::new(&mut self.io).poll_write(cx, bytes))?;
        self.note_written(&bytes[..count]);
        Poll::Ready(Ok(count))
    }

    /// Writes as ever, but a GOAWAY with the verdict as its debug data, which `h2` has no way to say.
    fn poll_goaway(&mut self, cx: &mut Context<'_>, bytes: &[u8], flood: Flood) -> Poll<io::Result<usize>> {
        if self.goaway.is_none() {
            match self.find_goaway(bytes, flood) {
                Some((0, goaway)) => self.goaway = Some(goaway),
                Some((at, _)) => return self.poll_plain(cx, &bytes[..at]),
                None => return self.poll_plain(cx, bytes),
            }
        }
        while let Some(Goaway { frame, written }) = &mut self.goaway {
            let count = ready!(Pin::new(&mut self.io).poll_write(cx, &frame[*written..]))?;
            *written += count;
            if count == 0 {
                return Poll::Ready(Ok(0));
            }
            if *written == frame.len() {
                self.goaway = None;
            }
        }
        let replaced = HEADER_BYTES + GOAWAY_BYTES;
        self.note_written(&bytes[..replaced]);
        Poll::Ready(Ok(replaced))
    }
}

impl<T: AsyncRead + Unpin> Meter<T> {
    /// Reads one header, or some of one payload, so that no header is passed on before it is known as a whole.
    fn poll_apart(&mut self, cx: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let payload = self.scanner.payload_left();
        if self.header.filled == 0 && payload > 0 {
            let room = payload.min(buffer.remaining());
            let mut part = ReadBuf::new(buffer.initialize_unfilled_to(room));
            ready!(Pin::new(&mut self.io).poll_read(cx, &mut part))?;
            let count = part.filled().len();
            self.note_read(part.filled_mut());
            buffer.advance(count);
            return Poll::Ready(Ok(()));
        }
        while self.header.filled < HEADER_BYTES {
            let mut part = ReadBuf::new(&mut self.header.bytes[self.header.filled..]);
            ready!(Pin::new(&mut self.io).poll_read(cx, &mut part))?;
            let count = part.filled().len();
            if count == 0 {
                return Poll::Ready(Ok(())); // the end, whatever has come of the header
            }
            self.header.filled += count;
            if self.header.filled == HEADER_BYTES {
                let mut bytes = self.header.bytes;
                self.note_read(&mut bytes);
                self.header.bytes = bytes;
            }
        }
        self.header.pass(buffer);
        Poll::Ready(Ok(()))
    }
}

impl<T: AsyncRead + Unpin> AsyncRead for Meter<T> {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        if self.traffic.flood().is_some() {
            return Poll::Pending;
        }
        // HTTP/2 reads on when it has dealt with every frame that it has the whole of.
        self.scanner.settle_resets(&self.traffic);
        if self.scanner.reads_apart() {
            return self.poll_apart(cx, buffer);
        }
        let before = buffer.filled().len();
        ready!(Pin::new(&mut self.io).poll_read(cx, buffer))?;
        self.note_read(&mut buffer.filled_mut()[before..]);
        if self.scanner.reads_apart() {
            let cut = self.scanner.take_cut();
            let (passed, kept) = buffer.filled().split_at(buffer.filled().len() - cut);
            self.header.bytes[..cut].copy_from_slice(kept);
            self.header.filled = cut;
            buffer.set_filled(passed.len());
        }
        Poll::Ready(Ok(()))
    }
}

impl<T: AsyncWrite + Unpin> AsyncWrite for Meter<T> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        match self.traffic.flood() {
            Some(flood) => self.poll_goaway(cx, bytes, flood),
            None => self.poll_plain(cx, bytes),
        }
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        if let Some(flood) = self.traffic.flood() {
            let first = slices.iter().find(|slice| !slice.is_empty()).map_or(&[][..], |slice| slice);
            return self.poll_goaway(cx, first, flood);
        }
        let count = ready!(Pin::new(&mut self.io).poll_write_vectored(cx, slices))?;
        let mut left = count;
        for slice in slices {
            let taken = slice.len().min(left);
            self.note_written(&slice[..taken]);
            left -= taken;
        }
        Poll::Ready(Ok(count))
    }

    fn is_write_vectored(&self) -> bool {
        self.io.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use std::future::poll_fn;

    use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream, duplex};

    use super::scan::tests::{PREFACE, frame, goaway, ping};
    use super::*;

    /// A meter over a pipe, the client's end of it, and what passed.
    fn piped(pipe_bytes: usize, limits: Limits) -> (Meter<DuplexStream>, DuplexStream, Arc<Traffic>) {
        let (server, client) = duplex(pipe_bytes);
        let (meter, traffic) = Meter::new(server, limits);
        (meter, client, traffic)
    }

    #[tokio::test]
    async fn bytes_pass_unchanged_and_are_counted() {
        let (mut meter, mut client, traffic) = piped(7, Limits::default());
        let began = traffic.last_read();
        let sent = [frame(kind::HEADERS, 4, 1, &[0; 30]), goaway(11), frame(kind::DATA, 1, 1, b"data")].concat();
        let received = tokio::join!(
            async {
                meter.write_all(&sent).await.unwrap();
                let mut received = vec![0; 40];
                meter.read_exact(&mut received).await.unwrap();
                received
            },
            async {
                let mut echoed = vec![0; sent.len()];
                client.read_exact(&mut echoed).await.unwrap();
                assert_eq!(echoed, sent);
                client.write_all(&[5; 40]).await.unwrap();
            }
        );
        assert_eq!(received.0, [5; 40]);
        assert_eq!(traffic.bytes_written(), sent.len() as u64);
        assert_eq!(traffic.frames_written.load(Ordering::Relaxed), 2);
        assert!(traffic.last_read() > began);
    }

    #[tokio::test]
    async fn after_a_verdict_the_goaway_says_why_however_the_socket_cuts_it() {
        let before = [frame(kind::DATA, 0, 1, b"data"), goaway(0)].concat();
        let after = frame(kind::DATA, 0, 1, &goaway(11));
        let mut expected = goaway(11);
        expected[2] += "too_many_pings".len() as u8;
        let expected = [&before[..], &expected, b"too_many_pings", &after].concat();
        for pipe_bytes in 1..60 {
            let (mut meter, mut client, traffic) = piped(pipe_bytes, Limits::default());
            traffic.judge(Flood::Pings);
            let sent = [&before[..], &goaway(11), &after].concat();
            let mut received = vec![0; expected.len()];
            let (written, read) = tokio::join!(meter.write_all(&sent), client.read_exact(&mut received));
            assert_eq!((written.unwrap(), read.unwrap()), ((), expected.len()));
            assert_eq!(received, expected);
            assert_eq!(traffic.bytes_written(), sent.len() as u64);
        }
    }

    #[tokio::test]
    async fn a_client_that_floods_http2_is_told_why_and_disconnected() {
        let (meter, mut client, traffic) = piped(1 << 16, Limits::default());
        let hello = [PREFACE, &frame(kind::SETTINGS, 0, 0, &[])[..], &ping().repeat(10)].concat();
        client.write_all(&hello).await.unwrap();
        let mut connection = h2::server::handshake(meter).await.unwrap();
        poll_fn(|cx| match connection.poll_accept(cx) {
            Poll::Pending if traffic.flood().is_none() => Poll::Pending,
            Poll::Pending => Poll::Ready(()),
            Poll::Ready(accepted) => panic!("{accepted:?}"),
        })
        .await;
        connection.abrupt_shutdown(h2::Reason::ENHANCE_YOUR_CALM);
        poll_fn(|cx| connection.poll_closed(cx)).await.unwrap();
        let mut received = Vec::new();
        client.read_to_end(&mut received).await.unwrap();
        let last = [&[0, 0, 22, kind::GOAWAY, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 11], &b"too_many_pings"[..]].concat();
        assert!(received.ends_with(&last), "{received:?}");
    }

    /// The frames that have come whole: kind, stream, payload.
    fn frames(mut bytes: &[u8]) -> Vec<(u8, u32, Vec<u8>)> {
        let mut frames = Vec::new();
        while let Some((header, rest)) = bytes.split_first_chunk::<HEADER_BYTES>() {
            let length = u32::from_be_bytes([0, header[0], header[1], header[2]]) as usize;
            let Some((payload, rest)) = rest.split_at_checked(length) else {
                break;
            };
            let stream = u32::from_be_bytes([header[5], header[6], header[7], header[8]]);
            frames.push((header[3], stream, payload.to_vec()));
            bytes = rest;
        }
        frames
    }

    /// Reads until a PING with this payload has come, asked or answered.
    async fn read_ping(client: &mut DuplexStream, received: &mut Vec<u8>, payload: &[u8]) {
        while !frames(received).iter().any(|(kind, _, ping)| *kind == kind::PING && ping == payload) {
            assert!(client.read_buf(received).await.unwrap() > 0);
        }
    }

    #[tokio::test]
    async fn a_stream_that_begins_when_the_shutdown_is_known_harms_no_other_however_it_is_cut() {
        // :method POST, :scheme http, :path /
        let request = |stream, flags| frame(kind::HEADERS, flags, stream, &[0x83, 0x86, 0x84]);
        let late = [
            frame(kind::PING, 1, 0, &scan::SHUTDOWN_PING),
            request(3, 4),
            frame(kind::WINDOW_UPDATE, 0, 3, &[0, 0, 0, 5]),
            frame(kind::DATA, 1, 3, b"late"),
            frame(kind::WINDOW_UPDATE, 0, 1, &[0, 0, 0, 5]),
            frame(kind::PING, 0, 0, b"have all"),
        ];
        for pipe_bytes in 9..100 {
            let (meter, mut client, _traffic) = piped(pipe_bytes, Limits::default());
            let (heard, hears) = tokio::sync::oneshot::channel();
            let serve = async {
                let mut connection = h2::server::handshake(meter).await.unwrap();
                let (_, mut respond) = connection.accept().await.unwrap().unwrap();
                connection.graceful_shutdown();
                let mut hears = std::pin::pin!(hears);
                let mut answered = false;
                poll_fn(|cx| {
                    if !answered && hears.as_mut().poll(cx).is_ready() {
                        respond.send_response(http::Response::new(()), true).unwrap();
                        answered = true;
                    }
                    connection.poll_accept(cx)
                })
                .await
            };
            let call = async {
                let hello = [PREFACE, &frame(kind::SETTINGS, 0, 0, &[])[..], &request(1, 5)].concat();
                let mut received = Vec::new();
                client.write_all(&hello).await.unwrap();
                read_ping(&mut client, &mut received, &scan::SHUTDOWN_PING).await;
                client.write_all(&late.concat()).await.unwrap();
                read_ping(&mut client, &mut received, b"have all").await;
                heard.send(()).unwrap();
                client.read_to_end(&mut received).await.unwrap();
                frames(&received)
            };
            let both = async { tokio::join!(serve, call) };
            let (accepted, received) = tokio::time::timeout(Duration::from_secs(30), both).await.unwrap();
            assert!(accepted.is_none(), "{pipe_bytes}: {accepted:?}");
            assert!(received.iter().any(|(kind, stream, _)| (*kind, *stream) == (kind::HEADERS, 1)), "{pipe_bytes}");
            let goodbye = received.iter().rfind(|(kind, ..)| *kind == kind::GOAWAY).unwrap();
            assert_eq!(goodbye.2, [0, 0, 0, 1, 0, 0, 0, 0], "{pipe_bytes}");
        }
    }

    #[tokio::test]
    async fn http2_works_through_a_meter() {
        let (meter, client, traffic) = piped(100, Limits::default());
        let serve = async {
            let mut connection = h2::server::handshake(meter).await.unwrap();
            let (request, mut respond) = connection.accept().await.unwrap().unwrap();
            let mut answer = respond.send_response(http::Response::new(()), false).unwrap();
            answer.send_data(vec![1; 5000].into(), true).unwrap();
            drop(request);
            assert!(connection.accept().await.is_none());
        };
        let call = async {
            let (mut send, connection) = h2::client::handshake(client).await.unwrap();
            let (response, _) = send.send_request(http::Request::new(()), true).unwrap();
            drop(send);
            let body = async {
                let (mut body, mut got) = (response.await.unwrap().into_body(), 0);
                while let Some(data) = body.data().await {
                    got += data.unwrap().len();
                }
                got
            };
            tokio::join!(connection, body).1
        };
        assert_eq!(tokio::join!(serve, call).1, 5000);
        assert!(traffic.frames_written.load(Ordering::Relaxed) >= 2);
        assert!(traffic.bytes_written() > 5000);
        assert_eq!(traffic.flood(), None);
    }
}
