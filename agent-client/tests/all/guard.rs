//! The thaw guard as a process.
