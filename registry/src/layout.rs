//! OCI image layouts (image specification, image-layout.md): a directory, or a tar file of one, read through the same eyes.
//! [`write`] makes and extends them.

pub(crate) mod write;

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use oci_spec::image::{Descriptor, ImageIndex};
use peel_image::Digest;

use crate::archive::TarIndex;
use crate::document;
use crate::error::Error;
use crate::transfer::file::Stretch;

/// Annotation that names an image in a layout's index (image specification, annotations.md).
pub(crate) const REF_NAME: &str = "org.opencontainers.image.ref.name";
/// containerd's full name of an image in an exported layout.
const CONTAINERD_NAME: &str = "io.containerd.image.name";
/// Largest index.json in bytes. Layouts with many thousands of tags exist; a manifest's limit would be too small for them.
const MAX_INDEX: u64 = 32 << 20;
/// Tags shown in an error.
const SHOWN_TAGS: usize = 20;

/// A layout to read from. Its index is the one of the moment when it was opened.
#[derive(Debug)]
pub(crate) struct Layout {
    files: Files,
    index: ImageIndex,
}

#[derive(Debug)]
enum Files {
    Directory(PathBuf),
    Archive(TarIndex),
}

impl Files {
    fn path(&self) -> &Path {
        match self {
            Self::Directory(dir) => dir,
            Self::Archive(archive) => archive.path(),
        }
    }

    fn get(&self, name: &str) -> Result<Stretch, Error> {
        match self {
            Self::Directory(dir) => Stretch::whole(&dir.join(name)),
            Self::Archive(archive) => archive.get(name),
        }
    }
}

impl Layout {
    /// Opens the layout in `dir`. Blocks on the disk.
    pub(crate) fn open_dir(dir: &Path) -> Result<Self, Error> {
        if !dir.is_dir() {
            return Err(Error::layout(
                dir,
                "is no directory; an OCI layout is one with index.json and blobs in it",
            ));
        }
        Self::open(Files::Directory(dir.to_path_buf()))
    }

    /// Opens the layout in the tar file `file`. Blocks on the disk.
    pub(crate) fn open_archive(file: &Path) -> Result<Self, Error> {
        Self::open(Files::Archive(TarIndex::open(file)?))
    }

    fn open(files: Files) -> Result<Self, Error> {
        let stretch = files.get("index.json").map_err(|error| {
            if error.is_not_found() {
                Error::layout(files.path(), "has no index.json, so it is no OCI layout")
            } else {
                error
            }
        })?;
        let index = parse_index(files.path(), &read_small(&stretch, MAX_INDEX)?)?;
        Ok(Self { files, index })
    }

    /// The manifest or index with this tag; without a tag the only one.
    pub(crate) fn find(&self, tag: Option<&str>) -> Result<Descriptor, Error> {
        let manifests = self.index.manifests();
        let Some(tag) = tag else {
            return match manifests.as_slice() {
                [only] => Ok(only.clone()),
                [] => Err(Error::layout(self.files.path(), "holds no image")),
                _ => Err(self.no_such_tag("it holds several images; add :TAG to its name")),
            };
        };
        let named = |annotation: &str| {
            manifests
                .iter()
                .find(|descriptor| annotation_of(descriptor, annotation).is_some_and(|name| name == tag))
        };
        let found = named(REF_NAME).or_else(|| named(CONTAINERD_NAME)).or_else(|| {
            manifests
                .iter()
                .find(|descriptor| descriptor.digest().to_string() == tag)
        });
        found
            .cloned()
            .ok_or_else(|| self.no_such_tag(&format!("has no image {tag:?}")))
    }

    /// Whether [`Layout::find`] finds an image with this tag.
    pub(crate) fn has_tag(&self, tag: &str) -> bool {
        self.find(Some(tag)).is_ok()
    }

    fn no_such_tag(&self, reason: &str) -> Error {
        let tags: Vec<_> = self.index.manifests().iter().filter_map(tag_of).collect();
        let mut list = tags
            .iter()
            .take(SHOWN_TAGS)
            .copied()
            .collect::<Vec<_>>()
            .join(", ");
        if tags.len() > SHOWN_TAGS {
            list.push_str(", ...");
        }
        Error::layout(self.files.path(), format!("{reason}; its tags are: {list}"))
    }

    /// Where a blob is.
    pub(crate) fn blob(&self, digest: &Digest) -> Result<Stretch, Error> {
        self.files.get(&blob_name(digest)).map_err(|error| {
            if error.is_not_found() {
                Error::layout(self.files.path(), format!("blob {digest} is missing from it"))
            } else {
                error
            }
        })
    }
}

/// Path of a blob in a layout.
pub(crate) fn blob_name(digest: &Digest) -> String {
    format!("blobs/sha256/{}", digest.hex())
}

/// The tag that a layout's index gives an image.
fn tag_of(descriptor: &Descriptor) -> Option<&str> {
    annotation_of(descriptor, REF_NAME)
}

fn annotation_of<'a>(descriptor: &'a Descriptor, name: &str) -> Option<&'a str> {
    descriptor.annotations().as_ref()?.get(name).map(String::as_str)
}

pub(crate) fn parse_index(path: &Path, bytes: &[u8]) -> Result<ImageIndex, Error> {
    document::index(bytes).map_err(|error| Error::layout(path, format!("index.json: {error}")))
}

/// Reads a small file whole. Blocks on the disk.
pub(crate) fn read_small(stretch: &Stretch, limit: u64) -> Result<Vec<u8>, Error> {
    let path = stretch.path.as_path();
    let length = usize::try_from(stretch.size)
        .ok()
        .filter(|_| stretch.size <= limit)
        .ok_or_else(|| Error::TooLarge {
            place: path.display().to_string(),
            what: "file".to_owned(),
            limit,
        })?;
    let mut bytes = vec![0; length];
    File::open(path)
        .and_then(|file| file.read_exact_at(&mut bytes, stretch.start))
        .map_err(Error::file(path, "cannot be read"))?;
    Ok(bytes)
}
