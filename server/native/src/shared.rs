//! Where the transport's thread and Python's threads meet: calls go up through the inbox, answers down by the outbox.
//!
//! | lock | taken by | held for |
//! |---|---|---|
//! | `Inbox.queue` | both | moving items |
//! | `Outbox.ends` | both | moving items |
//! | `Shared.calls` | the transport's thread only | finding a call |
//! | `CallState.on_cancel`, `Turn.on_cancel`, `StreamState.object` | Python's threads only | a swap |
//! | `StreamState.turns` | Python's threads only | noting an answer; `Outbox.ends` is taken inside, as answers leave in order |
//! | `Deadlines.heap` | the transport's thread only | adding and removing; `Shared.calls` may be taken inside |
//!
//! No other is held while another is taken, and none while Python runs, or while a Python object is dropped.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, HashMap, VecDeque};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, Thread};
use std::time::{Duration, Instant};

use bytes::Bytes;
use h2::SendStream;
use h2::server::SendResponse;
use http::HeaderMap;
use pyo3::prelude::*;
use tokio::sync::{Notify, Semaphore};

use crate::buffered::{Lender, Spare};
use crate::compression::Encoding;
use crate::meter::Traffic;
use crate::options::Options;
use crate::turns::Turns;

/// gRPC's status codes are 0 to 16.
pub const CODES: usize = 17;

/// A connection and one of its streams; connections are never numbered twice.
pub type Key = (u64, u32);

/// The gRPC status codes that the transport itself answers with.
pub mod code {
    pub const OK: u32 = 0;
    pub const CANCELLED: u32 = 1;
    pub const DEADLINE_EXCEEDED: u32 = 4;
    pub const RESOURCE_EXHAUSTED: u32 = 8;
    pub const UNIMPLEMENTED: u32 = 12;
    pub const INTERNAL: u32 = 13;
    pub const UNAVAILABLE: u32 = 14;
}

/// Locks, whatever a thread that panicked left behind: every critical section here is a plain move.
pub fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// An RPC that is served: its `:path`, and whether it streams.
pub struct Method {
    pub path: String,
    pub streams: bool,
    pub outcomes: [AtomicU64; CODES],
}

/// One server's common state.
pub struct Shared {
    pub options: Options,
    pub methods: Vec<Method>,
    pub paths: HashMap<String, usize>,
    pub clock: Clock,
    /// Python's function that cuts a status message to what fits into a header.
    pub fit_message: Py<PyAny>,
    pub inbox: Inbox,
    pub outbox: Outbox,
    /// Calls that were handed up, or are about to be, and have not ended.
    pub calls: Mutex<HashMap<Key, Open>>,
    pub deadlines: Deadlines,
    pub gauges: Gauges,
    /// Buffers for whichever connection needs one.
    pub spare: Arc<Spare>,
    /// Whether there is a core for Python while the transport's thread watches for its answer.
    pub watches: bool,
    pub draining: AtomicBool,
    /// Told whenever a call ends or a connection closes while the server drains.
    pub quieter: Notify,
}

/// What the server holds at the moment.
#[derive(Default)]
pub struct Gauges {
    pub handshakes: Arc<AtomicUsize>,
    pub connections: Arc<AtomicUsize>,
    /// Messages that have begun and are not complete, and streams that are read.
    pub reading: Arc<AtomicUsize>,
    /// Bytes of messages, complete or not, that are in memory.
    pub held_bytes: Arc<AtomicUsize>,
}

/// Counts something for as long as it lives.
pub struct Counted(Arc<AtomicUsize>);

impl Counted {
    pub fn new(gauge: &Arc<AtomicUsize>) -> Self {
        gauge.fetch_add(1, Ordering::Relaxed);
        Self(Arc::clone(gauge))
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

/// Bytes of a message that are counted as held while this lives.
pub struct Held {
    gauge: Arc<AtomicUsize>,
    bytes: usize,
}

impl Held {
    pub fn new(gauge: &Arc<AtomicUsize>) -> Self {
        Self { gauge: Arc::clone(gauge), bytes: 0 }
    }

    /// Adds bytes; gives what all messages hold together.
    pub fn grow(&mut self, bytes: usize) -> usize {
        self.bytes += bytes;
        self.gauge.fetch_add(bytes, Ordering::Relaxed) + bytes
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        self.gauge.fetch_sub(self.bytes, Ordering::Relaxed);
    }
}

/// Python's monotonic clock, by an instant that both have seen.
#[derive(Clone, Copy)]
pub struct Clock {
    origin: Instant,
    origin_ns: i64,
}

/// The deadline of a call without one: `sluice_batching.NO_DEADLINE`.
pub const NO_DEADLINE_NS: i64 = i64::MAX;

impl Clock {
    pub fn new(now_ns: i64) -> Self {
        Self { origin: Instant::now(), origin_ns: now_ns }
    }

    pub fn deadline_ns(&self, call: &CallState) -> i64 {
        call.deadline().map_or(NO_DEADLINE_NS, |deadline| self.ns(deadline))
    }

    pub fn ns(&self, instant: Instant) -> i64 {
        let since = instant.saturating_duration_since(self.origin);
        self.origin_ns.saturating_add(i64::try_from(since.as_nanos()).unwrap_or(i64::MAX))
    }
}

/// Who is at the other end of a connection.
pub struct Client {
    pub address: String,
    /// The names in its certificate, when it showed one.
    pub names: Vec<String>,
    /// Process, user and group of a client on a Unix socket.
    pub credentials: Option<(i32, u32, u32)>,
}

/// One RPC from its headers to its end.
pub struct CallState {
    pub key: Key,
    pub method: usize,
    pub headers: HeaderMap,
    pub client: Arc<Client>,
    /// When its headers came: from then on its timeout counts.
    pub opened: Instant,
    pub timeout: Option<Duration>,
    /// How messages to this client are compressed.
    pub compression: Encoding,
    /// Set by the transport when the client is gone: what has not been handed up yet never is.
    pub left: AtomicBool,
    /// Set by Python when it ends the call: nothing more of it goes up.
    pub ended: AtomicBool,
    pub on_cancel: Mutex<Option<Py<PyAny>>>,
    pub stream: Option<StreamState>,
}

/// What only a stream has.
pub struct StreamState {
    /// Room for further messages of the client; closed when the stream has ended.
    pub credit: Arc<Semaphore>,
    /// Told when the stream has ended, for the task that reads it.
    pub over: Notify,
    /// The one Python object of the stream, while it is open.
    pub object: Mutex<Option<Py<crate::call::Stream>>>,
    /// The requests that are to be answered in their order.
    pub turns: Mutex<Turns<Body, Status, Arc<Turn>>>,
}

/// One request of a stream, until it is answered.
#[derive(Default)]
pub struct Turn {
    pub on_cancel: Mutex<Option<Py<PyAny>>>,
}

impl StreamState {
    pub fn new(ahead: usize) -> Self {
        Self {
            credit: Arc::new(Semaphore::new(ahead)),
            over: Notify::new(),
            object: Mutex::new(None),
            turns: Mutex::default(),
        }
    }
}

/// Empties a cell; what was in it is dropped after the lock is let go, as that may run any Python code.
pub fn empty<T>(cell: &Mutex<Option<T>>) -> Option<T> {
    lock(cell).take()
}

impl CallState {
    /// Whether nothing of it may go up any more.
    pub fn is_over(&self) -> bool {
        self.left.load(Ordering::Acquire) || self.ended.load(Ordering::Acquire)
    }

    /// Lets the task that reads a stream end.
    pub fn end_reading(&self) {
        if let Some(stream) = &self.stream {
            stream.credit.close();
            stream.over.notify_one();
        }
    }

    pub fn deadline(&self) -> Option<Instant> {
        self.timeout.and_then(|timeout| self.opened.checked_add(timeout))
    }
}

/// A connection as its calls see it.
pub struct Connection {
    pub shared: Arc<Shared>,
    pub id: u64,
    pub client: Arc<Client>,
    pub traffic: Arc<Traffic>,
    /// Bytes of answers that HTTP/2 holds: handed over, and neither written nor dropped.
    pub unsent: AtomicUsize,
    /// Told of answers that are to be written from where they are.
    pub lender: Lender,
    /// One permit: who has it may have a message decompressed on another thread. The others of the connection wait
    /// here, and not in the queue for those threads, which has place for every connection.
    pub inflating: Arc<Semaphore>,
}

/// How an open call is answered.
pub struct Open {
    pub call: Arc<CallState>,
    pub answer: Answer,
    pub connection: Arc<Connection>,
}

pub enum Answer {
    /// Nothing was sent yet.
    Response(SendResponse<Bytes>),
    /// A stream whose headers are out.
    Messages(SendStream<Bytes>),
}

/// What goes up to Python.
pub enum Item {
    /// A unary call, or one message of a stream; None: the client has half-closed.
    Call { call: Arc<CallState>, message: Option<Bytes>, received: Instant, held: Held },
    /// The client of a call that was handed up is gone.
    Left(Arc<CallState>),
    /// Something that the operator should read.
    Notice(String),
    /// A Python buffer that is not needed any more: only Python's threads may release it.
    Release(pyo3_bytes::PyBytes),
}

#[derive(Default)]
struct InboxQueue {
    items: VecDeque<Item>,
    /// Threads that wait; the last one goes first, as its memory is the warmest.
    waiting: Vec<Thread>,
    /// One was woken, and is on its way.
    woken: bool,
    /// A thread has taken items and not let go yet: only then may the next one take.
    led: bool,
    closed: bool,
}

/// What has arrived, for several threads that take it in turns.
#[derive(Default)]
pub struct Inbox {
    queue: Mutex<InboxQueue>,
}

impl Inbox {
    pub fn push(&self, item: Item) {
        self.extend([item]);
    }

    /// Adds items with one wake-up for all of them.
    pub fn extend(&self, items: impl IntoIterator<Item = Item>) {
        let mut queue = lock(&self.queue);
        queue.items.extend(items);
        self.wake(queue);
    }

    /// Waits for items and moves up to `max` of them; gives how many other threads wait, or None when no item will
    /// come any more. The caller leads until it takes again, then with `leads`, or calls `release`.
    pub fn take(&self, max: usize, leads: bool, into: &mut Vec<Item>) -> Option<usize> {
        let mut queue = lock(&self.queue);
        if leads {
            queue.led = false;
        }
        while queue.led || queue.items.is_empty() {
            if queue.closed && queue.items.is_empty() {
                return None;
            }
            queue = self.wait(queue);
        }
        queue.led = true;
        let count = queue.items.len().min(max);
        into.extend(queue.items.drain(..count));
        Some(queue.waiting.len())
    }

    /// Lets another thread take what comes next.
    pub fn release(&self) {
        let mut queue = lock(&self.queue);
        queue.led = false;
        self.wake(queue);
    }

    fn wait<'a>(&'a self, mut queue: MutexGuard<'a, InboxQueue>) -> MutexGuard<'a, InboxQueue> {
        let me = thread::current();
        let id = me.id();
        queue.waiting.push(me);
        // A thread may wake for no reason: it was woken when it is not among those that wait any more.
        while queue.waiting.iter().any(|waiting| waiting.id() == id) {
            drop(queue);
            thread::park();
            queue = lock(&self.queue);
        }
        queue.woken = false;
        queue
    }

    fn wake(&self, mut queue: MutexGuard<'_, InboxQueue>) {
        if queue.woken || queue.led || queue.items.is_empty() {
            return;
        }
        if let Some(thread) = queue.waiting.pop() {
            queue.woken = true;
            drop(queue);
            thread.unpark();
        }
    }

    pub fn close(&self) {
        let mut queue = lock(&self.queue);
        queue.closed = true;
        for thread in queue.waiting.drain(..) {
            thread.unpark();
        }
    }
}

/// A message as HTTP/2 gets it: behind its gRPC prefix, in one piece or several.
pub enum Body {
    One(Bytes),
    Many(Vec<Bytes>),
}

/// Metadata that goes with a status; None mostly.
pub type Trailers = Option<Box<HeaderMap>>;

/// How a call ends.
pub struct Status {
    pub code: u32,
    pub message: String,
    pub trailers: Trailers,
}

impl Status {
    pub fn new(code: u32, message: String) -> Self {
        Self { code, message, trailers: None }
    }
}

/// What comes down from Python.
pub enum End {
    /// The one answer of a unary call.
    Reply(Key, Body),
    /// One message of a stream.
    Send(Key, Body),
    /// A status, and the end of the call or the stream.
    Finish(Key, Status),
}

/// Answers on their way to the transport's thread; the first of several wakes it.
#[derive(Default)]
pub struct Outbox {
    ends: Mutex<Vec<End>>,
    is_filled: AtomicBool,
    wake_up_is_due: AtomicBool,
    pub filled: Notify,
}

impl Outbox {
    pub fn push(&self, end: End) {
        let mut ends = lock(&self.ends);
        ends.push(end);
        self.is_filled.store(true, Ordering::Release);
        drop(ends);
        if !self.wake_up_is_due.swap(true, Ordering::AcqRel) {
            self.filled.notify_one();
        }
    }

    pub fn drain(&self, into: &mut Vec<End>) {
        // Cleared first: an end that is pushed from here on makes a wake-up of its own.
        self.wake_up_is_due.store(false, Ordering::SeqCst);
        let mut ends = lock(&self.ends);
        self.is_filled.store(false, Ordering::Relaxed);
        into.append(&mut ends);
    }

    /// Watches for an end, for this long at most, and whoever brings it need not wake the transport's thread; whether
    /// one came. `drain` is to follow in any case: an end that comes last of all makes no wake-up either.
    pub fn watch(&self, at_most: Duration) -> bool {
        self.wake_up_is_due.store(true, Ordering::SeqCst);
        let began = Instant::now();
        while !self.is_filled.load(Ordering::Acquire) {
            if began.elapsed() >= at_most {
                return false;
            }
            // Whoever wants this core, the thread that is waited for most of all, has it.
            thread::yield_now();
        }
        true
    }
}

/// When calls are to be ended for being late; entries of calls that have ended stay until they are due or too many.
#[derive(Default)]
pub struct Deadlines {
    heap: Mutex<BinaryHeap<Reverse<(Instant, Key)>>>,
    /// Told when there is an earlier one.
    pub earlier: Notify,
}

/// Entries of ended calls that are kept without counting the open ones.
const STALE_MAX: usize = 1024;

impl Deadlines {
    fn push(&self, deadline: Instant, key: Key, open: usize, is_open: impl Fn(&Key) -> bool) {
        let mut heap = lock(&self.heap);
        let earlier = heap.peek().is_none_or(|Reverse((first, _))| deadline < *first);
        heap.push(Reverse((deadline, key)));
        if heap.len() > 2 * open + STALE_MAX {
            heap.retain(|Reverse((_, key))| is_open(key));
        }
        drop(heap);
        if earlier {
            self.earlier.notify_one();
        }
    }

    /// The calls whose deadline has come, and the next deadline.
    pub fn due(&self, now: Instant, into: &mut Vec<Key>) -> Option<Instant> {
        let mut heap = lock(&self.heap);
        while let Some(Reverse((deadline, key))) = heap.peek() {
            if *deadline > now {
                return Some(*deadline);
            }
            into.push(*key);
            heap.pop();
        }
        None
    }
}

impl Shared {
    /// Counts the end of a call.
    pub fn count(&self, method: usize, code: u32) {
        if let Some(counter) = self.methods[method].outcomes.get(code as usize) {
            counter.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Ends a call whose client is gone; nothing when it has ended already.
    pub fn leave(&self, key: Key) {
        let open = lock(&self.calls).remove(&key);
        if let Some(open) = open {
            self.count(open.call.method, code_of_leaving(open.call.opened, open.call.timeout, Instant::now()));
            self.closed(open.call);
        }
    }

    /// Ends every call of a connection that is gone.
    pub fn leave_all(&self, connection: u64) {
        let gone: Vec<Open> = {
            let mut calls = lock(&self.calls);
            let keys: Vec<Key> = calls.keys().filter(|key| key.0 == connection).copied().collect();
            keys.iter().filter_map(|key| calls.remove(key)).collect()
        };
        let now = Instant::now();
        for open in gone {
            self.count(open.call.method, code_of_leaving(open.call.opened, open.call.timeout, now));
            self.closed(open.call);
        }
    }

    /// Makes a call known, before it is handed up.
    pub fn register(&self, open: Open) {
        let key = open.call.key;
        let deadline = open.call.deadline();
        let mut calls = lock(&self.calls);
        calls.insert(key, open);
        let count = calls.len();
        drop(calls);
        if let Some(deadline) = deadline {
            self.deadlines.push(deadline, key, count, |key| lock(&self.calls).contains_key(key));
        }
    }

    /// Tells Python that a call is over without its doing.
    pub fn closed(&self, call: Arc<CallState>) {
        call.left.store(true, Ordering::Release);
        call.end_reading();
        self.inbox.push(Item::Left(call));
        self.grew_quieter();
    }

    /// Lets a drain look again.
    pub fn grew_quieter(&self) {
        if self.draining.load(Ordering::Relaxed) {
            self.quieter.notify_one();
        }
    }
}

/// gRPC sends a timeout in up to eight digits, and clients round it: theirs may end up to a hundredth earlier.
const CLIENT_ROUNDING: u32 = 100;

/// Both sides count deadlines in whole milliseconds, each with its own rounding.
const CLIENT_EARLY: Duration = Duration::from_millis(2);

/// Why a client left: its time was up by its own clock, or it chose to; as `transport/call.py` has it.
pub fn code_of_leaving(opened: Instant, timeout: Option<Duration>, now: Instant) -> u32 {
    match timeout {
        Some(timeout) if now + CLIENT_EARLY + timeout / CLIENT_ROUNDING >= opened + timeout => code::DEADLINE_EXCEEDED,
        _ => code::CANCELLED,
    }
}

#[cfg(test)]
mod tests {
    use std::pin::pin;
    use std::task::{Context, Waker};

    use super::*;

    fn end() -> End {
        End::Finish((1, 1), Status::new(code::OK, String::new()))
    }

    fn drained(outbox: &Outbox) -> usize {
        let mut ends = Vec::new();
        outbox.drain(&mut ends);
        ends.len()
    }

    /// Whether the transport's thread was to be woken since the last time.
    fn was_to_wake(outbox: &Outbox) -> bool {
        pin!(outbox.filled.notified()).poll(&mut Context::from_waker(Waker::noop())).is_ready()
    }

    #[test]
    fn an_end_that_is_watched_for_wakes_nobody() {
        let outbox = Outbox::default();
        thread::scope(|scope| {
            scope.spawn(|| {
                while !outbox.wake_up_is_due.load(Ordering::SeqCst) {
                    thread::yield_now();
                }
                outbox.push(end());
            });
            assert!(outbox.watch(Duration::MAX));
        });
        assert_eq!((drained(&outbox), was_to_wake(&outbox)), (1, false));
    }

    #[test]
    fn an_end_behind_a_watch_in_vain_is_drained_or_wakes() {
        let outbox = Outbox::default();
        assert!(!outbox.watch(Duration::ZERO));
        outbox.push(end());
        assert_eq!((was_to_wake(&outbox), drained(&outbox)), (false, 1));
        outbox.push(end());
        assert_eq!((was_to_wake(&outbox), drained(&outbox)), (true, 1));
    }
}
