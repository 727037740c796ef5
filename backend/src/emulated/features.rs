//! Get Features and Set Features (NVMe 2.0 §5.15, §5.27). Most features are only stored; a few have an effect.

use super::Options;
use super::event_state::NAMESPACE_NOTICES;
use super::wire::{Entry, Status, high16, low16};

const ARBITRATION: usize = 0x01;
const POWER_MANAGEMENT: usize = 0x02;
const TEMPERATURE_THRESHOLD: usize = 0x04;
const ERROR_RECOVERY: usize = 0x05;
const VOLATILE_WRITE_CACHE: usize = 0x06;
const NUMBER_OF_QUEUES: usize = 0x07;
const INTERRUPT_COALESCING: usize = 0x08;
const INTERRUPT_VECTOR: usize = 0x09;
const WRITE_ATOMICITY: usize = 0x0a;
const ASYNC_EVENTS: usize = 0x0b;

const COUNT: usize = 0x0c;

/// Feature values, indexed by feature identifier.
pub(super) struct Features {
    current: [u32; COUNT],
    default: [u32; COUNT],
    /// Maximum number of I/O queue pairs.
    queues: u16,
    volatile_cache: bool,
}

impl Features {
    pub(super) fn new(options: &Options) -> Self {
        let mut default = [0; COUNT];
        let pairs = u32::from(options.queues - 1);
        default[NUMBER_OF_QUEUES] = pairs << 16 | pairs;
        default[VOLATILE_WRITE_CACHE] = u32::from(options.volatile_cache);
        default[TEMPERATURE_THRESHOLD] = 343; // kelvin
        Self { current: default, default, queues: options.queues, volatile_cache: options.volatile_cache }
    }

    /// The highest identifier of an I/O submission queue.
    pub(super) fn granted_sqs(&self) -> u16 {
        low16(self.current[NUMBER_OF_QUEUES]) + 1
    }

    /// The highest identifier of an I/O completion queue.
    pub(super) fn granted_cqs(&self) -> u16 {
        high16(self.current[NUMBER_OF_QUEUES]) + 1
    }

    pub(super) fn write_cache(&self) -> bool {
        self.current[VOLATILE_WRITE_CACHE] & 1 != 0
    }

    /// True if the host has enabled Namespace Attribute Notices.
    pub(super) fn notices(&self) -> bool {
        self.current[ASYNC_EVENTS] & NAMESPACE_NOTICES != 0
    }

    /// The feature identifier in dword 10, if the feature is supported.
    fn id(&self, entry: &Entry) -> Result<usize, Status> {
        let id = usize::from(entry.cdw(10).to_le_bytes()[0]);
        let supported = match id {
            VOLATILE_WRITE_CACHE => self.volatile_cache,
            ARBITRATION
            | POWER_MANAGEMENT
            | TEMPERATURE_THRESHOLD
            | ERROR_RECOVERY
            | NUMBER_OF_QUEUES
            | INTERRUPT_COALESCING
            | INTERRUPT_VECTOR
            | WRITE_ATOMICITY
            | ASYNC_EVENTS => true,
            _ => false,
        };
        if supported { Ok(id) } else { Err(Status::INVALID_FIELD) }
    }

    /// Dword 0 of Get Features.
    pub(super) fn get(&self, entry: &Entry) -> Result<u32, Status> {
        const CHANGEABLE: u32 = 1 << 2;
        let id = self.id(entry)?;
        if id == INTERRUPT_VECTOR && low16(entry.cdw(11)) > self.queues {
            return Err(Status::INVALID_FIELD);
        }
        match entry.cdw(10) >> 8 & 0b111 {
            0 if id == INTERRUPT_VECTOR => Ok(self.current[id] | entry.cdw(11) & 0xffff),
            0 => Ok(self.current[id]),
            1 | 2 => Ok(self.default[id]),
            3 => Ok(CHANGEABLE),
            _ => Err(Status::INVALID_FIELD),
        }
    }

    /// Dword 0 of Set Features.
    pub(super) fn set(&mut self, entry: &Entry, queues_exist: bool) -> Result<u32, Status> {
        let id = self.id(entry)?;
        let save = entry.cdw(10) >> 31 != 0;
        if save {
            return Err(Status::FEATURE_NOT_SAVEABLE);
        }
        let value = entry.cdw(11);
        match id {
            NUMBER_OF_QUEUES => return self.set_queues(value, queues_exist),
            INTERRUPT_VECTOR if low16(value) > self.queues => return Err(Status::INVALID_FIELD),
            INTERRUPT_VECTOR => {}
            POWER_MANAGEMENT if value & 0b1_1111 != 0 => return Err(Status::INVALID_FIELD), // NPSS is 0
            VOLATILE_WRITE_CACHE => self.current[id] = value & 1,
            _ => self.current[id] = value,
        }
        Ok(0)
    }

    /// Number of Queues (NVMe 2.0 §5.27.1.5). Both counts are zero-based, and 65535 is invalid.
    fn set_queues(&mut self, value: u32, queues_exist: bool) -> Result<u32, Status> {
        if queues_exist {
            return Err(Status::SEQUENCE_ERROR);
        }
        let (submission, completion) = (low16(value), high16(value));
        if submission == u16::MAX || completion == u16::MAX {
            return Err(Status::INVALID_FIELD);
        }
        let granted = |wanted: u16| u32::from(wanted.min(self.queues - 1));
        let result = granted(completion) << 16 | granted(submission);
        self.current[NUMBER_OF_QUEUES] = result;
        Ok(result)
    }
}
