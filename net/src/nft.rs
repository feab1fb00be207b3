//! Tables of nftables: one of ours for each network and family, replaced at once and removed whole.
//!
//! Source: libnftables-json(5), nft(8).

use host::program::{Program, ProgramError};
use model::Name;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::part::Seen;
use crate::{IfName, NetError};

/// A table with its chains and rules.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Table {
    /// `inet` for what is routed, `bridge` for what is switched.
    pub family: String,
    /// The network that it belongs to.
    pub network: Name,
    /// Chains, sets and rules in the order in which they are added, as libnftables-json(5) has them, without family and
    /// table.
    pub objects: Vec<Value>,
}

/// A chain into which the kernel leads packets.
pub(crate) fn base_chain(name: &str, kind: &str, hook: &str, priority: i32) -> Value {
    json!({ "chain": { "name": name, "type": kind, "hook": hook, "prio": priority, "policy": "accept" } })
}

/// A rule at the end of a chain.
pub(crate) fn rule(chain: &str, expressions: impl Into<Value>) -> Value {
    let expressions: Value = expressions.into();
    json!({ "rule": { "chain": chain, "expr": expressions } })
}

/// A forward chain in which a bridge is fenced: what stays within passes, and what `passing` lets through, nothing else.
pub(crate) fn fence(bridge: &IfName, passing: impl IntoIterator<Item = Vec<Value>>) -> Vec<Value> {
    const CHAIN: &str = "forward";
    let (inward, outward) = (|| meta("oifname", "==", bridge), || meta("iifname", "==", bridge));
    // What stays in the bridge passes here too where the host filters bridged packets.
    let within = vec![outward(), inward(), accept()];
    let rejected = [vec![outward(), reject()], vec![inward(), reject()]];
    let rules = [within].into_iter().chain(passing).chain(rejected);
    let chain = base_chain(CHAIN, "filter", "forward", 0);
    [chain].into_iter().chain(rules.map(|expressions| rule(CHAIN, expressions))).collect()
}

/// `meta KEY == VALUE`, for example an interface's name.
pub(crate) fn meta(key: &str, operator: &str, value: impl Serialize) -> Value {
    json!({ "match": { "op": operator, "left": { "meta": { "key": key } }, "right": json!(value) } })
}

/// `PROTOCOL FIELD == VALUE`.
pub(crate) fn payload(protocol: &str, field: &str, operator: &str, value: impl Serialize) -> Value {
    let left = json!({ "payload": { "protocol": protocol, "field": field } });
    json!({ "match": { "op": operator, "left": left, "right": json!(value) } })
}

/// A subnet, as a match has it.
pub(crate) fn prefix(subnet: &ipnet::IpNet) -> Value {
    json!({ "prefix": { "addr": subnet.network().to_string(), "len": subnet.prefix_len() } })
}

/// What belongs to a connection that the other side let begin.
pub(crate) fn established() -> Value {
    let left = json!({ "ct": { "key": "state" } });
    json!({ "match": { "op": "in", "left": left, "right": ["established", "related"] } })
}

pub(crate) fn accept() -> Value {
    json!({ "accept": null })
}

pub(crate) fn drop() -> Value {
    json!({ "drop": null })
}

pub(crate) fn masquerade() -> Value {
    json!({ "masquerade": null })
}

/// Tells the sender that it may not (ICMP "administratively prohibited").
pub(crate) fn reject() -> Value {
    json!({ "reject": { "type": "icmpx", "expr": "admin-prohibited" } })
}

impl Table {
    /// A table for what is routed.
    pub(crate) fn inet(network: &Name, objects: Vec<Value>) -> Self {
        Self { family: "inet".into(), network: network.clone(), objects }
    }

    /// Its name.
    pub fn name(&self) -> String {
        format!("snapctl-{}", self.network)
    }

    /// Whether the rules that are there give this fingerprint.
    pub(crate) fn observe(&self, print: Option<&str>) -> Result<Seen, NetError> {
        let Some(listed) = self.listed()? else { return Ok(Seen::Missing) };
        Ok(match print == Some(listed.as_str()) {
            true => Seen::There,
            false => {
                Seen::Differs(format!("somebody changed the rules of table {} {}", self.family, self.name()))
            }
        })
    }

    /// Puts it there, in place of one that there may be, at once. Returns the fingerprint of what is there then.
    pub(crate) fn make(&self) -> Result<String, NetError> {
        let mut commands = vec![json!({ "add": self.own() }), json!({ "delete": self.own() })];
        commands.push(json!({ "add": self.own() }));
        commands.extend(self.objects.iter().map(|object| json!({ "add": self.placed(object) })));
        run(&commands)?;
        self.listed()?.ok_or_else(|| NetError::NotAsMade {
            network: self.network.clone(),
            what: format!("table {} {}", self.family, self.name()),
            seen: "it is not there".into(),
        })
    }

    /// The undo of [`Table::make`]. One that is gone is no error.
    pub(crate) fn unmake(&self) -> Result<(), NetError> {
        // Deleting what is not there is an error, and `destroy` is younger than the oldest kernel that counts.
        run(&[json!({ "add": self.own() }), json!({ "delete": self.own() })])
    }

    fn own(&self) -> Value {
        json!({ "table": { "family": self.family, "name": self.name() } })
    }

    fn placed(&self, object: &Value) -> Value {
        let mut placed = object.clone();
        for content in placed.as_object_mut().into_iter().flat_map(serde_json::Map::values_mut) {
            content["family"] = json!(self.family);
            content["table"] = json!(self.name());
        }
        placed
    }

    /// A fingerprint of the rules as the kernel has them; none if there is no such table.
    fn listed(&self) -> Result<Option<String>, NetError> {
        let name = self.name();
        let program = Program::new("nft").args(["-j", "-s", "list", "table", &self.family, &name]);
        let (status, printed) = program.outcome()?;
        if !status.success() {
            return match printed.stderr.contains("No such file or directory") {
                true => Ok(None),
                false => Err(refused(program.run().err(), "list the rules")),
            };
        }
        let mut listed: Value = serde_json::from_slice(&printed.stdout).unwrap_or_default();
        strip(&mut listed);
        Ok(Some(blake3::hash(listed.to_string().as_bytes()).to_hex()[..16].to_owned()))
    }
}

/// Takes out what is of the moment: the numbers that the kernel gave, and the version of the program.
fn strip(listed: &mut Value) {
    match listed {
        Value::Object(map) => {
            map.retain(|key, _| key != "handle" && key != "metainfo");
            map.values_mut().for_each(strip);
        }
        Value::Array(items) => items.iter_mut().for_each(strip),
        _ => {}
    }
}

fn run(commands: &[Value]) -> Result<(), NetError> {
    let input = json!({ "nftables": commands }).to_string();
    let done = Program::new("nft").args(["-j", "-f", "-"]).input(input.into_bytes()).run();
    done.map(|_| ()).map_err(|fault| refused(Some(fault), "change the rules"))
}

fn refused(fault: Option<ProgramError>, what: &str) -> NetError {
    match fault {
        Some(ProgramError::Failed { said, .. }) if said.contains("Operation not permitted") => {
            NetError::NoPrivilege { what: format!("{what} of nftables") }
        }
        Some(fault) => fault.into(),
        None => NetError::Netlink { what: what.into(), fault: "it failed, and then it did not".into() },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn objects_are_placed_in_their_table() {
        let table = Table {
            family: "inet".into(),
            network: "n1".parse().unwrap(),
            objects: vec![base_chain("forward", "filter", "forward", 0), rule("forward", vec![accept()])],
        };
        let placed = table.placed(&table.objects[1]);
        assert_eq!(placed["rule"]["table"], "snapctl-n1");
        assert_eq!(placed["rule"]["family"], "inet");
        let mut listed = json!({ "nftables": [{ "metainfo": {} }, { "rule": { "handle": 7, "expr": [] } }] });
        strip(&mut listed);
        assert_eq!(listed, json!({ "nftables": [{}, { "rule": { "expr": [] } }] }));
    }
}
