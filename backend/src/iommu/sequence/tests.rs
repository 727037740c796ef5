//! The order of the steps where there is no staging space, as with VFIO type1. The emulated spaces test the other regimes.

use std::cell::RefCell;
use std::sync::Arc;

use vm_memory::MmapRegion;

use super::*;

/// Records the steps.
#[derive(Default)]
struct Recorder(RefCell<Vec<String>>);

impl Recorder {
    fn record(&self, step: &str) -> io::Result<()> {
        self.0.borrow_mut().push(step.to_owned());
        Ok(())
    }

    fn take(&self) -> Vec<String> {
        self.0.take()
    }
}

impl Steps for Recorder {
    fn map(&self, space: Space, _: Piece<'_>) -> io::Result<()> {
        self.record(&format!("map {space:?}"))
    }

    fn copy(&self, _: Space, to: Space, _: Piece<'_>) -> io::Result<()> {
        self.record(&format!("copy to {to:?}"))
    }

    fn unmap(&self, space: Space, _: Span<Iova>) -> io::Result<()> {
        self.record(&format!("unmap {space:?}"))
    }

    fn flush(&self, _: Piece<'_>) {
        self.record("flush").unwrap();
    }

    fn detach(&self) -> io::Result<()> {
        self.record("detach")
    }

    fn attach(&self) -> io::Result<()> {
        self.record("attach")
    }
}

fn memory() -> SharedMemory {
    SharedMemory::of(Arc::new(MmapRegion::new(4096).unwrap()))
}

fn piece(shared: &SharedMemory) -> Piece<'_> {
    let span = Span::new(Iova(0x1000), 4096).unwrap();
    Piece { span, shared, offset: 0, file: None, writable: true }
}

#[test]
fn without_staging_memory_is_flushed_after_the_map_and_before_the_unmap() {
    let (sequence, recorder, shared) = (Sequence::without_staging(true), Recorder::default(), memory());

    sequence.map(&recorder, piece(&shared)).unwrap();
    let map = recorder.take();
    sequence.unmap(&recorder, piece(&shared)).unwrap();

    assert_eq!(map, ["map Live", "flush"]);
    assert_eq!(recorder.take(), ["flush", "unmap Live"]);
    assert_eq!((sequence.order(), sequence.cost().staged), ("mapped, flushed, published", 0));
}

#[test]
fn without_staging_nothing_is_mapped_if_it_must_be_flushed_before_the_map() {
    let (sequence, recorder, shared) = (Sequence::without_staging(true), Recorder::default(), memory());
    sequence.require_flush_before_map();

    let (step, error) = sequence.map(&recorder, piece(&shared)).unwrap_err();

    assert_eq!((step, error.raw_os_error()), (FLUSH_BEFORE_MAP, Some(libc::ENODEV)));
    assert_eq!(recorder.take(), [""; 0]);
}

#[test]
fn without_staging_coherent_memory_is_not_flushed() {
    let (sequence, recorder, shared) = (Sequence::without_staging(false), Recorder::default(), memory());
    sequence.require_flush_before_map();

    sequence.map(&recorder, piece(&shared)).unwrap();
    sequence.unmap(&recorder, piece(&shared)).unwrap();

    assert_eq!(recorder.take(), ["map Live", "unmap Live"]);
    assert_eq!(sequence.order(), "mapped");
}
