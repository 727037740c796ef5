//! State that admin commands change.

use super::Options;
use super::event_state::Events;
use super::features::Features;

/// State that admin commands change. A reset discards it.
pub(super) struct Admin {
    pub(super) features: Features,
    pub(super) events: Events,
}

impl Admin {
    pub(super) fn new(options: &Options) -> Self {
        Self { features: Features::new(options), events: Events::default() }
    }
}
