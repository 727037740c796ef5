//! The content of a block. Each sector says which write it belongs to and carries a checksum, so any mixture of writes shows.
//!
//! ```text
//! sector   0 magic   8 block   16 sequence   24 writer, sector   32 filling from all of these …   504 checksum
//! ```

use crate::random::Random;

/// Bytes of a block. Each is one request's, or part of one.
pub const BLOCK: usize = 4096;
/// Bytes of a sector (virtio 1.2 §5.2.6).
pub(super) const SECTOR: usize = 512;
const MAGIC: u64 = 0x7672_6974_652d_6964;
const WORDS: usize = SECTOR / 8;

/// The write that a block holds. Sequence 0 is no write: the block is zero.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Stamp {
    /// Number of the write, over all queues, from 1.
    pub sequence: u64,
    /// The queue that it was submitted to.
    pub writer: u16,
}

/// What a sector holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Found {
    /// A sector of this block of this write.
    Write(u64, Stamp),
    /// Something that no write wrote.
    Garbage,
}

fn words(block: u64, sector: usize, stamp: Stamp) -> [u64; WORDS] {
    let mut words = [0; WORDS];
    if stamp.sequence == 0 {
        return words;
    }
    words[..4].copy_from_slice(&[MAGIC, block, stamp.sequence, u64::from(stamp.writer) << 32 | sector as u64]);
    let seed = Random::new(block << 40 ^ (sector as u64) << 32 ^ stamp.sequence).draw();
    for (word, rotation) in words[4..WORDS - 1].iter_mut().zip(0..) {
        *word = seed.rotate_left(rotation);
    }
    words[WORDS - 1] = checksum(&words);
    words
}

/// Of all words but the last.
fn checksum(words: &[u64; WORDS]) -> u64 {
    words[..WORDS - 1].iter().fold(1, |sum: u64, word| (sum ^ word).wrapping_mul(0x0000_0100_0000_01b3).rotate_left(7))
}

/// Fills `bytes` with the content of `block` after the write `stamp`.
pub(super) fn fill(block: u64, stamp: Stamp, bytes: &mut [u8]) {
    for (sector, bytes) in bytes.chunks_exact_mut(SECTOR).enumerate() {
        for (bytes, word) in bytes.chunks_exact_mut(8).zip(words(block, sector, stamp)) {
            bytes.copy_from_slice(&word.to_le_bytes());
        }
    }
}

/// True if `bytes` are the content of `block` after the write `stamp`.
pub(super) fn is(block: u64, stamp: Stamp, bytes: &[u8]) -> bool {
    let mut wanted = [0; BLOCK];
    fill(block, stamp, &mut wanted);
    wanted == bytes
}

/// What each sector of a block holds.
pub(super) fn read(block: u64, bytes: &[u8]) -> impl Iterator<Item = Found> {
    bytes.chunks_exact(SECTOR).enumerate().map(move |(at, sector)| {
        let mut found = [0; WORDS];
        for (word, bytes) in found.iter_mut().zip(sector.chunks_exact(8)) {
            *word = u64::from_le_bytes(bytes.try_into().expect("eight bytes"));
        }
        let [magic, of, sequence, place, ..] = found;
        let writer = u16::try_from(place >> 32).unwrap_or(u16::MAX);
        if found == [0; WORDS] {
            Found::Write(block, Stamp::default())
        } else if magic == MAGIC && found[WORDS - 1] == checksum(&found) && place & 0xffff_ffff == at as u64 {
            Found::Write(of, Stamp { sequence, writer })
        } else {
            Found::Garbage
        }
    })
}
