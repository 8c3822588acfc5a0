//! Finds frame headers in a byte stream and counts what they say against the limits.
//!
//! No socket, no clock: bytes and the time go in, resets and a verdict go to `Traffic`.

use std::sync::atomic::Ordering;

use super::{Flood, Limits, Traffic};

/// "PRI * HTTP/2.0...", which the client sends first; `h2` checks it.
pub const PREFACE_BYTES: usize = 24;

/// Length, type, flags and stream of a frame (RFC 9113, section 4.1).
pub const HEADER_BYTES: usize = 9;

/// Frame types (RFC 9113, section 6).
pub mod kind {
    pub const DATA: u8 = 0;
    pub const HEADERS: u8 = 1;
    pub const PRIORITY: u8 = 2;
    pub const RST_STREAM: u8 = 3;
    pub const SETTINGS: u8 = 4;
    pub const PING: u8 = 6;
    pub const GOAWAY: u8 = 7;
    pub const WINDOW_UPDATE: u8 = 8;
    pub const CONTINUATION: u8 = 9;
    /// None of HTTP/2's: a frame of a kind that is not known is passed over (section 4.1).
    pub const UNKNOWN: u8 = 0xff;
}

/// Where the kind stands in a header.
const KIND_AT: usize = 3;

/// What a PING has with it.
const PING_BYTES: usize = 8;

/// The PING behind h2's first GOAWAY of a graceful shutdown. When it comes back, h2 takes no streams any more.
pub const SHUTDOWN_PING: [u8; PING_BYTES] = [0x0b, 0x7b, 0xa2, 0xf0, 0x8b, 0x9b, 0xfe, 0x54];

/// ACK of SETTINGS and PING, END_STREAM of DATA.
const FIRST_FLAG: u8 = 1;

const SECOND_NS: u64 = 1_000_000_000;

/// Time between pings on a connection without calls that may not be kept alive: gRPC takes TCP's keep-alive time.
const IDLE_PING_NS: u64 = 2 * 3600 * SECOND_NS;

/// The span of the bound on SETTINGS.
const SETTINGS_SPAN_NS: u64 = 10 * SECOND_NS;

/// Bytes written that earn one WINDOW_UPDATE more: a client that reads single bytes gets each in a frame of ten bytes,
/// and gives it back to its stream and to the connection.
const BYTES_PER_WINDOW_UPDATE: u64 = 4;

/// The header of a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Head {
    pub length: usize,
    pub kind: u8,
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
pub struct Heads {
    /// Bytes to pass over before the next header: the preface, or a payload.
    skip: usize,
    partial: [u8; HEADER_BYTES],
    filled: usize,
}

impl Heads {
    pub fn after(skip: usize) -> Self {
        Self { skip, partial: [0; HEADER_BYTES], filled: 0 }
    }

    /// Takes bytes up to the end of the next header, or all; gives the header.
    pub fn next(&mut self, bytes: &mut &[u8]) -> Option<Head> {
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

/// Whether h2 has heard that its client knows of the shutdown, and takes no streams any more.
///
/// A client may have begun some all the same: gRPC's C core sends them along with that very answer. h2 passes over
/// their HEADERS and DATA, but takes a WINDOW_UPDATE for one of a stream that never was: a connection error, in which
/// every call that it still had is lost.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct LastStream {
    /// The highest stream so far; the last one that h2 knows once this is settled.
    stream: u32,
    settled: bool,
    /// How much of the answer to the shutdown's PING has come.
    matched: Option<usize>,
}

impl LastStream {
    fn note(&mut self, head: Head) {
        match head.kind {
            kind::HEADERS if !self.settled => self.stream = self.stream.max(head.stream),
            kind::PING if head.flags & FIRST_FLAG != 0 && head.length == PING_BYTES => self.matched = Some(0),
            _ => {}
        }
    }

    /// Looks at what follows the head of a PING, of which more may come.
    fn match_payload(&mut self, bytes: &[u8]) {
        let Some(matched) = self.matched else {
            return;
        };
        let expected = &SHUTDOWN_PING[matched..];
        let count = expected.len().min(bytes.len());
        let same = bytes[..count] == expected[..count];
        self.matched = (same && count < expected.len()).then_some(matched + count);
        self.settled |= same && count == expected.len();
    }

    fn is_unknown(&self, head: Head) -> bool {
        self.settled && head.kind == kind::WINDOW_UPDATE && head.stream > self.stream
    }
}

/// Judges what a client sends by its frame headers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Scanner {
    heads: Heads,
    last_stream: LastStream,
    pings: Pings,
    settings: Rate,
    resets: Rate,
    max_kept_resets: usize,
    last_is_reset: bool,
    empty_frames: Rate,
    updates: Updates,
    priorities: Rate,
}

impl Scanner {
    /// A scanner for a connection from its first byte.
    pub fn new(limits: &Limits) -> Self {
        Self {
            heads: Heads::after(PREFACE_BYTES),
            last_stream: LastStream::default(),
            pings: Pings::new(limits),
            settings: Rate::new(limits.settings, SETTINGS_SPAN_NS),
            resets: Rate::new(limits.resets, SECOND_NS),
            max_kept_resets: usize::try_from(limits.resets).unwrap_or(usize::MAX),
            last_is_reset: false,
            empty_frames: Rate::new(limits.empty_frames, SECOND_NS),
            updates: Updates::new(limits.window_updates),
            priorities: Rate::new(limits.priorities, SECOND_NS),
        }
    }

    /// Reads on, at a time since the connection began; resets and a verdict go to `traffic`.
    ///
    /// A frame that h2 must not see is made one of no known kind; `reads_apart` says from when on the bytes that are
    /// given must not begin inside a header.
    pub fn scan(&mut self, bytes: &mut [u8], now_ns: u64, traffic: &Traffic) {
        let mut at = 0;
        self.last_stream.match_payload(bytes);
        loop {
            let mut rest = &bytes[at..];
            let Some(head) = self.heads.next(&mut rest) else {
                return;
            };
            self.last_stream.note(head);
            self.last_stream.match_payload(rest);
            at = bytes.len() - rest.len();
            self.last_is_reset = head.kind == kind::RST_STREAM;
            if let Some(flood) = self.weigh(head, now_ns, traffic) {
                traffic.judge(flood);
            }
            if self.last_stream.is_unknown(head) && at >= HEADER_BYTES {
                bytes[at - HEADER_BYTES + KIND_AT] = kind::UNKNOWN;
            }
        }
    }

    /// Whether headers may have to be changed, so that they are to be read one by one.
    pub fn reads_apart(&self) -> bool {
        self.last_stream.settled
    }

    /// What is missing of a payload.
    pub fn payload_left(&self) -> usize {
        self.heads.skip
    }

    /// Forgets the beginning of a header at the end of what was scanned, which will be scanned again; gives its length.
    pub fn take_cut(&mut self) -> usize {
        std::mem::take(&mut self.heads.filled)
    }

    /// Lets resets be taken which HTTP/2 has dealt with: all, but for one whose payload is still to come.
    pub fn settle_resets(&self, traffic: &Traffic) {
        let mut resets = traffic.resets();
        resets.known = resets.streams.len() - usize::from(self.last_is_reset && self.heads.skip > 0);
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
        if kept.streams.len() >= self.max_kept_resets {
            return true;
        }
        kept.streams.push(stream);
        self.resets.exceeds(now_ns)
    }
}

#[cfg(test)]
pub mod tests {
    use proptest::collection::vec;
    use proptest::prelude::*;

    use super::*;

    pub const PREFACE: &[u8; PREFACE_BYTES] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

    const MINUTE_NS: u64 = 60 * SECOND_NS;

    pub fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
        let [_, a, b, c] = (payload.len() as u32).to_be_bytes();
        [&[a, b, c, kind, flags], &stream.to_be_bytes()[..], payload].concat()
    }

    pub fn ping() -> Vec<u8> {
        frame(kind::PING, 0, 0, &[0; 8])
    }

    pub fn goaway(reason: u8) -> Vec<u8> {
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
            self.scanner.scan(&mut bytes.to_vec(), self.now_ns, &self.traffic);
            self.traffic.flood()
        }

        /// Takes resets when HTTP/2 reads on.
        fn take_resets(&self, into: &mut Vec<u32>) {
            self.scanner.settle_resets(&self.traffic);
            self.traffic.take_resets(into);
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
            assert_eq!(Connection::new(&small()).read_twice(3, &frame), None, "{flood:?}");
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
        connection.take_resets(&mut resets);
        assert_eq!(resets, [99, 1, 3]);
        assert_eq!(connection.read(&reset(5)), None);
        assert_eq!(connection.read(&reset(7)), Some(Flood::Resets));
    }

    #[test]
    fn a_reset_is_told_when_http2_has_read_its_payload_and_looked_at_it() {
        let mut connection = Connection::new(&small());
        let frames = [frame(kind::RST_STREAM, 0, 1, &[0; 4]), frame(kind::RST_STREAM, 0, 3, &[0; 4])].concat();
        let mut resets = Vec::new();
        connection.read(&frames[..24]);
        connection.traffic.take_resets(&mut resets);
        assert!(resets.is_empty());
        connection.take_resets(&mut resets);
        assert_eq!(resets, [1]);
        connection.read(&frames[24..]);
        connection.take_resets(&mut resets);
        assert_eq!(resets, [1, 3]);
    }

    #[test]
    fn resets_that_nobody_takes_are_a_flood_too() {
        let mut connection = Connection::new(&small());
        let reset = frame(kind::RST_STREAM, 0, 1, &[0; 4]);
        assert_eq!(connection.read_twice(2, &reset), Some(Flood::Resets));
        let mut resets = Vec::new();
        connection.take_resets(&mut resets);
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
            prop_assert_eq!(&pieces.traffic.resets().streams, &whole.traffic.resets().streams);
            let resets = frames.iter().filter(|frame| frame[3] == kind::RST_STREAM).count();
            prop_assert_eq!(whole.traffic.resets().streams.len(), resets);
            prop_assert_eq!((whole.scanner.heads.skip, whole.scanner.heads.filled), (0, 0));
        }

        #[test]
        fn no_bytes_make_the_scanner_panic(bytes in vec(any::<u8>(), 0..2000)) {
            let mut connection = Connection::new(&small());
            connection.read(&bytes);
            prop_assert!(connection.traffic.resets().streams.len() <= 3);
        }
    }
}
