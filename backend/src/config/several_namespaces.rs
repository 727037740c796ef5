//! What several namespaces cannot be combined with.

use super::Config;

/// What is wrong with the options for several namespaces, and how to do it; `None` if nothing is, or if there is only one.
pub(super) fn problem(config: &Config) -> Option<String> {
    let Config { namespace: namespaces, socket_path: paths, .. } = config;
    if namespaces.len() <= 1 && paths.len() <= 1 {
        return None;
    }
    if namespaces.len() != paths.len() {
        let (namespaces, paths) = (namespaces.len(), paths.len());
        return Some(format!(
            "--namespace is given {namespaces} times and --socket-path {paths} times: each namespace needs a socket, in the same \
             order"
        ));
    }
    if let Some(id) = repeated(namespaces) {
        return Some(format!("--namespace {id} is given twice: a namespace has one user at a time"));
    }
    if let Some(path) = repeated(paths) {
        return Some(format!(
            "--socket-path {} is given twice: each namespace needs a socket of its own",
            path.display()
        ));
    }
    let refused = [
        (
            config.vfio_user,
            "--vfio-user",
            "a whole function has all its namespaces, give one --socket-path and no --namespace",
        ),
        (config.kvm_socket.is_some(), "--kvm-socket", "the front-ends may be of different virtual machines"),
        (config.handover_socket.is_some(), "--handover-socket", "one session can be handed over, not several"),
        (config.control.is_some(), "--control", "it shows one disk, not several"),
        (config.metrics.is_some(), "--metrics", "they are of one disk, not several"),
        (config.expect_disk.is_some(), "--expect-disk", "each has an identity of its own"),
        (config.successor, "--successor", "the page table moves for all of them at once"),
        (config.takeover.is_some(), "--takeover", "one session can be taken over, not several"),
        (config.takeover_fd.is_some(), "--takeover-fd", "one session can be taken over, not several"),
    ];
    let (_, option, why) = refused.into_iter().find(|(given, ..)| *given)?;
    Some(format!(
        "{option} cannot be used with several namespaces: {why}; or start a process for each drive with one namespace"
    ))
}

fn repeated<T: PartialEq>(values: &[T]) -> Option<&T> {
    values.iter().enumerate().find_map(|(index, value)| values[..index].contains(value).then_some(value))
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    const TWO: [&str; 8] =
        ["--namespace", "1", "--socket-path", "/run/a", "--namespace", "2", "--socket-path", "/run/b"];

    fn problem_of(words: &[&str]) -> Option<String> {
        let words = ["vhost-device-vfio", "--device", "emulated"].iter().chain(words);
        problem(&Config::try_parse_from(words).unwrap())
    }

    #[test]
    fn each_namespace_has_a_socket_in_the_same_order() {
        assert_eq!(problem_of(&TWO), None);
        let config = Config::try_parse_from(["vhost-device-vfio", "--device", "emulated"].iter().chain(&TWO)).unwrap();
        assert_eq!((config.namespace, config.socket_path), (vec![1, 2], vec!["/run/a".into(), "/run/b".into()]));
    }

    #[test]
    fn one_namespace_needs_nothing_else() {
        for words in [&[][..], &TWO[..2], &TWO[2..4], &TWO[..4]] {
            assert_eq!(problem_of(words), None, "{words:?}");
        }
    }

    #[test]
    fn what_does_not_go_together_is_refused_by_name() {
        let cases: [(&[&str], &str); 9] = [
            (&TWO[..6], "--namespace is given 2 times and --socket-path 1 times"),
            (&["--namespace", "1", "--namespace", "2"], "--socket-path 0 times"),
            (&["--socket-path", "/a", "--socket-path", "/b"], "--namespace is given 0 times"),
            (
                &["--namespace", "1", "--namespace", "1", "--socket-path", "/a", "--socket-path", "/b"],
                "--namespace 1 is",
            ),
            (
                &["--namespace", "1", "--namespace", "2", "--socket-path", "/a", "--socket-path", "/a"],
                "--socket-path /a is",
            ),
            (&[&TWO[..], &["--vfio-user"]].concat(), "--vfio-user cannot be used with several namespaces"),
            (&[&TWO[..], &["--kvm-socket", "/k"]].concat(), "--kvm-socket cannot be used with several namespaces"),
            (
                &[&TWO[..], &["--handover-socket", "/h"]].concat(),
                "--handover-socket cannot be used with several namespaces",
            ),
            (&[&TWO[..], &["--takeover", "/h"]].concat(), "--takeover cannot be used with several namespaces"),
        ];
        for (words, part) in cases {
            let problem = problem_of(words).unwrap_or_default();
            assert!(problem.contains(part), "{words:?}: {problem}");
        }
    }
}
