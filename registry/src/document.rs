//! Manifests, indexes and configurations from bytes, as Go's tools read them: `null` is the same as nothing at all, a list that is left
//! out is empty, and a configuration may leave out what nobody needs to mount its image.
//!
//! Everything that reads such a document calls this: sources, the loader of `fs` and the commands. So all of them take the same
//! documents.

use oci_spec::image::{Config, ImageIndex, ImageManifest};
use peel_image::Digest;
use serde_json::{Map, Value, json};

use crate::source::platform::Wanted;

/// What a configuration says of the image as a whole.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Configuration {
    /// Architecture in Go's words; empty if it is left out.
    pub architecture: String,
    /// Operating system in Go's words; empty if it is left out.
    pub os: String,
    /// Variant of the architecture; empty if there is none.
    pub variant: String,
    /// Digests of the uncompressed layers, lowest first.
    pub diff_ids: Vec<Digest>,
}

impl Configuration {
    /// The image's platform, for people, if it is not one for `platform` (`os/architecture[/variant]`; `None` is this machine). `None`
    /// also if the configuration does not say it, or the text is no platform.
    pub fn mismatch(&self, platform: Option<&str>) -> Option<String> {
        let wanted = platform.map_or_else(|| Some(Wanted::host()), Wanted::parse)?;
        let fits = wanted.rank(&self.os, &self.architecture, &self.variant).is_some();
        (!fits && !self.architecture.is_empty()).then(|| {
            let text = [self.os.as_str(), &self.architecture, &self.variant].join("/");
            text.trim_matches('/').to_owned()
        })
    }
}

/// Reads an image manifest. An error names the field.
pub fn manifest(bytes: &[u8]) -> Result<ImageManifest, String> {
    let mut json = object(bytes)?;
    fill(&mut json, "schemaVersion", json!(2));
    fill(&mut json, "layers", json!([]));
    serde_json::from_value(Value::Object(json)).map_err(|error| error.to_string())
}

/// Reads an index. An error names the field.
pub fn index(bytes: &[u8]) -> Result<ImageIndex, String> {
    index_of(Value::Object(object(bytes)?))
}

/// As [`index`], from JSON without `null`s.
pub(crate) fn index_of(mut json: Value) -> Result<ImageIndex, String> {
    if let Value::Object(json) = &mut json {
        fill(json, "schemaVersion", json!(2));
        fill(json, "manifests", json!([]));
        for entry in json
            .get_mut("manifests")
            .and_then(Value::as_array_mut)
            .into_iter()
            .flatten()
        {
            complete_platform(entry);
        }
    }
    serde_json::from_value(json).map_err(|error| error.to_string())
}

/// Gives the platform of an entry the fields that it leaves out, empty.
pub(crate) fn complete_platform(entry: &mut Value) {
    if let Some(Value::Object(platform)) = entry.get_mut("platform") {
        fill(platform, "os", json!(""));
        fill(platform, "architecture", json!(""));
    }
}

/// Reads an image configuration. What is there must have the right type; an error names the field.
pub fn configuration(bytes: &[u8]) -> Result<Configuration, String> {
    let json = object(bytes)?;
    let text = |name: &str| match json.get(name) {
        None => Ok(String::new()),
        Some(Value::String(text)) => Ok(text.clone()),
        Some(_) => Err(format!("field `{name}` is not a string")),
    };
    let rootfs = match json.get("rootfs") {
        None => None,
        Some(Value::Object(rootfs)) => rootfs.get("diff_ids"),
        Some(_) => return Err("field `rootfs` is not an object".to_owned()),
    };
    let diff_ids = match rootfs {
        None => Vec::new(),
        Some(Value::Array(ids)) => ids.iter().map(diff_id).collect::<Result<_, _>>()?,
        Some(_) => return Err("field `rootfs.diff_ids` is not a list".to_owned()),
    };
    Ok(Configuration {
        architecture: text("architecture")?,
        os: text("os")?,
        variant: text("variant")?,
        diff_ids,
    })
}

/// Reads the part of an image configuration that says what to run; `None` where it says nothing. The rest is not looked at:
/// an image without, say, a creation time runs all the same. An error names the field.
pub fn container_config(bytes: &[u8]) -> Result<Option<Config>, String> {
    match object(bytes)?.remove("config") {
        None => Ok(None),
        Some(config) => serde_json::from_value(config)
            .map(Some)
            .map_err(|error| format!("field `config`: {error}")),
    }
}

fn diff_id(id: &Value) -> Result<Digest, String> {
    let text = id
        .as_str()
        .ok_or("field `rootfs.diff_ids` has an entry that is not a string")?;
    text.parse()
        .map_err(|error| format!("field `rootfs.diff_ids`: {error}"))
}

fn object(bytes: &[u8]) -> Result<Map<String, Value>, String> {
    match serde_json::from_slice(bytes).map_err(|error| format!("no JSON: {error}"))? {
        Value::Object(mut fields) => {
            drop_nulls_of(&mut fields);
            Ok(fields)
        }
        _ => Err("no JSON object".to_owned()),
    }
}

fn fill(fields: &mut Map<String, Value>, name: &str, value: Value) {
    fields.entry(name).or_insert(value);
}

/// Removes the fields that are `null`, at every depth. Entries of lists stay: their places mean something.
pub fn drop_nulls(json: &mut Value) {
    match json {
        Value::Object(fields) => drop_nulls_of(fields),
        Value::Array(entries) => entries.iter_mut().for_each(drop_nulls),
        _ => {}
    }
}

fn drop_nulls_of(fields: &mut Map<String, Value>) {
    fields.retain(|_, value| !value.is_null());
    fields.values_mut().for_each(drop_nulls);
}

#[cfg(test)]
mod tests {
    use super::*;

    const CONFIG: &str = r#"{"mediaType":"c","digest":"sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855","size":0}"#;

    #[test]
    fn what_a_container_runs_is_read() {
        for text in [
            "{}",
            r#"{"config": null, "rootfs": {}}"#,
            r#"{"history": null, "config": null}"#,
        ] {
            assert_eq!(container_config(text.as_bytes()), Ok(None), "{text}");
        }
        let full =
            r#"{"config": {"Cmd": ["a"], "Env": null, "Labels": null, "Unknown": 1}, "architecture": "x"}"#;
        let config = container_config(full.as_bytes()).unwrap().unwrap();
        assert_eq!(
            (config.cmd().clone(), config.env().clone()),
            (Some(vec!["a".to_owned()]), None)
        );
        let nulls = r#"{"config": {"Cmd": null, "Entrypoint": null, "Env": null, "ExposedPorts": null, "Volumes": null,
            "Labels": {"a": null, "b": "c"}, "User": null, "WorkingDir": null, "StopSignal": null}}"#;
        let config = container_config(nulls.as_bytes()).unwrap().unwrap();
        assert_eq!(
            (config.cmd(), config.volumes(), config.user()),
            (&None, &None, &None)
        );
        assert_eq!(config.labels().as_ref().unwrap().len(), 1);
        assert!(container_config(b"[]x").is_err());
    }

    #[test]
    fn null_is_nothing() {
        let entry = CONFIG.replace(
            "\"size\":0",
            r#""size":0,"urls":null,"annotations":null,"platform":null,"data":null"#,
        );
        for text in [
            format!(
                r#"{{"schemaVersion":2,"config":{CONFIG},"layers":null,"annotations":null,"subject":null}}"#
            ),
            format!(r#"{{"schemaVersion":null,"config":{CONFIG}}}"#),
        ] {
            let read = manifest(text.as_bytes()).unwrap();
            assert!(read.layers().is_empty() && read.annotations().is_none(), "{text}");
        }
        let text = format!(r#"{{"schemaVersion":2,"config":{CONFIG},"layers":[{entry}]}}"#);
        let read = manifest(text.as_bytes()).unwrap();
        assert!(read.layers()[0].urls().is_none() && read.layers()[0].platform().is_none());
        for text in [
            r#"{"schemaVersion":2,"manifests":null}"#,
            r#"{"annotations":{"a":null}}"#,
        ] {
            assert!(index(text.as_bytes()).unwrap().manifests().is_empty(), "{text}");
        }
        let text = format!(r#"{{"manifests":[{entry}]}}"#);
        assert_eq!(index(text.as_bytes()).unwrap().manifests().len(), 1);
    }

    #[test]
    fn half_a_platform_is_read() {
        let entry = CONFIG.replace(
            "\"size\":0",
            r#""size":0,"platform":{"os":"linux","variant":null}"#,
        );
        let read = index(format!(r#"{{"manifests":[{entry}]}}"#).as_bytes()).unwrap();
        let platform = read.manifests()[0].platform().clone().unwrap();
        assert_eq!(
            (platform.os().to_string(), platform.architecture().to_string()),
            ("linux".into(), String::new())
        );
    }

    #[test]
    fn configurations_without_what_nobody_needs() {
        for text in [
            "{}",
            r#"{"rootfs":null}"#,
            r#"{"rootfs":{"type":"layers","diff_ids":null},"history":null,"config":null}"#,
            r#"{"architecture":null,"os":null,"rootfs":{"diff_ids":[]},"created":7}"#,
        ] {
            assert_eq!(
                configuration(text.as_bytes()),
                Ok(Configuration::default()),
                "{text}"
            );
        }
        let id = Digest::EMPTY;
        let text = format!(r#"{{"os":"linux","rootfs":{{"diff_ids":["{id}"]}}}}"#);
        let read = configuration(text.as_bytes()).unwrap();
        assert_eq!((read.os.as_str(), read.diff_ids), ("linux", vec![id]));
    }

    #[test]
    fn images_for_another_platform() {
        let of = |os: &str, architecture: &str, variant: &str| Configuration {
            os: os.into(),
            architecture: architecture.into(),
            variant: variant.into(),
            diff_ids: Vec::new(),
        };
        for (config, platform, expected) in [
            (of("linux", "arm64", "v8"), "linux/amd64", Some("linux/arm64/v8")),
            (of("linux", "arm64", ""), "arm64", None),
            (of("linux", "386", ""), "linux/amd64", None),
            (of("windows", "amd64", ""), "linux/amd64", Some("windows/amd64")),
            (of("", "amd64", ""), "linux/amd64", None),
            (of("linux", "", ""), "linux/amd64", None),
            (of("linux", "arm64", ""), "nonsense", None),
        ] {
            assert_eq!(
                config.mismatch(Some(platform)).as_deref(),
                expected,
                "{config:?} for {platform}"
            );
        }
    }

    #[test]
    fn errors_name_the_field() {
        for (text, field) in [
            (r#"{"architecture":1}"#, "`architecture`"),
            (r#"{"os":[]}"#, "`os`"),
            (r#"{"rootfs":[]}"#, "`rootfs`"),
            (r#"{"rootfs":{"diff_ids":{}}}"#, "`rootfs.diff_ids`"),
            (r#"{"rootfs":{"diff_ids":[null]}}"#, "`rootfs.diff_ids`"),
            (r#"{"rootfs":{"diff_ids":["x"]}}"#, "`rootfs.diff_ids`"),
            ("[]", "object"),
            ("", "JSON"),
        ] {
            let error = configuration(text.as_bytes()).unwrap_err();
            assert!(error.contains(field), "{text}: {error}");
        }
        let error = manifest(b"{}").unwrap_err();
        assert!(error.contains("`config`"), "{error}");
    }
}
