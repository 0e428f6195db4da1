//! How a registry is told who asks. `client` calls this when a registry has answered 401.
//!
//! * [`Challenge`] reads `WWW-Authenticate` (RFC 7235, section 4.1; Docker token authentication specification).
//! * [`credentials`] finds user names, passwords and identity tokens in Docker's and Podman's files.
//! * [`token`] buys Bearer tokens and keeps them until they expire.
//!
//! Nothing in here is logged or printed but names of hosts, files and helpers.

pub(crate) mod credentials;
pub(crate) mod token;

/// What a registry wants to see in `Authorization`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Challenge {
    Basic,
    Bearer {
        /// URL of the token server.
        realm: String,
        /// Name of the registry there.
        service: Option<String>,
        /// What access the refused request needs, separated by blanks.
        scope: Option<String>,
    },
}

impl Challenge {
    /// The best challenge in the values of `WWW-Authenticate`: Bearer before Basic, unknown schemes left out.
    pub(crate) fn best<'a>(headers: impl Iterator<Item = &'a str>) -> Option<Self> {
        let mut basic = None;
        for (scheme, params) in headers.flat_map(parse) {
            let param = |name: &str| {
                let found = params.iter().find(|(key, _)| key.eq_ignore_ascii_case(name));
                found.map(|(_, value)| value.clone())
            };
            if scheme.eq_ignore_ascii_case("bearer")
                && let Some(realm) = param("realm")
            {
                return Some(Self::Bearer {
                    realm,
                    service: param("service"),
                    scope: param("scope").filter(|scope| !scope.is_empty()),
                });
            }
            if scheme.eq_ignore_ascii_case("basic") {
                basic = Some(Self::Basic);
            }
        }
        basic
    }
}

type Params = Vec<(String, String)>;

/// Splits one header value into challenges. Garbage ends the list instead of failing it: what was understood still helps.
fn parse(header: &str) -> Vec<(String, Params)> {
    let mut reader = Reader { rest: header };
    let mut challenges: Vec<(String, Params)> = Vec::new();
    loop {
        reader.skip(|c| c == ',' || c == ' ' || c == '\t');
        let word = reader.token();
        if word.is_empty() {
            return challenges;
        }
        // A word with "=" after it is a parameter of the challenge before, any other word starts a new challenge.
        let before = reader.rest;
        reader.skip_blanks();
        if !challenges.is_empty() && reader.eat('=') {
            reader.skip_blanks();
            let Some(value) = reader.value() else {
                return challenges;
            };
            if let Some((_, params)) = challenges.last_mut() {
                params.push((word.to_owned(), value));
            }
            continue;
        }
        reader.rest = before;
        challenges.push((word.to_owned(), Vec::new()));
        reader.token68();
    }
}

struct Reader<'a> {
    rest: &'a str,
}

impl<'a> Reader<'a> {
    fn skip(&mut self, wanted: impl Fn(char) -> bool) {
        self.rest = self.rest.trim_start_matches(wanted);
    }

    fn skip_blanks(&mut self) {
        self.skip(|c| c == ' ' || c == '\t');
    }

    fn eat(&mut self, c: char) -> bool {
        match self.rest.strip_prefix(c) {
            Some(rest) => {
                self.rest = rest;
                true
            }
            None => false,
        }
    }

    fn take(&mut self, wanted: impl Fn(char) -> bool) -> &'a str {
        let end = self.rest.find(|c| !wanted(c)).unwrap_or(self.rest.len());
        let (taken, rest) = self.rest.split_at(end);
        self.rest = rest;
        taken
    }

    /// RFC 7230 `token`.
    fn token(&mut self) -> &'a str {
        self.take(|c| c.is_ascii_alphanumeric() || "!#$%&'*+-.^_`|~".contains(c))
    }

    /// Skips `token68` credentials that may stand after a scheme instead of parameters.
    fn token68(&mut self) {
        let mut probe = Reader { rest: self.rest };
        probe.skip_blanks();
        let word = probe.take(|c| c.is_ascii_alphanumeric() || "-._~+/".contains(c));
        let padding = probe.take(|c| c == '=');
        probe.skip_blanks();
        let ends = probe.rest.is_empty() || probe.rest.starts_with(',');
        if !word.is_empty() && ends && (padding.len() != 1 || probe.rest.is_empty()) {
            self.rest = probe.rest;
        }
    }

    /// A token or a quoted string.
    fn value(&mut self) -> Option<String> {
        if !self.eat('"') {
            return Some(self.take(|c| c != ',' && c != ' ' && c != '\t').to_owned());
        }
        let mut value = String::new();
        let mut chars = self.rest.char_indices();
        while let Some((at, c)) = chars.next() {
            match c {
                '"' => {
                    self.rest = self.rest.get(at + 1..).unwrap_or_default();
                    return Some(value);
                }
                '\\' => value.push(chars.next()?.1),
                c => value.push(c),
            }
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn bearer(realm: &str, service: Option<&str>, scope: Option<&str>) -> Option<Challenge> {
        Some(Challenge::Bearer {
            realm: realm.into(),
            service: service.map(Into::into),
            scope: scope.map(Into::into),
        })
    }

    #[test]
    fn challenges_of_real_registries() {
        let hub = "Bearer realm=\"https://auth.docker.io/token\",service=\"registry.docker.io\",\
                   scope=\"repository:library/debian:pull,push repository:a/b:pull\"";
        for (header, expected) in [
            (
                hub,
                bearer(
                    "https://auth.docker.io/token",
                    Some("registry.docker.io"),
                    Some("repository:library/debian:pull,push repository:a/b:pull"),
                ),
            ),
            ("Basic realm=\"basic-realm\"", Some(Challenge::Basic)),
            ("basic", Some(Challenge::Basic)),
            ("Basic realm=x, Bearer realm=\"r\"", bearer("r", None, None)),
            (
                "Negotiate abc==, BEARER Realm = \"a\\\"b\" , service=s",
                bearer("a\"b", Some("s"), None),
            ),
            ("Negotiate, Basic realm=\"a, b\"", Some(Challenge::Basic)),
            ("Bearer service=\"only\"", None),
            ("Bearer realm=\"unclosed", None),
            ("Digest realm=\"x\"", None),
            ("", None),
            (",,,", None),
        ] {
            assert_eq!(Challenge::best([header].into_iter()), expected, "{header}");
        }
        let two = ["Basic realm=x", "Bearer realm=y"];
        assert_eq!(Challenge::best(two.into_iter()), bearer("y", None, None));
    }

    proptest! {
        #[test]
        fn any_header_is_read_without_panic(header in "\\PC*") {
            let _ = Challenge::best([header.as_str()].into_iter());
        }

        #[test]
        fn quoted_values_round_trip(realm in "[ -~]{0,30}", service in "[ -~]{1,30}") {
            let quote = |text: &str| text.replace('\\', "\\\\").replace('"', "\\\"");
            let header = format!("Bearer realm=\"{}\",service=\"{}\"", quote(&realm), quote(&service));
            prop_assert_eq!(Challenge::best([header.as_str()].into_iter()), bearer(&realm, Some(&service), None));
        }
    }
}
