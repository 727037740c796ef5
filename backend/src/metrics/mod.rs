//! Metrics for Prometheus, over HTTP on a UNIX socket or a port of the loopback interface: `GET /metrics`, in the OpenMetrics text
//! format 1.0.0 if the client accepts it, else in the text format 0.0.4. Each answer ends its connection.

mod families;
mod text;

use std::sync::Arc;

use crate::control::Subject;
use crate::local_server::{Dialogue, Step};
use text::Format;

/// Most header fields of a request. Prometheus sends six.
const HEADERS: usize = 64;

/// The server's side of the connection.
pub struct Http(Arc<Subject>);

impl Http {
    /// About this subject.
    #[must_use]
    pub fn new(subject: Arc<Subject>) -> Self {
        Self(subject)
    }
}

impl Dialogue for Http {
    const MOST_BYTES: usize = 8192;

    fn step(&mut self, input: &mut Vec<u8>) -> Step {
        let mut headers = [httparse::EMPTY_HEADER; HEADERS];
        let mut request = httparse::Request::new(&mut headers);
        match request.parse(input) {
            Ok(httparse::Status::Partial) => Step::Incomplete,
            Ok(httparse::Status::Complete(_)) => Step::Last(self.answer(&request)),
            Err(httparse::Error::TooManyHeaders) => Step::Last(self.too_long()),
            Err(error) => Step::Last(refusal("400 Bad Request", "", &format!("{error}\n"))),
        }
    }

    fn too_long(&self) -> Vec<u8> {
        let reason = format!("a request has at most {} bytes and {HEADERS} header fields\n", Self::MOST_BYTES);
        refusal("431 Request Header Fields Too Large", "", &reason)
    }

    fn busy(&self) -> Vec<u8> {
        self.refused("busy")
    }

    fn refused(&self, reason: &str) -> Vec<u8> {
        refusal("503 Service Unavailable", "Retry-After: 1\r\n", &format!("{reason}\n"))
    }
}

impl Http {
    fn answer(&self, request: &httparse::Request<'_, '_>) -> Vec<u8> {
        let (method, target) = (request.method.unwrap_or_default(), request.path.unwrap_or_default());
        let path = target.split('?').next().unwrap_or_default();
        if path != "/metrics" {
            return refusal("404 Not Found", "", "the metrics are at /metrics\n");
        }
        let body = match method {
            "GET" | "HEAD" => {
                let format = accepted(request.headers);
                let text = families::write(&self.0, format);
                let length = text.len();
                let body = if method == "HEAD" { "" } else { text.as_str() };
                return response("200 OK", format.content_type(), "", (length, body));
            }
            _ => "only GET and HEAD\n",
        };
        refusal("405 Method Not Allowed", "Allow: GET, HEAD\r\n", body)
    }
}

/// OpenMetrics if the client names it.
fn accepted(headers: &[httparse::Header<'_>]) -> Format {
    let accepts = headers.iter().filter(|header| header.name.eq_ignore_ascii_case("accept"));
    let named = |value: &[u8]| value.windows(OPEN_METRICS.len()).any(|part| part.eq_ignore_ascii_case(OPEN_METRICS));
    if accepts.into_iter().any(|header| named(header.value)) { Format::OpenMetrics } else { Format::Prometheus }
}

const OPEN_METRICS: &[u8] = b"application/openmetrics-text";

fn refusal(status: &str, field: &str, reason: &str) -> Vec<u8> {
    response(status, "text/plain; charset=utf-8", field, (reason.len(), reason))
}

fn response(status: &str, content_type: &str, field: &str, (length, body): (usize, &str)) -> Vec<u8> {
    format!(
        "HTTP/1.1 {status}\r\nContent-Type: {content_type}\r\nContent-Length: {length}\r\n{field}Connection: close\r\n\r\n{body}"
    )
    .into_bytes()
}

#[cfg(test)]
mod tests;
