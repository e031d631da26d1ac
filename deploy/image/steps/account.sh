#!/usr/bin/env bash
# The account that the server runs as, and the two folders that it writes. Usage: account.sh
# A fixed number, so that volumes keep their owner. Group 0 may write too: some clusters choose user ids themselves.
set -euo pipefail

id=65532
groupadd --gid "$id" expertsteer
useradd --no-log-init --uid "$id" --gid "$id" --home-dir /var/cache/expertsteer --no-create-home \
  --shell /usr/sbin/nologin expertsteer
install --directory --owner "$id" --group 0 --mode 0775 /var/cache/expertsteer /var/lib/expertsteer
