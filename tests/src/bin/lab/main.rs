//! The lab by hand.

fn main() {}
