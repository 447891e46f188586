#!/bin/bash
# The main job from start to end: a deployment, an answer, a kill, the same answer from the shadow, the timeline.
set -euo pipefail
run=demo
# A name that nobody could have made first; `make demo-down` removes it.
model=$(mktemp -d "${TMPDIR:-/tmp}/gms-launch-demo-model.XXXXXXXX")
say() { printf '\n\033[1m== %s\033[0m\n' "$*"; }
ask() {
  python3 - "$url" <<'PY'
import json, sys, urllib.request
body = {"model": "demo", "prompt": "Tell me of the sea", "max_tokens": 12, "temperature": 0}
request = urllib.request.Request(
    sys.argv[1] + "/v1/completions", json.dumps(body).encode(), {"content-type": "application/json"})
print(json.load(urllib.request.urlopen(request, timeout=30))["choices"][0]["text"].strip())
PY
}

say "a small model"
gms-launch demo-model "$model"

# A demo that is still running is ended first.
if gms-launch status --run $run >/dev/null 2>&1; then gms-launch down --run $run; fi

say "gms-launch up: GMS, etcd, NATS, the frontend, a primary and a shadow"
gms-launch up -d --run $run --engine reference --model "$model" --served-model-name demo
url=$(gms-launch status --run $run --json | python3 -c 'import json, sys; print(json.load(sys.stdin)["frontend_url"])')

say "an answer from the primary"
before=$(ask); echo "$before"

say "gms-launch kill-primary"
gms-launch kill-primary --run $run

say "the same question to the shadow"
after=$(ask); echo "$after"
[ "$before" = "$after" ] || { echo "the answers differ" >&2; exit 1; }

say "redundancy is back"
for _ in $(seq 300); do
  state=$(gms-launch status --run $run --json | python3 -c 'import json, sys; print(json.load(sys.stdin)["redundancy"])')
  [ "$state" = full ] && break
  sleep 0.2
done
gms-launch timeline --run $run
gms-launch status --run $run
[ "$state" = full ] || { echo "redundancy is $state, not full" >&2; exit 1; }
echo
echo "The deployment is running: $url. End it with: make demo-down"
