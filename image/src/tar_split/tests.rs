//! Test vectors from upstream's code, malformed lines, and round trips.

use std::collections::HashMap;
use std::io::{Cursor, Read as _};

use proptest::prelude::*;

use super::*;

fn read(text: &str) -> Result<Vec<Item>, TarSplitError> {
    Reader::new(text.as_bytes()).collect()
}

fn file(name: &[u8], size: u64, crc64: Option<u64>) -> Item {
    let name = name.to_vec();
    Item::File { name, size, crc64 }
}

fn write(items: &[Item]) -> Vec<u8> {
    let mut writer = Writer::new(Vec::new());
    for item in items {
        match item {
            Item::Segment(bytes) => writer.segment(bytes).unwrap(),
            Item::File { name, size, crc64 } => writer.file(name, *size, *crc64).unwrap(),
        }
    }
    writer.finish().unwrap()
}

#[test]
fn checksums_are_those_of_go() {
    assert_eq!(Crc64::of(b""), 0);
    assert_eq!(Crc64::of(b"123456789"), 0xb909_56c7_75a4_1001);
    assert_eq!(Crc64::of(b"hello\n"), 0x614c_3eee_e2d8_1000);
}

#[test]
fn lines_are_those_of_go() {
    let items = [
        Item::Segment(b"abc".to_vec()),
        file(b"etc/", 0, None),
        file(b"hello", 6, Some(Crc64::of(b"hello\n"))),
        file(b"a<b>&\"\\\x08\x0c\n\r\t\x01\x7f", 0, None),
        file("\u{2028}\u{e9}".as_bytes(), 0, None),
        file(b"\xff\xfe", 0, None),
        file(b"", 0, None),
    ];
    let expected = concat!(
        r#"{"type":2,"payload":"YWJj","position":0}"#,
        "\n",
        r#"{"type":1,"name":"etc/","payload":null,"position":1}"#,
        "\n",
        r#"{"type":1,"name":"hello","size":6,"payload":"YUw+7uLYEAA=","position":2}"#,
        "\n",
        r#"{"type":1,"name":"a\u003cb\u003e\u0026\"\\\b\f\n\r\t\u0001"#,
        "\x7f",
        r#"","payload":null,"position":3}"#,
        "\n",
        r#"{"type":1,"name":"\u2028"#,
        "\u{e9}",
        r#"","payload":null,"position":4}"#,
        "\n",
        r#"{"type":1,"name_raw":"//4=","payload":null,"position":5}"#,
        "\n",
        r#"{"type":1,"payload":null,"position":6}"#,
        "\n",
    );
    assert_eq!(String::from_utf8(write(&items)).unwrap(), expected);
    assert_eq!(read(expected).unwrap(), items);
    // The last line may lack its end, and unknown fields are those of a later version.
    assert_eq!(read(expected.trim_end()).unwrap(), items);
    assert!(read(r#"{"type":2,"payload":"","position":0,"new":[{}]}"#).is_ok());
}

#[test]
fn wrong_lines_are_refused() {
    use TarSplitProblem as P;
    type Check = fn(&P) -> bool;
    let cases: [(&str, Check); 17] = [
        ("nonsense", |p| matches!(p, P::Json(_))),
        ("[]", |p| matches!(p, P::Json(_))),
        (r#"{"type":1}"#, |p| matches!(p, P::Field("position"))),
        (r#"{"type":1,"type":2,"position":0}"#, |p| matches!(p, P::Json(_))),
        (r#"{"type":3,"position":0}"#, |p| matches!(p, P::Type(3))),
        (r#"{"type":1,"name":"a","payload":null,"position":7}"#, |p| {
            matches!(p, P::Position { found: 7 })
        }),
        (r#"{"type":1,"name":"a","payload":null,"position":-1}"#, |p| {
            matches!(p, P::Position { found: -1 })
        }),
        (r#"{"type":1,"name":"a","name_raw":"YQ==","position":0}"#, |p| {
            matches!(p, P::Field("name_raw"))
        }),
        (r#"{"type":1,"name_raw":"?","position":0}"#, |p| {
            matches!(p, P::Field("name_raw"))
        }),
        (r#"{"type":1,"name":"a","size":-1,"position":0}"#, |p| {
            matches!(p, P::Field("size"))
        }),
        (
            r#"{"type":1,"name":"a","size":18446744073709551616,"position":0}"#,
            |p| matches!(p, P::Json(_)),
        ),
        (
            r#"{"type":1,"name":"a","size":5,"payload":null,"position":0}"#,
            |p| matches!(p, P::Field("payload")),
        ),
        (
            r#"{"type":1,"name":"a","size":5,"payload":"YUw+7uLYEA==","position":0}"#,
            |p| matches!(p, P::Field("payload")),
        ),
        (
            r#"{"type":1,"name":"a","payload":"YUw+7uLYEAA=","position":0}"#,
            |p| matches!(p, P::Field("payload")),
        ),
        (r#"{"type":2,"name":"a","payload":"YUw=","position":0}"#, |p| {
            matches!(p, P::Field("name"))
        }),
        (r#"{"type":2,"size":9,"payload":"YUw=","position":0}"#, |p| {
            matches!(p, P::Field("size"))
        }),
        (r#"{"type":2,"payload":"YUw","position":0}"#, |p| {
            matches!(p, P::Field("payload"))
        }),
    ];
    for (line, check) in cases {
        let good = "{\"type\":1,\"name\":\"x\",\"payload\":null,\"position\":0}\n";
        let error = read(line).unwrap_err();
        assert!(check(&error.problem), "{line}: {error}");
        assert_eq!(error.line, 1);
        let mut reader = Reader::new(Cursor::new(format!("{good}{line}\n{good}")));
        assert!(reader.next_item().unwrap().is_some());
        assert_eq!(reader.next_item().unwrap_err().line, 2, "{line}");
        assert!(
            reader.next_item().unwrap().is_none(),
            "nothing comes after an error"
        );
    }
}

#[test]
fn lengths_have_limits() {
    let too_large = |error: TarSplitError| matches!(error.problem, TarSplitProblem::TooLarge { .. });
    let line = |raw: usize| {
        format!(
            "{{\"type\":2,\"payload\":\"{}\",\"position\":0}}",
            "A".repeat(raw / 3 * 4)
        )
    };
    assert!(read(&line(SEGMENT_MAX / 3 * 3)).is_ok());
    assert!(too_large(read(&line(SEGMENT_MAX + 3)).unwrap_err()));
    assert!(too_large(read(&" ".repeat(LINE_MAX + 1)).unwrap_err()));
    let name = format!(
        "{{\"type\":1,\"name\":\"{}\",\"position\":0}}",
        "n".repeat(NAME_MAX + 1)
    );
    assert!(too_large(read(&name).unwrap_err()));
    // Blank lines count too.
    let blank = || std::io::BufReader::new(std::io::repeat(b'\n').take(2001));
    assert!(too_large(
        Reader::with_limit(blank(), 2000).next_item().unwrap_err()
    ));
    assert!(Reader::with_limit(blank(), 2001).next_item().unwrap().is_none());

    let mut writer = Writer::new(Vec::new());
    assert!(writer.segment(&vec![0; SEGMENT_MAX + 1]).is_err());
    assert!(writer.file(&vec![b'n'; NAME_MAX + 1], 0, None).is_err());
    assert!(writer.file(b"a", 0, Some(1)).is_err());
    assert!(writer.file(b"a", 1, None).is_err());
    assert!(writer.file(b"a", u64::MAX, Some(1)).is_err());
}

/// Rebuilds from `contents`, which are found by name.
fn rebuilt(items: &[Item], contents: &HashMap<Vec<u8>, Vec<u8>>) -> Result<Vec<u8>, RebuildError> {
    let lines = write(items);
    let mut out = Vec::new();
    let open = |name: &[u8], _size| {
        let content = contents.get(name).ok_or(std::io::ErrorKind::NotFound)?;
        Ok(Cursor::new(content.clone()))
    };
    let count = rebuild(Reader::new(lines.as_slice()), open, &mut out)?;
    assert_eq!(count, out.len() as u64);
    Ok(out)
}

#[test]
fn contents_must_be_those_of_the_tar_split() {
    let items = [
        Item::Segment(b"head".to_vec()),
        file(b"a", 5, Some(Crc64::of(b"hello"))),
        Item::Segment(b"tail".to_vec()),
    ];
    let with = |content: &[u8]| rebuilt(&items, &HashMap::from([(b"a".to_vec(), content.to_vec())]));
    assert_eq!(with(b"hello").unwrap(), b"headhellotail");
    assert!(matches!(with(b"hell"), Err(RebuildError::Size { size: 5, .. })));
    assert!(matches!(with(b"hello!"), Err(RebuildError::Size { size: 5, .. })));
    assert!(matches!(with(b"jello"), Err(RebuildError::Checksum { .. })));
    assert!(matches!(
        rebuilt(&items, &HashMap::new()),
        Err(RebuildError::Content { .. })
    ));
    let wrong = "nonsense";
    let nothing = |_: &[u8], _| Ok(std::io::empty());
    assert!(matches!(
        rebuild(Reader::new(wrong.as_bytes()), nothing, &mut Vec::new()),
        Err(RebuildError::TarSplit(_))
    ));
}

fn item() -> impl Strategy<Value = Item> {
    let name = prop_oneof![
        any::<String>().prop_map(String::into_bytes),
        proptest::collection::vec(any::<u8>(), 0..40),
    ];
    prop_oneof![
        proptest::collection::vec(any::<u8>(), 1..2000).prop_map(Item::Segment),
        (name, 0..=u64::try_from(i64::MAX).unwrap(), any::<u64>())
            .prop_map(|(name, size, crc)| { file(&name, size, (size > 0).then_some(crc)) }),
    ]
}

proptest! {
    #[test]
    fn what_is_written_is_read(items in proptest::collection::vec(item(), 0..30)) {
        let lines = write(&items);
        prop_assert_eq!(read(std::str::from_utf8(&lines).unwrap()).unwrap(), items);
    }

    #[test]
    fn checksums_do_not_depend_on_pieces(data in proptest::collection::vec(any::<u8>(), 0..300), cut in 0_usize..300) {
        let (left, right) = data.split_at(cut.min(data.len()));
        let mut crc = Crc64::new();
        crc.update(left);
        crc.update(right);
        prop_assert_eq!(crc.finish(), Crc64::of(&data));
    }

    #[test]
    fn streams_are_made_again(pieces in proptest::collection::vec(
        (proptest::collection::vec(any::<u8>(), 0..600), proptest::collection::vec(any::<u8>(), 0..3000)), 0..12)) {
        let (mut items, mut contents, mut stream) = (Vec::new(), HashMap::new(), Vec::new());
        for (number, (header, content)) in pieces.into_iter().enumerate() {
            let name = format!("file {number}").into_bytes();
            let size = content.len() as u64;
            stream.extend_from_slice(&header);
            stream.extend_from_slice(&content);
            items.push(Item::Segment(header));
            items.push(file(&name, size, (size > 0).then(|| Crc64::of(&content))));
            contents.insert(name, content);
        }
        prop_assert_eq!(rebuilt(&items, &contents).unwrap(), stream);
    }

    #[test]
    fn any_bytes_are_lines_or_an_error(data in proptest::collection::vec(any::<u8>(), 0..400)) {
        let _ = Reader::new(data.as_slice()).collect::<Result<Vec<_>, _>>();
    }
}
