//! Writer of the metadata-only EROFS image (skeleton of the contract).

use std::io::Write;

use peel_image::tree::Tree;

/// Writes the tree as an EROFS image whose regular files carry overlay redirects to `/ab/cdef...`.
pub fn write_image(_tree: &Tree, _out: &mut dyn Write) -> std::io::Result<()> {
    todo!()
}
