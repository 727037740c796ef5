//! Interrupts: messages (MSI-X, MSI) and the line INTx, as VFIO presents them.
//!
//! ```text
//! MSI-X, MSI   a completion signals the eventfd of its queue's vector
//! INTx         asserted while a completion queue with interrupts has an entry that the host has not acknowledged, unless INTMS
//!              masks it; signalled once, and then masked as VFIO does until the user unmasks it
//! ```

use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering::SeqCst, fence};
use std::sync::{Arc, PoisonError, RwLock, RwLockWriteGuard};

use crate::eventfd::{make_nonblocking, signal};
use crate::hardware::InterruptKind;

use super::controller::Controller;
use super::{Options, lock};

/// What is routed: a kind of interrupt, and the eventfds of its vectors.
type Routed = (Option<InterruptKind>, Vec<Option<OwnedFd>>);

pub(super) struct Interrupts {
    routed: RwLock<Routed>,
    /// For each vector, whether the driver waits for it.
    wanted: Box<[Arc<AtomicBool>]>,
    /// The line is routed.
    line: AtomicBool,
    /// The line is masked, by VFIO or its user.
    line_masked: AtomicBool,
    /// INTMS and INTMC (NVMe 2.0 §3.1.3.3, §3.1.3.4).
    mask: AtomicU32,
    /// How many were signalled.
    pub(super) count: AtomicU32,
}

impl Interrupts {
    pub(super) fn new(options: &Options) -> Self {
        let vectors = options.vectors().max(options.msi).max(1);
        Self {
            routed: RwLock::default(),
            wanted: (0..vectors).map(|_| Arc::new(AtomicBool::new(true))).collect(),
            line: AtomicBool::new(false),
            line_masked: AtomicBool::new(false),
            mask: AtomicU32::new(0),
            count: AtomicU32::new(0),
        }
    }

    fn write(&self) -> RwLockWriteGuard<'_, Routed> {
        self.wanted.iter().for_each(|wanted| wanted.store(true, SeqCst));
        self.routed.write().unwrap_or_else(PoisonError::into_inner)
    }

    /// The flag of `vector`. VFIO's user has to unmask a line anyway, so a line has none.
    pub(super) fn wanted(&self, vector: u16) -> Option<Arc<AtomicBool>> {
        self.wanted.get(usize::from(vector)).cloned()
    }

    /// Masks vectors, as a write to INTMS does.
    pub(super) fn set_mask(&self, vectors: u32) {
        self.mask.fetch_or(vectors, SeqCst);
    }

    /// The state after a controller level reset.
    pub(super) fn reset(&self) {
        self.mask.store(0, SeqCst);
    }

    pub(super) fn mask(&self) -> u32 {
        self.mask.load(SeqCst)
    }
}

impl Options {
    /// Number of MSI-X vectors.
    pub(super) fn vectors(&self) -> u16 {
        self.vectors.unwrap_or(self.queues + 1)
    }

    pub(super) fn vectors_of(&self, kind: InterruptKind) -> u16 {
        match kind {
            InterruptKind::MsiX => self.vectors(),
            InterruptKind::Msi => self.msi,
            InterruptKind::Intx => self.intx.into(),
        }
    }
}

impl Controller {
    /// Number of vectors that a completion queue may use with the interrupts that are on.
    pub(super) fn usable_vectors(&self) -> u16 {
        match &*self.interrupts.routed.read().unwrap_or_else(PoisonError::into_inner) {
            (None | Some(InterruptKind::MsiX), _) => self.options.vectors().max(1),
            (Some(InterruptKind::Msi), events) => u16::try_from(events.len()).expect("checked when routed"),
            (Some(InterruptKind::Intx), _) => 1,
        }
    }

    /// Routes vectors 0, 1, ... to duplicates of `events`, and turns this kind of interrupt on; none turns it off.
    pub(super) fn route(&self, kind: InterruptKind, events: &[BorrowedFd<'_>]) -> io::Result<()> {
        if events.len() > self.options.vectors_of(kind).into() {
            return Err(rustix::io::Errno::INVAL.into());
        }
        let owned: Result<Vec<_>, _> = events.iter().map(|event| event.try_clone_to_owned().map(Some)).collect();
        *self.interrupts.write() = ((!events.is_empty()).then_some(kind), owned?);
        self.interrupts.line.store(kind == InterruptKind::Intx && !events.is_empty(), SeqCst);
        self.unmask_line();
        Ok(())
    }

    /// Routes vectors `start`, `start + 1`, ... and leaves the others unchanged.
    ///
    /// The eventfds are a virtual machine's, and the thread that completes commands signals them, so a full one must not block
    /// it. What remains: the virtual machine shares the mode of its eventfds and can make a full one block again, as it can stop
    /// this emulated function in other ways. Under VFIO the kernel signals, and never waits.
    pub(super) fn route_from(
        &self,
        kind: InterruptKind,
        start: usize,
        events: &[Option<BorrowedFd<'_>>],
    ) -> io::Result<()> {
        if start + events.len() > self.options.vectors_of(kind).into() {
            return Err(rustix::io::Errno::INVAL.into());
        }
        let owned = events.iter().map(|event| event.map(|event| event.try_clone_to_owned()).transpose());
        let owned = owned.collect::<Result<Vec<_>, _>>()?;
        owned.iter().flatten().for_each(make_nonblocking);
        let mut routed = self.interrupts.write();
        if routed.0.is_some_and(|on| on != kind) {
            return Err(rustix::io::Errno::INVAL.into());
        }
        routed.0 = Some(kind);
        self.interrupts.line.store(kind == InterruptKind::Intx, SeqCst);
        let end = start + owned.len();
        let len = routed.1.len().max(end);
        routed.1.resize_with(len, || None);
        for (slot, event) in routed.1[start..end].iter_mut().zip(owned) {
            *slot = event;
        }
        drop(routed);
        self.unmask_line();
        Ok(())
    }

    /// Turns interrupts off.
    pub(super) fn unroute(&self) {
        *self.interrupts.write() = Routed::default();
        self.interrupts.line.store(false, SeqCst);
    }

    /// Signals `vector` after a completion.
    pub(super) fn interrupt(&self, vector: u16) {
        if !self.options.interrupts {
            return;
        }
        let interrupts = &self.interrupts;
        if interrupts.line.load(SeqCst) {
            if interrupts.mask() & 1 == 0 && !interrupts.line_masked.swap(true, SeqCst) {
                self.signal_vector(0);
            }
            return;
        }
        if !self.bus_master.load(SeqCst) {
            return;
        }
        // The completion is written before the flag is read. A driver that starts to wait sets the flag before it reads the
        // completion queue, so one of the two sees the other.
        fence(SeqCst);
        if interrupts.wanted.get(usize::from(vector)).is_some_and(|wanted| !wanted.load(SeqCst)) {
            return;
        }
        self.signal_vector(vector);
    }

    fn signal_vector(&self, vector: u16) {
        let routed = self.interrupts.routed.read().unwrap_or_else(PoisonError::into_inner);
        if let Some(Some(event)) = routed.1.get(usize::from(vector)) {
            self.interrupts.count.fetch_add(1, SeqCst);
            signal(event);
        }
    }

    /// Masks the line, on behalf of VFIO's user.
    pub(super) fn mask_line(&self) {
        self.interrupts.line_masked.store(true, SeqCst);
    }

    /// Unmasks the line. It interrupts at once if it is asserted.
    pub(super) fn unmask_line(&self) {
        self.interrupts.line_masked.store(false, SeqCst);
        if self.line_is_asserted() {
            self.interrupt(0);
        }
    }

    /// A write to INTMC.
    pub(super) fn clear_mask(&self, vectors: u32) {
        self.interrupts.mask.fetch_and(!vectors, SeqCst);
        if self.line_is_asserted() {
            self.interrupt(0);
        }
    }

    /// True if a completion queue with interrupts has an entry that the host has not acknowledged, and INTMS does not hide it.
    pub(super) fn line_is_asserted(&self) -> bool {
        let unseen = |slot: &super::queue::CqSlot| {
            let mut cq = lock(&slot.queue);
            let cq = cq.as_mut().filter(|cq| cq.vector.is_some());
            cq.is_some_and(|cq| cq.set_head(slot.head.load(SeqCst)).is_ok() && !cq.is_empty())
        };
        self.interrupts.line.load(SeqCst) && self.interrupts.mask() & 1 == 0 && self.cqs.iter().any(unseen)
    }
}
