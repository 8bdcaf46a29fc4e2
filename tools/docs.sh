#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Builds the pages of the public C++ headers into build/docs/html. Fails on every warning of Doxygen but one: a field of
# a struct needs no comment where its name, its type and the struct's comment say it all.
#   --if-present  says so and ends well where there is no Doxygen
set -euo pipefail
cd "$(dirname "$0")/.."
if ! command -v doxygen >/dev/null; then
  [[ "${1:-}" == --if-present ]] && echo "skipped: the C++ pages, no doxygen here" && exit 0
  echo "xgdn: doxygen is missing (Debian, Ubuntu: apt-get install doxygen)" >&2
  exit 1
fi
rm -rf build/docs
mkdir -p build
warnings="$(doxygen docs/Doxyfile 2>&1 | grep -v '(variable) of struct .* is not documented\.$' || true)"
[[ -f build/docs/html/index.html ]] || { echo "$warnings" >&2; exit 1; }
[[ -z "$warnings" ]] || { echo "$warnings" >&2; exit 1; }
echo "build/docs/html/index.html"
