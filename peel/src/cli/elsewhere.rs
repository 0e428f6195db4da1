//! Flags of `ctr-remote image convert|optimize` and `nerdctl image convert` that peel does not have: who types one is told what to use
//! instead. The help of `peel convert` and `peel optimize` lists them.

use clap::error::{ContextKind, ContextValue, ErrorKind};

/// Flags (those of one line have one answer) and what to use instead.
const FLAGS: &[(&[&str], &str)] = &[
    (
        &["--estargz-gzip-helper", "-G"],
        "leave it out: layers are decompressed in the process while they are converted, and no program has to be installed for it",
    ),
    (&["--format"], "use --json"),
    (
        &["--terminal", "-t"],
        "leave it out: the container that is recorded has no terminal; -i passes standard input on",
    ),
    (
        &["--mount"],
        "put what the program needs into the image, or record it where it runs (`ctr-remote image optimize --record-out`) and use --record-in",
    ),
    (
        &[
            "--dns-nameservers",
            "--dns-search-domains",
            "--dns-options",
            "--add-hosts",
        ],
        "use --net host: the container has the host's resolver then",
    ),
    (
        &["--cni", "--cni-plugin-conf-dir", "--cni-plugin-dir"],
        "use --net host or --net none; a record of a run elsewhere is taken by --record-in",
    ),
    (
        &["--gpus"],
        "record the image where its devices are and use --record-in: the container here has none",
    ),
    (
        &[
            "--nydus",
            "--nydus-builder-path",
            "--nydus-work-dir",
            "--nydus-prefetch-patterns",
            "--nydus-compressor",
        ],
        "peel writes eStargz and zstd:chunked (--estargz, --zstdchunked), which every registry and runtime takes",
    ),
    (
        &[
            "--overlaybd",
            "--overlaybd-fs-type",
            "--overlaybd-dbstr",
            "--overlaybd-vsize",
        ],
        "peel writes eStargz and zstd:chunked (--estargz, --zstdchunked), which every registry and runtime takes",
    ),
    (
        &["--soci", "--soci-min-layer-size", "--soci-span-size"],
        "peel writes eStargz and zstd:chunked; to keep the layers' bytes as an index beside them does, use --estargz \
         --estargz-external-toc --estargz-keep-diff-id",
    ),
    (
        &["--erofs", "--erofs-compressors", "--erofs-mkfs-options"],
        "leave it out: peel makes EROFS images of the metadata where it mounts",
    ),
];

/// The lines of [`FLAGS`] for the help.
pub(super) fn help() -> String {
    let line = |(flags, instead): &(&[&str], &str)| format!("  {}: {instead}", flags.join(", "));
    let lines: Vec<String> = FLAGS.iter().map(line).collect();
    format!(
        "Flags of ctr-remote and nerdctl that are not here:\n{}",
        lines.join("\n")
    )
}

/// What to use instead of the flag that this error is about, if another tool has it.
pub fn instead(error: &clap::Error) -> Option<String> {
    if error.kind() != ErrorKind::UnknownArgument {
        return None;
    }
    let Some(ContextValue::String(argument)) = error.get(ContextKind::InvalidArg) else {
        return None;
    };
    let name = argument.split('=').next().unwrap_or_default();
    let (_, instead) = FLAGS.iter().find(|(flags, _)| flags.contains(&name))?;
    Some(format!(
        "{name} of ctr-remote and nerdctl is not a flag of peel: {instead}"
    ))
}

#[cfg(test)]
mod tests {
    use clap::{CommandFactory, Parser};

    use super::*;
    use crate::cli::Cli;

    #[test]
    fn every_flag_of_the_others_is_here_or_answered() {
        // Of stargz-snapshotter at 7cf47cba (cmd/ctr-remote/commands) and nerdctl at 8da50408 (image_convert.go).
        let convert = "--estargz --estargz-record-in --estargz-compression-level --estargz-chunk-size --estargz-min-chunk-size \
            --estargz-parallelism --estargz-external-toc --estargz-keep-diff-id --estargz-gzip-helper --zstdchunked \
            --zstdchunked-record-in --zstdchunked-compression-level --zstdchunked-chunk-size --uncompress --oci --platform \
            --all-platforms --zstd --zstd-compression-level --nydus --nydus-builder-path --nydus-work-dir \
            --nydus-prefetch-patterns --nydus-compressor --overlaybd --overlaybd-fs-type --overlaybd-dbstr --overlaybd-vsize \
            --soci --soci-min-layer-size --soci-span-size --erofs --erofs-compressors --erofs-mkfs-options --format";
        let optimize = "--reuse --platform --all-platforms --wait-on-signal --wait-on-line --no-optimize --record-out \
            --prefetch-list --oci --estargz-compression-level --estargz-chunk-size --estargz-min-chunk-size \
            --estargz-parallelism --estargz-external-toc --estargz-gzip-helper --zstdchunked --zstdchunked-compression-level \
            --terminal --period --user --cwd --args --entrypoint --env --env-file --mount --dns-nameservers \
            --dns-search-domains --dns-options --add-hosts --cni --cni-plugin-conf-dir --cni-plugin-dir --gpus --net-host";
        for (name, flags) in [("convert", convert), ("optimize", optimize)] {
            let cli = Cli::command();
            let command = cli.find_subcommand(name).unwrap();
            for flag in flags.split_whitespace() {
                let known = command
                    .get_arguments()
                    .any(|argument| argument.get_long() == flag.strip_prefix("--"));
                let answer = Cli::try_parse_from(["peel", name, flag, "a", "b"])
                    .err()
                    .and_then(|error| instead(&error));
                assert_ne!(known, answer.is_some(), "{name} {flag}: {answer:?}");
            }
        }
    }

    #[test]
    fn answers_name_the_flag_and_what_to_use() {
        for (line, expected) in [
            (
                "convert --estargz-gzip-helper=pigz a b",
                "--estargz-gzip-helper of ctr-remote and nerdctl",
            ),
            ("convert -GH pigz a b", "leave it out"),
            ("optimize --gpus all a b", "--record-in"),
        ] {
            let words = std::iter::once("peel").chain(line.split(' '));
            let error = Cli::try_parse_from(words).unwrap_err();
            let answer = instead(&error).unwrap();
            assert!(answer.contains(expected), "{line}: {answer}");
        }
        let error = Cli::try_parse_from(["peel", "convert", "--nonsense", "a", "b"]).unwrap_err();
        assert_eq!(instead(&error), None);
    }
}
