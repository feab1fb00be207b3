//! How much a port may receive and send.
//!
//! What goes to the guest leaves the tap through a token bucket. What comes from the guest can be held back only where it
//! leaves an interface too: it is led through an `ifb` of the port's own first.
//!
//! Source: tc-tbf(8), tc-mirred(8), tc-u32(8); the crate for netlink knows none of these.

use std::fmt;
use std::str::FromStr;

use host::program::Program;
use model::ByteSize;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::part::Seen;
use crate::{IfName, NetError};

/// How long a packet may wait before it is dropped.
const LATENCY: &str = "50ms";
/// Least that passes at once: a packet of the largest size that a guest hands over.
const BURST_MIN: u64 = 64 << 10;
/// So many parts of a second pass at once where nothing is said.
const BURST_PARTS: u64 = 50;

/// `AVERAGE`, `AVERAGE,PEAK` or `AVERAGE,PEAK,BURST`, in bytes a second and bytes: `10M,20M,1M`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Rate {
    average: ByteSize,
    peak: Option<ByteSize>,
    burst: Option<ByteSize>,
}

/// The text is no rate.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "{0:?} is no rate: AVERAGE[,PEAK[,BURST]] in bytes a second, for example 10M or 10M,20M,1M; the peak is above the average"
)]
pub struct ParseRateError(pub String);

impl FromStr for Rate {
    type Err = ParseRateError;

    fn from_str(text: &str) -> Result<Self, ParseRateError> {
        let parsed = (|| {
            let sizes: Vec<ByteSize> =
                text.split(',').map(|word| word.trim().parse().ok()).collect::<Option<_>>()?;
            let (average, peak, burst) = match *sizes.as_slice() {
                [average] => (average, None, None),
                [average, peak] => (average, Some(peak), None),
                [average, peak, burst] => (average, Some(peak), Some(burst)),
                _ => return None,
            };
            let fits = average.0 >= 1024 && peak.is_none_or(|peak| peak > average);
            fits.then_some(Self { average, peak, burst })
        })();
        parsed.ok_or_else(|| ParseRateError(text.to_owned()))
    }
}

impl fmt::Display for Rate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let sizes = [Some(self.average), self.peak, self.burst];
        let texts: Vec<String> = sizes.into_iter().flatten().map(|size| size.0.to_string()).collect();
        f.write_str(&texts.join(","))
    }
}

impl TryFrom<String> for Rate {
    type Error = ParseRateError;

    fn try_from(text: String) -> Result<Self, ParseRateError> {
        text.parse()
    }
}

impl From<Rate> for String {
    fn from(rate: Rate) -> Self {
        rate.to_string()
    }
}

impl Rate {
    /// What tc wants of a token bucket.
    fn bucket(&self) -> String {
        let burst = self.burst.map_or(self.average.0 / BURST_PARTS, |burst| burst.0).max(BURST_MIN);
        let peak =
            self.peak.map(|peak| format!(" peakrate {}bit minburst {BURST_MIN}", peak.0.saturating_mul(8)));
        let rate = self.average.0.saturating_mul(8);
        format!("tbf rate {rate}bit burst {burst} latency {LATENCY}{}", peak.unwrap_or_default())
    }
}

/// The rates of one port.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Rates {
    /// The tap.
    pub name: IfName,
    /// What the guest may receive.
    pub inbound: Option<Rate>,
    /// What it may send, and the interface that it is led through.
    pub outbound: Option<(Rate, IfName)>,
}

/// The interface through which a port's guest sends.
pub(crate) fn detour(port: &IfName) -> IfName {
    IfName::derived("sif-", port.as_str())
}

impl Rates {
    pub(crate) fn observe(&self) -> Result<Seen, NetError> {
        let ways = [(self.inbound, &self.name)].into_iter();
        let ways = ways.chain(self.outbound.as_ref().map(|(rate, detour)| (Some(*rate), detour)));
        for (rate, link) in ways.filter_map(|(rate, link)| Some((rate?, link))) {
            let (status, printed) =
                Program::new("tc").args(["-j", "qdisc", "show", "dev", link.as_str(), "root"]).outcome()?;
            if !status.success() {
                return Ok(Seen::Missing);
            }
            let shown: Value = serde_json::from_slice(&printed.stdout).unwrap_or_default();
            let there = shown.as_array().into_iter().flatten().any(|qdisc| {
                qdisc["kind"] == "tbf" && qdisc["options"]["rate"].as_u64() == Some(rate.average.0)
            });
            if !there {
                return Ok(Seen::Differs(format!("{link} has no limit of {} a second", rate.average)));
            }
        }
        Ok(Seen::There)
    }

    /// Sets them. They go with the tap, and with the interface of the detour.
    pub(crate) fn make(&self) -> Result<(), NetError> {
        let tap = &self.name;
        let mut lines = Vec::new();
        if let Some(rate) = &self.inbound {
            lines.push(format!("qdisc replace dev {tap} root {}", rate.bucket()));
        }
        if let Some((rate, detour)) = &self.outbound {
            lines.push(format!("qdisc replace dev {detour} root {}", rate.bucket()));
            lines.push(format!("qdisc replace dev {tap} ingress"));
            lines.push(format!(
                "filter replace dev {tap} parent ffff: protocol all prio 1 handle 800::800 u32 match u32 0 0 \
                 action mirred egress redirect dev {detour}"
            ));
        }
        let input = lines.join("\n") + "\n";
        Program::new("tc").args(["-batch", "-"]).input(input.into_bytes()).run()?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rates_are_read_and_written() {
        for text in ["10485760", "1048576,2097152", "1048576,2097152,65536"] {
            assert_eq!(text.parse::<Rate>().unwrap().to_string(), text);
        }
        assert_eq!("10M".parse::<Rate>().unwrap().average, ByteSize(10 << 20));
        for bad in ["", "0", "10M,5M", "1M,2M,3M,4M", "fast", "1M,,1M"] {
            assert!(bad.parse::<Rate>().is_err(), "{bad}");
        }
        let bucket = "1M,2M".parse::<Rate>().unwrap().bucket();
        assert!(
            bucket.starts_with("tbf rate 8388608bit burst 65536 latency 50ms peakrate 16777216bit"),
            "{bucket}"
        );
    }
}
