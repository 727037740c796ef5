//! The text of the saved session, in a file in memory that the service manager keeps. It is replaced as a whole: a process that is
//! killed in between leaves the text before.
//!
//! ```text
//! 0: busy, which of the two texts is valid (u32 each)      4096: length (u32), text      4096 + 256 KiB: the other
//! ```

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt;

use rustix::fs::{MemfdFlags, ftruncate, memfd_create};

/// Room for a text and its length, bytes.
const ROOM: u64 = 256 << 10;
const TEXTS: u64 = 4096;
const LENGTH: u64 = 4;

/// See the top of this file.
#[derive(Debug)]
pub(super) struct StateFile {
    file: File,
    /// The valid text: 0 or 1.
    valid: u32,
}

/// What a process has left.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Left {
    /// It was reading or answering a message, or saving what that had changed.
    InAMessage,
    /// The text; empty if there was no session.
    Text(Vec<u8>),
}

impl StateFile {
    pub(super) fn create() -> io::Result<Self> {
        let file = memfd_create("saved-session", MemfdFlags::CLOEXEC)?;
        ftruncate(&file, TEXTS + 2 * ROOM)?;
        Ok(Self { file: file.into(), valid: 0 })
    }

    /// The file of the process before.
    pub(super) fn open(file: OwnedFd) -> io::Result<Self> {
        let file = File::from(file);
        let valid = read_u32(&file, 4)? & 1;
        Ok(Self { file, valid })
    }

    /// A message is about to be read: the text will not be true any more.
    pub(super) fn set_busy(&self) -> io::Result<()> {
        self.file.write_all_at(&1_u32.to_ne_bytes(), 0)
    }

    /// Replaces the text, which is true now.
    pub(super) fn replace(&mut self, text: &[u8]) -> io::Result<()> {
        let length = u32::try_from(text.len()).ok().filter(|length| u64::from(*length) + LENGTH <= ROOM);
        let length = length.ok_or(io::ErrorKind::FileTooLarge)?;
        let other = self.valid ^ 1;
        let at = TEXTS + u64::from(other) * ROOM;
        self.file.write_all_at(text, at + LENGTH)?;
        self.file.write_all_at(&length.to_ne_bytes(), at)?;
        let header = [0, other].map(u32::to_ne_bytes).concat();
        self.file.write_all_at(&header, 0)?;
        self.valid = other;
        Ok(())
    }

    /// What the process before has left.
    pub(super) fn left(&self) -> io::Result<Left> {
        if read_u32(&self.file, 0)? != 0 {
            return Ok(Left::InAMessage);
        }
        let at = TEXTS + u64::from(self.valid) * ROOM;
        let length = u64::from(read_u32(&self.file, at)?);
        if length + LENGTH > ROOM {
            return Err(io::ErrorKind::InvalidData.into());
        }
        let mut text = vec![0; usize::try_from(length).map_err(io::Error::other)?];
        self.file.read_exact_at(&mut text, at + LENGTH)?;
        Ok(Left::Text(text))
    }
}

impl AsFd for StateFile {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

fn read_u32(file: &File, at: u64) -> io::Result<u32> {
    let mut bytes = [0; 4];
    file.read_exact_at(&mut bytes, at)?;
    Ok(u32::from_ne_bytes(bytes))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As the next process finds it.
    fn left(state: &StateFile) -> Left {
        StateFile::open(state.file.try_clone().unwrap().into()).unwrap().left().unwrap()
    }

    #[test]
    fn the_next_process_finds_the_last_text() {
        let mut state = StateFile::create().unwrap();
        assert_eq!(left(&state), Left::Text(Vec::new()));
        for text in [&b"one"[..], b"a longer one", b"2"] {
            state.replace(text).unwrap();
            assert_eq!(left(&state), Left::Text(text.to_vec()));
        }
    }

    #[test]
    fn a_process_that_ends_in_a_message_is_noticed_until_the_text_is_true_again() {
        let mut state = StateFile::create().unwrap();
        state.replace(b"one").unwrap();
        state.set_busy().unwrap();
        assert_eq!(left(&state), Left::InAMessage);
        state.replace(b"two").unwrap();
        assert_eq!(left(&state), Left::Text(b"two".to_vec()));
    }

    #[test]
    fn the_text_before_stays_valid_while_the_next_is_written() {
        let mut state = StateFile::create().unwrap();
        state.replace(b"one").unwrap();
        // All but the last step of a replacement.
        let at = TEXTS + u64::from(state.valid ^ 1) * ROOM;
        state.file.write_all_at(b"XXX", at + LENGTH).unwrap();
        state.file.write_all_at(&3_u32.to_ne_bytes(), at).unwrap();

        assert_eq!(left(&state), Left::Text(b"one".to_vec()));
    }

    #[test]
    fn a_text_without_room_is_refused_and_any_content_is_safe_to_open() {
        let mut state = StateFile::create().unwrap();
        assert!(state.replace(&vec![0; ROOM as usize]).is_err());
        state.file.write_all_at(&[0xff; 8], 4).unwrap();
        state.file.write_all_at(&[0xff; 4], TEXTS + ROOM).unwrap();
        let opened = StateFile::open(state.file.try_clone().unwrap().into()).unwrap();
        assert!(opened.left().is_err());
        let (pipe, _writer) = rustix::pipe::pipe().unwrap();
        assert!(StateFile::open(pipe).is_err());
    }
}
