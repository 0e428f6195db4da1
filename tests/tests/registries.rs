//! Other people's registries: Debian's docker-registry, alone and behind nginx with TLS and Basic authentication.
#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails where it is")]

use std::fs;

use peel_tests::service::{DockerRegistry, PASSWORD, TlsFront, USER};
use peel_tests::world::{World, assert_expected, errors, vector};

#[test]
fn an_image_goes_to_docker_registry_and_comes_back_lazily() {
    let world = World::new();
    let registry = DockerRegistry::start(&world.dir("docker-registry"));
    let name = format!("{}/team/vectors:esgz", registry.addr);
    world.ok(&["convert", &vector("org"), &name]);
    let dir = world.mount(&name, "root");
    assert_expected(&dir, "through docker-registry");
    let inspected = world.json(&["inspect", &name]);
    assert!(
        inspected["layers"]
            .as_array()
            .unwrap()
            .iter()
            .all(|layer| layer["lazy"] == true),
        "{inspected}"
    );
    world.umount(&dir);
    world.assert_sound();
}

#[test]
fn tls_with_a_private_authority_and_basic_authentication() {
    let world = World::new();
    let registry = DockerRegistry::start(&world.dir("docker-registry"));
    let front = TlsFront::start(&world.dir("nginx"), registry.addr);
    let name = format!("{}/team/vectors:esgz", front.host);
    let ca = front.ca.to_str().unwrap();
    let login = |file: &str, password: &str| {
        let path = world.path(file);
        let auth = base64(&format!("{USER}:{password}"));
        fs::write(
            &path,
            format!(r#"{{"auths":{{"{}":{{"auth":"{auth}"}}}}}}"#, front.host),
        )
        .unwrap();
        path.to_str().unwrap().to_owned()
    };
    let good = login("good.json", PASSWORD);
    world.ok(&[
        "convert",
        "--tls-ca",
        ca,
        "--authfile",
        &good,
        &vector("org"),
        &name,
    ]);
    let dir = world.dir("root");
    world.ok(&[
        "mount",
        "--tls-ca",
        ca,
        "--authfile",
        &good,
        &name,
        dir.to_str().unwrap(),
    ]);
    assert_expected(&dir, "through nginx");
    world.umount(&dir);

    let bad = login("bad.json", "wrong");
    for (what, arguments) in [
        ("no password", vec!["ls", "--tls-ca", ca, &name]),
        (
            "a wrong password",
            vec!["ls", "--tls-ca", ca, "--authfile", &bad, &name],
        ),
        ("an unknown authority", vec!["ls", "--authfile", &good, &name]),
    ] {
        let output = world.run(&arguments);
        let message = errors(&output);
        assert!(!output.status.success(), "{what} was let in");
        assert!(
            message.contains(&front.host),
            "with {what} the error does not name the registry: {message}"
        );
        assert!(
            !message.contains("open sesame"),
            "the error shows the password: {message}"
        );
    }
    world.assert_sound();
}

/// Base64 without another dependency; the input is short.
fn base64(text: &str) -> String {
    use std::io::Write;
    let mut child = std::process::Command::new("base64")
        .arg("--wrap=0")
        .stdin(std::process::Stdio::piped())
        .stdout(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    child.stdin.take().unwrap().write_all(text.as_bytes()).unwrap();
    String::from_utf8(child.wait_with_output().unwrap().stdout).unwrap()
}
