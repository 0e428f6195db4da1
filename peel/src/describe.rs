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
            let escaped = char.is_control();
            escaped
                .then(|| char.escape_default())
                .into_iter()
                .flatten()
                .chain((!escaped).then_some(char))
        })
        .collect()
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
        assert_eq!(describe(&anyhow!("type a\x1b[2Jb")), "type a\\u{1b}[2Jb");
    }
}
