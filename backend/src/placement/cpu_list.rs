//! A set of CPUs in the kernel's list format, such as `2-5,8` (Linux, Documentation/admin-guide/cputopology.rst).

use std::fmt;
use std::str::FromStr;

use rustix::thread::CpuSet;

/// See the top of this file. It has as many CPUs as the C library's `cpu_set_t`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CpuList {
    words: [u64; CpuList::LIMIT / 64],
}

/// The text is not a list of CPUs.
#[derive(Debug, thiserror::Error)]
#[error("`{0}` is not a list of CPUs; wanted numbers below {limit} and ranges, such as 2-5,8", limit = CpuList::LIMIT)]
pub struct NotACpuList(String);

impl CpuList {
    /// One more than the highest number.
    pub const LIMIT: usize = CpuSet::MAX_CPU;
    /// No CPU.
    pub const EMPTY: Self = Self { words: [0; CpuList::LIMIT / 64] };
    /// Every CPU, whether it exists or not.
    pub const ALL: Self = Self { words: [u64::MAX; CpuList::LIMIT / 64] };

    /// Adds a CPU below [`Self::LIMIT`].
    pub fn add(&mut self, cpu: usize) {
        self.words[cpu / 64] |= 1 << (cpu % 64);
    }

    /// Whether the CPU is in it.
    #[must_use]
    pub fn contains(&self, cpu: usize) -> bool {
        self.words.get(cpu / 64).is_some_and(|word| word >> (cpu % 64) & 1 == 1)
    }

    /// The CPUs in ascending order.
    pub fn iter(&self) -> impl Iterator<Item = usize> {
        (0..Self::LIMIT).filter(|&cpu| self.contains(cpu))
    }

    /// Number of CPUs.
    #[must_use]
    pub fn count(&self) -> usize {
        self.iter().count()
    }

    /// True without any CPU.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        *self == Self::EMPTY
    }

    /// The CPUs that are in both.
    #[must_use]
    pub fn common(&self, other: &Self) -> Self {
        Self { words: std::array::from_fn(|n| self.words[n] & other.words[n]) }
    }

    /// As a file of sysfs has it: an empty list is an empty line.
    ///
    /// # Errors
    /// The text is something else.
    pub fn of_sysfs(text: &str) -> Result<Self, NotACpuList> {
        let text = text.trim();
        if text.is_empty() { Ok(Self::EMPTY) } else { text.parse() }
    }
}

impl FromIterator<usize> for CpuList {
    fn from_iter<T: IntoIterator<Item = usize>>(cpus: T) -> Self {
        let mut list = Self::EMPTY;
        cpus.into_iter().for_each(|cpu| list.add(cpu));
        list
    }
}

impl FromStr for CpuList {
    type Err = NotACpuList;

    fn from_str(text: &str) -> Result<Self, NotACpuList> {
        let mut list = Self::EMPTY;
        for part in text.split(',') {
            let (first, last) = range(part).ok_or_else(|| NotACpuList(text.to_owned()))?;
            (first..=last).for_each(|cpu| list.add(cpu));
        }
        Ok(list)
    }
}

/// First and last CPU of `3` or `2-5`.
fn range(text: &str) -> Option<(usize, usize)> {
    let (first, last) = text.split_once('-').unwrap_or((text, text));
    let (first, last) = (number(first)?, number(last)?);
    (first <= last).then_some((first, last))
}

/// Digits without a sign.
fn number(text: &str) -> Option<usize> {
    let digits_only = text.bytes().all(|byte| byte.is_ascii_digit());
    text.parse().ok().filter(|&cpu| digits_only && cpu < CpuList::LIMIT)
}

impl fmt::Display for CpuList {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.is_empty() {
            return f.write_str("none");
        }
        let mut separator = "";
        let starts = self.iter().filter(|&cpu| cpu == 0 || !self.contains(cpu - 1));
        for first in starts {
            let last = (first..).find(|&cpu| !self.contains(cpu + 1)).unwrap_or(first);
            write!(f, "{separator}{first}")?;
            if last != first {
                write!(f, "-{last}")?;
            }
            separator = ",";
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_list_has_single_cpus_and_ranges() {
        let list: CpuList = "2-5,8,1023".parse().unwrap();
        assert_eq!(list.iter().collect::<Vec<_>>(), [2, 3, 4, 5, 8, 1023]);
        assert_eq!((list.count(), list.to_string().as_str()), (6, "2-5,8,1023"));
        assert_eq!("3,2,2-3".parse::<CpuList>().unwrap().to_string(), "2-3");
    }

    #[test]
    fn what_is_no_list_is_refused_with_an_example() {
        for text in ["", "a", "1,", ",1", "1024", "0-1024", "5-2", "1-", "-1", "+1", "1 ", "1-2-3", "0-6:2/3", "1;2"] {
            let error = text.parse::<CpuList>().unwrap_err().to_string();
            assert!(error.contains(&format!("`{text}` is not")) && error.contains("such as 2-5,8"), "{error}");
        }
    }

    #[test]
    fn an_empty_line_of_sysfs_is_a_list_without_a_cpu() {
        assert_eq!(CpuList::of_sysfs("\n").unwrap(), CpuList::EMPTY);
        assert_eq!(CpuList::of_sysfs("0-1\n").unwrap().to_string(), "0-1");
        assert!(CpuList::of_sysfs("0-1 2\n").is_err());
        assert_eq!(CpuList::EMPTY.to_string(), "none");
        assert_eq!(CpuList::ALL.to_string(), "0-1023");
    }

    proptest! {
        #[test]
        fn a_list_is_read_as_it_is_written(cpus in proptest::collection::btree_set(0..CpuList::LIMIT, 1..40)) {
            let list: CpuList = cpus.iter().copied().collect();
            prop_assert!(list.iter().eq(cpus));
            prop_assert_eq!(list.to_string().parse::<CpuList>().unwrap(), list);
        }
    }
}
