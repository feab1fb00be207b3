//! Medians, percentiles and the machine.

use std::process::Command;

/// The value below which the share `of` (0 to 1) of `values` lies.
pub fn percentile(values: &[f64], of: f64) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let last = sorted.len().saturating_sub(1);
    // Nearest rank: a p99 of 200 rounds is the second largest.
    let rank = (of * sorted.len() as f64).ceil() as usize;
    sorted.get(rank.saturating_sub(1).min(last)).copied().unwrap_or(f64::NAN)
}

/// Milliseconds with the digits that matter.
pub fn ms(seconds: f64) -> String {
    let value = seconds * 1000.0;
    if value < 10.0 { format!("{value:.2}") } else { format!("{value:.1}") }
}

/// The machine in one line.
pub fn machine() -> String {
    let read = |path: &str| std::fs::read_to_string(path).unwrap_or_default();
    let info = read("/proc/cpuinfo");
    let model = info.lines().find_map(|line| line.strip_prefix("model name")?.split_once(": "));
    let cores = info.lines().filter(|line| line.starts_with("processor")).count();
    let kernel = read("/proc/sys/kernel/osrelease");
    let model = model.map_or("unknown CPU", |(_, name)| name);
    format!("{cores} × {model}, Linux {}", kernel.trim())
}

/// As [`machine`], where guests run on it.
pub fn machine_with_guests() -> String {
    format!("{}, guests under `-accel tcg`", machine())
}

/// The first line of a program's `--version`.
pub fn version(program: &str) -> String {
    let asked = Command::new(program).arg("--version").output();
    let text = asked.map(|output| String::from_utf8_lossy(&output.stdout).into_owned()).unwrap_or_default();
    text.lines().next().unwrap_or("not installed").to_owned()
}
