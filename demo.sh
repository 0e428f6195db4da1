#!/bin/sh
# Shows the main job on this machine, offline but for Debian packages: builds peel and runs `peel demo`.
# Arguments go to `peel demo`, for example: ./demo.sh --json, ./demo.sh --rtt 50 --bandwidth 100.
set -eu
cd "$(dirname "$0")"
. ./.ci/lib.sh

# A C compiler for the C parts of the crates; the demo calls curl for comparison, tar to unpack, python3 as a fallback.
need_packages gcc libc6-dev curl tar python3 ca-certificates
need_cargo
cargo build --release --locked --package peel
as_root "$(target_dir)/release/peel" demo "$@"
