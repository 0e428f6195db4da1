# Shared by demo.sh, test.sh and .ci/run: Debian packages, the Rust toolchain, root.

# Runs a command as root: directly, or through sudo.
as_root() {
	if [ "$(id -u)" = 0 ]; then
		"$@"
	else
		sudo "$@"
	fi
}

# The same, keeping the environment that cargo needs.
as_root_run() {
	if [ "$(id -u)" = 0 ]; then
		run "$@"
	else
		run sudo --preserve-env=PATH,HOME,CARGO_HOME,RUSTUP_HOME,CARGO_TARGET_DIR "$@"
	fi
}

# Shows a command and runs it.
run() {
	echo "+ $*"
	"$@"
}

# Installs the Debian packages that are missing, and says so.
need_packages() {
	missing=
	for package in "$@"; do
		# shellcheck disable=SC2016
		status=$(dpkg-query --show --showformat='${db:Status-Status}' "$package" 2>/dev/null || true)
		[ "$status" = installed ] || missing="$missing $package"
	done
	[ -n "$missing" ] || return 0
	echo "Installing Debian packages:$missing"
	as_root apt-get update --quiet
	# Services that come with the packages are of no use here and must not be started.
	policy=/usr/sbin/policy-rc.d
	made=
	if [ ! -e "$policy" ]; then
		printf '#!/bin/sh\nexit 101\n' | as_root tee "$policy" >/dev/null
		as_root chmod 755 "$policy"
		made=yes
	fi
	failed=
	# shellcheck disable=SC2086
	as_root env DEBIAN_FRONTEND=noninteractive apt-get install --quiet --yes --no-install-recommends $missing || failed=yes
	[ -z "$made" ] || as_root rm -f "$policy"
	if [ -n "$failed" ]; then
		echo "These packages cannot be installed:$missing" >&2
		exit 1
	fi
}

# Finds cargo where rustup puts it.
need_cargo() {
	if ! command -v cargo >/dev/null && [ -x "${CARGO_HOME:-$HOME/.cargo}/bin/cargo" ]; then
		PATH="${CARGO_HOME:-$HOME/.cargo}/bin:$PATH"
		export PATH
	fi
	if ! command -v cargo >/dev/null; then
		echo "No cargo: install a Rust toolchain (https://rustup.rs), at least the version in Cargo.toml." >&2
		exit 1
	fi
}

# Where cargo puts what it builds.
target_dir() {
	echo "${CARGO_TARGET_DIR:-$PWD/target}"
}
