//! Decoding the body of a response: compression and character encoding.
//!
//! No byte is guessed or replaced. A byte that is not in the declared encoding becomes `\xNN`, which is invalid in a
//! JSON string: it costs only the value that contains it, and the dead letter shows the byte.

use std::io::{self, Read};

use encoding_rs::{Encoding, UTF_8};
use flate2::read::{DeflateDecoder, MultiGzDecoder, ZlibDecoder};

/// The magic number of gzip.
const GZIP: [u8; 2] = [0x1f, 0x8b];

/// Inflates a body that a server or a proxy compressed although the request did not accept that. A body that is not
/// compressed is returned unchanged, whatever `content_encoding` says.
///
/// # Errors
///
/// If the compression is unknown, the data is corrupt, or the result is larger than `limit` bytes.
pub fn inflated(bytes: Vec<u8>, content_encoding: &str, limit: usize) -> io::Result<Vec<u8>> {
    let encoding = content_encoding.trim().to_ascii_lowercase();
    if bytes.starts_with(&GZIP) {
        return read(MultiGzDecoder::new(&*bytes), limit);
    }
    match &*encoding {
        "deflate" => {
            let inflated = match read(ZlibDecoder::new(&*bytes), limit) {
                // Some servers leave out the header.
                Err(error) if error.kind() != io::ErrorKind::FileTooLarge => {
                    read(DeflateDecoder::new(&*bytes), limit)
                }
                inflated => inflated,
            };
            match inflated {
                Err(_) if looks_like_json(&bytes) => Ok(bytes),
                inflated => inflated,
            }
        }
        "" | "identity" | "gzip" | "x-gzip" => Ok(bytes),
        _ if looks_like_json(&bytes) => Ok(bytes),
        _ => Err(io::Error::other(format!(
            "unsupported compression: {encoding}"
        ))),
    }
}

fn looks_like_json(bytes: &[u8]) -> bool {
    matches!(bytes.trim_ascii_start().first(), None | Some(b'{' | b'['))
}

fn read(source: impl Read, limit: usize) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    let most = u64::try_from(limit).unwrap_or(u64::MAX);
    source
        .take(most.saturating_add(1))
        .read_to_end(&mut bytes)?;
    if bytes.len() > limit {
        return Err(io::ErrorKind::FileTooLarge.into());
    }
    Ok(bytes)
}

/// Decodes text by its byte order mark, else by `content_type`, else as UTF-8.
pub fn decoded(bytes: Vec<u8>, content_type: &str) -> String {
    let (encoding, mark) = match Encoding::for_bom(&bytes) {
        Some(found) => found,
        None => (declared(content_type).unwrap_or(UTF_8), 0),
    };
    if encoding != UTF_8
        && let Some(text) =
            encoding.decode_without_bom_handling_and_without_replacement(&bytes[mark..])
    {
        return text.into_owned();
    }
    match String::from_utf8(bytes) {
        Ok(text) if mark == 0 => text,
        Ok(text) => text[mark..].to_owned(),
        Err(error) => escaped(&error.as_bytes()[mark..]),
    }
}

/// Whether `text` has bytes that could not be decoded (`\xNN`).
pub fn has_undecoded(text: &str) -> bool {
    let is_hex = |digits: Option<&str>| {
        digits.is_some_and(|digits| digits.bytes().all(|digit| digit.is_ascii_hexdigit()))
    };
    // An escaped backslash may precede an `x`, too.
    text.match_indices("\\x")
        .any(|(at, _)| !ends_escaping(&text[..at]) && is_hex(text.get(at + 2..at + 4)))
}

/// Whether a text in JSON ends in a backslash that escapes what follows.
fn ends_escaping(text: &str) -> bool {
    let backslashes = text.len() - text.trim_end_matches('\\').len();
    !backslashes.is_multiple_of(2)
}

fn declared(content_type: &str) -> Option<&'static Encoding> {
    let charset = content_type.split(';').skip(1).find_map(|parameter| {
        let (name, value) = parameter.split_once('=')?;
        name.trim().eq_ignore_ascii_case("charset").then_some(value)
    })?;
    Encoding::for_label(charset.trim().trim_matches(['"', '\'']).as_bytes())
}

fn escaped(bytes: &[u8]) -> String {
    let parts = bytes.utf8_chunks().map(|chunk| {
        let invalid = chunk.invalid().iter().map(|byte| format!("\\x{byte:02X}"));
        let mut invalid: String = invalid.collect();
        if ends_escaping(chunk.valid()) && !invalid.is_empty() {
            // Otherwise the two backslashes would be one in JSON, and the rest would be text.
            invalid.insert(0, '\\');
        }
        (chunk.valid(), invalid)
    });
    parts.fold(
        String::with_capacity(bytes.len()),
        |text, (valid, invalid)| text + valid + &invalid,
    )
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    #[test]
    fn text_in_the_declared_encoding() {
        let utf16 = |bytes: fn(u16) -> [u8; 2]| -> Vec<u8> {
            "\u{feff}Grüße".encode_utf16().flat_map(bytes).collect()
        };
        for (bytes, content_type) in [
            ("Grüße".as_bytes().to_vec(), ""),
            (
                "Grüße".as_bytes().to_vec(),
                "application/json; charset=UTF-8",
            ),
            (
                "Grüße".as_bytes().to_vec(),
                "application/json; charset=nonsense",
            ),
            ("\u{feff}Grüße".as_bytes().to_vec(), "application/json"),
            (
                "\u{feff}Grüße".as_bytes().to_vec(),
                "text/plain; charset=latin1",
            ),
            (
                b"Gr\xfc\xdfe".to_vec(),
                "application/json; charset=ISO-8859-1",
            ),
            (
                b"Gr\xfc\xdfe".to_vec(),
                "application/json;charset=\"windows-1252\"",
            ),
            (b"Gr\xfc\xdfe".to_vec(), "text/plain; a=b; Charset = latin1"),
            (utf16(u16::to_le_bytes), "application/json"),
            (utf16(u16::to_be_bytes), "application/json"),
            (
                utf16(u16::to_be_bytes)[2..].to_vec(),
                "application/json; charset=utf-16be",
            ),
        ] {
            assert_eq!(decoded(bytes, content_type), "Grüße", "{content_type}");
        }
    }

    #[test]
    fn undecodable_bytes_are_escaped() {
        for (bytes, text) in [
            (&b"Gr\xfc\xdfe"[..], r"Gr\xFC\xDFe"),
            (b"\xef\xbb\xbf\xff", r"\xFF"),
            (b"a\xe2\x82", r"a\xE2\x82"),
            (b"\xc0\x80", r"\xC0\x80"),
        ] {
            let decoded = decoded(bytes.to_vec(), "application/json");
            assert_eq!(decoded, text);
            assert!(has_undecoded(&decoded));
        }
        assert_eq!(
            decoded(b"\x82\xff".to_vec(), "text/plain; charset=shift_jis"),
            r"\x82\xFF"
        );
        assert!(!has_undecoded(r"a \u00e4 \\ \xyz \x"));
        assert!(!has_undecoded(r"D:\\xab\\y"), "an escaped backslash");
        // The byte after a backslash must not become text.
        let broken = escaped(b"\"a\\\xE4\"");
        assert!(has_undecoded(&broken), "{broken}");
        assert!(serde_json::from_str::<String>(&broken).is_err(), "{broken}");
    }

    #[test]
    fn unrequested_compression_is_inflated() {
        let json = br#"{"events":[]}"#.to_vec();
        let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        gzip.write_all(&json).expect("bytes");
        let gzip = gzip.finish().expect("bytes");
        let mut zlib = flate2::write::ZlibEncoder::new(Vec::new(), flate2::Compression::fast());
        zlib.write_all(&json).expect("bytes");
        let zlib = zlib.finish().expect("bytes");
        let mut raw = flate2::write::DeflateEncoder::new(Vec::new(), flate2::Compression::fast());
        raw.write_all(&json).expect("bytes");
        let raw = raw.finish().expect("bytes");
        for (bytes, encoding) in [
            (&gzip, "gzip"),
            (&gzip, "x-gzip"),
            (&gzip, ""),
            (&zlib, "deflate"),
            (&raw, "Deflate"),
            (&json, "gzip"),
            (&json, "deflate"),
            (&json, "br"),
            (&json, "identity"),
        ] {
            let inflated = inflated(bytes.clone(), encoding, 1000);
            assert_eq!(inflated.expect("bytes"), json, "{encoding}");
        }
        assert!(inflated(b"\x0b\x06\x80".to_vec(), "br", 1000).is_err());
        for (bytes, encoding) in [(gzip, "gzip"), (zlib, "deflate"), (raw, "deflate")] {
            let truncated = bytes[..bytes.len() - 3].to_vec();
            assert!(inflated(truncated, encoding, 1000).is_err(), "{encoding}");
            let inflated = inflated(bytes, encoding, 10);
            assert_eq!(
                inflated.map_err(|error| error.kind()),
                Err(io::ErrorKind::FileTooLarge)
            );
        }
    }
}
