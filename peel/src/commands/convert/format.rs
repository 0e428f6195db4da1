//! From the flags of `convert` and `optimize` to a format: which of them go together, and what to do about those that do not.

use anyhow::bail;
use peel_writer::{DEFAULT_GZIP_LEVEL, DEFAULT_ZSTD_LEVEL, Dialect, Format};

use crate::cli::{ConvertArgs, DialectArg, LazyArgs};

/// Level of eStargz layers: upstream's default.
const ESTARGZ_LEVEL: i32 = 9;

/// The formats, by the flags that choose them.
const FORMATS: [&str; 5] = ["--estargz", "--zstdchunked", "--gzip", "--zstd", "--uncompress"];

/// A flag, and whether it was given.
type Flag = (&'static str, bool);

/// The format that `peel optimize` writes.
pub(in crate::commands) fn lazy(lazy: &LazyArgs, reuse: bool) -> anyhow::Result<Format> {
    let chosen = chosen(&lazy_flags(lazy))?;
    lazy_format(lazy, chosen, false, reuse)
}

/// The format that `peel convert` writes.
pub(super) fn any(args: &ConvertArgs) -> anyhow::Result<Format> {
    let mut flags = lazy_flags(&args.lazy);
    flags.extend([
        ("--estargz-record-in", args.estargz_record_in.is_some()),
        ("--estargz-keep-diff-id", args.estargz_keep_diff_id),
        ("--zstdchunked-record-in", args.zstdchunked_record_in.is_some()),
        ("--gzip", args.gzip),
        ("--gzip-compression-level", args.gzip_compression_level.is_some()),
        ("--zstd", args.zstd),
        ("--zstd-compression-level", args.zstd_compression_level.is_some()),
        ("--uncompress", args.uncompress),
    ]);
    let chosen = chosen(&flags)?;
    if args.estargz_keep_diff_id && args.estargz_record_in.is_some() {
        bail!(
            "--estargz-keep-diff-id keeps the order of the files, --estargz-record-in changes it: leave one of them out"
        );
    }
    match chosen {
        "--gzip" => Ok(Format::Gzip {
            level: args.gzip_compression_level.unwrap_or(DEFAULT_GZIP_LEVEL),
        }),
        "--zstd" => Ok(Format::Zstd {
            level: args.zstd_compression_level.unwrap_or(DEFAULT_ZSTD_LEVEL),
        }),
        "--uncompress" => Ok(Format::Plain),
        _ => lazy_format(&args.lazy, chosen, args.estargz_keep_diff_id, args.reuse.reuse),
    }
}

/// The flags of both commands that choose a format or that only one format has.
fn lazy_flags(lazy: &LazyArgs) -> Vec<Flag> {
    let level = lazy.zstdchunked_compression_level.is_some();
    vec![
        ("--estargz", lazy.estargz),
        (
            "--estargz-compression-level",
            lazy.estargz_compression_level.is_some(),
        ),
        ("--estargz-chunk-size", lazy.estargz_chunk_size.is_some()),
        ("--estargz-min-chunk-size", lazy.estargz_min_chunk_size.is_some()),
        ("--estargz-external-toc", lazy.estargz_external_toc),
        ("--zstdchunked", lazy.zstdchunked),
        ("--zstdchunked-compression-level", level),
        ("--zstdchunked-chunk-size", lazy.zstdchunked_chunk_size.is_some()),
        ("--dialect", lazy.dialect.is_some()),
    ]
}

/// The format that these flags choose. Flags of a format that is not written are mistakes, not wishes.
fn chosen(flags: &[Flag]) -> anyhow::Result<&'static str> {
    let given: Vec<&'static str> = flags.iter().filter(|flag| flag.1).map(|flag| flag.0).collect();
    let formats: Vec<&'static str> = FORMATS
        .into_iter()
        .filter(|format| given.contains(format))
        .collect();
    let chosen = match formats.as_slice() {
        [] => "--estargz",
        [one] => one,
        _ => bail!(
            "{}: a layer has one format; leave all of them out but one",
            formats.join(" and ")
        ),
    };
    for flag in given {
        let format = format_of(flag);
        if format != chosen {
            bail!("{flag} belongs to {format}, but {chosen} is written: leave it out, or write {format}");
        }
    }
    Ok(chosen)
}

/// The format that a flag belongs to: the one that its name begins with.
fn format_of(flag: &'static str) -> &'static str {
    let begins = |format: &&str| {
        let rest = flag.strip_prefix(*format);
        rest.is_some_and(|rest| rest.is_empty() || rest.starts_with('-'))
    };
    // Only the dialects of zstd:chunked have a flag without it.
    FORMATS.into_iter().find(begins).unwrap_or("--zstdchunked")
}

fn lazy_format(lazy: &LazyArgs, chosen: &str, keep_diff_id: bool, reuse: bool) -> anyhow::Result<Format> {
    if chosen == "--zstdchunked" {
        let dialect = match lazy.dialect {
            None | Some(DialectArg::Podman) => Dialect::Podman,
            Some(DialectArg::Stargz) => Dialect::Stargz,
        };
        let chunk_size = lazy.zstdchunked_chunk_size.unwrap_or(0);
        if dialect == Dialect::Podman && chunk_size > 0 {
            bail!(
                "--zstdchunked-chunk-size: Podman's dialect cuts files by their content, so that images share chunks; leave it out, \
                 or add --dialect stargz"
            );
        }
        let level = lazy.zstdchunked_compression_level.unwrap_or(DEFAULT_ZSTD_LEVEL);
        return Ok(Format::ZstdChunked {
            dialect,
            chunk_size,
            level,
        });
    }
    let external_toc = lazy.estargz_external_toc;
    if keep_diff_id && !external_toc {
        bail!(
            "--estargz-keep-diff-id: a table of contents inside a layer changes its DiffID; add --estargz-external-toc"
        );
    }
    if external_toc && reuse {
        bail!(
            "--reuse keeps layers with their tables of contents, --estargz-external-toc takes those out: leave one of them out"
        );
    }
    Ok(Format::Estargz {
        chunk_size: lazy.estargz_chunk_size.unwrap_or(0),
        min_chunk_size: lazy.estargz_min_chunk_size.unwrap_or(0),
        level: lazy.estargz_compression_level.unwrap_or(ESTARGZ_LEVEL),
        external_toc,
        keep_diff_id,
    })
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;
    use crate::cli::{Cli, Command};

    fn convert(flags: &str) -> anyhow::Result<Format> {
        let words = format!("peel convert {flags} a b");
        let cli = Cli::try_parse_from(words.split_whitespace())?;
        let Command::Convert(args) = cli.command else {
            bail!("not convert")
        };
        any(&args)
    }

    fn optimize(flags: &str) -> anyhow::Result<Format> {
        let words = format!("peel optimize {flags} a b");
        let cli = Cli::try_parse_from(words.split_whitespace())?;
        let Command::Optimize(args) = cli.command else {
            bail!("not optimize")
        };
        lazy(&args.lazy, args.reuse.reuse)
    }

    #[test]
    fn formats_by_their_flags() {
        let estargz = |chunk_size, min_chunk_size, level, external_toc, keep_diff_id| Format::Estargz {
            chunk_size,
            min_chunk_size,
            level,
            external_toc,
            keep_diff_id,
        };
        let chunked = |dialect, chunk_size, level| Format::ZstdChunked {
            dialect,
            chunk_size,
            level,
        };
        for (flags, expected) in [
            ("", estargz(0, 0, 9, false, false)),
            (
                "--estargz --oci --estargz-compression-level 3",
                estargz(0, 0, 3, false, false),
            ),
            (
                "--estargz-chunk-size 65536 --estargz-min-chunk-size 50000 --estargz-parallelism 1",
                estargz(65536, 50000, 9, false, false),
            ),
            (
                "--estargz-external-toc --estargz-keep-diff-id",
                estargz(0, 0, 9, true, true),
            ),
            ("--estargz-record-in r --reuse", estargz(0, 0, 9, false, false)),
            ("--zstdchunked", chunked(Dialect::Podman, 0, 3)),
            ("--zstdchunked --dialect podman", chunked(Dialect::Podman, 0, 3)),
            (
                "--zstdchunked --dialect stargz --zstdchunked-chunk-size 9 --zstdchunked-compression-level 19",
                chunked(Dialect::Stargz, 9, 19),
            ),
            (
                "--zstdchunked --zstdchunked-record-in r",
                chunked(Dialect::Podman, 0, 3),
            ),
            ("--zstd", Format::Zstd { level: 3 }),
            ("--zstd --zstd-compression-level 9", Format::Zstd { level: 9 }),
            ("--gzip --estargz-parallelism 3", Format::Gzip { level: 7 }),
            ("--gzip --gzip-compression-level 1", Format::Gzip { level: 1 }),
            ("--uncompress", Format::Plain),
        ] {
            assert_eq!(convert(flags).unwrap(), expected, "{flags}");
        }
        for (flags, expected) in [
            ("", estargz(0, 0, 9, false, false)),
            ("--zstdchunked --dialect stargz", chunked(Dialect::Stargz, 0, 3)),
            (
                "--estargz-external-toc --no-optimize",
                estargz(0, 0, 9, true, false),
            ),
        ] {
            assert_eq!(optimize(flags).unwrap(), expected, "{flags}");
        }
    }

    #[test]
    fn conflicts_say_what_to_do() {
        for (flags, expected) in [
            ("--estargz --zstdchunked", "leave all of them out but one"),
            ("--gzip --uncompress", "--gzip and --uncompress"),
            ("--estargz-keep-diff-id", "add --estargz-external-toc"),
            (
                "--estargz-keep-diff-id --estargz-external-toc --estargz-record-in r",
                "leave one of them out",
            ),
            ("--estargz-external-toc --reuse", "leave one of them out"),
            ("--zstdchunked --zstdchunked-chunk-size 9", "--dialect stargz"),
            ("--zstdchunked-chunk-size 9", "belongs to --zstdchunked"),
            ("--dialect stargz", "belongs to --zstdchunked"),
            ("--zstdchunked --estargz-chunk-size 9", "belongs to --estargz"),
            ("--gzip --estargz-external-toc", "belongs to --estargz"),
            ("--zstdchunked-record-in r", "belongs to --zstdchunked"),
            ("--zstdchunked --estargz-record-in r", "belongs to --estargz"),
            ("--uncompress --gzip-compression-level 3", "belongs to --gzip"),
            ("--estargz-compression-level 13", "13 is not in 1..=12"),
            (
                "--zstdchunked --zstdchunked-compression-level 0",
                "0 is not in 1..=22",
            ),
            ("--estargz-chunk-size 99999999999", "is not in 0..="),
            ("--platform a/b --all-platforms", "cannot be used with"),
        ] {
            let error = convert(flags).expect_err(flags).to_string();
            assert!(error.contains(expected), "{flags}: {error}");
        }
        for (flags, expected) in [
            ("--zstdchunked --zstdchunked-chunk-size 9", "--dialect stargz"),
            ("--no-optimize --prefetch-list l", "cannot be used with"),
            ("--no-optimize --record-in l", "cannot be used with"),
            ("--estargz-external-toc --reuse", "leave one of them out"),
        ] {
            let error = optimize(flags).expect_err(flags).to_string();
            assert!(error.contains(expected), "{flags}: {error}");
        }
    }
}
