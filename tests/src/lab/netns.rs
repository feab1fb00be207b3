//! Network namespaces: hosts, clients and the outside, without touching this machine's own interfaces.

use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};

use anyhow::{Context, Result, ensure};

/// A namespace; dropping it ends what runs in it and removes it.
#[derive(Debug)]
pub struct Netns {
    name: String,
}

/// Everything of a host's network that snapctl could change: what a stop has to give back.
#[derive(Debug, PartialEq, Eq)]
pub struct HostState(Vec<String>);

impl HostState {
    /// What differs, a line each.
    pub fn difference(&self, other: &Self) -> Vec<String> {
        let gone = self.0.iter().filter(|line| !other.0.contains(line)).map(|line| format!("- {line}"));
        let new = other.0.iter().filter(|line| !self.0.contains(line)).map(|line| format!("+ {line}"));
        gone.chain(new).collect()
    }
}

impl Netns {
    /// A new one, with its loopback up.
    ///
    /// # Errors
    /// When this user may not make one.
    pub fn new() -> Result<Self> {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let name = format!("snl-{}-{}", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed));
        run(&format!("ip netns add {name}"))?;
        let made = Self { name };
        // An address that is still being looked for elsewhere changes under the test.
        made.sh("ip link set lo up; for f in /proc/sys/net/ipv6/conf/*/accept_dad; do echo 0 >$f; done")?;
        Ok(made)
    }

    /// Its name, for `ip netns`.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Runs a line of shell in it, and expects it to succeed.
    ///
    /// # Errors
    /// When it fails; with what it said.
    pub fn sh(&self, line: &str) -> Result<String> {
        let (ok, said) = self.try_sh(line)?;
        ensure!(ok, "in {}: {line}: {said}", self.name);
        Ok(said)
    }

    /// Runs a line of shell in it; tells whether it succeeded.
    ///
    /// # Errors
    /// When it cannot be run.
    pub fn try_sh(&self, line: &str) -> Result<(bool, String)> {
        outcome(Command::new("ip").args(["netns", "exec", &self.name, "sh", "-ec", line]))
    }

    /// A cable from `here` in this one to `there` in another.
    ///
    /// # Errors
    /// When it cannot be made.
    pub fn cable(&self, here: &str, other: &Self, there: &str) -> Result<()> {
        let (name, peer) = (&self.name, &other.name);
        run(&format!("ip -n {name} link add {here} type veth peer name {there} netns {peer}"))?;
        run(&format!("ip -n {name} link set {here} up; ip -n {peer} link set {there} up"))?;
        Ok(())
    }

    /// Asks for an address on `link` as a guest would. The server's answer becomes the client's configuration.
    ///
    /// # Errors
    /// When nobody answers.
    pub fn ask_for_address(&self, link: &str, hostname: &str) -> Result<String> {
        let script = tempfile::Builder::new().prefix("udhcpc").tempfile()?.into_temp_path();
        let text = "#!/bin/sh\n[ \"$1\" = bound ] || exit 0\nip addr add $ip/${mask:-24} dev $interface\n\
            [ -z \"$router\" ] || ip route add default via $router\n";
        std::fs::write(&script, text)?;
        let path = script.display();
        self.sh(&format!(
            "chmod +x {path}; busybox udhcpc -i {link} -n -q -f -t 10 -T 1 -s {path} -x hostname:{hostname} 2>&1"
        ))?;
        let said = self.sh(&format!("ip -4 -o addr show dev {link}"))?;
        let address = said.split_whitespace().skip_while(|word| *word != "inet").nth(1);
        Ok(address.with_context(|| format!("no address: {said}"))?.to_owned())
    }

    /// Whether an answer to one of several pings comes from `address`, for who expects none.
    ///
    /// # Errors
    /// When ping cannot be run.
    pub fn pings(&self, address: &str) -> Result<bool> {
        Ok(self.try_sh(&format!("ping -c 3 -i 0.2 -W 1 {address}"))?.0)
    }

    /// Whether an answer to a ping comes from `address` in the end, for who expects one: on a busy machine the first may
    /// be lost while a neighbour is looked for.
    ///
    /// # Errors
    /// When ping cannot be run.
    pub fn reaches(&self, address: &str) -> Result<bool> {
        Ok(self.try_sh(&format!("for n in 1 2 3 4 5 6 7 8 9 10; do ping -c 1 -W 2 {address} && exit 0; sleep 0.2; done; exit 1"))?.0)
    }

    /// What is there now, but for numbers that always go up.
    ///
    /// # Errors
    /// When it cannot be listed.
    pub fn state(&self) -> Result<HostState> {
        let conf = "grep -rH . /proc/sys/net/ipv4/conf /proc/sys/net/ipv6/conf 2>/dev/null | \
            grep -E 'forwarding|accept_ra:|disable_ipv6' | sort";
        let mut lines = Vec::new();
        for line in [
            "ip -o link | sed 's/^[0-9]*: //; s/@if[0-9]*//'",
            "ip -o addr | sed 's/^[0-9]*: //; s/ valid_lft.*//'",
            "ip route; ip -6 route | sed 's/ expires .*//'",
            "nft -s list ruleset",
            conf,
        ] {
            lines.extend(self.sh(line)?.lines().map(str::to_owned));
        }
        lines.extend(self.processes()?);
        Ok(HostState(lines))
    }

    /// What runs in it, by command line.
    fn processes(&self) -> Result<Vec<String>> {
        let pids = run(&format!("ip netns pids {}", self.name))?;
        let mut lines: Vec<String> = pids
            .lines()
            .filter_map(|pid| std::fs::read(format!("/proc/{pid}/cmdline")).ok())
            .map(|line| String::from_utf8_lossy(&line).replace('\0', " "))
            .filter(|line| !line.is_empty())
            .collect();
        lines.sort();
        Ok(lines)
    }
}

impl Drop for Netns {
    fn drop(&mut self) {
        // Errors have nobody to be told to here.
        let _ = run(&format!("ip netns pids {} | xargs -r kill -9", self.name));
        // A cable is gone at both ends at once; the kernel takes a namespace away in its own time.
        let _ =
            self.try_sh("for link in /sys/class/net/*; do ip link del ${link##*/} 2>/dev/null || true; done");
        let _ = run(&format!("ip netns del {}", self.name));
    }
}

fn run(line: &str) -> Result<String> {
    let (ok, said) = outcome(Command::new("sh").args(["-ec", line]))?;
    ensure!(ok, "{line}: {said}");
    Ok(said)
}

fn outcome(command: &mut Command) -> Result<(bool, String)> {
    let output = command.stdin(Stdio::null()).output().with_context(|| format!("{command:?}"))?;
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    let said = text(&output.stdout) + if output.status.success() { "" } else { "\n" };
    let said = if output.status.success() { said } else { said + &text(&output.stderr) };
    Ok((output.status.success(), said))
}
