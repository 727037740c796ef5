//! `mutants [WORD…]`: breaks the product in every way that the lists beside this file name (or whose name has one of the
//! words), and looks whether the test named there notices.
//!
//! All of them are compiled at once. In a copy of the tree, each text that some mutant changes becomes a choice,
//!
//! ```text
//! match crate::mutant() { 3 => { another text } 7 => { a third } _ => { the text as it was } }
//! ```
//!
//! and each test is run with the number of its mutant in the environment. So a further mutant costs one run of one test, and
//! product code knows nothing of all this. What a mutant changes must therefore be an expression, or whole statements that
//! declare nothing which is used after them.
//!
//! Prints one line a mutant, then the plan, as the other tests do. Fails if a text is not there exactly once, if the copy
//! does not compile, or if a test does not run, fails on the unchanged text, or does not fail on the mutant.

mod tree;

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};
use std::time::{Duration, Instant};

use serde::Deserialize;

/// A test that has not ended by then never will.
const LIMIT: Duration = Duration::from_secs(240);
/// Names the mutant to be; 0 or nothing is the product as it is.
const VARIABLE: &str = "VDV_MUTANT";

type Error = Box<dyn std::error::Error + Send + Sync>;

/// One of the lists.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct List {
    mutant: Vec<Mutant>,
}

/// One way to break the product.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Mutant {
    /// What is wrong with it.
    name: String,
    /// The test that must notice, by its full name.
    test: String,
    /// One or more places.
    change: Vec<Change>,
}

/// Another text in one place.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Change {
    /// From the root of the tree.
    file: PathBuf,
    /// The text as it is; it stands there once.
    from: String,
    /// The text in its stead.
    to: String,
}

/// How a test came out.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Outcome {
    Passed,
    Failed,
    /// There is no such test, or it did not end.
    Odd,
}

fn main() -> ExitCode {
    match run(&std::env::args().skip(1).collect::<Vec<_>>()) {
        Ok(0) => ExitCode::SUCCESS,
        Ok(_) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("mutants: {error}");
            ExitCode::FAILURE
        }
    }
}

/// Tries the mutants that `words` name; gives how many went unnoticed.
fn run(words: &[String]) -> Result<usize, Error> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().ok_or("no root")?;
    let wanted = |mutant: &Mutant| words.is_empty() || words.iter().any(|word| mutant.name.contains(word.as_str()));
    let mutants: Vec<_> = lists(&root.join("tests/mutants"))?.into_iter().filter(wanted).collect();
    let target = std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| root.join("target"), PathBuf::from);
    let copy = target.join("mutants");
    tree::prepare(root, &copy, &mutants)?;
    let program = build(&copy, &target)?;

    let tests: BTreeSet<&str> = mutants.iter().map(|mutant| mutant.test.as_str()).collect();
    let tests: Vec<_> = tests.into_iter().collect();
    let sound = at_once(tests.len(), |n| outcome(&program, tests[n], 0));
    let unsound: Vec<_> = tests.iter().zip(&sound).filter(|(_, sound)| **sound != Outcome::Passed).collect();
    if let Some((test, _)) = unsound.first() {
        return Err(format!("{test} does not pass, or is not there, without any mutant").into());
    }

    let noticed = at_once(mutants.len(), |n| outcome(&program, &mutants[n].test, n + 1));
    for (Mutant { name, test, .. }, outcome) in mutants.iter().zip(&noticed) {
        match outcome {
            Outcome::Failed => println!("ok - {name}: {test} fails"),
            Outcome::Passed => println!("not ok - {name}: {test} passes all the same"),
            Outcome::Odd => println!("not ok - {name}: {test} neither passes nor fails"),
        }
    }
    println!("1..{}", mutants.len());
    Ok(noticed.iter().filter(|outcome| **outcome != Outcome::Failed).count())
}

/// All mutants in `directory`.
fn lists(directory: &Path) -> Result<Vec<Mutant>, Error> {
    let mut files = std::fs::read_dir(directory)?.map(|entry| Ok(entry?.path())).collect::<Result<Vec<_>, Error>>()?;
    files.retain(|file| file.extension().is_some_and(|extension| extension == "toml"));
    files.sort();
    let mut mutants = Vec::new();
    for file in files {
        let list: List =
            toml::from_str(&std::fs::read_to_string(&file)?).map_err(|error| format!("{}: {error}", file.display()))?;
        mutants.extend(list.mutant);
    }
    Ok(mutants)
}

/// Compiles the unit tests of the copy; gives the program.
fn build(copy: &Path, target: &Path) -> Result<PathBuf, Error> {
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    // With all three packages, their dependencies have the features that they have in the tree, and are not compiled again.
    // The tree's own packages must have other settings than there: their names and paths are the same, and Cargo would
    // mistake the copy for the tree.
    let packages = ["vhost-device-vfio", "testbed", "kvm-vfio-shim"];
    let settings = packages.map(|package| format!("profile.dev.package.{package}.debug=false"));
    let made = Command::new(cargo)
        .args(["test", "--locked", "--lib", "--no-run", "--message-format=json"])
        .args(packages.iter().flat_map(|package| ["--package", package]))
        .args(settings.iter().flat_map(|setting| ["--config", setting]))
        .current_dir(copy)
        .env("CARGO_TARGET_DIR", target)
        .stderr(Stdio::inherit())
        .output()?;
    let messages = String::from_utf8(made.stdout)?;
    if !made.status.success() {
        let rendered = messages.lines().filter(|line| line.contains(r#""level":"error""#));
        return Err(format!("the mutants do not compile:\n{}", rendered.collect::<Vec<_>>().join("\n")).into());
    }
    let mut backend = messages.lines().filter(|line| line.contains(r#""name":"vhost_device_vfio""#));
    let path = backend.find_map(|line| line.split_once(r#""executable":""#)?.1.split('"').next());
    Ok(path.ok_or("cargo names no test program")?.into())
}

/// Calls `work` with 0, 1, … `count` − 1, on every processor; the results in order.
fn at_once<T: Send>(count: usize, work: impl Fn(usize) -> T + Sync) -> Vec<T> {
    let next = AtomicUsize::new(0);
    let worker = || {
        let mine = std::iter::from_fn(|| Some(next.fetch_add(1, SeqCst)).filter(|n| *n < count));
        mine.map(|n| (n, work(n))).collect::<Vec<_>>()
    };
    let mut done: Vec<(usize, T)> = std::thread::scope(|scope| {
        let threads = std::thread::available_parallelism().map_or(1, usize::from);
        let threads: Vec<_> = (0..threads).map(|_| scope.spawn(worker)).collect();
        threads.into_iter().flat_map(|thread| thread.join().expect("a worker does not panic")).collect()
    });
    done.sort_by_key(|(n, _)| *n);
    done.into_iter().map(|(_, outcome)| outcome).collect()
}

fn outcome(program: &Path, test: &str, mutant: usize) -> Outcome {
    try_outcome(program, test, mutant).unwrap_or(Outcome::Odd)
}

fn try_outcome(program: &Path, test: &str, mutant: usize) -> Result<Outcome, Error> {
    let mut child = Command::new(program)
        .args(["--exact", test])
        .env(VARIABLE, mutant.to_string())
        .env("RUST_BACKTRACE", "0")
        .env("PROPTEST_FAILURE_PERSISTENCE", "off")
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()?;
    let start = Instant::now();
    while child.try_wait()?.is_none() {
        if start.elapsed() > LIMIT {
            child.kill()?;
            child.wait()?;
            return Ok(Outcome::Odd);
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    let said = String::from_utf8(child.wait_with_output()?.stdout)?;
    let result = said.lines().find(|line| line.starts_with("test result: ")).unwrap_or_default();
    Ok(match result {
        passed if passed.starts_with("test result: ok. 1 passed") => Outcome::Passed,
        failed if failed.starts_with("test result: FAILED") => Outcome::Failed,
        _ => Outcome::Odd,
    })
}
