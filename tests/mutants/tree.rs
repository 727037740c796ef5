//! The copy of the tree that contains all mutants. Unchanged files are not written again, so that Cargo compiles only what
//! has changed.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsStr;
use std::fmt::Write as _;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use super::{Error, Mutant, VARIABLE};

/// The files and directories of the tree that are copied.
const PARTS: [&str; 5] = ["Cargo.toml", "Cargo.lock", "backend", "frontend-shim", "tests"];
/// The file to which the function `mutant` is added.
const LIBRARY: &str = "backend/src/lib.rs";

/// Texts of one file, each with the numbers of the mutants that replace it and their replacements.
type Choices<'a> = BTreeMap<&'a str, Vec<(usize, &'a str)>>;

/// Copies the tree at `root` to `copy` and adds all `mutants`, numbered from 1.
pub(super) fn prepare(root: &Path, copy: &Path, mutants: &[Mutant]) -> Result<(), Error> {
    let mut files: BTreeMap<&Path, Choices<'_>> = BTreeMap::new();
    for (number, mutant) in (1..).zip(mutants) {
        for change in &mutant.change {
            let choices = files.entry(&change.file).or_default();
            choices.entry(&change.from).or_default().push((number, &change.to));
        }
    }
    let mut kept = BTreeSet::new();
    for part in PARTS {
        for file in files_below(root, Path::new(part))? {
            let mut text = fs::read(root.join(&file))?;
            if let Some(choices) = files.remove(file.as_path()) {
                text = with_choices(&String::from_utf8(text)?, &choices)
                    .map_err(|error| format!("{}: {error}", file.display()))?
                    .into_bytes();
            }
            if file == Path::new(LIBRARY) {
                text.extend(mutant_function().into_bytes());
            }
            write_if_changed(&copy.join(&file), &text)?;
            kept.insert(file);
        }
    }
    if let Some(file) = files.keys().next() {
        return Err(format!("{}: no such file", file.display()).into());
    }
    for part in PARTS {
        for file in files_below(copy, Path::new(part))?.into_iter().filter(|file| !kept.contains(file)) {
            fs::remove_file(copy.join(file))?;
        }
    }
    Ok(())
}

/// The source of `mutant`, which returns the number of the active mutant.
fn mutant_function() -> String {
    format!(
        "\npub(crate) fn mutant() -> usize {{\n    static MUTANT: std::sync::OnceLock<usize> = std::sync::OnceLock::new();\n    \
         *MUTANT.get_or_init(|| std::env::var({VARIABLE:?}).ok().and_then(|n| n.parse().ok()).unwrap_or(0))\n}}\n"
    )
}

/// `source` with each text in `choices` replaced by a `match`.
fn with_choices(source: &str, choices: &Choices<'_>) -> Result<String, Error> {
    let mut places = Vec::new();
    for (from, mutants) in choices {
        let mut found = source.match_indices(from);
        let (Some((at, _)), None) = (found.next(), found.next()) else {
            return Err(format!("expected once, found {} times: {from}", source.matches(from).count()).into());
        };
        places.push((at, *from, mutants));
    }
    places.sort_by_key(|(at, ..)| *at);
    let (mut result, mut done) = (String::new(), 0);
    for (at, from, mutants) in places {
        let between = source.get(done..at).ok_or_else(|| format!("overlaps with another change: {from}"))?;
        write!(result, "{between}match crate::mutant() {{ ")?;
        for (number, to) in mutants {
            write!(result, "{number} => {{ {to} }} ")?;
        }
        write!(result, "_ => {{ {from} }} }}")?;
        done = at + from.len();
    }
    Ok(result + &source[done..])
}

/// All files in `root`/`part`, relative to `root`, without build directories. `part` may also be a file.
fn files_below(root: &Path, part: &Path) -> io::Result<Vec<PathBuf>> {
    let path = root.join(part);
    if !path.is_dir() {
        return Ok(if path.exists() { vec![part.to_owned()] } else { Vec::new() });
    }
    let mut files = Vec::new();
    for entry in fs::read_dir(path)? {
        let name = entry?.file_name();
        if name != OsStr::new("target") {
            files.extend(files_below(root, &part.join(name))?);
        }
    }
    Ok(files)
}

fn write_if_changed(file: &Path, text: &[u8]) -> io::Result<()> {
    if fs::read(file).is_ok_and(|before| before == text) {
        return Ok(());
    }
    file.parent().map_or(Ok(()), fs::create_dir_all)?;
    fs::write(file, text)
}
