//! Listening sockets, TCP and Unix: where a server can be reached, who connects, and how gRPC writes a peer's address.
//!
//! Addresses mean what they mean to gRPC's other servers: a name stands for all its addresses, and both wildcards,
//! `0.0.0.0` and `[::]`, for every IPv4 and IPv6 address of the machine.

use std::fs::{self, Permissions};
use std::future::poll_fn;
use std::io::{self, IoSlice};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, ToSocketAddrs};
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;

use socket2::{Domain, SockAddr, Socket as RawSocket, Type};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream, UnixListener, UnixStream};

/// How long an accept loop waits after an error of `Listener::accept`: long enough not to spin, short enough that
/// clients hardly notice once a file descriptor is free again.
pub const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

/// Connections that may wait to be accepted: as many as Linux allows unless it is told otherwise (somaxconn).
const BACKLOG: i32 = 4096;

const UNIX_PREFIX: &str = "unix:";

/// Listens on `host:port`, `[ipv6]:port`, `unix:path` or `unix:///path`; port 0 takes a free one.
///
/// A name is resolved here, which may block, and listened on at all of its addresses that this machine has. The socket
/// file of a server that is gone is replaced; that of a living one is `AddrInUse`, and any other file is left alone
/// (`AlreadyExists`). Nobody can connect to a Unix socket before it has its mode. Must be called inside the runtime.
pub fn bind(address: &str, reuse_port: bool, unix_mode: Option<u32>) -> io::Result<Listener> {
    match address.strip_prefix(UNIX_PREFIX) {
        Some(path) => bind_unix(address, path.strip_prefix("//").unwrap_or(path), unix_mode),
        None => bind_tcp(address, reuse_port),
    }
}

/// A bound address. Dropping it closes its sockets and removes its socket file.
#[derive(Debug)]
pub struct Listener {
    sockets: Sockets,
    endpoint: String,
}

#[derive(Debug)]
enum Sockets {
    /// `turn` counts accepts: each begins at another socket, so that a busy one does not starve the rest.
    Tcp {
        listeners: Vec<TcpListener>,
        turn: AtomicUsize,
    },
    Unix {
        listener: UnixListener,
        _file: SocketFile,
    },
}

impl Listener {
    /// The next connection.
    ///
    /// A connection that broke while it waited is passed over. An error means that this process or this machine lacks
    /// something for another connection just now, such as a file descriptor: the listener stays good, but the next
    /// call may fail at once again, so that a loop waits for `ACCEPT_PAUSE` before it.
    pub async fn accept(&self) -> io::Result<(Socket, Peer)> {
        loop {
            match poll_fn(|context| self.poll_accept(context)).await {
                Err(error) if is_of_one_connection(&error) => {}
                accepted => return accepted,
            }
        }
    }

    /// The address as a client would write it, with the port that was taken.
    pub fn endpoint(&self) -> String {
        self.endpoint.clone()
    }

    fn poll_accept(&self, context: &mut Context<'_>) -> Poll<io::Result<(Socket, Peer)>> {
        match &self.sockets {
            Sockets::Tcp { listeners, turn } => {
                let first = turn.fetch_add(1, Ordering::Relaxed) % listeners.len();
                for listener in listeners[first..].iter().chain(&listeners[..first]) {
                    if let Poll::Ready(accepted) = listener.poll_accept(context) {
                        return Poll::Ready(accepted.and_then(|(stream, from)| tcp_connection(stream, from)));
                    }
                }
                Poll::Pending
            }
            Sockets::Unix { listener, .. } => {
                listener.poll_accept(context).map(|accepted| accepted.and_then(|(stream, _)| unix_connection(stream)))
            }
        }
    }
}

/// Whether accept failed for one connection only: Linux hands on what went wrong with it while it waited.
fn is_of_one_connection(error: &io::Error) -> bool {
    use io::ErrorKind as Kind;
    matches!(
        error.kind(),
        Kind::ConnectionAborted
            | Kind::ConnectionReset
            | Kind::HostUnreachable
            | Kind::NetworkDown
            | Kind::NetworkUnreachable
            | Kind::PermissionDenied
    )
}

/// A gRPC message is written at once, whole: Nagle's algorithm could only delay it.
fn tcp_connection(stream: TcpStream, from: SocketAddr) -> io::Result<(Socket, Peer)> {
    stream.set_nodelay(true)?;
    let text = peer_text(from);
    Ok((Socket::Tcp(stream), Peer { text, credentials: None }))
}

fn unix_connection(stream: UnixStream) -> io::Result<(Socket, Peer)> {
    let of = stream.peer_cred()?;
    let peer = Peer {
        text: UNIX_PREFIX.to_owned(),
        // A system that does not tell the process says 0, which is nobody's.
        credentials: Some((of.pid().unwrap_or(0), of.uid(), of.gid())),
    };
    Ok((Socket::Unix(stream), peer))
}

/// Who connected.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Peer {
    /// As gRPC writes it: `ipv4:127.0.0.1:4711`, `ipv6:%5B::1%5D:4711`, `unix:`.
    pub text: String,
    /// Process, user and group at the other end of a Unix socket when it connected.
    pub credentials: Option<(i32, u32, u32)>,
}

/// gRPC writes a URI, in which the brackets of IPv6 and the `%` before a scope are escaped.
fn peer_text(address: SocketAddr) -> String {
    let port = address.port();
    match (address.ip().to_canonical(), address) {
        (IpAddr::V4(ip), _) => format!("ipv4:{ip}:{port}"),
        (IpAddr::V6(ip), SocketAddr::V6(of)) if of.scope_id() != 0 => {
            format!("ipv6:%5B{ip}%25{}%5D:{port}", of.scope_id())
        }
        (IpAddr::V6(ip), _) => format!("ipv6:%5B{ip}%5D:{port}"),
    }
}

fn bind_tcp(address: &str, reuse_port: bool) -> io::Result<Listener> {
    let mut found: Vec<SocketAddr> = Vec::new();
    for one in address.to_socket_addrs()? {
        // A file of hosts may say the same twice.
        if !found.contains(&one) {
            found.push(one);
        }
    }
    let listeners = match found.iter().find(|one| one.ip().is_unspecified()) {
        Some(any) => vec![listen_everywhere(any.port(), reuse_port)?],
        None => listen_at_all(&found, reuse_port)?,
    };
    let port = listeners[0].local_addr()?.port();
    let host = address.rsplit_once(':').map_or(address, |(host, _)| host);
    Ok(Listener { endpoint: format!("{host}:{port}"), sockets: Sockets::Tcp { listeners, turn: AtomicUsize::new(0) } })
}

/// One socket for both families, or for IPv4 where the machine has no IPv6.
fn listen_everywhere(port: u16, reuse_port: bool) -> io::Result<TcpListener> {
    match listen_at((Ipv6Addr::UNSPECIFIED, port).into(), reuse_port) {
        Err(error) if error.kind() == io::ErrorKind::AddrNotAvailable => {
            listen_at((Ipv4Addr::UNSPECIFIED, port).into(), reuse_port)
        }
        listened => listened,
    }
}

/// A socket for each address, all with the same port. One that this machine does not have is left out, as a name such
/// as localhost may have one of a family that is switched off; an error when none is left.
fn listen_at_all(addresses: &[SocketAddr], reuse_port: bool) -> io::Result<Vec<TcpListener>> {
    let mut listeners: Vec<TcpListener> = Vec::new();
    let mut missing = io::Error::new(io::ErrorKind::NotFound, "the name has no address");
    for &(mut address) in addresses {
        if let Some(first) = listeners.first() {
            address.set_port(first.local_addr()?.port());
        }
        match listen_at(address, reuse_port) {
            Ok(listener) => listeners.push(listener),
            Err(error) if error.kind() == io::ErrorKind::AddrNotAvailable => missing = error,
            Err(error) => return Err(error),
        }
    }
    if listeners.is_empty() { Err(missing) } else { Ok(listeners) }
}

/// `AddrNotAvailable` when the machine does not have the address, or its whole family.
fn listen_at(address: SocketAddr, reuse_port: bool) -> io::Result<TcpListener> {
    let socket = RawSocket::new(Domain::for_address(address), Type::STREAM, None)
        .map_err(|error| io::Error::new(io::ErrorKind::AddrNotAvailable, error))?;
    if address.is_ipv6() && address.ip().is_unspecified() {
        socket.set_only_v6(false)?;
    }
    // Without it, a server could not start while connections of the one before it wait for their end.
    socket.set_reuse_address(true)?;
    if reuse_port {
        socket.set_reuse_port(true)?;
    }
    socket.bind(&address.into())?;
    socket.listen(BACKLOG)?;
    socket.set_nonblocking(true)?;
    TcpListener::from_std(socket.into())
}

fn bind_unix(address: &str, path: &str, mode: Option<u32>) -> io::Result<Listener> {
    let path = Path::new(path);
    let name = SockAddr::unix(path)?;
    remove_dead_socket(path, &name)?;
    let socket = RawSocket::new(Domain::UNIX, Type::STREAM, None)?;
    socket.bind(&name)?;
    // From here on the file goes when anything fails.
    let file = SocketFile::of(path)?;
    if let Some(mode) = mode {
        fs::set_permissions(path, Permissions::from_mode(mode))?;
    }
    // Nobody can connect before this: the mode is in force for the first one already.
    socket.listen(BACKLOG)?;
    socket.set_nonblocking(true)?;
    Ok(Listener {
        sockets: Sockets::Unix { listener: UnixListener::from_std(socket.into())?, _file: file },
        endpoint: address.to_owned(),
    })
}

/// Makes room where a server has left its socket file behind; whether one still listens is tried by connecting.
fn remove_dead_socket(path: &Path, name: &SockAddr) -> io::Result<()> {
    let metadata = match fs::symlink_metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        found => found?,
    };
    if !metadata.file_type().is_socket() {
        return Err(io::Error::new(io::ErrorKind::AlreadyExists, "the file exists and is not a socket"));
    }
    let socket = RawSocket::new(Domain::UNIX, Type::STREAM, None)?;
    socket.set_nonblocking(true)?; // a server whose backlog is full must not hold this one
    match socket.connect(name) {
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => fs::remove_file(path),
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => Err(error),
        _ => Err(io::Error::new(io::ErrorKind::AddrInUse, "another server listens on this socket")),
    }
}

/// The file of a Unix socket, removed when dropped unless another server has put its own in the same place.
#[derive(Debug)]
struct SocketFile {
    path: PathBuf,
    device_and_inode: (u64, u64),
}

impl SocketFile {
    fn of(path: &Path) -> io::Result<Self> {
        let device_and_inode = device_and_inode(path)?;
        // Kept absolute: the process may change its directory before it ends.
        let path = std::path::absolute(path)?;
        Ok(Self { path, device_and_inode })
    }
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        if device_and_inode(&self.path).is_ok_and(|now| now == self.device_and_inode) {
            // Nobody is left to hear of an error, and the next server replaces what is left behind.
            let _ = fs::remove_file(&self.path);
        }
    }
}

fn device_and_inode(path: &Path) -> io::Result<(u64, u64)> {
    let metadata = fs::symlink_metadata(path)?;
    Ok((metadata.dev(), metadata.ino()))
}

/// A connection's byte stream, of either kind.
#[derive(Debug)]
pub enum Socket {
    Tcp(TcpStream),
    Unix(UnixStream),
}

impl AsyncRead for Socket {
    fn poll_read(self: Pin<&mut Self>, context: &mut Context<'_>, into: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Tcp(stream) => Pin::new(stream).poll_read(context, into),
            Self::Unix(stream) => Pin::new(stream).poll_read(context, into),
        }
    }
}

impl AsyncWrite for Socket {
    fn poll_write(self: Pin<&mut Self>, context: &mut Context<'_>, data: &[u8]) -> Poll<io::Result<usize>> {
        match self.get_mut() {
            Self::Tcp(stream) => Pin::new(stream).poll_write(context, data),
            Self::Unix(stream) => Pin::new(stream).poll_write(context, data),
        }
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        data: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        match self.get_mut() {
            Self::Tcp(stream) => Pin::new(stream).poll_write_vectored(context, data),
            Self::Unix(stream) => Pin::new(stream).poll_write_vectored(context, data),
        }
    }

    fn is_write_vectored(&self) -> bool {
        match self {
            Self::Tcp(stream) => stream.is_write_vectored(),
            Self::Unix(stream) => stream.is_write_vectored(),
        }
    }

    fn poll_flush(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Tcp(stream) => Pin::new(stream).poll_flush(context),
            Self::Unix(stream) => Pin::new(stream).poll_flush(context),
        }
    }

    fn poll_shutdown(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Tcp(stream) => Pin::new(stream).poll_shutdown(context),
            Self::Unix(stream) => Pin::new(stream).poll_shutdown(context),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::net as unix;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    fn block_on<F: Future>(work: F) -> F::Output {
        tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(work)
    }

    /// A path of this test's own for a socket, gone at the end.
    struct Place(PathBuf);

    impl Place {
        fn new(name: &str) -> Self {
            let directory = std::env::temp_dir().join(format!("sluice-listen-{}-{name}", std::process::id()));
            fs::create_dir_all(&directory).unwrap();
            Self(directory)
        }

        fn socket(&self) -> PathBuf {
            self.0.join("socket")
        }

        fn address(&self) -> String {
            format!("unix:{}", self.socket().display())
        }
    }

    impl Drop for Place {
        fn drop(&mut self) {
            fs::remove_dir_all(&self.0).unwrap();
        }
    }

    async fn echo_once(listener: &Listener, mut client: impl AsyncRead + AsyncWrite + Unpin) -> Peer {
        let (mut socket, peer) = listener.accept().await.unwrap();
        client.write_all(b"ping").await.unwrap();
        let mut heard = [0; 4];
        socket.read_exact(&mut heard).await.unwrap();
        let answer = [IoSlice::new(&heard), IoSlice::new(b"!")];
        assert_eq!(socket.write_vectored(&answer).await.unwrap(), 5);
        socket.shutdown().await.unwrap();
        let mut answer = Vec::new();
        client.read_to_end(&mut answer).await.unwrap();
        assert_eq!(answer, b"ping!");
        peer
    }

    #[test]
    fn a_tcp_port_is_taken_told_and_served() {
        block_on(async {
            let listener = bind("127.0.0.1:0", false, None).unwrap();
            let endpoint = listener.endpoint();
            assert!(endpoint.starts_with("127.0.0.1:") && !endpoint.ends_with(":0"));
            let client = TcpStream::connect(&endpoint).await.unwrap();
            let text = format!("ipv4:{}", client.local_addr().unwrap());
            let peer = echo_once(&listener, client).await;
            assert_eq!(peer, Peer { text, credentials: None });
        });
    }

    #[test]
    fn a_name_is_listened_on_at_all_its_addresses_and_stays_the_name() {
        block_on(async {
            let listener = bind("localhost:0", false, None).unwrap();
            let endpoint = listener.endpoint();
            assert!(endpoint.starts_with("localhost:"));
            let Sockets::Tcp { listeners, .. } = &listener.sockets else { unreachable!() };
            for one in listeners {
                let client = TcpStream::connect(one.local_addr().unwrap()).await.unwrap();
                echo_once(&listener, client).await;
            }
        });
    }

    #[test]
    fn both_wildcards_take_ipv4_and_an_ipv4_client_is_called_so() {
        block_on(async {
            for wildcard in ["0.0.0.0:0", "[::]:0"] {
                let listener = bind(wildcard, false, None).unwrap();
                let port = listener.endpoint().rsplit_once(':').unwrap().1.to_owned();
                let client = TcpStream::connect(format!("127.0.0.1:{port}")).await.unwrap();
                let peer = echo_once(&listener, client).await;
                assert!(peer.text.starts_with("ipv4:127.0.0.1:"), "{}", peer.text);
            }
        });
    }

    #[test]
    fn a_port_in_use_is_refused_unless_both_sides_share_it() {
        block_on(async {
            let first = bind("127.0.0.1:0", true, None).unwrap();
            let error = bind(&first.endpoint(), false, None).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::AddrInUse);
            assert_eq!(bind(&first.endpoint(), true, None).unwrap().endpoint(), first.endpoint());
        });
    }

    #[test]
    fn an_address_of_another_machine_or_none_is_refused() {
        block_on(async {
            let error = bind("203.0.113.1:0", false, None).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::AddrNotAvailable);
            for address in ["127.0.0.1", "127.0.0.1:port", "no-such-host.invalid:0"] {
                assert!(bind(address, false, None).is_err(), "{address}");
            }
        });
    }

    #[test]
    fn peers_are_written_as_grpc_writes_them() {
        for (address, text) in [
            ("127.0.0.1:4711", "ipv4:127.0.0.1:4711"),
            ("[::1]:4711", "ipv6:%5B::1%5D:4711"),
            ("[::ffff:10.0.0.1]:1", "ipv4:10.0.0.1:1"),
            ("[fe80::1%2]:1", "ipv6:%5Bfe80::1%252%5D:1"),
        ] {
            assert_eq!(peer_text(address.parse().unwrap()), text);
        }
    }

    #[test]
    fn a_unix_socket_has_its_mode_knows_its_clients_and_goes_with_the_listener() {
        block_on(async {
            let place = Place::new("mode");
            let listener = bind(&place.address(), false, Some(0o600)).unwrap();
            assert_eq!(listener.endpoint(), place.address());
            let mode = fs::metadata(place.socket()).unwrap().permissions().mode();
            assert_eq!(mode & 0o777, 0o600);
            let client = UnixStream::connect(place.socket()).await.unwrap();
            let own = client.peer_cred().unwrap();
            let peer = echo_once(&listener, client).await;
            assert_eq!(peer.text, "unix:");
            let process = i32::try_from(std::process::id()).unwrap();
            assert_eq!(peer.credentials, Some((process, own.uid(), own.gid())));
            drop(listener);
            assert!(!place.socket().exists());
        });
    }

    #[test]
    fn a_unix_address_may_have_two_slashes_more() {
        block_on(async {
            let place = Place::new("slashes");
            let address = format!("unix://{}", place.socket().display());
            let listener = bind(&address, false, None).unwrap();
            assert_eq!(listener.endpoint(), address);
            echo_once(&listener, UnixStream::connect(place.socket()).await.unwrap()).await;
        });
    }

    #[test]
    fn a_dead_socket_file_is_replaced_a_living_one_and_any_other_file_are_not() {
        block_on(async {
            let place = Place::new("dead");
            drop(unix::UnixListener::bind(place.socket()).unwrap());
            let listener = bind(&place.address(), false, None).unwrap();
            let error = bind(&place.address(), false, None).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::AddrInUse);
            assert!(place.socket().exists());
            drop(listener);
            fs::write(place.socket(), "notes").unwrap();
            let error = bind(&place.address(), false, None).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::AlreadyExists);
            assert_eq!(fs::read(place.socket()).unwrap(), b"notes");
        });
    }

    #[test]
    fn a_socket_file_that_another_server_has_put_there_stays() {
        block_on(async {
            let place = Place::new("replaced");
            let listener = bind(&place.address(), false, None).unwrap();
            fs::rename(place.socket(), place.0.join("moved")).unwrap();
            let _other = bind(&place.address(), false, None).unwrap();
            drop(listener);
            assert!(place.socket().exists());
        });
    }

    #[test]
    fn a_path_that_no_socket_can_have_is_refused() {
        block_on(async {
            assert!(bind(&format!("unix:/tmp/{}", "x".repeat(200)), false, None).is_err());
            let error = bind("unix:/no/such/directory/socket", false, None).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::NotFound);
        });
    }

    #[test]
    fn only_errors_of_one_connection_are_passed_over() {
        assert!(is_of_one_connection(&io::ErrorKind::ConnectionAborted.into()));
        let too_many_open_files = io::Error::from_raw_os_error(24);
        assert!(!is_of_one_connection(&too_many_open_files));
        assert!(!is_of_one_connection(&io::ErrorKind::OutOfMemory.into()));
    }
}
