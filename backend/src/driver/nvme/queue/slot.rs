//! What a queue pair keeps of one command.

/// In [`Slot::command`].
const BUSY: u32 = 1 << 16;

/// See the top of this file.
#[derive(Clone, Copy)]
pub(super) struct Slot {
    /// Identifier of the slot's command if busy, else of its next one. Above it [`BUSY`], so that one comparison tells whether a
    /// completion is for this command.
    command: u32,
    pub(super) tag: u32,
    /// Tick in which the command, or its Abort, was submitted.
    pub(super) since_tick: u32,
    pub(super) aborted: bool,
}

impl Slot {
    /// Its first command will have this identifier.
    pub(super) fn free(cid: u16) -> Self {
        Self { command: cid.into(), tag: 0, since_tick: 0, aborted: false }
    }

    /// The identifier of its command or of the next one.
    #[inline]
    pub(super) fn cid(&self) -> u16 {
        u16::try_from(self.command & 0xffff).expect("masked")
    }

    /// True if it has a command.
    pub(super) fn is_busy(&self) -> bool {
        self.command & BUSY != 0
    }

    /// True if it has the command with this identifier.
    #[inline]
    pub(super) fn is_busy_with(&self, cid: u16) -> bool {
        self.command == BUSY | u32::from(cid)
    }

    /// Its command is submitted.
    #[inline]
    pub(super) fn take(&mut self, tag: u32, tick: u32) {
        self.command |= BUSY;
        self.tag = tag;
        self.since_tick = tick;
        self.aborted = false;
    }

    /// Its command has completed. The next one will have the identifier `next`.
    #[inline]
    pub(super) fn give_back(&mut self, next: u16) {
        self.command = next.into();
    }
}
