//! The path of the library under test.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

/// `target/debug` or `target/release`.
pub(crate) fn target() -> PathBuf {
    let test = std::env::current_exe().expect("/proc");
    test.parent().and_then(Path::parent).expect("target/PROFILE/deps/TEST").to_owned()
}

/// Builds the library: no test can link it, so Cargo does not build it for the tests. Where there is no Cargo,
/// `SHIM_LIBRARY` names a built one.
pub(crate) fn path() -> &'static Path {
    static LIBRARY: OnceLock<PathBuf> = OnceLock::new();
    LIBRARY.get_or_init(|| {
        if let Some(path) = std::env::var_os("SHIM_LIBRARY") {
            return path.into();
        }
        let (target, mut cargo) = (target(), Command::new(env!("CARGO")));
        cargo.args(["build", "--quiet", "--offline", "--lib", "--package", env!("CARGO_PKG_NAME"), "--target-dir"]);
        cargo.arg(target.parent().expect("target/PROFILE"));
        if target.ends_with("release") {
            cargo.arg("--release");
        }
        assert!(cargo.status().is_ok_and(|status| status.success()), "{cargo:?}");
        target.join("libkvm_vfio_shim.so")
    })
}
