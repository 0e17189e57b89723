#!/bin/bash
# Looks at the image that is being made, or at one in the folder that is named, and fails with
# everything that should not be in it, or should be and is not. It changes nothing.
#
#   validate.sh [ROOT]
set -euo pipefail

root=${1:-/}
root=${root%/}
problems=()

problem() {
    problems+=("$*")
}

# none WHAT PATH...: no such file is there.
none() {
    local what=$1 path
    shift
    for path in "$@"; do
        if [ -e "$path" ] || [ -L "$path" ]; then
            problem "$what: ${path#"$root"}"
        fi
    done
}

inside() {
    if [ -n "$root" ]; then
        chroot "$root" "$@"
    else
        "$@"
    fi
}

shopt -s nullglob dotglob

none "a host key, the same on every instance" "$root"/etc/ssh/ssh_host_*
none "cloud-init's state: it would take every instance for this one" "$root"/var/lib/cloud/*
logs=$(find "$root/var/log" -xdev -type f -size +0)
while IFS= read -r file; do
    [ -z "$file" ] || problem "a log of this machine: ${file#"$root"}"
done <<<"$logs"

if [ ! -f "$root/etc/machine-id" ]; then
    problem "/etc/machine-id is not there: it must be empty, or systemd takes a first boot for one" \
        "without a machine"
elif [ -s "$root/etc/machine-id" ]; then
    problem "/etc/machine-id is not empty, so all instances would have the same"
fi
if [ -f "$root/var/lib/dbus/machine-id" ] && [ ! -L "$root/var/lib/dbus/machine-id" ]; then
    problem "/var/lib/dbus/machine-id is a file, so all instances would have the same"
fi
none "a seed that all instances would share" "$root/var/lib/systemd/random-seed" \
    "$root/var/lib/systemd/credential.secret"

for home in "$root"/root "$root"/home/*; do
    none "a credential or a history" "$home"/.ssh/authorized_keys "$home"/.ssh/id_* \
        "$home"/.aws "$home"/.docker "$home"/.netrc "$home"/.*_history
done
# Docker's own identity, and what it was given to log in with.
none "a credential" "$root/etc/docker/key.json" "$root"/etc/registry-agent/*password* \
    "$root"/etc/registry-agent/*.key "$root"/var/lib/docker/swarm
none "images of this machine" "$root"/var/lib/registry-agent/docker
while IFS=: read -r user hash _; do
    case $hash in
        '' | '!'* | '*'*) ;;
        *) problem "a password: $user's, in /etc/shadow" ;;
    esac
done <"$root/etc/shadow"

for unit in registry-agent-setup.service docker.service; do
    state=$(systemctl --root="${root:-/}" is-enabled "$unit" 2>/dev/null) || true
    [ "$state" = enabled ] || problem "$unit is ${state:-not there}; must be enabled"
done
for unit in registry-agent.socket registry-agent.service registry-agent-host.service; do
    [ -f "$root/usr/lib/systemd/system/$unit" ] || problem "$unit is not there"
done

# With the folders that its unit will give it.
if ! said=$(inside env STATE_DIRECTORY=/var/lib/registry-agent \
    RUNTIME_DIRECTORY=/run/registry-agent /usr/bin/registry-agent check 2>&1); then
    problem "registry-agent check: $said"
fi

if [ ${#problems[@]} -gt 0 ]; then
    printf 'validate.sh: %s\n' "${problems[@]}" >&2
    exit 1
fi
echo "validate.sh: nothing is wrong with this image"
