//! What the oracle can find wrong.

use std::fmt;

use super::{Operation, Stamp, Tag};

/// A request that was not served as it must be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Wrong {
    /// It never completed.
    Lost(Tag, Operation),
    /// A used entry for a request that is not in flight.
    Doubled(Tag),
    /// It ended with this status.
    Status(Tag, Operation, u8),
    /// The used entry has the wrong length.
    Length(Tag, Operation, u32),
    /// A block holds an older write than the one that has been read from it before: an old write was done again.
    Reordered(Content),
    /// A block holds an older write than the last one reported: that one was never done, or an old one was done again.
    Stale(Content),
    /// A block holds parts of several writes, or something that was never written.
    Torn(Content),
    /// A block holds a write to another block, or one that has not been submitted.
    Misplaced(Content),
    /// Requests completed, and no call told the driver.
    NoCall,
}

/// The content of a block, and what it should be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Content {
    /// Number of the block.
    pub block: u64,
    /// The last write that was reported.
    pub wanted: Stamp,
    /// The write that was found, if it is one.
    pub found: Option<Stamp>,
}

impl fmt::Display for Wrong {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Lost(tag, operation) => write!(f, "lost: {tag}, {operation}, never completed"),
            Self::Doubled(tag) => write!(f, "doubled: a used entry for {tag}, which is not in flight"),
            Self::Status(tag, operation, status) => write!(f, "{tag}, {operation}, ended with status {status}"),
            Self::Length(tag, operation, written) => {
                write!(f, "{tag}, {operation}: {written} bytes in the used entry, wanted {}", operation.written())
            }
            Self::Reordered(content) => write!(f, "reordered: {content}, and the wanted one had been read"),
            Self::Stale(content) => write!(f, "stale: {content}"),
            Self::Torn(content) => write!(f, "torn: {content}"),
            Self::Misplaced(content) => write!(f, "misplaced: {content}"),
            Self::NoCall => write!(f, "requests completed without a call"),
        }
    }
}

impl fmt::Display for Content {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let found = self.found.map_or("a mixture or garbage".to_owned(), |stamp| format!("write {}", stamp.sequence));
        write!(
            f,
            "block {} holds {found}, wanted write {} of queue {}",
            self.block, self.wanted.sequence, self.wanted.writer
        )
    }
}

impl std::error::Error for Wrong {}
