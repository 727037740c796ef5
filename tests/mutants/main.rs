//! `mutants [WORD…]`: applies each mutant of the lists in this directory (or those whose name contains one of the words) to
//! the product, and checks that the mutant's test fails.
//!
//! All mutants are compiled at once. In a copy of the tree, each text that a mutant changes becomes a choice,
//!
//! ```text
//! match crate::mutant() { 3 => { text of mutant 3 } 7 => { text of mutant 7 } _ => { original text } }
//! ```
//!
//! and each test runs with the number of its mutant in the environment. So another mutant costs one run of one test, and the
//! product needs no code for it. The changed text must therefore be an expression, or whole statements that declare nothing
//! used after them.
//!
//! Prints one line per mutant, then the plan, as the other tests do. Fails if a text does not occur exactly once, if the copy
//! does not compile, or if a test does not run, fails without a mutant, or passes with its mutant.

mod tree;

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};
use std::time::{Duration, Instant};

use serde::Deserialize;

/// Time-out of a test.
const LIMIT: Duration = Duration::from_secs(240);
/// Environment variable with the number of the mutant; 0 or unset for the original product.
const VARIABLE: &str = "VDV_MUTANT";

type Error = Box<dyn std::error::Error + Send + Sync>;

/// A file with mutants.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct List {
    mutant: Vec<Mutant>,
}

/// A deliberate defect.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Mutant {
    /// What is wrong.
    name: String,
    /// Full name of the test that must fail.
    test: String,
    /// One or more changes.
    change: Vec<Change>,
}

/// A change of the source.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Change {
    /// Path relative to the root of the tree.
    file: PathBuf,
    /// The original text, which occurs once in the file.
    from: String,
    /// Its replacement.
    to: String,
}

/// The result of a test.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Outcome {
    Passed,
    Failed,
    /// There is no such test, or it timed out.
    Inconclusive,
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

/// Runs the mutants that `words` select. Returns the number of mutants whose test did not fail.
fn run(words: &[String]) -> Result<usize, Error> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().ok_or("no root")?;
    let selected = |mutant: &Mutant| words.is_empty() || words.iter().any(|word| mutant.name.contains(word.as_str()));
    let mutants: Vec<_> = read_lists(&root.join("tests/mutants"))?.into_iter().filter(selected).collect();
    let target = std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| root.join("target"), PathBuf::from);
    let copy = target.join("mutants");
    tree::prepare(root, &copy, &mutants)?;
    let program = build(&copy, &target)?;

    let tests: BTreeSet<&str> = mutants.iter().map(|mutant| mutant.test.as_str()).collect();
    let tests: Vec<_> = tests.into_iter().collect();
    let baseline = in_parallel(tests.len(), |n| outcome(&program, tests[n], 0));
    if let Some((test, _)) = tests.iter().zip(&baseline).find(|(_, outcome)| **outcome != Outcome::Passed) {
        return Err(format!("{test} does not exist, or does not pass without a mutant").into());
    }

    let start = Instant::now();
    let (outcomes, took): (Vec<_>, Vec<_>) = in_parallel(mutants.len(), |n| {
        let start = Instant::now();
        (outcome(&program, &mutants[n].test, n + 1), start.elapsed())
    })
    .into_iter()
    .unzip();
    report_slowest(&mutants, &took, start.elapsed());
    for (Mutant { name, test, .. }, outcome) in mutants.iter().zip(&outcomes) {
        match outcome {
            Outcome::Failed => println!("ok - {name}: {test} fails"),
            Outcome::Passed => println!("not ok - {name}: {test} still passes"),
            Outcome::Inconclusive => println!("not ok - {name}: {test} neither passes nor fails"),
        }
    }
    println!("1..{}", mutants.len());
    Ok(outcomes.iter().filter(|outcome| **outcome != Outcome::Failed).count())
}

/// Prints which mutants took longest: their tests may do more than they need to.
fn report_slowest(mutants: &[Mutant], took: &[Duration], whole: Duration) {
    let mut by_time: Vec<_> = took.iter().zip(mutants).collect();
    by_time.sort_by_key(|(took, _)| std::cmp::Reverse(**took));
    println!("# {} mutants in {} s; the slowest:", mutants.len(), whole.as_secs());
    for (took, mutant) in by_time.iter().take(10) {
        println!("# {} ms: {}", took.as_millis(), mutant.name);
    }
}

/// All mutants in `directory`.
fn read_lists(directory: &Path) -> Result<Vec<Mutant>, Error> {
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

/// Compiles the unit tests of the copy. Returns the path of the test program.
fn build(copy: &Path, target: &Path) -> Result<PathBuf, Error> {
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    // With all three packages, the dependencies have the same features as in the tree and are not compiled again. The copied
    // packages need different settings, or Cargo would take them for those of the tree.
    let packages = ["vhost-device-vfio", "testbed", "kvm-vfio-shim"];
    let settings = packages.map(|package| format!("profile.dev.package.{package}.debug=false"));
    let output = Command::new(cargo)
        .args(["test", "--locked", "--lib", "--no-run", "--message-format=json"])
        .args(packages.iter().flat_map(|package| ["--package", package]))
        .args(settings.iter().flat_map(|setting| ["--config", setting]))
        .current_dir(copy)
        .env("CARGO_TARGET_DIR", target)
        .stderr(Stdio::inherit())
        .output()?;
    let messages = String::from_utf8(output.stdout)?;
    if !output.status.success() {
        return Err(format!("the mutants do not compile:\n{}", compiler_errors(&messages)).into());
    }
    let mut backend = messages.lines().filter(|line| line.contains(r#""name":"vhost_device_vfio""#));
    let path = backend.find_map(|line| line.split_once(r#""executable":""#)?.1.split('"').next());
    Ok(path.ok_or("cargo names no test program")?.into())
}

/// The compiler's errors in Cargo's messages, as it prints them itself. Those of the library come again with its tests.
fn compiler_errors(messages: &str) -> String {
    let parsed = messages.lines().filter_map(|line| serde_json::from_str::<serde_json::Value>(line).ok());
    let errors = parsed.filter(|message| message["message"]["level"] == "error");
    let texts: BTreeSet<String> =
        errors.filter_map(|error| Some(error["message"]["rendered"].as_str()?.into())).collect();
    texts.into_iter().collect()
}

/// Tests that run at a time on a processor. With a mutant, many wait for what never comes.
const TESTS_PER_PROCESSOR: usize = 4;

/// Calls `work` with 0, 1, … `count` − 1 in several threads. Returns the results in order.
fn in_parallel<T: Send>(count: usize, work: impl Fn(usize) -> T + Sync) -> Vec<T> {
    let next = AtomicUsize::new(0);
    let worker = || {
        let indices = std::iter::from_fn(|| Some(next.fetch_add(1, SeqCst)).filter(|n| *n < count));
        indices.map(|n| (n, work(n))).collect::<Vec<_>>()
    };
    let mut results: Vec<(usize, T)> = std::thread::scope(|scope| {
        let threads = std::thread::available_parallelism().map_or(1, usize::from);
        let threads: Vec<_> = (0..threads * TESTS_PER_PROCESSOR).map(|_| scope.spawn(worker)).collect();
        threads.into_iter().flat_map(|thread| thread.join().expect("a worker does not panic")).collect()
    });
    results.sort_by_key(|(n, _)| *n);
    results.into_iter().map(|(_, result)| result).collect()
}

fn outcome(program: &Path, test: &str, mutant: usize) -> Outcome {
    try_outcome(program, test, mutant).unwrap_or(Outcome::Inconclusive)
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
            return Ok(Outcome::Inconclusive);
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    let output = String::from_utf8(child.wait_with_output()?.stdout)?;
    let result = output.lines().find(|line| line.starts_with("test result: ")).unwrap_or_default();
    Ok(match result {
        passed if passed.starts_with("test result: ok. 1 passed") => Outcome::Passed,
        failed if failed.starts_with("test result: FAILED") => Outcome::Failed,
        _ => Outcome::Inconclusive,
    })
}
