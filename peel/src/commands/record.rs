//! Access records in files: JSON lines as ctr-remote writes and reads them,
//! `{"path":"usr/bin/x","manifestDigest":"sha256:...","layerIndex":3}`.

use std::io::{BufRead, BufReader, BufWriter, Write};
use std::path::Path;

use anyhow::{Context, bail};
use peel_image::Digest;
use peel_image::path::EntryPath;
use serde::{Deserialize, Serialize};

use crate::convert::plan::Prioritized;

/// Longest line in bytes: a path of `PATH_MAX` bytes, all of them escaped, and the rest.
const LINE_MAX: u64 = 64 << 10;

#[derive(Debug, Serialize, Deserialize)]
struct Line {
    path: String,
    #[serde(rename = "manifestDigest", default, skip_serializing_if = "Option::is_none")]
    manifest_digest: Option<String>,
    #[serde(rename = "layerIndex", default, skip_serializing_if = "Option::is_none")]
    layer_index: Option<usize>,
}

/// The paths of a record, in order. Which layer a line names is not looked at: the image may have been built anew since.
pub(super) fn read(path: &Path) -> anyhow::Result<Vec<EntryPath>> {
    let file = std::fs::File::open(path).with_context(|| format!("{}: cannot be read", path.display()))?;
    parse(BufReader::new(file)).with_context(|| path.display().to_string())
}

fn parse(mut reader: impl BufRead) -> anyhow::Result<Vec<EntryPath>> {
    use std::io::Read as _;

    let mut paths = Vec::new();
    let mut line = Vec::new();
    for number in 1_u64.. {
        line.clear();
        if reader.by_ref().take(LINE_MAX).read_until(b'\n', &mut line)? == 0 {
            break;
        }
        let text = line.trim_ascii();
        if text.is_empty() {
            continue;
        }
        if text.len() as u64 >= LINE_MAX - 1 {
            bail!("line {number} is too long");
        }
        let line: Line = serde_json::from_slice(text).with_context(|| format!("line {number}"))?;
        let path = EntryPath::clean(line.path.as_bytes()).with_context(|| format!("line {number}"))?;
        paths.push(path);
    }
    Ok(paths)
}

/// Writes a record.
pub(super) fn write(path: &Path, manifest: Digest, files: &[Prioritized]) -> anyhow::Result<()> {
    let write = || -> anyhow::Result<()> {
        let mut out = BufWriter::new(std::fs::File::create(path)?);
        for file in files {
            // JSON has no other way to hold a name that is not UTF-8, and eStargz cannot have such a file.
            let line = Line {
                path: String::from_utf8_lossy(file.path.as_bytes()).into_owned(),
                manifest_digest: Some(manifest.to_string()),
                layer_index: Some(file.layer),
            };
            serde_json::to_writer(&mut out, &line)?;
            out.write_all(b"\n")?;
        }
        Ok(out.flush()?)
    };
    write().with_context(|| format!("{}: cannot be written", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn records_are_those_of_ctr_remote() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let path = EntryPath::clean(b"usr/bin/\"x").unwrap();
        let files = [Prioritized {
            layer: 3,
            path: path.clone(),
            content: path.clone(),
        }];
        write(file.path(), Digest::EMPTY, &files).unwrap();
        assert_eq!(
            std::fs::read_to_string(file.path()).unwrap(),
            format!(
                "{{\"path\":\"usr/bin/\\\"x\",\"manifestDigest\":\"{}\",\"layerIndex\":3}}\n",
                Digest::EMPTY
            )
        );
        assert_eq!(read(file.path()).unwrap(), [path]);
        assert_eq!(parse(&b"\n{\"path\":\"./a\",\"more\":1}\n"[..]).unwrap().len(), 1);
        for bad in ["{}", "x", "{\"path\":\"a\\u0000\"}"] {
            assert!(parse(bad.as_bytes()).is_err(), "{bad}");
        }
        assert!(parse(vec![b' '; 1 << 20].as_slice()).unwrap().is_empty());
        assert!(parse(vec![b'x'; 1 << 20].as_slice()).is_err());
    }
}
