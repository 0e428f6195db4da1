//! Round trips through docker-registry, nginx and skopeo with an image made by upstream tools.

use std::path::Path;
use std::process::Command;

use oci_spec::image::Descriptor;
use peel_image::{Digest, media};
use peel_registry::{ClientOptions, Error, ImageName, ResolvedImage, Source, Target, Upload};

use crate::auth::{with_config, with_password};
use crate::fake::options;
use crate::services::{docker_registry, nginx, run};
use peel_testkit::vectors;

const LIMIT: u64 = 64 << 20;

async fn open(name: &str, options: &ClientOptions) -> (Source, ResolvedImage) {
    let source = Source::open(&name.parse().unwrap(), options).await.unwrap();
    let image = source
        .resolve(None)
        .await
        .unwrap_or_else(|error| panic!("{name}: {error}"));
    (source, image)
}

async fn open_vector(tag: &str) -> (Source, ResolvedImage) {
    open(&vectors::image(tag), &options()).await
}

fn blobs(image: &ResolvedImage) -> Vec<Descriptor> {
    let mut blobs = vec![image.manifest.config().clone()];
    blobs.extend(image.manifest.layers().iter().cloned());
    blobs
}

/// Copies an image; the number of blobs sent.
async fn copy(source: &Source, image: &ResolvedImage, target: &Target) -> Result<usize, Error> {
    let mut sent = 0;
    for descriptor in blobs(image) {
        let blob = source.blob(&descriptor)?;
        sent += usize::from(
            target
                .push_blob(blob.digest(), blob.size(), Upload::Blob(blob.clone()))
                .await?,
        );
    }
    target
        .put_manifest(image.manifest_bytes.clone(), &image.media_type)
        .await?;
    Ok(sent)
}

/// Checks that two places hold the same image, blob by blob.
async fn same(left: &(Source, ResolvedImage), right: &(Source, ResolvedImage)) {
    assert_eq!(left.1.manifest_bytes, right.1.manifest_bytes);
    for descriptor in blobs(&left.1) {
        let one = left
            .0
            .blob(&descriptor)
            .unwrap()
            .read_verified(LIMIT)
            .await
            .unwrap();
        let other = right.0.blob(&descriptor).unwrap();
        assert_eq!(other.read_verified(LIMIT).await.unwrap(), one);
        let (start, end) = (one.len() / 3, one.len() / 2);
        let part = other.read(start as u64..end as u64).await.unwrap();
        assert_eq!(part, one[start..end]);
    }
}

#[tokio::test]
async fn docker_registry_round_trip_compared_by_skopeo() {
    let registry = docker_registry();
    let name = format!("{}/some/image:v1", registry.address);
    let vector = open_vector("esgz").await;
    let target = Target::open(&name.parse().unwrap(), &options()).await.unwrap();
    assert_eq!(copy(&vector.0, &vector.1, &target).await.unwrap(), 4);
    let sent = target.counters().sent();
    assert_eq!(copy(&vector.0, &vector.1, &target).await.unwrap(), 0);
    let manifest = vector.1.manifest_bytes.len() as u64;
    assert_eq!(
        target.counters().sent(),
        sent + manifest,
        "blobs that are there were sent again"
    );

    let pulled = open(&name, &options()).await;
    same(&vector, &pulled).await;
    assert_eq!(pulled.0.counters().retries(), 0);
    let pinned = format!("{}/some/image@{}", registry.address, vector.1.manifest_digest);
    assert_eq!(
        open(&pinned, &options()).await.1.manifest_bytes,
        vector.1.manifest_bytes
    );

    let layout = registry.dir.path().join("skopeo");
    run(Command::new("skopeo")
        .args([
            "copy",
            "-q",
            "--src-tls-verify=false",
            &format!("docker://{name}"),
        ])
        .arg(format!("oci:{}:v1", layout.display())));
    same(
        &vector,
        &open(&format!("oci:{}:v1", layout.display()), &options()).await,
    )
    .await;

    // A mount into another repository sends nothing.
    let other = format!("{}/other:v1", registry.address).parse().unwrap();
    let other = Target::open(&other, &options()).await.unwrap();
    for descriptor in blobs(&vector.1) {
        let blob = vector.0.blob(&descriptor).unwrap();
        assert!(other.mount_blob(&blob.digest(), "some/image").await.unwrap());
        assert!(other.has_blob(&blob.digest(), blob.size()).await.unwrap());
    }
    assert_eq!(other.counters().sent(), 0);
}

#[tokio::test]
async fn docker_registry_takes_streams_and_refuses_altered_ones() {
    let registry = docker_registry();
    let name: ImageName = format!("{}/stream", registry.address).parse().unwrap();
    let target = Target::open(&name, &options()).await.unwrap();
    let content = crate::fake::data(19_000_000);
    let digest = Digest::of(&content);
    let stream = |content: &[u8]| {
        let pieces: Vec<_> = content
            .chunks(300_000)
            .map(|piece| Ok(piece.to_vec().into()))
            .collect();
        Upload::Stream(futures::StreamExt::boxed(futures::stream::iter(pieces)))
    };
    let mut altered = content.clone();
    altered[5] ^= 1;
    let error = target
        .push_blob(digest, 19_000_000, stream(&altered))
        .await
        .unwrap_err()
        .to_string();
    assert!(error.contains("DIGEST_INVALID"), "{error}");
    assert!(
        target
            .push_blob(digest, 19_000_000, stream(&content))
            .await
            .unwrap()
    );
    let source = Source::open(&name, &options()).await.unwrap();
    let blob = source
        .blob(&crate::fake::descriptor(media::OCI_LAYER, &content))
        .unwrap();
    assert!(blob.read_verified(LIMIT).await.unwrap() == content);

    let incomplete = open_vector("org").await.1.manifest_bytes;
    let error = target
        .put_manifest(incomplete, media::OCI_MANIFEST)
        .await
        .unwrap_err()
        .to_string();
    assert!(
        error.contains("MANIFEST_BLOB_UNKNOWN") && error.contains("repository stream"),
        "{error}"
    );
    let error = source.resolve(None).await.unwrap_err();
    assert!(
        error.is_not_found() && error.to_string().contains("MANIFEST_UNKNOWN"),
        "{error}"
    );
}

#[tokio::test]
async fn nginx_with_tls_and_basic_auth() {
    let backend = docker_registry();
    let front = nginx(&backend.address);
    let name = format!("{}/secure/image:v1", front.address);
    let trusting = ClientOptions {
        tls_ca: Some(front.dir.path().join("ca.pem")),
        ..options()
    };
    let vector = open_vector("esgz-opt").await;

    let refused = |options: ClientOptions| {
        let name = name.parse().unwrap();
        async move {
            let source = Source::open(&name, &options).await.unwrap();
            source.resolve(None).await.unwrap_err().to_string()
        }
    };
    let error = refused(options()).await;
    assert!(
        error.contains("--tls-ca") && error.contains(&front.address),
        "{error}"
    );
    let plain = ClientOptions {
        plain_http: true,
        ..options()
    };
    let error = refused(plain).await;
    assert!(error.contains("leave --plain-http out"), "{error}");
    let error = refused(trusting.clone()).await;
    assert!(
        error.contains("HTTP 401") && error.contains(&format!("podman login {}", front.address)),
        "{error}"
    );
    let wrong = serde_json::json!({ "auths": { front.address.as_str(): { "auth": "dXNlcjp3cm9uZw==" } } });
    let error = refused(with_config(&wrong, trusting.clone()).options).await;
    assert!(
        error.contains("podman login") && !error.contains("wrong"),
        "{error}"
    );

    let login = with_password(&front.address, trusting);
    let target = Target::open(&name.parse().unwrap(), &login.options)
        .await
        .unwrap();
    assert_eq!(copy(&vector.0, &vector.1, &target).await.unwrap(), 4);
    same(&vector, &open(&name, &login.options).await).await;

    let certificates = front.dir.path().join("certificates");
    std::fs::create_dir(&certificates).unwrap();
    std::fs::copy(front.dir.path().join("ca.pem"), certificates.join("ca.crt")).unwrap();
    let layout = front.dir.path().join("skopeo");
    run(Command::new("skopeo")
        .args(["copy", "-q", "--src-creds", "user:secret", "--src-cert-dir"])
        .arg(&certificates)
        .arg(format!("docker://{name}"))
        .arg(format!("oci:{}:v1", layout.display())));
    same(
        &vector,
        &open(&format!("oci:{}:v1", layout.display()), &options()).await,
    )
    .await;

    let downgrade = format!("{}/redirected:v1", front.address).parse().unwrap();
    let source = Source::open(&downgrade, &login.options).await.unwrap();
    let blob = source.blob(vector.1.manifest.config()).unwrap();
    let error = blob.read_verified(LIMIT).await.unwrap_err().to_string();
    assert!(error.contains("redirect from https to http"), "{error}");
}

#[tokio::test]
async fn layouts_as_sources_and_targets() {
    let dir = tempfile::tempdir().unwrap();
    let vector = open_vector("esgz-chunk64k").await;
    let name = format!("oci:{}:copy", dir.path().join("layout").display());
    let target = Target::open(&name.parse().unwrap(), &options()).await.unwrap();
    assert_eq!(copy(&vector.0, &vector.1, &target).await.unwrap(), 4);
    assert_eq!(copy(&vector.0, &vector.1, &target).await.unwrap(), 0);
    let copied = open(&name, &options()).await;
    same(&vector, &copied).await;
    let counters = copied.0.counters();
    assert!(counters.requests() == 0 && counters.bytes() > 0);
    let bundle = dir.path().join("bundle");
    run(Command::new("umoci")
        .args([
            "unpack",
            "--image",
            &format!("{}:copy", dir.path().join("layout").display()),
        ])
        .arg(&bundle));
    assert!(bundle.join("rootfs/etc/os-release").is_file());

    let mut descriptor = vector.1.manifest.layers()[0].clone();
    descriptor.set_size(descriptor.size() + 1);
    let blob = copied.0.blob(&descriptor).unwrap();
    assert!(matches!(blob.read(0..10).await, Err(Error::SizeMismatch { .. })));

    let layer = vector.1.manifest.layers()[0].clone();
    let digest = layer.digest().digest().to_owned();
    let path = dir.path().join("layout/blobs/sha256").join(digest);
    let mut bytes = std::fs::read(&path).unwrap();
    bytes[100] ^= 1;
    std::fs::write(&path, bytes).unwrap();
    let blob = copied.0.blob(&layer).unwrap();
    assert!(matches!(
        blob.read_verified(LIMIT).await,
        Err(Error::DigestMismatch { .. })
    ));
    std::fs::remove_file(&path).unwrap();
    let error = blob.read_verified(LIMIT).await.unwrap_err().to_string();
    assert!(error.contains("missing from it"), "{error}");
}

#[tokio::test]
async fn names_of_local_places_that_do_not_fit() {
    let vectors = vectors::layout();
    let layout = vectors.display();
    for (name, reason) in [
        (format!("oci:{layout}"), "its tags are: org, esgz"),
        (format!("oci:{layout}:nothing"), "its tags are: org, esgz"),
        ("oci:/nonexistent:x".to_owned(), "is no directory"),
        (format!("oci:{layout}/blobs:x"), "has no index.json"),
        ("oci-archive:/nonexistent.tar".to_owned(), "/nonexistent.tar"),
        (format!("oci-archive:{layout}/index.json"), "no tar file"),
        (format!("docker-archive:{layout}/index.json"), "no tar file"),
    ] {
        let result = match Source::open(&name.parse().unwrap(), &options()).await {
            Ok(source) => source.resolve(None).await.map(drop),
            Err(error) => Err(error),
        };
        let error = result.expect_err(&name).to_string();
        assert!(error.contains(reason), "{name}: {error}");
    }
}

fn skopeo_copy(tag: &str, to: &str) {
    run(Command::new("skopeo")
        .args(["copy", "-q", &vectors::image(tag)])
        .arg(to));
}

#[tokio::test]
async fn oci_archives_are_read_in_place() {
    let dir = tempfile::tempdir().unwrap();
    let name = format!("oci-archive:{}:some:tag", dir.path().join("image.tar").display());
    skopeo_copy("esgz", &name);
    let archive = open(&name, &options()).await;
    same(&open_vector("esgz").await, &archive).await;
    let untagged = format!("oci-archive:{}", dir.path().join("image.tar").display());
    same(&archive, &open(&untagged, &options()).await).await;
}

#[tokio::test]
async fn docker_archives_have_plain_layers() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("image.tar");
    let path = file.display();
    skopeo_copy("org", &format!("docker-archive:{path}:example.com/name:tag"));
    let vector = open_vector("org").await;
    let (source, image) = open(&format!("docker-archive:{path}"), &options()).await;
    assert_eq!(image.manifest_digest, Digest::of(&image.manifest_bytes));
    let (config, parsed) = source.config(&image).await.unwrap();
    let diff_ids = &parsed.diff_ids;
    let (original, _) = vector.0.config(&vector.1).await.unwrap();
    assert_eq!(config, original);
    assert_eq!(image.manifest.layers().len(), 3);
    for (layer, diff_id) in image.manifest.layers().iter().zip(diff_ids) {
        assert_eq!(layer.media_type().to_string(), media::DOCKER_LAYER);
        assert_eq!(layer.digest().to_string(), diff_id.to_string());
        let bytes = source.blob(layer).unwrap().read_verified(LIMIT).await.unwrap();
        assert_eq!(bytes.len() as u64, layer.size());
    }
    let named = open(&format!("docker-archive:{path}:example.com/name:tag"), &options()).await;
    assert_eq!(named.1.manifest_bytes, image.manifest_bytes);
    let other: ImageName = format!("docker-archive:{path}:other").parse().unwrap();
    let error = Source::open(&other, &options()).await.unwrap_err().to_string();
    assert!(error.contains("example.com/name:tag"), "{error}");

    // Compressed layers, as newer Docker writes them: the digest is the file's, not the diff ID.
    repack(dir.path(), &file);
    let (source, image) = open(&format!("docker-archive:{path}"), &options()).await;
    for layer in image.manifest.layers() {
        assert_eq!(layer.media_type().to_string(), media::DOCKER_LAYER_GZIP);
        source.blob(layer).unwrap().read_verified(LIMIT).await.unwrap();
    }
}

/// Compresses the layers within an archive of docker save.
fn repack(dir: &Path, file: &Path) {
    let unpacked = dir.join("unpacked");
    std::fs::create_dir(&unpacked).unwrap();
    run(Command::new("tar").arg("-C").arg(&unpacked).arg("-xf").arg(file));
    let manifest = std::fs::read(unpacked.join("manifest.json")).unwrap();
    let manifest: serde_json::Value = serde_json::from_slice(&manifest).unwrap();
    for layer in manifest[0]["Layers"].as_array().unwrap() {
        let path = unpacked.join(layer.as_str().unwrap());
        let compressed = run(Command::new("gzip").arg("-nc").arg(&path));
        std::fs::write(&path, compressed).unwrap();
    }
    run(Command::new("tar")
        .arg("-C")
        .arg(&unpacked)
        .arg("-cf")
        .arg(file)
        .arg("."));
}
