//! The copy of the tree that holds every mutant. Files that have not changed are left alone, so that cargo compiles only
//! what it must.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsStr;
use std::fmt::Write as _;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use super::{Error, Mutant, VARIABLE};

/// What the copy needs of the tree.
const PARTS: [&str; 5] = ["Cargo.toml", "Cargo.lock", "backend", "frontend-shim", "tests"];
/// Where the choice is made.
const LIBRARY: &str = "backend/src/lib.rs";

/// Texts of one file, each with the mutants that replace it: the mutant's number and its text.
type Choices<'a> = BTreeMap<&'a str, Vec<(usize, &'a str)>>;

/// Copies the tree at `root` to `copy`, with all `mutants` in it; they are numbered from 1.
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
                text.extend(chooser().into_bytes());
            }
            write_if_new(&copy.join(&file), &text)?;
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

/// The number of the mutant to be.
fn chooser() -> String {
    format!(
        "\npub(crate) fn mutant() -> usize {{\n    static MUTANT: std::sync::OnceLock<usize> = std::sync::OnceLock::new();\n    \
         *MUTANT.get_or_init(|| std::env::var({VARIABLE:?}).ok().and_then(|n| n.parse().ok()).unwrap_or(0))\n}}\n"
    )
}

/// `source` with a choice in each place.
fn with_choices(source: &str, choices: &Choices<'_>) -> Result<String, Error> {
    let mut places = Vec::new();
    for (from, mutants) in choices {
        let mut found = source.match_indices(from);
        let (Some((at, _)), None) = (found.next(), found.next()) else {
            return Err(format!("wanted once, found {} times: {from}", source.matches(from).count()).into());
        };
        places.push((at, *from, mutants));
    }
    places.sort_by_key(|(at, ..)| *at);
    let (mut made, mut done) = (String::new(), 0);
    for (at, from, mutants) in places {
        let between = source.get(done..at).ok_or_else(|| format!("overlaps with another change: {from}"))?;
        write!(made, "{between}match crate::mutant() {{ ")?;
        for (number, to) in mutants {
            write!(made, "{number} => {{ {to} }} ")?;
        }
        write!(made, "_ => {{ {from} }} }}")?;
        done = at + from.len();
    }
    Ok(made + &source[done..])
}

/// All files below `root`/`part`, named from `root`; `part` may be a file itself. What cargo has built is left out.
fn files_below(root: &Path, part: &Path) -> io::Result<Vec<PathBuf>> {
    let place = root.join(part);
    if !place.is_dir() {
        return Ok(if place.exists() { vec![part.to_owned()] } else { Vec::new() });
    }
    let mut files = Vec::new();
    for entry in fs::read_dir(place)? {
        let name = entry?.file_name();
        if name != OsStr::new("target") {
            files.extend(files_below(root, &part.join(name))?);
        }
    }
    Ok(files)
}

fn write_if_new(file: &Path, text: &[u8]) -> io::Result<()> {
    if fs::read(file).is_ok_and(|before| before == text) {
        return Ok(());
    }
    file.parent().map_or(Ok(()), fs::create_dir_all)?;
    fs::write(file, text)
}
