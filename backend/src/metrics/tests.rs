//! What is answered to requests of all kinds.

use super::*;
use crate::board::Board;
use crate::coherency::Policy;
use crate::control::{Hooks, Personality};
use crate::emulated::{Machine, Options};

/// Without an engine.
fn http() -> Http {
    let machine = Machine::new(Options { size: 1 << 20, ..Options::default() }).unwrap();
    let facts = machine.facts(Policy::Suppress).unwrap();
    let (set_log_level, start_successor) = (Box::new(|_| ()), Box::new(|| Ok(())));
    let hooks = Hooks { set_log_level, start_successor, permit_successor: Box::new(|_| Ok(())) };
    let named = (Personality::VfioUser, "emulated".to_owned());
    Http::new(Arc::new(Subject::new(named, facts, Arc::<Board>::default(), machine.space(), None, hooks)))
}

fn answer(request: &str) -> Option<String> {
    match http().step(&mut request.as_bytes().to_vec()) {
        Step::Last(bytes) => Some(String::from_utf8(bytes).unwrap()),
        Step::Incomplete => None,
        Step::Reply(_) | Step::Later(_) => panic!("an answer ends its connection"),
    }
}

#[test]
fn the_metrics_come_with_their_length_in_the_format_that_is_accepted() {
    let plain = answer("GET /metrics HTTP/1.1\r\nHost: a\r\n\r\n").unwrap();
    let open =
        answer("GET /metrics?a=b HTTP/1.0\r\naccept: text/plain, Application/OpenMetrics-Text;q=0.9\r\n\r\n").unwrap();

    for (answer, content_type) in
        [(&plain, "text/plain; version=0.0.4"), (&open, "application/openmetrics-text; version=1.0.0")]
    {
        let (head, body) = answer.split_once("\r\n\r\n").unwrap();
        assert!(head.starts_with("HTTP/1.1 200 OK\r\n") && head.contains(content_type), "{head}");
        assert!(head.contains(&format!("Content-Length: {}\r\n", body.len())), "{head}");
        assert!(body.contains("vhost_device_vfio_info{version=\""), "{body}");
    }
    assert!(open.ends_with("# EOF\n") && !plain.contains("EOF"));
}

#[test]
fn head_has_the_length_without_the_body() {
    let head = answer("HEAD /metrics HTTP/1.1\r\n\r\n").unwrap();
    assert!(head.ends_with("\r\n\r\n") && !head.contains("Content-Length: 0"), "{head}");
}

#[test]
fn what_is_no_request_for_the_metrics_is_refused_by_its_status() {
    for (request, status) in [
        ("GET / HTTP/1.1\r\n\r\n", "404"),
        ("POST /metrics HTTP/1.1\r\nContent-Length: 0\r\n\r\n", "405"),
        ("{\"version\":1}\r\n\r\n", "400"),
        ("GET /metrics\r\n\r\n", "400"),
        ("\u{0}\u{1}\u{2}", "400"),
    ] {
        let answer = answer(request).unwrap();
        assert!(answer.starts_with(&format!("HTTP/1.1 {status} ")), "{request:?}: {answer}");
    }
    let many: String = (0..65).map(|n| format!("a{n}: b\r\n")).collect();
    assert!(answer(&format!("GET /metrics HTTP/1.1\r\n{many}\r\n")).unwrap().starts_with("HTTP/1.1 431 "));
    assert_eq!(answer("GET /metrics HTTP/1.1\r\nHost: a\r\n"), None, "the rest may come");
}
