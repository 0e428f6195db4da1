//! Reads of what the disk has not confirmed.

use std::os::unix::fs::PermissionsExt;

use peel_image::layer::{ChunkSource, Encoding};

use super::*;
use crate::tests::{TestStore, noise};

fn chunk(content: &[u8], start: usize, size: usize) -> Chunk {
    Chunk {
        file_offset: start as u64,
        size: size as u64,
        digest: Digest::of(content.get(start..start + size).unwrap_or_default()),
        source: ChunkSource::Blob {
            encoding: Encoding::Gzip,
            offset: 0,
            compressed_size: 1,
            inner_offset: 0,
        },
    }
}

#[test]
fn every_read_is_hashed() {
    let test = TestStore::new();
    let store = &test.store;
    let content = noise(5000, 1);
    let digest = Digest::of(&content);
    let (first, second) = (chunk(&content, 0, 2000), chunk(&content, 2000, 3000));
    assert_eq!(store.read_pending(&digest, &first).unwrap(), Checked::Lost);
    store.add_verified(&digest, &content).unwrap();
    let right = |part: &[u8]| Checked::Right(part.to_vec());
    assert_eq!(
        store.read_pending(&digest, &second).unwrap(),
        right(&content[2000..])
    );
    for lie in [
        chunk(&noise(5000, 2), 0, 2000),
        chunk(&content, 2000, 4000),
        Chunk {
            size: u64::MAX,
            ..first.clone()
        },
    ] {
        assert_eq!(
            store.read_pending(&digest, &lie).unwrap(),
            Checked::Wrong,
            "{lie:?}"
        );
    }
    store.settle().unwrap();
    assert_eq!(
        store.read_pending(&digest, &first).unwrap(),
        right(&content[..2000]),
        "an object by now"
    );

    for (damage, seed) in [("zeros", 3), ("short", 4)] {
        let content = noise(5000, seed);
        let digest = Digest::of(&content);
        let (first, second) = (chunk(&content, 0, 2000), chunk(&content, 2000, 3000));
        store.add_verified(&digest, &content).unwrap();
        let path = store.pending_path(&digest);
        fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
        let file = File::options().write(true).open(&path).unwrap();
        match damage {
            "zeros" => file.write_all_at(&[0; 3000], 2000).unwrap(),
            _ => file.set_len(3000).unwrap(),
        }
        assert_eq!(
            store.read_pending(&digest, &first).unwrap(),
            right(&content[..2000])
        );
        assert_eq!(
            store.read_pending(&digest, &second).unwrap(),
            Checked::Lost,
            "{damage}"
        );
        assert!(!path.exists() && store.pending_size(&digest).is_none());
        store.add_verified(&digest, &content).unwrap();
        store.settle().unwrap();
        assert!(store.has_object(&digest), "it can come again");
    }
}
