//! Questions instead of service: what is known about a function's caches, from where, and what follows. As text for a person,
//! as JSON for a program.

mod json;
mod list;
mod report;

pub use json::list_json;
pub use list::{Listed, list};
pub use report::{Fact, Report};
