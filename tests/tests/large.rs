//! A layer of 100,000 files: mounted, listed and read like any other.

use std::fs;

use peel_tests::image::{Layer, Tar, push};
use peel_tests::world::{World, read};

const DIRS: usize = 100;
const FILES_PER_DIR: usize = 1000;

#[test]
fn a_layer_of_100_000_files() {
    let mut tar = Tar::new();
    for dir in 0..DIRS {
        tar = tar.dir(&format!("d{dir}/"));
        for file in 0..FILES_PER_DIR {
            tar = tar.file(&format!("d{dir}/f{file}"), format!("{dir}/{file}").as_bytes());
        }
    }
    let world = World::new();
    let registry = world.registry();
    let name = push(
        &registry,
        "app",
        "large",
        &[Layer::estargz(&tar.finish(), 0, &[])],
    );
    let dir = world.dir("root");
    world.ok(&["mount", "--no-prefetch", &name, dir.to_str().unwrap()]);
    let mut seen = 0;
    for number in 0..DIRS {
        let names: std::collections::BTreeSet<String> = fs::read_dir(dir.join(format!("d{number}")))
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        seen += names.len();
        assert!(names.contains("f0") && names.contains(&format!("f{}", FILES_PER_DIR - 1)));
    }
    assert_eq!(seen, DIRS * FILES_PER_DIR);
    for (number, file) in [(0, 0), (42, 999), (99, 500), (7, 1)] {
        let got = read(&dir.join(format!("d{number}/f{file}"))).unwrap();
        assert_eq!(String::from_utf8(got).unwrap(), format!("{number}/{file}"));
    }
    world.umount(&dir);
    world.assert_sound();
}
