//! What `snapctl create` refuses, and how it says so: each with its exit code, and a message that tells what
//! was tried, how things stand and what to do (G9, G11, Q1, Q3, Q5).

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use rustix::fs::{IFlags, ioctl_getflags, ioctl_setflags};
use serde_json::json;
use tests::lab::{self, DiskSpec, Format, Guest, Qemu, RawQmp, Run};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{UnixListener, UnixStream};
use tokio::process::Command;
use tokio::task::JoinHandle;

use crate::support::{Scene, Tmpfs, assert_says, two_disks, wait_until};

/// A user who owns nothing.
const NOBODY: u32 = 65534;
/// How many commands run at once.
const CROWD: usize = 20;

async fn scene() -> Result<Option<Scene>> {
    scene_on(Qemu::Distro).await
}

async fn scene_on(qemu: Qemu) -> Result<Option<Scene>> {
    if !lab::available()? {
        return Ok(None);
    }
    Scene::boot(Guest::spec().disks(two_disks()).qemu(qemu)).await.map(Some)
}

/// Runs a command that has to end with `code` and to say each of `words`.
async fn refused(scene: &Scene, line: &str, code: i32, words: &[&str]) -> Result<()> {
    told(scene, line, code, words).await.map(drop)
}

/// As [`refused`], with all that it said.
async fn told(scene: &Scene, line: &str, code: i32, words: &[&str]) -> Result<Run> {
    let run = scene.run(line).await?;
    eprintln!("$ snapctl {line}    # exits {}\n{}{}", run.code, run.stdout, run.stderr);
    assert_says(&run.expect_code(code)?.stderr, words);
    Ok(run)
}

#[tokio::test]
async fn sockets_that_are_not_there_or_not_ours() -> Result<()> {
    let Some(mut scene) = scene().await? else { return Ok(()) };
    let dir = tempfile::tempdir()?;
    let missing = dir.path().join("qmp");
    let add = format!("vm add ghost --qmp {}", missing.display());
    refused(&scene, &add, 9, &["ghost is not running", "there is no socket", "vm discover"]).await?;
    scene.run(&format!("{add} --offline")).await?.ok()?;
    refused(&scene, "create ghost", 9, &["ghost is not running", "there is no socket", "start the VM"])
        .await?;
    drop(std::os::unix::net::UnixListener::bind(&missing)?);
    refused(&scene, "create ghost", 9, &["nobody listens on", "a dead QEMU left"]).await?;
    let talker = answer_with(&dir.path().join("http"), |_| b"HTTP/1.1 400 Bad Request\r\n\r\n".to_vec())?;
    scene.run(&format!("vm add web --qmp {}/http --offline", dir.path().display())).await?.ok()?;
    refused(&scene, "create web", 9, &["web:", "gave no greeting", "mode=control"]).await?;
    talker.abort();

    as_nobody(&scene).await?;
    scene.assert_sound().await
}

/// Runs `snapctl` as a user who may use neither the sockets nor the images.
async fn as_nobody(scene: &Scene) -> Result<()> {
    let home = tempfile::tempdir()?;
    let root = rustix::process::geteuid().is_root();
    let mode = |path: &Path, mode: u32| fs::set_permissions(path, fs::Permissions::from_mode(mode));
    let sockets = [scene.guest.qmp(), scene.guest.agent()];
    if root {
        std::os::unix::fs::chown(home.path(), Some(NOBODY), Some(NOBODY))?;
    }
    let run = async |line: &str| -> Result<Run> {
        let mut command = match root {
            true => Command::new("setpriv"),
            false => Command::new("env"),
        };
        if root {
            command.args([format!("--reuid={NOBODY}"), format!("--regid={NOBODY}"), "--clear-groups".into()]);
        }
        command.arg(lab::snapctl()?).arg("--root").arg(home.path()).args(line.split(' '));
        let output = command.current_dir("/").stdin(Stdio::null()).output().await?;
        let text = |bytes: Vec<u8>| String::from_utf8_lossy(&bytes).into_owned();
        let code = output.status.code().unwrap_or_else(|| 128 + output.status.signal().unwrap_or(0));
        let run = Run {
            line: line.to_owned(),
            code,
            stdout: text(output.stdout),
            stderr: text(output.stderr),
            took: Duration::ZERO,
        };
        eprintln!("$ snapctl {line}    # exits {code}, as another user\n{}{}", run.stdout, run.stderr);
        Ok(run)
    };
    sockets.iter().try_for_each(|socket| mode(socket, 0))?;
    let add = format!("vm add vm1 --qmp {} --agent {}", sockets[0].display(), sockets[1].display());
    let denied = ["no permission to use", "run snapctl as root, or as the user who runs QEMU"];
    assert_says(&run(&add).await?.expect_code(9)?.stderr, &denied);
    run(&format!("{add} --offline")).await?.ok()?;
    assert_says(&run("create vm1").await?.expect_code(9)?.stderr, &denied);
    sockets.iter().try_for_each(|socket| mode(socket, 0o777))?;
    if root {
        // The sockets are open to all, and the images are not.
        let said = run("create vm1 --quiesce").await?;
        assert_says(&said.expect_code(1)?.stderr, &["Permission denied", "everything was undone", "as root"]);
    }
    Ok(())
}

#[tokio::test]
async fn g9_q1_sockets_and_locks_that_somebody_holds() -> Result<()> {
    let Some(mut scene) = scene().await? else { return Ok(()) };
    let me = format!("pid {}", std::process::id());
    let held = RawQmp::connect(&scene.guest.qmp()).await?;
    let words = ["qmp is held by another client", &me, "--wait", "second monitor"];
    refused(&scene, "create vm1 --name held", 9, &words).await?;
    let mut waits = scene.cli.spawn(["create", "vm1", "--name", "waited", "--wait", "60"], &[])?;
    wait_until("snapctl waits for the monitor", || connections(&scene.guest.qmp()) == 2).await?;
    ensure!(waits.try_wait()?.is_none(), "it did not wait");
    drop(held);
    ensure!(waits.wait().await?.success(), "it did not get the monitor");

    let held = UnixStream::connect(scene.guest.agent()).await?;
    let words = ["vm1 could not be quiesced", "qga is held by another client", &me, "nothing was changed"];
    refused(&scene, "create vm1 --quiesce --name held", 4, &words).await?;
    let mut waits =
        scene.cli.spawn(["create", "vm1", "--quiesce", "--name", "waited2", "--wait", "60"], &[])?;
    wait_until("snapctl waits for the agent", || connections(&scene.guest.agent()) == 2).await?;
    ensure!(waits.try_wait()?.is_none(), "it did not wait");
    drop(held);
    ensure!(waits.wait().await?.success(), "it did not get the agent");

    let first = scene.stop_at("create vm1 --name first", "create.prepared").await?;
    let holder = format!("process {} (", first.pid);
    refused(
        &scene,
        "create vm1 --name second",
        11,
        &["vm1 is busy", &holder, "create vm1 --name first", "--wait"],
    )
    .await?;
    let codes = crowd(&scene, "loses", &[]).await?;
    ensure!(codes == [11; CROWD], "{codes:?}");
    first.go_on().await?.expect_code(0)?;
    let codes = crowd(&scene, "races", &[]).await?;
    let won = codes.iter().filter(|code| **code == 0).count();
    ensure!(won >= 1 && codes.iter().all(|code| [0, 11].contains(code)), "{codes:?}");
    let codes = crowd(&scene, "queues", &["--wait", "100"]).await?;
    ensure!(codes == [0; CROWD], "{codes:?}");
    scene.assert_sound().await?;
    let taken = scene.snapshots().await?.len();
    ensure!(taken == 3 + won + CROWD, "{taken} snapshots where {won} won");
    Ok(())
}

/// Exit codes of many commands that were started at once.
async fn crowd(scene: &Scene, name: &str, more: &[&str]) -> Result<Vec<i32>> {
    let names = (0..CROWD).map(|n| format!("{name}{n}"));
    let lines = names.map(|name| ["create", "vm1", "--name"].map(str::to_owned).into_iter().chain([name]));
    let more = more.iter().map(|word| (*word).to_owned());
    let children = lines.map(|line| scene.cli.spawn(line.chain(more.clone()), &[]));
    let mut codes = Vec::new();
    for child in children.collect::<Result<Vec<_>>>()? {
        codes.push(child.wait_with_output().await?.status.code().context("killed")?);
    }
    Ok(codes)
}

/// How many clients have connected to the socket at `path`, accepted or not. Source: proc(5), net/unix.
fn connections(path: &Path) -> usize {
    let table = fs::read_to_string("/proc/net/unix").unwrap_or_default();
    let connected = |line: &&str| line.ends_with(&path.display().to_string()) && !line.contains(" 00010000 ");
    table.lines().filter(connected).count()
}

#[tokio::test]
async fn g11_agents_that_are_none_or_do_not_behave() -> Result<()> {
    let Some(mut scene) = scene().await? else { return Ok(()) };
    let qmp = scene.guest.qmp();
    scene.run(&format!("vm add bare --qmp {}", qmp.display())).await?.ok()?;
    let words = ["no agent socket is registered", "bare.toml", "nothing was changed"];
    refused(&scene, "create bare --quiesce", 4, &words).await?;

    let dir = tempfile::tempdir()?;
    let cases: [(&str, Answer, &str); 7] = [
        ("garbage", |_| b"\xff\x00\x1b[2Jnot json at all\n".to_vec(), "did not answer a sync within 3s"),
        ("half", |_| b"\xff{\"return\": ".to_vec(), "did not answer a sync within 3s"),
        ("nothing", |_| Vec::new(), "did not answer a sync within 3s"),
        (
            "huge",
            |_| [b"\xff{\"return\": \"".as_slice(), &vec![b'a'; 100 << 20]].concat(),
            "more than 16777216 bytes",
        ),
        ("deep", |_| [b"\xff".as_slice(), &vec![b'['; 100_000]].concat(), "deep"),
        (
            "wrong",
            |request| echo(request, "{\"return\": [1, {\"surprise\": 2}]}"),
            "not what the protocol promises",
        ),
        (
            "refuses",
            |request| echo(request, "{\"error\": {\"class\": \"X\", \"desc\": \"no\\u001b[2J\"}}"),
            "refused",
        ),
    ];
    for (name, answer, says) in cases {
        let socket = dir.path().join(name);
        let served = answer_with(&socket, answer)?;
        let add = format!("vm add {name} --qmp {} --agent {}", qmp.display(), socket.display());
        scene.run(&add).await?.ok()?;
        let words = [says, "could not be quiesced", "nothing was changed"];
        let run = told(&scene, &format!("create {name} --quiesce"), 4, &words).await?;
        ensure!(!run.stderr.contains('\u{1b}'), "an escape sequence reaches the terminal: {run:?}");
        ensure!(run.took < Duration::from_secs(30), "{:?}", run.took);
        served.abort();
    }
    scene.assert_sound().await
}

/// What a guest says is shown, escaped, and decides nothing about files of the host.
#[tokio::test]
async fn g12_an_agent_that_lies() -> Result<()> {
    let Some(scene) = scene().await? else { return Ok(()) };
    let dir = tempfile::tempdir()?;
    let socket = dir.path().join("liar");
    let served = answer_with(&socket, lie)?;
    let qmp = scene.guest.qmp();
    scene.run(&format!("vm add liar --qmp {} --agent {}", qmp.display(), socket.display())).await?.ok()?;
    for line in
        ["guest fsinfo liar", "guest network liar", "guest info liar", "create liar --quiesce --name lied"]
    {
        let run = scene.run(line).await?;
        run.ok()?;
        ensure!(!run.stdout.contains('\u{1b}'), "an escape sequence reaches the terminal: {run:?}");
    }
    served.abort();
    // It froze nothing, and nobody can see that; where the overlays lie is not for it to say.
    let snapshot = scene.run("show liar lied --json").await?.ok()?.json()?["snapshot"].clone();
    ensure!(snapshot["freeze"]["filesystems"] == 3, "{snapshot}");
    let images = scene.guest.dir().join("disks");
    for layer in snapshot["disks"].as_array().context("disks")? {
        for file in ["path", "overlay"] {
            let path = Path::new(layer[file].as_str().context("a path")?);
            ensure!(path.parent() == Some(images.as_path()), "{}", path.display());
        }
    }
    scene.guest.wait_records(3).await.map(drop)
}

/// Says yes to everything, and names files of the host as the guest's.
fn lie(request: &[u8]) -> Vec<u8> {
    let text = String::from_utf8_lossy(request).into_owned();
    let supported = ["freeze", "freeze-list", "thaw", "status"].map(|verb| format!("guest-fsfreeze-{verb}"));
    let others = ["guest-get-fsinfo", "guest-network-get-interfaces", "guest-get-osinfo"].map(str::to_owned);
    let commands: Vec<_> = supported
        .iter()
        .chain(&others)
        .map(|name| serde_json::json!({ "name": name, "enabled": true, "success-response": true }))
        .collect();
    let evil = "../../../../etc/\u{1b}[2J";
    let answer = |line: &str| {
        let said = match line {
            _ if line.contains("guest-info") => {
                serde_json::json!({ "version": evil, "supported_commands": commands })
            }
            _ if line.contains("status") => serde_json::json!("thawed"),
            _ if line.contains("fsfreeze") => serde_json::json!(3),
            _ if line.contains("fsinfo") => serde_json::json!([
                { "name": "va.qcow2", "mountpoint": evil, "type": evil, "disk": [{ "dev": "/dev/vda", "serial": evil }] }
            ]),
            _ if line.contains("interfaces") => serde_json::json!([
                { "name": evil, "hardware-address": evil, "ip-addresses":
                    [{ "ip-address": evil, "ip-address-type": "ipv4", "prefix": 8 }] }
            ]),
            _ => serde_json::json!({ "id": "linux", "name": evil, "pretty-name": evil }),
        };
        echo(line.as_bytes(), &serde_json::json!({ "return": said }).to_string())
    };
    text.lines().filter(|line| line.contains("execute")).flat_map(answer).collect()
}

/// What a peer says to what it was sent.
type Answer = fn(&[u8]) -> Vec<u8>;

/// Listens on `socket` and answers every line of every client.
fn answer_with(socket: &Path, answer: Answer) -> Result<JoinHandle<()>> {
    let listener = UnixListener::bind(socket)?;
    Ok(tokio::spawn(async move {
        while let Ok((mut client, _)) = listener.accept().await {
            tokio::spawn(async move {
                let mut request = vec![0; 64 << 10];
                while let Ok(count @ 1..) = client.read(&mut request).await {
                    // A client that has heard enough goes away.
                    if client.write_all(&answer(&request[..count])).await.is_err() {
                        return;
                    }
                }
            });
        }
    }))
}

/// Answers a sync as an agent does, and all else with `otherwise`.
fn echo(request: &[u8], otherwise: &str) -> Vec<u8> {
    let text = String::from_utf8_lossy(request);
    match text.split_once("\"id\":") {
        Some((_, rest)) => {
            let id: String = rest.chars().take_while(char::is_ascii_digit).collect();
            [b"\xff".as_slice(), format!("{{\"return\": {id}}}\n").as_bytes()].concat()
        }
        None => format!("{otherwise}\n").into_bytes(),
    }
}

#[tokio::test]
async fn vms_that_are_busy_or_paused_and_names_that_do_not_do() -> Result<()> {
    busy_on(Qemu::Distro).await
}

#[tokio::test]
async fn vms_that_are_busy_or_paused_on_the_newer_qemu() -> Result<()> {
    busy_on(Qemu::Backports).await
}

async fn busy_on(qemu: Qemu) -> Result<()> {
    let Some(mut scene) = scene_on(qemu).await? else { return Ok(()) };
    scene.run("create vm1 --name one").await?.ok()?;
    names(&scene).await?;
    texts(&scene).await?;
    jobs(&mut scene).await?;
    migration(&mut scene).await?;

    scene.qmp.call("stop", json!({})).await?;
    let words = ["vm1 is paused", "only a running guest can be quiesced", "cont", "without --quiesce"];
    refused(&scene, "create vm1 --quiesce --name paused", 4, &words).await?;
    refused(&scene, "create vm1 --quiesce=try --name paused-try", 3, &["not quiesced", "paused"]).await?;
    scene.run("create vm1 --name paused-plain").await?.ok()?;
    scene.qmp.call("cont", json!({})).await?;
    scene.assert_sound().await
}

async fn names(scene: &Scene) -> Result<()> {
    refused(scene, "create vm1 --name one", 7, &["has a snapshot named one already", "another --name"])
        .await?;
    refused(scene, "create vm1 --name ../up", 2, &["../up", "letter or a digit"]).await?;
    refused(scene, "create vm1 --disk vdz", 6, &["vm1 has no disk named vdz", "its disks are", "va", "sb"])
        .await?;
    refused(scene, "disk path vm1 vdz", 6, &["vm1 has no disk named vdz", "va", "sb"]).await?;
    refused(scene, "show vm1 two", 6, &["vm1 has no snapshot two", "one"]).await?;
    refused(scene, "create vm2", 6, &["no VM named vm2", "registered are: vm1"]).await?;
    scene.run("create vm1 --name only").await?.ok()?;
    refused(scene, "show vm1 on", 2, &["could be any of 2 snapshots", "one", "only"]).await
}

/// What the user wrote reaches no terminal as a command, and a report that nobody reads is no failure.
async fn texts(scene: &Scene) -> Result<()> {
    let odd = "\u{1b}[2Jred\u{7}";
    let label = format!("key={odd}");
    scene.cli.run(["create", "vm1", "--name", "odd", "--description", odd, "--label", &label]).await?.ok()?;
    for line in ["list vm1", "show vm1 odd", "tree vm1"] {
        let shown = scene.run(line).await?;
        ensure!(!shown.ok()?.stdout.contains(['\u{1b}', '\u{7}']), "{shown:?}");
    }
    let record = scene.snapshot("odd").await?.context("it was taken")?;
    assert_eq!((&record["description"], &record["labels"]["key"]), (&json!(odd), &json!(odd)));

    let mut child = scene.cli.spawn(["create", "vm1", "--name", "unread"], &[])?;
    drop(child.stdout.take());
    let output = child.wait_with_output().await?;
    assert_says(&String::from_utf8_lossy(&output.stderr), &["warning: snapshot unread was taken", "report"]);
    ensure!(output.status.code() == Some(3) && scene.snapshot("unread").await?.is_some(), "{output:?}");
    Ok(())
}

async fn jobs(scene: &mut Scene) -> Result<()> {
    let nodes = scene.qmp.call("query-block", json!({})).await?;
    let active = |id: &str| {
        let disks = nodes.as_array().into_iter().flatten();
        let mut found = disks.filter(|disk| disk["qdev"].as_str().is_some_and(|qdev| qdev.contains(id)));
        found.next().map(|disk| disk["inserted"]["node-name"].clone()).unwrap_or_default()
    };
    let (va, sb) = (active("va"), active("sb"));
    let target = json!({ "driver": "null-co", "node-name": "null0", "size": 64 << 20 });
    scene.qmp.call("blockdev-add", target).await?;
    let cases = [
        ("blockdev-mirror", json!({ "device": va, "target": "null0", "sync": "full" }), "va"),
        ("blockdev-backup", json!({ "device": va, "target": "null0", "sync": "full" }), "va"),
        ("block-stream", json!({ "device": &sb }), "sb"),
    ];
    for (command, mut arguments, disk) in cases {
        let job = format!("slow-{command}");
        arguments["job-id"] = json!(job);
        arguments["speed"] = json!(1);
        scene.qmp.call(command, arguments).await?;
        let words = [&job, disk, "vm1", "wait until it has ended", "query-jobs"];
        refused(scene, "create vm1 --name busy", 7, &words).await?;
        scene.qmp.call("block-job-cancel", json!({ "device": job, "force": true })).await?;
        while scene.qmp.call("query-jobs", json!({})).await? != json!([]) {
            tokio::task::yield_now().await;
        }
    }
    scene.qmp.call("blockdev-del", json!({ "node-name": "null0" })).await?;
    // A merge behind snapctl's back ends at the seal.
    ensure!(scene.qmp.call("block-commit", json!({ "device": sb })).await.is_err(), "a layer is not sealed");
    scene.assert_sound().await
}

async fn migration(scene: &mut Scene) -> Result<()> {
    scene.qmp.call("migrate-set-parameters", json!({ "max-bandwidth": 1 })).await?;
    scene.qmp.call("migrate", json!({ "uri": "exec:cat >/dev/null" })).await?;
    refused(scene, "create vm1 --name moving", 7, &["vm1 is being migrated", "wait until it has ended"])
        .await?;
    scene.qmp.call("migrate_cancel", json!({})).await?;
    while scene.qmp.call("query-migrate", json!({})).await?["status"] != "cancelled" {
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    scene.run("create vm1 --name moved-not").await?.ok()?;
    scene.assert_sound().await
}

#[tokio::test]
async fn disks_that_are_left_out_or_cannot_be_snapshotted() -> Result<()> {
    if !lab::available()? {
        return Ok(());
    }
    let spec = Guest::spec().disks(two_disks()).disk(DiskSpec::new("ro").read_only()).cdrom();
    let odd = [
        "-blockdev",
        "driver=null-co,node-name=null0,size=1048576",
        "-device",
        "virtio-blk-pci,drive=null0,id=odd,bus=rp0",
    ];
    let mut scene = Scene::boot(spec.args(odd)).await?;
    let words = ["disk odd of vm1 cannot be snapshotted", "null-co", "to snapshot the others: --disk"];
    refused(&scene, "create vm1", 7, &words).await?;
    refused(&scene, "create vm1 --disk odd", 7, &["odd", "null-co"]).await?;
    refused(&scene, "create vm1 --disk ro", 7, &["disk ro of vm1", "read-only", "leave it out"]).await?;
    refused(&scene, "create vm1 --disk cd0", 7, &["disk cd0 of vm1", "no medium", "leave it out"]).await?;
    let words = ["ro is left out", "cd0 is left out", "odd is left out"];
    refused(&scene, "create vm1 --disk va --disk sb --name chosen", 0, &words).await?;
    scene.qmp.call("device_del", json!({ "id": "odd" })).await?;
    scene.qmp.event("DEVICE_DELETED", Duration::from_secs(60)).await?;
    let words = ["ro is left out: read-only", "cd0 is left out: no medium"];
    refused(&scene, "create vm1 --quiesce --name rest", 0, &words).await?;
    scene.assert_thawed().await
}

#[tokio::test]
async fn files_that_are_not_what_they_should_be() -> Result<()> {
    if !lab::available()? {
        return Ok(());
    }
    let dirs = [tempfile::tempdir()?, tempfile::tempdir()?];
    let same = |dir: &tempfile::TempDir| -> Result<DiskSpec> {
        let image = dir.path().join("disk.raw");
        fs::File::create(&image)?.set_len(16 << 20)?;
        Ok(DiskSpec::new(if dir.path() == dirs[0].path() { "s0" } else { "s1" }).raw().blank().image(&image))
    };
    let spec = Guest::spec().disks(two_disks()).disk(same(&dirs[0])?).disk(same(&dirs[1])?);
    let mut scene = Scene::boot(spec).await?;
    foreign_file(&scene).await?;
    moved_base(&scene).await?;
    scene.run("create vm1 --quiesce --name same-names").await?.ok()?;
    scene.run("create vm1 --name again").await?.ok()?;
    scene.assert_sound().await
}

/// Somebody's file lies where an overlay is to be: it stays, and nothing is taken.
async fn foreign_file(scene: &Scene) -> Result<()> {
    for content in ["precious", ""] {
        let stopped = scene.stop_at("create vm1 --name foreign", "create.begun").await?;
        let overlay = scene.guest.dir().join("disks").join(planned_overlay(scene, "va.")?);
        fs::write(&overlay, content)?;
        let ended = stopped.go_on().await?;
        eprintln!("{}", ended.stderr);
        let name = overlay.display().to_string();
        assert_says(&ended.expect_code(1)?.stderr, &[&name, "exists", "everything was undone"]);
        assert_eq!(fs::read_to_string(&overlay)?, content, "somebody's file was changed");
        fs::remove_file(&overlay)?;
    }
    Ok(())
}

/// The name of the overlay that is being made, from the journal's newest pages.
fn planned_overlay(scene: &Scene, start: &str) -> Result<String> {
    let journal = fs::read(scene.cli.root().join("var/lib/snapctl/state.db-wal"))?;
    let text = String::from_utf8_lossy(&journal);
    let overlays = text.rmatch_indices(start).map(|(at, _)| &text[at..]);
    let mut names = overlays.filter_map(|rest| rest.split_inclusive(".qcow2").next());
    let found = names.find(|name| name.len() == start.len() + "12345678.qcow2".len());
    Ok(found.context("the journal names no overlay")?.to_owned())
}

/// A base that was replaced or moved under QEMU.
async fn moved_base(scene: &Scene) -> Result<()> {
    let base = scene.guest.disks()[0].path.clone();
    let aside = base.with_extension("aside");
    fs::rename(&base, &aside)?;
    let words = ["is not the file that QEMU has open", "replaced or moved", "nothing was changed"];
    refused(scene, "create vm1 --name moved", 7, &words).await?;
    fs::copy(&aside, &base)?;
    refused(scene, "create vm1 --name moved", 7, &words).await?;
    Ok(fs::rename(&aside, &base)?)
}

#[tokio::test]
async fn q8_no_space_is_refused_before_anything_is_made() -> Result<()> {
    if !lab::available()? {
        return Ok(());
    }
    let Some(small) = Tmpfs::mount("size=80m,nr_inodes=40")? else { return Ok(()) };
    let image = small.path().join("small.raw");
    fs::File::create(&image)?.set_len(64 << 20)?;
    let disk = DiskSpec::new("sm").raw().blank().image(&image);
    let mut scene = Scene::boot(Guest::spec().disks(two_disks()).disk(disk)).await?;
    scene.run("create vm1 --name fits").await?.ok()?;

    let filler = small.path().join("filler");
    fs::write(&filler, vec![1; 60 << 20])?;
    let place = small.path().display().to_string();
    let words = [place.as_str(), "MiB", "nothing was changed", "make room"];
    refused(&scene, "create vm1 --quiesce --name full", 1, &words).await?;
    fs::remove_file(&filler)?;
    // Room for bytes, and none for another file.
    let fill = |n: usize| fs::File::create(small.path().join(format!("f{n}"))).is_ok();
    ensure!((0..100).any(|n| !fill(n)), "the file system is not full");
    let words = [place.as_str(), "room for 0 more files", "nothing was changed", "make room"];
    refused(&scene, "create vm1 --quiesce --name full", 1, &words).await?;
    for file in fs::read_dir(small.path())?.filter_map(|entry| Some(entry.ok()?.path())) {
        if fs::metadata(&file)?.len() == 0 {
            fs::remove_file(&file)?;
        }
    }
    scene.run("create vm1 --quiesce --name fits-again").await?.ok()?;
    scene.assert_sound().await
}

#[tokio::test]
async fn q5_a_vm_that_was_started_on_a_stale_layer() -> Result<()> {
    let Some(scene) = scene().await? else { return Ok(()) };
    scene.run("create vm1 --quiesce --name one").await?.ok()?;
    let active = scene.active_layers().await?;
    let Scene { guest, cli, .. } = scene;
    for disk in guest.disks() {
        let denied = fs::File::options().write(true).open(&disk.path);
        ensure!(denied.is_err(), "{} is not sealed", disk.path.display());
        unseal(&disk.path)?;
    }
    let guest = guest.boot_again(|disk| (disk.path.clone(), disk.spec.format)).await?;
    let qmp = guest.lab_qmp().await?;
    let scene = Scene { guest, cli, qmp };

    let words = ["was started on", "snapshot one", "stop the VM at once"];
    refused(&scene, "create vm1 --name two", 7, &words).await?;
    refused(&scene, "create vm1 --disk sb --name two", 7, &[active["sb"].to_str().context("path")?]).await?;
    let check = told(&scene, "check vm1", 13, &[]).await?;
    assert_says(&check.stdout, &["stale-layer", "holds snapshot one", "disk path"]);
    assert_says(&told(&scene, "doctor vm1", 3, &[]).await?.stdout, &["BAD", "holds snapshot one"]);
    // A start script gets the layer that the VM should run on.
    for (disk, layer) in &active {
        let path = told(&scene, &format!("disk path vm1 {disk}"), 0, &["runs on"]).await?;
        assert_eq!(path.stdout.trim(), layer.display().to_string());
    }
    let format = |id: &str| if active[id].ends_with(".raw") { Format::Raw } else { Format::Qcow2 };
    let Scene { guest, cli, .. } = scene;
    let guest = guest.boot_again(|disk| (active[disk.id()].clone(), format(disk.id()))).await?;
    let qmp = guest.lab_qmp().await?;
    Scene { guest, cli, qmp }.run("check vm1").await.map(drop)
}

/// Takes the seal off a layer, as an administrator would who knows better.
fn unseal(path: &PathBuf) -> Result<()> {
    let file = fs::File::open(path)?;
    if let Ok(flags) = ioctl_getflags(&file) {
        ioctl_setflags(&file, flags - IFlags::IMMUTABLE)?;
    }
    Ok(fs::set_permissions(path, fs::Permissions::from_mode(0o644))?)
}

/// Commands that only look at the catalogue neither wait for one that works nor fail for want of a lock.
#[tokio::test]
async fn who_only_looks_waits_for_nobody() -> Result<()> {
    let Some(mut scene) = scene().await? else { return Ok(()) };
    scene.run("create vm1 --name one").await?.ok()?;
    let stopped = scene.stop_at("create vm1 --name two", "create.prepared").await?;
    for line in ["list vm1", "show vm1 one", "list"] {
        let run = scene.run(line).await?;
        assert_says(&run.ok()?.stdout, &["one"]);
        ensure!(run.took < Duration::from_secs(10), "{line} took {:?}", run.took);
    }
    assert_says(&scene.run("list vm1").await?.stderr, &["vm1 is busy"]);
    stopped.go_on().await?.expect_code(0)?;
    scene.assert_sound().await?;

    // A file where the directory of the locks should be: as on a file system that cannot be written.
    let run_dir = scene.cli.root().join("run/snapctl");
    let aside = scene.cli.root().join("run/aside");
    fs::rename(&run_dir, &aside)?;
    fs::write(&run_dir, "")?;
    for line in ["list vm1", "show vm1 one", "tree vm1", "check vm1", "disk list vm1", "vm show vm1"] {
        scene.run(line).await?.ok()?;
    }
    // One that works needs its lock.
    let create = scene.run("create vm1 --name three").await?;
    assert_says(&create.expect_code(1)?.stderr, &["run/snapctl"]);
    fs::remove_file(&run_dir)?;
    fs::rename(&aside, &run_dir)?;
    scene.assert_sound().await
}

/// One VM that cannot be settled is told beside those that can, in one document.
#[tokio::test]
async fn recover_tells_of_every_vm() -> Result<()> {
    let Some(scene) = scene().await? else { return Ok(()) };
    let (qmp, agent) = (scene.guest.qmp(), scene.guest.agent());
    scene.run(&format!("vm add gone --qmp {} --agent {}", qmp.display(), agent.display())).await?.ok()?;
    scene.run_faulty("create vm1 --name kept", "create.switched=kill").await?.expect_code(137)?;
    scene.run_faulty("create gone --name lost", "create.prepared=kill").await?.expect_code(137)?;
    fs::remove_file(scene.cli.root().join("etc/snapctl/vms/gone.toml"))?;

    let run = scene.run("recover --json").await?;
    let told = run.expect_code(6)?.json()?;
    ensure!(told["recovered"][0]["outcome"] == "finished", "{told}");
    ensure!(told["failed"][0]["vm"] == "gone" && told["failed"][0]["exit_code"] == 6, "{told}");
    assert_says(&run.stderr, &["gone is not registered any more", "snapctl vm add"]);
    scene.run(&format!("vm add gone --qmp {} --agent {}", qmp.display(), agent.display())).await?.ok()?;
    scene.run("recover").await?.ok()?;
    // Its snapshots are listed also when it is not registered.
    scene.run("create gone --name later").await?.ok()?;
    scene.run("vm remove gone --keep-snapshots").await?.ok()?;
    assert_says(&scene.run("list gone").await?.ok()?.stdout, &["later"]);
    scene.assert_settled().await
}

/// A name that two disks have finds neither.
#[tokio::test]
async fn a_name_of_two_disks_is_refused() -> Result<()> {
    let Some(scene) = scene().await? else { return Ok(()) };
    let definition = scene.cli.root().join("etc/snapctl/vms/vm1.toml");
    let text = fs::read_to_string(&definition)?;
    fs::write(&definition, format!("{text}\n[disks.sb]\ndevice = \"va\"\n"))?;
    for line in ["create vm1 --disk sb", "disk path vm1 sb", "flatten vm1 --disk sb"] {
        let run = scene.run(line).await?;
        assert_says(
            &run.expect_code(2)?.stderr,
            &["sb names 2 disks of vm1", "hint: each goes by a name of its own"],
        );
    }
    // Both have other names, and all disks need none.
    scene.run("create vm1 --name all").await?.ok()?;
    scene.run("disk path vm1 va").await?.ok()?;
    scene.run("check vm1").await?.ok().map(drop)
}
