#!/usr/bin/env bash
# An authority, and certificates signed by it, in the current folder; cert-manager or your company's authority do as well.
set -euo pipefail
openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 3650 -subj /CN=ormo-ca -keyout ca.key -out ca.pem
certificate() {
    openssl req -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -subj "/CN=$1" -addext "subjectAltName=DNS:$1" \
        -keyout "$1.key" -out "$1.csr"
    openssl x509 -req -in "$1.csr" -CA ca.pem -CAkey ca.key -days 90 -copy_extensions copy -out "$1.pem"
}
certificate localhost  # what workers call the server
certificate gpu-1
certificate operator
