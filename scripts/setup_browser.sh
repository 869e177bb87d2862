#!/usr/bin/env bash
# Installs Debian's Chromium and its driver, with which the tests open the page of a report. Where it cannot, it says
# why in a sentence, and those tests are skipped: it never fails.
set -uo pipefail

say() { printf 'setup_browser: %s, so the tests of the report in a browser are skipped.\n' "$*"; }
# What hangs without a network is downloading, and it may be stopped; installing what is downloaded may not.
quiet_apt() { DEBIAN_FRONTEND=noninteractive apt-get -y --no-install-recommends "$@" </dev/null >/dev/null 2>&1; }
export -f quiet_apt
download='quiet_apt install --download-only chromium chromium-driver'

if command -v chromium >/dev/null && command -v chromedriver >/dev/null; then exit 0; fi
if ! command -v apt-get >/dev/null; then
  say "chromium or chromedriver is missing, and there is no apt-get to install it"
elif ((EUID)); then
  say "chromium or chromedriver is missing, and only root may install it"
elif ! timeout 300 bash -c "$download || { quiet_apt update && $download; }"; then
  say "apt-get did not download chromium and chromium-driver within 300 s"
elif ! quiet_apt install --no-download chromium chromium-driver; then
  say "apt-get did not install chromium and chromium-driver"
fi
exit 0
