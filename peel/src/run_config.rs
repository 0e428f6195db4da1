//! What a container runs: an image's configuration with the user's changes on top, by the rules of `docker run`.
//!
//! The configuration comes from strangers: unknown fields are ignored, and missing ones and nulls mean "not given" (OCI
//! image specification, config.md).

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};

use anyhow::{Context, bail};
use peel_sandbox::Process;
use serde::Deserialize;

use crate::cli::ProcessArgs;

/// What `docker run` gives a container whose image sets no PATH.
const DEFAULT_PATH: &str = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// The part of an image's configuration that says what to run.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(default)]
pub struct ImageConfig {
    #[serde(deserialize_with = "or_default")]
    config: ContainerConfig,
}

#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(default, rename_all = "PascalCase")]
struct ContainerConfig {
    #[serde(deserialize_with = "or_default")]
    user: String,
    #[serde(deserialize_with = "or_default")]
    env: Vec<String>,
    #[serde(deserialize_with = "or_default")]
    entrypoint: Vec<String>,
    #[serde(deserialize_with = "or_default")]
    cmd: Vec<String>,
    #[serde(deserialize_with = "or_default")]
    working_dir: String,
    stop_signal: Option<String>,
}

fn or_default<'de, T: Default + Deserialize<'de>, D: serde::Deserializer<'de>>(deserializer: D) -> Result<T, D::Error> {
    Ok(Option::deserialize(deserializer)?.unwrap_or_default())
}

/// The user's changes.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Overrides {
    /// Entry point; an empty one takes the image's away. Either way the image's command goes with it.
    pub entrypoint: Option<Vec<OsString>>,
    /// Command; the image's if empty.
    pub command: Vec<OsString>,
    /// `NAME=value`, later ones win.
    pub env: Vec<OsString>,
    /// Working directory.
    pub workdir: Option<PathBuf>,
    /// User and group.
    pub user: Option<String>,
    /// Whether there is a terminal.
    pub terminal: bool,
}

impl ImageConfig {
    /// Reads an image's configuration.
    pub fn parse(json: &[u8]) -> anyhow::Result<Self> {
        serde_json::from_slice(json).context("configuration of the image")
    }

    /// The process to run.
    pub fn process(&self, overrides: &Overrides) -> anyhow::Result<Process> {
        let image = &self.config;
        let os = |list: &[String]| list.iter().map(OsString::from).collect::<Vec<_>>();
        let mut args = match &overrides.entrypoint {
            Some(entrypoint) => entrypoint
                .iter()
                .filter(|arg| !arg.is_empty())
                .cloned()
                .collect(),
            None => os(&image.entrypoint),
        };
        if !overrides.command.is_empty() {
            args.extend(overrides.command.iter().cloned());
        } else if overrides.entrypoint.is_none() {
            args.extend(os(&image.cmd));
        }
        if args.is_empty() {
            bail!("the image names no command to run; give one after the image's name");
        }

        let mut env = os(&image.env);
        if !env.iter().any(|variable| name_of(variable) == b"PATH") {
            env.insert(0, DEFAULT_PATH.into());
        }
        if overrides.terminal && !env.iter().any(|variable| name_of(variable) == b"TERM") {
            env.push("TERM=xterm".into());
        }
        for variable in &overrides.env {
            match env.iter_mut().find(|old| name_of(old) == name_of(variable)) {
                Some(old) => old.clone_from(variable),
                None => env.push(variable.clone()),
            }
        }

        let cwd = overrides
            .workdir
            .clone()
            .unwrap_or_else(|| PathBuf::from(&image.working_dir));
        Ok(Process {
            args,
            env,
            cwd: Path::new("/").join(cwd),
            user: overrides.user.clone().unwrap_or_else(|| image.user.clone()),
            terminal: overrides.terminal,
            stop_signal: image.stop_signal.clone().filter(|signal| !signal.is_empty()),
        })
    }
}

fn name_of(variable: &OsStr) -> &[u8] {
    let bytes = variable.as_bytes();
    bytes.split(|byte| *byte == b'=').next().unwrap_or(bytes)
}

/// The variables that `--env-file` and `--env` set, in this order. `here` looks up those that are only named.
pub fn variables(args: &ProcessArgs, here: &dyn Fn(&OsStr) -> Option<OsString>) -> anyhow::Result<Vec<OsString>> {
    let mut all = Vec::new();
    for path in &args.env_file {
        let text = std::fs::read(path).with_context(|| format!("{}: cannot be read", path.display()))?;
        for line in text.split(|byte| *byte == b'\n') {
            let line = line.strip_suffix(b"\r").unwrap_or(line).trim_ascii_start();
            if !line.is_empty() && !line.starts_with(b"#") {
                let line = OsString::from_vec(line.to_vec());
                all.extend(
                    variable(&line, here).with_context(|| format!("{}: {}", path.display(), line.display()))?,
                );
            }
        }
    }
    for given in &args.env {
        all.extend(variable(given, here).with_context(|| format!("--env {}", given.display()))?);
    }
    Ok(all)
}

fn variable(text: &OsStr, here: &dyn Fn(&OsStr) -> Option<OsString>) -> anyhow::Result<Option<OsString>> {
    if name_of(text).is_empty() {
        bail!("a variable needs a name");
    }
    if text.as_bytes().contains(&b'=') {
        return Ok(Some(text.to_owned()));
    }
    Ok(here(text).map(|value| [text, OsStr::new("="), &value].into_iter().collect()))
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

    const CONFIG: &str = r#"{"config": {"Entrypoint": ["/entry"], "Cmd": ["a", "b"], "Env": ["A=1", "PATH=/bin"],
        "WorkingDir": "srv", "User": "www", "StopSignal": "SIGINT", "Labels": null}, "rootfs": {}}"#;

    fn strings(list: &[&str]) -> Vec<OsString> {
        list.iter().map(OsString::from).collect()
    }

    #[test]
    fn commands_merge_as_docker_does() {
        let image = ImageConfig::parse(CONFIG.as_bytes()).unwrap();
        for (entrypoint, command, expected) in [
            (None, &[][..], &["/entry", "a", "b"][..]),
            (None, &["x"], &["/entry", "x"]),
            (Some(&["/other"][..]), &[], &["/other"]),
            (Some(&["/other"]), &["x", "y"], &["/other", "x", "y"]),
            (Some(&[""]), &["x"], &["x"]),
        ] {
            let overrides = Overrides {
                entrypoint: entrypoint.map(strings),
                command: strings(command),
                ..Overrides::default()
            };
            assert_eq!(image.process(&overrides).unwrap().args, strings(expected), "{overrides:?}");
        }
        let none = Overrides {
            entrypoint: Some(strings(&[""])),
            ..Overrides::default()
        };
        assert!(image.process(&none).is_err());
    }

    #[test]
    fn the_rest_merges_too() {
        let image = ImageConfig::parse(CONFIG.as_bytes()).unwrap();
        let plain = image.process(&Overrides::default()).unwrap();
        assert_eq!(plain.env, strings(&["A=1", "PATH=/bin"]));
        assert_eq!(
            (plain.cwd, plain.user.as_str(), plain.stop_signal.as_deref()),
            (PathBuf::from("/srv"), "www", Some("SIGINT"))
        );
        let changed = image
            .process(&Overrides {
                env: strings(&["B=2", "A=3", "B=4"]),
                workdir: Some("/w".into()),
                user: Some("0:0".into()),
                terminal: true,
                ..Overrides::default()
            })
            .unwrap();
        assert_eq!(changed.env, strings(&["A=3", "PATH=/bin", "TERM=xterm", "B=4"]));
        assert_eq!((changed.cwd, changed.user), (PathBuf::from("/w"), "0:0".to_owned()));
    }

    #[test]
    fn sparse_configurations_are_read() {
        for text in ["{}", r#"{"config": null}"#, r#"{"config": {"Env": null, "Cmd": null, "User": null}}"#] {
            let image = ImageConfig::parse(text.as_bytes()).unwrap();
            let process = image
                .process(&Overrides {
                    command: strings(&["x"]),
                    ..Overrides::default()
                })
                .unwrap();
            assert_eq!(process.env, strings(&[DEFAULT_PATH]));
            assert_eq!(process.cwd, Path::new("/"));
        }
        assert!(ImageConfig::parse(b"[]x").is_err());
    }

    #[test]
    fn variables_come_from_files_flags_and_here() {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), "# comment\nA=1 2\r\n\n  B=\"x\"\nC\nNOT_HERE\n").unwrap();
        let args = ProcessArgs {
            env: strings(&["D=4", "C"]),
            env_file: vec![file.path().to_owned()],
            user: None,
        };
        let here = |name: &OsStr| (name == "C").then(|| "here".into());
        assert_eq!(
            variables(&args, &here).unwrap(),
            strings(&["A=1 2", "B=\"x\"", "C=here", "D=4", "C=here"])
        );
        let bad = ProcessArgs {
            env: strings(&["=x"]),
            ..ProcessArgs::default()
        };
        assert!(variables(&bad, &here).is_err());
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
        assert_eq!(json_strings("--args", r#"["a", "b c"]"#).unwrap(), strings(&["a", "b c"]));
        assert_eq!(json_strings("--args", "/bin/sh").unwrap(), strings(&["/bin/sh"]));
        assert!(json_strings("--args", "[1]").is_err());
    }
}
