#!/bin/sh
# Makes the tree of Debian 13 programs that tests/tests/interop*.rs hold peel against (Podman 5, containerd 1.7,
# ctr-remote): .ci/trixie.sh [DIR], as root; DIR is /var/cache/peel/trixie if not given. Prints DIR.
#
# Called by tests/src/namespace.rs. Packages come from the mirror that this machine's own apt uses. The tree is made
# aside and renamed, so that DIR is whole or absent; it is made again when this script changes. Whoever uses it holds a
# shared lock on DIR.lock.
set -eu
dir=${1:-/var/cache/peel/trixie}

# base-files has the links of the merged /usr; nothing is configured, so no script of a package runs.
packages=base-files,podman,crun,skopeo,containerd,stargz-snapshotter

stamp=$(sha256sum <"$0")
is_current() {
	[ "$(cat "$dir/stamp" 2>/dev/null)" = "$stamp" ]
}

if ! is_current; then
	mkdir -p "$(dirname "$dir")"
	exec 9>>"$dir.lock"
	# Another test may be making it; ten minutes are many times what it takes.
	flock --timeout 600 9 || {
		echo "Another process has held $dir.lock for ten minutes." >&2
		exit 1
	}
fi
if ! is_current; then
	targets() {
		# shellcheck disable=SC2016
		apt-get indextargets --format '$(CODENAME) $(REPO_URI)' \
			'Created-By: Packages' 'Origin: Debian' 'Label: Debian' 'Component: main'
	}
	# Names with a dash are updates and backports of a release, not the release.
	mirror() {
		targets | sed -n '/^[^ -]* /{s/^[^ ]* //;p;q}'
	}
	uri=$(mirror)
	if [ -z "$uri" ]; then
		apt-get update --quiet >&2
		uri=$(mirror)
	fi
	if [ -z "$uri" ]; then
		echo "apt knows no Debian mirror (no release with Origin and Label Debian in its sources)." >&2
		exit 1
	fi
	echo "Making a tree of Debian 13 programs in $dir." >&2
	new=$dir.new
	rm -rf --one-file-system "$new" "$dir"
	mkdir "$new"
	mmdebstrap --quiet --variant=extract --include="$packages" --skip=check/empty \
		--aptopt='Acquire::Check-Valid-Until "false"' --aptopt='Acquire::Retries "3"' \
		--aptopt='APT::Install-Recommends "false"' \
		--dpkgopt='path-exclude=/usr/share/doc/*' --dpkgopt='path-exclude=/usr/share/man/*' \
		trixie "$new/root" "$uri" >&2
	echo "$stamp" >"$new/stamp"
	mv -T "$new" "$dir"
fi
echo "$dir"
