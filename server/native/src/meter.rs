//! Reads frame headers as they pass between HTTP/2 and its socket, as the `h2` crate tells nobody about them: resets,
//! floods, whether the client is alive, and whether anything moves.
//!
//! What `h2` bounds itself, each with a GOAWAY of its own: CONTINUATION frames of one header block, header lists by
//! size, empty DATA frames (100 in a connection's life), small DATA frames that are not consumed (by bytes), streams
//! that are reset before they are accepted, and its own resets for what clients do wrong (both by number; the caller
//! sets them). It remembers one PING and one SETTINGS frame to acknowledge, so that none of the floods here takes
//! memory. What they take is time on the one thread that all connections share; the bounds of `Limits` are on that.
//!
//! Invariants: bytes pass unchanged, but for one frame (`Meter::poll_goaway`); no payload is looked at; nothing is
//! allocated, but for ids of resets; the first verdict stays.

use std::fmt;
use std::io::{self, IoSlice};
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, ready};
use std::time::{Duration, Instant};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

/// "PRI * HTTP/2.0...", which the client sends first; `h2` checks it.
const PREFACE_BYTES: usize = 24;

/// Length, type, flags and stream of a frame (RFC 9113, section 4.1).
const HEADER_BYTES: usize = 9;

/// Frame types (RFC 9113, section 6).
mod kind {
    pub const DATA: u8 = 0;
    pub const HEADERS: u8 = 1;
    pub const PRIORITY: u8 = 2;
    pub const RST_STREAM: u8 = 3;
    pub const SETTINGS: u8 = 4;
    pub const PING: u8 = 6;
    pub const GOAWAY: u8 = 7;
    pub const WINDOW_UPDATE: u8 = 8;
    pub const CONTINUATION: u8 = 9;
}

/// ACK of SETTINGS and PING, END_STREAM of DATA.
const FIRST_FLAG: u8 = 1;

const SECOND_NS: u64 = 1_000_000_000;

/// Time between pings on a connection without calls that may not be kept alive: gRPC takes TCP's keep-alive time.
const IDLE_PING_NS: u64 = 2 * 3600 * SECOND_NS;

/// The span of the bound on SETTINGS.
const SETTINGS_SPAN_NS: u64 = 10 * SECOND_NS;

/// SETTINGS in ten seconds. Each goes over all open streams and is acknowledged before anything else is read. gRPC's
/// clients tell new windows as they measure the connection, ten times a second at most.
const MAX_SETTINGS: u64 = 500;

/// RST_STREAM in a second. Each stood for a stream that was opened, decoded and perhaps handed up for nothing, some
/// 20 us, and that did not count against the streams a client may have open (CVE-2023-44487). A client that gives up
/// every call after a millisecond makes some thousands a second on one connection, which must go on being served; an
/// attacker sends a hundred times as many.
const MAX_RESETS: u64 = 20_000;

/// Frames without effect in a second: DATA and CONTINUATION without content, acknowledged PINGs, frames of types that
/// HTTP/2 ignores. Honest ones are singular, such as the answer to a keepalive ping.
const MAX_EMPTY_FRAMES: u64 = 10_000;

/// WINDOW_UPDATE in a second, besides what was earned: a few for each call that is opened and for the windows to grow.
const MAX_WINDOW_UPDATES: u64 = 100_000;

/// Bytes written that earn one WINDOW_UPDATE more: a client that reads single bytes gets each in a frame of ten bytes,
/// and gives it back to its stream and to the connection.
const BYTES_PER_WINDOW_UPDATE: u64 = 4;

/// PRIORITY in a second: gRPC never sends it, browsers one or a few for each stream, and `h2` ignores it.
const MAX_PRIORITIES: u64 = 20_000;

/// What a client may do before its connection is closed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Pings that may come too early between two frames with HEADERS or DATA; 0: any number.
    pub max_ping_strikes: u32,
    /// A ping that follows the last one sooner is a strike.
    pub min_ping_interval: Duration,
    /// Whether `min_ping_interval` counts on a connection without calls too, and not two hours.
    pub permit_without_calls: bool,
    /// SETTINGS in ten seconds.
    pub settings: u64,
    /// RST_STREAM in a second.
    pub resets: u64,
    /// Frames without effect in a second.
    pub empty_frames: u64,
    /// WINDOW_UPDATE in a second, besides those that were earned by what was written.
    pub window_updates: u64,
    /// PRIORITY in a second.
    pub priorities: u64,
}

impl Default for Limits {
    /// gRPC's own policy of pings, and bounds that no honest client meets.
    fn default() -> Self {
        Self {
            max_ping_strikes: 2,
            min_ping_interval: Duration::from_secs(300),
            permit_without_calls: false,
            settings: MAX_SETTINGS,
            resets: MAX_RESETS,
            empty_frames: MAX_EMPTY_FRAMES,
            window_updates: MAX_WINDOW_UPDATES,
            priorities: MAX_PRIORITIES,
        }
    }
}

/// What a client sent too much of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Flood {
    Pings,
    Settings,
    Resets,
    EmptyFrames,
    WindowUpdates,
    Priorities,
}

impl Flood {
    const ALL: [Self; 6] =
        [Self::Pings, Self::Settings, Self::Resets, Self::EmptyFrames, Self::WindowUpdates, Self::Priorities];

    /// The debug data of the GOAWAY; gRPC's clients know `too_many_pings`, and ping half as often from then on.
    pub fn text(self) -> &'static str {
        match self {
            Self::Pings => "too_many_pings",
            Self::Settings => "too_many_settings",
            Self::Resets => "too_many_resets",
            Self::EmptyFrames => "too_many_empty_frames",
            Self::WindowUpdates => "too_many_window_updates",
            Self::Priorities => "too_many_priorities",
        }
    }
}

impl fmt::Display for Flood {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.text())
    }
}

/// What has passed over one connection, for whoever serves it.
#[derive(Debug)]
pub struct Traffic {
    began: Instant,
    last_read_ns: AtomicU64,
    bytes_read: AtomicU64,
    bytes_written: AtomicU64,
    /// Frames with HEADERS or DATA that were written.
    frames_written: AtomicU64,
    busy: AtomicBool,
    /// The number of a `Flood`, from 1; 0 for none.
    flood: AtomicU8,
    resets: Mutex<Vec<u32>>,
}

impl Traffic {
    fn new() -> Self {
        Self {
            began: Instant::now(),
            last_read_ns: AtomicU64::new(0),
            bytes_read: AtomicU64::new(0),
            bytes_written: AtomicU64::new(0),
            frames_written: AtomicU64::new(0),
            busy: AtomicBool::new(false),
            flood: AtomicU8::new(0),
            resets: Mutex::default(),
        }
    }

    /// Moves the streams that the client has reset since the last time to the end of `into`.
    ///
    /// None is missed: as many as the bound of a second that nobody takes are a flood too.
    pub fn take_resets(&self, into: &mut Vec<u32>) {
        into.append(&mut self.resets());
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

    pub fn bytes_read(&self) -> u64 {
        self.bytes_read.load(Ordering::Relaxed)
    }

    pub fn bytes_written(&self) -> u64 {
        self.bytes_written.load(Ordering::Relaxed)
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

    fn resets(&self) -> MutexGuard<'_, Vec<u32>> {
        self.resets.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The header of a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Head {
    length: usize,
    kind: u8,
    flags: u8,
    stream: u32,
}

impl Head {
    fn parse([a, b, c, kind, flags, stream @ ..]: [u8; HEADER_BYTES]) -> Self {
        let length = u32::from_be_bytes([0, a, b, c]) as usize;
        // The first bit of the stream is reserved.
        Self { length, kind, flags, stream: u32::from_be_bytes(stream) & (u32::MAX >> 1) }
    }
}

/// Finds frame headers in a byte stream that is cut anywhere.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Heads {
    /// Bytes to pass over before the next header: the preface, or a payload.
    skip: usize,
    partial: [u8; HEADER_BYTES],
    filled: usize,
}

impl Heads {
    fn after(skip: usize) -> Self {
        Self { skip, partial: [0; HEADER_BYTES], filled: 0 }
    }

    /// Takes bytes up to the end of the next header, or all; gives the header.
    fn next(&mut self, bytes: &mut &[u8]) -> Option<Head> {
        let skipped = self.skip.min(bytes.len());
        self.skip -= skipped;
        *bytes = &bytes[skipped..];
        let header = match (self.filled, bytes.split_first_chunk()) {
            (0, Some((header, rest))) => {
                *bytes = rest;
                *header
            }
            _ => self.assemble(bytes)?,
        };
        let head = Head::parse(header);
        self.skip = head.length;
        Some(head)
    }

    /// A header of which a part came earlier, or comes later.
    fn assemble(&mut self, bytes: &mut &[u8]) -> Option<[u8; HEADER_BYTES]> {
        let (piece, rest) = bytes.split_at(bytes.len().min(HEADER_BYTES - self.filled));
        self.partial[self.filled..self.filled + piece.len()].copy_from_slice(piece);
        self.filled += piece.len();
        *bytes = rest;
        if self.filled < HEADER_BYTES {
            return None;
        }
        self.filled = 0;
        Some(std::mem::take(&mut self.partial))
    }
}

/// A bound on events in a span of time that begins with the first of them.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Rate {
    span_ns: u64,
    limit: u64,
    began_ns: u64,
    count: u64,
}

impl Rate {
    fn new(limit: u64, span_ns: u64) -> Self {
        Self { span_ns, limit, began_ns: 0, count: 0 }
    }

    /// Counts an event; whether it is one too many.
    fn exceeds(&mut self, now_ns: u64) -> bool {
        if now_ns.saturating_sub(self.began_ns) >= self.span_ns {
            self.began_ns = now_ns;
            self.count = 0;
        }
        self.count += 1;
        self.count > self.limit
    }
}

/// gRPC's policy on pings (gRFC A8, and gRPC core's reading of it): one that comes sooner after the last than it may is
/// a strike, and HEADERS or DATA in between forgive all. gRPC forgives by what the server sends; what the client sends
/// counts here too, as a client that is sending is no idle one.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Pings {
    max_strikes: u32,
    interval_ns: u64,
    idle_interval_ns: u64,
    strikes: u32,
    last_ns: Option<u64>,
    frames_written: u64,
}

impl Pings {
    fn new(limits: &Limits) -> Self {
        let interval_ns = u64::try_from(limits.min_ping_interval.as_nanos()).unwrap_or(u64::MAX);
        let idle_interval_ns = if limits.permit_without_calls { interval_ns } else { IDLE_PING_NS };
        let max_strikes = limits.max_ping_strikes;
        Self { max_strikes, interval_ns, idle_interval_ns, strikes: 0, last_ns: None, frames_written: 0 }
    }

    fn forgive(&mut self) {
        self.strikes = 0;
        self.last_ns = None;
    }

    /// Counts a ping; whether it is one too many.
    fn exceeds(&mut self, now_ns: u64, traffic: &Traffic) -> bool {
        let frames_written = traffic.frames_written.load(Ordering::Relaxed);
        if frames_written != self.frames_written {
            self.frames_written = frames_written;
            self.forgive();
        }
        let busy = traffic.busy.load(Ordering::Relaxed);
        let interval_ns = if busy { self.interval_ns } else { self.idle_interval_ns };
        let last_ns = self.last_ns.replace(now_ns);
        if last_ns.is_none_or(|last_ns| now_ns.saturating_sub(last_ns) >= interval_ns) {
            return false;
        }
        self.strikes = self.strikes.saturating_add(1);
        self.max_strikes != 0 && self.strikes > self.max_strikes
    }
}

/// WINDOW_UPDATE against what they may answer to: bytes written in this span and the one before.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Updates {
    rate: Rate,
    written_at_begin: u64,
    written_before: u64,
}

impl Updates {
    fn new(limit: u64) -> Self {
        Self { rate: Rate::new(limit, SECOND_NS), written_at_begin: 0, written_before: 0 }
    }

    /// Counts an update; whether it is one too many.
    fn exceeds(&mut self, now_ns: u64, traffic: &Traffic) -> bool {
        let exceeds = self.rate.exceeds(now_ns);
        if self.rate.count == 1 {
            self.written_before = std::mem::replace(&mut self.written_at_begin, traffic.bytes_written());
        }
        exceeds && {
            let written = traffic.bytes_written() - self.written_before;
            self.rate.count > self.rate.limit + written / BYTES_PER_WINDOW_UPDATE
        }
    }
}

/// Judges what a client sends by its frame headers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Scanner {
    heads: Heads,
    pings: Pings,
    settings: Rate,
    resets: Rate,
    max_kept_resets: usize,
    empty_frames: Rate,
    updates: Updates,
    priorities: Rate,
}

impl Scanner {
    /// A scanner for a connection from its first byte.
    pub fn new(limits: &Limits) -> Self {
        Self {
            heads: Heads::after(PREFACE_BYTES),
            pings: Pings::new(limits),
            settings: Rate::new(limits.settings, SETTINGS_SPAN_NS),
            resets: Rate::new(limits.resets, SECOND_NS),
            max_kept_resets: usize::try_from(limits.resets).unwrap_or(usize::MAX),
            empty_frames: Rate::new(limits.empty_frames, SECOND_NS),
            updates: Updates::new(limits.window_updates),
            priorities: Rate::new(limits.priorities, SECOND_NS),
        }
    }

    /// Reads on, at a time since the connection began; resets and a verdict go to `traffic`.
    pub fn scan(&mut self, mut bytes: &[u8], now_ns: u64, traffic: &Traffic) {
        while let Some(head) = self.heads.next(&mut bytes) {
            if let Some(flood) = self.weigh(head, now_ns, traffic) {
                traffic.judge(flood);
            }
        }
    }

    /// Counts a frame; gives what it is one too many of.
    fn weigh(&mut self, head: Head, now_ns: u64, traffic: &Traffic) -> Option<Flood> {
        let flagged = head.flags & FIRST_FLAG != 0;
        let (exceeds, flood) = match head.kind {
            kind::DATA if head.length == 0 && !flagged => (self.empty_frames.exceeds(now_ns), Flood::EmptyFrames),
            kind::DATA | kind::HEADERS => {
                self.pings.forgive();
                return None;
            }
            kind::CONTINUATION if head.length > 0 => return None,
            // h2 refuses an acknowledgement that is not due.
            kind::SETTINGS if flagged => return None,
            kind::SETTINGS => (self.settings.exceeds(now_ns), Flood::Settings),
            kind::RST_STREAM => (self.reset(head.stream, now_ns, traffic), Flood::Resets),
            kind::WINDOW_UPDATE => (self.updates.exceeds(now_ns, traffic), Flood::WindowUpdates),
            kind::PING if !flagged => (self.pings.exceeds(now_ns, traffic), Flood::Pings),
            kind::PRIORITY => (self.priorities.exceeds(now_ns), Flood::Priorities),
            _ => (self.empty_frames.exceeds(now_ns), Flood::EmptyFrames),
        };
        exceeds.then_some(flood)
    }

    /// Keeps the id of a reset; whether there are too many.
    fn reset(&mut self, stream: u32, now_ns: u64, traffic: &Traffic) -> bool {
        let mut kept = traffic.resets();
        if kept.len() >= self.max_kept_resets {
            return true;
        }
        kept.push(stream);
        self.resets.exceeds(now_ns)
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
    written: Heads,
    goaway: Option<Goaway>,
    traffic: Arc<Traffic>,
}

impl<T> Meter<T> {
    /// A meter for a connection that begins now, and what it counts.
    pub fn new(io: T, limits: Limits) -> (Self, Arc<Traffic>) {
        let traffic = Arc::new(Traffic::new());
        let meter = Self {
            io,
            scanner: Scanner::new(&limits),
            written: Heads::after(0),
            goaway: None,
            traffic: Arc::clone(&traffic),
        };
        (meter, traffic)
    }

    fn note_read(&mut self, bytes: &[u8]) {
        if bytes.is_empty() {
            return;
        }
        let now_ns = self.traffic.now_ns();
        self.traffic.last_read_ns.store(now_ns, Ordering::Relaxed);
        self.traffic.bytes_read.fetch_add(bytes.len() as u64, Ordering::Relaxed);
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

impl<T: AsyncRead + Unpin> AsyncRead for Meter<T> {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        if self.traffic.flood().is_some() {
            return Poll::Pending;
        }
        let before = buffer.filled().len();
        ready!(Pin::new(&mut self.io).poll_read(cx, buffer))?;
        self.note_read(&buffer.filled()[before..]);
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

    use proptest::collection::vec;
    use proptest::prelude::*;
    use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream, duplex};

    use super::*;

    const PREFACE: &[u8; PREFACE_BYTES] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

    const MINUTE_NS: u64 = 60 * SECOND_NS;

    fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
        let [_, a, b, c] = (payload.len() as u32).to_be_bytes();
        [&[a, b, c, kind, flags], &stream.to_be_bytes()[..], payload].concat()
    }

    fn ping() -> Vec<u8> {
        frame(kind::PING, 0, 0, &[0; 8])
    }

    fn goaway(reason: u8) -> Vec<u8> {
        frame(kind::GOAWAY, 0, 0, &[0, 0, 0, 5, 0, 0, 0, reason])
    }

    /// Limits that a test can reach.
    fn small() -> Limits {
        Limits { settings: 3, resets: 3, empty_frames: 3, window_updates: 3, priorities: 3, ..Limits::default() }
    }

    /// A connection after its preface, with a clock of its own.
    struct Connection {
        scanner: Scanner,
        traffic: Traffic,
        now_ns: u64,
    }

    impl Connection {
        fn new(limits: &Limits) -> Self {
            let mut connection = Self { scanner: Scanner::new(limits), traffic: Traffic::new(), now_ns: 0 };
            connection.read(PREFACE);
            connection
        }

        fn read(&mut self, bytes: &[u8]) -> Option<Flood> {
            self.scanner.scan(bytes, self.now_ns, &self.traffic);
            self.traffic.flood()
        }

        /// Reads a frame so many times within one span, and as often again in the next.
        fn read_twice(&mut self, count: usize, frame: &[u8]) -> Option<Flood> {
            self.read(&frame.repeat(count));
            self.now_ns += SETTINGS_SPAN_NS;
            self.read(&frame.repeat(count))
        }
    }

    #[test]
    fn each_kind_of_frame_has_a_bound_in_a_span_of_time() {
        for (frame, flood) in [
            (frame(kind::SETTINGS, 0, 0, &[0; 6]), Flood::Settings),
            (frame(kind::DATA, 0, 1, &[]), Flood::EmptyFrames),
            (frame(kind::CONTINUATION, 0, 1, &[]), Flood::EmptyFrames),
            (frame(kind::PING, 1, 0, &[0; 8]), Flood::EmptyFrames),
            (frame(kind::GOAWAY, 0, 0, &[0; 8]), Flood::EmptyFrames),
            (frame(0xfa, 0, 0, b"unknown"), Flood::EmptyFrames),
            (frame(kind::WINDOW_UPDATE, 0, 1, &[0; 4]), Flood::WindowUpdates),
            (frame(kind::PRIORITY, 0, 1, &[0; 5]), Flood::Priorities),
        ] {
            assert_eq!(Connection::new(&small()).read_twice(3, &frame), None, "{flood}");
            assert_eq!(Connection::new(&small()).read_twice(4, &frame), Some(flood));
        }
    }

    #[test]
    fn frames_that_do_something_are_not_bounded() {
        for frame in [
            frame(kind::DATA, 0, 1, b"data"),
            frame(kind::DATA, 1, 1, &[]),
            frame(kind::HEADERS, 4, 1, &[0; 20]),
            frame(kind::CONTINUATION, 0, 1, b"more headers"),
            frame(kind::SETTINGS, 1, 0, &[]),
        ] {
            assert_eq!(Connection::new(&small()).read(&frame.repeat(100)), None);
        }
    }

    #[test]
    fn the_first_verdict_stays() {
        let mut connection = Connection::new(&small());
        connection.read(&frame(kind::PRIORITY, 0, 1, &[0; 5]).repeat(4));
        assert_eq!(connection.read(&frame(kind::DATA, 0, 1, &[]).repeat(4)), Some(Flood::Priorities));
    }

    #[test]
    fn resets_are_kept_until_they_are_taken() {
        let mut connection = Connection::new(&small());
        let reset = |stream: u32| frame(kind::RST_STREAM, 0, stream, &[0; 4]);
        connection.read(&[reset(1), reset(0x8000_0003)].concat());
        let mut resets = vec![99];
        connection.traffic.take_resets(&mut resets);
        assert_eq!(resets, [99, 1, 3]);
        assert_eq!(connection.read(&reset(5)), None);
        assert_eq!(connection.read(&reset(7)), Some(Flood::Resets));
    }

    #[test]
    fn resets_that_nobody_takes_are_a_flood_too() {
        let mut connection = Connection::new(&small());
        let reset = frame(kind::RST_STREAM, 0, 1, &[0; 4]);
        assert_eq!(connection.read_twice(2, &reset), Some(Flood::Resets));
        let mut resets = Vec::new();
        connection.traffic.take_resets(&mut resets);
        assert_eq!(resets.len(), 3);
    }

    #[test]
    fn pings_that_come_too_early_are_strikes() {
        let mut connection = Connection::new(&Limits::default());
        connection.traffic.set_busy(true);
        for expected in [None, None, None, Some(Flood::Pings)] {
            connection.now_ns += 5 * MINUTE_NS - 1;
            assert_eq!(connection.read(&ping()), expected);
        }
    }

    #[test]
    fn pings_that_come_in_time_are_none() {
        let mut connection = Connection::new(&Limits::default());
        connection.traffic.set_busy(true);
        for _ in 0..100 {
            connection.now_ns += 5 * MINUTE_NS;
            assert_eq!(connection.read(&ping()), None);
        }
    }

    #[test]
    fn a_connection_without_calls_may_ping_every_two_hours_or_as_often_as_is_permitted() {
        for permit_without_calls in [false, true] {
            let mut connection = Connection::new(&Limits { permit_without_calls, ..Limits::default() });
            let mut pings = (0..4).map(|_| {
                connection.now_ns += 5 * MINUTE_NS;
                connection.read(&ping())
            });
            assert_eq!(pings.any(|flood| flood.is_some()), !permit_without_calls);
        }
    }

    #[test]
    fn headers_and_data_of_either_side_forgive_all_strikes() {
        for forgiving in [frame(kind::HEADERS, 4, 1, &[0; 9]), frame(kind::DATA, 0, 1, b"x")] {
            let mut connection = Connection::new(&Limits::default());
            for _ in 0..10 {
                assert_eq!(connection.read(&[ping().repeat(3), forgiving.clone()].concat()), None);
                assert_eq!(connection.read(&ping().repeat(3)), None);
                connection.traffic.frames_written.fetch_add(1, Ordering::Relaxed);
            }
            assert_eq!(connection.read(&ping().repeat(4)), Some(Flood::Pings));
        }
    }

    #[test]
    fn no_strikes_means_any_number_of_pings() {
        let mut connection = Connection::new(&Limits { max_ping_strikes: 0, ..Limits::default() });
        assert_eq!(connection.read(&ping().repeat(1000)), None);
    }

    #[test]
    fn window_updates_are_earned_by_what_is_written_in_this_span_and_the_last() {
        let update = frame(kind::WINDOW_UPDATE, 0, 1, &[0, 0, 0, 1]);
        let mut connection = Connection::new(&small());
        connection.read(&update);
        connection.traffic.bytes_written.store(10 * BYTES_PER_WINDOW_UPDATE, Ordering::Relaxed);
        assert_eq!(connection.read(&update.repeat(12)), None);
        connection.now_ns += SECOND_NS;
        assert_eq!(connection.read(&update.repeat(13)), None);
        connection.now_ns += SECOND_NS;
        assert_eq!(connection.read(&update.repeat(3)), None);
        assert_eq!(connection.read(&update), Some(Flood::WindowUpdates));
    }

    fn any_frame() -> impl Strategy<Value = Vec<u8>> {
        let kind = prop_oneof![8 => 0_u8..10, 1 => any::<u8>()];
        (kind, any::<u8>(), any::<u32>(), vec(any::<u8>(), 0..40))
            .prop_map(|(kind, flags, stream, payload)| frame(kind, flags, stream, &payload))
    }

    proptest! {
        #[test]
        fn any_split_of_any_frames_is_judged_the_same(
            frames in vec(any_frame(), 0..60), sizes in vec(1_usize..60, 1..20),
        ) {
            let limits = Limits { resets: 1000, ..small() };
            let (mut whole, mut pieces) = (Connection::new(&limits), Connection::new(&limits));
            let bytes = frames.concat();
            let (mut rest, mut sizes) = (&bytes[..], sizes.iter().cycle());
            while !rest.is_empty() {
                let (piece, more) = rest.split_at(rest.len().min(*sizes.next().unwrap()));
                pieces.read(piece);
                rest = more;
            }
            prop_assert_eq!(pieces.traffic.flood(), whole.read(&bytes));
            prop_assert_eq!(&pieces.scanner, &whole.scanner);
            prop_assert_eq!(&*pieces.traffic.resets(), &*whole.traffic.resets());
            let resets = frames.iter().filter(|frame| frame[3] == kind::RST_STREAM).count();
            prop_assert_eq!(whole.traffic.resets().len(), resets);
            prop_assert_eq!((whole.scanner.heads.skip, whole.scanner.heads.filled), (0, 0));
        }

        #[test]
        fn no_bytes_make_the_scanner_panic(bytes in vec(any::<u8>(), 0..2000)) {
            let mut connection = Connection::new(&small());
            connection.read(&bytes);
            prop_assert!(connection.traffic.resets().len() <= 3);
        }
    }

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
        assert_eq!((traffic.bytes_read(), traffic.bytes_written()), (40, sent.len() as u64));
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
