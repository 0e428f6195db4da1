//! Which entries move to the front, and what they take along.

use proptest::prelude::*;

use super::super::names::Described;
use super::*;

fn kind(is_directory: bool, link: Option<&EntryPath>) -> Kind<'_> {
    match link {
        Some(target) => Kind::Hardlink(target.as_bytes()),
        None if is_directory => Kind::Directory { xattrs: 0 },
        None => Kind::Other,
    }
}

/// Entries written as `name` or `name -> hard link target`; the result with `|` for the landmark and numbers after
/// names that occur more than once (`name#position`).
fn sorted(input: &str, prioritized: &[&str]) -> (String, Vec<String>) {
    sorted_with(input, prioritized, Orphans::Leave)
}

fn sorted_with(input: &str, prioritized: &[&str], orphans: Orphans) -> (String, Vec<String>) {
    let clean = |name: &str| EntryPath::clean(name.as_bytes()).unwrap();
    let parsed: Vec<(&str, EntryPath, Option<EntryPath>)> = input
        .split_whitespace()
        .map(|text| match text.split_once("->") {
            Some((name, target)) => (text, clean(name), Some(clean(target))),
            None => (text, clean(text), None),
        })
        .collect();
    let mut names = Names::default();
    for (name, path, link) in &parsed {
        names.push(path, kind(name.ends_with('/'), link.as_ref()));
    }
    let order = sort(&names, prioritized, orphans);
    let name = |index: &usize| {
        let (name, path, _) = &parsed[*index];
        let count = parsed.iter().filter(|(_, other, _)| other == path).count();
        if count > 1 {
            format!("{name}#{index}")
        } else {
            (*name).to_owned()
        }
    };
    let first = order.first.iter().map(name);
    let rest = order.rest.iter().map(name);
    let text: Vec<String> = first.chain(["|".to_owned()]).chain(rest).collect();
    let missing = order.missing.iter().map(|missing| {
        let absent = missing
            .absent
            .as_ref()
            .map_or("?".to_owned(), ToString::to_string);
        format!("{}: {absent}", String::from_utf8_lossy(&missing.path))
    });
    (text.join(" "), missing.collect())
}

#[test]
fn entries_come_in_upstreams_order() {
    for (case, input, prioritized, expected) in [
        ("no list", "foo bar/ bar/baz", vec![], "| foo bar/ bar/baz"),
        (
            "files",
            "foo baz bar baa",
            vec!["baa", "bar", "baz"],
            "baa bar baz | foo",
        ),
        (
            "parents first",
            "foo bar/ bar/a baz/ baz/1 baz/2 baz/q/ baz/q/b baz/q/a",
            vec!["baz/q/a", "baz/2", "foo"],
            "baz/ baz/q/ baz/q/a baz/2 foo | bar/ bar/a baz/1 baz/q/b",
        ),
        (
            "a directory by itself",
            "foo bar/ bar/a",
            vec!["bar"],
            "bar/ | foo bar/a",
        ),
        (
            "a target alone",
            "foo baz bar->baz",
            vec!["baz"],
            "baz | foo bar->baz",
        ),
        (
            "target before link",
            "a baz bar->baz",
            vec!["bar"],
            "baz bar->baz | a",
        ),
        (
            "target's parents before target",
            "d/ d/t e/ e/l->d/t x",
            vec!["e/l"],
            "e/ d/ d/t e/l->d/t | x",
        ),
        ("chain of links", "a b->a c->b x", vec!["c"], "a b->a c->b | x"),
        (
            "links before their targets stay before them",
            "c->b x b->a a",
            vec!["c"],
            "c->b b->a a | x",
        ),
        (
            "a target takes along the links before it",
            "x l->a a",
            vec!["a"],
            "l->a a | x",
        ),
        (
            "the root too",
            "./ ./foo ./baz ./baa ./l->./baz",
            vec!["baa", "l"],
            "./ ./baa ./baz ./l->./baz | ./foo",
        ),
        ("the root alone", "a ./ b", vec!["/"], "./ | a b"),
        ("no root entry", "a b", vec!["/", "b"], "b | a"),
        ("named twice", "a b c", vec!["b", "/b", "c", "b"], "b c | a"),
        (
            "landmarks and TOC are dropped",
            ".no.prefetch.landmark a ./.prefetch.landmark b stargz.index.json d/.prefetch.landmark",
            vec!["b", ".prefetch.landmark"],
            "b | a d/.prefetch.landmark",
        ),
    ] {
        assert_eq!(sorted(input, &prioritized).0, expected, "{case}");
    }
}

#[test]
fn what_an_entry_depends_on_comes_along() {
    for (case, input, prioritized, expected, missing) in [
        (
            "a whiteout of the path",
            "x d/ d/.wh.a d/a d/b",
            vec!["d/a"],
            "d/ d/.wh.a d/a | x d/b",
            vec![],
        ),
        (
            "one that comes later",
            "x a .wh.a",
            vec!["a"],
            "a | x .wh.a",
            vec![],
        ),
        (
            "a whiteout of a parent",
            "x .wh.d d/ d/e/ d/e/a",
            vec!["d/e/a"],
            ".wh.d d/ d/e/ d/e/a | x",
            vec![],
        ),
        (
            "opaque marks",
            "x .wh..wh..opq d/ d/y d/.wh..wh..opq d/a",
            vec!["d/a"],
            ".wh..wh..opq d/ d/.wh..wh..opq d/a | x d/y",
            vec![],
        ),
        (
            "an opaque mark before its directory",
            "x d/.wh..wh..opq d/ d/a",
            vec!["d/a"],
            "d/.wh..wh..opq d/ d/a | x",
            vec![],
        ),
        (
            "a whiteout with what stands below its name",
            "x d/ d/y .wh.d d/e/ d/e/a",
            vec!["d/e/a"],
            "d/ d/y .wh.d d/e/ d/e/a | x",
            vec![],
        ),
        (
            "a parent that comes later",
            "x d/a d/ d/b",
            vec!["d/a"],
            "d/a | x d/ d/b",
            vec![],
        ),
        (
            "a parent behind another child",
            "x d/a d/ d/b",
            vec!["d/b"],
            "d/a d/ d/b | x",
            vec![],
        ),
        (
            "the target's whiteout",
            "x .wh.t t y l->t",
            vec!["l"],
            ".wh.t t l->t | x y",
            vec![],
        ),
        (
            "a whiteout by itself",
            "x a .wh.a",
            vec![".wh.a"],
            "a .wh.a | x",
            vec![],
        ),
    ] {
        let (order, found) = sorted(input, &prioritized);
        assert_eq!((order.as_str(), found), (expected, missing), "{case}");
    }
    let mut input = String::from("x ");
    for number in 0..=TRAIN_MAX {
        input += &format!("d/{number} ");
    }
    let (order, missing) = sorted(&format!("{input} d/ d/b"), &["d/b", "x"]);
    assert!(order.starts_with("x | d/0 d/1"), "{order}");
    assert_eq!(missing, ["d/b: /d"]);
    // Asked for again, by itself, and by another path.
    let prioritized = ["d/b", "d/e/f", "d/b", "d", "x"];
    let (order, missing) = sorted(&format!("{input} d/ d/b d/e/ d/e/f"), &prioritized);
    assert!(order.starts_with("x | d/0 d/1"), "{order}");
    assert_eq!(missing, ["d/b: /d", "d/e/f: /d", "d/b: /d", "d: /d"]);
}

#[test]
fn forms_of_a_name_are_alike() {
    for tar in ["", "/", "./", "../"] {
        for list in ["", "/", "./", "../"] {
            let input = format!("{tar}foo {tar}d/ {tar}d/x {tar}d/l->{tar}foo");
            let prioritized = format!("{list}d/l");
            let expected = format!("{tar}d/ {tar}foo {tar}d/l->{tar}foo | {tar}d/x");
            assert_eq!(sorted(&input, &[&prioritized]), (expected, vec![]));
        }
    }
}

#[test]
fn what_is_missing_is_left_and_reported() {
    for (case, input, prioritized, expected, missing) in [
        (
            "file",
            "a b",
            vec!["x", "b", "d/y"],
            "b | a",
            vec!["x: /x", "d/y: /d/y"],
        ),
        (
            "parent",
            "a d/f b",
            vec!["d/f", "b"],
            "b | a d/f",
            vec!["d/f: /d"],
        ),
        (
            "grandparent",
            "a d/e/ d/e/f",
            vec!["/d/e/f", "a"],
            "a | d/e/ d/e/f",
            vec!["/d/e/f: /d"],
        ),
        (
            "link target: parents stay moved",
            "a d/ d/l->gone b",
            vec!["d/l", "b"],
            "d/ b | a d/l->gone",
            vec!["d/l: /gone"],
        ),
        ("no name", "a", vec!["x\0"], "| a", vec!["x\0: ?"]),
        (
            "reserved",
            "a .prefetch.landmark",
            vec![".prefetch.landmark"],
            "| a",
            vec![".prefetch.landmark: /.prefetch.landmark"],
        ),
    ] {
        let missing: Vec<String> = missing.into_iter().map(str::to_owned).collect();
        assert_eq!(
            sorted(input, &prioritized),
            (expected.to_owned(), missing),
            "{case}"
        );
    }
}

#[test]
fn orphans_can_be_moved() {
    for (input, prioritized, expected, missing) in [
        ("a d/f b", vec!["d/f", "b"], "d/f b | a", vec![]),
        ("./ a d/ d/e/f", vec!["d/e/f"], "./ d/ d/e/f | a", vec![]),
        ("a x/t d/l->x/t", vec!["d/l"], "x/t d/l->x/t | a", vec![]),
        (
            "a d/ d/l->gone",
            vec!["d/l", "d/x"],
            "d/ | a d/l->gone",
            vec!["d/l: /gone", "d/x: /d/x"],
        ),
    ] {
        let missing: Vec<String> = missing.into_iter().map(str::to_owned).collect();
        let outcome = sorted_with(input, &prioritized, Orphans::Move);
        assert_eq!(outcome, (expected.to_owned(), missing), "{input}");
    }
}

#[test]
fn circles_are_cut() {
    for (input, prioritized, expected) in [
        ("a->a b", vec!["a"], "a->a | b"),
        ("x a->b b->a", vec!["a"], "a->b b->a | x"),
        ("x d->d/f d/f->d", vec!["d/f"], "d->d/f d/f->d | x"),
    ] {
        assert_eq!(
            sorted(input, &prioritized),
            (expected.to_owned(), vec![]),
            "{input}"
        );
    }
}

#[test]
fn links_that_change_their_file_keep_their_order() {
    for (case, input, prioritized, expected) in [
        ("the last one", "a:6 x l->a:6 m->a:7", "m", "a l m | x"),
        ("all alike", "a:6 x l->a:6 m->a:6", "m", "a m | x l"),
        ("the first one", "a:6 x l->a:7 m->a:6", "l", "a l | x m"),
        ("links of links", "a:6 x l->a:7 m->l:7 n->a:6", "n", "a l m n | x"),
        ("the file alone", "a:6 x l->a:7 m->a:6", "a", "a | x l m"),
        ("one before its file", "l->a:7 x a:6 m->a:6", "m", "l a m | x"),
        ("another file", "a:6 b:6 l->a:7 m->b:6 n->b:6", "n", "b n | a l m"),
        ("circles", "a:6 x l->m:7 m->l:6 n->a:7", "m", "l m | a x n"),
    ] {
        let mut names = Names::default();
        let mut texts = Vec::new();
        for text in input.split_whitespace() {
            let (text, mode) = text.split_once(':').unwrap_or((text, "0"));
            let clean = |name: &str| EntryPath::clean(name.as_bytes()).unwrap();
            let (name, target) = match text.split_once("->") {
                Some((name, target)) => (name, Some(clean(target))),
                None => (text, None),
            };
            let metadata = Described {
                mode: mode.parse().unwrap(),
                rest: 0,
            };
            names.push_entry(&clean(name), kind(false, target.as_ref()), metadata);
            texts.push(name);
        }
        let order = sort(&names, &[prioritized], Orphans::Leave);
        let name = |index: &usize| texts[*index];
        let first = order.first.iter().map(name).chain(["|"]);
        let found: Vec<&str> = first.chain(order.rest.iter().map(name)).collect();
        assert_eq!(found.join(" "), expected, "{case}");
        assert_eq!(order.missing, [], "{case}");
    }
}

#[test]
fn long_chains_need_no_stack() {
    let count = 200_000;
    let paths: Vec<EntryPath> = (0..count)
        .map(|index| EntryPath::clean(format!("f{index}").as_bytes()).unwrap())
        .collect();
    let mut names = Names::default();
    for (index, path) in paths.iter().enumerate() {
        names.push(path, kind(false, paths.get(index + 1)));
    }
    let order = sort(&names, &["f0"], Orphans::Leave);
    assert_eq!(order.first, (0..count).collect::<Vec<_>>());
    assert_eq!((order.rest, order.missing), (vec![], vec![]));
    let mut names = Names::default();
    for (index, path) in paths.iter().enumerate() {
        names.push(
            path,
            kind(false, index.checked_sub(1).and_then(|before| paths.get(before))),
        );
    }
    let last = format!("f{}", count - 1);
    let order = sort(&names, &[last], Orphans::Leave);
    assert_eq!(order.first, (0..count).collect::<Vec<_>>());
}

/// What must not change its order: what one of them is to the other.
fn depends(later: (&EntryPath, Option<&EntryPath>), earlier: (&EntryPath, Option<&EntryPath>)) -> bool {
    let (path, before) = (later.0.as_bytes(), earlier.0.as_bytes());
    let hides = |mark: &[u8], path: &[u8]| match special(mark) {
        Special::Whiteout(name) => {
            let hidden = [parent_of(mark), b"/", name].concat();
            let hidden = EntryPath::clean(&hidden).unwrap();
            is_within(path, hidden.as_bytes())
        }
        Special::Opaque => is_within(path, parent_of(mark)) && path.len() > parent_of(mark).len(),
        _ => false,
    };
    let is_whiteout = matches!(special(path), Special::Whiteout(_));
    is_within(path, before)
        || is_within(before, path)
        || later.1.is_some_and(|target| target.as_bytes() == before)
        || earlier.1.is_some_and(|target| target.as_bytes() == path)
        || hides(before, path)
        || is_whiteout && hides(path, before)
}

proptest! {
    /// Every entry comes once, and what depends on another stays behind it.
    #[test]
    fn nothing_is_lost_and_no_meaning(
        names in proptest::collection::vec(
            ("([ab]/){0,2}(a|b|\\.wh\\.a|\\.wh\\.\\.wh\\.\\.opq)", proptest::option::of("[ab](/[ab]){0,2}")),
            0..20,
        ),
        prioritized in proptest::collection::vec("([abc]/){0,2}[ab]", 0..6),
        orphans in any::<bool>(),
    ) {
        let clean = |name: &String| EntryPath::clean(name.as_bytes()).unwrap();
        let mut parsed: Vec<(EntryPath, Option<EntryPath>)> = Vec::new();
        for (name, link) in &names {
            let path = clean(name);
            // No path twice, and nothing below what is no directory.
            if parsed.iter().all(|(other, _)| *other != path) {
                parsed.push((path, link.as_ref().map(clean)));
            }
        }
        let has_children = |path: &EntryPath| {
            names.iter().any(|(name, _)| is_within(clean(name).as_bytes(), path.as_bytes()) && clean(name) != *path)
        };
        let mut entries = Names::default();
        for (path, link) in &mut parsed {
            let is_directory = has_children(path);
            if is_directory {
                *link = None;
            }
            entries.push(path, kind(is_directory, link.as_ref()));
        }
        let order = sort(&entries, &prioritized, if orphans { Orphans::Move } else { Orphans::Leave });
        let all: Vec<usize> = order.first.iter().chain(&order.rest).copied().collect();
        let mut sorted = all.clone();
        sorted.sort_unstable();
        prop_assert_eq!(sorted, (0..parsed.len()).collect::<Vec<_>>());
        let entry = |index: usize| (&parsed[index].0, parsed[index].1.as_ref());
        for (position, index) in all.iter().enumerate() {
            for before in &all[..position] {
                if before > index {
                    prop_assert!(!depends(entry(*before), entry(*index)), "{:?} before {:?}", entry(*before), entry(*index));
                }
            }
        }
    }
}
