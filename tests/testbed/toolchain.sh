# shellcheck shell=bash
# Finds or installs a Rust toolchain that is new enough for this workspace. Needs lib.sh.

# Where rustup installs, for shells that have not read its profile.
PATH=$PATH:$HOME/.cargo/bin

rust_wanted() { sed -n 's/^rust-version = "\(.*\)"/\1/p' "$TESTBED_ROOT/Cargo.toml"; }
rust_found() { cargo --version 2>/dev/null | cut -d ' ' -f 2 || true; }

# at_least VERSION WANTED
at_least() { [[ -n $1 && $(printf '%s\n' "$2" "$1" | sort -V | head -n 1) == "$2" ]]; }

need_rust() {
    local wanted candidate
    wanted=$(rust_wanted)
    # Crates and toolchains are downloaded over TLS.
    need cc=gcc /usr/include/stdio.h=libc6-dev /etc/ssl/certs/ca-certificates.crt=ca-certificates
    ! at_least "$(rust_found)" "$wanted" || return 0
    say "Rust $wanted or newer is needed, found: $(rust_found)"
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
        "install it with rustup (https://rustup.rs) and start again"
}

apt_candidate() { apt-cache policy "$1" 2>/dev/null | sed -n 's/^ *Candidate: \([^(].*\)/\1/p' || true; }

# Does not change the user's default toolchain.
rust_by_rustup() {
    mkdir -p "$TESTBED_CACHE"
    watched "fetching the stable Rust toolchain" "$TESTBED_CACHE/rustup.log" rust_progress \
        rustup toolchain install stable --profile default
    export RUSTUP_TOOLCHAIN=stable
}
rust_progress() { tail -n 1 "$TESTBED_CACHE/rustup.log"; }
