//! TOCs in the image beside an image (`TAG-esgztoc`), as the product finds and reads them: through that image's manifest, its layer's
//! annotation, and the blob, which is a gzip member around a tar stream around JSON. The first byte says which of these the
//! rest is; whatever stands around it is well formed and has the right digests, so that the bytes are looked at.
#![no_main]

use std::cell::RefCell;
use std::io::Write;

use flate2::Compression;
use flate2::write::GzEncoder;
use libfuzzer_sys::fuzz_target;
use peel_fuzz::layout::Layout;
use peel_fuzz::{check_index, check_merge, with_checksums};
use peel_image::annotations::{LAYER_DIGEST, TOC_DIGEST, TOC_IMAGE_SUFFIX};
use peel_image::estargz::footer::encode_external;
use peel_image::estargz::{TOC_NAME, extract_toc};
use peel_image::lazy::{Candidate, Format};
use peel_image::{Digest, media};
use peel_registry::{ClientOptions, Source, TocImage, fetch_toc};
use serde_json::{Value, json};

/// Bytes of the layer before its footer.
const PAYLOAD: u64 = 1 << 20;

/// A TOC image's layer by another tool, for the manifests that lead to it; the first byte is that of a seed.
const UPSTREAM: &[u8] = include_bytes!("../seeds/external_toc/esgz-keep-124-blob");

thread_local! {
    /// A layout and the descriptor of a layer in it whose TOC is elsewhere.
    static WORLD: RefCell<(Layout, Value)> = RefCell::new({
        let layout = Layout::default();
        let payload = vec![0; usize::try_from(PAYLOAD).expect("small")];
        let blob = [payload.as_slice(), &encode_external()].concat();
        let layer = layout.blob(media::OCI_LAYER_GZIP, &blob);
        (layout, layer)
    });
}

/// A TOC blob as a writer makes it, around some JSON.
fn blob_of(json: &[u8]) -> Vec<u8> {
    let mut header = [0_u8; 512];
    header[..TOC_NAME.len()].copy_from_slice(TOC_NAME.as_bytes());
    header[100..108].copy_from_slice(b"0000444\0");
    header[124..136].copy_from_slice(format!("{:011o}\0", json.len()).as_bytes());
    header[156] = b'0';
    header[257..265].copy_from_slice(b"ustar\x0000");
    let mut tar = [header.as_slice(), json].concat();
    tar.resize(tar.len().next_multiple_of(512) + 1024, 0);
    gzip(&with_checksums(&tar[..512]), &tar[512..])
}

fn gzip(head: &[u8], rest: &[u8]) -> Vec<u8> {
    let mut member = GzEncoder::new(Vec::new(), Compression::none());
    member.write_all(head).expect("memory");
    member.write_all(rest).expect("memory");
    member.finish().expect("memory")
}

/// Mounts nothing, but goes the loader's way: from the image's name to the index of its layer.
async fn read(layout: &Layout, toc: Digest) {
    let options = ClientOptions::default();
    let source = Source::open(&layout.name(Some("x")), &options)
        .await
        .expect("our own layout");
    let image = source.resolve(None).await.expect("our own image");
    let beside = TocImage::new(&source, None);
    for layer in image.manifest.layers() {
        let blob = source.blob(layer).expect("our own layer");
        let toc = toc.to_string();
        let candidate = Candidate::new(media::OCI_LAYER_GZIP, blob.size(), |name| {
            (name == TOC_DIGEST).then_some(toc.as_str())
        });
        let found = fetch_toc(&blob, &candidate, &beside).await.expect("a local blob");
        let found = found.expect("the footer says where the TOC is");
        assert_eq!(found.located.format, Format::EstargzExternal);
        assert_eq!(found.located.payload_end, PAYLOAD);
        let Ok(bytes) = found.bytes else {
            continue;
        };
        match candidate.read(&found.located, &bytes) {
            Ok(index) => {
                assert_eq!(extract_toc(&bytes).expect("it was read").digest.to_string(), toc);
                check_index(&index, PAYLOAD);
                check_merge(&[index]);
            }
            Err(reason) => assert!(!reason.to_string().is_empty()),
        }
    }
}

fuzz_target!(|data: &[u8]| {
    let Some((way, rest)) = data.split_first() else {
        return;
    };
    WORLD.with_borrow(|(layout, layer)| {
        let blob = match way % 4 {
            0 => rest.to_vec(),
            1 => gzip(&with_checksums(rest), b""),
            2 => blob_of(rest),
            _ => UPSTREAM[1..].to_vec(),
        };
        // Whatever is in it, the manifest vouches for it.
        let toc = extract_toc(&blob).map_or(Digest::EMPTY, |toc| toc.digest);
        let mut held = layout.blob(media::OCI_LAYER_GZIP, &blob);
        held["annotations"] = json!({ LAYER_DIGEST: layer["digest"] });
        let config = layout.blob(media::OCI_CONFIG, b"{}");
        let manifest = |layers: &Value| {
            json!({"schemaVersion": 2, "mediaType": media::OCI_MANIFEST, "config": config, "layers": [layers]})
                .to_string()
                .into_bytes()
        };
        let beside = match way % 4 {
            3 => rest.to_vec(),
            _ => manifest(&held),
        };
        let tagged = |tag: &str, document: &[u8]| {
            let mut descriptor = layout.blob(media::OCI_MANIFEST, document);
            descriptor["annotations"] = json!({ "org.opencontainers.image.ref.name": tag });
            descriptor
        };
        let manifests = [
            tagged("x", &manifest(layer)),
            tagged(&format!("x{TOC_IMAGE_SUFFIX}"), &beside),
        ];
        layout.index(json!({"schemaVersion": 2, "manifests": manifests}).to_string().as_bytes());
        layout.wait(read(layout, toc));
        layout.remove(&Digest::of(&blob));
        layout.remove(&Digest::of(&beside));
    });
});
