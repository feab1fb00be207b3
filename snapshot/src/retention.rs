//! Which snapshots stay, and why: a pure function of rules and times.
//!
//! The rules are restic's. Each rule looks at the snapshots from the newest to the oldest, and keeps the newest one of
//! each period until it has kept as many as it may; periods without a snapshot do not count. One that may keep more
//! than there are periods keeps the oldest snapshot too. A snapshot stays if any rule keeps it; so several rules may
//! keep one snapshot, and adding a rule never removes one.
//!
//! Source: restic's manual, "Removing snapshots according to a policy"; restic-forget(1).

use jiff::civil::ISOWeekDate;
use jiff::tz::TimeZone;
use jiff::{SignedDuration, Timestamp, Zoned};
use model::{Name, SnapshotId, SnapshotRecord};
use serde::Serialize;

/// What is to be kept. With no rule at all everything would go.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Rules {
    /// So many of the newest.
    pub last: u32,
    /// The newest of each hour, for so many hours.
    pub hourly: u32,
    /// The newest of each day.
    pub daily: u32,
    /// The newest of each ISO week, which begins on a Monday.
    pub weekly: u32,
    /// The newest of each month.
    pub monthly: u32,
    /// The newest of each year.
    pub yearly: u32,
    /// All that are at most so much older than the newest.
    pub within: Option<SignedDuration>,
    /// All that have one of these labels with this value.
    pub labels: Vec<(String, String)>,
}

/// What becomes of one snapshot.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Verdict {
    /// The snapshot.
    pub id: SnapshotId,
    /// Its name.
    pub name: Name,
    /// When it was taken.
    pub created: Timestamp,
    /// Why it stays; empty if it goes.
    pub kept_for: Vec<String>,
}

impl Verdict {
    /// Whether it stays.
    pub fn stays(&self) -> bool {
        !self.kept_for.is_empty()
    }
}

/// Judges `snapshots`; newest first. Periods are those of the calendar in `zone`.
pub fn judge<'a>(
    snapshots: impl IntoIterator<Item = &'a SnapshotRecord>,
    rules: &Rules,
    zone: &TimeZone,
) -> Vec<Verdict> {
    let mut sorted: Vec<&SnapshotRecord> = snapshots.into_iter().collect();
    // Entered later means newer, where clocks do not tell.
    sorted.reverse();
    sorted.sort_by_key(|snapshot| std::cmp::Reverse(snapshot.created));
    let newest = sorted.first().map(|snapshot| snapshot.created);
    let mut periods = Periods::of(rules);
    let oldest = sorted.last().map(|snapshot| snapshot.id);
    let verdict = |snapshot: &SnapshotRecord| {
        let at = snapshot.created.to_zoned(zone.clone());
        let of_periods = periods.take(&at, oldest == Some(snapshot.id));
        Verdict {
            id: snapshot.id,
            name: snapshot.name.clone(),
            created: snapshot.created,
            kept_for: reasons(snapshot, rules, newest, of_periods),
        }
    };
    sorted.into_iter().map(verdict).collect()
}

fn reasons(
    snapshot: &SnapshotRecord,
    rules: &Rules,
    newest: Option<Timestamp>,
    of_periods: Vec<String>,
) -> Vec<String> {
    let mut reasons = of_periods;
    let age = newest.map(|newest| newest.duration_since(snapshot.created));
    if let (Some(within), Some(age)) = (rules.within, age)
        && age <= within
    {
        reasons.push("within".into());
    }
    let has = |key: &str, value: &str| snapshot.labels.get(key).is_some_and(|found| found == value);
    for (key, value) in rules.labels.iter().filter(|(key, value)| has(key, value)) {
        reasons.push(format!("label {key}={value}"));
    }
    if snapshot.protected {
        reasons.push("protected".into());
    }
    reasons
}

/// Each rule about periods with how many it may still keep, and the period that it kept last.
struct Periods(Vec<Period>);

struct Period {
    name: &'static str,
    left: u32,
    key: fn(&Zoned) -> String,
    last: Option<String>,
}

impl Periods {
    fn of(rules: &Rules) -> Self {
        let week = |at: &Zoned| {
            let date: ISOWeekDate = at.date().iso_week_date();
            format!("{}-{}", date.year(), date.week())
        };
        let period = |name, left, key| Period { name, left, key, last: None };
        Self(vec![
            // Each snapshot is a period of its own.
            period("last", rules.last, |_| String::new()),
            period("hourly", rules.hourly, |at| at.strftime("%Y-%m-%d %H").to_string()),
            period("daily", rules.daily, |at| at.strftime("%Y-%m-%d").to_string()),
            period("weekly", rules.weekly, week),
            period("monthly", rules.monthly, |at| at.strftime("%Y-%m").to_string()),
            period("yearly", rules.yearly, |at| at.strftime("%Y").to_string()),
        ])
    }

    /// The rules that keep the next older snapshot, which was taken at `at`.
    fn take(&mut self, at: &Zoned, is_oldest: bool) -> Vec<String> {
        let mut kept = Vec::new();
        for period in self.0.iter_mut().filter(|period| period.left > 0) {
            let key = (period.key)(at);
            if key.is_empty() || period.last.as_ref() != Some(&key) {
                period.left -= 1;
                period.last = Some(key);
                kept.push(period.name.to_owned());
            } else if is_oldest {
                kept.push(format!("oldest {}", period.name));
            }
        }
        kept
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    fn taken(bits: u64, created: &str) -> SnapshotRecord {
        SnapshotRecord::new(
            SnapshotId::from_bits(bits),
            "vm1".parse().unwrap(),
            format!("s{bits}").parse().unwrap(),
            created.parse().unwrap(),
        )
    }

    fn stays(verdicts: &[Verdict]) -> Vec<&str> {
        verdicts.iter().filter(|verdict| verdict.stays()).map(|verdict| verdict.name.as_str()).collect()
    }

    /// The example of restic's manual for `--keep-daily`: days without a snapshot do not count.
    #[test]
    fn days_without_a_snapshot_do_not_count() {
        let snapshots = [
            taken(1, "2026-09-01T11:00:00Z"),
            taken(2, "2026-09-02T11:00:00Z"),
            taken(3, "2026-09-08T08:00:00Z"),
            taken(4, "2026-09-08T11:00:00Z"),
            taken(5, "2026-09-11T11:00:00Z"),
        ];
        let rules = Rules { daily: 3, ..Rules::default() };
        assert_eq!(stays(&judge(&snapshots, &rules, &TimeZone::UTC)), ["s5", "s4", "s2"]);
    }

    #[test]
    fn every_rule_looks_at_all_snapshots() {
        let snapshots: Vec<_> = (1..=60)
            .map(|day| {
                let date =
                    jiff::civil::date(2026, 1, 1).checked_add(jiff::Span::new().days(day - 1)).unwrap();
                taken(u64::try_from(day).unwrap(), &format!("{date}T12:00:00Z"))
            })
            .collect();
        let rules = Rules { last: 1, weekly: 2, monthly: 2, yearly: 1, ..Rules::default() };
        let verdicts = judge(&snapshots, &rules, &TimeZone::UTC);
        // 1 March 2026 is a Sunday, and the newest of its week, month and year.
        assert_eq!(verdicts[0].kept_for, ["last", "weekly", "monthly", "yearly"]);
        assert_eq!(stays(&verdicts), ["s60", "s59", "s53"].map(|name| name).to_vec());
    }

    #[test]
    fn a_rule_that_may_keep_more_keeps_the_oldest() {
        let snapshots = [
            taken(1, "2026-09-01T11:00:00Z"),
            taken(2, "2026-09-02T11:00:00Z"),
            taken(3, "2026-09-03T11:00:00Z"),
        ];
        let rules = Rules { monthly: 2, ..Rules::default() };
        let verdicts = judge(&snapshots, &rules, &TimeZone::UTC);
        let why: Vec<_> = verdicts.iter().map(|verdict| verdict.kept_for.join(" ")).collect();
        assert_eq!(why, ["monthly", "", "oldest monthly"]);
    }

    #[test]
    fn the_calendar_is_that_of_the_zone() {
        let snapshots = [
            taken(1, "2026-09-01T21:30:00Z"),
            taken(2, "2026-09-01T22:30:00Z"),
            taken(3, "2026-09-01T23:30:00Z"),
        ];
        let rules = Rules { daily: 2, ..Rules::default() };
        // One day, and the oldest of it; then two days.
        assert_eq!(stays(&judge(&snapshots, &rules, &TimeZone::UTC)), ["s3", "s1"]);
        let berlin = TimeZone::fixed(jiff::tz::offset(1));
        assert_eq!(stays(&judge(&snapshots, &rules, &berlin)), ["s3", "s2"]);
    }

    #[test]
    fn labels_ages_and_protection_keep() {
        let mut snapshots = vec![
            taken(1, "2026-09-01T10:00:00Z"),
            taken(2, "2026-09-02T10:00:00Z"),
            taken(3, "2026-09-03T10:00:00Z"),
            taken(4, "2026-09-03T11:00:00Z"),
        ];
        snapshots[0].protected = true;
        snapshots[1].labels.insert("job".into(), "keep".into());
        let labels = vec![("job".to_owned(), "keep".to_owned()), ("job".into(), "other".into())];
        let within = Some(SignedDuration::from_hours(1));
        let verdicts = judge(&snapshots, &Rules { within, labels, ..Rules::default() }, &TimeZone::UTC);
        let why: Vec<_> = verdicts.iter().map(|verdict| verdict.kept_for.join(" ")).collect();
        assert_eq!(why, ["within", "within", "label job=keep", "protected"]);
    }

    fn any_snapshots() -> impl Strategy<Value = Vec<SnapshotRecord>> {
        let second = 0_i64..40_000_000;
        prop::collection::vec((second, any::<bool>()), 0..40).prop_map(|times| {
            let made = times.into_iter().enumerate().map(|(bits, (second, protected))| {
                let created = Timestamp::from_second(1_700_000_000 + second).unwrap().to_string();
                SnapshotRecord { protected: protected && bits % 7 == 0, ..taken(bits as u64, &created) }
            });
            made.collect()
        })
    }

    fn any_rules() -> impl Strategy<Value = Rules> {
        (0_u32..5, 0_u32..5, 0_u32..5, 0_u32..5, 0_u32..5, 0_u32..3).prop_map(
            |(last, hourly, daily, weekly, monthly, yearly)| Rules {
                last,
                hourly,
                daily,
                weekly,
                monthly,
                yearly,
                ..Rules::default()
            },
        )
    }

    proptest! {
        #[test]
        fn laws_hold(snapshots in any_snapshots(), rules in any_rules(), more in any_rules()) {
            let zone = TimeZone::UTC;
            let verdicts = judge(&snapshots, &rules, &zone);
            prop_assert_eq!(verdicts.len(), snapshots.len());
            let kept = |verdicts: &[Verdict]| -> BTreeSet<SnapshotId> {
                verdicts.iter().filter(|verdict| verdict.stays()).map(|verdict| verdict.id).collect()
            };
            let staying = kept(&verdicts);
            // What is protected stays, and so does the newest if any rule says anything.
            prop_assert!(snapshots.iter().all(|snapshot| !snapshot.protected || staying.contains(&snapshot.id)));
            let some = rules != Rules::default();
            prop_assert!(!some || verdicts.first().is_none_or(Verdict::stays));
            // A rule keeps as many as it may, or one of each period.
            let days: BTreeSet<String> =
                snapshots.iter().map(|snapshot| snapshot.created.strftime("%F").to_string()).collect();
            let daily = verdicts.iter().filter(|v| v.kept_for.iter().any(|reason| reason == "daily")).count();
            prop_assert_eq!(daily, days.len().min(rules.daily as usize));
            // Again, with what stayed: nothing goes.
            let left: Vec<_> = snapshots.iter().filter(|s| staying.contains(&s.id)).cloned().collect();
            prop_assert_eq!(&kept(&judge(&left, &rules, &zone)), &staying);
            // More of any rule removes nothing.
            let wider = Rules {
                last: rules.last + more.last,
                hourly: rules.hourly + more.hourly,
                daily: rules.daily + more.daily,
                weekly: rules.weekly + more.weekly,
                monthly: rules.monthly + more.monthly,
                yearly: rules.yearly + more.yearly,
                ..Rules::default()
            };
            prop_assert!(kept(&judge(&snapshots, &wider, &zone)).is_superset(&staying));
        }
    }
}
