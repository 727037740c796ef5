//! The two text formats of metrics: families of samples with labels.

use std::fmt::{Display, Write};

/// The format.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Format {
    /// OpenMetrics 1.0.0.
    OpenMetrics,
    /// Prometheus text 0.0.4.
    Prometheus,
}

/// What the samples of a family are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Counter,
    Gauge,
    Histogram,
    /// A constant 1 whose labels are the information.
    Info,
}

impl Format {
    pub(super) fn content_type(self) -> &'static str {
        match self {
            Self::OpenMetrics => "application/openmetrics-text; version=1.0.0; charset=utf-8",
            Self::Prometheus => "text/plain; version=0.0.4; charset=utf-8",
        }
    }
}

/// The text while it is written.
pub(super) struct Exposition {
    format: Format,
    text: String,
    name: &'static str,
    kind: Kind,
}

/// Units that a name can end with.
const UNITS: [&str; 2] = ["bytes", "seconds"];

impl Exposition {
    pub(super) fn new(format: Format) -> Self {
        Self { format, text: String::new(), name: "", kind: Kind::Gauge }
    }

    /// Begins a family. `name` has no suffix but its unit.
    pub(super) fn family(&mut self, name: &'static str, kind: Kind, help: &str) {
        (self.name, self.kind) = (name, kind);
        let word = match (self.format, kind) {
            (_, Kind::Counter) => "counter",
            (_, Kind::Histogram) => "histogram",
            (Format::OpenMetrics, Kind::Info) => "info",
            (_, Kind::Gauge | Kind::Info) => "gauge",
        };
        // In the older format a family has the name of its samples.
        let suffix = if self.format == Format::OpenMetrics { "" } else { self.suffix() };
        let mut line = |keyword: &str, value: &str| {
            let _ = writeln!(self.text, "# {keyword} {name}{suffix} {value}");
        };
        line("TYPE", word);
        if self.format == Format::OpenMetrics
            && let Some(unit) = UNITS.into_iter().find(|unit| name.ends_with(unit))
        {
            line("UNIT", unit);
        }
        line("HELP", help);
    }

    fn suffix(&self) -> &'static str {
        match self.kind {
            Kind::Counter => "_total",
            Kind::Info => "_info",
            Kind::Gauge | Kind::Histogram => "",
        }
    }

    /// A sample of the family.
    pub(super) fn sample(&mut self, labels: &[(&str, &str)], value: impl Display) {
        let suffix = self.suffix();
        self.line(suffix, labels, value);
    }

    /// A histogram of the family: upper bounds in seconds with how many are not above, all, and their sum in seconds.
    pub(super) fn histogram(&mut self, labels: &[(&str, &str)], below: &[(f64, u64)], (count, sum): (u64, f64)) {
        for (bound, below) in below {
            let bound = bound.to_string();
            self.line("_bucket", &[labels, &[("le", &bound)]].concat(), below);
        }
        self.line("_bucket", &[labels, &[("le", "+Inf")]].concat(), count);
        self.line("_sum", labels, sum);
        self.line("_count", labels, count);
    }

    fn line(&mut self, suffix: &str, labels: &[(&str, &str)], value: impl Display) {
        self.text.push_str(self.name);
        self.text.push_str(suffix);
        for (n, (name, value)) in labels.iter().enumerate() {
            let value = value.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n");
            let _ = write!(self.text, "{}{name}=\"{value}\"", if n == 0 { '{' } else { ',' });
        }
        if !labels.is_empty() {
            self.text.push('}');
        }
        let _ = writeln!(self.text, " {value}");
    }

    pub(super) fn finish(mut self) -> String {
        if self.format == Format::OpenMetrics {
            self.text.push_str("# EOF\n");
        }
        self.text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn write(format: Format) -> String {
        let mut text = Exposition::new(format);
        text.family("a", Kind::Info, "What it is.");
        text.sample(&[("name", "a \"b\" \\ \n")], 1);
        text.family("a_transferred_bytes", Kind::Counter, "Bytes.");
        text.sample(&[], 5);
        text.family("a_duration_seconds", Kind::Histogram, "Times.");
        text.histogram(&[("operation", "read")], &[(0.5, 1)], (2, 1.25));
        text.finish()
    }

    #[test]
    fn open_metrics_has_units_and_an_end_and_counters_without_suffix_in_their_types() {
        let expected = "\
# TYPE a info
# HELP a What it is.
a_info{name=\"a \\\"b\\\" \\\\ \\n\"} 1
# TYPE a_transferred_bytes counter
# UNIT a_transferred_bytes bytes
# HELP a_transferred_bytes Bytes.
a_transferred_bytes_total 5
# TYPE a_duration_seconds histogram
# UNIT a_duration_seconds seconds
# HELP a_duration_seconds Times.
a_duration_seconds_bucket{operation=\"read\",le=\"0.5\"} 1
a_duration_seconds_bucket{operation=\"read\",le=\"+Inf\"} 2
a_duration_seconds_sum{operation=\"read\"} 1.25
a_duration_seconds_count{operation=\"read\"} 2
# EOF
";
        assert_eq!(write(Format::OpenMetrics), expected);
    }

    #[test]
    fn the_older_format_names_families_as_their_samples() {
        let text = write(Format::Prometheus);
        assert!(text.contains("# TYPE a_info gauge\n") && text.contains("# TYPE a_transferred_bytes_total counter\n"));
        assert!(!text.contains("UNIT") && !text.contains("EOF"), "{text}");
    }
}
