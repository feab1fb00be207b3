//! Networks: one started and stopped, and taps plugged in, beside the same by `ip`, `nft` and `dnsmasq`.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use model::Name;
use net::lifecycle;
use net::netlink::Netlink;
use net::network::NetworkDefinition;
use net::part::{Host, Places};
use net::{IfName, PortRequest};
use tests::lab::{Netns, snapctl};

use crate::stats::{machine, ms, percentile, version};

/// Taps on one bridge.
const MANY: usize = 200;
/// What snapctl starts: the definition of a NAT network, all said.
const DEFINITION: &str =
    "type = \"nat\"\nbridge = \"sbr-b1\"\nmac = \"52:54:00:0b:e7:c4\"\nsubnet = \"10.97.0.0/16\"\n";
/// The same by hand.
const START: &str = "
nft -f - <<RULES
table inet bench {
 chain forward {
  type filter hook forward priority 0; policy accept;
  iifname peer0 oifname peer0 accept
  iifname peer0 ip saddr 10.96.0.0/16 accept
  oifname peer0 ip daddr 10.96.0.0/16 ct state established,related accept
  iifname peer0 reject with icmpx type admin-prohibited
  oifname peer0 reject with icmpx type admin-prohibited
 }
 chain postrouting {
  type nat hook postrouting priority 100;
  ip saddr 10.96.0.0/16 ip daddr != { 10.96.0.0/16, 224.0.0.0/24, 255.255.255.255 } masquerade
 }
}
RULES
ip link add peer0 address 52:54:00:0b:e7:c5 type bridge forward_delay 0
echo 1 >/proc/sys/net/ipv6/conf/peer0/disable_ipv6
ip addr add 10.96.0.1/16 dev peer0
ip link set peer0 up
echo 1 >/proc/sys/net/ipv4/conf/peer0/forwarding
dnsmasq --conf-file=/dev/null --no-hosts --interface=peer0 --except-interface=lo --bind-dynamic --no-ping \
 --dhcp-range=10.96.0.2,10.96.255.254,255.255.0.0,1h --dhcp-leasefile=/dev/null --pid-file=$DIR/pid";
const STOP: &str = "kill $(cat $DIR/pid); rm -f $DIR/pid; ip link del peer0; nft delete table inet bench";

/// Runs `rounds` rounds of each, either side by turns, in a namespace of their own.
pub fn run(rounds: usize) -> Result<()> {
    let netns = Netns::new()?;
    // As /run is: memory.
    let root = tempfile::tempdir_in("/dev/shm")?;
    let own = std::env::current_exe()?;
    let (own, root) = (own.display(), root.path().display());
    print!("{}", netns.sh(&format!("exec {own} net-inside {rounds} {root}"))?);
    Ok(())
}

/// What [`run`] runs in its namespace, with the directory that it made.
pub async fn inside(rounds: usize, root: Option<&String>) -> Result<()> {
    let root = PathBuf::from(root.context("a directory")?);
    println!(
        "### Networks\n\n{}; {}; {rounds} rounds of either side, by turns; records on a tmpfs.\n",
        machine(),
        version("nft")
    );
    println!("| what | side | p50 | ratio |\n| --- | --- | --- | --- |");
    networks(rounds, &root)?;
    taps(rounds, &root).await?;
    println!("\nTimes in ms.");
    Ok(())
}

fn row(what: &str, side: &str, times: &[f64], peer: Option<&[f64]>) {
    let p50 = percentile(times, 0.5);
    let ratio = peer.map_or_else(String::new, |peer| format!("{:.2} ×", p50 / percentile(peer, 0.5)));
    println!("| {what} | {side} | {} | {ratio} |", ms(p50));
}

fn timed(command: &mut Command) -> Result<f64> {
    let since = Instant::now();
    let output = command.stdin(Stdio::null()).output()?;
    ensure!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
    Ok(since.elapsed().as_secs_f64())
}

fn shell(line: &str, root: &Path) -> Result<f64> {
    timed(Command::new("sh").args(["-ec", line]).env("DIR", root))
}

/// The whole command line tool, beside the programs that do the same.
fn networks(rounds: usize, root: &Path) -> Result<()> {
    let program = snapctl()?;
    let tool = |line: &str| {
        let mut command = Command::new(&program);
        command.arg("--root").arg(root).args(line.split(' '));
        timed(&mut command)
    };
    let dir = root.join("etc/snapctl/networks");
    std::fs::create_dir_all(&dir)?;
    std::fs::write(dir.join("b1.toml"), DEFINITION)?;
    let mut times = [const { Vec::new() }; 4];
    for _ in 0..rounds {
        times[0].push(tool("net start b1")?);
        times[1].push(tool("net stop b1")?);
        times[2].push(shell(START, root)?);
        times[3].push(shell(STOP, root)?);
    }
    let [start, stop, start_peer, stop_peer] = &times;
    row("start a NAT network", "snapctl net start", start, Some(start_peer));
    row("start a NAT network", "nft, ip, dnsmasq", start_peer, None);
    row("stop it", "snapctl net stop", stop, Some(stop_peer));
    row("stop it", "kill, ip, nft", stop_peer, None);
    Ok(())
}

/// The library, as a hotplug calls it, beside `ip`.
async fn taps(rounds: usize, root: &Path) -> Result<()> {
    let places = Places { run: root.join("run"), state: root.join("state") };
    let host = Host { netlink: Netlink::open()?, places, watch: host::watch::Watch::default() };
    let network: Name = "b2".parse()?;
    let definition: NetworkDefinition = toml::from_str("type = \"isolated\"\nbridge = \"sbr-b2\"")?;
    lifecycle::start(&host, &network, &definition, &[], false).await?;
    shell("ip link add peer0 type bridge; ip link set peer0 up", root)?;
    one_tap(&host, &network, rounds * 10, root).await?;
    many_taps(&host, &network, rounds.div_ceil(3), root).await?;
    lifecycle::stop(&host, &network, true).await?;
    Ok(())
}

async fn one_tap(host: &Host, network: &Name, rounds: usize, root: &Path) -> Result<()> {
    let name: IfName = "tap-b".parse()?;
    let request = PortRequest::default();
    let (mut own, mut peer) = (Vec::new(), Vec::new());
    for _ in 0..rounds {
        let since = Instant::now();
        lifecycle::plug(host, network, &name, &request).await?;
        lifecycle::unplug(host, network, &name).await?;
        own.push(since.elapsed().as_secs_f64());
        peer.push(shell(&format!("{}; ip link del tap-p", by_ip("tap-p")), root)?);
    }
    row("a tap made, put into a bridge, removed", "snapctl's library", &own, Some(&peer));
    row("a tap made, put into a bridge, removed", "ip", &peer, None);
    Ok(())
}

async fn many_taps(host: &Host, network: &Name, rounds: usize, root: &Path) -> Result<()> {
    let names: Vec<IfName> =
        (0..MANY).map(|number| format!("tap-b{number}").parse()).collect::<Result<_, _>>()?;
    let made: Vec<String> = (0..MANY).map(|number| by_ip(&format!("tap-p{number}"))).collect();
    let gone: Vec<String> = (0..MANY).map(|number| format!("ip link del tap-p{number}")).collect();
    let request = PortRequest::default();
    let (mut own, mut peer) = (Vec::new(), Vec::new());
    for _ in 0..rounds {
        let since = Instant::now();
        for name in &names {
            lifecycle::plug(host, network, name, &request).await?;
        }
        for name in &names {
            lifecycle::unplug(host, network, name).await?;
        }
        own.push(since.elapsed().as_secs_f64());
        peer.push(shell(&[made.join("\n"), gone.join("\n")].join("\n"), root)?);
    }
    row("200 taps on one bridge, and none", "snapctl's library", &own, Some(&peer));
    row("200 taps on one bridge, and none", "ip", &peer, None);
    Ok(())
}

fn by_ip(tap: &str) -> String {
    format!("ip tuntap add dev {tap} mode tap vnet_hdr; ip link set {tap} master peer0; ip link set {tap} up")
}
