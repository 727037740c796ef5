//! What admin commands leave behind.

use super::Options;
use super::event_state::Events;
use super::features::Features;

/// What admin commands have left behind; forgotten at a reset.
pub(super) struct Admin {
    pub(super) features: Features,
    pub(super) events: Events,
}

impl Admin {
    pub(super) fn new(options: &Options) -> Self {
        Self { features: Features::new(options), events: Events::default() }
    }
}
