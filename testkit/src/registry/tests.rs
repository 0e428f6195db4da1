//! The embedded registry over real sockets, by hand-written HTTP: what a client sees, with and without faults.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::time::Duration;

use peel_hash::Digest;

use super::serve::{Place, place};
use super::{Action, Registry, Rule};

/// An answer: status line and headers in lower case, and the body as far as it came.
#[derive(Debug)]
struct Answer {
    status: u16,
    head: String,
    body: Vec<u8>,
}

impl Answer {
    fn header(&self, name: &str) -> Option<&str> {
        let mut lines = self.head.lines().filter_map(|line| line.split_once(": "));
        lines.find(|(key, _)| *key == name).map(|(_, value)| value)
    }
}

/// One request on a connection of its own; `None` when it cannot be opened or nothing comes back.
fn ask(registry: &Registry, method: &str, target: &str, headers: &str, body: &[u8]) -> Option<Answer> {
    let mut stream = TcpStream::connect(registry.addr()).ok()?;
    stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    let length = body.len();
    let head = format!(
        "{method} {target} HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-length: {length}\r\n{headers}\r\n"
    );
    stream.write_all(head.as_bytes()).ok()?;
    stream.write_all(body).ok()?;
    let mut all = Vec::new();
    // A cut connection ends with an error after the bytes that came.
    let _ = stream.read_to_end(&mut all);
    let split = all.windows(4).position(|window| window == b"\r\n\r\n")?;
    let head = String::from_utf8_lossy(&all[..split]).to_lowercase();
    let status = head.split(' ').nth(1)?.parse().ok()?;
    Some(Answer {
        status,
        head,
        body: all[split + 4..].to_vec(),
    })
}

fn get(registry: &Registry, target: &str, headers: &str) -> Answer {
    ask(registry, "GET", target, headers, b"").unwrap()
}

fn start() -> (tempfile::TempDir, Registry) {
    let dir = tempfile::tempdir().unwrap();
    let registry = Registry::start(dir.path()).unwrap();
    (dir, registry)
}

#[test]
fn paths_are_taken_apart_from_the_end() {
    let cases = [
        ("/v2/", Some(Place::Base)),
        ("/v2", Some(Place::Base)),
        ("/v2/a/manifests/latest", Some(Place::Manifest("a", "latest"))),
        ("/v2/a/blobs/manifests/x", Some(Place::Manifest("a/blobs", "x"))),
        (
            "/v2/a/b/c/blobs/sha256:00",
            Some(Place::Blob("a/b/c", "sha256:00")),
        ),
        ("/v2/a/b/blobs/uploads/", Some(Place::Upload("a/b", ""))),
        ("/v2/a/b/blobs/uploads", Some(Place::Upload("a/b", ""))),
        ("/v2/a/b/blobs/uploads/7", Some(Place::Upload("a/b", "7"))),
        ("/v2/a/tags/list", Some(Place::Tags("a"))),
        ("/v2/a", None),
        ("/v1/", None),
        ("/", None),
    ];
    for (path, expected) in cases {
        assert_eq!(place(path), expected, "{path}");
    }
}

#[test]
fn blobs_come_whole_in_ranges_and_as_head() {
    let (_dir, registry) = start();
    let data: Vec<u8> = (0..1_000_000_u32)
        .map(|i| u8::try_from(i % 251).unwrap())
        .collect();
    let digest = registry.content().put_blob(&data).unwrap();
    let target = format!("/v2/a/b/blobs/{digest}");
    let whole = get(&registry, &target, "");
    assert_eq!((whole.status, whole.body == data), (200, true));
    assert_eq!(
        whole.header("docker-content-digest"),
        Some(digest.to_string().as_str())
    );
    let part = get(&registry, &target, "range: bytes=100-299999\r\n");
    assert_eq!((part.status, part.body == data[100..300_000]), (206, true));
    assert_eq!(part.header("content-range"), Some("bytes 100-299999/1000000"));
    let none = get(&registry, &target, "range: bytes=1000000-\r\n");
    assert_eq!(
        (none.status, none.header("content-range")),
        (416, Some("bytes */1000000"))
    );
    let head = ask(&registry, "HEAD", &target, "", b"").unwrap();
    assert_eq!(
        (head.status, head.header("content-length"), head.body.len()),
        (200, Some("1000000"), 0)
    );
    let missing = get(&registry, &format!("/v2/a/blobs/{}", Digest::of(b"no")), "");
    assert_eq!(missing.status, 404);
    assert!(String::from_utf8_lossy(&missing.body).contains("BLOB_UNKNOWN"));
    let counters = registry.counters();
    assert_eq!((counters.requests, counters.blob_requests), (5, 5));
    assert_eq!(counters.body_bytes, 1_000_000 + 299_900);
    assert_eq!(registry.log()[1].range.as_deref(), Some("bytes=100-299999"));
    registry.reset_counters();
    assert_eq!((registry.counters().requests, registry.log().len()), (0, 0));
}

#[test]
fn uploads_at_once_in_pieces_and_by_mount_make_the_same_blob() {
    let (_dir, registry) = start();
    let data = b"twelve bytes";
    let digest = Digest::of(data);
    let monolithic = format!(
        "/v2/a/blobs/uploads/?digest={}",
        digest.to_string().replace(':', "%3A")
    );
    assert_eq!(ask(&registry, "POST", &monolithic, "", data).unwrap().status, 201);
    assert_eq!(get(&registry, &format!("/v2/a/blobs/{digest}"), "").body, data);

    let mount = format!("/v2/b/blobs/uploads/?mount={digest}&from=a");
    assert_eq!(ask(&registry, "POST", &mount, "", b"").unwrap().status, 201);
    let other = format!("/v2/b/blobs/uploads/?mount={}&from=a", Digest::of(b"no"));
    assert_eq!(ask(&registry, "POST", &other, "", b"").unwrap().status, 202);

    let long: Vec<u8> = (0..200_000_u32).map(|i| u8::try_from(i % 13).unwrap()).collect();
    let digest = Digest::of(&long);
    let begun = ask(&registry, "POST", "/v2/a/blobs/uploads/", "", b"").unwrap();
    let location = begun.header("location").unwrap().to_owned();
    assert_eq!(begun.status, 202);
    let first = ask(
        &registry,
        "PATCH",
        &location,
        "content-range: 0-99999\r\n",
        &long[..100_000],
    )
    .unwrap();
    assert_eq!((first.status, first.header("range")), (202, Some("0-99999")));
    let again = ask(
        &registry,
        "PATCH",
        &location,
        "content-range: 0-99999\r\n",
        &long[..100_000],
    )
    .unwrap();
    assert_eq!((again.status, again.header("range")), (416, Some("0-99999")));
    let state = get(&registry, &location, "");
    assert_eq!((state.status, state.header("range")), (204, Some("0-99999")));
    let target = format!("{location}?digest={digest}");
    assert_eq!(
        ask(&registry, "PUT", &target, "", &long[100_000..])
            .unwrap()
            .status,
        201
    );
    assert!(get(&registry, &format!("/v2/a/blobs/{digest}"), "").body == long);

    let begun = ask(&registry, "POST", "/v2/a/blobs/uploads/", "", b"").unwrap();
    let target = format!("{}?digest={digest}", begun.header("location").unwrap());
    let wrong = ask(&registry, "PUT", &target, "", b"other bytes").unwrap();
    assert!(wrong.status == 400 && String::from_utf8_lossy(&wrong.body).contains("DIGEST_INVALID"));
    assert_eq!(ask(&registry, "PUT", &target, "", b"").unwrap().status, 404);
}

#[test]
fn manifests_need_their_blobs_and_answer_by_tag_and_digest() {
    let (_dir, registry) = start();
    let blob = registry.content().put_blob(b"layer").unwrap();
    let text = |digest: &Digest| format!(r#"{{"layers":[{{"digest":"{digest}"}}]}}"#);
    let kind = "content-type: application/vnd.oci.image.manifest.v1+json\r\n";
    let missing = text(&Digest::of(b"no"));
    let refused = ask(
        &registry,
        "PUT",
        "/v2/r/x/manifests/one",
        kind,
        missing.as_bytes(),
    )
    .unwrap();
    assert_eq!(refused.status, 404);
    let good = text(&blob);
    let digest = Digest::of(good.as_bytes());
    let other = format!("/v2/r/x/manifests/{}", Digest::of(b"no"));
    assert_eq!(
        ask(&registry, "PUT", &other, kind, good.as_bytes())
            .unwrap()
            .status,
        400
    );
    assert_eq!(
        ask(&registry, "PUT", "/v2/r/x/manifests/one", "", good.as_bytes())
            .unwrap()
            .status,
        400
    );
    assert_eq!(
        ask(&registry, "PUT", "/v2/r/x/manifests/one", kind, good.as_bytes())
            .unwrap()
            .status,
        201
    );
    for reference in ["one".to_owned(), digest.to_string()] {
        let answer = get(&registry, &format!("/v2/r/x/manifests/{reference}"), "");
        assert_eq!(answer.body, good.as_bytes());
        assert_eq!(
            answer.header("content-type"),
            Some("application/vnd.oci.image.manifest.v1+json")
        );
    }
    assert_eq!(get(&registry, "/v2/r/x/manifests/two", "").status, 404);
    assert_eq!(
        get(&registry, "/v2/r/x/tags/list", "").body,
        br#"{"name":"r/x","tags":["one"]}"#
    );
    assert_eq!(get(&registry, "/v2/", "").body, b"{}");
}

#[test]
fn rules_act_on_the_requests_that_they_name() {
    let (_dir, registry) = start();
    let data = vec![0x0f; 300_000];
    let digest = registry.content().put_blob(&data).unwrap();
    let target = format!("/v2/a/blobs/{digest}");
    let faults = registry.faults();

    faults.add(
        Rule::get(digest.to_string(), Action::Status(503))
            .after(1)
            .times(1),
    );
    let statuses: Vec<u16> = (0..3).map(|_| get(&registry, &target, "").status).collect();
    assert_eq!(statuses, [200, 503, 200]);

    faults.clear();
    faults.add(Rule::get("", Action::Corrupt(200_000..200_002)));
    let part = get(&registry, &target, "range: bytes=199999-200002\r\n");
    assert_eq!(part.body, [0x0f, 0xf0, 0xf0, 0x0f]);

    faults.clear();
    faults.add(Rule::get("", Action::Truncate(150_000)));
    let cut = get(&registry, &target, "");
    assert_eq!(
        (cut.header("content-length"), cut.body.len()),
        (Some("300000"), 150_000)
    );

    faults.clear();
    faults.add(Rule::get("", Action::Shorten(1000)));
    let short = get(&registry, &target, "");
    assert_eq!(
        (short.header("content-length"), short.body.len()),
        (Some("1000"), 1000)
    );

    faults.clear();
    faults.add(Rule::get("", Action::Cut).times(1));
    assert!(ask(&registry, "GET", &target, "", b"").is_none_or(|answer| answer.body.is_empty()));
    assert_eq!(get(&registry, &target, "").body.len(), 300_000);
}

#[test]
fn a_paused_registry_answers_after_it_resumes() {
    let (_dir, registry) = start();
    let digest = registry.content().put_blob(b"x").unwrap();
    registry.faults().pause();
    std::thread::scope(|scope| {
        let asked = scope.spawn(|| get(&registry, &format!("/v2/a/blobs/{digest}"), ""));
        std::thread::sleep(Duration::from_millis(100));
        assert!(!asked.is_finished());
        registry.faults().resume();
        assert_eq!(asked.join().unwrap().body, b"x");
    });
}

#[test]
fn a_registry_that_refuses_comes_back_on_the_same_port() {
    let (_dir, registry) = start();
    let addr = registry.addr();
    // A connection in use is cut as well.
    let mut open = TcpStream::connect(addr).unwrap();
    open.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    open.write_all(b"GET /v2/ HTTP/1.1\r\nhost: x\r\n\r\n").unwrap();
    assert!(open.read(&mut [0; 1024]).unwrap() > 0);
    registry.faults().refuse();
    let mut rest = Vec::new();
    let _ = open.read_to_end(&mut rest);
    let deadline = std::time::Instant::now() + Duration::from_secs(20);
    while TcpStream::connect(addr).is_ok() {
        assert!(std::time::Instant::now() < deadline, "the registry still accepts");
        std::thread::sleep(Duration::from_millis(5));
    }
    registry.faults().accept();
    let back = std::iter::repeat_with(|| ask(&registry, "GET", "/v2/", "", b""))
        .inspect(|_| std::thread::sleep(Duration::from_millis(5)))
        .take_while(|_| std::time::Instant::now() < deadline)
        .flatten()
        .next();
    assert_eq!(back.unwrap().status, 200);
}
