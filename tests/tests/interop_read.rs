//! peel mounts lazily what Podman 5 and ctr-remote of Debian 13 make here of the vectors' plain image. Skopeo writes with the
//! same code as Podman; a layer of its making is among the vectors.

use peel_tests::namespace::Namespace;
use peel_tests::podman::Podman;
use peel_tests::service::{Containerd, DockerRegistry};
use peel_tests::world::{World, assert_expected, vector};

#[test]
fn what_other_tools_convert_here_is_lazy_in_peel() {
    let world = World::new();
    let registry = DockerRegistry::start(&world.dir("registry"));
    let plain = registry.take(&vector("org"), "plain");
    let namespace = Namespace::trixie(&world);
    let name = |repository: &str| format!("{}/{repository}:latest", registry.addr);
    let zstd = ["--compression-format", "zstd:chunked"];

    let podman = Podman::whole(&namespace, &world.path("podman"));
    podman.pull(&plain);
    let by_podman = name("podman");
    podman.ok(&[&["push", "--tls-verify=false"], &zstd[..], &[&plain, &by_podman]].concat());

    let containerd = Containerd::start_in(&namespace, &world.path("containerd"));
    containerd.ctr(&["image", "pull", "--plain-http", &plain]);
    let (by_estargz, by_stargz) = (name("estargz"), name("stargz"));
    for (flag, target) in [("--estargz", &by_estargz), ("--zstdchunked", &by_stargz)] {
        containerd.client("ctr-remote", &["image", "convert", flag, "--oci", &plain, target]);
        containerd.ctr(&["image", "push", "--plain-http", target]);
    }

    for (image, dir) in [
        (by_podman, "of-podman"),
        (by_estargz, "of-estargz"),
        (by_stargz, "of-stargz"),
    ] {
        let root = world.mount(&image, dir);
        assert_expected(&root, &image);
        world.umount(&root);
        let log = world.log();
        let whole = log
            .lines()
            .find(|line| line.contains("pulling a layer whole") && line.contains(&image));
        assert_eq!(whole, None, "{image} is not lazy");
    }
    world.assert_sound();
}
