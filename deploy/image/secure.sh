#!/bin/sh
# Makes what a secured server needs and does not have yet: an authority, the server's certificate signed by it, an API
# key, and Grafana's password. Safe to run at every start: what is there stays, but a certificate of ours is made anew
# with under 30 days left, for other names than CUTAWAY_NAMES, or if the authority is another; the server rereads it.
#
#   /authority  the authority's key: for this program alone
#   /secrets    for the server: tls.crt, tls.key, api-keys.toml
#   /client     for clients: ca.crt, api-key
#   /grafana    for Grafana: password
#
# With CUTAWAY_SECRETS=DIRECTORY these four are made, and looked for, in that directory.
set -euf # no globs: names may have stars
umask 077

CURVE='-newkey ec -pkeyopt ec_paramgen_curve:P-256 -noenc'
DAYS=397
RENEW_SECONDS=2592000
ISSUER='Cutaway authority'
KEY_NAME=operator
SCOPES=${CUTAWAY_KEY_SCOPES:-generate,introspect,observe}
ROOT=${CUTAWAY_SECRETS:-}
AUTHORITY=$ROOT/authority SECRETS=$ROOT/secrets CLIENT=$ROOT/client GRAFANA=$ROOT/grafana

# $1: names and addresses with commas between. As subjectAltName has them: IP:127.0.0.1,DNS:localhost
alternatives() {
  printf 'DNS:localhost,DNS:server,IP:127.0.0.1,IP:::1'
  for name in $(printf %s "$1" | tr , ' '); do
    case $name in
      *[!0-9A-Za-z.:_*-]*) echo "CUTAWAY_NAMES: '$name' is no host name and no address" >&2; return 1 ;;
      *:*) printf ',IP:%s' "$name" ;;
      *[!0-9.]*) printf ',DNS:%s' "$name" ;;
      *) printf ',IP:%s' "$name" ;;
    esac
  done
}

# Whether a new certificate is wanted. One that somebody else has signed is none of our business.
outdated() {
  [ -s "$SECRETS/tls.crt" ] || return 0
  openssl x509 -in "$SECRETS/tls.crt" -noout -issuer | grep -q "$ISSUER" || return 1
  openssl x509 -in "$SECRETS/tls.crt" -noout -checkend "$RENEW_SECONDS" >/dev/null || return 0
  openssl verify -CAfile "$AUTHORITY/ca.crt" "$SECRETS/tls.crt" >/dev/null 2>&1 || return 0
  [ "$(cat "$AUTHORITY/names" 2>/dev/null)" != "$names" ]
}

mkdir -p "$AUTHORITY" "$SECRETS" "$CLIENT" "$GRAFANA"
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
names=$(alternatives "${CUTAWAY_NAMES:-}")

if [ ! -s "$AUTHORITY/ca.key" ] || [ ! -s "$AUTHORITY/ca.crt" ]; then
  # shellcheck disable=SC2086  # CURVE is several words
  openssl req -x509 $CURVE -days 3650 -subj "/CN=$ISSUER" -keyout "$scratch/ca.key" -out "$scratch/ca.crt" \
    -addext basicConstraints=critical,CA:TRUE,pathlen:0 -addext keyUsage=critical,keyCertSign,cRLSign 2>"$scratch/log" \
    || { cat "$scratch/log" >&2; exit 1; }
  cp "$scratch/ca.key" "$AUTHORITY/ca.key"
  cp "$scratch/ca.crt" "$AUTHORITY/ca.crt"
  echo 'made an authority'
fi
install -m 0644 "$AUTHORITY/ca.crt" "$CLIENT/ca.crt"

if outdated; then
  printf 'subjectAltName=%s\nbasicConstraints=critical,CA:FALSE\nextendedKeyUsage=serverAuth\n' "$names" >"$scratch/ext"
  # shellcheck disable=SC2086
  openssl req $CURVE -subj /CN=cutaway -keyout "$scratch/tls.key" -out "$scratch/csr" 2>"$scratch/log" \
    && openssl x509 -req -in "$scratch/csr" -CA "$AUTHORITY/ca.crt" -CAkey "$AUTHORITY/ca.key" -days $DAYS \
      -extfile "$scratch/ext" -out "$scratch/tls.crt" 2>>"$scratch/log" \
    || { cat "$scratch/log" >&2; exit 1; }
  for file in tls.key tls.crt; do # whole or not at all; the server keeps its pair until both are there
    cp "$scratch/$file" "$SECRETS/.$file"
    mv "$SECRETS/.$file" "$SECRETS/$file"
  done
  printf %s "$names" >"$AUTHORITY/names"
  echo "made a certificate for $names"
fi

if [ ! -s "$SECRETS/api-keys.toml" ]; then
  cutaway-server keys new "$KEY_NAME" --scopes "$SCOPES" --file "$SECRETS/api-keys.toml" >"$scratch/api-key"
  tr -d '\n' <"$scratch/api-key" >"$CLIENT/api-key"
  echo "made an API key, '$KEY_NAME', with scopes $SCOPES"
fi

if [ ! -s "$GRAFANA/password" ]; then
  openssl rand -hex 24 >"$GRAFANA/password"
  chmod 0644 "$GRAFANA/password" # Grafana runs as a user of its own; nothing else mounts this
  echo "made Grafana's password"
fi
