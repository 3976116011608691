#!/bin/bash
# Starts a pod: sshd when RunPod (or whoever starts the container) gives a public key, then the command that follows.
set -euo pipefail

if [ -n "${PUBLIC_KEY:-}" ]; then
    umask 077
    mkdir -p "$HOME/.ssh"
    printf '%s\n' "$PUBLIC_KEY" > "$HOME/.ssh/authorized_keys"
    umask 022
    # Made here, so that no two pods share one and none is in the image.
    ssh-keygen -A > /dev/null
    mkdir -p "${SSHD_FOLDER:-/run/sshd}"
    # sshd wants to be called by its full path. Whatever its configuration file says: keys only.
    "${SSHD:-/usr/sbin/sshd}" \
        -o "AuthorizedKeysFile=$HOME/.ssh/authorized_keys" \
        -o AuthenticationMethods=publickey \
        -o PasswordAuthentication=no \
        -o KbdInteractiveAuthentication=no \
        -o PermitRootLogin=prohibit-password \
        -o X11Forwarding=no \
        || echo "note: sshd could not be started; the pod works without it" >&2
fi

exec "$@"
