//! What gRPC writes into HTTP headers: timeouts, metadata, status messages, the content type.
//!
//! Source: "gRPC over HTTP2" (PROTOCOL-HTTP2.md). Where it leaves room, this does what gRPC's own server does, so that
//! code above the seam sees the same from both transports.

use std::fmt;
use std::time::Duration;

use base64::Engine;
use base64::alphabet::STANDARD;
use base64::engine::{DecodePaddingMode, GeneralPurpose, GeneralPurposeConfig};
use http::{HeaderMap, HeaderValue};
use percent_encoding::{AsciiSet, CONTROLS, utf8_percent_encode};

/// The digits that a timeout may have.
const TIMEOUT_DIGITS: usize = 8;

/// The longest status message, encoded: clients take 8 KiB of trailers by default, and drop the status with the rest.
const MESSAGE_BYTES: usize = 4096;

/// What gRPC's Percent-Encoded escapes, besides all that is not ASCII: everything but space to `~`, and `%` itself.
const ESCAPED: &AsciiSet = &CONTROLS.add(b'%');

/// Base64 of `-bin` values: senders may pad and receivers must take both.
const BASE64: GeneralPurpose = GeneralPurpose::new(
    &STANDARD,
    GeneralPurposeConfig::new()
        .with_decode_padding_mode(DecodePaddingMode::Indifferent)
        .with_decode_allow_trailing_bits(true),
);

/// The time of a `grpc-timeout`: one to eight digits and a unit; None when it is malformed.
pub fn timeout(value: &HeaderValue) -> Option<Duration> {
    let (unit, digits) = value.as_bytes().split_last()?;
    if !(1..=TIMEOUT_DIGITS).contains(&digits.len()) || !digits.iter().all(u8::is_ascii_digit) {
        return None;
    }
    let count = digits.iter().fold(0, |count, digit| count * 10 + u64::from(digit - b'0'));
    match unit {
        b'H' => Some(Duration::from_secs(count * 3600)),
        b'M' => Some(Duration::from_secs(count * 60)),
        b'S' => Some(Duration::from_secs(count)),
        b'm' => Some(Duration::from_millis(count)),
        b'u' => Some(Duration::from_micros(count)),
        b'n' => Some(Duration::from_nanos(count)),
        _ => None,
    }
}

/// A value of metadata; the keys of binary ones end in `-bin`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum MetadataValue {
    Text(String),
    Binary(Vec<u8>),
}

/// A `-bin` header that is not base64; the text is for the client, and gRPC's own server's.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BadMetadata {
    pub key: String,
}

impl fmt::Display for BadMetadata {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Error parsing '{}' metadata: illegal base64 encoding", self.key)
    }
}

impl std::error::Error for BadMetadata {}

/// The metadata among a request's headers, in the order of their keys' first appearance.
///
/// A binary value as a header carries it.
pub fn encode_binary(value: &[u8]) -> String {
    BASE64.encode(value)
}

/// How large headers are as HTTP/2 counts them: with 32 bytes for each (RFC 9113, 6.5.2).
pub fn list_bytes(headers: &HeaderMap) -> usize {
    headers.iter().map(|(name, value)| name.as_str().len() + value.len() + 32).sum()
}

/// Headers that belong to the transport are left out. Text is UTF-8, or else Latin-1. A binary value may be several,
/// joined by commas.
pub fn metadata(headers: &HeaderMap) -> Result<Vec<(String, MetadataValue)>, BadMetadata> {
    let mut entries = Vec::with_capacity(headers.len());
    for (name, value) in headers {
        let key = name.as_str();
        if belongs_to_transport(key) {
            continue;
        }
        if !key.ends_with("-bin") {
            entries.push((key.to_owned(), MetadataValue::Text(text(value.as_bytes()))));
            continue;
        }
        for encoded in value.as_bytes().split(|byte| *byte == b',') {
            let decoded = BASE64.decode(encoded.trim_ascii()).map_err(|_| BadMetadata { key: key.to_owned() })?;
            entries.push((key.to_owned(), MetadataValue::Binary(decoded)));
        }
    }
    Ok(entries)
}

/// Headers that gRPC's server keeps to itself as well.
fn belongs_to_transport(key: &str) -> bool {
    matches!(
        key,
        "te" | "content-type"
            | "grpc-accept-encoding"
            | "grpc-encoding"
            | "grpc-tags-bin"
            | "grpc-timeout"
            | "grpc-trace-bin"
    )
}

fn text(value: &[u8]) -> String {
    match std::str::from_utf8(value) {
        Ok(text) => text.to_owned(),
        Err(_) => value.iter().copied().map(char::from).collect(),
    }
}

/// A status message as `grpc-message` carries it; one that is too long for trailers is cut between characters.
pub fn percent_encode(message: &str) -> HeaderValue {
    let encoded = utf8_percent_encode(fitting(message), ESCAPED).to_string();
    HeaderValue::try_from(encoded).expect("what is percent-encoded is printable ASCII")
}

/// The longest beginning of a message that fits when it is encoded.
fn fitting(message: &str) -> &str {
    let mut bytes = 0;
    let too_long = message.char_indices().find(|(_, char)| {
        bytes += if matches!(char, ' '..='~') && *char != '%' { 1 } else { 3 * char.len_utf8() };
        bytes > MESSAGE_BYTES
    });
    too_long.map_or(message, |(at, _)| &message[..at])
}

/// Whether a request is gRPC with protobuf messages: `application/grpc`, `application/grpc+proto`, with parameters or
/// without.
pub fn is_grpc(content_type: Option<&HeaderValue>) -> bool {
    let Some(value) = content_type else {
        return false;
    };
    let media_type = value.as_bytes().split(|byte| *byte == b';').next().unwrap_or_default().trim_ascii();
    media_type.eq_ignore_ascii_case(b"application/grpc") || media_type.eq_ignore_ascii_case(b"application/grpc+proto")
}

#[cfg(test)]
mod tests {
    use http::HeaderName;
    use percent_encoding::percent_decode;
    use proptest::collection::vec;
    use proptest::prelude::*;

    use super::*;

    fn value(bytes: &[u8]) -> HeaderValue {
        HeaderValue::from_bytes(bytes).unwrap()
    }

    /// Any bytes that HTTP allows in a header's value.
    fn any_value() -> impl Strategy<Value = HeaderValue> {
        let byte = prop_oneof![6 => 0x20_u8..0x7f, 1 => 0x80_u8..=0xff, 1 => Just(b'\t')];
        vec(byte, 0..60).prop_map(|bytes| value(&bytes))
    }

    #[test]
    fn timeouts_have_one_to_eight_digits_and_a_unit() {
        let timeout = |text| timeout(&HeaderValue::from_static(text));
        assert_eq!(timeout("1H"), Some(Duration::from_secs(3600)));
        assert_eq!(timeout("2M"), Some(Duration::from_secs(120)));
        assert_eq!(timeout("00000003S"), Some(Duration::from_secs(3)));
        assert_eq!(timeout("4m"), Some(Duration::from_millis(4)));
        assert_eq!(timeout("5u"), Some(Duration::from_micros(5)));
        assert_eq!(timeout("6n"), Some(Duration::from_nanos(6)));
        assert_eq!(timeout("0S"), Some(Duration::ZERO));
        assert_eq!(timeout("99999999H"), Some(Duration::from_secs(99_999_999 * 3600)));
        for malformed in ["", "S", "5", "5s", "123456789S", "-1S", "+1S", "1.5S", " 1S", "1 S", "1SS"] {
            assert_eq!(timeout(malformed), None, "{malformed:?}");
        }
    }

    #[test]
    fn metadata_is_what_does_not_belong_to_the_transport() {
        let mut headers = HeaderMap::new();
        for (key, text) in [
            ("te", "trailers"),
            ("content-type", "application/grpc"),
            ("grpc-timeout", "1S"),
            ("grpc-encoding", "gzip"),
            ("grpc-accept-encoding", "gzip"),
            ("grpc-trace-bin", "AAEC"),
            ("grpc-tags-bin", "AAEC"),
            ("user-agent", "ua"),
            ("b", "1"),
            ("x-bin", "AAEC"),
            ("b", "2"),
        ] {
            headers.append(HeaderName::from_static(key), HeaderValue::from_static(text));
        }
        let text = |text: &str| MetadataValue::Text(text.to_owned());
        let expected = [
            ("user-agent".to_owned(), text("ua")),
            ("b".to_owned(), text("1")),
            ("b".to_owned(), text("2")),
            ("x-bin".to_owned(), MetadataValue::Binary(vec![0, 1, 2])),
        ];
        assert_eq!(metadata(&headers).unwrap(), expected);
    }

    fn binary(text: &'static str) -> Option<Vec<Vec<u8>>> {
        let headers = HeaderMap::from_iter([(HeaderName::from_static("x-bin"), HeaderValue::from_static(text))]);
        let bytes = |(_, value)| match value {
            MetadataValue::Binary(bytes) => bytes,
            MetadataValue::Text(text) => panic!("{text}"),
        };
        metadata(&headers).ok().map(|entries| entries.into_iter().map(bytes).collect())
    }

    #[test]
    fn binary_values_are_padded_or_not_and_may_be_joined_by_commas() {
        assert_eq!(binary("AA=="), Some(vec![vec![0]]));
        assert_eq!(binary("AA"), Some(vec![vec![0]]));
        assert_eq!(binary(""), Some(vec![vec![]]));
        assert_eq!(binary("AAEC, AA=="), Some(vec![vec![0, 1, 2], vec![0]]));
        for malformed in ["!!!", "-_-_", "A", "AA==AA"] {
            assert_eq!(binary(malformed), None, "{malformed}");
        }
        let error = BadMetadata { key: "x-bin".to_owned() };
        assert_eq!(error.to_string(), "Error parsing 'x-bin' metadata: illegal base64 encoding");
    }

    #[test]
    fn text_is_utf_8_or_else_latin_1() {
        for bytes in [&b"caf\xc3\xa9"[..], b"caf\xe9"] {
            let headers = HeaderMap::from_iter([(HeaderName::from_static("x"), value(bytes))]);
            assert_eq!(metadata(&headers).unwrap()[0].1, MetadataValue::Text("café".to_owned()));
        }
    }

    #[test]
    fn messages_are_escaped_where_they_are_not_printable_ascii() {
        assert_eq!(percent_encode("a b~%\n\u{7f}é"), "a b~%25%0A%7F%C3%A9");
        assert_eq!(percent_encode(""), "");
    }

    #[test]
    fn a_message_too_long_for_trailers_is_cut_between_characters() {
        assert_eq!(percent_encode(&"x".repeat(10_000)).len(), MESSAGE_BYTES);
        let encoded = percent_encode(&"é".repeat(10_000));
        assert_eq!(encoded.len(), MESSAGE_BYTES / 6 * 6);
    }

    #[test]
    fn the_content_type_is_grpc_with_protobuf_messages() {
        let is_grpc = |text| is_grpc(Some(&HeaderValue::from_static(text)));
        for right in
            ["application/grpc", "application/grpc+proto", "application/grpc;charset=utf-8", "Application/gRPC"]
        {
            assert!(is_grpc(right), "{right}");
        }
        for wrong in ["", "application/json", "application/grpc-web", "application/grpcx", "application/grpc+json"] {
            assert!(!is_grpc(wrong), "{wrong}");
        }
        assert!(!super::is_grpc(None));
    }

    proptest! {
        #[test]
        fn no_value_makes_a_reader_of_headers_panic(value in any_value()) {
            let _ = (timeout(&value), is_grpc(Some(&value)));
            let names = ["x", "x-bin", "grpc-timeout"].map(HeaderName::from_static);
            let _ = metadata(&HeaderMap::from_iter(names.map(|name| (name, value.clone()))));
        }

        #[test]
        fn text_comes_out_as_it_was_put_in(value in any_value()) {
            let headers = HeaderMap::from_iter([(HeaderName::from_static("x"), value.clone())]);
            let [(_, MetadataValue::Text(text))] = &metadata(&headers).unwrap()[..] else { panic!("no text") };
            let latin_1 = || text.chars().map(|char| char as u8).collect::<Vec<_>>();
            prop_assert!(text.as_bytes() == value.as_bytes() || latin_1() == value.as_bytes());
        }

        #[test]
        fn binary_values_come_out_as_they_were_put_in(values in vec(vec(any::<u8>(), 0..40), 1..4), padded: bool) {
            let encode = |bytes: &Vec<u8>| {
                let text = base64::engine::general_purpose::STANDARD.encode(bytes);
                if padded { text } else { text.trim_end_matches('=').to_owned() }
            };
            let joined = values.iter().map(encode).collect::<Vec<_>>().join(",");
            let headers = HeaderMap::from_iter([(HeaderName::from_static("x-bin"), value(joined.as_bytes()))]);
            let expected: Vec<_> =
                values.into_iter().map(|bytes| ("x-bin".to_owned(), MetadataValue::Binary(bytes))).collect();
            prop_assert_eq!(metadata(&headers).unwrap(), expected);
        }

        #[test]
        fn messages_come_out_as_they_were_put_in(message in ".{0,100}|[\\x00-\\x7f]{0,100}") {
            let encoded = percent_encode(&message);
            prop_assert_eq!(percent_decode(encoded.as_bytes()).decode_utf8().unwrap(), message);
        }

        #[test]
        fn timeouts_come_out_as_they_were_put_in(count in 0_u64..100_000_000) {
            let timeout = |unit: &str| timeout(&value(format!("{count}{unit}").as_bytes()));
            prop_assert_eq!(timeout("n"), Some(Duration::from_nanos(count)));
            prop_assert_eq!(timeout("S"), Some(Duration::from_secs(count)));
        }
    }
}
