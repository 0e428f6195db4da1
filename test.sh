#!/bin/sh
# Runs every check: formatting, lints, licences, then unit, property and end-to-end tests. Needs root for mounts.
set -eu
cd "$(dirname "$0")"
. ./.ci/lib.sh

# A C compiler for the C parts of the crates; the rest is what the end-to-end tests compare peel with.
need_packages gcc libc6-dev curl tar python3 ca-certificates openssl procps \
	erofs-utils e2fsprogs xfsprogs busybox-static docker-registry nginx apache2-utils skopeo umoci containerd runc \
	podman mmdebstrap debian-archive-keyring
need_cargo

run cargo fmt --all --check
run cargo clippy --workspace --all-targets --locked -- -D warnings
if command -v cargo-deny >/dev/null; then
	run cargo deny --locked check bans licenses sources
else
	echo "cargo-deny is not installed; CONTRIBUTING.md says how to run this check."
fi
run fuzz/smoke.sh
run cargo build --workspace --all-targets --locked
# The tests last: their summary is the end of the output.
as_root_run cargo test --workspace --locked
