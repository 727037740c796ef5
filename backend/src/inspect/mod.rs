//! The subcommands `inspect` and `list`: the facts about a function's DMA and the CPU caches, their sources, and the verdicts. As
//! text or as JSON.

mod json;
mod list;
mod report;

pub use json::list_json;
pub use list::{ListEntry, list};
pub use report::{Fact, Report};
