//! Drives the emulated host machine for tests.
