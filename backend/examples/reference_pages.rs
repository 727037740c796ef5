//! Writes the manual pages and the shells' completions of the command line into a directory: `reference-pages DIR`. A package
//! installs them.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result};
use clap::CommandFactory;
use clap_complete::Shell;
use vhost_device_vfio::config::Config;

fn main() -> Result<()> {
    let dir = std::env::args_os().nth(1).context("usage: reference-pages DIR")?;
    let dir = Path::new(&dir);
    fs::create_dir_all(dir).with_context(|| format!("create {}", dir.display()))?;
    // One page for the program and one for each subcommand.
    clap_mangen::generate_to(Config::command(), dir).context("write the manual pages")?;
    for shell in [Shell::Bash, Shell::Fish, Shell::Zsh] {
        let written = clap_complete::generate_to(shell, &mut Config::command(), "vhost-device-vfio", dir);
        written.with_context(|| format!("write the completions of {shell}"))?;
    }
    Ok(())
}
