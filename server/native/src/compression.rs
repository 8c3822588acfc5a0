//! gRPC's message encodings, and decompression whose memory is bounded by what the receiver accepts.

use std::fmt;
use std::io::{self, Read, Write};

use bytes::Bytes;
use flate2::Compression;
use flate2::bufread::{MultiGzDecoder, ZlibDecoder};
use flate2::write::{GzEncoder, ZlibEncoder};
use http::HeaderValue;

/// How a message is encoded; gRPC's `deflate` is the zlib format, not a raw stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Encoding {
    Identity,
    Gzip,
    Deflate,
}

/// The value of `grpc-accept-encoding`.
pub const ACCEPTED: &str = "identity, deflate, gzip";

/// The first guess at the size of a message is this many times its compressed size.
const EXPECTED_RATIO: usize = 4;

/// The least memory that is taken for a message: smaller ones are not worth growing.
const FIRST_BYTES: usize = 1024;

/// The most memory that is taken on a guess; from there on it is doubled as the message shows to be larger.
const GUESS_BYTES: usize = 16 << 20;

/// The highest level that zlib knows.
const MAX_LEVEL: u32 = 9;

impl Encoding {
    /// The encoding of a `grpc-encoding` name; None when it is not one of ours.
    pub fn parse(name: &[u8]) -> Option<Self> {
        match name {
            b"identity" => Some(Self::Identity),
            b"gzip" => Some(Self::Gzip),
            b"deflate" => Some(Self::Deflate),
            _ => None,
        }
    }

    pub fn name(self) -> &'static str {
        match self {
            Self::Identity => "identity",
            Self::Gzip => "gzip",
            Self::Deflate => "deflate",
        }
    }
}

/// Why a compressed message is refused; the text is for the client.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum InflateError {
    TooLarge { limit: usize },
    Corrupt(String),
}

impl fmt::Display for InflateError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::TooLarge { limit } => {
                write!(f, "Received message larger than max: it decompresses to more than {limit} bytes")
            }
            Self::Corrupt(reason) => write!(f, "the compressed message is corrupt: {reason}"),
        }
    }
}

impl std::error::Error for InflateError {}

/// The best encoding that a client takes by its `grpc-accept-encoding`, gzip before deflate; None for identity only.
pub fn choose(accept: Option<&HeaderValue>) -> Option<Encoding> {
    let accepts = |encoding: Encoding| {
        let names = accept?.as_bytes().split(|byte| *byte == b',');
        names.into_iter().any(|name| name.trim_ascii() == encoding.name().as_bytes()).then_some(encoding)
    };
    accepts(Encoding::Gzip).or_else(|| accepts(Encoding::Deflate))
}

/// The chunks, joined and compressed at a level of 0 to 9.
pub fn deflate(encoding: Encoding, level: u32, chunks: &[Bytes]) -> Bytes {
    let level = Compression::new(level.min(MAX_LEVEL));
    let written = match encoding {
        Encoding::Identity => Ok(chunks.concat()),
        Encoding::Gzip => write_all(GzEncoder::new(Vec::new(), level), chunks).and_then(GzEncoder::finish),
        Encoding::Deflate => write_all(ZlibEncoder::new(Vec::new(), level), chunks).and_then(ZlibEncoder::finish),
    };
    written.expect("memory takes every write").into()
}

fn write_all<W: Write>(mut encoder: W, chunks: &[Bytes]) -> io::Result<W> {
    for chunk in chunks {
        encoder.write_all(chunk)?;
    }
    Ok(encoder)
}

/// The message that `data` is a compressed form of.
///
/// Takes no more memory than `limit`, and stops at the first byte beyond it. Gzip may have several members (RFC 1952);
/// whatever follows the end of the data is an error.
pub fn inflate(encoding: Encoding, data: &[u8], limit: usize) -> Result<Bytes, InflateError> {
    let mut rest = data;
    let inflated = match encoding {
        Encoding::Identity if data.len() > limit => return Err(InflateError::TooLarge { limit }),
        Encoding::Identity => return Ok(Bytes::copy_from_slice(data)),
        Encoding::Gzip => read_up_to(MultiGzDecoder::new(&mut rest), data.len(), limit),
        Encoding::Deflate => read_up_to(ZlibDecoder::new(&mut rest), data.len(), limit),
    }?;
    if rest.is_empty() {
        return Ok(inflated);
    }
    Err(InflateError::Corrupt(format!("{} bytes follow its end", rest.len())))
}

/// Reads all that comes, in memory that grows with it up to the limit.
fn read_up_to(mut reader: impl Read, compressed_bytes: usize, limit: usize) -> Result<Bytes, InflateError> {
    let corrupt = |error: io::Error| InflateError::Corrupt(error.to_string());
    let mut out = Vec::new();
    let mut capacity = compressed_bytes.saturating_mul(EXPECTED_RATIO).clamp(FIRST_BYTES, GUESS_BYTES).min(limit);
    while out.len() < limit {
        let step = capacity - out.len();
        out.reserve_exact(step);
        // `take` keeps `read_to_end` from growing the vector by its own rule.
        if reader.by_ref().take(step as u64).read_to_end(&mut out).map_err(corrupt)? < step {
            return Ok(out.into());
        }
        capacity = capacity.saturating_mul(2).min(limit);
    }
    match reader.read(&mut [0]).map_err(corrupt)? {
        0 => Ok(out.into()),
        _ => Err(InflateError::TooLarge { limit }),
    }
}

#[cfg(test)]
mod tests {
    use proptest::collection::vec;
    use proptest::prelude::*;

    use super::*;

    const COMPRESSED: [Encoding; 2] = [Encoding::Gzip, Encoding::Deflate];

    fn compress(encoding: Encoding, data: &[u8]) -> Bytes {
        deflate(encoding, 6, &[Bytes::copy_from_slice(data)])
    }

    #[test]
    fn the_names_of_encodings_are_read_as_they_are_written() {
        for encoding in [Encoding::Identity, Encoding::Gzip, Encoding::Deflate] {
            assert_eq!(Encoding::parse(encoding.name().as_bytes()), Some(encoding));
            assert!(ACCEPTED.contains(encoding.name()));
        }
        assert_eq!(Encoding::parse(b"snappy"), None);
    }

    #[test]
    fn the_best_encoding_of_those_that_a_client_takes_is_chosen() {
        let choose = |accept| choose(Some(&HeaderValue::from_static(accept)));
        assert_eq!(choose("identity, deflate, gzip"), Some(Encoding::Gzip));
        assert_eq!(choose("identity,deflate"), Some(Encoding::Deflate));
        assert_eq!(choose("identity,gzipped"), None);
        assert_eq!(choose(""), None);
        assert_eq!(super::choose(None), None);
    }

    #[test]
    fn a_message_may_be_as_large_as_the_limit_and_no_larger() {
        for encoding in COMPRESSED {
            for size in [0, 1, 1000, 1024, 1025, 100_000] {
                let data = compress(encoding, &vec![7; size]);
                assert_eq!(inflate(encoding, &data, size).unwrap().len(), size);
                assert_eq!(inflate(encoding, &data, usize::MAX).unwrap().len(), size);
                if let Some(limit) = size.checked_sub(1) {
                    assert_eq!(inflate(encoding, &data, limit), Err(InflateError::TooLarge { limit }));
                }
            }
        }
    }

    #[test]
    fn identity_is_bounded_as_well() {
        assert_eq!(inflate(Encoding::Identity, b"abc", 3).unwrap(), "abc");
        assert_eq!(inflate(Encoding::Identity, b"abc", 2), Err(InflateError::TooLarge { limit: 2 }));
    }

    #[test]
    fn gzip_may_have_several_members() {
        let data = [compress(Encoding::Gzip, b"one "), compress(Encoding::Gzip, b"two")].concat();
        assert_eq!(inflate(Encoding::Gzip, &data, 100).unwrap(), "one two");
    }

    #[test]
    fn what_is_cut_off_or_followed_by_more_is_corrupt() {
        for encoding in COMPRESSED {
            let data = compress(encoding, &[1, 2, 3, 4, 5, 6, 7, 8, 9]);
            for end in 0..data.len() {
                let inflated = inflate(encoding, &data[..end], 100);
                assert!(matches!(inflated, Err(InflateError::Corrupt(_))), "{encoding:?} {end} {inflated:?}");
            }
            let inflated = inflate(encoding, &[&data[..], b"more bytes than a header has"].concat(), 100);
            assert!(matches!(inflated, Err(InflateError::Corrupt(_))), "{encoding:?} {inflated:?}");
        }
    }

    /// A reader without end, as a bomb would be, that counts what is taken of it.
    struct Endless(usize);

    impl Read for Endless {
        fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
            self.0 += buffer.len();
            Ok(buffer.len())
        }
    }

    #[test]
    fn a_bomb_is_read_to_the_first_byte_beyond_the_limit() {
        for limit in [0, 1, 1000, 1024, 5000, 1 << 20] {
            let mut bomb = Endless(0);
            assert_eq!(read_up_to(&mut bomb, 100, limit), Err(InflateError::TooLarge { limit }));
            assert_eq!(bomb.0, limit + 1);
        }
    }

    #[test]
    fn a_real_bomb_is_refused() {
        for encoding in COMPRESSED {
            let bomb = compress(encoding, &vec![0; 64 << 20]);
            assert!(bomb.len() < 1 << 17);
            assert_eq!(inflate(encoding, &bomb, 1 << 20), Err(InflateError::TooLarge { limit: 1 << 20 }));
        }
    }

    #[test]
    fn memory_grows_with_the_message_and_not_beyond_the_limit() {
        let mut reader = Endless(0).take(100_000);
        let out = read_up_to(&mut reader, 10, 150_000).unwrap();
        assert!(Vec::from(out).capacity() <= 150_000);
    }

    proptest! {
        #[test]
        fn what_is_compressed_is_decompressed_to_the_same(
            chunks in vec(vec(any::<u8>(), 0..2000), 0..5), level in 0_u32..12, spare in 0_usize..3,
        ) {
            let chunks: Vec<Bytes> = chunks.into_iter().map(Bytes::from).collect();
            let message = chunks.concat();
            for encoding in [Encoding::Identity, Encoding::Gzip, Encoding::Deflate] {
                let data = deflate(encoding, level, &chunks);
                prop_assert_eq!(inflate(encoding, &data, message.len() + spare).unwrap(), message.clone());
            }
        }

        #[test]
        fn any_bytes_are_a_message_within_the_limit_or_an_error(
            head in prop_oneof![Just(&b""[..]), Just(&b"\x1f\x8b\x08\x00\0\0\0\0\0\xff"[..]), Just(&b"\x78\x9c"[..])],
            tail in vec(any::<u8>(), 0..500),
            limit in 0_usize..2000,
        ) {
            for encoding in COMPRESSED {
                if let Ok(message) = inflate(encoding, &[head, &tail[..]].concat(), limit) {
                    prop_assert!(message.len() <= limit);
                }
            }
        }

        #[test]
        fn a_flipped_bit_never_makes_more_than_the_limit(
            data in vec(any::<u8>(), 1..500), at in any::<prop::sample::Index>(), bit in 0_u8..8,
        ) {
            for encoding in COMPRESSED {
                let mut compressed = compress(encoding, &data).to_vec();
                let at = at.index(compressed.len());
                compressed[at] ^= 1_u8 << bit;
                if let Ok(message) = inflate(encoding, &compressed, data.len()) {
                    prop_assert!(message.len() <= data.len());
                }
            }
        }
    }
}
