//! Fewer and larger reads and writes: HTTP/2 asks its socket for 8 KiB at a time and writes each DATA frame of 16 KiB on
//! its own, which makes a hundred calls of the system for a message of 600 KB.
//!
//! Reading: once a read fills all that was asked for, the next one asks for a whole buffer. Writing: bytes are gathered,
//! and written when there are enough or when the connection's task has done all it could (`Flusher::poll_flush`).
//! Buffers are shared by all connections: one holds some only while it has bytes in them.
//!
//! The payload of large answers is not copied: it is kept as what it is, a part of the answer, and written from there.
//! HTTP/2 hands over slices, which do not say whose they are. So the answers that it was given are noted in `Lent`, and a
//! slice's owner is found there by its address.

use std::collections::VecDeque;
use std::io::{self, IoSlice};
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, Weak};
use std::task::{Context, Poll, ready};

use bytes::{Buf, Bytes};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use crate::shared::lock;

/// Large enough that its cost is that of its bytes, and little for each of ten thousand connections that are stuck.
const BUFFER_BYTES: usize = 128 << 10;

/// A read of fewer bytes needs no buffer.
const AHEAD_BYTES_MIN: usize = 16 << 10;

/// After so many bytes a connection lets others have their turn: the tasks that join messages of these bytes, while they
/// are in the processor's cache, and other connections.
const TURN_BYTES: usize = 128 << 10;

/// Buffers that are kept for later: as many as are used at a time, but for storms.
const SPARE_MAX: usize = 32;

/// A smaller slice is copied: one more piece to write costs about as much.
const KEPT_BYTES_MIN: usize = 4 << 10;

/// Answers among which the owner of a slice is looked for; the bytes of further ones are copied.
const LENT_MAX: usize = 64;

/// What is written at once: with twice as much, or half, large answers were no faster.
const WRITE_BYTES: usize = 256 << 10;

/// Pieces of one write: DATA frames of 16 KiB, each a head and a payload, make half as many of `WRITE_BYTES`.
const PIECES_MAX: usize = 64;

/// The large answers of one connection that HTTP/2 has and has not handed over to their end.
#[derive(Debug, Default)]
struct Lent(Mutex<Vec<Bytes>>);

/// Where answers are noted, for as long as the connection is there.
#[derive(Debug)]
pub struct Lender(Weak<Lent>);

impl Lender {
    /// Notes an answer before HTTP/2 gets it.
    pub fn note(&self, bytes: &Bytes) {
        if bytes.len() < KEPT_BYTES_MIN {
            return;
        }
        if let Some(lent) = self.0.upgrade() {
            let mut lent = lock(&lent.0);
            if lent.len() < LENT_MAX {
                lent.push(bytes.clone());
            }
        }
    }
}

impl Lent {
    /// Forgets answers that nobody else has any more: of streams that were reset, or whose end HTTP/2 has copied.
    fn purge(&self) {
        lock(&self.0).retain(|bytes| !bytes.is_unique());
    }

    /// The slice as a part of the answer that it belongs to, which is forgotten when this is its end.
    fn part_of(&self, slice: &[u8]) -> Option<Bytes> {
        let mut lent = lock(&self.0);
        let wanted = slice.as_ptr_range();
        let at = lent.iter().position(|bytes| {
            let owner = bytes.as_ptr_range();
            owner.start <= wanted.start && wanted.end <= owner.end
        })?;
        let piece = lent[at].slice_ref(slice);
        if lent[at].as_ptr_range().end == wanted.end {
            lent.swap_remove(at);
        }
        Some(piece)
    }
}

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

/// A part of what is to be written.
#[derive(Debug)]
enum Piece {
    /// So many of the next bytes of the buffer.
    Copied(usize),
    /// A part of an answer.
    Kept(Bytes),
}

/// What was gathered and not written yet.
#[derive(Debug, Default)]
struct Gathered {
    pieces: VecDeque<Piece>,
    buffer: Block,
    bytes: usize,
}

impl Gathered {
    fn is_full(&self) -> bool {
        self.bytes >= WRITE_BYTES || self.buffer.end == BUFFER_BYTES || self.pieces.len() >= PIECES_MAX
    }

    /// How much more of an answer may be kept.
    fn room(&self) -> usize {
        WRITE_BYTES.saturating_sub(self.bytes)
    }

    fn keep(&mut self, bytes: Bytes) {
        self.bytes += bytes.len();
        self.pieces.push_back(Piece::Kept(bytes));
    }

    /// Adds as much as there is room for; gives how much.
    fn copy(&mut self, bytes: &[u8], spare: &Spare) -> usize {
        self.buffer.borrow(spare);
        let count = self.buffer.add(bytes);
        self.bytes += count;
        match self.pieces.back_mut() {
            Some(Piece::Copied(length)) => *length += count,
            _ => self.pieces.push_back(Piece::Copied(count)),
        }
        count
    }

    /// Points at the pieces; gives how many there are.
    fn slices<'a>(&'a self, into: &mut [IoSlice<'a>; PIECES_MAX]) -> usize {
        let mut copied = self.buffer.rest();
        for (slice, piece) in into.iter_mut().zip(&self.pieces) {
            *slice = IoSlice::new(match piece {
                Piece::Kept(bytes) => bytes,
                Piece::Copied(length) => {
                    let (piece, rest) = copied.split_at(*length);
                    copied = rest;
                    piece
                }
            });
        }
        self.pieces.len().min(PIECES_MAX)
    }

    /// Forgets what was written.
    fn advance(&mut self, mut count: usize, spare: &Spare) {
        self.bytes -= count;
        while let Some(piece) = self.pieces.front_mut() {
            let length = match piece {
                Piece::Kept(bytes) => bytes.len(),
                Piece::Copied(length) => *length,
            };
            let written = length.min(count);
            count -= written;
            match piece {
                Piece::Kept(bytes) => bytes.advance(written),
                Piece::Copied(length) => {
                    *length -= written;
                    self.buffer.start += written;
                }
            }
            if written < length {
                break;
            }
            self.pieces.pop_front();
        }
        self.buffer.settle(spare);
    }
}

#[derive(Debug)]
struct Inner<T> {
    io: T,
    spare: Arc<Spare>,
    lent: Arc<Lent>,
    /// Bytes that the socket has taken.
    sent: u64,
    read: Block,
    read_ahead: bool,
    /// Bytes that were read in this turn, in whole buffers.
    turn_bytes: usize,
    gathered: Gathered,
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
        let inner = Arc::new(Mutex::new(Inner {
            io,
            spare,
            lent: Arc::default(),
            sent: 0,
            read: Block::default(),
            read_ahead: false,
            turn_bytes: 0,
            gathered: Gathered::default(),
            gathers: false,
        }));
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

    /// Where answers are noted that are not to be copied.
    pub fn lender(&self) -> Lender {
        Lender(Arc::downgrade(&lock(&self.0).lent))
    }

    /// Bytes that the socket has taken.
    pub fn sent(&self) -> u64 {
        lock(&self.0).sent
    }

    /// Writes what was gathered, and lets go of answers that are out or that HTTP/2 has dropped.
    pub fn poll_flush(&self, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        let mut inner = lock(&self.0);
        let polled = inner.poll_drain(context);
        inner.lent.purge();
        polled
    }
}

impl<T: AsyncWrite + Unpin> Inner<T> {
    fn poll_drain(&mut self, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        if self.gathered.bytes == 0 {
            return Poll::Ready(Ok(()));
        }
        while self.gathered.bytes > 0 {
            let mut slices = [IoSlice::new(&[]); PIECES_MAX];
            let filled = self.gathered.slices(&mut slices);
            let count = ready!(Pin::new(&mut self.io).poll_write_vectored(context, &slices[..filled]))?;
            if count == 0 {
                return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
            }
            self.sent += count as u64;
            self.gathered.advance(count, &self.spare);
        }
        Pin::new(&mut self.io).poll_flush(context)
    }

    /// Adds as much as there is room for; gives how much.
    fn gather(&mut self, slice: &[u8]) -> usize {
        if slice.len() >= KEPT_BYTES_MIN {
            let slice = &slice[..slice.len().min(self.gathered.room())];
            if let Some(bytes) = self.lent.part_of(slice) {
                self.gathered.keep(bytes);
                return slice.len();
            }
        }
        self.gathered.copy(slice, &self.spare)
    }

    fn poll_write(&mut self, context: &mut Context<'_>, slices: &[IoSlice<'_>]) -> Poll<io::Result<usize>> {
        if self.gathered.is_full() {
            ready!(self.poll_drain(context))?;
        }
        let mut taken = 0;
        for slice in slices.iter().filter(|slice| !slice.is_empty()) {
            if self.gathered.is_full() {
                break;
            }
            let count = self.gather(slice);
            taken += count;
            if count < slice.len() {
                break;
            }
        }
        Poll::Ready(Ok(taken))
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

    /// Reads as much as a buffer takes, unless the turn is over, and goes back to plain reads when that was little.
    fn poll_fill(&mut self, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        if self.turn_bytes >= TURN_BYTES {
            self.turn_bytes = 0;
            context.waker().wake_by_ref();
            return Poll::Pending;
        }
        self.read.borrow(&self.spare);
        let mut buffer = ReadBuf::new(&mut self.read.buffer);
        let polled = Pin::new(&mut self.io).poll_read(context, &mut buffer);
        self.read.end = buffer.filled().len();
        self.turn_bytes = if polled.is_ready() { self.turn_bytes + self.read.end } else { 0 };
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

    /// A socket that takes at most so many bytes at a time, from several slices.
    #[derive(Debug)]
    struct Scattered {
        taken: Vec<u8>,
        at_a_time: usize,
    }

    impl AsyncWrite for Scattered {
        fn poll_write(self: Pin<&mut Self>, _: &mut Context<'_>, _: &[u8]) -> Poll<io::Result<usize>> {
            unreachable!("all writes are of slices");
        }

        fn poll_write_vectored(
            mut self: Pin<&mut Self>,
            _: &mut Context<'_>,
            slices: &[IoSlice<'_>],
        ) -> Poll<io::Result<usize>> {
            let mut room = self.at_a_time;
            for slice in slices {
                let count = slice.len().min(room);
                self.taken.extend_from_slice(&slice[..count]);
                room -= count;
            }
            Poll::Ready(Ok(self.at_a_time - room))
        }

        fn is_write_vectored(&self) -> bool {
            true
        }

        fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
            Poll::Ready(Ok(()))
        }

        fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
            Poll::Ready(Ok(()))
        }
    }

    #[test]
    fn answers_that_are_lent_leave_in_order_however_the_socket_cuts_them_and_are_let_go_of() {
        for at_a_time in [1000, 4097, 70_000, usize::MAX] {
            run(async {
                let io = Scattered { taken: Vec::new(), at_a_time };
                let (mut server, flusher) = Buffered::new(io, Arc::default());
                flusher.gather();
                let answers = [pattern(600_000), pattern(BUFFER_BYTES), pattern(KEPT_BYTES_MIN - 1)].map(Bytes::from);
                let mut expected = Vec::new();
                for answer in &answers {
                    flusher.lender().note(answer);
                    for frame in answer.chunks(16_384) {
                        expected.extend_from_slice(&[b"head", frame].concat());
                        let mut left = vec![&b"head"[..], frame];
                        while !left.is_empty() {
                            let slices: Vec<_> = left.iter().map(|piece| IoSlice::new(piece)).collect();
                            let mut count = server.write_vectored(&slices).await.unwrap();
                            left.retain_mut(|piece| {
                                let gone = piece.len().min(count);
                                *piece = &piece[gone..];
                                count -= gone;
                                !piece.is_empty()
                            });
                        }
                    }
                }
                poll_fn(|context| flusher.poll_flush(context)).await.unwrap();
                assert!(server.inner().io.taken == expected);
                assert_eq!(flusher.sent(), expected.len() as u64);
                assert!(answers.into_iter().all(|answer| answer.is_unique()));
                assert!(lock(&server.inner().lent.0).is_empty());
            });
        }
    }

    #[test]
    fn payload_is_kept_and_not_copied_when_it_is_lent() {
        run(async {
            let (mut server, flusher) = Buffered::new(tokio::io::sink(), Arc::default());
            flusher.gather();
            let (answer, other) = (Bytes::from(pattern(20_000)), Bytes::from(pattern(20_000)));
            flusher.lender().note(&answer);
            assert_eq!(server.write(&answer[100..]).await.unwrap(), 19_900);
            assert_eq!(server.write(&other).await.unwrap(), 20_000);
            let inner = server.inner();
            let [Piece::Kept(kept), Piece::Copied(20_000)] = &*inner.gathered.pieces.iter().collect::<Vec<_>>() else {
                panic!("{:?}", inner.gathered.pieces);
            };
            assert_eq!(kept.as_ptr_range(), answer[100..].as_ptr_range());
        });
    }

    #[test]
    fn an_answer_that_http2_drops_is_let_go_of_and_none_outlives_its_connection() {
        run(async {
            let (server, flusher) = Buffered::new(tokio::io::sink(), Arc::default());
            let lender = flusher.lender();
            let dropped = Bytes::from(pattern(20_000));
            let held = dropped.clone();
            lender.note(&dropped);
            drop(dropped);
            poll_fn(|context| flusher.poll_flush(context)).await.unwrap();
            assert_eq!(lock(&server.inner().lent.0).len(), 1);
            drop(held);
            poll_fn(|context| flusher.poll_flush(context)).await.unwrap();
            assert!(lock(&server.inner().lent.0).is_empty());
            let late = Bytes::from(pattern(20_000));
            lender.note(&late);
            drop((server, flusher));
            assert!(late.is_unique());
            lender.note(&late);
            assert!(late.is_unique());
        });
    }

    #[test]
    fn a_connection_that_has_much_to_read_lets_others_have_a_turn() {
        run(async {
            let (mut client, server) = duplex(10 * BUFFER_BYTES);
            let (mut server, _flusher) = Buffered::new(server, Arc::default());
            client.write_all(&pattern(5 * BUFFER_BYTES)).await.unwrap();
            let (mut left, mut turns) = (5 * BUFFER_BYTES, 1);
            poll_fn(|context| {
                while left > 0 {
                    let mut piece = [0; 8192];
                    let mut into = ReadBuf::new(&mut piece);
                    let Poll::Ready(read) = Pin::new(&mut server).poll_read(context, &mut into) else {
                        turns += 1;
                        return Poll::Pending;
                    };
                    read.unwrap();
                    left -= into.filled().len();
                }
                Poll::Ready(())
            })
            .await;
            assert_eq!(turns, 5);
        });
    }
}
