//! Fewer and larger reads and writes: HTTP/2 asks its socket for 8 KiB at a time and writes each DATA frame of 16 KiB on
//! its own, which makes a hundred calls of the system for a message of 600 KB.
//!
//! Reading: once a read fills all that was asked for, the next one asks for a whole buffer. Writing: bytes are gathered,
//! and written when a buffer is full or when the connection's task has done all it could (`Flusher::poll_flush`).
//! Buffers are shared by all connections: one holds some only while it has bytes in them.

use std::io::{self, IoSlice};
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard};
use std::task::{Context, Poll, ready};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use crate::shared::lock;

/// Large enough that its cost is that of its bytes, and little for each of ten thousand connections that are stuck.
const BUFFER_BYTES: usize = 128 << 10;

/// A read of fewer bytes needs no buffer.
const AHEAD_BYTES_MIN: usize = 16 << 10;

/// Buffers that are kept for later: as many as are used at a time, but for storms.
const SPARE_MAX: usize = 32;

/// Buffers that are not in use.
#[derive(Debug, Default)]
pub struct Spare(Mutex<Vec<Box<[u8]>>>);

/// The bytes from `start` to `end` of a buffer; there is none while these are equal.
#[derive(Debug, Default)]
struct Block {
    buffer: Box<[u8]>,
    start: usize,
    end: usize,
}

impl Block {
    /// A buffer to fill, of those that are spare.
    fn borrow(&mut self, spare: &Spare) {
        if self.buffer.is_empty() {
            let buffer = lock(&spare.0).pop();
            self.buffer = buffer.unwrap_or_else(|| vec![0; BUFFER_BYTES].into_boxed_slice());
        }
    }

    /// Gives the buffer back once it is empty.
    fn settle(&mut self, spare: &Spare) {
        if self.start < self.end || self.buffer.is_empty() {
            return;
        }
        let Self { buffer, .. } = std::mem::take(self);
        let mut spare = lock(&spare.0);
        if spare.len() < SPARE_MAX {
            spare.push(buffer);
        }
    }

    fn is_empty(&self) -> bool {
        self.start == self.end
    }

    fn rest(&self) -> &[u8] {
        &self.buffer[self.start..self.end]
    }

    /// Adds as much as there is room for; gives how much.
    fn add(&mut self, bytes: &[u8]) -> usize {
        let count = bytes.len().min(self.buffer.len() - self.end);
        self.buffer[self.end..self.end + count].copy_from_slice(&bytes[..count]);
        self.end += count;
        count
    }
}

#[derive(Debug)]
struct Inner<T> {
    io: T,
    spare: Arc<Spare>,
    read: Block,
    read_ahead: bool,
    written: Block,
    gathers: bool,
}

/// A socket as HTTP/2 has it.
#[derive(Debug)]
pub struct Buffered<T>(Arc<Mutex<Inner<T>>>);

/// The other end of a `Buffered`, for the task that drives HTTP/2.
#[derive(Debug)]
pub struct Flusher<T>(Arc<Mutex<Inner<T>>>);

impl<T> Buffered<T> {
    /// Until `Flusher::gather` is called, every flush is carried out at once.
    pub fn new(io: T, spare: Arc<Spare>) -> (Self, Flusher<T>) {
        let inner =
            Inner { io, spare, read: Block::default(), read_ahead: false, written: Block::default(), gathers: false };
        let inner = Arc::new(Mutex::new(inner));
        (Self(Arc::clone(&inner)), Flusher(inner))
    }

    fn inner(&self) -> MutexGuard<'_, Inner<T>> {
        lock(&self.0)
    }
}

impl<T: AsyncWrite + Unpin> Flusher<T> {
    /// From now on a flush of HTTP/2's waits for `poll_flush`.
    pub fn gather(&self) {
        lock(&self.0).gathers = true;
    }

    /// Writes what was gathered.
    pub fn poll_flush(&self, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        lock(&self.0).poll_drain(context)
    }
}

impl<T: AsyncWrite + Unpin> Inner<T> {
    fn poll_drain(&mut self, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        if self.written.is_empty() {
            return Poll::Ready(Ok(()));
        }
        while !self.written.is_empty() {
            let count = ready!(Pin::new(&mut self.io).poll_write(context, self.written.rest()))?;
            if count == 0 {
                return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
            }
            self.written.start += count;
        }
        self.written.settle(&self.spare);
        Pin::new(&mut self.io).poll_flush(context)
    }

    fn poll_write(&mut self, context: &mut Context<'_>, slices: &[IoSlice<'_>]) -> Poll<io::Result<usize>> {
        if self.written.end == BUFFER_BYTES {
            ready!(self.poll_drain(context))?;
        }
        self.written.borrow(&self.spare);
        Poll::Ready(Ok(slices.iter().map(|slice| self.written.add(slice)).sum()))
    }
}

impl<T: AsyncRead + Unpin> Inner<T> {
    fn poll_read(&mut self, context: &mut Context<'_>, into: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        if self.read.is_empty() && !self.read_ahead {
            let asked = into.remaining();
            ready!(Pin::new(&mut self.io).poll_read(context, into))?;
            self.read_ahead = into.remaining() == 0 && asked > 0;
            return Poll::Ready(Ok(()));
        }
        if self.read.is_empty() {
            let filled = self.poll_fill(context);
            if !matches!(filled, Poll::Ready(Ok(()))) {
                self.read.settle(&self.spare);
                return filled;
            }
        }
        let count = into.remaining().min(self.read.rest().len());
        into.put_slice(&self.read.rest()[..count]);
        self.read.start += count;
        self.read.settle(&self.spare);
        Poll::Ready(Ok(()))
    }

    /// Reads as much as a buffer takes, and goes back to plain reads when that was little.
    fn poll_fill(&mut self, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.read.borrow(&self.spare);
        let mut buffer = ReadBuf::new(&mut self.read.buffer);
        let polled = Pin::new(&mut self.io).poll_read(context, &mut buffer);
        self.read.end = buffer.filled().len();
        self.read_ahead = self.read.end >= AHEAD_BYTES_MIN;
        polled
    }
}

impl<T: AsyncRead + Unpin> AsyncRead for Buffered<T> {
    fn poll_read(self: Pin<&mut Self>, context: &mut Context<'_>, into: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        self.inner().poll_read(context, into)
    }
}

impl<T: AsyncWrite + Unpin> AsyncWrite for Buffered<T> {
    fn poll_write(self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        self.inner().poll_write(context, &[IoSlice::new(bytes)])
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        slices: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        self.inner().poll_write(context, slices)
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        let mut inner = self.inner();
        if inner.gathers {
            return Poll::Ready(Ok(()));
        }
        inner.poll_drain(context)
    }

    fn poll_shutdown(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        let mut inner = self.inner();
        ready!(inner.poll_drain(context))?;
        Pin::new(&mut inner.io).poll_shutdown(context)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::future::poll_fn;
    use tokio::io::{AsyncReadExt, AsyncWriteExt, duplex};

    fn run<F: Future>(future: F) -> F::Output {
        tokio::runtime::Builder::new_current_thread().build().unwrap().block_on(future)
    }

    fn pattern(length: usize) -> Vec<u8> {
        (0..length).map(|index| (index * 31 % 251) as u8).collect()
    }

    #[test]
    fn everything_arrives_whatever_the_sizes_of_reads() {
        run(async {
            let (mut client, server) = duplex(300_000);
            let (mut server, _flusher) = Buffered::new(server, Arc::default());
            let sent = pattern(1_000_003);
            let expected = sent.clone();
            let writing = tokio::spawn(async move {
                for piece in sent.chunks(70_001) {
                    client.write_all(piece).await.unwrap();
                }
            });
            let mut received = Vec::new();
            let mut sizes = [8192, 1, 40_000, 9, 8192, 8192].into_iter().cycle();
            loop {
                let mut piece = vec![0; sizes.next().unwrap()];
                let count = server.read(&mut piece).await.unwrap();
                if count == 0 {
                    break;
                }
                received.extend_from_slice(&piece[..count]);
            }
            writing.await.unwrap();
            assert!(received == expected);
        });
    }

    #[test]
    fn what_is_gathered_leaves_with_the_flusher_or_when_a_buffer_is_full() {
        run(async {
            let (mut client, server) = duplex(10 * BUFFER_BYTES);
            let spare = Arc::new(Spare::default());
            let (mut server, flusher) = Buffered::new(server, Arc::clone(&spare));
            flusher.gather();
            let sent = pattern(2 * BUFFER_BYTES + 5);
            server.write_all(&sent[..5]).await.unwrap();
            server.flush().await.unwrap();
            assert!(
                poll_fn(|context| Poll::Ready(
                    Pin::new(&mut client).poll_read(context, &mut ReadBuf::new(&mut [0; 9]))
                ))
                .await
                .is_pending()
            );
            server.write_all(&sent[5..]).await.unwrap();
            poll_fn(|context| flusher.poll_flush(context)).await.unwrap();
            let mut received = vec![0; sent.len()];
            client.read_exact(&mut received).await.unwrap();
            assert!(received == sent);
            assert_eq!(lock(&spare.0).len(), 1);
        });
    }

    #[test]
    fn before_anybody_gathers_and_at_the_end_nothing_is_kept_back() {
        run(async {
            let (mut client, server) = duplex(1000);
            let (mut server, flusher) = Buffered::new(server, Arc::default());
            server.write_all(b"first").await.unwrap();
            server.flush().await.unwrap();
            let mut received = [0; 5];
            client.read_exact(&mut received).await.unwrap();
            flusher.gather();
            server.write_all(b" last").await.unwrap();
            server.shutdown().await.unwrap();
            let mut rest = Vec::new();
            client.read_to_end(&mut rest).await.unwrap();
            assert_eq!((&received[..], &rest[..]), (&b"first"[..], &b" last"[..]));
        });
    }
}
