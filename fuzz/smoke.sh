#!/bin/sh
# Builds all fuzz targets and runs each over its seeds and for some seconds more: fuzz/smoke.sh [SECONDS [TARGET...]]
# Needs no nightly compiler and no cargo-fuzz. What fails is written to fuzz/artifacts/TARGET and ends the script.
set -eu
cd "$(dirname "$0")"
. ../.ci/lib.sh

seconds=${1:-5}
[ $# -eq 0 ] || shift
# libFuzzer is C++.
need_packages g++
need_cargo
host=$(rustc -vV | sed -n 's/^host: //p')
target=${FUZZ_TARGET_DIR:-$PWD/target}

# The flags of cargo-fuzz without its sanitizers, which only a nightly compiler has: almost all of this is safe Rust. With
# --target they reach neither build scripts nor procedural macros.
RUSTFLAGS="--cfg fuzzing -Cpasses=sancov-module -Cllvm-args=-sanitizer-coverage-level=4 \
-Cllvm-args=-sanitizer-coverage-inline-8bit-counters -Cllvm-args=-sanitizer-coverage-pc-table \
-Cllvm-args=-sanitizer-coverage-trace-compares -Ccodegen-units=1"
export RUSTFLAGS
run cargo build --release --locked --target "$host" --target-dir "$target"

if [ $# -eq 0 ]; then
	for source in fuzz_targets/*.rs; do
		set -- "$@" "$(basename "$source" .rs)"
	done
fi
# Some targets write files; a disk would only slow them down.
[ ! -w /dev/shm ] || export TMPDIR=/dev/shm
for name in "$@"; do
	mkdir -p "artifacts/$name" "target/corpus/$name"
	log="target/corpus/$name.log"
	# New inputs go to the first directory, seeds stay as they are.
	if ! "$target/$host/release/$name" -max_total_time="$seconds" -timeout=20 -rss_limit_mb=2048 -max_len=65536 \
		-artifact_prefix="artifacts/$name/" "target/corpus/$name" "seeds/$name" >"$log" 2>&1; then
		tail -n 60 "$log"
		echo "$name: a failure; the input is in fuzz/artifacts/$name" >&2
		exit 1
	fi
	echo "$name: $(sed -n 's/^Done //p' "$log")"
done
echo "No fuzz target found anything in $seconds s each."
