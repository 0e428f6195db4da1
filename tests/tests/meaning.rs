//! The meaning of a layer is what running it entry by entry leaves: random layers with repeated paths, links to what is replaced,
//! replaced parents and types, whiteouts and opaque marks before and after, written in every format, and reordered. Source and
//! outputs are unpacked by umoci and by the models in `meaning.py`, and merged by peel: each tool must find one tree in all of
//! them, as long as it takes the source.
//!
//! `PEEL_MEANING_SEED` and `PEEL_MEANING_SECONDS` choose another seed, and for how long to go on; what was run is printed.
#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails where it is")]

use std::collections::{BTreeMap, HashMap};
use std::fmt::Write as _;
use std::fs;
use std::io::{Cursor, Read, Write as _};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use peel_image::compression::{Guard, decode_chunk, decoder};
use peel_image::layer::{ChunkSource, EntryKind, LayerIndex};
use peel_image::tar::index::HashSink;
use peel_image::tar::index_tar;
use peel_image::tree::{InodeKind, Tree};
use peel_image::{Digest, estargz, views, zstd_chunked};
use peel_tests::image::{ESTARGZ, Tar, estargz_with, gzip, zstd_chunked as zstd_format};
use peel_tests::world::{World, errors, text};
use peel_writer::order::Orphans;
use peel_writer::{Dialect, Duplicates, Format, Options, WriteError, Written, write};
use serde_json::{Value, json};

/// The mode of whatever a hard link may lead to: links repeat it. Tools disagree about links that say something else.
const LINKED: u32 = 0o644;
/// For how long new images are made, unless the environment says otherwise.
const SECONDS: u64 = 40;
const SEED: u64 = 1;
/// Images whose layers are unpacked together.
const BATCH: usize = 8;

const MODELS: [&str; 3] = ["merged", "overlay", "podman"];

/// A small generator of numbers, the same ones for the same seed.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        // SplitMix64.
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn below(&mut self, limit: usize) -> usize {
        usize::try_from(self.next() % limit as u64).unwrap()
    }

    fn chance(&mut self, percent: usize) -> bool {
        self.below(100) < percent
    }

    fn pick<'a, T>(&mut self, of: &'a [T]) -> &'a T {
        &of[self.below(of.len())]
    }

    fn path(&mut self) -> String {
        let mut path = ["a", "b", "c"][self.below(3)].to_owned();
        for _ in 0..self.below(3) {
            path += "/";
            path += ["a", "b", "c"][self.below(3)];
        }
        path
    }
}

/// A layer, as its tar stream and in words.
#[derive(Clone)]
struct Source {
    tar: Vec<u8>,
    words: String,
    paths: Vec<String>,
}

/// A random layer over others. Nearly all entries that no tool takes are left out, since there is nothing to learn from those.
fn layer(random: &mut Random, may_link: bool, may_fail: bool, lower: &[Source]) -> Source {
    let lower_paths: Vec<&String> = lower.iter().flat_map(|layer| &layer.paths).collect();
    let mut below: Vec<LayerIndex> = lower.iter().map(|layer| index_of(&layer.tar)).collect();
    let mut made = Tar::new();
    let (mut words, mut paths): (String, Vec<String>) = (String::new(), Vec::new());
    for _ in 0..2 + random.below(12) {
        let earlier = |random: &mut Random| match random.below(10) {
            0 => random.path(),
            1 if !lower_paths.is_empty() => (*random.pick(&lower_paths)).clone(),
            _ if paths.is_empty() => random.path(),
            _ => random.pick(&paths).clone(),
        };
        let path = if random.chance(50) {
            earlier(random)
        } else {
            random.path()
        };
        let mode = *random.pick(&[0o755, 0o700, 0o711, 0o644]);
        let content = format!("{}", random.next() % 1000);
        let tar = made.clone();
        let (tar, line) = match random.below(100) {
            0..25 => (
                tar.entry(&path, b'5', "", mode, b""),
                format!("d {path} {mode:o}"),
            ),
            25..55 => (
                tar.entry(&path, b'0', "", LINKED, content.as_bytes()),
                format!("f {path} {content}"),
            ),
            55..75 => {
                let target = earlier(random);
                (tar.hard_link(&path, &target), format!("h {path} -> {target}"))
            }
            75..81 if may_link => {
                let target = [*random.pick(&["", "/", "../"]), &earlier(random)].concat();
                (tar.symlink(&path, &target), format!("s {path} -> {target}"))
            }
            75..93 => {
                let name = path.rfind('/').map_or(0, |slash| slash + 1);
                let mark = format!("{}.wh.{}", &path[..name], &path[name..]);
                (tar.file(&mark, b""), format!("f {mark}"))
            }
            93..98 => {
                let mark = format!("{path}/.wh..wh..opq");
                (tar.file(&mark, b""), format!("f {mark}"))
            }
            _ => (tar.entry(&path, b'6', "", LINKED, b""), format!("p {path}")),
        };
        below.push(index_of(&tar.clone().finish()));
        let is_taken = Tree::merge(&below).is_ok();
        below.pop();
        if !(is_taken || may_fail && random.chance(2)) {
            continue;
        }
        made = tar;
        words += &line;
        words.push('\n');
        if !line.contains(".wh.") {
            paths.push(path);
        }
    }
    Source {
        tar: made.finish(),
        words,
        paths,
    }
}

/// A format, and whether files come first.
#[derive(Clone, Copy)]
struct Kind {
    name: &'static str,
    format: Format,
    reorders: bool,
}

fn kinds() -> Vec<Kind> {
    let kind = |name, format, reorders| Kind {
        name,
        format,
        reorders,
    };
    let keep = Format::Estargz {
        chunk_size: 0,
        min_chunk_size: 0,
        level: 1,
        external_toc: true,
        keep_diff_id: true,
    };
    vec![
        kind("estargz", ESTARGZ, false),
        kind("estargz, shared members", estargz_with(0, 50_000, false), false),
        kind("estargz, reordered", ESTARGZ, true),
        kind("estargz, external TOC", estargz_with(0, 0, true), false),
        kind("estargz, external TOC, reordered", estargz_with(0, 0, true), true),
        kind("estargz, DiffID kept", keep, false),
        kind("zstd:chunked, podman", zstd_format(Dialect::Podman), false),
        kind(
            "zstd:chunked, podman, reordered",
            zstd_format(Dialect::Podman),
            true,
        ),
        kind("zstd:chunked, stargz", zstd_format(Dialect::Stargz), false),
        kind(
            "zstd:chunked, stargz, reordered",
            zstd_format(Dialect::Stargz),
            true,
        ),
        kind("gzip", Format::Gzip { level: 1 }, false),
        kind("zstd", Format::Zstd { level: 1 }, false),
        kind("uncompressed", Format::Plain, false),
    ]
}

/// A layer as it was written: its tar stream, and what peel takes it for.
struct Output {
    tar: Vec<u8>,
    index: LayerIndex,
    /// How table of contents and tar stream differ.
    difference: Option<String>,
}

fn written(tar: &[u8], kind: Kind, first: &[String]) -> Result<Output, WriteError> {
    let mut options = Options {
        format: kind.format,
        prioritized: first.iter().map(|path| path.clone().into_bytes()).collect(),
        orphans: Orphans::Move,
        duplicates: Duplicates::Refuse,
        threads: 1,
    };
    if !kind.reorders {
        options.prioritized.clear();
    }
    let mut blob = Vec::new();
    let run = |options: &Options, blob: &mut Vec<u8>| write(tar, Cursor::new(Vec::new()), blob, options);
    let written = match run(&options, &mut blob) {
        Err(WriteError::Duplicate { .. }) => {
            options.duplicates = Duplicates::Drop;
            blob.clear();
            run(&options, &mut blob)?
        }
        outcome => outcome?,
    };
    let mut stream = Vec::new();
    decoder(Cursor::new(blob.clone()), Guard::default())
        .unwrap()
        .1
        .read_to_end(&mut stream)
        .unwrap();
    assert_eq!(Digest::of(&stream), written.diff_id);
    let unpacked = index_of(&stream);
    let toc = toc_of(&blob, &written, kind.format);
    let difference = toc.as_ref().and_then(|index| {
        check_contents(&blob, index);
        views::compare(index, &unpacked)
            .err()
            .map(|difference| difference.to_string())
    });
    Ok(Output {
        tar: stream,
        index: toc.unwrap_or(unpacked),
        difference,
    })
}

fn index_of(tar: &[u8]) -> LayerIndex {
    index_tar(tar, &mut HashSink::default()).unwrap().0
}

fn toc_of(blob: &[u8], written: &Written, format: Format) -> Option<LayerIndex> {
    match format {
        Format::Estargz { .. } => {
            let location = estargz::locate(blob, blob.len() as u64).unwrap();
            let json = match &written.external_toc {
                Some(toc) => estargz::extract_toc(toc).unwrap().json,
                None => {
                    let start = usize::try_from(location.payload_end).unwrap();
                    let end = start + usize::try_from(location.toc_size).unwrap();
                    estargz::extract_toc(&blob[start..end]).unwrap().json
                }
            };
            Some(estargz::read_index(&json, location.payload_end).unwrap())
        }
        Format::ZstdChunked { dialect, .. } => {
            let location = zstd_chunked::locate(blob, blob.len() as u64).unwrap();
            let place =
                usize::try_from(location.toc.start).unwrap()..usize::try_from(location.toc.end).unwrap();
            let json = zstd_chunked::decompress_toc(&blob[place], None).unwrap();
            Some(zstd_chunked::read_index(&json, location.payload_end, dialect).unwrap())
        }
        Format::Gzip { .. } | Format::Zstd { .. } | Format::Plain => None,
    }
}

/// Every file of a table of contents has the bytes that it names.
fn check_contents(blob: &[u8], index: &LayerIndex) {
    for entry in &index.entries {
        let EntryKind::Regular(file) = &entry.kind else {
            continue;
        };
        let mut content = Vec::new();
        for chunk in &file.chunks {
            let ChunkSource::Blob {
                encoding,
                offset,
                compressed_size,
                inner_offset,
            } = chunk.source
            else {
                panic!("{} has zeros", entry.path);
            };
            let start = usize::try_from(offset).unwrap();
            let end = start + usize::try_from(compressed_size).unwrap();
            content.extend(
                decode_chunk(encoding, &blob[start..end], inner_offset, chunk.size, 1 << 20).unwrap(),
            );
        }
        assert_eq!(
            (content.len() as u64, Some(Digest::of(&content))),
            (file.size, file.digest),
            "{}",
            entry.path
        );
    }
}

/// The tree as `meaning.py` lists one, or why there is none.
fn merged(layers: &[LayerIndex]) -> Result<Vec<String>, String> {
    let tree = Tree::merge(layers).map_err(|error| error.to_string())?;
    let mut names: Vec<(String, _)> = tree
        .walk()
        .map(|(path, id)| (String::from_utf8(path).unwrap(), id))
        .collect();
    names.sort();
    let mut first = HashMap::new();
    for (path, id) in &names {
        first.entry(*id).or_insert_with(|| path.clone());
    }
    let line = |(path, id): &(String, _)| {
        let inode = tree.inode(*id).unwrap();
        let meta = &inode.metadata;
        let (kind, mode, data) = match &inode.kind {
            InodeKind::Directory(_) => return format!("{path} d {:o} {}", meta.mode, meta.uid),
            InodeKind::Regular(file) => ('f', meta.mode, file.object.hex()),
            InodeKind::Symlink(target) => ('l', 0o777, String::from_utf8(target.to_vec()).unwrap()),
            InodeKind::Fifo => ('p', meta.mode, "-".to_owned()),
            other => panic!("{other:?}"),
        };
        format!(
            "{path} {kind} {mode:o} {} {} {data} {}",
            meta.uid, meta.mtime, first[id]
        )
    };
    Ok(names.iter().map(line).collect())
}

/// The lines without modes and owners of directories: those of directories that no entry made are nobody's.
fn without_metadata(lines: &[String]) -> Vec<String> {
    let shown = |line: &String| match line.split(' ').nth(1) {
        Some("d") => line.split(' ').take(2).collect::<Vec<_>>().join(" "),
        _ => line.clone(),
    };
    lines.iter().map(shown).collect()
}

/// Stacks of tar streams that tools unpack, each only once.
struct Stacks {
    dir: PathBuf,
    known: BTreeMap<Vec<Digest>, usize>,
    manifests: Vec<Value>,
}

type Unpacked = HashMap<(usize, &'static str), Result<Vec<String>, String>>;

impl Stacks {
    fn new(dir: PathBuf) -> Self {
        fs::create_dir_all(dir.join("layout/blobs/sha256")).unwrap();
        fs::create_dir_all(dir.join("tars")).unwrap();
        Self {
            dir,
            known: BTreeMap::new(),
            manifests: Vec::new(),
        }
    }

    fn blob(&self, kind: &str, bytes: &[u8]) -> Value {
        let digest = Digest::of(bytes);
        fs::write(self.dir.join("layout/blobs/sha256").join(digest.hex()), bytes).unwrap();
        json!({ "mediaType": format!("application/vnd.oci.image.{kind}"), "digest": digest.to_string(), "size": bytes.len() })
    }

    fn add(&mut self, tars: &[&[u8]]) -> usize {
        let key: Vec<Digest> = tars.iter().map(|tar| Digest::of(tar)).collect();
        if let Some(known) = self.known.get(&key) {
            return *known;
        }
        let number = self.known.len();
        let layers: Vec<Value> = tars
            .iter()
            .map(|tar| self.blob("layer.v1.tar+gzip", &gzip(tar)))
            .collect();
        for (digest, tar) in key.iter().zip(tars) {
            fs::write(self.tar(digest), tar).unwrap();
        }
        let diff_ids: Vec<String> = key.iter().map(ToString::to_string).collect();
        let config = json!({
            "architecture": "amd64", "os": "linux", "config": {},
            "rootfs": { "type": "layers", "diff_ids": diff_ids },
        });
        let config = self.blob("config.v1+json", config.to_string().as_bytes());
        let manifest = json!({ "schemaVersion": 2, "config": config, "layers": layers });
        let mut manifest = self.blob("manifest.v1+json", manifest.to_string().as_bytes());
        manifest["annotations"] = json!({ "org.opencontainers.image.ref.name": format!("t{number}") });
        self.manifests.push(manifest);
        self.known.insert(key, number);
        number
    }

    fn tar(&self, digest: &Digest) -> PathBuf {
        self.dir.join("tars").join(digest.hex())
    }

    /// What all tools make of all stacks.
    fn unpack(&self) -> Unpacked {
        let layout = self.dir.join("layout");
        fs::write(layout.join("oci-layout"), r#"{"imageLayoutVersion":"1.0.0"}"#).unwrap();
        let index = json!({ "schemaVersion": 2, "manifests": self.manifests });
        fs::write(layout.join("index.json"), index.to_string()).unwrap();
        let mut unpacked = Unpacked::new();
        let mut jobs = String::new();
        for (key, number) in &self.known {
            let tars: Vec<PathBuf> = key.iter().map(|digest| self.tar(digest)).collect();
            for model in MODELS {
                writeln!(
                    jobs,
                    "{}",
                    json!({ "id": [number, model], "model": model, "layers": tars })
                )
                .unwrap();
            }
            let root = self.dir.join(format!("root{number}"));
            let output = Command::new("umoci")
                .args([
                    "raw",
                    "unpack",
                    "--image",
                    &format!("{}:t{number}", layout.display()),
                ])
                .arg(&root)
                .output()
                .unwrap();
            if output.status.success() {
                writeln!(
                    jobs,
                    "{}",
                    json!({ "id": [number, "umoci"], "model": "disk", "root": root })
                )
                .unwrap();
            } else {
                unpacked.insert((*number, "umoci"), Err(errors(&output)));
            }
        }
        for answer in python(&jobs) {
            let answer: Value = serde_json::from_str(&answer).unwrap();
            let number = usize::try_from(answer["id"][0].as_u64().unwrap()).unwrap();
            let tool = MODELS
                .into_iter()
                .chain(["umoci"])
                .find(|tool| answer["id"][1] == **tool)
                .unwrap();
            let tree = answer["tree"].as_array().map(|lines| {
                lines
                    .iter()
                    .map(|line| line.as_str().unwrap().to_owned())
                    .collect()
            });
            unpacked.insert((number, tool), tree.ok_or_else(|| answer["error"].to_string()));
        }
        unpacked
    }
}

fn python(jobs: &str) -> Vec<String> {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/meaning.py");
    let mut child = Command::new("python3")
        .arg(script)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut input = child.stdin.take().unwrap();
    let jobs = jobs.to_owned();
    let writer = std::thread::spawn(move || input.write_all(jobs.as_bytes()));
    let output = child.wait_with_output().unwrap();
    writer.join().unwrap().unwrap();
    assert!(output.status.success(), "meaning.py: {}", errors(&output));
    text(&output).lines().map(str::to_owned).collect()
}

/// A conversion: its name, its place among the stacks, and the listing of its mount or why there is none.
type Converted = (&'static str, usize, Result<Vec<String>, String>);

/// One image: its layers in words, its stack, what peel makes of it, and the same of every output.
struct Case {
    words: String,
    has_links_below: bool,
    source: usize,
    peel: Result<Vec<String>, String>,
    outputs: Vec<Converted>,
    refused: Vec<(&'static str, String)>,
    differences: Vec<(&'static str, String)>,
}

fn case(random: &mut Random, stacks: &mut Stacks) -> Case {
    let has_links_below = random.chance(15);
    let may_link = random.chance(40);
    let mut layers: Vec<Source> = Vec::new();
    if random.chance(70) {
        layers.push(layer(random, has_links_below, false, &[]));
    }
    let upper = layer(random, may_link, !has_links_below, &layers);
    layers.push(upper);
    let first: Vec<Vec<String>> = layers
        .iter()
        .map(|layer| {
            (0..1 + random.below(3))
                .map(|_| random.pick(&layer.paths_or_root()).clone())
                .collect()
        })
        .collect();
    let mut words = String::new();
    for (layer, first) in layers.iter().zip(&first) {
        writeln!(words, "{}first: {first:?}\n", layer.words).unwrap();
    }
    let tars: Vec<&[u8]> = layers.iter().map(|layer| layer.tar.as_slice()).collect();
    let source = stacks.add(&tars);
    let indexes: Vec<LayerIndex> = tars.iter().map(|tar| index_of(tar)).collect();
    let (mut outputs, mut refused, mut differences) = (Vec::new(), Vec::new(), Vec::new());
    for kind in kinds() {
        let layers = layers.iter().zip(&first);
        let made: Result<Vec<Output>, _> = layers
            .map(|(layer, first)| written(&layer.tar, kind, first))
            .collect();
        match made {
            Ok(made) => {
                let tars: Vec<&[u8]> = made.iter().map(|output| output.tar.as_slice()).collect();
                let stack = stacks.add(&tars);
                differences.extend(
                    made.iter()
                        .filter_map(|output| Some((kind.name, output.difference.clone()?))),
                );
                let indexes: Vec<LayerIndex> = made.into_iter().map(|output| output.index).collect();
                outputs.push((kind.name, stack, merged(&indexes)));
            }
            Err(error) => refused.push((kind.name, error.to_string())),
        }
    }
    Case {
        words,
        has_links_below: has_links_below && layers.len() > 1,
        source,
        peel: merged(&indexes),
        outputs,
        refused,
        differences,
    }
}

impl Source {
    fn paths_or_root(&self) -> Vec<String> {
        if self.paths.is_empty() {
            vec![String::new()]
        } else {
            self.paths.clone()
        }
    }
}

/// What is wrong, if anything.
fn judge(case: &Case, unpacked: &Unpacked, taken: &mut BTreeMap<&'static str, usize>) -> Vec<String> {
    let mut wrong = Vec::new();
    for tool in MODELS.into_iter().chain(["umoci"]) {
        let Ok(expected) = &unpacked[&(case.source, tool)] else {
            continue;
        };
        *taken.entry(tool).or_default() += 1;
        // Umoci alone leaves out marks below files, and takes what comes of that.
        let is_odd = tool == "umoci" && case.peel.is_err() && case.words.contains(".wh.");
        // What no table of contents can say may be refused.
        let may_be = |error: &str| is_odd || error.contains("no table of contents can describe that");
        for (kind, error) in case.refused.iter().filter(|(_, error)| !may_be(error)) {
            wrong.push(format!("{kind}: refused, but {tool} takes the source: {error}"));
        }
        for (kind, stack, _) in &case.outputs {
            match &unpacked[&(*stack, tool)] {
                Ok(found) if found == expected => {}
                other => wrong.push(format!("{kind}, by {tool}: {expected:#?} became {other:#?}")),
            }
        }
        // The models of an overlay are what they are. Umoci follows symbolic links of lower layers, and makes no parents of whiteouts.
        let is_same = !case.has_links_below && !case.words.contains(".wh.");
        let comparable = tool == "merged" || tool == "umoci" && is_same;
        match &case.peel {
            Err(error) if comparable => wrong.push(format!("peel refuses what {tool} takes: {error}")),
            Ok(found) if comparable && without_metadata(found) != without_metadata(expected) => {
                wrong.push(format!("peel and {tool} differ: {found:#?} is not {expected:#?}"));
            }
            _ => {}
        }
    }
    if let Ok(expected) = &case.peel {
        *taken.entry("peel").or_default() += 1;
        let differences = case.differences.iter();
        wrong.extend(differences.map(|(kind, difference)| format!("{kind}: {difference}")));
        for (kind, _, found) in &case.outputs {
            if found.as_ref() != Ok(expected) {
                wrong.push(format!("{kind}, by peel: {expected:#?} became {found:#?}"));
            }
        }
    }
    wrong
}

fn setting(name: &str, default: u64) -> u64 {
    std::env::var(name).map_or(default, |value| value.parse().unwrap())
}

#[test]
fn every_output_unpacks_to_the_tree_of_its_source() {
    let (seed, seconds) = (
        setting("PEEL_MEANING_SEED", SEED),
        setting("PEEL_MEANING_SECONDS", SECONDS),
    );
    println!("PEEL_MEANING_SEED={seed} PEEL_MEANING_SECONDS={seconds}");
    let world = World::new();
    let mut random = Random(seed);
    let end = Instant::now() + Duration::from_secs(seconds);
    let (mut images, mut stacks_all, mut taken) = (0, 0, BTreeMap::new());
    while images == 0 || Instant::now() < end {
        let dir = world.path(&format!("batch{images}"));
        let mut stacks = Stacks::new(dir.clone());
        let cases: Vec<Case> = (0..BATCH).map(|_| case(&mut random, &mut stacks)).collect();
        let unpacked = stacks.unpack();
        for case in &cases {
            let wrong = judge(case, &unpacked, &mut taken);
            assert!(
                wrong.is_empty(),
                "seed {seed}, image {images}:\n{}{}",
                case.words,
                wrong.join("\n")
            );
            images += 1;
        }
        stacks_all += stacks.known.len();
        fs::remove_dir_all(&dir).unwrap();
    }
    println!("{images} images, {stacks_all} different stacks of layers; taken: {taken:?}");
    for tool in MODELS.into_iter().chain(["umoci", "peel"]) {
        assert!(taken.contains_key(tool), "{tool} took no image at all");
    }
}
