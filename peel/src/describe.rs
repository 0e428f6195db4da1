//! Errors and strangers' names as people read them.

/// The error and its causes in one line. Some error types print their cause themselves; it is not said twice. What they quote from
/// registries and images cannot control a terminal.
pub fn describe(error: &anyhow::Error) -> String {
    let mut text = String::new();
    for cause in error.chain() {
        let cause = cause.to_string();
        if text.is_empty() {
            text = cause;
        } else if !text.contains(&cause) {
            text.push_str(": ");
            text.push_str(&cause);
        }
    }
    printable(text.as_bytes())
}

/// Text as it can be shown on a terminal: control characters of strangers must not reach it.
pub fn printable(text: &[u8]) -> String {
    String::from_utf8_lossy(text)
        .chars()
        .flat_map(|char| {
            let escaped = char.is_control() || is_unseen(char);
            escaped
                .then(|| char.escape_default())
                .into_iter()
                .flatten()
                .chain((!escaped).then_some(char))
        })
        .collect()
}

/// Whether it is no control character by Unicode's categories, but changes what others look like (bidirectional marks), or is not to be
/// seen (Unicode 16, categories Cf, Zl and Zp).
fn is_unseen(char: char) -> bool {
    matches!(
        char,
        '\u{ad}'
            | '\u{61c}'
            | '\u{180e}'
            | '\u{200b}'..='\u{200f}'
            | '\u{2028}'..='\u{202e}'
            | '\u{2060}'..='\u{206f}'
            | '\u{feff}'
            | '\u{fff9}'..='\u{fffb}'
            | '\u{e0000}'..='\u{e007f}'
    )
}

#[cfg(test)]
mod tests {
    use anyhow::anyhow;

    use super::*;

    #[test]
    fn causes_are_said_once() {
        let error = anyhow!("disk full").context("a: disk full").context("b");
        assert_eq!(describe(&error), "b: a: disk full");
        assert_eq!(describe(&anyhow!("x").context("y")), "y: x");
    }

    #[test]
    fn names_cannot_control_the_terminal() {
        assert_eq!(printable("plain \u{e4} name".as_bytes()), "plain \u{e4} name");
        assert_eq!(printable(b"a\x1b[2Jb\n"), "a\\u{1b}[2Jb\\n");
        assert_eq!(printable(b"\xff"), "\u{fffd}");
        assert_eq!(
            printable("a\u{202e}gpj\u{200b}".as_bytes()),
            "a\\u{202e}gpj\\u{200b}"
        );
        assert_eq!(printable("\"e\u{301}\"".as_bytes()), "\"e\u{301}\"");
        assert_eq!(describe(&anyhow!("type a\x1b[2Jb")), "type a\\u{1b}[2Jb");
    }
}
