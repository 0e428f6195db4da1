//! What the store knows of images, so that they can be mounted again without a request: image records, names, layer
//! indexes, EROFS images, and what checks of whole layers found.
//!
//! Called by the loader. Records are postcard behind a header with a checksum, written under another name and renamed.
//! A record that is torn, of another version or otherwise unreadable counts as absent and is removed with a warning: all of
//! them can be fetched or built again.

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use peel_image::Digest;
use peel_image::layer::LayerIndex;
use peel_image::tree::Tree;
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use zerocopy::byteorder::little_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::error::{Context, Error, at};
use crate::recovery::ctime;
use crate::{Store, erofs, remove_quietly};

/// First bytes of every record.
const MAGIC: [u8; 8] = *b"peel rec";
/// Goes up with every change of a type that is kept, because postcard does not describe itself, and with every change of what an index
/// says of the same layer.
const VERSION: u32 = 2;
/// Largest record in bytes. A layer of a million files has an index of some 200 MB.
const RECORD_LIMIT: usize = 1 << 30;

/// What the store knows of an image that it has seen before: enough to mount it again without a request.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImageRecord {
    /// Digest of the platform's manifest.
    pub manifest_digest: Digest,
    /// The manifest, byte for byte.
    pub manifest: Vec<u8>,
    /// The configuration, byte for byte.
    pub config: Vec<u8>,
    /// For each layer, lowest first, its blob digest; the index is kept by that name.
    pub layers: Vec<Digest>,
}

/// What the check of a whole layer came to.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LayerVerdict {
    /// Whether the bytes of the blob were hashed too, and not only what they mean.
    pub blob: bool,
    /// What is wrong with the layer, in one sentence; `None` when all of it is right.
    pub fault: Option<String>,
}

/// A name's file is called by its hash, so the name itself is inside.
#[derive(Debug, Serialize, Deserialize)]
struct NameRecord {
    name: String,
    manifest_digest: Digest,
}

#[derive(Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct Header {
    magic: [u8; 8],
    version: U32,
    /// crc32c of the payload.
    checksum: U32,
    length: U64,
}

const _: () = assert!(size_of::<Header>() == 24);

impl Header {
    /// Whether it is one of this version, of a payload of so many bytes.
    fn is_of(&self, payload: u64) -> bool {
        self.magic == MAGIC && self.version.get() == VERSION && self.length.get() == payload
    }
}

impl Store {
    /// Keeps an image, so that it can be mounted again offline.
    pub fn put_image(&self, record: &ImageRecord) -> Result<(), Error> {
        self.put_record(&self.record_path("images", &record.manifest_digest), record)
    }

    /// The image of that manifest, if it is kept.
    pub fn image(&self, manifest_digest: &Digest) -> Result<Option<ImageRecord>, Error> {
        self.record(&self.record_path("images", manifest_digest))
    }

    /// Remembers that `name` (as the user writes it, with the platform) meant that manifest.
    pub fn put_name(&self, name: &str, manifest_digest: &Digest) -> Result<(), Error> {
        let record = NameRecord {
            name: name.to_owned(),
            manifest_digest: *manifest_digest,
        };
        self.put_record(&self.record_path("names", &Digest::of(name.as_bytes())), &record)
    }

    /// What `name` meant when it was last resolved.
    pub fn name(&self, name: &str) -> Result<Option<Digest>, Error> {
        let record: Option<NameRecord> =
            self.record(&self.record_path("names", &Digest::of(name.as_bytes())))?;
        Ok(record
            .filter(|record| record.name == name)
            .map(|record| record.manifest_digest))
    }

    /// All names, as [`Store::put_name`] was given them, and what they meant, by name. Those whose records cannot be used are left out.
    pub fn names(&self) -> Result<Vec<(String, Digest)>, Error> {
        let directory = self.root().join("records/names");
        let mut names = Vec::new();
        for entry in fs::read_dir(&directory).context("list", &directory)? {
            let path = entry.context("list", &directory)?.path();
            if let Some(NameRecord {
                name,
                manifest_digest,
            }) = self.record(&path)?
            {
                names.push((name, manifest_digest));
            }
        }
        names.sort_unstable();
        Ok(names)
    }

    /// Keeps the index of a layer by its blob digest.
    pub fn put_layer(&self, blob: &Digest, index: &LayerIndex) -> Result<(), Error> {
        self.put_record(&self.record_path("layers", blob), index)
    }

    /// The index of a layer, if it is kept.
    pub fn layer(&self, blob: &Digest) -> Result<Option<LayerIndex>, Error> {
        self.record(&self.record_path("layers", blob))
    }

    /// Whether the index of a layer is kept, as far as its header tells: [`Store::layer`] reads all of it and may still find it
    /// damaged. An unusable one is removed.
    pub fn has_layer(&self, blob: &Digest) -> bool {
        let path = self.record_path("layers", blob);
        let mut header = [0; size_of::<Header>()];
        let looked = File::open(&path).and_then(|mut file| {
            file.read_exact(&mut header)?;
            Ok(file.metadata()?.len())
        });
        let problem = match looked {
            Ok(length) => match Header::read_from_bytes(&header) {
                Ok(header) if header.is_of(length.saturating_sub(size_of::<Header>() as u64)) => return true,
                _ => "its header is wrong",
            },
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => "it is too short",
            Err(error) => {
                // It may be read another time.
                if error.kind() != io::ErrorKind::NotFound {
                    tracing::warn!(?path, %error, "cannot read a record");
                }
                return false;
            }
        };
        tracing::warn!(?path, problem, "removing an unusable record");
        remove_quietly(&path);
        false
    }

    /// Keeps what the check of a whole layer came to. `subject` must name everything that was compared: a verdict holds for
    /// nothing else.
    pub fn put_verdict(&self, subject: &Digest, verdict: &LayerVerdict) -> Result<(), Error> {
        self.put_record(&self.record_path("verdicts", subject), verdict)
    }

    /// What the check of a whole layer came to, if there was one.
    pub fn verdict(&self, subject: &Digest) -> Result<Option<LayerVerdict>, Error> {
        self.record(&self.record_path("verdicts", subject))
    }

    /// When [`Store::put_verdict`] was called for it last, if it was.
    pub fn verdict_time(&self, subject: &Digest) -> Option<SystemTime> {
        let path = self.record_path("verdicts", subject);
        fs::metadata(path).ok()?.modified().ok()
    }

    /// The EROFS image for the manifest, if it is kept and whole.
    pub fn erofs_image(&self, manifest_digest: &Digest) -> Option<PathBuf> {
        let path = self.erofs_path(manifest_digest);
        match erofs::check_image(&path) {
            Ok(()) => Some(path),
            Err(error) if error.kind() == io::ErrorKind::NotFound => None,
            Err(error) => {
                tracing::warn!(?path, %error, "removing an unusable EROFS image");
                remove_quietly(&path);
                None
            }
        }
    }

    /// Writes the EROFS image of an image's tree and returns its path. It has its name only once it is on the
    /// disk: the kernel reads it without a check of ours.
    pub fn put_erofs_image(&self, manifest_digest: &Digest, tree: &Tree) -> Result<PathBuf, Error> {
        self.check_locked()?;
        let path = self.erofs_path(manifest_digest);
        let temporary = self.temporary_path();
        let write = || -> Result<(), Error> {
            let mut file = create(&temporary)?;
            erofs::write_image(tree, &mut file).map_err(|error| match error {
                Error::ImageOutput(source) => at("write", &path, source),
                other => other,
            })?;
            file.sync_all().context("write", &path)?;
            fs::rename(&temporary, &path).context("rename to", &path)
        };
        let result = write();
        if result.is_err() {
            remove_quietly(&temporary);
        }
        result.map(|()| path)
    }

    /// Removes EROFS images with a ctime of at least `limit` (nanoseconds since the epoch): nothing in them tells whether
    /// all their blocks reached the disk. Returns how many.
    pub(crate) fn remove_young_images(&self, limit: i64) -> Result<usize, Error> {
        self.remove_images(|_, metadata| ctime(metadata) >= limit)
    }

    /// Removes EROFS images of other versions of the writer.
    pub(crate) fn remove_other_images(&self) -> Result<usize, Error> {
        let suffix = image_suffix();
        self.remove_images(|name, _| !name.ends_with(&suffix))
    }

    fn remove_images(&self, unwanted: impl Fn(&str, &fs::Metadata) -> bool) -> Result<usize, Error> {
        let directory = self.root().join("erofs");
        let mut removed = 0;
        for entry in fs::read_dir(&directory).context("list", &directory)? {
            let entry = entry.context("list", &directory)?;
            let path = entry.path();
            let metadata = entry.metadata().context("look at", &path)?;
            if unwanted(&entry.file_name().to_string_lossy(), &metadata) {
                remove_quietly(&path);
                removed += 1;
            }
        }
        Ok(removed)
    }

    fn erofs_path(&self, manifest_digest: &Digest) -> PathBuf {
        self.root()
            .join("erofs")
            .join(format!("{}{}", manifest_digest.hex(), image_suffix()))
    }

    fn record_path(&self, kind: &str, digest: &Digest) -> PathBuf {
        self.root().join("records").join(kind).join(digest.hex())
    }

    fn put_record<T: Serialize>(&self, path: &Path, value: &T) -> Result<(), Error> {
        let payload = postcard::to_stdvec(value).map_err(|source| Error::Encode {
            path: path.to_owned(),
            source,
        })?;
        if payload.len() > RECORD_LIMIT {
            return Err(Error::RecordTooLarge {
                path: path.to_owned(),
                size: payload.len(),
                limit: RECORD_LIMIT,
            });
        }
        let header = Header {
            magic: MAGIC,
            version: VERSION.into(),
            checksum: crc32c::crc32c(&payload).into(),
            length: (payload.len() as u64).into(),
        };
        let temporary = self.temporary_path();
        let write = || -> Result<(), Error> {
            let mut file = create(&temporary)?;
            file.write_all(header.as_bytes())
                .and_then(|()| file.write_all(&payload))
                .context("write record", path)?;
            fs::rename(&temporary, path).context("rename to", path)
        };
        let result = write();
        if result.is_err() {
            remove_quietly(&temporary);
        }
        result
    }

    fn record<T: DeserializeOwned>(&self, path: &Path) -> Result<Option<T>, Error> {
        let content = match File::open(path) {
            Ok(file) => {
                let mut content = Vec::new();
                file.take((RECORD_LIMIT + size_of::<Header>()) as u64)
                    .read_to_end(&mut content)
                    .context("read record", path)?;
                content
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(error).context("open record", path),
        };
        match decode(&content) {
            Ok(value) => Ok(Some(value)),
            Err(problem) => {
                tracing::warn!(?path, problem, "removing an unusable record");
                remove_quietly(path);
                Ok(None)
            }
        }
    }
}

fn image_suffix() -> String {
    format!(".v{}.erofs", erofs::WRITER_VERSION)
}

fn create(path: &Path) -> Result<File, Error> {
    File::options()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(path)
        .context("make", path)
}

/// The value of a record file, or why it has none.
fn decode<T: DeserializeOwned>(content: &[u8]) -> Result<T, &'static str> {
    let (header, payload) = Header::read_from_prefix(content).map_err(|_| "it is too short")?;
    if header.magic != MAGIC {
        return Err("it is not a record");
    }
    if header.version.get() != VERSION {
        return Err("it has another version");
    }
    if header.length.get() != payload.len() as u64 || header.checksum.get() != crc32c::crc32c(payload) {
        return Err("its checksum is wrong");
    }
    match postcard::take_from_bytes(payload) {
        Ok((value, [])) => Ok(value),
        Ok(_) => Err("it has bytes left over"),
        Err(_) => Err("it cannot be decoded"),
    }
}

#[cfg(test)]
mod tests;
