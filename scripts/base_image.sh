#!/usr/bin/env bash
# Pull the base image of deploy/Dockerfile. Where no registry can be reached, make a stand-in from Debian packages: the
# same Python on the same Debian release, under the same name. That needs root and debootstrap.
set -euo pipefail
cd "$(dirname "$0")/.."

image=$(sed -n 's/^FROM \(python:[^ ]*\).*/\1/p' deploy/Dockerfile | sort -u)
if docker image inspect "$image" >/dev/null 2>&1 || docker pull --quiet "$image" 2>/dev/null; then
    exit
fi
echo "$image cannot be pulled; making it from Debian packages (some minutes) ..."
case "$image" in  # the Debian release that has this Python
    python:3.11-slim) release=bookworm ;;
    python:3.13-slim) release=trixie ;;
    *) echo "error: no Debian release is known for $image; pull it from a registry" >&2; exit 1 ;;
esac
[ "$(id -u)" = 0 ] || { echo "error: debootstrap needs root" >&2; exit 1; }
command -v debootstrap >/dev/null || { echo "error: debootstrap is not installed: apt-get install debootstrap" >&2; exit 1; }

root=$(mktemp -d)
trap 'rm -rf "$root"' EXIT
chmod 755 "$root"
debootstrap --variant=minbase --include=ca-certificates,python3,python3-pip-whl "$release" "$root" >"$root/log" \
    || { tail -5 "$root/log" >&2; exit 1; }

# As in the official image: `python` and `pip` in /usr/local, where they may be changed; without documentation, caches and
# bytecode, which would make the image's size another one than with the official base.
ln -s /usr/bin/python3 "$root/usr/local/bin/python"
rm "$root"/usr/lib/python3*/EXTERNALLY-MANAGED
wheel=$(cd "$root" && echo usr/share/python-wheels/pip-*.whl)
chroot "$root" python3 -B "/$wheel/pip" install --quiet --no-index --no-compile --root-user-action=ignore "/$wheel"
rm -rf "$root"/log "$root"/usr/share/{doc,man,locale,info,python-wheels} "$root"/var/cache/apt/* "$root"/var/lib/apt/lists/* \
    "$root"/var/log/*
find "$root" -xdev -name __pycache__ -prune -exec rm -r {} +

tar -C "$root" --one-file-system -c . | docker import \
    --change 'ENV PATH=/usr/local/bin:/usr/local/sbin:/usr/sbin:/usr/bin:/sbin:/bin' --change 'CMD ["python"]' - "$image"
docker image ls "$image"
