//! Stores in odd places.

use peel_tests::image::{Layer, Tar, noise, push};
use peel_tests::world::{World, read};

#[test]
fn a_store_may_have_a_long_path() {
    // Longer than an option of a file system context (255 bytes) and than the address of a socket (107 bytes) may be.
    let name = vec!["d".repeat(200); 4].join("/");
    let world = World::new().with_store_below(&name);
    assert!(world.store().as_os_str().len() > 800);
    let registry = world.registry();
    let content = noise(1, 300_000);
    let tar = Tar::new().file("a", &content).finish();
    for (tag, layer) in [
        ("lazy", Layer::estargz(&tar, 100_000, &[])),
        ("plain", Layer::plain(&tar)),
    ] {
        let name = push(&registry, "app", tag, &[layer]);
        let dir = world.mount(&name, "root");
        assert!(read(&dir.join("a")).unwrap() == content, "{tag}");
        std::fs::write(dir.join("new"), b"written").unwrap();
        world.umount(&dir);
    }
    world.assert_sound();
}
