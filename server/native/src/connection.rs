//! One connection from its handshakes to its end: HTTP/2, floods, keepalive, age, and peers that make no progress.

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::task::{Context, Poll, Waker};
use std::time::{Duration, Instant};

use bytes::Bytes;
use h2::{Ping, PingPong, Reason};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::Semaphore;
use tokio::time::Sleep;

use crate::answer;
use crate::buffered::{Buffered, Flusher};
use crate::meter::{Limits, Meter};
use crate::options::Options;
use crate::receive;
use crate::shared::{Client, Connection, Counted, End, Item, Shared, lock};
use crate::watching::{WATCH_MAX, Watching};

/// Of one stream: a message of 600 KB arrives without a round trip in its middle, and, as windows are opened again when
/// half of them is used, with no update behind it either.
const STREAM_WINDOW_BYTES: u32 = 2 << 20;

/// Of a whole connection: some large messages at once, and a bound on what one peer makes us buffer.
const CONNECTION_WINDOW_BYTES: u32 = 8 << 20;

/// The largest frame that is taken: large messages come in fewer pieces, and one is what a connection may buffer.
const FRAME_BYTES_MAX: u32 = 256 << 10;

/// While HTTP/2 holds more bytes of answers for a connection, no new requests of it are read.
const UNSENT_BYTES_MAX: usize = 64 << 20;

/// Streams that were reset before they were looked at, beyond which h2 closes the connection. Its default of 20 is
/// less than what an honest client cancels while this thread is busy for a moment; each costs its headers, some 1 KB.
const RESET_BEFORE_ACCEPTED_MAX: usize = 4096;

/// What h2 may spend on frames that nobody has read, 256 bytes for each small one: its default closes connections of
/// honest clients whose streams of small messages wait for their turn.
const UNREAD_FRAMES_BYTES_MAX: usize = 64 << 20;

/// Headers beyond our own limit are refused with gRPC's status, and so many times it by h2, which knows only HTTP's.
const HEADERS_READ_FACTOR: u32 = 4;

/// Streams that h2 remembers for a second after we have reset them: refusals in a drain are of this kind.
const RESETS_REMEMBERED_MAX: usize = 1024;

/// What a client must take in a stall timeout while answers wait for it: more than our control frames make.
const PROGRESS_BYTES_MIN: u64 = 4096;

/// Between our pings once there were `max_pings_without_data`: as in gRPC's C core, fewer, and not none, or a client
/// that vanishes in a long call would not be found out.
const PINGS_APART_WITHOUT_DATA: Duration = Duration::from_secs(60);

/// How long a connection that is being closed may take for its last frames.
const LAST_FRAMES: Duration = Duration::from_secs(1);

/// What the rest of the server may do to a connection.
#[derive(Default)]
pub struct Handle {
    draining: AtomicBool,
    waker: Mutex<Option<Waker>>,
}

impl Handle {
    /// Sends GOAWAY: no new calls, and the end when the open ones are answered.
    pub fn drain(&self) {
        self.draining.store(true, Ordering::Relaxed);
        if let Some(waker) = lock(&self.waker).take() {
            waker.wake();
        }
    }

    fn wait(&self, context: &Context<'_>) {
        let mut waker = lock(&self.waker);
        if !waker.as_ref().is_some_and(|waker| waker.will_wake(context.waker())) {
            *waker = Some(context.waker().clone());
        }
    }
}

/// Serves a connection until it ends; its calls have ended then too.
pub async fn serve<T>(shared: Arc<Shared>, id: u64, client: Client, handle: Arc<Handle>, io: T, handshake: Handshake)
where
    T: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let (io, flusher) = Buffered::new(io, Arc::clone(&shared.spare));
    let (io, traffic) = Meter::new(io, limits(&shared.options));
    let Ok(Ok(http2)) = tokio::time::timeout_at(handshake.until, builder(&shared.options).handshake(io)).await else {
        return; // in vain: nobody is left to tell
    };
    drop(handshake);
    let connection = Arc::new(Connection {
        shared,
        id,
        client: Arc::new(client),
        traffic,
        unsent: AtomicUsize::new(0),
        lender: flusher.lender(),
        inflating: Arc::new(Semaphore::new(1)),
    });
    let mut serving = Serving::new(connection, handle, http2, flusher);
    std::future::poll_fn(|context| serving.poll(context)).await;
}

/// A handshake under way: counted, and until when it may take.
pub struct Handshake {
    pub until: tokio::time::Instant,
    pub _counted: Counted,
}

fn limits(options: &Options) -> Limits {
    Limits {
        max_ping_strikes: options.max_ping_strikes,
        min_ping_interval: options.min_ping_interval,
        permit_without_calls: options.keepalive_permit_without_calls,
        ..Limits::default()
    }
}

fn builder(options: &Options) -> h2::server::Builder {
    let mut builder = h2::server::Builder::new();
    builder
        .initial_window_size(STREAM_WINDOW_BYTES)
        .initial_connection_window_size(CONNECTION_WINDOW_BYTES)
        .max_frame_size(FRAME_BYTES_MAX)
        .max_header_list_size(options.max_header_bytes.saturating_mul(HEADERS_READ_FACTOR))
        .data_frame_budget(UNREAD_FRAMES_BYTES_MAX)
        .max_concurrent_streams(options.max_concurrent_streams)
        .max_pending_accept_reset_streams(RESET_BEFORE_ACCEPTED_MAX)
        .max_concurrent_reset_streams(RESETS_REMEMBERED_MAX)
        .reset_stream_duration(Duration::from_secs(1));
    builder
}

/// A connection that was sent GOAWAY, with time for its calls to end.
#[derive(Clone, Copy)]
struct Going {
    since: Instant,
    until: Option<Instant>,
}

struct Serving<T> {
    connection: Arc<Connection>,
    handle: Arc<Handle>,
    http2: h2::server::Connection<Meter<Buffered<T>>, Bytes>,
    flusher: Flusher<T>,
    pings: Option<PingPong>,
    born: Instant,
    /// When we pinged the client, until it answers.
    pinged: Option<Instant>,
    /// Pings since a frame of ours with HEADERS or DATA, and how many such frames there were then.
    pings_without_data: (u32, u64),
    going: Option<Going>,
    /// When the last frames must be out.
    closing: Option<Instant>,
    /// Since when the client has taken nothing of what is due, and how much it had taken then.
    stalled: Option<(Instant, u64)>,
    timer: Pin<Box<Sleep>>,
    resets: Vec<u32>,
    arrived: Vec<Item>,
    /// How many have arrived in the last turn.
    arrived_last: usize,
    ends: Vec<End>,
    watching: Watching,
}

impl<T: AsyncRead + AsyncWrite + Unpin> Serving<T> {
    fn new(
        connection: Arc<Connection>,
        handle: Arc<Handle>,
        mut http2: h2::server::Connection<Meter<Buffered<T>>, Bytes>,
        flusher: Flusher<T>,
    ) -> Self {
        let pings = http2.ping_pong();
        flusher.gather();
        Self {
            connection,
            handle,
            http2,
            flusher,
            pings,
            born: Instant::now(),
            pinged: None,
            pings_without_data: (0, 0),
            going: None,
            closing: None,
            stalled: None,
            timer: Box::pin(tokio::time::sleep(Duration::ZERO)),
            resets: Vec::new(),
            arrived: Vec::new(),
            arrived_last: 0,
            ends: Vec::new(),
            watching: Watching::default(),
        }
    }

    fn shared(&self) -> &Shared {
        &self.connection.shared
    }

    fn poll(&mut self, context: &mut Context<'_>) -> Poll<()> {
        if self.poll_turn(context) || (self.watch() && self.poll_turn(context)) {
            return Poll::Ready(());
        }
        if self.closing.is_none() && self.connection.traffic.flood().is_some() {
            self.close(Reason::ENHANCE_YOUR_CALM, context);
        }
        if self.going.is_none() && self.handle.draining.load(Ordering::Relaxed) {
            self.go_away(None, context);
        }
        self.connection.traffic.set_busy(self.http2.has_streams());
        self.handle.wait(context);
        if let Poll::Ready(Err(_)) = self.flusher.poll_flush(context) {
            return Poll::Ready(());
        }
        while self.timer.as_mut().poll(context).is_ready() {
            match self.check(Instant::now(), context) {
                Some(next) => self.timer.as_mut().reset(next.into()),
                None => return Poll::Ready(()),
            }
        }
        Poll::Pending
    }

    /// Takes what has come and hands it up; true when the connection is over.
    fn poll_turn(&mut self, context: &mut Context<'_>) -> bool {
        let ended = self.poll_requests(context);
        self.connection.traffic.take_resets(&mut self.resets);
        for stream in self.resets.drain(..) {
            self.connection.shared.leave((self.connection.id, stream));
        }
        self.arrived_last = self.arrived.len();
        if !self.arrived.is_empty() {
            self.connection.shared.inbox.extend(self.arrived.drain(..));
        }
        ended
    }

    /// Watches for the answer when one request has come and no other is in the server; whether it came.
    fn watch(&mut self) -> bool {
        let shared = &*self.connection.shared;
        if self.arrived_last == 0 || !shared.watches {
            return false;
        }
        let alone = self.arrived_last == 1 && lock(&shared.calls).len() == 1;
        if !self.watching.is_due(alone) {
            return false;
        }
        let came = shared.outbox.watch(WATCH_MAX);
        answer::carry_out_all(shared, &mut self.ends);
        self.watching.note(came);
        came
    }

    /// Takes what has come; true when the connection is over.
    fn poll_requests(&mut self, context: &mut Context<'_>) -> bool {
        loop {
            if self.connection.unsent.load(Ordering::Relaxed) > UNSENT_BYTES_MAX {
                // The client sends requests and does not take the answers: first things first.
                match self.http2.poll_closed(context) {
                    Poll::Ready(_) => return true,
                    Poll::Pending if self.connection.unsent.load(Ordering::Relaxed) > UNSENT_BYTES_MAX => {
                        return false;
                    }
                    Poll::Pending => {}
                }
            }
            match self.http2.poll_accept(context) {
                Poll::Ready(Some(Ok((request, response)))) => {
                    let item = receive::open(&self.connection, request, response);
                    self.arrived.extend(item);
                }
                // An error of the connection: h2 has sent its GOAWAY by now, or there is nobody to send it to.
                Poll::Ready(Some(Err(_)) | None) => return true,
                Poll::Pending => return false,
            }
        }
    }

    /// Lets open calls end, for `grace` at most, and takes no new ones.
    fn go_away(&mut self, grace: Option<Duration>, context: &Context<'_>) {
        let since = Instant::now();
        self.going = Some(Going { since, until: grace.map(|grace| since + grace) });
        self.http2.graceful_shutdown();
        context.waker().wake_by_ref();
    }

    fn close(&mut self, reason: Reason, context: &Context<'_>) {
        self.closing = Some(Instant::now() + LAST_FRAMES);
        self.http2.abrupt_shutdown(reason);
        context.waker().wake_by_ref();
    }

    /// Looks at the clocks of the connection. Gives when to look again; None: close it now.
    fn check(&mut self, now: Instant, context: &mut Context<'_>) -> Option<Instant> {
        let options = &self.connection.shared.options;
        let mut next = now + options.stall_timeout.min(options.keepalive_time);
        if let Some(closing) = self.closing {
            return (now < closing).then_some(closing);
        }
        if let Some(until) = self.check_age(now, context) {
            if now >= until {
                self.close(Reason::NO_ERROR, context);
                return self.closing;
            }
            next = next.min(until);
        }
        if let Some(stalled) = self.check_progress(now) {
            if now >= stalled {
                self.close(Reason::ENHANCE_YOUR_CALM, context);
                return self.closing;
            }
            next = next.min(stalled);
        }
        Some(next.min(self.check_alive(now, context)?))
    }

    /// When the connection comes of age; from then on, by when it must have ended.
    fn check_age(&mut self, now: Instant, context: &Context<'_>) -> Option<Instant> {
        let options = &self.connection.shared.options;
        let (age, grace, timeout) =
            (options.max_connection_age, options.max_connection_age_grace, options.keepalive_timeout);
        if self.going.is_none() {
            let of_age = self.born + age?;
            if now < of_age {
                return Some(of_age);
            }
            self.go_away(grace, context);
        }
        let Going { since, until } = self.going?;
        // HTTP/2 ends an idle connection once the client has answered a PING, which one that has vanished never does.
        let idle = (!self.http2.has_streams()).then(|| since + timeout);
        [until, idle].into_iter().flatten().min()
    }

    /// By when the client must have taken some of what is due to it.
    fn check_progress(&mut self, now: Instant) -> Option<Instant> {
        if self.connection.unsent.load(Ordering::Relaxed) == 0 {
            self.stalled = None;
            return None;
        }
        let taken = self.flusher.sent();
        match self.stalled {
            Some((_, before)) if taken - before < PROGRESS_BYTES_MIN => {}
            _ => self.stalled = Some((now, taken)),
        }
        self.stalled.map(|(since, _)| since + self.shared().options.stall_timeout)
    }

    /// Pings a client that is silent. Gives when to look again; None: it did not answer.
    fn check_alive(&mut self, now: Instant, context: &mut Context<'_>) -> Option<Instant> {
        let Self { http2, pings, pinged, pings_without_data, connection, .. } = self;
        let options = &connection.shared.options;
        let heard = connection.traffic.last_read();
        if pinged.is_some_and(|at| heard > at) {
            *pinged = None;
        }
        if let Some(at) = *pinged {
            let until = at + options.keepalive_timeout;
            return (now < until).then_some(until);
        }
        let due = heard + options.keepalive_time;
        if now < due {
            return Some(due);
        }
        let Some(pings) = pings else {
            return Some(now + options.keepalive_time);
        };
        if !(options.keepalive_permit_without_calls || http2.has_streams()) {
            return Some(now + options.keepalive_time);
        }
        let (sent, frames) = pings_without_data;
        if *frames != connection.traffic.frames_written() {
            (*sent, *frames) = (0, connection.traffic.frames_written());
        }
        let rare = heard + PINGS_APART_WITHOUT_DATA;
        if options.max_pings_without_data > 0 && *sent >= options.max_pings_without_data && now < rare {
            return Some(rare);
        }
        // An answer to the last one that nobody asked for is taken away first.
        drop(pings.poll_pong(context));
        if pings.send_ping(Ping::opaque()).is_ok() {
            *pinged = Some(now);
            *sent += 1;
            context.waker().wake_by_ref();
        }
        Some(now + options.keepalive_timeout)
    }
}

impl<T> Drop for Serving<T> {
    fn drop(&mut self) {
        self.connection.shared.leave_all(self.connection.id);
    }
}
