//! Reads tar-split lines, one at a time.

use std::borrow::Cow;
use std::io::{BufRead, ErrorKind, Read};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use serde::Deserialize;

use super::{Item, LINE_MAX, NAME_MAX, SEGMENT_MAX, TAR_SPLIT_MAX, TarSplitError, TarSplitProblem};

/// Reads a tar-split that is not compressed (any more). After an error it gives nothing more.
#[derive(Debug)]
pub struct Reader<R> {
    input: R,
    lines: u64,
    taken: u64,
    limit: u64,
    line: Vec<u8>,
    ended: bool,
}

#[derive(Deserialize)]
struct Fields<'a> {
    #[serde(rename = "type")]
    kind: i64,
    #[serde(borrow, default)]
    name: Option<Cow<'a, str>>,
    #[serde(borrow, default)]
    name_raw: Option<Cow<'a, str>>,
    #[serde(default)]
    size: Option<i64>,
    #[serde(borrow, default)]
    payload: Option<Cow<'a, str>>,
    #[serde(default)]
    position: Option<i64>,
}

impl<R: BufRead> Reader<R> {
    /// A reader at the start of the first line.
    pub fn new(input: R) -> Self {
        Self::with_limit(input, TAR_SPLIT_MAX)
    }

    /// A reader that takes at most `limit` bytes.
    pub(super) fn with_limit(input: R, limit: u64) -> Self {
        Self {
            input,
            lines: 0,
            taken: 0,
            limit,
            line: Vec::new(),
            ended: false,
        }
    }

    /// The next line, `None` after the last one. Each is checked: its position counts from 0, a segment has no fields of
    /// a file, a file has one name, and a checksum of 8 bytes exactly if its size is above 0. Names may repeat: who
    /// needs them to be different must check that.
    pub fn next_item(&mut self) -> Result<Option<Item>, TarSplitError> {
        if self.ended {
            return Ok(None);
        }
        let result = self.read_line().and_then(|()| {
            if self.line.is_empty() {
                return Ok(None);
            }
            parse(&self.line, self.lines).map(Some)
        });
        self.lines = self.lines.saturating_add(1);
        self.ended = !matches!(result, Ok(Some(_)));
        result.map_err(|problem| TarSplitError {
            line: self.lines,
            problem,
        })
    }

    /// Takes the next line that is not blank, without its end; an empty one at the end of the input.
    fn read_line(&mut self) -> Result<(), TarSplitProblem> {
        loop {
            self.line.clear();
            let limit = u64::try_from(LINE_MAX).unwrap_or(u64::MAX);
            let mut limited = self.input.by_ref().take(limit.saturating_add(1));
            let count = loop {
                match limited.read_until(b'\n', &mut self.line) {
                    Ok(count) => break count,
                    Err(error) if error.kind() == ErrorKind::Interrupted => {}
                    Err(error) => return Err(TarSplitProblem::Read(error)),
                }
            };
            if count == 0 {
                return Ok(());
            }
            if self.line.len() > LINE_MAX {
                let what = "a line";
                return Err(TarSplitProblem::TooLarge { what, limit });
            }
            self.taken = self
                .taken
                .saturating_add(u64::try_from(count).unwrap_or(u64::MAX));
            if self.taken > self.limit {
                return Err(TarSplitProblem::TooLarge {
                    what: "a tar-split",
                    limit: self.limit,
                });
            }
            let end = self.line.trim_ascii_end().len();
            self.line.truncate(end);
            if !self.line.is_empty() {
                return Ok(());
            }
        }
    }
}

impl<R: BufRead> Iterator for Reader<R> {
    type Item = Result<Item, TarSplitError>;

    fn next(&mut self) -> Option<Self::Item> {
        self.next_item().transpose()
    }
}

fn parse(line: &[u8], position: u64) -> Result<Item, TarSplitProblem> {
    let fields: Fields<'_> = serde_json::from_slice(line).map_err(TarSplitProblem::Json)?;
    let found = fields.position.ok_or(TarSplitProblem::Field("position"))?;
    if u64::try_from(found) != Ok(position) {
        return Err(TarSplitProblem::Position { found });
    }
    match fields.kind {
        1 => file(&fields),
        2 => segment(&fields),
        other => Err(TarSplitProblem::Type(other)),
    }
}

fn file(fields: &Fields<'_>) -> Result<Item, TarSplitProblem> {
    let name = match (&fields.name, &fields.name_raw) {
        (Some(name), None) => name.as_bytes().to_vec(),
        (None, Some(raw)) => base64(raw, "name_raw")?,
        (None, None) => Vec::new(),
        (Some(_), Some(_)) => return Err(TarSplitProblem::Field("name_raw")),
    };
    if name.len() > NAME_MAX {
        return Err(TarSplitProblem::TooLarge {
            what: "a name",
            limit: NAME_MAX as u64,
        });
    }
    let size = u64::try_from(fields.size.unwrap_or(0)).map_err(|_| TarSplitProblem::Field("size"))?;
    let payload = fields.payload.as_deref().unwrap_or_default();
    let checksum = base64(payload, "payload")?;
    let crc64 = match (size, checksum.as_slice()) {
        (0, []) => None,
        (1.., &[a, b, c, d, e, f, g, h]) => Some(u64::from_be_bytes([a, b, c, d, e, f, g, h])),
        _ => return Err(TarSplitProblem::Field("payload")),
    };
    Ok(Item::File { name, size, crc64 })
}

fn segment(fields: &Fields<'_>) -> Result<Item, TarSplitProblem> {
    if fields.name.is_some() || fields.name_raw.is_some() {
        return Err(TarSplitProblem::Field("name"));
    }
    if fields.size.is_some_and(|size| size != 0) {
        return Err(TarSplitProblem::Field("size"));
    }
    let bytes = base64(fields.payload.as_deref().unwrap_or_default(), "payload")?;
    if bytes.len() > SEGMENT_MAX {
        return Err(TarSplitProblem::TooLarge {
            what: "a segment",
            limit: SEGMENT_MAX as u64,
        });
    }
    Ok(Item::Segment(bytes))
}

fn base64(text: &str, field: &'static str) -> Result<Vec<u8>, TarSplitProblem> {
    BASE64.decode(text).map_err(|_| TarSplitProblem::Field(field))
}
