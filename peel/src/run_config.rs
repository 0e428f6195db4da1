//! What a container is given: an image's configuration, and the flags of `run` and `optimize` in the form in which the
//! sandbox merges the two ([`peel_sandbox::Process::from_image`]).

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};

use anyhow::{Context, bail};
use oci_spec::image::Config;
use peel_registry::document;

use crate::cli::ProcessArgs;

/// The part of an image's configuration that says what to run; `None` where it says nothing.
pub fn image_config(json: &str) -> anyhow::Result<Option<Config>> {
    document::container_config(json.as_bytes())
        .map_err(|reason| anyhow::anyhow!("configuration of the image: {reason}"))
}

/// The variables that `--env-file` and `--env` name, in this order: `NAME=value`, or `NAME` for the caller's own.
pub fn variables(args: &ProcessArgs) -> anyhow::Result<Vec<OsString>> {
    let mut all = Vec::new();
    for path in &args.env_file {
        let text = std::fs::read(path).with_context(|| format!("{}: cannot be read", path.display()))?;
        for line in text.split(|byte| *byte == b'\n') {
            let line = line.strip_suffix(b"\r").unwrap_or(line).trim_ascii_start();
            if !line.is_empty() && !line.starts_with(b"#") {
                check_variable(line).with_context(|| path.display().to_string())?;
                all.push(OsString::from_vec(line.to_vec()));
            }
        }
    }
    for given in &args.env {
        check_variable(given.as_bytes()).context("--env")?;
        all.push(given.clone());
    }
    Ok(all)
}

fn check_variable(text: &[u8]) -> anyhow::Result<()> {
    if text.is_empty() || text.starts_with(b"=") {
        bail!("{:?}: a variable needs a name", String::from_utf8_lossy(text));
    }
    Ok(())
}

/// Parses `--volume SOURCE:DESTINATION[:ro]` into what the sandbox binds.
pub fn volume(text: &OsStr) -> anyhow::Result<(PathBuf, PathBuf, bool)> {
    let parse = || -> anyhow::Result<_> {
        let mut parts = text.as_bytes().split(|byte| *byte == b':');
        let mut part = || parts.next().map(OsStr::from_bytes);
        let (Some(source), Some(destination), options) = (part(), part(), part()) else {
            bail!("expected SOURCE:DESTINATION[:ro]");
        };
        let read_only = match options.map(OsStr::as_bytes) {
            None | Some(b"rw") => false,
            Some(b"ro") => true,
            Some(_) => bail!("only ro and rw are known after the destination"),
        };
        if part().is_some() {
            bail!("too many colons");
        }
        if !source.as_bytes().contains(&b'/') {
            bail!("the source must be a path with a slash; named volumes do not exist here");
        }
        if !Path::new(destination).is_absolute() {
            bail!("the destination must be an absolute path");
        }
        let source = std::path::absolute(source).context("source")?;
        Ok((source, PathBuf::from(destination), read_only))
    };
    parse().with_context(|| format!("--volume {}", text.display()))
}

/// Parses a flag of ctr-remote that takes a JSON array of strings; a text that is no JSON is one string.
pub fn json_strings(flag: &str, text: &str) -> anyhow::Result<Vec<OsString>> {
    if !text.trim_start().starts_with('[') {
        return Ok(vec![text.into()]);
    }
    let strings: Vec<String> =
        serde_json::from_str(text).with_context(|| format!("{flag}: not a JSON array of strings"))?;
    Ok(strings.into_iter().map(OsString::from).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn strings(list: &[&str]) -> Vec<OsString> {
        list.iter().map(OsString::from).collect()
    }

    #[test]
    fn variables_come_from_files_and_flags() {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), "# comment\nA=1 2\r\n\n  B=\"x\"\nC\n").unwrap();
        let args = ProcessArgs {
            env: strings(&["D=4", "C"]),
            env_file: vec![file.path().to_owned()],
            user: None,
        };
        assert_eq!(
            variables(&args).unwrap(),
            strings(&["A=1 2", "B=\"x\"", "C", "D=4", "C"])
        );
        for bad in ["", "=x"] {
            let args = ProcessArgs {
                env: strings(&[bad]),
                ..ProcessArgs::default()
            };
            assert!(variables(&args).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn volumes_are_parsed() {
        let parsed = |text: &str| volume(OsStr::new(text)).ok();
        assert_eq!(parsed("/a:/b"), Some(("/a".into(), "/b".into(), false)));
        assert_eq!(parsed("/a:/b:ro"), Some(("/a".into(), "/b".into(), true)));
        assert_eq!(
            parsed("./a:/b:rw"),
            Some((std::env::current_dir().unwrap().join("a"), "/b".into(), false))
        );
        for bad in ["", "/a", "/a:b", "name:/b", "/a:/b:z", "/a:/b:ro:x"] {
            assert_eq!(parsed(bad), None, "{bad:?}");
        }
    }

    #[test]
    fn json_flags_are_parsed() {
        assert_eq!(
            json_strings("--args", r#"["a", "b c"]"#).unwrap(),
            strings(&["a", "b c"])
        );
        assert_eq!(json_strings("--args", "/bin/sh").unwrap(), strings(&["/bin/sh"]));
        assert!(json_strings("--args", "[1]").is_err());
    }
}
