//! What is scanned against what serde reads.

use proptest::prelude::*;

use super::*;

/// What serde makes of the value at the start of `json`, and its length.
fn by_serde(json: &[u8]) -> Option<(TocEntry<'_>, usize)> {
    let mut values = serde_json::Deserializer::from_slice(json).into_iter::<TocEntry<'_>>();
    let entry = values.next()?.ok()?;
    Some((entry, values.byte_offset()))
}

fn scanned(json: &[u8]) -> Option<(TocEntry<'_>, usize)> {
    let mut found = TocEntry::default();
    let length = entry(json, &mut found)?;
    Some((found, length))
}

#[test]
fn usual_entries_are_scanned() {
    for json in [
        r#"{"name":"a/b","type":"reg","size":12,"modtime":"2023-11-14T22:13:20Z","mode":420,"offset":7,"digest":"sha256:x"}"#,
        r#"{"name":"","type":""}"#,
        "{\n\t\t\t\"name\": \"d/\",\n\t\t\t\"type\": \"dir\",\n\t\t\t\"NumLink\": 0\n\t\t}",
        r#"{"type":"chunk","name":"exact length of words: 32 bytes.","chunkOffset":0,"chunkSize":999999999999999999,"chunkDigest":"x","chunkType":"zeros"}"#,
        r#"{"name":"naïve €","type":"symlink","linkName":"日本","userName":"u","groupName":"g","uid":1,"gid":2,"unknown":"x"}"#,
        r#"{"name":"c","type":"char","devMajor":1,"devMinor":3,"innerOffset":4,"endOffset":5}"#,
    ] {
        let followed = format!("{json},{{}}]");
        let (entry, length) = scanned(followed.as_bytes()).unwrap();
        assert_eq!(length, json.len());
        assert_eq!(Some((entry, length)), by_serde(json.as_bytes()), "{json}");
    }
}

#[test]
fn everything_else_is_left_to_serde() {
    for json in [
        "",
        "{",
        "{}",
        "[]",
        r#"{"name":"a"}"#,
        r#"{"type":"a"}"#,
        r#"{"name":"a","type":"b""#,
        r#"{"name":"a","type":"b",}"#,
        r#"{"name":"a","type":"b" "size":1}"#,
        r#"{"name":"a","type":"b","name":"a"}"#,
        r#"{"name":"a\n","type":"b"}"#,
        "{\"name\":\"a\n\",\"type\":\"b\"}",
        "{\"name\":\"0123456\u{0}89\",\"type\":\"b\"}",
        r#"{"name":"0123456789abcde\"","type":"b"}"#,
        r#"{"name":"a","type":"b","size":-1}"#,
        r#"{"name":"a","type":"b","size":01}"#,
        r#"{"name":"a","type":"b","size":1.0}"#,
        r#"{"name":"a","type":"b","size":1e3}"#,
        r#"{"name":"a","type":"b","size":"1"}"#,
        r#"{"name":"a","type":"b","size":}"#,
        r#"{"name":"a","type":"b","size":null}"#,
        r#"{"name":"a","type":"b","size":1000000000000000000}"#,
        r#"{"name":"a","type":"b","xattrs":{}}"#,
        r#"{"name":"a","type":"b","unknown":[]}"#,
        r#"{"name":1,"type":"b"}"#,
    ] {
        assert_eq!(scanned(json.as_bytes()), None, "{json}");
    }
    assert_eq!(scanned(b"{\"name\":\"\xff\",\"type\":\"b\"}"), None);
}

#[test]
fn lists_are_found_behind_texts_and_numbers() {
    for (json, found) in [
        (r#"{"version":1,"entries":[{"#, Some(24)),
        (" {\n\t\"version\": 1,\n\t\"entries\": [\n", Some(31)),
        (r#"{"entries":[]}"#, Some(12)),
        (r#"{"entries":null}"#, None),
        (r#"{"version":1}"#, None),
        (r#"{"version":[],"entries":[]}"#, None),
        ("[]", None),
        ("", None),
    ] {
        assert_eq!(opening(json.as_bytes()), found, "{json}");
    }
}

/// Pieces of JSON as they might follow one another.
fn pieces() -> impl Strategy<Value = String> {
    let key = prop_oneof![
        Just("name"),
        Just("type"),
        Just("size"),
        Just("uid"),
        Just("digest"),
        Just("xattrs"),
        Just("other"),
    ];
    let value = prop_oneof![
        4 => "[ -~]{0,20}".prop_map(|text| format!("\"{text}\"")),
        2 => "\\PC{0,12}".prop_map(|text| format!("\"{text}\"")),
        4 => "-?[0-9]{1,20}",
        1 => "[0-9]{1,3}[.e][0-9]{0,2}",
        1 => Just("null".to_owned()),
        1 => Just("{\"a\":\"YQ==\"}".to_owned()),
    ];
    let space = || prop_oneof![6 => Just(""), 1 => Just(" "), 1 => Just("\n\t"), 1 => Just("\u{b}")];
    let field = (key, space(), value, space())
        .prop_map(|(key, before, value, behind)| format!("\"{key}\":{before}{value}{behind}"));
    let fields = proptest::collection::vec(field, 0..6).prop_map(|fields| fields.join(","));
    (fields, space(), any::<bool>()).prop_map(|(fields, space, whole)| {
        let start = if whole {
            "{\"name\":\"n\",\"type\":\"reg\","
        } else {
            "{"
        };
        format!("{start}{fields}{space}}}")
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(4000))]

    #[test]
    fn what_is_scanned_is_what_serde_reads(json in pieces()) {
        if let Some(found) = scanned(json.as_bytes()) {
            let (entry, length) = by_serde(json.as_bytes()).unwrap();
            // That a name has no escape is part of what it says.
            prop_assert!(matches!(entry.name, Cow::Borrowed(_)) && matches!(found.0.name, Cow::Borrowed(_)));
            prop_assert_eq!(found, (entry, length));
        }
    }

    #[test]
    fn texts_end_at_the_first_special_byte(text in proptest::collection::vec(any::<u8>(), 0..40)) {
        let special = |byte: &u8| matches!(byte, b'"' | b'\\' | ..0x20);
        prop_assert_eq!(plain_length(&text), text.iter().position(special).unwrap_or(text.len()));
    }
}
