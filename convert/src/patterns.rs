//! Lists of paths and patterns for `optimize --prefetch-list`: one per line, `#` begins a comment line, and `*`, `?`,
//! `[...]`, `{a,b}` and `**` mean what they mean in ctr-remote (doublestar).

use anyhow::{Context, bail};
use peel_image::path::EntryPath;

/// Most patterns that braces may expand a line to.
const ALTERNATIVES_MAX: usize = 1024;
/// Most steps to match one path: a bound for patterns with many stars.
const STEPS_MAX: usize = 1 << 20;

/// One line of a list.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pattern {
    /// Clean components; `**` stands for any number of them.
    components: Vec<Vec<u8>>,
}

/// Parses a list. A line with braces becomes several patterns.
pub fn parse(text: &[u8]) -> anyhow::Result<Vec<Pattern>> {
    let mut patterns = Vec::new();
    for (number, line) in text.split(|byte| *byte == b'\n').enumerate() {
        let line = line.trim_ascii();
        if line.is_empty() || line.starts_with(b"#") {
            continue;
        }
        let context = || format!("line {}: {}", number + 1, String::from_utf8_lossy(line));
        for expanded in expand(line).with_context(context)? {
            let path = EntryPath::clean(&expanded).with_context(context)?;
            patterns.push(Pattern {
                components: path.components().map(<[u8]>::to_vec).collect(),
            });
        }
    }
    Ok(patterns)
}

/// Expands `{a,b}`, nested ones too.
fn expand(line: &[u8]) -> anyhow::Result<Vec<Vec<u8>>> {
    let mut done = Vec::new();
    let mut open = vec![line.to_vec()];
    while let Some(text) = open.pop() {
        if done.len() + open.len() > ALTERNATIVES_MAX {
            bail!("braces expand to more than {ALTERNATIVES_MAX} patterns");
        }
        // The innermost pair: the first closing brace and the last opening one before it.
        let close = text.iter().position(|byte| *byte == b'}');
        let start = close.and_then(|close| text.get(..close)?.iter().rposition(|byte| *byte == b'{'));
        let (Some(start), Some(close)) = (start, close) else {
            done.push(text);
            continue;
        };
        let (before, inside) = (
            text.get(..start).unwrap_or_default(),
            text.get(start + 1..close).unwrap_or_default(),
        );
        let after = text.get(close + 1..).unwrap_or_default();
        let mut alternatives: Vec<Vec<u8>> = inside
            .split(|byte| *byte == b',')
            .map(|choice| [before, choice, after].concat())
            .collect();
        // Popped from the end, so that the first choice comes first.
        alternatives.reverse();
        open.extend(alternatives);
    }
    Ok(done)
}

impl Pattern {
    /// Whether the path matches.
    pub fn matches(&self, path: &EntryPath) -> bool {
        let path: Vec<&[u8]> = path.components().collect();
        let mut steps = 0;
        match_components(&self.components, &path, &mut steps)
    }

    /// The one path that this can match, if it has no wildcard.
    pub fn literal(&self) -> Option<EntryPath> {
        let wild = |component: &Vec<u8>| component.iter().any(|byte| b"*?[\\".contains(byte));
        if self.components.iter().any(wild) {
            return None;
        }
        EntryPath::clean(&self.components.join(&b'/')).ok()
    }
}

impl std::fmt::Display for Pattern {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}", self.components.join(&b'/').escape_ascii())
    }
}

fn match_components(pattern: &[Vec<u8>], path: &[&[u8]], steps: &mut usize) -> bool {
    *steps += 1;
    if *steps > STEPS_MAX {
        return false;
    }
    match (pattern.split_first(), path.split_first()) {
        (None, None) => true,
        (Some((first, rest)), _) if first == b"**" => {
            match_components(rest, path, steps)
                || path
                    .split_first()
                    .is_some_and(|(_, tail)| match_components(pattern, tail, steps))
        }
        (Some((first, rest)), Some((name, tail))) => {
            match_name(first, name, steps) && match_components(rest, tail, steps)
        }
        _ => false,
    }
}

fn match_name(pattern: &[u8], name: &[u8], steps: &mut usize) -> bool {
    *steps += 1;
    if *steps > STEPS_MAX {
        return false;
    }
    let Some((first, rest)) = pattern.split_first() else {
        return name.is_empty();
    };
    match first {
        b'*' => {
            match_name(rest, name, steps)
                || name
                    .split_first()
                    .is_some_and(|(_, tail)| match_name(pattern, tail, steps))
        }
        b'?' => name
            .split_first()
            .is_some_and(|(_, tail)| match_name(rest, tail, steps)),
        b'[' => match (class(rest), name.split_first()) {
            (Some((set, rest)), Some((byte, tail))) => set.contains(*byte) && match_name(rest, tail, steps),
            (None, Some((b'[', tail))) => match_name(rest, tail, steps),
            _ => false,
        },
        b'\\' => match (rest.split_first(), name.split_first()) {
            (Some((escaped, rest)), Some((byte, tail))) => escaped == byte && match_name(rest, tail, steps),
            _ => false,
        },
        _ => name
            .split_first()
            .is_some_and(|(byte, tail)| first == byte && match_name(rest, tail, steps)),
    }
}

/// What stands between brackets.
struct Class {
    negated: bool,
    ranges: Vec<(u8, u8)>,
}

impl Class {
    fn contains(&self, byte: u8) -> bool {
        self.ranges.iter().any(|(from, to)| (*from..=*to).contains(&byte)) != self.negated
    }
}

/// Parses a class after its `[`; `None` when it is not closed.
fn class(pattern: &[u8]) -> Option<(Class, &[u8])> {
    let (negated, mut rest) = match pattern.split_first()? {
        (b'!' | b'^', rest) => (true, rest),
        _ => (false, pattern),
    };
    let mut ranges = Vec::new();
    loop {
        match rest {
            [b']', tail @ ..] if !ranges.is_empty() => return Some((Class { negated, ranges }, tail)),
            [from, b'-', to, tail @ ..] if *to != b']' => {
                ranges.push((*from, *to));
                rest = tail;
            }
            [byte, tail @ ..] => {
                ranges.push((*byte, *byte));
                rest = tail;
            }
            [] => return None,
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn matches(pattern: &str, path: &str) -> bool {
        let path = EntryPath::clean(path.as_bytes()).unwrap();
        parse(pattern.as_bytes())
            .unwrap()
            .iter()
            .any(|pattern| pattern.matches(&path))
    }

    #[test]
    fn patterns_match_as_doublestar() {
        for (pattern, path, expected) in [
            ("usr/bin/x", "usr/bin/x", true),
            ("/usr/./bin/x", "usr/bin/x", true),
            ("usr/*/x", "usr/bin/x", true),
            ("usr/*", "usr/bin/x", false),
            ("usr/**", "usr/bin/x", true),
            ("**/x", "x", true),
            ("**/x", "a/b/x", true),
            ("a/**/x", "a/x", true),
            ("a/**/x", "a/b/c/x", true),
            ("a/**/x", "b/x", false),
            ("a/*.so*", "a/lib.so.1", true),
            ("a/?", "a/b", true),
            ("a/?", "a/bc", false),
            ("a/[b-d]", "a/c", true),
            ("a/[!b-d]", "a/c", false),
            ("a/[]]", "a/]", true),
            ("a/{b,c{d,e}}", "a/ce", true),
            ("a/{b,c{d,e}}", "a/c", false),
            ("a/\\*", "a/*", true),
            ("a/\\*", "a/b", false),
        ] {
            assert_eq!(matches(pattern, path), expected, "{pattern} {path}");
        }
    }

    #[test]
    fn lists_have_comments_and_an_order() {
        let list = parse(b"# first\n\n  usr/b \n{c,a}\n").unwrap();
        let literal: Vec<String> = list
            .iter()
            .map(|pattern| pattern.literal().unwrap().to_string())
            .collect();
        assert_eq!(literal, ["/usr/b", "/c", "/a"]);
        assert!(parse(b"a*").unwrap()[0].literal().is_none());
        assert!(parse(&b"{a,b}".repeat(20)).is_err());
    }

    proptest! {
        #[test]
        fn any_pattern_ends(pattern in "[a*?\\[\\]/!{}\\\\-]{0,40}", path in "[ab/]{0,40}") {
            if let Ok(patterns) = parse(pattern.as_bytes()) {
                let path = EntryPath::clean(path.as_bytes()).unwrap();
                for pattern in patterns {
                    let _ = pattern.matches(&path);
                }
            }
        }
    }
}
