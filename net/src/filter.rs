//! Rules that hold a guest to its own addresses: one table for all ports of a network, where frames come in.
//!
//! With the NIC's MAC address known, nothing with another one comes in, and nobody but the network plays its DHCP server
//! or its router. With the guest's IP addresses known too, it cannot say that it has others (ARP, RFC 826; neighbour
//! advertisements, RFC 4861).
//!
//! Source: nft(8), family bridge.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv6Addr};

use model::Name;
use serde_json::{Value, json};

use crate::lifecycle::Port;
use crate::nft::{Table, base_chain, drop, payload, rule};
use crate::{IfName, MacAddress};

/// Where the bridge filters what comes in, by the names of nft(8): `filter`.
const PRIORITY: i32 = -200;
/// Ports of the servers of DHCP over IPv4 and over IPv6.
const DHCP_SERVERS: [u16; 2] = [67, 547];
/// The target of a neighbour advertisement begins behind 64 bits of ICMPv6 header.
const TARGET: u32 = 64;

/// The table of a network with these ports; none if no port is held to anything.
pub(crate) fn table(network: &Name, ports: &BTreeMap<IfName, Port>) -> Option<Table> {
    let held: Vec<(&IfName, MacAddress, &[IpAddr])> = ports
        .iter()
        .filter(|(_, port)| port.is_held())
        .filter_map(|(name, port)| Some((name, port.request.mac?, port.addresses.as_slice())))
        .collect();
    if held.is_empty() {
        return None;
    }
    let mut objects = vec![base_chain("incoming", "filter", "prerouting", PRIORITY)];
    let mut jumps = Vec::new();
    for (port, mac, addresses) in held {
        let chain = format!("port-{port}");
        objects.push(json!({ "chain": { "name": chain } }));
        objects.extend(rules(mac, addresses).into_iter().map(|expressions| rule(&chain, expressions)));
        jumps.push(json!([port, { "jump": { "target": chain } }]));
    }
    let key = json!({ "meta": { "key": "iifname" } });
    objects.push(rule("incoming", vec![json!({ "vmap": { "key": key, "data": { "set": jumps } } })]));
    Some(Table { objects, ..empty(network) })
}

/// The table without anything in it, for whoever takes it away.
pub(crate) fn empty(network: &Name) -> Table {
    Table { family: "bridge".into(), network: network.clone(), objects: Vec::new() }
}

fn rules(mac: MacAddress, addresses: &[IpAddr]) -> Vec<Vec<Value>> {
    let mut rules = vec![
        vec![payload("ether", "saddr", "!=", mac), drop()],
        vec![payload("arp", "saddr ether", "!=", mac), drop()],
        vec![payload("udp", "sport", "==", json!({ "set": DHCP_SERVERS })), drop()],
        vec![payload("icmpv6", "type", "==", "nd-router-advert"), drop()],
    ];
    let of = |wanted: fn(&IpAddr) -> bool| -> Vec<Value> {
        addresses.iter().filter(|address| wanted(address)).map(|address| json!(address)).collect()
    };
    let mut v4 = of(IpAddr::is_ipv4);
    if !v4.is_empty() {
        // Who has no address yet asks from this one.
        v4.push(json!("0.0.0.0"));
        rules.push(vec![payload("ip", "saddr", "!=", json!({ "set": v4 })), drop()]);
        rules.push(vec![payload("arp", "saddr ip", "!=", json!({ "set": v4 })), drop()]);
    }
    let mut v6 = of(IpAddr::is_ipv6);
    if !v6.is_empty() {
        v6.extend([json!("::"), json!({ "prefix": { "addr": "fe80::", "len": 64 } })]);
        rules.push(vec![payload("ip6", "saddr", "!=", json!({ "set": v6 })), drop()]);
        rules.extend(advertisements(addresses));
    }
    rules
}

/// Lets through what advertises one of `addresses` or a link-local one. `icmpv6 taddr` is younger than the oldest nft
/// that counts, and JSON has no numbers of 128 bits: the target is compared word by word.
fn advertisements(addresses: &[IpAddr]) -> Vec<Vec<Value>> {
    let is_advertisement = || payload("icmpv6", "type", "==", "nd-neighbor-advert");
    let targets = addresses.iter().filter_map(|address| match address {
        IpAddr::V6(address) => Some(words(*address).to_vec()),
        IpAddr::V4(_) => None,
    });
    let link_local = words(Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 0))[..2].to_vec();
    let mut rules: Vec<Vec<Value>> = targets
        .chain([link_local])
        .map(|words| {
            let mut expressions = vec![is_advertisement()];
            let at = |number: u32| json!({ "payload": { "base": "th", "offset": TARGET + 32 * number, "len": 32 } });
            let compared = words.iter().zip(0..);
            expressions.extend(compared.map(|(word, number)| {
                json!({ "match": { "op": "==", "left": at(number), "right": word } })
            }));
            expressions.push(json!({ "return": null }));
            expressions
        })
        .collect();
    rules.push(vec![is_advertisement(), drop()]);
    rules
}

fn words(address: Ipv6Addr) -> [u32; 4] {
    let bits = u128::from(address);
    [96, 64, 32, 0].map(|shift| (bits >> shift) as u32)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::PortRequest;

    fn port(mac: Option<&str>, trust: bool) -> Port {
        let mac = mac.map(|mac| mac.parse().unwrap());
        let request = PortRequest { mac, trust, ..PortRequest::default() };
        Port { request, addresses: vec!["10.0.0.5".parse().unwrap()], parts: Vec::new(), plugged: true }
    }

    #[test]
    fn only_ports_with_an_address_that_are_not_trusted_are_held() {
        let name: Name = "n1".parse().unwrap();
        let ports = |port: Port| BTreeMap::from([("vm1-0".parse().unwrap(), port)]);
        assert_eq!(table(&name, &ports(port(None, false))), None);
        assert_eq!(table(&name, &ports(port(Some("52:54:00:00:00:01"), true))), None);
        let made = table(&name, &ports(port(Some("52:54:00:00:00:01"), false))).unwrap();
        assert_eq!(made.family, "bridge");
        let text = serde_json::to_string(&made.objects).unwrap();
        for word in ["port-vm1-0", "52:54:00:00:00:01", "10.0.0.5", "0.0.0.0", "vmap"] {
            assert!(text.contains(word), "{word}: {text}");
        }
    }

    #[test]
    fn an_address_has_four_words() {
        assert_eq!(words("fd00:99::1".parse().unwrap()), [0xfd00_0099, 0, 0, 1]);
    }
}
