//! Any parts, read by any number of threads, against the whole.

use proptest::prelude::*;

use super::*;
use crate::estargz::index::{parts_agree, rules};
use crate::estargz::testing;
use crate::zstd_chunked::{self, Dialect};

const END: u64 = 1 << 40;

fn plans() -> impl Iterator<Item = Plan> {
    let lengths = [90, 300, 1000, 5000, usize::MAX >> 8];
    lengths.into_iter().flat_map(|part| {
        [0, 1, 3].map(|helpers| Plan {
            helpers,
            part,
            hash: helpers != 1,
        })
    })
}

/// Reads in every way, which must all agree. Returns how many of them were in parts.
fn compare(json: &[u8], rules: &Rules) -> usize {
    let expected = whole::read(json, rules).ok();
    assert!(parts_agree(json, rules.payload_end));
    let mut read = 0;
    for plan in plans() {
        let (index, digest) = super::read(json, rules, plan);
        assert_eq!(digest, plan.hash.then(|| Digest::of(json)), "{plan:?}");
        if index.is_some() {
            read += 1;
            assert!(index == expected, "{plan:?}: {}", String::from_utf8_lossy(json));
        }
    }
    read
}

fn files(count: usize) -> Vec<String> {
    let digest = Digest::EMPTY;
    let file = |number| {
        format!(r#"{{"name":"d/{number}","type":"reg","size":5,"offset":{number},"digest":"{digest}"}}"#)
    };
    (1..=count).map(file).collect()
}

#[test]
fn usual_layers_are_read_in_parts() {
    let entries = files(200);
    for (start, between, end) in [
        ("{\"version\":1,\"entries\":[", ",", "]}"),
        (
            "{\n\t\"version\": 1,\n\t\"entries\": [\n\t\t",
            ",\n\t\t",
            "\n\t]\n}\n",
        ),
        ("{\"entries\":[", ",", "],\"tarSplitDigest\":\"x\"}"),
    ] {
        let json = format!("{start}{}{end}", entries.join(between));
        // Entries are longer than the shortest parts.
        assert_eq!(
            compare(json.as_bytes(), &rules(END)),
            plans().count() - 3,
            "{start}"
        );
    }
}

#[test]
fn layers_by_upstream_are_read_in_parts() {
    for tag in ["esgz", "esgz-opt", "esgz-chunk64k", "esgz-min50k"] {
        for layer in testing::layers(tag) {
            let (toc, _) = layer.open();
            assert!(compare(&toc.json, &rules(END)) > 0, "{tag}");
            let zstd = zstd_chunked::rules(END, Dialect::Podman);
            assert!(compare(&toc.json, &zstd) > 0, "{tag}");
        }
    }
}

#[test]
fn names_that_look_like_the_end_of_an_entry_do_not_mislead() {
    let mut entries = files(50);
    for (number, name) in ["},{", "}, {", "],", "]}", "},{\\\"name"]
        .iter()
        .cycle()
        .take(25)
        .enumerate()
    {
        let entry = format!(
            r#"{{"name":"{number}{name}","type":"symlink","linkName":"{}"}}"#,
            "},{".repeat(40)
        );
        entries.insert(number * 2, entry);
    }
    let json = format!("{{\"entries\":[{}]}}", entries.join(","));
    assert!(whole::read(json.as_bytes(), &rules(END)).is_ok());
    compare(json.as_bytes(), &rules(END));
}

#[test]
fn what_is_wrong_comes_from_the_whole() {
    let good = files(100);
    let with = |at: usize, entry: &str| {
        let mut entries = good.clone();
        entries.insert(at, entry.to_owned());
        format!("{{\"entries\":[{}]}}", entries.join(","))
    };
    let list = format!("{{\"entries\":[{}]", good.join(","));
    for json in [
        with(50, r#"{"name":"x","type":"socket"}"#),
        with(99, r#"{"name":"x","type":"chunk"}"#),
        with(0, "1"),
        with(50, "[]"),
        with(100, "{}"),
        with(30, r#"{"name":"x","type":"dir","mode":1.5}"#),
        list.clone(),
        format!("{list},\"entries\":[]}}"),
        format!("{list}}} and more"),
        format!("{list},\"x\":}}"),
        format!("{{\"entries\":[{},]}}", good.join(",")),
        format!("{{\"entries\":[{}", good.join(",")),
    ] {
        assert!(whole::read(json.as_bytes(), &rules(END)).is_err(), "{json}");
        assert_eq!(compare(json.as_bytes(), &rules(END)), 0, "{json}");
    }
}

/// Entries of all kinds, some of them impossible.
fn entries() -> impl Strategy<Value = String> {
    let digest = prop_oneof![
        Just(Digest::EMPTY.to_string()),
        Just(Digest::of(b"x").to_string()),
        Just(String::new()),
    ];
    let name = prop_oneof![
        Just("a"),
        Just("./b/"),
        Just("c/d"),
        Just("e\\u0041"),
        Just("},{"),
        Just(".prefetch.landmark")
    ];
    let node = (
        name.clone(),
        prop_oneof![9 => Just("dir"), 9 => Just("fifo"), 1 => Just("socket")],
        0..3,
    )
        .prop_map(|(name, kind, mode)| format!(r#"{{"name":"{name}","type":"{kind}","mode":{mode}}}"#));
    let rich = name
        .clone()
        .prop_map(|name| format!(r#"{{"name":"{name}","type":"dir","xattrs":{{"user.a":"YQ=="}},"uid":1}}"#));
    let file = (name, 0..9, 0..200, digest.clone(), digest).prop_map(|(name, size, offset, digest, chunk)| {
        format!(
            r#"{{"name":"{name}","type":"reg","size":{size},"offset":{offset},"digest":"{digest}","chunkSize":3,"chunkDigest":"{chunk}"}},
               {{"name":"{name}","type":"chunk","offset":{},"chunkOffset":3,"chunkDigest":"{chunk}"}}"#,
            offset + 1
        )
    });
    let entry = prop_oneof![3 => node, 1 => rich, 3 => file];
    proptest::collection::vec(entry, 0..40)
        .prop_map(|entries| format!("{{\"entries\":[{}]}}", entries.join(",")))
}

proptest! {
    #[test]
    fn parts_are_the_whole(json in entries(), any_order in any::<bool>()) {
        let rules = Rules { any_order, ..rules(1000) };
        compare(json.as_bytes(), &rules);
    }

    #[test]
    fn parts_of_noise_are_the_whole(start in 0_usize..3000, noise in proptest::collection::vec(any::<u8>(), 1..20)) {
        let mut json = format!("{{\"entries\":[{}]}}", files(30).join(",")).into_bytes();
        for (to, from) in json.iter_mut().skip(start).zip(noise) {
            *to = from;
        }
        compare(&json, &rules(END));
    }
}
