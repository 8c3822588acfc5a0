//! Makes the `:authority` of clients on Unix sockets one that HTTP knows: gRPC's C core sends the socket's path with
//! %2F for its slashes, and the `http` crate takes no percent sign there and ends the stream. Nor does it take colons,
//! at signs and brackets that make no port, user or IPv6 address, which C core leaves as they are in the path.
//!
//! The bytes are patched as they pass, without a change of length: in an `:authority` value these become dots. In
//! Huffman's code (RFC 7541, appendix B) only percent signs do, as C core does not use it: `%` is 010101 and `.` is
//! 010111, so that one bit tells them apart. The only other code that begins like it, 010100, is a space, which no
//! authority may have. The entry that goes to HPACK's dynamic table keeps its size, and both sides keep the same table.
//!
//! Invariants: nothing but values of `:authority` is changed; bytes may be cut anywhere; nothing is allocated.

use std::io::{self, IoSlice};
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

/// "PRI * HTTP/2.0...", which the client sends first.
const PREFACE_BYTES: usize = 24;

/// Length, type, flags and stream of a frame (RFC 9113, section 4.1).
const HEADER_BYTES: usize = 9;

const HEADERS: u8 = 1;
const CONTINUATION: u8 = 9;
const PADDED: u8 = 0x8;
const PRIORITY: u8 = 0x20;

/// A stream and a weight, before the header block of a HEADERS frame with PRIORITY.
const PRIORITY_BYTES: usize = 5;

/// `:authority` in HPACK's static table (RFC 7541, appendix A).
const AUTHORITY: u8 = 1;

/// The same spelled out, as gRPC's C core has it, and in Huffman's code.
const NAME: &[u8] = b":authority";
const HUFFMAN_NAME: &[u8] = &[0xb8, 0x3b, 0x53, 0x39, 0xec, 0x32, 0x7d, 0x7f];

/// What C core may send of a path, and the `http` crate may refuse.
const REFUSED: &[u8] = b"%:@[]";

/// How many of Huffman's codes have each length, from 5 bits (RFC 7541, appendix B). The code is canonical: codes of
/// one length follow each other, and the first of the next length follows the last of these.
const CODES: [u32; 26] = [10, 26, 32, 6, 0, 5, 3, 2, 6, 2, 3, 0, 0, 0, 3, 8, 13, 26, 29, 12, 4, 15, 19, 29, 0, 4];
const SHORTEST_BITS: usize = 5;

/// What `%` begins with: the bit behind it is set to make it a dot.
const PERCENT_PREFIX: (u32, usize) = (0b0101, 4);

/// Where in a string of Huffman's code the next bit is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Code {
    bits: u32,
    length: usize,
}

impl Code {
    /// Passes over a byte of an `:authority`, and patches it.
    fn patch(&mut self, byte: &mut u8) {
        for shift in (0..8).rev() {
            if (self.bits, self.length) == PERCENT_PREFIX && *byte >> shift & 1 == 0 {
                *byte |= 1 << shift;
            }
            self.push(u32::from(*byte >> shift & 1));
        }
    }

    fn push(&mut self, bit: u32) {
        self.bits = self.bits << 1 | bit;
        self.length += 1;
        if self.length < SHORTEST_BITS {
            return;
        }
        // The first code of this length, which those of shorter lengths leave.
        let mut first = 0;
        for (index, &count) in CODES.iter().enumerate() {
            if SHORTEST_BITS + index == self.length {
                if self.bits.wrapping_sub(first) < count {
                    *self = Self::default();
                }
                return;
            }
            first = (first + count) << 1;
        }
        *self = Self::default(); // longer than any: only padding, or no code
    }
}

/// Where in a header block the next byte is (RFC 7541, section 6).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Block {
    /// Before a field or an update of the table's size.
    Field,
    /// In the later bytes of an integer; these strings follow it.
    Integer(Strings),
    /// Before a string.
    String(Strings),
    /// In the later bytes of a string's length.
    Length { strings: Strings, huffman: bool, length: usize, shift: u32 },
    /// In a string with this many bytes to come.
    Bytes { strings: Strings, huffman: bool, left: usize, code: Code },
    /// In a name with this many bytes to come; all before them were those of `:authority`, or not.
    Name { huffman: bool, length: usize, left: usize, matches: bool },
}

/// The strings of a field that are still to come, the one under way included.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Strings {
    None,
    NameAndValue,
    Value,
    Authority,
}

impl Block {
    fn patch(self, byte: &mut u8) -> Self {
        match self {
            Self::Field => Self::field(*byte),
            Self::Integer(strings) if *byte & 0x80 != 0 => Self::Integer(strings),
            Self::Integer(Strings::None) => Self::Field,
            Self::Integer(strings) => Self::String(strings),
            Self::String(strings) => {
                let (huffman, length) = (*byte & 0x80 != 0, usize::from(*byte & 0x7f));
                match length {
                    0x7f => Self::Length { strings, huffman, length, shift: 0 },
                    _ => Self::bytes(strings, huffman, length),
                }
            }
            Self::Length { strings, huffman, length, shift } => {
                let more = usize::from(*byte & 0x7f).checked_shl(shift).unwrap_or(usize::MAX);
                let length = length.saturating_add(more);
                match *byte & 0x80 {
                    0 => Self::bytes(strings, huffman, length),
                    _ => Self::Length { strings, huffman, length, shift: shift.saturating_add(7) },
                }
            }
            Self::Bytes { strings, huffman, left, mut code } => {
                match (strings, huffman) {
                    (Strings::Authority, true) => code.patch(byte),
                    (Strings::Authority, false) if REFUSED.contains(byte) => *byte = b'.',
                    _ => {}
                }
                match left {
                    1 => Self::Field,
                    _ => Self::Bytes { strings, huffman, left: left - 1, code },
                }
            }
            Self::Name { huffman, length, left, matches } => {
                let name = if huffman { HUFFMAN_NAME } else { NAME };
                let matches = matches && name.get(length - left) == Some(byte);
                match left {
                    1 if matches && length == name.len() => Self::String(Strings::Authority),
                    1 => Self::String(Strings::Value),
                    _ => Self::Name { huffman, length, left: left - 1, matches },
                }
            }
        }
    }

    fn field(byte: u8) -> Self {
        // Indexed; literal that is indexed; update of the table's size; literal that is not.
        let (prefix, literal) = match byte.leading_zeros() {
            0 => (0x7f, false),
            1 => (0x3f, true),
            2 => (0x1f, false),
            _ => (0x0f, true),
        };
        let strings = match byte & prefix {
            _ if !literal => Strings::None,
            0 => Strings::NameAndValue,
            AUTHORITY => Strings::Authority,
            _ => Strings::Value,
        };
        match strings {
            _ if byte & prefix == prefix => Self::Integer(strings),
            Strings::None => Self::Field,
            _ => Self::String(strings),
        }
    }

    fn bytes(strings: Strings, huffman: bool, length: usize) -> Self {
        match (strings, length) {
            (Strings::NameAndValue, 0) => Self::String(Strings::Value),
            (Strings::NameAndValue, _) => Self::Name { huffman, length, left: length, matches: true },
            (_, 0) => Self::Field,
            _ => Self::Bytes { strings, huffman, left: length, code: Code::default() },
        }
    }
}

/// Where in what a client sends the next byte is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// In the preface, the payload of another frame, or padding.
    Pass {
        left: usize,
    },
    Header {
        header: [u8; HEADER_BYTES],
        filled: usize,
    },
    /// Before the length of the padding, which counts in `length`, the payload's.
    PadLength {
        length: usize,
        priority: usize,
    },
    /// In what is before the part of a header block.
    Priority {
        left: usize,
        fragment: usize,
        padding: usize,
    },
    Fragment {
        left: usize,
        padding: usize,
    },
}

impl State {
    const FRAME: Self = Self::Header { header: [0; HEADER_BYTES], filled: 0 };
}

/// Finds header blocks in what a client sends, and patches them.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Patcher {
    state: State,
    block: Block,
}

impl Patcher {
    fn new() -> Self {
        Self { state: State::Pass { left: PREFACE_BYTES }, block: Block::Field }
    }

    fn patch(&mut self, mut bytes: &mut [u8]) {
        while !bytes.is_empty() {
            let taken = self.step(bytes);
            bytes = &mut bytes[taken..];
        }
    }

    /// Takes bytes up to the next change of state; gives how many.
    fn step(&mut self, bytes: &mut [u8]) -> usize {
        let available = bytes.len();
        match self.state {
            State::Pass { left } => {
                let taken = left.min(available);
                self.state = if taken == left { State::FRAME } else { State::Pass { left: left - taken } };
                taken
            }
            State::Header { mut header, filled } => {
                header[filled] = bytes[0];
                let filled = filled + 1;
                self.state = if filled == HEADER_BYTES { self.begin(header) } else { State::Header { header, filled } };
                1
            }
            State::PadLength { length, priority } => {
                let padding = usize::from(bytes[0]);
                let fragment = length.saturating_sub(1 + priority + padding);
                self.state = State::Priority { left: priority, fragment, padding };
                1
            }
            State::Priority { left, fragment, padding } => {
                let taken = left.min(available);
                self.state = if taken == left {
                    State::Fragment { left: fragment, padding }
                } else {
                    State::Priority { left: left - taken, fragment, padding }
                };
                taken
            }
            State::Fragment { left, padding } => {
                let taken = left.min(available);
                for byte in &mut bytes[..taken] {
                    self.block = self.block.patch(byte);
                }
                self.state = if taken == left {
                    State::Pass { left: padding }
                } else {
                    State::Fragment { left: left - taken, padding }
                };
                taken
            }
        }
    }

    /// What comes after the header of a frame.
    fn begin(&mut self, [a, b, c, kind, flags, ..]: [u8; HEADER_BYTES]) -> State {
        let length = u32::from_be_bytes([0, a, b, c]) as usize;
        match kind {
            HEADERS => {
                self.block = Block::Field;
                let priority = if flags & PRIORITY == 0 { 0 } else { PRIORITY_BYTES };
                if flags & PADDED != 0 && length > 0 {
                    return State::PadLength { length, priority };
                }
                State::Priority { left: priority, fragment: length.saturating_sub(priority), padding: 0 }
            }
            CONTINUATION => State::Fragment { left: length, padding: 0 },
            _ => State::Pass { left: length },
        }
    }
}

/// A socket whose clients' authorities are patched, when they come through a Unix socket.
#[derive(Debug)]
pub struct Authority<T> {
    io: T,
    patcher: Option<Patcher>,
}

impl<T> Authority<T> {
    pub fn new(io: T, is_unix: bool) -> Self {
        Self { io, patcher: is_unix.then(Patcher::new) }
    }
}

impl<T: AsyncRead + Unpin> AsyncRead for Authority<T> {
    fn poll_read(self: Pin<&mut Self>, context: &mut Context<'_>, into: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        let before = into.filled().len();
        ready!(Pin::new(&mut this.io).poll_read(context, into))?;
        if let Some(patcher) = &mut this.patcher {
            patcher.patch(&mut into.filled_mut()[before..]);
        }
        Poll::Ready(Ok(()))
    }
}

impl<T: AsyncWrite + Unpin> AsyncWrite for Authority<T> {
    fn poll_write(self: Pin<&mut Self>, context: &mut Context<'_>, data: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.get_mut().io).poll_write(context, data)
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        data: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.get_mut().io).poll_write_vectored(context, data)
    }

    fn is_write_vectored(&self) -> bool {
        self.io.is_write_vectored()
    }

    fn poll_flush(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().io).poll_flush(context)
    }

    fn poll_shutdown(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().io).poll_shutdown(context)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const DATA: u8 = 0;

    /// A header block by python-hyper's hpack: `:method`, `:authority`, `k%: v%2F` and `te`, in Huffman's code.
    const WITH_PERCENT: &str = "8341894d35aa2c235d07275f4082eaaf84eea8b0ff4082497f864d833505b11f";
    /// The same with a dot in the authority.
    const WITH_DOT: &str = "8341894d35ae2c235d07275f4082eaaf84eea8b0ff4082497f864d833505b11f";

    fn hex(text: &str) -> Vec<u8> {
        (0..text.len()).step_by(2).map(|at| u8::from_str_radix(&text[at..at + 2], 16).unwrap()).collect()
    }

    fn frame(kind: u8, flags: u8, payload: &[u8]) -> Vec<u8> {
        let length = (payload.len() as u32).to_be_bytes();
        [&length[1..], &[kind, flags, 0, 0, 0, 1], payload].concat()
    }

    /// What becomes of frames behind the preface.
    fn patched(frames: &[Vec<u8>]) -> Vec<u8> {
        let mut bytes = [vec![b'%'; PREFACE_BYTES], frames.concat()].concat();
        Patcher::new().patch(&mut bytes);
        assert!(bytes.starts_with(&[b'%'; PREFACE_BYTES]));
        bytes.split_off(PREFACE_BYTES)
    }

    #[test]
    fn only_the_authority_loses_its_percent_signs() {
        assert_eq!(patched(&[frame(HEADERS, 4, &hex(WITH_PERCENT))]), frame(HEADERS, 4, &hex(WITH_DOT)));
    }

    #[test]
    fn many_of_them_in_a_row_and_at_the_end_are_found() {
        assert_eq!(
            patched(&[frame(HEADERS, 4, &hex("4186555546a8b0ab"))]),
            frame(HEADERS, 4, &hex("41865d75c6b8b0af"))
        );
    }

    #[test]
    fn an_authority_that_is_not_compressed_is_patched_too() {
        let block = |authority: &[u8]| [&[0x41, authority.len() as u8], authority].concat();
        assert_eq!(patched(&[frame(HEADERS, 4, &block(b"tmp%2Fa%"))]), frame(HEADERS, 4, &block(b"tmp.2Fa.")));
    }

    #[test]
    fn an_authority_whose_name_is_spelled_out_is_known_by_it() {
        let block = |name: &[u8], authority: &[u8]| {
            [&[0x40, name.len() as u8], name, &[authority.len() as u8], authority, &[0x83]].concat()
        };
        assert_eq!(patched(&[frame(HEADERS, 4, &block(NAME, b"a%"))]), frame(HEADERS, 4, &block(NAME, b"a.")));
        for other in [&b":authorit"[..], b":authority2", b"%authority", b""] {
            assert_eq!(patched(&[frame(HEADERS, 4, &block(other, b"a%"))]), frame(HEADERS, 4, &block(other, b"a%")));
        }
        let huffman = |authority: &[u8]| [&[0, 0x88], HUFFMAN_NAME, &[0x81 + 1], authority].concat();
        // "%" and padding, and a byte of padding more.
        let (percent, dot) = ([0b0101_0111, 0xff], [0b0101_1111, 0xff]);
        assert_eq!(patched(&[frame(HEADERS, 4, &huffman(&percent))]), frame(HEADERS, 4, &huffman(&dot)));
    }

    #[test]
    fn what_c_core_leaves_in_a_path_becomes_an_authority_that_http_takes() {
        for path in ["pci-0000:00:1f.2%2Fs", "tmp%2F[s", "tmp%2Fs]", "tmp%2Fs@", "a@[b:c%20", "-._~!$&'()*+,;=%2F"] {
            assert!(path.parse::<http::uri::Authority>().is_err());
            let block = [&[0x40, NAME.len() as u8], NAME, &[path.len() as u8], path.as_bytes()].concat();
            let patched = patched(&[frame(HEADERS, 4, &block)]);
            let value = &patched[patched.len() - path.len()..];
            assert!(http::uri::Authority::try_from(value).is_ok(), "{path}");
        }
    }

    #[test]
    fn a_long_authority_is_patched_to_its_end() {
        let long = vec![b'%'; 1000];
        // 127 in the first byte, then 1000 - 127 in groups of seven bits.
        let block = [&[0x11, 0x7f, 0xe9, 0x06][..], &long, &[0x83]].concat();
        let dots = [&block[..4], &[b'.'; 1000], &[0x83]].concat();
        assert_eq!(patched(&[frame(HEADERS, 4, &block)]), frame(HEADERS, 4, &dots));
    }

    #[test]
    fn padding_priority_and_other_frames_stay_as_they_are() {
        let with = |block: &[u8]| [&[3, b'%', b'%', b'%', b'%', b'%'], block, b"%%%"].concat();
        let frames = |block: &[u8]| {
            [
                frame(DATA, 0, b"%%%"),
                frame(HEADERS, 4 | PADDED | PRIORITY, &with(block)),
                frame(DATA, 1, b"%"),
                frame(HEADERS, 4, block),
            ]
        };
        assert_eq!(patched(&frames(&hex(WITH_PERCENT))), frames(&hex(WITH_DOT)).concat());
    }

    #[test]
    fn an_index_of_several_bytes_is_passed_over() {
        let block = |authority: &[u8]| {
            [&[0x7f, 0x80, 0x01, 1, b'%', 0xff, 0x80, 0x01, 0x3f, 0xe1, 0x1f, 0x01, 2], authority].concat()
        };
        assert_eq!(patched(&[frame(HEADERS, 4, &block(b"a%"))]), frame(HEADERS, 4, &block(b"a.")));
    }

    #[test]
    fn codes_are_as_many_as_there_are_bytes_and_an_end() {
        assert_eq!(CODES.iter().sum::<u32>(), 257);
        // Kraft's equality: the code is complete.
        let space: u64 =
            CODES.iter().zip(SHORTEST_BITS as u32..).map(|(&count, bits)| u64::from(count) << (30 - bits)).sum();
        assert_eq!(space, 1 << 30);
    }

    proptest! {
        #[test]
        fn cuts_change_nothing(cuts in prop::collection::vec(1_usize..60, 0..8)) {
            let block = hex(WITH_PERCENT);
            let (first, second) = block.split_at(7);
            let frames = [frame(HEADERS, 0, first), frame(CONTINUATION, 4, second)];
            let whole = [hex(WITH_DOT)[..7].to_vec(), hex(WITH_DOT)[7..].to_vec()];
            let expected = [frame(HEADERS, 0, &whole[0]), frame(CONTINUATION, 4, &whole[1])].concat();
            let mut bytes = [vec![0; PREFACE_BYTES], frames.concat()].concat();
            let (mut patcher, mut rest) = (Patcher::new(), &mut bytes[..]);
            for cut in cuts {
                let (piece, after) = rest.split_at_mut(cut.min(rest.len()));
                patcher.patch(piece);
                rest = after;
            }
            patcher.patch(rest);
            prop_assert_eq!(&bytes[PREFACE_BYTES..], &expected[..]);
        }

        #[test]
        fn junk_keeps_its_frames(mut junk in prop::collection::vec(any::<u8>(), 0..300)) {
            let before = junk.clone();
            let mut frames = [vec![0; PREFACE_BYTES], frame(HEADERS, 4, &junk), frame(DATA, 1, b"%")].concat();
            Patcher::new().patch(&mut frames);
            prop_assert_eq!(&frames[frames.len() - 10..], &frame(DATA, 1, b"%")[..]);
            // Bits are only set, and bytes of strings that are not compressed only become dots.
            junk.copy_from_slice(&frames[PREFACE_BYTES + HEADER_BYTES..frames.len() - 10]);
            let may_become = |was: u8, is: u8| was | is == is || REFUSED.contains(&was) && is == b'.';
            prop_assert!(before.iter().zip(&junk).all(|(&was, &is)| may_become(was, is)));
        }
    }
}
