//! The server as Python has it: started and stopped once, and asked for what has arrived by one thread.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use pyo3::exceptions::{PyRuntimeError, PyValueError};
use pyo3::prelude::*;
use pyo3::types::{PyDict, PyList, PyString};
use tokio::sync::{Notify, oneshot};

use crate::call::{Call, callbacks, forget_object};
use crate::options::Options;
use crate::runtime::{Bound as BoundServer, StartError};
use crate::shared::{CODES, Clock, Deadlines, Gauges, Inbox, Item, Method, Outbox, Shared, empty, lock};

/// What one `take` gives: calls, the callbacks of calls whose clients are gone, news for the log, and how many other
/// threads wait to take.
type Taken<'py> = (Bound<'py, PyList>, Vec<Py<PyAny>>, Vec<String>, usize);

/// One listening server.
#[pyclass(frozen, module = "sluice_native")]
pub struct Server {
    shared: Arc<Shared>,
    paths: Vec<Py<PyString>>,
    running: Mutex<Option<Running>>,
}

struct Running {
    thread: JoinHandle<()>,
    stop: oneshot::Sender<Duration>,
}

/// Lets the thread that takes calls end, however the transport's thread does.
struct ClosesInbox(Arc<Shared>);

impl Drop for ClosesInbox {
    fn drop(&mut self) {
        self.0.inbox.close();
    }
}

#[pymethods]
impl Server {
    /// `options` is a TransportOptions, `methods` the path of every RPC and whether it streams.
    #[new]
    #[pyo3(signature = (options, methods, *, now_ns, max_held_bytes, stream_ahead, fit_message))]
    fn new(
        py: Python<'_>,
        options: &Bound<'_, PyAny>,
        methods: Vec<(String, bool)>,
        now_ns: i64,
        max_held_bytes: usize,
        stream_ahead: usize,
        fit_message: Py<PyAny>,
    ) -> PyResult<Self> {
        let clock = Clock::new(now_ns);
        let paths: HashMap<String, usize> =
            methods.iter().enumerate().map(|(index, (path, _))| (path.clone(), index)).collect();
        let names = methods.iter().map(|(path, _)| PyString::intern(py, path).unbind()).collect();
        let methods = methods
            .into_iter()
            .map(|(path, streams)| Method { path, streams, outcomes: [const { AtomicU64::new(0) }; CODES] })
            .collect();
        let shared = Shared {
            options: Options::read(options, max_held_bytes, stream_ahead)?,
            methods,
            paths,
            clock,
            fit_message,
            inbox: Inbox::default(),
            outbox: Outbox::default(),
            calls: Mutex::default(),
            deadlines: Deadlines::default(),
            gauges: Gauges::default(),
            spare: Arc::default(),
            watches: thread::available_parallelism().is_ok_and(|cores| cores.get() > 1),
            draining: AtomicBool::new(false),
            quieter: Notify::new(),
        };
        Ok(Self { shared: Arc::new(shared), paths: names, running: Mutex::new(None) })
    }

    /// Binds and serves; gives where, as a client would write it. OSError, or ValueError for the TLS files.
    fn start(&self, py: Python<'_>) -> PyResult<String> {
        let mut running = lock(&self.running);
        if running.is_some() {
            return Err(PyRuntimeError::new_err("a server starts once"));
        }
        let bound = py.detach(|| BoundServer::new(&self.shared)).map_err(|error| match error {
            StartError::Listen(error) => PyErr::from(error),
            StartError::Tls(text) => PyValueError::new_err(text),
        })?;
        let endpoint = bound.endpoint();
        let (stop, stopped) = oneshot::channel();
        let closes = ClosesInbox(Arc::clone(&self.shared));
        let thread =
            thread::Builder::new().name("native-transport".into()).spawn(move || bound.run(&closes.0, stopped))?;
        *running = Some(Running { thread, stop });
        Ok(endpoint)
    }

    /// Waits, without the interpreter, for what arrives, and gives at most `max` of it; None: nothing will come.
    ///
    /// Only one thread at a time has what it took: until it takes again, then with `leads`, or calls `release`.
    #[pyo3(signature = (max, leads, /))]
    fn take<'py>(&self, py: Python<'py>, max: usize, leads: bool) -> PyResult<Option<Taken<'py>>> {
        let mut items = Vec::new();
        let Some(followers) = py.detach(|| self.shared.inbox.take(max, leads, &mut items)) else {
            return Ok(None);
        };
        let calls = PyList::empty(py);
        let mut left = Vec::new();
        let mut notices = Vec::new();
        for item in items {
            match item {
                Item::Call { call, .. } if call.is_over() => {}
                Item::Call { call, message, received, held } => {
                    let method = &self.paths[call.method];
                    let call = Call::new(py, &self.shared, method, (call, message, received, held))?;
                    calls.append(Bound::new(py, call)?)?;
                }
                Item::Left(call) => {
                    forget_object(&call);
                    left.extend(callbacks(&call));
                }
                Item::Notice(text) => notices.push(text),
                Item::Release(buffer) => drop(buffer),
            }
        }
        Ok(Some((calls, left, notices, followers)))
    }

    /// Lets another thread take what comes next.
    fn release(&self) {
        self.shared.inbox.release();
    }

    /// Refuses new calls at once, waits up to `grace_s` seconds for accepted ones, ends the rest, closes everything.
    fn stop(&self, py: Python<'_>, grace_s: f64) {
        let Some(Running { thread, stop }) = empty(&self.running) else {
            return;
        };
        let grace = Duration::try_from_secs_f64(grace_s.max(0.0)).unwrap_or(Duration::MAX);
        py.detach(|| {
            // A thread that is gone already needs no telling, and has said why on standard error.
            let _ = stop.send(grace);
            drop(thread.join());
        });
    }

    /// How many calls of each method have ended with each code: (path, code, count).
    fn outcomes(&self) -> Vec<(String, usize, u64)> {
        let mut outcomes = Vec::new();
        for method in &self.shared.methods {
            for (code, counter) in method.outcomes.iter().enumerate() {
                let count = counter.load(Ordering::Relaxed);
                if count > 0 {
                    outcomes.push((method.path.clone(), code, count));
                }
            }
        }
        outcomes
    }

    /// What is held at the moment, by name; all of it is 0 when every client is gone.
    fn counts<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let gauges = &self.shared.gauges;
        let counts = PyDict::new(py);
        counts.set_item("connections", gauges.connections.load(Ordering::Relaxed))?;
        counts.set_item("handshakes", gauges.handshakes.load(Ordering::Relaxed))?;
        counts.set_item("reading", gauges.reading.load(Ordering::Relaxed))?;
        counts.set_item("calls", lock(&self.shared.calls).len())?;
        counts.set_item("held_bytes", gauges.held_bytes.load(Ordering::Relaxed))?;
        Ok(counts)
    }
}
