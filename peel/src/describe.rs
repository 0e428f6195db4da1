//! Errors as people read them.

/// The error and its causes in one line. Some error types print their cause themselves; it is not said twice.
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
    text
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
}
