# shellcheck shell=bash
# A Rust toolchain new enough for this workspace. Needs lib.sh.

# An installation by rustup, for shells that did not read its profile.
PATH=$PATH:$HOME/.cargo/bin

rust_wanted() { sed -n 's/^rust-version = "\(.*\)"/\1/p' "$TESTBED_ROOT/Cargo.toml"; }
rust_found() { cargo --version 2>/dev/null | cut -d ' ' -f 2 || true; }

# at_least VERSION WANTED
at_least() { [[ -n $1 && $(printf '%s\n' "$2" "$1" | sort -V | head -n 1) == "$2" ]]; }

need_rust() {
    local wanted candidate
    wanted=$(rust_wanted)
    # Crates and toolchains come over TLS.
    need cc=gcc /usr/include/stdio.h=libc6-dev /etc/ssl/certs/ca-certificates.crt=ca-certificates
    ! at_least "$(rust_found)" "$wanted" || return 0
    say "Rust $wanted or newer is wanted, found: $(rust_found)"
    if command -v rustup >/dev/null; then
        rust_by_rustup
    else
        [[ -n $(apt_candidate cargo) ]] || apt-get update >/dev/null 2>&1 || true
        candidate=$(apt_candidate cargo)
        if at_least "${candidate#*:}" "$wanted"; then
            install_packages cargo rustc rustfmt rust-clippy
        elif [[ -n $(apt_candidate rustup) ]]; then
            install_packages rustup
            rust_by_rustup
        fi
    fi
    at_least "$(rust_found)" "$wanted" || die "no Rust $wanted in this Debian (found: $(rust_found));" \
        "install it by rustup, as https://rustup.rs says, and start again"
}

apt_candidate() { apt-cache policy "$1" 2>/dev/null | sed -n 's/^ *Candidate: \([^(].*\)/\1/p' || true; }

# Without a change to the default the user has chosen.
rust_by_rustup() {
    mkdir -p "$TESTBED_CACHE"
    watched "fetching the stable Rust toolchain" "$TESTBED_CACHE/rustup.log" rust_progress \
        rustup toolchain install stable --profile default
    export RUSTUP_TOOLCHAIN=stable
}
rust_progress() { tail -n 1 "$TESTBED_CACHE/rustup.log"; }
