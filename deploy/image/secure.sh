#!/bin/sh
# Makes what a secured server needs and does not have yet: an authority, the server's certificate signed by it, an API
# key, and Grafana's password. Safe to run at every start: what is there stays, but a certificate with under 30 days
# left, for other names than CUTAWAY_NAMES, or of another authority, is made anew; the server reads it while it runs.
#
#   /authority  the authority's key: for this program alone
#   /secrets    for the server: tls.crt, tls.key, api-keys.toml
#   /client     for clients: ca.crt, api-key
#   /grafana    for Grafana: password
set -eu
umask 077

CURVE='-newkey ec -pkeyopt ec_paramgen_curve:P-256 -noenc'
DAYS=397
RENEW_SECONDS=2592000
KEY_NAME=operator
SCOPES=${CUTAWAY_KEY_SCOPES:-generate,introspect,observe}

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

scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
names=$(alternatives "${CUTAWAY_NAMES:-}")

if [ ! -s /authority/ca.key ] || [ ! -s /authority/ca.crt ]; then
  # shellcheck disable=SC2086  # CURVE is several words
  openssl req -x509 $CURVE -days 3650 -subj '/CN=Cutaway authority' -keyout "$scratch/ca.key" -out "$scratch/ca.crt" \
    -addext basicConstraints=critical,CA:TRUE,pathlen:0 -addext keyUsage=critical,keyCertSign,cRLSign 2>"$scratch/log" \
    || { cat "$scratch/log" >&2; exit 1; }
  cp "$scratch/ca.key" /authority/ca.key
  cp "$scratch/ca.crt" /authority/ca.crt
  echo 'made an authority'
fi
install -m 0644 /authority/ca.crt /client/ca.crt

if ! openssl x509 -in /secrets/tls.crt -noout -checkend $RENEW_SECONDS >/dev/null 2>&1 \
  || ! openssl verify -CAfile /authority/ca.crt /secrets/tls.crt >/dev/null 2>&1 \
  || [ "$(cat /authority/names 2>/dev/null)" != "$names" ]; then
  printf 'subjectAltName=%s\nbasicConstraints=critical,CA:FALSE\nextendedKeyUsage=serverAuth\n' "$names" >"$scratch/ext"
  # shellcheck disable=SC2086
  openssl req $CURVE -subj /CN=cutaway -keyout "$scratch/tls.key" -out "$scratch/csr" 2>"$scratch/log" \
    && openssl x509 -req -in "$scratch/csr" -CA /authority/ca.crt -CAkey /authority/ca.key -days $DAYS \
      -extfile "$scratch/ext" -out "$scratch/tls.crt" 2>>"$scratch/log" \
    || { cat "$scratch/log" >&2; exit 1; }
  for file in tls.key tls.crt; do # whole or not at all; the server keeps its pair until both are there
    cp "$scratch/$file" "/secrets/.$file"
    mv "/secrets/.$file" "/secrets/$file"
  done
  printf %s "$names" >/authority/names
  echo "made a certificate for $names"
fi

if [ ! -s /secrets/api-keys.toml ]; then
  cutaway-server keys new "$KEY_NAME" --scopes "$SCOPES" --file /secrets/api-keys.toml >"$scratch/api-key"
  tr -d '\n' <"$scratch/api-key" >/client/api-key
  echo "made an API key, '$KEY_NAME', with scopes $SCOPES"
fi

if [ ! -s /grafana/password ]; then
  openssl rand -hex 24 >/grafana/password
  chmod 0644 /grafana/password # Grafana runs as a user of its own; nothing else mounts this
  echo "made Grafana's password"
fi
