//! Times and durations for people.

use jiff::Timestamp;
use jiff::tz::TimeZone;

/// The local time to the second.
pub fn local(time: Timestamp) -> String {
    time.to_zoned(TimeZone::system()).strftime("%Y-%m-%d %H:%M:%S").to_string()
}

/// How long ago, in its largest whole unit.
pub fn ago(time: Timestamp, now: Timestamp) -> String {
    let seconds = now.duration_since(time).as_secs().max(0);
    let (count, unit) = match seconds {
        0..60 => (seconds, "s"),
        60..3600 => (seconds / 60, "min"),
        3600..86_400 => (seconds / 3600, "h"),
        _ => (seconds / 86_400, "d"),
    };
    format!("{count} {unit} ago")
}

/// Seconds with as many digits as matter: `8.4 ms`, `1.2 s`.
pub fn seconds(seconds: f64) -> String {
    if seconds < 1.0 { format!("{:.1} ms", seconds * 1000.0) } else { format!("{seconds:.1} s") }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ages_have_one_unit() {
        let now = Timestamp::from_second(1_000_000).unwrap();
        let age = |seconds: i64| ago(Timestamp::from_second(1_000_000 - seconds).unwrap(), now);
        assert_eq!(
            [age(0), age(59), age(61), age(7200), age(90_000)],
            ["0 s ago", "59 s ago", "1 min ago", "2 h ago", "1 d ago"]
        );
        // A clock that was set back makes nothing younger than now.
        assert_eq!(age(-5), "0 s ago");
        assert_eq!([seconds(0.0084), seconds(1.23)], ["8.4 ms", "1.2 s"]);
    }
}
