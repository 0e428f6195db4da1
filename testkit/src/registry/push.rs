//! The push half of the embedded registry: uploads (at once, in pieces, by mount) and manifests.
//!
//! Called by the router. An upload is a temporary file and a running hash; it gets its name only when the digest that
//! the client gives is the digest of what came.

use std::collections::BTreeMap;
use std::io::Write;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use axum::body::Body;
use axum::extract::Request;
use axum::http::{HeaderValue, Response, StatusCode, header};
use futures::StreamExt;
use peel_hash::{Digest, Hasher};

use super::Shared;
use super::serve::{failure, json};

/// Largest manifest, in bytes: what the distribution specification asks registries to take.
const MANIFEST_LIMIT: usize = 4 << 20;

/// Uploads at once; more are refused, so that a client that never finishes cannot fill the memory.
const MAX_UPLOADS: usize = 256;

/// An upload in progress.
#[derive(Debug)]
struct Upload {
    file: tempfile::NamedTempFile,
    hasher: Hasher,
    length: u64,
}

/// All uploads in progress. One that a request works on is taken out meanwhile, so no lock is held while bytes come.
#[derive(Debug, Default)]
pub(super) struct Uploads {
    table: Mutex<(u64, BTreeMap<String, Upload>)>,
}

impl Uploads {
    fn table(&self) -> MutexGuard<'_, (u64, BTreeMap<String, Upload>)> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn new_id(&self) -> Option<String> {
        let mut table = self.table();
        if table.1.len() >= MAX_UPLOADS {
            return None;
        }
        table.0 += 1;
        Some(table.0.to_string())
    }

    fn take(&self, id: &str) -> Option<Upload> {
        self.table().1.remove(id)
    }

    fn put(&self, id: &str, upload: Upload) {
        self.table().1.insert(id.to_owned(), upload);
    }
}

/// The value of a query parameter. Digests and repository names need no decoding but for `:` and `/`.
fn parameter(request: &Request, name: &str) -> Option<String> {
    let pairs = request.uri().query()?.split('&');
    let value = pairs
        .filter_map(|pair| pair.split_once('='))
        .find(|(key, _)| *key == name)?
        .1;
    Some(
        value
            .replace("%3A", ":")
            .replace("%3a", ":")
            .replace("%2F", "/")
            .replace("%2f", "/"),
    )
}

/// PUT of a manifest.
pub(super) async fn manifest(
    shared: &Arc<Shared>,
    name: &str,
    reference: &str,
    request: Request,
) -> Response<Body> {
    let media_type = request
        .headers()
        .get(header::CONTENT_TYPE)
        .and_then(|value| value.to_str().ok());
    let Some(media_type) = media_type.map(str::to_owned) else {
        return failure(StatusCode::BAD_REQUEST, "MANIFEST_INVALID", "no content type");
    };
    let Ok(bytes) = axum::body::to_bytes(request.into_body(), MANIFEST_LIMIT).await else {
        return failure(
            StatusCode::PAYLOAD_TOO_LARGE,
            "SIZE_INVALID",
            "the manifest is larger than 4 MiB",
        );
    };
    let digest = Digest::of(&bytes);
    if reference.parse::<Digest>().is_ok_and(|wanted| wanted != digest) {
        return failure(
            StatusCode::BAD_REQUEST,
            "DIGEST_INVALID",
            "the manifest has another digest",
        );
    }
    let Ok(value) = serde_json::from_slice::<serde_json::Value>(&bytes) else {
        return failure(
            StatusCode::BAD_REQUEST,
            "MANIFEST_INVALID",
            "the manifest is not JSON",
        );
    };
    let layers = value
        .get("layers")
        .and_then(serde_json::Value::as_array)
        .into_iter()
        .flatten();
    for descriptor in layers.chain(value.get("config")) {
        let text = descriptor
            .get("digest")
            .and_then(serde_json::Value::as_str)
            .unwrap_or_default();
        let here = text
            .parse()
            .is_ok_and(|digest| shared.content.blob_size(&digest).is_some());
        if !here {
            let message = format!("blob {text} of the manifest is not here");
            return failure(StatusCode::NOT_FOUND, "MANIFEST_BLOB_UNKNOWN", &message);
        }
    }
    match shared.content.put_manifest(name, reference, &media_type, &bytes) {
        Ok(digest) => created(&format!("/v2/{name}/manifests/{digest}"), &digest),
        Err(error) => failure(StatusCode::INTERNAL_SERVER_ERROR, "UNKNOWN", &error.to_string()),
    }
}

/// Every request below `/v2/<name>/blobs/uploads/`.
pub(super) async fn upload(
    shared: &Arc<Shared>,
    uploads: &Uploads,
    name: &str,
    id: &str,
    request: Request,
) -> Response<Body> {
    match (request.method().as_str(), id) {
        ("POST", "") => begin(shared, uploads, name, request).await,
        ("PATCH" | "PUT", id) => go_on(shared, uploads, name, id, request).await,
        ("GET", id) => match uploads.take(id) {
            Some(upload) => {
                let response = progress(StatusCode::NO_CONTENT, name, id, upload.length);
                uploads.put(id, upload);
                response
            }
            None => unknown_upload(),
        },
        ("DELETE", id) => match uploads.take(id) {
            Some(_) => empty(StatusCode::NO_CONTENT),
            None => unknown_upload(),
        },
        _ => failure(StatusCode::METHOD_NOT_ALLOWED, "UNSUPPORTED", "not an upload"),
    }
}

async fn begin(shared: &Arc<Shared>, uploads: &Uploads, name: &str, request: Request) -> Response<Body> {
    if let Some(Ok(digest)) = parameter(&request, "mount").map(|text| text.parse::<Digest>())
        && shared.content.blob_size(&digest).is_some()
    {
        return created(&format!("/v2/{name}/blobs/{digest}"), &digest);
    }
    let upload = match shared.content.upload() {
        Ok(file) => Upload {
            file,
            hasher: Hasher::new(),
            length: 0,
        },
        Err(error) => return failure(StatusCode::INTERNAL_SERVER_ERROR, "UNKNOWN", &error.to_string()),
    };
    let Some(id) = uploads.new_id() else {
        return failure(
            StatusCode::TOO_MANY_REQUESTS,
            "TOOMANYREQUESTS",
            "too many uploads at once",
        );
    };
    uploads.put(&id, upload);
    if parameter(&request, "digest").is_some() {
        return go_on(shared, uploads, name, &id, request).await;
    }
    progress(StatusCode::ACCEPTED, name, &id, 0)
}

/// PATCH or PUT: more bytes, and with PUT the end.
async fn go_on(
    shared: &Arc<Shared>,
    uploads: &Uploads,
    name: &str,
    id: &str,
    request: Request,
) -> Response<Body> {
    let Some(mut upload) = uploads.take(id) else {
        return unknown_upload();
    };
    let last = request.method() != "PATCH";
    let wanted = parameter(&request, "digest");
    let start = request
        .headers()
        .get(header::CONTENT_RANGE)
        .and_then(|value| value.to_str().ok())
        .and_then(|value| value.split_once('-'))
        .and_then(|(start, _)| start.trim_start_matches("bytes ").parse::<u64>().ok());
    if start.is_some_and(|start| start != upload.length) {
        let response = progress(StatusCode::RANGE_NOT_SATISFIABLE, name, id, upload.length);
        uploads.put(id, upload);
        return response;
    }
    let mut body = request.into_body().into_data_stream();
    while let Some(piece) = body.next().await {
        let Ok(piece) = piece else {
            uploads.put(id, upload);
            return failure(
                StatusCode::BAD_REQUEST,
                "BLOB_UPLOAD_INVALID",
                "the upload broke off",
            );
        };
        if let Err(error) = upload.file.write_all(&piece) {
            return failure(StatusCode::INTERNAL_SERVER_ERROR, "UNKNOWN", &error.to_string());
        }
        upload.hasher.update(&piece);
        upload.length += piece.len() as u64;
    }
    if !last {
        let response = progress(StatusCode::ACCEPTED, name, id, upload.length);
        uploads.put(id, upload);
        return response;
    }
    let digest = upload.hasher.finish();
    if wanted.and_then(|text| text.parse().ok()) != Some(digest) {
        return failure(
            StatusCode::BAD_REQUEST,
            "DIGEST_INVALID",
            "the uploaded bytes have another digest",
        );
    }
    match shared.content.finish(upload.file, &digest) {
        Ok(()) => created(&format!("/v2/{name}/blobs/{digest}"), &digest),
        Err(error) => failure(StatusCode::INTERNAL_SERVER_ERROR, "UNKNOWN", &error.to_string()),
    }
}

fn unknown_upload() -> Response<Body> {
    failure(StatusCode::NOT_FOUND, "BLOB_UPLOAD_UNKNOWN", "no such upload")
}

fn empty(status: StatusCode) -> Response<Body> {
    let mut response = json(status, String::new());
    response.headers_mut().remove(header::CONTENT_TYPE);
    response
}

fn created(location: &str, digest: &Digest) -> Response<Body> {
    let mut response = empty(StatusCode::CREATED);
    insert(&mut response, "location", location);
    insert(&mut response, "docker-content-digest", &digest.to_string());
    response
}

/// Where to go on with an upload, and how much is here.
fn progress(status: StatusCode, name: &str, id: &str, length: u64) -> Response<Body> {
    let mut response = empty(status);
    insert(
        &mut response,
        "location",
        &format!("/v2/{name}/blobs/uploads/{id}"),
    );
    insert(&mut response, "range", &format!("0-{}", length.saturating_sub(1)));
    insert(&mut response, "docker-upload-uuid", id);
    response
}

fn insert(response: &mut Response<Body>, name: &'static str, value: &str) {
    if let Ok(value) = HeaderValue::from_str(value) {
        response.headers_mut().insert(name, value);
    }
}
