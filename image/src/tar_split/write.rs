//! Writes tar-split lines exactly as Go's `json.Encoder` prints them, so that what we write and what Podman writes for the
//! same tar stream are the same bytes before compression.

use std::io::{self, Write};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;

use super::{NAME_MAX, SEGMENT_MAX};

/// Writes a tar-split, line by line. Two entries of the same name are not noticed here: the caller must refuse them, as
/// upstream's readers do.
#[derive(Debug)]
pub struct Writer<W> {
    out: W,
    position: u64,
    line: String,
}

impl<W: Write> Writer<W> {
    /// A writer of no lines yet.
    pub fn new(out: W) -> Self {
        Self {
            out,
            position: 0,
            line: String::new(),
        }
    }

    /// Bytes of the tar stream that are no content: a header with its extensions (and the padding before it), or the
    /// trailer in pieces of [`super::TRAILER_PIECE`]. Nothing is written for no bytes. More than [`SEGMENT_MAX`]
    /// bytes are an error of kind `InvalidInput`.
    pub fn segment(&mut self, bytes: &[u8]) -> io::Result<()> {
        if bytes.is_empty() {
            return Ok(());
        }
        if bytes.len() > SEGMENT_MAX {
            return Err(invalid("a tar-split segment is too long"));
        }
        self.line.push_str("{\"type\":2,\"payload\":\"");
        BASE64.encode_string(bytes, &mut self.line);
        self.line.push('"');
        self.end_line()
    }

    /// The entry whose header was written last: its name as it stands in the stream, the length of its content (0 for
    /// all but regular files), and for a content that is not empty its checksum.
    pub fn file(&mut self, name: &[u8], size: u64, crc64: Option<u64>) -> io::Result<()> {
        if name.len() > NAME_MAX {
            return Err(invalid("a tar-split name is too long"));
        }
        if i64::try_from(size).is_err() {
            return Err(invalid("a file in a tar-split is too large"));
        }
        self.line.push_str("{\"type\":1");
        match std::str::from_utf8(name) {
            // Go omits an empty name.
            Ok("") => {}
            Ok(name) => {
                self.line.push_str(",\"name\":\"");
                escape(name, &mut self.line);
                self.line.push('"');
            }
            Err(_) => {
                self.line.push_str(",\"name_raw\":\"");
                BASE64.encode_string(name, &mut self.line);
                self.line.push('"');
            }
        }
        match (size, crc64) {
            (0, None) => self.line.push_str(",\"payload\":null"),
            (1.., Some(crc64)) => {
                self.line.push_str(&format!(",\"size\":{size},\"payload\":\""));
                BASE64.encode_string(crc64.to_be_bytes(), &mut self.line);
                self.line.push('"');
            }
            _ => return Err(invalid("exactly a content that is not empty has a checksum")),
        }
        self.end_line()
    }

    /// Flushes and gives the output back.
    pub fn finish(mut self) -> io::Result<W> {
        self.out.flush()?;
        Ok(self.out)
    }

    fn end_line(&mut self) -> io::Result<()> {
        self.line
            .push_str(&format!(",\"position\":{}}}\n", self.position));
        self.position += 1;
        let result = self.out.write_all(self.line.as_bytes());
        self.line.clear();
        result
    }
}

fn invalid(message: &'static str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidInput, message)
}

/// A string as Go's `encoding/json` escapes it (since Go 1.22, with its HTML escaping on).
fn escape(text: &str, out: &mut String) {
    for character in text.chars() {
        match character {
            '"' => out.push_str("\\\""),
            '\\' => out.push_str("\\\\"),
            '\u{8}' => out.push_str("\\b"),
            '\u{c}' => out.push_str("\\f"),
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            '\0'..='\x1f' | '<' | '>' | '&' | '\u{2028}' | '\u{2029}' => {
                out.push_str(&format!("\\u{:04x}", u32::from(character)));
            }
            other => out.push(other),
        }
    }
}
