//! Networks: in namespaces that the tests make, with clients there and with real guests.

use anyhow::{Context, Result, ensure};
use tests::lab::{Cli, DiskSpec, Guest, HostState, HostVm, Netns, Run, is_inside, run_test};

use crate::support::{KILLED, assert_says, wait_until};

const GUEST: &str = "52:54:00:00:00:01";
const OUTSIDE: &str = "203.0.113.9";
const REFUSED: i32 = 7;

/// A host with a way to the outside, and the outside.
struct Stage {
    outside: Netns,
    host: Netns,
    cli: Cli,
}

impl Stage {
    fn new() -> Result<Self> {
        let (host, outside) = (Netns::new()?, Netns::new()?);
        host.cable("up0", &outside, "e0")?;
        host.sh("ip addr add 198.51.100.2/24 dev up0; ip route add default via 198.51.100.1")?;
        outside.sh(&format!("ip addr add 198.51.100.1/24 dev e0; ip addr add {OUTSIDE}/32 dev lo"))?;
        let cli = Cli::new()?.inside(&host);
        Ok(Self { outside, host, cli })
    }

    async fn run(&self, line: &str) -> Result<Run> {
        let run = self.cli.run(line.split(' ')).await?;
        eprintln!("$ snapctl {line}    # exits {}\n{}{}", run.code, run.stdout, run.stderr);
        Ok(run)
    }

    async fn ok(&self, line: &str) -> Result<String> {
        let run = self.run(line).await?;
        Ok(run.ok()?.stdout.clone() + &run.stderr)
    }

    /// Makes a guest known as `vm1`.
    async fn register(&self, guest: &Guest) -> Result<()> {
        let (qmp, agent) = (guest.qmp(), guest.agent());
        self.ok(&format!("vm add vm1 --qmp {} --agent {}", qmp.display(), agent.display())).await?;
        Ok(())
    }

    /// A segment outside that has a server of its own, behind `lan0`, which is down.
    fn lan(&self) -> Result<Netns> {
        let lan = Netns::new()?;
        self.host.cable("lan0", &lan, "e0")?;
        self.host.sh("ip link set lan0 down")?;
        lan.sh("ip addr add 192.0.2.1/24 dev e0")?;
        lan.sh(
            "dnsmasq --conf-file=/dev/null --no-hosts --no-resolv --interface=e0 --except-interface=lo --bind-dynamic \
             --port=0 --dhcp-range=192.0.2.50,192.0.2.60,255.255.255.0,1h --dhcp-leasefile=/dev/null --pid-file= --no-ping",
        )?;
        Ok(lan)
    }

    /// A guest that is a namespace, in the bridge of a network by a port of the test's own.
    fn client(&self, bridge: &str, mac: &str) -> Result<Netns> {
        let client = Netns::new()?;
        let port = format!("c{}", client.name().rsplit('-').next().context("number")?);
        self.host.cable(&port, &client, "e0")?;
        self.host.sh(&format!("ip link set {port} master {bridge}"))?;
        client.sh(&format!("ip link set e0 address {mac}"))?;
        Ok(client)
    }
}

fn assert_same(before: &HostState, after: &HostState) {
    let difference = before.difference(after);
    assert!(difference.is_empty(), "the host is not as it was:\n{}", difference.join("\n"));
}

#[tokio::test]
async fn n1_nat_leads_out_and_nobody_in_and_a_stop_leaves_no_trace() -> Result<()> {
    let stage = Stage::new()?;
    let before = stage.host.state()?;
    let line = format!("net define n1 nat --domain lab.test --host {GUEST},10.99.1.77,vm1");
    assert_says(&stage.ok(&line).await?, &["network n1 is defined", "sbr-n1, 10.99.1.0/24"]);
    assert_says(&stage.ok(&line).await?, &["was defined so already"]);
    assert_says(&stage.ok("net start n1 --dry-run").await?, &["1. rules of nftables", "bridge sbr-n1"]);
    assert_same(&before, &stage.host.state()?);
    assert_says(&stage.ok("net start n1").await?, &["network n1 is started"]);
    assert_says(&stage.ok("net start n1").await?, &["is started already"]);
    {
        let client = stage.client("sbr-n1", GUEST)?;
        ensure!(client.ask_for_address("e0", "guest")? == "10.99.1.77/24");
        ensure!(client.reaches(OUTSIDE)?, "no way out");
        let resolved = client.sh("busybox nslookup vm1.lab.test 10.99.1.1")?;
        ensure!(resolved.contains("10.99.1.77"), "{resolved}");
        stage.outside.sh("ip route add 10.99.1.0/24 via 198.51.100.2")?;
        ensure!(!stage.outside.pings("10.99.1.77")?, "the guest is reached from outside");
        // What the outside sees is the host's address.
        let seen = stage
            .outside
            .sh("timeout 5 busybox nc -l -p 8099 -s 203.0.113.9 -e sh -c 'true' & sleep 0.3; true");
        seen?;
        assert_says(&stage.ok("net leases n1").await?, &[GUEST, "10.99.1.77", "vm1"]);
        let leases = stage.run("net leases n1 --json").await?.ok()?.json()?;
        ensure!(leases["leases"][0]["address"] == "10.99.1.77", "{leases}");
        let refused = stage.run("net stop n1").await?;
        assert_says(&refused.expect_code(REFUSED)?.stderr, &["not snapctl's", "nomaster"]);
        ensure!(client.reaches(OUTSIDE)?, "a stop that was refused changed something");
    }
    assert_says(&stage.ok("net stop n1").await?, &["network n1 is stopped"]);
    assert_says(&stage.ok("net stop n1").await?, &["is stopped already"]);
    assert_same(&before, &stage.host.state()?);
    stage.ok("net remove n1").await?;
    stage.run("net show n1").await?.expect_code(6)?;
    Ok(())
}

#[tokio::test]
async fn n2_a_real_guest_gets_an_address_and_pings() -> Result<()> {
    let stage = Stage::new()?;
    let before = stage.host.state()?;
    stage.ok("net define n1 nat").await?;
    stage.ok("net start n1").await?;
    stage.ok(&format!("net plug n1 vm1-0 --mac {GUEST}")).await?;
    assert_says(&stage.ok("net show n1").await?, &["vm1-0", GUEST, "started"]);
    let refused = stage.run(&format!("net plug n1 vm2-0 --mac {GUEST}")).await?;
    assert_says(&refused.expect_code(REFUSED)?.stderr, &["port vm1-0 of network n1"]);
    let guest = Guest::spec().disk(DiskSpec::new("a")).plugged(&stage.host, "vm1-0", GUEST).boot().await?;
    let leases = async || -> Result<bool> {
        let leases = stage.cli.run(["net", "leases", "n1", "--json"]).await?;
        Ok(leases.ok()?.json()?["leases"][0]["mac"] == GUEST)
    };
    let mut waited = 0;
    while !leases().await? {
        waited += 1;
        ensure!(waited < 200, "no lease");
        tokio::time::sleep(std::time::Duration::from_millis(100)).await;
    }
    stage.register(&guest).await?;
    ping_from_guest(&stage, OUTSIDE).await?;
    let refused = stage.run("net stop n1").await?;
    assert_says(&refused.expect_code(REFUSED)?.stderr, &["vm1-0", "--force"]);
    drop(guest);
    stage.ok("net unplug n1 vm1-0").await?;
    stage.run("net unplug n1 vm1-0").await?.expect_code(6)?;
    stage.ok("net stop n1").await?;
    assert_same(&before, &stage.host.state()?);
    Ok(())
}

/// Waits until the guest has talked to the server of a segment.
async fn has_address(lan: &Netns) -> Result<()> {
    wait_until("the guest has an address", || {
        lan.try_sh(&format!("ip neigh | grep -q {GUEST}")).is_ok_and(|(found, _)| found)
    })
    .await
}

/// Lets the guest's agent ping an address.
async fn ping_from_guest(stage: &Stage, address: &str) -> Result<()> {
    let arguments = format!(
        "{{\"path\":\"/bin/ping\",\"arg\":[\"-c\",\"5\",\"-W\",\"2\",\"{address}\"],\"capture-output\":true}}"
    );
    let started = stage.cli.run(["guest", "call", "vm1", "guest-exec", &arguments, "--json"]).await?;
    let pid = started.ok()?.json()?["return"]["pid"].as_u64().context("pid")?;
    let status = format!("{{\"pid\":{pid}}}");
    for _ in 0..200 {
        let asked = stage.cli.run(["guest", "call", "vm1", "guest-exec-status", &status, "--json"]).await?;
        let answer = asked.ok()?.json()?;
        if answer["return"]["exited"] == true {
            ensure!(answer["return"]["exitcode"] == 0, "the guest does not reach {address}: {answer}");
            return Ok(());
        }
        tokio::time::sleep(std::time::Duration::from_millis(100)).await;
    }
    anyhow::bail!("the guest's ping does not end")
}

#[tokio::test]
async fn n3_killed_at_each_step_a_network_is_there_or_is_not() -> Result<()> {
    let stage = Stage::new()?;
    stage.ok("net define n1 nat --subnet6 fd00:99::/64").await?;
    let before = stage.host.state()?;
    let list = stage.cli.root().join("points");
    let listing = format!("list:{}", list.display());
    let env = [("SNAPCTL_FAULT", listing.as_str())];
    for line in
        ["net start n1", "net plug n1 vm1-0 --mac 52:54:00:00:00:01", "net unplug n1 vm1-0", "net stop n1"]
    {
        let _ = std::fs::remove_file(&list);
        let (first, rest) = around(line);
        for line in first {
            stage.cli.run(line.split(' ')).await?.ok()?;
        }
        stage.cli.run_with(line.split(' '), &env).await?.ok()?;
        for line in rest {
            stage.cli.run(line.split(' ')).await?.ok()?;
        }
        let points = std::fs::read_to_string(&list)?;
        let points: Vec<&str> = points.lines().collect();
        ensure!(points.len() >= 2, "{line}: {points:?}");
        for point in points {
            for line in first {
                stage.cli.run(line.split(' ')).await?.ok()?;
            }
            let kill = format!("{point}=kill");
            stage.cli.run_with(line.split(' '), &[("SNAPCTL_FAULT", &kill)]).await?.expect_code(KILLED)?;
            let _ = stage.run("net list").await?.ok()?;
            stage.ok("recover").await?;
            let shown = stage.run("net show n1").await?;
            ensure!(!shown.ok()?.stdout.contains("interrupted"), "{point}: {}", shown.stdout);
            for line in rest {
                stage.cli.run(line.split(' ')).await?.ok()?;
            }
            let after = stage.host.state()?;
            let difference = before.difference(&after);
            ensure!(difference.is_empty(), "killed at {point} of {line}:\n{}", difference.join("\n"));
        }
        // A step that fails is undone at once.
        if line == "net start n1" {
            for number in 1..=5 {
                let fail = format!("net.made.{number}=error");
                let run = stage.cli.run_with(line.split(' '), &[("SNAPCTL_FAULT", &fail)]).await?;
                assert_says(&run.expect_code(1)?.stderr, &["was told to fail"]);
                assert_same(&before, &stage.host.state()?);
            }
        }
    }
    assert_same(&before, &stage.host.state()?);
    Ok(())
}

/// What has to be so before `line`, and what brings the host back to where it was afterwards.
fn around(line: &str) -> (&'static [&'static str], &'static [&'static str]) {
    const STOP: &[&str] = &["net stop n1 --force"];
    match line {
        "net start n1" => (&[], STOP),
        "net unplug n1 vm1-0" => (&["net start n1", "net plug n1 vm1-0 --mac 52:54:00:00:00:01"], STOP),
        _ => (&["net start n1"], STOP),
    }
}

#[tokio::test]
async fn n4_what_somebody_changed_is_shown_and_mended() -> Result<()> {
    let stage = Stage::new()?;
    stage.ok("net define n1 nat").await?;
    stage.ok("net start n1").await?;
    stage.ok("net plug n1 vm1-0").await?;
    let good = stage.host.state()?;
    for (harm, words) in [
        ("nft flush chain inet snapctl-n1 forward", "somebody changed the rules"),
        ("nft delete table inet snapctl-n1", "rules of nftables (table inet snapctl-n1) is missing"),
        ("ip addr del 10.99.1.1/24 dev sbr-n1", "address 10.99.1.1/24 of sbr-n1 is missing"),
        ("ip link set sbr-n1 down", "sbr-n1 is down"),
        ("echo 0 >/proc/sys/net/ipv4/conf/up0/forwarding", "up0/forwarding is 0"),
        ("ip link set vm1-0 nomaster", "vm1-0 is not in sbr-n1"),
        (
            "ip netns pids $(ip netns identify) | xargs -r -n1 sh -c 'grep -q dnsmasq /proc/$0/comm && kill -9 $0; true'",
            "dnsmasq) is missing",
        ),
    ] {
        stage.host.sh(harm)?;
        let shown = stage.run("net show n1").await?;
        assert_says(&shown.ok()?.stdout, &["changed"]);
        assert_says(&shown.stderr, &[words, "net start n1"]);
        assert_says(&stage.ok("net start n1").await?, &["network n1 is mended", words]);
        assert_says(&stage.ok("net show n1").await?, &["started"]);
        assert_same(&good, &stage.host.state()?);
    }
    stage.ok("net stop n1 --force").await?;
    Ok(())
}

#[tokio::test]
async fn n5_bad_input_is_refused_and_nothing_is_left() -> Result<()> {
    let stage = Stage::new()?;
    stage.host.sh("ip link add br9 type bridge; ip link add sbr-taken type bridge")?;
    let before = stage.host.state()?;
    for (line, code, words) in [
        ("net define n1 nta", 2, "the kinds are: isolated, nat"),
        ("net define n1 nat --subnet 198.51.100.0/25", 7, "198.51.100.2/24 of up0"),
        ("net define n1 nat --subnet 10.0.0.0/33", 2, "invalid"),
        ("net define n1 nat --subnet 10.1.0.0/24 --dhcp 10.2.0.1-10.2.0.9", 2, "outside the subnet"),
        ("net define n1 nat --bridge a-name-that-is-too-long", 2, "no name for an interface"),
        ("net define n1 bridge --uplink eth7", 7, "there is no interface eth7"),
        ("net define n1 bridge --uplink up0", 7, "the host's address 198.51.100.2/24"),
        ("net define n1 bridge --bridge up0", 7, "is no bridge"),
        ("net define n1 bridge --uplink up0 --vlan 4095", 2, "VLANs are 1 to 4094"),
        ("net define n1 bridge", 2, "--uplink"),
        ("net define taken nat", 7, "sbr-taken"),
        ("net define n1 isolated --vni 7", 2, "takes --bridge"),
        ("net define n1 vxlan --vni 7", 2, "--peer"),
        ("net define n1 macvtap --uplink up0 --mode loud", 2, "loud"),
        ("net start n9", 6, "no network named n9"),
        ("net define n1/x nat", 2, "n1/x"),
    ] {
        let run = stage.run(line).await?;
        let said = run.expect_code(code)?.stderr.clone() + &run.stdout;
        assert_says(&said, &[words]);
        assert_same(&before, &stage.host.state()?);
    }
    stage.ok("net define n1 nat --subnet 10.99.5.0/24").await?;
    let overlap = stage.run("net define n2 nat --subnet 10.99.0.0/16").await?;
    assert_says(&overlap.expect_code(REFUSED)?.stderr, &["10.99.5.0/24 of network n1", "--subnet"]);
    let taken = stage.run("net define n1 isolated").await?;
    assert_says(&taken.expect_code(REFUSED)?.stderr, &["defined already, in another way"]);
    assert_says(&stage.ok("net define n3 nat").await?, &["10.99.1.0/24"]);
    // Between the definition and the start somebody takes the bridge's name.
    stage.host.sh("ip link add sbr-n1 type bridge")?;
    let taken = stage.run("net start n1").await?;
    assert_says(&taken.expect_code(REFUSED)?.stderr, &["sbr-n1", "not snapctl's"]);
    stage.host.sh("ip link del sbr-n1")?;
    // Without the privilege.
    let denied = stage.host.try_sh(&format!(
        "setpriv --bounding-set -net_admin --inh-caps -net_admin {} --root {} net start n1",
        tests::lab::snapctl()?.display(),
        stage.cli.root().display()
    ))?;
    ensure!(!denied.0);
    assert_says(&denied.1, &["no permission to", "run snapctl as root"]);
    assert_same(&before, &stage.host.state()?);
    stage.run("net remove n1").await?.ok()?;
    Ok(())
}

#[tokio::test]
async fn n6_isolated_and_routed_networks_keep_their_promise() -> Result<()> {
    let stage = Stage::new()?;
    let before = stage.host.state()?;
    stage.ok("net define i1 isolated --subnet 10.98.1.0/24").await?;
    stage.ok("net define r1 routed --subnet 10.98.2.0/24 --subnet6 fd00:98:2::/64 --uplink up0").await?;
    for network in ["i1", "r1"] {
        stage.ok(&format!("net start {network}")).await?;
    }
    stage.outside.sh("ip route add 10.98.0.0/16 via 198.51.100.2")?;
    {
        let (a, b) = (stage.client("sbr-i1", GUEST)?, stage.client("sbr-i1", "52:54:00:00:00:02")?);
        let routed = stage.client("sbr-r1", "52:54:00:00:00:03")?;
        let own = |address: String| address.split('/').next().unwrap_or_default().to_owned();
        let (_, at_b) = (a.ask_for_address("e0", "a")?, own(b.ask_for_address("e0", "b")?));
        let at_r = own(routed.ask_for_address("e0", "r")?);
        ensure!(a.reaches(&at_b)?, "guests of an isolated network reach each other");
        ensure!(a.reaches("10.98.1.1")?, "and the host");
        a.sh("ip route add default via 10.98.1.1")?;
        ensure!(!a.pings(OUTSIDE)?, "an isolated guest gets out");
        ensure!(!stage.outside.pings(&at_b)?, "an isolated guest is reached");
        ensure!(!a.pings(&at_r)?, "an isolated guest reaches another network");
        ensure!(routed.reaches(OUTSIDE)?, "a routed guest gets out");
        ensure!(stage.outside.reaches(&at_r)?, "a routed guest is reached");
        routed.sh("ip addr add fd00:98:2::5/64 dev e0 nodad")?;
        ensure!(routed.reaches("fd00:98:2::1")?, "no IPv6");
    }
    for network in ["i1", "r1"] {
        stage.ok(&format!("net stop {network}")).await?;
    }
    assert_same(&before, &stage.host.state()?);
    Ok(())
}

#[tokio::test]
async fn n7_a_bridge_over_an_uplink_carries_a_real_guest() -> Result<()> {
    let stage = Stage::new()?;
    let lan = stage.lan()?;
    let before = stage.host.state()?;
    stage.ok("net define lan bridge --uplink lan0").await?;
    stage.ok("net start lan").await?;
    stage.ok(&format!("net plug lan vm1-0 --mac {GUEST} --owner 65534 --multi-queue")).await?;
    stage.ok("net unplug lan vm1-0").await?;
    stage.ok(&format!("net plug lan vm1-0 --mac {GUEST}")).await?;
    let guest = Guest::spec().disk(DiskSpec::new("a")).plugged(&stage.host, "vm1-0", GUEST).boot().await?;
    stage.register(&guest).await?;
    has_address(&lan).await?;
    ping_from_guest(&stage, "192.0.2.1").await?;
    drop(guest);
    // A bridge that the host has is used, and left.
    stage.ok("net stop lan --force").await?;
    assert_same(&before, &stage.host.state()?);
    stage.host.sh(
        "ip link add br9 address 02:00:00:00:00:09 type bridge forward_delay 0; ip link set lan0 master br9",
    )?;
    stage
        .host
        .sh("echo 1 >/proc/sys/net/ipv6/conf/br9/disable_ipv6; ip link set lan0 up; ip link set br9 up")?;
    stage.host.sh("until ip link show br9 | grep -q 'state UP'; do sleep 0.1; done")?;
    let before = stage.host.state()?;
    stage.ok("net define own bridge --bridge br9").await?;
    stage.ok("net start own").await?;
    stage.ok("net plug own vm1-0 --isolated").await?;
    ensure!(stage.host.sh("bridge -d link show dev vm1-0")?.contains("isolated on"));
    stage.ok("net stop own --force").await?;
    assert_same(&before, &stage.host.state()?);
    Ok(())
}

#[tokio::test]
async fn n8_a_vxlan_spans_hosts() -> Result<()> {
    let (a, b) = (Netns::new()?, Netns::new()?);
    a.cable("u0", &b, "u0")?;
    let mut hosts = Vec::new();
    for (netns, own, other) in [(a, 1, 2), (b, 2, 1)] {
        netns.sh(&format!("ip addr add 10.44.0.{own}/24 dev u0"))?;
        let before = netns.state()?;
        let cli = Cli::new()?.inside(&netns);
        let line = format!(
            "net define x vxlan --vni 42 --local 10.44.0.{own} --peer 10.44.0.{other} --uplink u0 --subnet 10.45.0.{own}/24 --no-dhcp"
        );
        cli.run(line.split(' ')).await?.ok()?;
        cli.run(["net", "start", "x"]).await?.ok()?;
        hosts.push((netns, cli, before));
    }
    ensure!(hosts[0].0.reaches("10.45.0.2")?, "no way through the tunnel");
    let link = hosts[0].0.sh("ip -d link show svx-x")?;
    ensure!(link.contains("vxlan id 42") && link.contains("mtu 1450"), "{link}");
    for (netns, cli, before) in &hosts {
        cli.run(["net", "stop", "x"]).await?.ok()?;
        assert_same(before, &netns.state()?);
    }
    Ok(())
}

#[tokio::test]
async fn n9_two_hundred_networks_leave_no_trace() -> Result<()> {
    let stage = Stage::new()?;
    let before = stage.host.state()?;
    for number in 0..200 {
        let kind = ["nat", "isolated", "routed", "isolated"][number % 4];
        stage.cli.run(format!("net define n{number} {kind}").split(' ')).await?.ok()?;
        stage.cli.run(format!("net start n{number}").split(' ')).await?.ok()?;
    }
    let listed = stage.run("net list --json").await?.ok()?.json()?;
    let networks = listed["networks"].as_array().context("networks")?;
    ensure!(
        networks.len() == 200 && networks.iter().all(|network| network["state"] == "started"),
        "{listed}"
    );
    for number in 0..200 {
        stage.cli.run(format!("net stop n{number}").split(' ')).await?.ok()?;
    }
    assert_same(&before, &stage.host.state()?);
    Ok(())
}

#[tokio::test]
async fn n10_a_transient_network_is_forgotten_when_it_is_stopped() -> Result<()> {
    let stage = Stage::new()?;
    let before = stage.host.state()?;
    assert_says(&stage.ok("net define t1 isolated --transient").await?, &["network t1 is started"]);
    assert_says(&stage.ok("net show t1").await?, &["persistent  no"]);
    assert_says(&stage.ok("net stop t1").await?, &["is stopped, and forgotten"]);
    stage.run("net show t1").await?.expect_code(6)?;
    // With the host.
    stage.ok("net define a1 nat --autostart").await?;
    stage.ok("net define a2 nat").await?;
    assert_says(&stage.ok("net start --autostart").await?, &["a1 is started"]);
    assert_says(&stage.ok("net list").await?, &["a1    nat   started  yes", "a2    nat   stopped  no"]);
    // Ctrl-C takes back what was made.
    let held = stage.host.state()?;
    let child = stage.cli.spawn(["net", "start", "a2"], &[("SNAPCTL_FAULT", "net.made.2=hang:1500")])?;
    let pid = child.id().context("pid")?;
    wait_until("the bridge is made", || {
        stage.host.try_sh("ip link show sbr-a2").is_ok_and(|(found, _)| found)
    })
    .await?;
    stage.host.sh(&format!("kill -INT {pid}"))?;
    let ended = child.wait_with_output().await?;
    ensure!(ended.status.code() == Some(130), "{ended:?}");
    assert_same(&held, &stage.host.state()?);
    let started = stage.run("net remove a1").await?;
    assert_says(&started.expect_code(REFUSED)?.stderr, &["network a1 is started", "net stop a1"]);
    stage.ok("net autostart a1 --off").await?;
    stage.ok("net stop a1").await?;
    assert_same(&before, &stage.host.state()?);
    Ok(())
}

/// A client that is held as a guest's port is: the rules are the port's, and only the names of the ports are swapped.
#[tokio::test]
async fn n13_a_guest_is_held_to_its_own_addresses() -> Result<()> {
    let stage = Stage::new()?;
    let before = stage.host.state()?;
    stage
        .ok(&format!(
            "net define n1 nat --subnet 10.99.1.0/24 --subnet6 fd00:99::/64 --host {GUEST},10.99.1.77"
        ))
        .await?;
    stage.ok("net start n1").await?;
    stage.ok(&format!("net plug n1 vm1-0 --mac {GUEST} --address fd00:99::77")).await?;
    stage.ok("net plug n1 vm2-0 --mac 52:54:00:00:00:02 --trust").await?;
    let rules = stage.host.sh("nft list table bridge snapctl-n1")?;
    assert_says(&rules, &["chain port-vm1-0", "10.99.1.77", "nd-router-advert"]);
    ensure!(!rules.contains("vm2-0"), "a trusted port is held: {rules}");
    assert_says(
        &stage.ok("net show n1").await?,
        &["table bridge snapctl-n1", "vm2-0, 52:54:00:00:00:02, trusted"],
    );
    {
        // A namespace cannot use a tap; so a cable takes the tap's name, and meets the tap's rules.
        stage.host.sh("ip link set vm1-0 down; ip link set vm1-0 name away")?;
        let client = Netns::new()?;
        stage.host.cable("vm1-0", &client, "e0")?;
        stage.host.sh("ip link set vm1-0 master sbr-n1")?;
        client.sh(&format!("ip link set e0 address {GUEST}; ip -6 addr add fd00:99::77/64 dev e0 nodad"))?;
        ensure!(client.ask_for_address("e0", "a")? == "10.99.1.77/24");
        ensure!(
            client.reaches("10.99.1.1")? && client.reaches("fd00:99::1")?,
            "its own addresses do not pass"
        );
        client.sh("ip addr add 10.99.1.78/24 dev e0; ip -6 addr add fd00:99::78/64 dev e0 nodad")?;
        ensure!(!client.pings("-I 10.99.1.78 10.99.1.1")?, "another IPv4 address passes");
        ensure!(!client.pings("-I fd00:99::78 fd00:99::1")?, "another IPv6 address passes");
        let forget = || stage.host.sh("ip neigh flush dev sbr-n1");
        forget()?;
        ensure!(
            stage.host.reaches("10.99.1.77")? && stage.host.reaches("fd00:99::77")?,
            "it does not answer for its own addresses"
        );
        let claims = |address: &str| -> Result<bool> {
            forget()?;
            stage.host.pings(address)
        };
        ensure!(!claims("10.99.1.78")?, "it answers for an address that is not its own");
        ensure!(!claims("fd00:99::78")?, "it advertises an address that is not its own");
        client.sh("ip link set e0 address 52:54:00:00:00:99")?;
        ensure!(!client.pings("10.99.1.1")?, "another MAC address passes");
        // It is the rules that hold it, and nothing else.
        stage.host.sh("nft delete table bridge snapctl-n1")?;
        ensure!(
            client.reaches("-I 10.99.1.78 10.99.1.1")? && client.reaches("10.99.1.1")?,
            "no rule, and no way"
        );
    }
    stage.host.sh("ip link set away name vm1-0")?;
    stage.ok("net stop n1 --force").await?;
    assert_same(&before, &stage.host.state()?);
    Ok(())
}

#[tokio::test]
async fn n14_a_guest_receives_and_sends_as_much_as_it_may() -> Result<()> {
    /// What goes over, and what a second lets through.
    const SENT: u64 = 1 << 20;
    const RATE: u64 = 256 << 10;
    let stage = Stage::new()?;
    let before = stage.host.state()?;
    stage.ok(&format!("net define n1 nat --host {GUEST},10.99.1.77 --subnet 10.99.1.0/24")).await?;
    stage.ok("net start n1").await?;
    let no = stage.run("net plug n1 vm1-0 --in-rate 10M,5M").await?;
    assert_says(&no.expect_code(2)?.stderr, &["the peak is above the average"]);
    stage.ok(&format!("net plug n1 vm1-0 --mac {GUEST} --in-rate 256K --out-rate 256K,512K,64K")).await?;
    let guest = Guest::spec().disk(DiskSpec::new("a")).plugged(&stage.host, "vm1-0", GUEST).boot().await?;
    stage.register(&guest).await?;
    ping_from_guest(&stage, OUTSIDE).await?;
    // A bucket that is full lets some through at once; the rest takes its time, whatever the machine does beside.
    let least = std::time::Duration::from_secs((SENT - (128 << 10)) / RATE);
    for guest_line in [
        "mkfifo /tmp/idle; busybox nc -l -p 9000 0<>/tmp/idle >/dev/null",
        "dd if=/dev/zero bs=64k count=16 2>/dev/null | busybox nc -l -p 9001",
    ] {
        in_guest(&stage, guest_line).await?;
    }
    let dd = "dd if=/dev/zero bs=64k count=16 2>/dev/null";
    // The guest listens in its own time.
    let until_heard =
        |line: &str| format!("for n in $(seq 50); do {line} && exit 0; sleep 0.2; done; exit 1");
    let since = std::time::Instant::now();
    stage.host.sh(&until_heard(&format!("{dd} | busybox nc -w 30 10.99.1.77 9000")))?;
    let received = since.elapsed();
    let since = std::time::Instant::now();
    // An input that never ends: nc hangs up with its input.
    let idle = stage.cli.root().join("idle");
    let (idle, got) = (idle.display(), stage.cli.root().join("got"));
    stage.host.sh(&format!("mkfifo {idle}"))?;
    let line = format!("busybox nc -w 30 10.99.1.77 9001 0<>{idle} >{}", got.display());
    stage.host.sh(&until_heard(&line))?;
    let bytes = std::fs::metadata(&got)?.len();
    let sent = since.elapsed();
    ensure!(bytes == SENT, "{bytes} bytes");
    ensure!(received >= least && sent >= least, "received in {received:?}, sent in {sent:?}");
    stage.host.sh("tc qdisc del dev vm1-0 root")?;
    assert_says(&stage.run("net show n1").await?.stderr, &["rates of vm1-0: vm1-0 has no limit of 256 KiB"]);
    stage.ok("net start n1").await?;
    drop(guest);
    stage.ok("net stop n1 --force").await?;
    assert_same(&before, &stage.host.state()?);
    Ok(())
}

/// Starts a line of shell in the guest, and waits for nothing.
async fn in_guest(stage: &Stage, line: &str) -> Result<()> {
    let arguments = serde_json::json!({ "path": "/bin/sh", "arg": ["-c", line] }).to_string();
    stage.cli.run(["guest", "call", "vm1", "guest-exec", &arguments]).await?.ok()?;
    Ok(())
}

#[tokio::test]
async fn n11_a_macvtap_carries_a_real_guest() -> Result<()> {
    let stage = Stage::new()?;
    let lan = stage.lan()?;
    stage.host.sh("ip link set lan0 up")?;
    stage.ok("net define m macvtap --uplink lan0").await?;
    let before = stage.host.state()?;
    stage.ok("net start m").await?;
    stage.ok(&format!("net plug m vm1-0 --mac {GUEST}")).await?;
    ensure!(stage.host.sh("ip -d link show vm1-0")?.contains("macvtap mode bridge"));
    let isolated = stage.run("net plug m vm1-1 --isolated").await?;
    assert_says(&isolated.expect_code(REFUSED)?.stderr, &["--mode private"]);
    // Other namespaces have interfaces of the same number, and one /dev: the number of the device is what counts.
    let dir = tempfile::tempdir()?;
    let device = dir.path().join("tap");
    stage.host.sh(&format!(
        "mknod {} c $(cat /sys/class/net/vm1-0/macvtap/tap*/dev | tr : ' ')",
        device.display()
    ))?;
    let guest =
        Guest::spec().disk(DiskSpec::new("a")).plugged_device(&stage.host, &device, GUEST).boot().await?;
    stage.register(&guest).await?;
    has_address(&lan).await?;
    ping_from_guest(&stage, "192.0.2.1").await?;
    drop(guest);
    stage.ok("net stop m --force").await?;
    assert_same(&before, &stage.host.state()?);
    Ok(())
}

#[tokio::test]
async fn n12_vlans_and_bonds_on_a_kernel_that_has_them() -> Result<()> {
    const NAME: &str = "networks::n12_vlans_and_bonds_on_a_kernel_that_has_them";
    const MODULES: [&str; 6] = ["8021q", "bonding", "bridge", "veth", "tun", "nf_tables"];
    if !is_inside() {
        return run_test(&HostVm::default().modules(&MODULES), NAME).await;
    }
    let stage = Stage::new()?;
    let lan = Netns::new()?;
    stage.host.cable("lan0", &lan, "e0")?;
    lan.sh("ip link add link e0 name e0.10 type vlan id 10; ip addr add 192.0.2.1/24 dev e0.10; ip link set e0.10 up")?;
    // A bridge that keeps VLANs apart, with a trunk to the outside.
    let before = stage.host.state()?;
    stage.ok("net define v1 vlan --uplink lan0").await?;
    stage.ok("net start v1").await?;
    let none = stage.run("net plug v1 vm1-0").await?;
    assert_says(&none.expect_code(REFUSED)?.stderr, &["--vlan", "--trunk"]);
    stage.ok("net plug v1 vm1-0 --vlan 10 --trunk 20-22 --trunk 30").await?;
    let vlans = stage.host.sh("bridge vlan show dev vm1-0")?;
    for word in ["10 PVID Egress Untagged", "20", "21", "22", "30"] {
        ensure!(vlans.contains(word), "{word}: {vlans}");
    }
    {
        let client = stage.client("sbr-v1", GUEST)?;
        client.sh("ip addr add 192.0.2.5/24 dev e0")?;
        ensure!(!client.pings("192.0.2.1")?, "a port without a VLAN reaches one");
        let port = stage.host.sh("bridge link | grep -o 'c[0-9]*@' | tr -d @")?;
        stage.host.sh(&format!("bridge vlan add vid 10 dev {} pvid untagged", port.trim()))?;
        ensure!(client.reaches("192.0.2.1")?, "the trunk does not carry VLAN 10");
    }
    stage.ok("net stop v1 --force").await?;
    assert_same(&before, &stage.host.state()?);
    // A VLAN of a bond, in a bridge of its own.
    stage.host.sh("ip link add bond0 type bond mode active-backup miimon 100; ip link set lan0 down")?;
    stage.host.sh("ip link set lan0 master bond0; ip link set bond0 up")?;
    stage.host.sh("until ip link show bond0 | grep -q 'state UP'; do sleep 0.1; done")?;
    let before = stage.host.state()?;
    stage.ok("net define b1 bridge --uplink bond0 --vlan 10").await?;
    stage.ok("net start b1").await?;
    ensure!(stage.host.sh("ip -d link show bond0.10")?.contains("vlan protocol 802.1Q id 10"));
    {
        let client = stage.client("sbr-b1", GUEST)?;
        client.sh("ip addr add 192.0.2.5/24 dev e0")?;
        ensure!(client.reaches("192.0.2.1")?, "no way over VLAN 10 of the bond");
    }
    let slave = stage.run("net define b2 bridge --uplink lan0").await?;
    assert_says(&slave.expect_code(REFUSED)?.stderr, &["lan0", "port of another bridge or bond"]);
    stage.ok("net stop b1").await?;
    assert_same(&before, &stage.host.state()?);
    Ok(())
}
