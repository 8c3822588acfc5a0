//! gRPC's length-prefixed messages: a flag, four bytes of length, and the message, cut anywhere into DATA frames.
//!
//! Invariants of `Deframer`: at most one message is incomplete; what is held of it are bytes that have arrived, and
//! memory ahead of them is reserved up to `RESERVE_BYTES` whatever the prefix claims; after an error every further
//! chunk gives the same error.

use std::collections::VecDeque;
use std::fmt;

use bytes::{Buf, Bytes};

/// A flag and the length of the message that follows, big-endian.
pub const PREFIX_BYTES: usize = 5;

/// Memory taken at once for a message that has only begun: an honest large one is assembled without moving, and a
/// prefix that lies costs address space, not memory.
const RESERVE_BYTES: usize = 16 << 20;

/// A message up to this size is copied out of its chunk: a slice would keep the connection's whole read buffer alive
/// for it, and have HTTP/2 allocate another.
const COPY_BYTES: usize = 1024;

/// One message as it came.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Frame {
    pub compressed: bool,
    pub payload: Bytes,
}

/// Why a byte stream is not a sequence of acceptable messages; the text is for the client.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum FramingError {
    TooLarge { got: usize, limit: usize },
    BadFlag(u8),
    Truncated { missing: usize },
}

impl fmt::Display for FramingError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::TooLarge { got, limit } => {
                write!(f, "Received message larger than max ({got} vs. {limit})")
            }
            Self::BadFlag(flag) => write!(f, "a message begins with flag {flag:#04x}; gRPC knows 0x00 and 0x01"),
            Self::Truncated { missing } => write!(f, "the request ended {missing} bytes before its message did"),
        }
    }
}

impl std::error::Error for FramingError {}

/// The prefix of a message of `length` bytes, which must fit in 32 bits.
pub fn prefix(compressed: bool, length: usize) -> [u8; PREFIX_BYTES] {
    debug_assert!(u32::try_from(length).is_ok());
    let [a, b, c, d] = (length as u32).to_be_bytes();
    [u8::from(compressed), a, b, c, d]
}

/// A message of which at least one byte is missing.
#[derive(Debug)]
struct Partial {
    compressed: bool,
    length: usize,
    data: Vec<u8>,
}

impl Partial {
    fn new(compressed: bool, length: usize) -> Self {
        Self { compressed, length, data: Vec::with_capacity(length.min(RESERVE_BYTES)) }
    }

    /// Takes what belongs to the message off the chunk; gives the message when it is complete.
    fn fill(&mut self, chunk: &mut Bytes) -> Option<Frame> {
        let piece = chunk.split_to(chunk.len().min(self.length - self.data.len()));
        let needed = self.data.len() + piece.len();
        if needed > self.data.capacity() {
            let capacity = needed.max(self.data.capacity() * 2).min(self.length);
            self.data.reserve_exact(capacity - self.data.len());
        }
        self.data.extend_from_slice(&piece);
        (self.data.len() == self.length)
            .then(|| Frame { compressed: self.compressed, payload: std::mem::take(&mut self.data).into() })
    }
}

/// Cuts one direction of one RPC into messages.
#[derive(Debug)]
pub struct Deframer {
    max_bytes: usize,
    prefix: [u8; PREFIX_BYTES],
    prefix_filled: usize,
    partial: Option<Partial>,
}

impl Deframer {
    /// A deframer that refuses messages of more than `max_bytes`, as they come, before they are decompressed.
    pub fn new(max_bytes: usize) -> Self {
        Self { max_bytes, prefix: [0; PREFIX_BYTES], prefix_filled: 0, partial: None }
    }

    /// Appends the messages that the chunk completes to `out`, those before an error too.
    pub fn push(&mut self, mut chunk: Bytes, out: &mut VecDeque<Frame>) -> Result<(), FramingError> {
        loop {
            if let Some(partial) = &mut self.partial {
                let Some(frame) = partial.fill(&mut chunk) else {
                    return Ok(());
                };
                self.partial = None;
                out.push_back(frame);
            }
            let Some((compressed, length)) = self.take_prefix(&mut chunk)? else {
                return Ok(());
            };
            if chunk.len() < length {
                self.partial = Some(Partial::new(compressed, length));
            } else {
                out.push_back(Frame { compressed, payload: cut(&mut chunk, length) });
            }
        }
    }

    /// The end of the stream: an error inside a message.
    pub fn finish(&self) -> Result<(), FramingError> {
        match (&self.partial, self.prefix_filled) {
            (Some(partial), _) => Err(FramingError::Truncated { missing: partial.length - partial.data.len() }),
            (None, 0) => Ok(()),
            (None, filled) => Err(FramingError::Truncated { missing: PREFIX_BYTES - filled }),
        }
    }

    /// Bytes of the incomplete message that have arrived, its prefix among them; 0 between messages, and only there.
    pub fn held_bytes(&self) -> usize {
        self.partial.as_ref().map_or(self.prefix_filled, |partial| PREFIX_BYTES + partial.data.len())
    }

    /// Takes a prefix off the chunk; None while it is incomplete. A bad prefix stays, and is found bad again.
    fn take_prefix(&mut self, chunk: &mut Bytes) -> Result<Option<(bool, usize)>, FramingError> {
        let count = chunk.len().min(PREFIX_BYTES - self.prefix_filled);
        chunk.copy_to_slice(&mut self.prefix[self.prefix_filled..self.prefix_filled + count]);
        self.prefix_filled += count;
        if self.prefix_filled < PREFIX_BYTES {
            return Ok(None);
        }
        let [flag, a, b, c, d] = self.prefix;
        let length = u32::from_be_bytes([a, b, c, d]) as usize;
        if flag > 1 {
            return Err(FramingError::BadFlag(flag));
        }
        if length > self.max_bytes {
            return Err(FramingError::TooLarge { got: length, limit: self.max_bytes });
        }
        self.prefix_filled = 0;
        Ok(Some((flag == 1, length)))
    }
}

/// Takes a whole message off the chunk: a slice of it, or a copy of a small one.
fn cut(chunk: &mut Bytes, length: usize) -> Bytes {
    if length > COPY_BYTES {
        return chunk.split_to(length);
    }
    let payload = Bytes::copy_from_slice(&chunk[..length]);
    chunk.advance(length);
    payload
}

#[cfg(test)]
mod tests {
    use proptest::collection::vec;
    use proptest::prelude::*;

    use super::*;

    fn wire(messages: &[(bool, Vec<u8>)]) -> Vec<u8> {
        let each =
            |(compressed, payload): &(bool, Vec<u8>)| [&prefix(*compressed, payload.len()), &payload[..]].concat();
        messages.iter().flat_map(each).collect()
    }

    /// Pushes bytes in pieces of the given sizes, in turn.
    fn push_in_pieces(
        deframer: &mut Deframer,
        bytes: &[u8],
        sizes: &[usize],
    ) -> (VecDeque<Frame>, Option<FramingError>) {
        let (mut out, mut rest, mut sizes) = (VecDeque::new(), Bytes::copy_from_slice(bytes), sizes.iter().cycle());
        while !rest.is_empty() {
            let size = (*sizes.next().unwrap_or(&1)).clamp(1, rest.len());
            if let Err(error) = deframer.push(rest.split_to(size), &mut out) {
                return (out, Some(error));
            }
        }
        (out, None)
    }

    #[test]
    fn a_large_message_inside_one_chunk_is_a_slice_of_it_and_a_small_one_is_not() {
        let chunk = Bytes::from(wire(&[(false, vec![7; COPY_BYTES + 1]), (false, vec![8; COPY_BYTES])]));
        let mut out = VecDeque::new();
        Deframer::new(1 << 20).push(chunk.clone(), &mut out).unwrap();
        let within = |frame: &Frame| chunk.as_ptr_range().contains(&frame.payload.as_ptr());
        assert_eq!(out.iter().map(within).collect::<Vec<_>>(), [true, false]);
    }

    #[test]
    fn an_empty_message_is_a_message() {
        let mut out = VecDeque::new();
        Deframer::new(0).push(Bytes::from_static(&[0, 0, 0, 0, 0, 1, 0, 0, 0, 0]), &mut out).unwrap();
        let empty = |compressed| Frame { compressed, payload: Bytes::new() };
        assert_eq!(out, [empty(false), empty(true)]);
    }

    #[test]
    fn a_message_above_the_limit_is_refused_by_its_prefix_after_the_ones_before_it() {
        let mut bytes = wire(&[(false, b"good".to_vec())]);
        bytes.extend(prefix(false, 5));
        let (mut out, mut deframer) = (VecDeque::new(), Deframer::new(4));
        let error = deframer.push(bytes.into(), &mut out).unwrap_err();
        assert_eq!(error, FramingError::TooLarge { got: 5, limit: 4 });
        assert_eq!(error.to_string(), "Received message larger than max (5 vs. 4)");
        assert_eq!(out.len(), 1);
        assert_eq!(deframer.push(Bytes::from_static(b"more"), &mut out), Err(error));
    }

    #[test]
    fn a_flag_that_grpc_does_not_know_is_refused() {
        let pushed = Deframer::new(4).push(Bytes::from_static(&[2, 0, 0, 0, 0]), &mut VecDeque::new());
        assert_eq!(pushed, Err(FramingError::BadFlag(2)));
    }

    #[test]
    fn the_end_inside_a_message_says_how_much_is_missing() {
        let (mut deframer, mut out) = (Deframer::new(100), VecDeque::new());
        assert_eq!(deframer.finish(), Ok(()));
        deframer.push(Bytes::from_static(&[0, 0]), &mut out).unwrap();
        assert_eq!(deframer.finish(), Err(FramingError::Truncated { missing: 3 }));
        assert_eq!(deframer.held_bytes(), 2);
        deframer.push(Bytes::from_static(&[0, 0, 10, 1, 2]), &mut out).unwrap();
        assert_eq!(deframer.finish(), Err(FramingError::Truncated { missing: 8 }));
        assert_eq!(deframer.held_bytes(), PREFIX_BYTES + 2);
        deframer.push(Bytes::from_static(&[0; 8]), &mut out).unwrap();
        assert_eq!((deframer.finish(), deframer.held_bytes(), out.len()), (Ok(()), 0, 1));
    }

    #[test]
    fn a_prefix_that_claims_four_gigabytes_reserves_a_bounded_part() {
        let mut deframer = Deframer::new(usize::MAX);
        deframer.push(Bytes::from_static(&[0, 255, 255, 255, 255, 1]), &mut VecDeque::new()).unwrap();
        assert_eq!(deframer.held_bytes(), PREFIX_BYTES + 1);
        assert!(deframer.partial.unwrap().data.capacity() <= RESERVE_BYTES);
    }

    #[test]
    fn a_message_above_the_reserve_grows_by_what_arrives_and_never_beyond_its_length() {
        let length = RESERVE_BYTES + 10;
        let (mut deframer, mut out) = (Deframer::new(usize::MAX), VecDeque::new());
        deframer.push(Bytes::copy_from_slice(&prefix(false, length)), &mut out).unwrap();
        deframer.push(vec![1; RESERVE_BYTES + 1].into(), &mut out).unwrap();
        assert_eq!(deframer.partial.as_ref().unwrap().data.capacity(), length);
        deframer.push(vec![1; 9].into(), &mut out).unwrap();
        assert_eq!(out[0].payload.len(), length);
    }

    proptest! {
        #[test]
        fn any_split_of_any_messages_gives_the_same_frames(
            messages in vec((any::<bool>(), vec(any::<u8>(), 0..3000)), 0..8),
            sizes in vec(1_usize..2000, 1..20),
        ) {
            let mut deframer = Deframer::new(1 << 20);
            let (out, error) = push_in_pieces(&mut deframer, &wire(&messages), &sizes);
            let got: Vec<_> = out.into_iter().map(|frame| (frame.compressed, frame.payload.to_vec())).collect();
            prop_assert_eq!(got, messages);
            prop_assert_eq!((error, deframer.finish(), deframer.held_bytes()), (None, Ok(()), 0));
        }

        #[test]
        fn any_bytes_give_the_same_however_they_are_split_and_reserve_no_more_than_the_bound(
            bytes in vec(prop_oneof![4 => 0_u8..2, 1 => any::<u8>()], 0..400),
            sizes in vec(1_usize..50, 1..20),
            max_bytes in prop_oneof![0_usize..1000, Just(usize::MAX)],
        ) {
            let (mut whole, mut pieces) = (Deframer::new(max_bytes), Deframer::new(max_bytes));
            let expected = push_in_pieces(&mut whole, &bytes, &[usize::MAX]);
            prop_assert_eq!(push_in_pieces(&mut pieces, &bytes, &sizes), expected);
            prop_assert_eq!(pieces.finish(), whole.finish());
            prop_assert!(pieces.held_bytes() <= bytes.len());
            prop_assert!(pieces.partial.is_none_or(|partial| partial.data.capacity() <= RESERVE_BYTES));
        }
    }
}
