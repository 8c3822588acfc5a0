//! The transport's one thread: it accepts connections, runs them, and ends them in good order.

use std::collections::HashMap;
use std::io;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::runtime::Runtime;
use tokio::sync::oneshot;
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep, timeout, timeout_at};
use tokio_rustls::TlsAcceptor;

use crate::answer;
use crate::authority::Authority;
use crate::connection::{self, Handle, Handshake};
use crate::listen::{ACCEPT_PAUSE, Listener, Peer, Socket, bind};
use crate::shared::{Client, Counted, Item, Key, Shared, code, lock};
use crate::tls::{Tls, peer_names};

/// How long calls that are ended because the server's time is up have to reach their clients.
const LAST_ENDS: Duration = Duration::from_secs(1);

/// Threads that decompress large messages, and no others: as many as can use a small machine.
const BLOCKING_THREADS_MAX: usize = 2;

const TIME_IS_UP: &str = "the server has shut down before this call was finished";

/// The connections that are there, by their numbers.
type Handles = Arc<Mutex<HashMap<u64, Arc<Handle>>>>;

/// Why a server cannot begin to serve.
pub enum StartError {
    Listen(io::Error),
    Tls(String),
}

/// A server that listens.
pub struct Bound {
    runtime: Runtime,
    listener: Listener,
    tls: Option<Tls>,
}

impl Bound {
    /// Reads the certificates and binds the address.
    pub fn new(shared: &Shared) -> Result<Self, StartError> {
        let options = &shared.options;
        let tls = options.tls.clone().map(Tls::load).transpose().map_err(StartError::Tls)?;
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_io()
            .enable_time()
            .max_blocking_threads(BLOCKING_THREADS_MAX)
            .build()
            .map_err(StartError::Listen)?;
        let listener = {
            let _inside = runtime.enter();
            bind(&options.address, options.reuse_port, options.unix_mode).map_err(StartError::Listen)?
        };
        Ok(Self { runtime, listener, tls })
    }

    pub fn endpoint(&self) -> String {
        self.listener.endpoint()
    }

    /// Serves until told to stop, with how long accepted calls may take then.
    pub fn run(self, shared: &Arc<Shared>, stop: oneshot::Receiver<Duration>) {
        let Self { runtime, listener, tls } = self;
        runtime.block_on(async {
            let handles = Handles::default();
            let answering = tokio::spawn(answer::run(Arc::clone(shared)));
            let accepting = tokio::spawn(accept(Arc::clone(shared), listener, tls, Arc::clone(&handles)));
            // Without its sender the server object is gone, and nobody waits for a call.
            let grace = stop.await.unwrap_or_default();
            end(shared, accepting, &handles, grace).await;
            answering.abort();
        });
        runtime.shutdown_timeout(LAST_ENDS);
    }
}

/// Refuses what is new, lets what was accepted finish, ends the rest, and closes the connections.
async fn end(shared: &Shared, accepting: JoinHandle<()>, handles: &Handles, grace: Duration) {
    shared.draining.store(true, Ordering::Relaxed);
    accepting.abort();
    drop(accepting.await);
    for handle in lock(handles).values() {
        handle.drain();
    }
    let calls_have_ended = async {
        while !lock(&shared.calls).is_empty() || shared.gauges.reading.load(Ordering::Relaxed) > 0 {
            shared.quieter.notified().await;
        }
    };
    if timeout(grace, calls_have_ended).await.is_err() {
        let left: Vec<Key> = lock(&shared.calls).keys().copied().collect();
        for key in left {
            answer::end_by_transport(shared, key, code::UNAVAILABLE, TIME_IS_UP);
        }
    }
    let connections_have_ended = async {
        while shared.gauges.connections.load(Ordering::Relaxed) > 0 {
            shared.quieter.notified().await;
        }
    };
    // A client that does not close its side by then is closed from here.
    drop(timeout(LAST_ENDS, connections_have_ended).await);
}

async fn accept(shared: Arc<Shared>, listener: Listener, mut tls: Option<Tls>, handles: Handles) {
    let mut failing = false;
    for id in 0.. {
        let (socket, peer) = loop {
            match listener.accept().await {
                Ok(accepted) => break accepted,
                Err(error) => {
                    if !failing {
                        shared.inbox.push(Item::Notice(format!("connections cannot be accepted now: {error}")));
                    }
                    failing = true;
                    sleep(ACCEPT_PAUSE).await;
                }
            }
        };
        failing = false;
        if shared.gauges.connections.load(Ordering::Relaxed) >= shared.options.max_connections {
            continue; // closes it
        }
        let acceptor = tls.as_mut().map(|tls| {
            let (acceptor, problem) = tls.acceptor();
            if let Some(problem) = problem {
                shared.inbox.push(Item::Notice(problem));
            }
            acceptor
        });
        tokio::spawn(serve(Arc::clone(&shared), id, socket, peer, acceptor, Arc::clone(&handles)));
    }
}

async fn serve(
    shared: Arc<Shared>,
    id: u64,
    socket: Socket,
    peer: Peer,
    acceptor: Option<TlsAcceptor>,
    handles: Handles,
) {
    let counted = Counted::new(&shared.gauges.connections);
    let handle = Arc::new(Handle::default());
    lock(&handles).insert(id, Arc::clone(&handle));
    let until = Instant::now() + shared.options.handshake_timeout;
    let handshake = Handshake { until, _counted: Counted::new(&shared.gauges.handshakes) };
    let is_unix = matches!(socket, Socket::Unix(_));
    let mut client = Client { address: peer.text, names: Vec::new(), credentials: peer.credentials };
    match acceptor {
        None => {
            connection::serve(Arc::clone(&shared), id, client, handle, Authority::new(socket, is_unix), handshake).await
        }
        Some(acceptor) => {
            if let Ok(Ok(stream)) = timeout_at(until, acceptor.accept(socket)).await {
                client.names = peer_names(stream.get_ref().1);
                let stream = Authority::new(stream, is_unix);
                connection::serve(Arc::clone(&shared), id, client, handle, stream, handshake).await;
            }
        }
    }
    lock(&handles).remove(&id);
    drop(counted);
    shared.grew_quieter();
}
