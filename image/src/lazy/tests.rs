//! The layers of the vectors by way of their descriptors, and every combination of annotations.

use std::collections::{BTreeMap, BTreeSet};

use super::*;
use crate::annotations as names;
use crate::compression::decode_chunk;
use crate::estargz::testing::{VectorLayer, layers};
use crate::media::{OCI_LAYER_GZIP, OCI_LAYER_ZSTD};

fn media_type(tag: &str) -> &'static str {
    if tag.starts_with("zstd") {
        OCI_LAYER_ZSTD
    } else {
        OCI_LAYER_GZIP
    }
}

fn candidate(media_type: &str, size: usize, notes: &BTreeMap<String, String>) -> Candidate {
    Candidate::new(media_type, size as u64, |name| {
        notes.get(name).map(String::as_str)
    })
}

fn part(blob: &[u8], range: &Range<u64>) -> Vec<u8> {
    blob[usize::try_from(range.start).unwrap()..usize::try_from(range.end).unwrap()].to_vec()
}

/// From the blob and its annotations to the index, the way the loader goes.
fn open(
    tag: &str,
    layer: &VectorLayer,
    notes: &BTreeMap<String, String>,
) -> Result<(Located, LayerIndex), NotLazy> {
    let candidate = candidate(media_type(tag), layer.blob.len(), notes);
    candidate.vouched()?;
    let located = candidate.locate(&part(&layer.blob, &candidate.first_range()))?;
    let toc = match &located.toc {
        Some(toc) => part(&layer.blob, toc),
        None => {
            let digest = Digest::of(&layer.blob).to_string();
            let beside = layers(&format!("{tag}-esgztoc"));
            let found = beside
                .iter()
                .find(|toc| toc.annotations[names::LAYER_DIGEST] == digest);
            found.unwrap().blob.clone()
        }
    };
    let index = candidate.read(&located, &toc)?;
    Ok((located, index))
}

#[test]
fn every_layer_of_the_vectors_is_lazy_by_its_own_format() {
    let stargz = Format::ZstdChunked(Dialect::Stargz);
    let podman = Format::ZstdChunked(Dialect::Podman);
    for (tag, format, origin) in [
        ("esgz", Format::Estargz, Origin::Footer),
        ("esgz-opt", Format::Estargz, Origin::Footer),
        ("esgz-chunk64k", Format::Estargz, Origin::Footer),
        ("esgz-min50k", Format::Estargz, Origin::Footer),
        ("esgz-ext", Format::EstargzExternal, Origin::ImageBeside),
        ("esgz-keep", Format::EstargzExternal, Origin::ImageBeside),
        ("zstd-stargz", stargz, Origin::Annotation),
        ("zstd-stargz-opt", stargz, Origin::Annotation),
        ("zstd-podman", podman, Origin::Annotation),
        ("zstd-skopeo", podman, Origin::Annotation),
    ] {
        for layer in &layers(tag) {
            let (located, index) = open(tag, layer, &layer.annotations).unwrap();
            assert_eq!((located.format, located.origin), (format, origin), "{tag}");
            let mut runs_of_zeros = BTreeSet::new();
            for entry in &index.entries {
                let EntryKind::Regular(content) = &entry.kind else {
                    continue;
                };
                let mut whole = Vec::new();
                for chunk in &content.chunks {
                    let ChunkSource::Blob {
                        encoding,
                        offset,
                        compressed_size,
                        inner_offset,
                    } = chunk.source
                    else {
                        runs_of_zeros.insert(chunk.size);
                        whole.resize(whole.len() + usize::try_from(chunk.size).unwrap(), 0);
                        continue;
                    };
                    let bytes = part(&layer.blob, &(offset..offset + compressed_size));
                    let bytes = decode_chunk(encoding, &bytes, inner_offset, chunk.size, u64::MAX).unwrap();
                    assert_eq!(Digest::of(&bytes), chunk.digest, "{tag} {}", entry.path);
                    whole.extend(bytes);
                }
                assert_eq!(Some(Digest::of(&whole)), content.digest, "{tag} {}", entry.path);
            }
            assert!(format == podman || runs_of_zeros.is_empty(), "{tag}");
        }
    }
}

#[test]
fn runs_of_zeros_have_no_bytes() {
    let holes: u64 = layers("zstd-podman")
        .iter()
        .flat_map(|layer| open("zstd-podman", layer, &layer.annotations).unwrap().1.entries)
        .filter_map(|entry| match entry.kind {
            EntryKind::Regular(content) => Some(content.chunks),
            _ => None,
        })
        .flatten()
        .filter(|chunk| chunk.source == ChunkSource::Zeros)
        .map(|chunk| chunk.size)
        .sum();
    // Most of it are 300 kB inside of big.bin. A file of one chunk has no type in this dialect, be it all zeros.
    assert!(holes >= 300_000, "{holes}");
}

#[test]
fn the_footer_leads_to_the_toc_as_well() {
    for tag in ["zstd-podman", "zstd-stargz"] {
        for layer in &layers(tag) {
            let mut notes = layer.annotations.clone();
            notes.retain(|name, _| !name.ends_with("-position"));
            let (located, index) = open(tag, layer, &notes).unwrap();
            assert_eq!(located.origin, Origin::Footer, "{tag}");
            assert_eq!(index, open(tag, layer, &layer.annotations).unwrap().1, "{tag}");
        }
    }
}

#[test]
fn older_names_of_the_annotations_will_do() {
    let layer = &layers("zstd-podman")[0];
    let notes: BTreeMap<String, String> = layer
        .annotations
        .iter()
        .map(|(name, value)| {
            (
                name.replace("io.github.containers.", "io.containers."),
                value.clone(),
            )
        })
        .collect();
    let (located, index) = open("zstd-podman", layer, &notes).unwrap();
    assert_eq!(located.format, Format::ZstdChunked(Dialect::Podman));
    assert_eq!(index, open("zstd-podman", layer, &layer.annotations).unwrap().1);
}

#[test]
fn a_toc_counts_only_with_every_digest_that_is_given() {
    let other = Digest::of(b"other").to_string();
    let set = |notes: &BTreeMap<String, String>, name: &str, value: &str| {
        let mut notes = notes.clone();
        notes.insert(name.to_owned(), value.to_owned());
        notes
    };
    let without = |notes: &BTreeMap<String, String>, name: &str| {
        let mut notes = notes.clone();
        notes.remove(name);
        notes
    };
    let stargz = &layers("zstd-stargz")[0];
    let podman = &layers("zstd-podman")[0];
    let estargz = &layers("esgz")[0];
    let json = podman_json_digest(podman);
    let (s, p, e) = (&stargz.annotations, &podman.annotations, &estargz.annotations);
    let cases = [
        ("zstd-stargz", stargz, without(s, names::TOC_DIGEST), None),
        (
            "zstd-stargz",
            stargz,
            without(s, names::STARGZ_MANIFEST_CHECKSUM),
            None,
        ),
        (
            "zstd-stargz",
            stargz,
            set(s, names::TOC_DIGEST, &other),
            Some("its table of contents has the digest"),
        ),
        (
            "zstd-stargz",
            stargz,
            set(s, names::STARGZ_MANIFEST_CHECKSUM, &other),
            Some("its compressed table of contents has the digest"),
        ),
        (
            "zstd-stargz",
            stargz,
            set(s, names::PODMAN_MANIFEST_CHECKSUM, &other),
            Some("gives two digests"),
        ),
        // Both kinds, and both right: one TOC for the users of either tool.
        ("zstd-podman", podman, set(p, names::TOC_DIGEST, &json), None),
        (
            "zstd-podman",
            podman,
            set(p, names::TOC_DIGEST, &other),
            Some("its table of contents has the digest"),
        ),
        (
            "zstd-podman",
            podman,
            without(p, names::PODMAN_MANIFEST_CHECKSUM),
            Some("nothing vouches"),
        ),
        (
            "zstd-podman",
            podman,
            set(p, names::PODMAN_MANIFEST_CHECKSUM, "sha256:xy"),
            Some("is no digest"),
        ),
        (
            "zstd-podman",
            podman,
            set(p, names::PODMAN_MANIFEST_POSITION, "40:100:200:1"),
            Some("its compressed table of contents has the digest"),
        ),
        // A position that cannot be is no hint.
        (
            "zstd-podman",
            podman,
            set(p, names::PODMAN_MANIFEST_POSITION, "0:1:1:1"),
            None,
        ),
        (
            "esgz",
            estargz,
            set(e, names::TOC_DIGEST, &other),
            Some("its table of contents has the digest"),
        ),
        (
            "esgz",
            estargz,
            without(e, names::TOC_DIGEST),
            Some("nothing vouches"),
        ),
    ];
    for (tag, layer, notes, problem) in cases {
        match (open(tag, layer, &notes), problem) {
            (Ok(_), None) => {}
            (Err(reason), Some(problem)) => {
                assert!(reason.to_string().contains(problem), "{tag} {notes:?}: {reason}");
            }
            (outcome, _) => panic!("{tag} {notes:?}: {:?}", outcome.map(|(located, _)| located)),
        }
    }
}

fn podman_json_digest(layer: &VectorLayer) -> String {
    let candidate = candidate(OCI_LAYER_ZSTD, layer.blob.len(), &layer.annotations);
    let compressed = part(&layer.blob, &candidate.first_range());
    let located = candidate.locate(&compressed).unwrap();
    located.open(&compressed).unwrap().json_digest.to_string()
}

#[test]
fn indexes_of_other_annotations_have_other_names() {
    let layer = &layers("zstd-stargz")[0];
    let blob = Digest::of(&layer.blob);
    let mut keys = BTreeSet::new();
    let mut notes = layer.annotations.clone();
    let mut add = |notes: &BTreeMap<String, String>| {
        assert!(keys.insert(candidate(OCI_LAYER_ZSTD, layer.blob.len(), notes).key(&blob)));
    };
    add(&notes);
    notes.insert(names::PREFETCH_END.to_owned(), "100".to_owned());
    add(&notes);
    notes.remove(names::TOC_DIGEST);
    add(&notes);
    assert_ne!(Some(&blob), keys.first());
}

#[test]
fn ordinary_layers_say_what_they_are() {
    let layer = &layers("org")[0];
    for (media, format) in [(OCI_LAYER_GZIP, Format::Gzip), (OCI_LAYER_ZSTD, Format::Zstd)] {
        let candidate = candidate(media, layer.blob.len(), &BTreeMap::new());
        assert_eq!(candidate.vouched(), Err(NotLazy::NotVouchedFor));
        let bytes = part(&layer.blob, &candidate.first_range());
        assert_eq!(candidate.locate(&bytes), Err(NotLazy::Plain(format)));
    }
    let vouched = BTreeMap::from([(names::TOC_DIGEST.to_owned(), Digest::EMPTY.to_string())]);
    let candidate_of = candidate(OCI_LAYER_GZIP, layer.blob.len(), &vouched);
    let bytes = part(&layer.blob, &candidate_of.first_range());
    assert_eq!(candidate_of.locate(&bytes), Err(NotLazy::NoFooter));
    let unknown = candidate("text/plain", 10, &vouched);
    assert_eq!(
        unknown.vouched(),
        Err(NotLazy::MediaType("text/plain".to_owned()))
    );
}

#[test]
fn holes_are_looked_for_as_long_as_the_image_s_budget_lasts() {
    let layer = |size: u64| {
        let digest = Digest::of_zeros(size);
        let chunk = Chunk {
            file_offset: 0,
            size,
            digest,
            source: ChunkSource::Blob {
                encoding: crate::layer::Encoding::Gzip,
                offset: 0,
                compressed_size: size / 1000,
                inner_offset: 0,
            },
        };
        LayerIndex {
            entries: vec![crate::layer::Entry {
                path: crate::path::EntryPath::clean(b"zeros").unwrap(),
                metadata: crate::layer::Metadata::default(),
                kind: EntryKind::Regular(crate::layer::FileContent {
                    size,
                    digest: Some(digest),
                    chunks: vec![chunk],
                }),
            }],
            prefetch_end: None,
        }
    };
    let size = CHUNK_MAX + 1;
    let budget = HoleBudget::new(2 * size);
    // The layers of one image; the first of them is read twice.
    let lazy = [size, size + 1, size].map(|size| {
        let mut layer = layer(size);
        find_holes(&mut layer, &budget);
        unservable(&layer, u64::MAX)
    });
    let path = layer(size).entries[0].path.to_string();
    assert_eq!(lazy, [None, Some(NotLazy::ChunkTooLarge { path }), None]);
}
