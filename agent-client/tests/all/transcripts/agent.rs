//! Agents that lie, flood, stall and break off: whatever a guest can say.

use agent_client::{Connection, Limits, Matching};

use super::*;

const TIME: Call = Call::Ask("guest-get-time");

/// `guest-get-time`, answered with `reply`.
fn time(reply: Step) -> Vec<Step> {
    vec![Step::Expect("guest-get-time"), reply]
}

fn reply(value: &str) -> Step {
    send(&format!("{{\"return\": {value}}}\n"))
}

/// `before`, and then an answered command: the connection must still be sound.
fn then_time(mut before: Vec<Step>) -> Vec<Step> {
    before.extend([Step::Expect("guest-get-time"), reply("\"sound\"")]);
    before
}

/// Typed commands, each with its command's name, its reply and what comes of it.
fn typed(replies: &[(&'static str, &'static str, &'static str, Expected)]) -> Case {
    let mut peer = Vec::new();
    let mut calls = Vec::new();
    for (name, command, value, expected) in replies {
        peer.extend([Step::Expect(command), reply(value)]);
        let expected = match expected {
            Expected::Ok(text) => ok(text),
            Expected::Fails(kind, text) => fails(kind, text),
        };
        calls.push((Call::Guest(name), expected));
    }
    agent(then_time(peer), {
        calls.push((TIME, ok("sound")));
        calls
    })
}

const FREEZER: &str = r#"{"version": "7.2.0", "supported_commands": [
    {"name": "guest-fsfreeze-freeze", "enabled": true, "success-response": true},
    {"name": "guest-fsfreeze-freeze-list", "enabled": false},
    {"name": "guest-exec", "enabled": true}, {"name": "guest-exec-status", "enabled": true},
    {"name": "guest-exec-status", "enabled": true, "since": "tomorrow"}]}"#;

/// An agent that has told what it has, and then plays `steps`.
fn informed(steps: Vec<Step>, calls: Vec<(Call, Expected)>) -> Case {
    let mut peer = vec![Step::Expect("guest-info"), reply(FREEZER)];
    peer.extend(steps);
    agent(peer, calls)
}

transcripts! {
    // Sync.
    g10_sync_never_answered:
        raw(vec![Step::ExpectSync, Step::Stall], vec![(Call::Agent, fails("timeout", "guest-sync-delimited"))]).limit(SHORT);
    g9_a_socket_that_nobody_serves:
        raw(vec![Step::Stall], vec![(Call::Agent, fails("timeout", "guest-sync-delimited within 300ms"))]).limit(SHORT);
    g10_a_sync_of_somebody_else_answered_first: raw(
        then_time(vec![Step::ExpectSync, send("x"), Step::Send(b"\xff{\"return\": 4711}\n\xff{\"return\": $sync}\n".to_vec())]),
        vec![(Call::Agent, ok("")), (TIME, ok("sound"))]);
    g10_two_syncs_and_the_complaints_between: raw(
        then_time(vec![Step::ExpectSync,
            Step::Send(b"\xff{\"return\": 4711}\n{\"error\": {\"class\": \"GenericError\", \"desc\": \"JSON parse error\"}}\n\xff{\"return\": $sync}\n".to_vec())]),
        vec![(Call::Agent, ok("")), (TIME, ok("sound"))]);
    g10_half_a_reply_of_somebody_else: raw(
        then_time(vec![Step::ExpectSync, send("ame\": \"x\", \"list\": [{\"a"), echo()]),
        vec![(Call::Agent, ok("")), (TIME, ok("sound"))]);
    g10_half_a_reply_and_a_line_end: raw(
        then_time(vec![send("{\"return\": [{\"name\": \"cut\n{\"a\": [[[\n"), Step::ExpectSync, echo()]),
        vec![(Call::Agent, ok("")), (TIME, ok("sound"))]);
    g10_garbage_before_anything_was_asked: raw(
        then_time(vec![send("login: \u{1b}[0m\n}}}]\"\n"), Step::ExpectSync, send("Password: \n"), echo()]),
        vec![(Call::Agent, ok("")), (TIME, ok("sound"))]);
    g10_whole_replies_of_somebody_else: raw(
        then_time(vec![send("{\"return\": 1}\n{\"error\": {\"desc\": \"no\"}}\n"), Step::ExpectSync, reply("{\"a\": 1}"), reply("$sync"), echo()]),
        vec![(Call::Agent, ok("")), (TIME, ok("sound"))]);
    g10_an_echo_without_its_sentinel: raw(
        vec![Step::ExpectSync, reply("$sync"), Step::Stall], vec![(Call::Agent, fails("timeout", ""))]).limit(SHORT);
    g10_only_wrong_echoes: raw(
        vec![Step::ExpectSync,
            Step::Send(b"\xff{\"return\": 1}\n\xff{\"return\": \"$sync\"}\n\xff{\"return\": $sync.0}\n\xff{\"return\": -$sync}\n\xff{\"return\": [$sync]}\n\xff{\"return\": null}\n".to_vec()),
            Step::Stall],
        vec![(Call::Agent, fails("timeout", ""))]).limit(SHORT);
    g10_half_a_sentinel: raw(
        vec![Step::ExpectSync, Step::Send(b"\xff{\"return\": ".to_vec()), Step::Close],
        vec![(Call::Agent, fails("closed: eof", "guest-sync-delimited"))]);
    g10_a_sentinel_within_a_reply: raw(
        then_time(vec![Step::ExpectSync, Step::Send(b"\xff{\"retu\xff{\"return\": $sync}\n".to_vec())]),
        vec![(Call::Agent, ok("")), (TIME, ok("sound"))]);
    g10_a_storm_of_sentinels: raw(
        then_time(vec![Step::ExpectSync, Step::Flood(vec![0xff], 1_000_000), echo(), Step::Flood(vec![0xff], 1_000_000)]),
        vec![(Call::Agent, ok("")), (TIME, ok("sound"))]);
    g10_an_echo_byte_by_byte: raw(
        then_time(vec![Step::ExpectSync, Step::Trickle(b"\xff{\"return\": $sync}\n".to_vec())]),
        vec![(Call::Agent, ok("")), (TIME, ok("sound"))]);
    g11_a_line_without_end_before_the_echo: raw(
        vec![Step::ExpectSync, Step::CutOff(vec![b'x'; 4096], 26_000)],
        vec![(Call::Agent, fails("closed: limit", "more than 16777216 bytes"))]).memory(20);
    g11_garbage_without_end_before_the_echo: raw(
        vec![Step::ExpectSync, Step::Flood(b"garbage\n".to_vec(), 1_000_000), echo()], vec![(Call::Agent, ok(""))]);

    // Resync.
    g10_a_late_reply_is_not_the_next_one_s: agent(
        then_time(vec![Step::Expect("guest-get-host-name"), Step::ExpectSync, reply("\"late\""), echo()]),
        vec![(Call::AskShort("guest-get-host-name"), fails("timeout", "guest-get-host-name")), (TIME, ok("sound"))]);
    g10_half_a_late_reply: agent(
        then_time(vec![Step::Expect("guest-get-host-name"), Step::ExpectSync, send("{\"return\": \"la"), echo()]),
        vec![(Call::AskShort("guest-get-host-name"), fails("timeout", "")), (TIME, ok("sound"))]);
    g10_a_caller_that_went_away: agent(
        then_time(vec![Step::Expect("guest-get-host-name"), Step::ExpectSync, reply("\"late\""), echo()]),
        vec![(Call::AskDropped("guest-get-host-name"), ok("dropped")), (TIME, ok("sound"))]);
    g10_a_late_line_that_was_cut: agent(
        then_time(vec![Step::Expect("guest-get-host-name"), Step::ExpectSync, send("{\"return\": \"la\n\"}}\n"), echo()]),
        vec![(Call::AskDropped("guest-get-host-name"), ok("dropped")), (TIME, ok("sound"))]);
    g2_an_agent_that_hangs_and_comes_back: agent(
        then_time(vec![Step::Expect("guest-get-host-name"), Step::ExpectSync, Step::ExpectSync,
            reply("\"late\""), Step::Send(b"\xff{\"return\": 1}\n{\"error\": {\"desc\": \"JSON parse error\"}}\n\xff{\"return\": $sync}\n".to_vec())]),
        vec![(Call::AskShort("guest-get-host-name"), fails("timeout", "guest-get-host-name")),
            (Call::AskShort("guest-get-time"), fails("timeout", "guest-sync-delimited")), (TIME, ok("sound"))]);
    g10_a_socket_given_up_has_nothing_under_way: agent(
        vec![Step::Expect("guest-get-host-name"), Step::ExpectSync, reply("7"), echo()],
        vec![(Call::AskShort("guest-get-host-name"), fails("timeout", "")), (Call::IntoSocket, ok(""))]);
    g2_a_socket_of_an_agent_that_hangs_is_not_given_up: agent(
        vec![Step::Expect("guest-get-host-name"), Step::ExpectSync, Step::Stall],
        vec![(Call::AskShort("guest-get-host-name"), fails("timeout", "")), (Call::IntoSocket, fails("local", "guest-sync-delimited"))]);
    g10_replies_that_nobody_asked_for: raw(
        then_time(vec![Step::ExpectSync, Step::Send(b"\xff{\"return\": $sync}\n{\"return\": 1}\n{\"return\": 2}\n{\"error\": {\"desc\": \"x\"}}\n".to_vec())]),
        vec![(Call::Agent, ok("")), (TIME, ok("sound"))]);

    // Ends.
    g3_the_end_before_the_sync: raw(vec![Step::Close], vec![(Call::Agent, fails("closed: eof", ""))]);
    g3_the_end_after_the_sync:
        raw(vec![Step::ExpectSync, Step::Close], vec![(Call::Agent, fails("closed: eof", ""))]);
    g3_the_end_after_a_command: agent(
        vec![Step::Expect("guest-get-time"), Step::Close],
        vec![(TIME, fails("closed: eof", "guest-get-time")), (TIME, fails("closed: eof", ""))]);
    g3_the_end_within_a_reply: agent(
        vec![Step::Expect("guest-get-time"), send("{\"return\": 12"), Step::Close], vec![(TIME, fails("closed: eof", ""))]);
    g3_the_end_in_idleness: agent(vec![Step::Close], vec![(TIME, fails("closed: eof", ""))]);

    // Sizes.
    g11_a_line_without_end: agent(
        vec![Step::Expect("guest-get-time"), Step::CutOff(vec![b'x'; 4096], 26_000)],
        vec![(TIME, fails("closed: limit", "more than 16777216 bytes"))]).memory(20);
    g11_a_million_levels: agent(
        vec![Step::Expect("guest-get-time"), send("{\"return\":"), Step::CutOff(b"[".to_vec(), 1_000_000)],
        vec![(TIME, fails("closed: limit", "128 levels"))]);
    g11_one_level_too_deep: agent(
        time(reply(&format!("{}{}", "[".repeat(128), "]".repeat(128)))), vec![(TIME, fails("closed: limit", "128 levels"))]);
    g11_a_reply_of_15_mebibytes: agent(
        vec![Step::Expect("guest-get-time"), send("{\"return\": \""), Step::Flood(vec![b'x'; 1024], 15 << 10), send("\"}\n")],
        vec![(TIME, ok("\"xxx"))]).memory(52);
    g11_more_file_systems_than_fit: agent(
        vec![Step::Expect("guest-get-fsinfo"), send("{\"return\": ["), Step::CutOff(b"{},".to_vec(), 5_000_000)],
        vec![(Call::Guest("filesystems"), fails("closed: limit", "262144 values"))]);
    g11_more_file_systems_than_are_taken: agent(
        vec![Step::Expect("guest-get-fsinfo"), send("{\"return\": ["), Step::Flood(b"{},".to_vec(), 100_000), send("{}]}\n")],
        vec![(Call::Guest("filesystems"), ok("4096 "))]).memory(32);
    g11_more_addresses_than_fit: agent(
        vec![Step::Expect("guest-network-get-interfaces"), send("{\"return\": [{\"ip-addresses\": ["), Step::CutOff(b"{},".to_vec(), 5_000_000)],
        vec![(Call::Guest("interfaces"), fails("closed: limit", "values"))]);
    g11_more_commands_than_fit: agent(
        vec![Step::Expect("guest-info"), send("{\"return\": {\"supported_commands\": ["), Step::CutOff(b"{\"name\":\"\"},".to_vec(), 1_300_000)],
        vec![(Call::Guest("info"), fails("closed: limit", "values"))]);
    g11_a_command_s_name_of_15_mebibytes: agent(
        vec![Step::Expect("guest-info"), send("{\"return\": {\"supported_commands\": [{\"name\": \""), Step::Flood(vec![b'x'; 1024], 15 << 10),
            send("\", \"enabled\": true}]}}\n")],
        vec![(Call::Guest("info"), ok("…"))]).memory(68);

    // Values.
    g11_wrong_types_everywhere: typed(&[
        ("status", "guest-fsfreeze-status", "5", fails("unexpected", "guest-fsfreeze-status")),
        ("status", "guest-fsfreeze-status", "\"melted\"", fails("unexpected", "neither thawed nor frozen")),
        ("status", "guest-fsfreeze-status", "null", fails("unexpected", "`null`")),
        ("thaw", "guest-fsfreeze-thaw", "{}", fails("unexpected", "guest-fsfreeze-thaw")),
        ("filesystems", "guest-get-fsinfo", "{}", fails("unexpected", "guest-get-fsinfo")),
        ("filesystems", "guest-get-fsinfo", "[5]", fails("unexpected", "guest-get-fsinfo")),
        ("filesystems", "guest-get-fsinfo", "[{\"name\": null}]", fails("unexpected", "invalid type")),
        ("filesystems", "guest-get-fsinfo", "[{\"used-bytes\": -1}]", fails("unexpected", "-1")),
        ("filesystems", "guest-get-fsinfo", "[{\"name\": \"a\", \"name\": \"b\"}]", fails("unexpected", "duplicate")),
        ("interfaces", "guest-network-get-interfaces", "\"eth0\"", fails("unexpected", "guest-network")),
        ("interfaces", "guest-network-get-interfaces", "[{\"ip-addresses\": [[1]]}]", fails("unexpected", "guest-network")),
        ("os", "guest-get-osinfo", "[1]", fails("unexpected", "guest-get-osinfo")),
        ("os", "guest-get-osinfo", "{\"id\": {}}", fails("unexpected", "guest-get-osinfo")),
        ("hostname", "guest-get-host-name", "{\"host-name\": 5}", fails("unexpected", "guest-get-host-name")),
        ("hostname", "guest-get-host-name", "{}", fails("unexpected", "missing field")),
        ("hostname", "guest-get-host-name", "{\"host-name\": \"\\udfff\"}", fails("unexpected", "guest-get-host-name")),
        ("time", "guest-get-time", "\"noon\"", fails("unexpected", "guest-get-time")),
        ("time", "guest-get-time", "9223372036854775808", fails("unexpected", "9223372036854775808")),
        ("time", "guest-get-time", "1e3", fails("unexpected", "1000")),
        ("trim", "guest-fstrim", "{\"paths\": 5}", fails("unexpected", "guest-fstrim")),
        ("trim", "guest-fstrim", "{\"paths\": [{\"trimmed\": \"all\"}]}", fails("unexpected", "guest-fstrim")),
        ("info", "guest-info", "{\"supported_commands\": {}}", fails("unexpected", "guest-info")),
        ("info", "guest-info", "{\"version\": 7}", fails("unexpected", "guest-info")),
        ("info", "guest-info", "{\"version\": \"7\", \"supported_commands\": [{\"enabled\": true}]}", fails("unexpected", "name"))]);
    t20_replies_from_the_future: typed(&[
        ("status", "guest-fsfreeze-status", "\"thawed\"", ok("thawed")),
        ("filesystems", "guest-get-fsinfo", "[{\"name\": \"vda1\", \"mountpoint\": \"/\", \"type\": \"ext5\", \"disk\": [{\"bus-type\": \"warp\"}], \"mood\": 1}]", ok("ext5")),
        ("interfaces", "guest-network-get-interfaces", "[{\"name\": \"e\", \"ip-addresses\": [{\"ip-address-type\": \"ipv7\", \"ip-address\": \"x\", \"prefix\": 256}]}]", ok("256")),
        ("os", "guest-get-osinfo", "{\"id\": \"haiku\", \"x\": 1}", ok("haiku")),
        ("os", "guest-get-osinfo", "{}", ok("None")),
        ("time", "guest-get-time", "-1", ok("-1")),
        ("trim", "guest-fstrim", "{\"paths\": [{\"path\": \"/\", \"error\": \"no\", \"minimum\": 0}], \"x\": []}", ok("no")),
        ("trim", "guest-fstrim", "{}", ok("[]"))]);
    g7_counts_that_are_none: informed(
        then_time(vec![
            Step::Expect("guest-fsfreeze-freeze"), reply("-1"), Step::Expect("guest-fsfreeze-freeze"), reply("\"5\""),
            Step::Expect("guest-fsfreeze-freeze"), reply("null"), Step::Expect("guest-fsfreeze-freeze"), reply("18446744073709551616"),
            Step::Expect("guest-fsfreeze-freeze"), reply("2.5"), Step::Expect("guest-fsfreeze-freeze"), reply("0"),
            Step::Expect("guest-fsfreeze-thaw"), reply("-1"), Step::Expect("guest-fsfreeze-thaw"), reply("3")]),
        vec![(Call::Guest("freeze"), fails("unexpected", "`-1`")), (Call::Guest("freeze"), fails("unexpected", "\"5\"")),
            (Call::Guest("freeze"), fails("unexpected", "`null`")), (Call::Guest("freeze"), fails("unexpected", "18446744073709551616")),
            (Call::Guest("freeze"), fails("unexpected", "2.5")), (Call::Guest("freeze"), ok("0")),
            (Call::Guest("thaw"), fails("unexpected", "`-1`")), (Call::Guest("thaw"), ok("3")), (TIME, ok("sound"))]);
    g11_not_a_number: agent(time(reply("NaN")), vec![(TIME, fails("closed: malformed", "NaN"))]);
    g11_a_key_twice:
        agent(time(send("{\"return\": 1, \"return\": 2}\n")), vec![(TIME, fails("closed: malformed", ""))]);
    g11_bytes_that_are_no_utf_8: agent(
        time(Step::Send(b"{\"return\": \"\xfe\xc0\"}\n".to_vec())), vec![(TIME, fails("closed: malformed", ""))]);
    g11_garbage_instead_of_a_reply: agent(
        time(send("Kernel panic - not syncing\u{1b}[0m\n")), vec![(TIME, fails("closed: malformed", "syncing\\u{1b}[0m"))]);
    g11_a_reply_and_an_error_at_once: agent(
        then_time(time(send("{\"return\": 1, \"error\": {\"class\": \"X\", \"desc\": \"both\"}}\n"))),
        vec![(TIME, fails("refused", "both")), (TIME, ok("sound"))]);
    g11_events_and_empty_objects_before_a_reply: agent(
        vec![Step::Expect("guest-get-time"), Step::Flood(b"{}\n{\"event\": \"X\"}\n".to_vec(), 50_000), reply("5")],
        vec![(TIME, ok("5"))]);
    g11_an_id_that_was_never_sent:
        agent(time(send("{\"id\": 99, \"return\": 5, \"x\": {}}\n")), vec![(TIME, ok("5"))]);

    // What it has and what it refuses.
    g8_a_command_that_is_switched_off: informed(
        then_time(vec![]),
        vec![(Call::Guest("freeze-list"), fails("unavailable", "guest-fsfreeze-freeze-list is not available: it is switched off")),
            (Call::Require("guest-fsfreeze-freeze"), ok("")), (TIME, ok("sound"))]);
    g8_a_command_that_it_does_not_know: informed(
        then_time(vec![]), vec![(Call::Require("guest-warp"), fails("unavailable", "(version 7.2.0) does not know it")), (TIME, ok("sound"))]);
    g8_a_command_that_is_not_found: agent(
        then_time(time(send("{\"error\": {\"class\": \"CommandNotFound\", \"desc\": \"Command guest-get-time has been disabled: the agent is in frozen state\"}}\n"))),
        vec![(TIME, fails("unavailable", "the agent is in frozen state")), (TIME, ok("sound"))]);
    p7_an_error_that_steers_the_terminal: agent(
        time(send("{\"error\": {\"class\": \"GenericError\", \"desc\": \"\\u001b]0;x\\u0007\\u202e\u{202d}\u{9b}\"}}\n")),
        vec![(TIME, fails("refused", "\\u{1b}]0;x\\u{7}\\u{202e}\\u{202d}\\u{9b}"))]);
    p7_a_class_that_steers_the_terminal: agent(
        time(send("{\"error\": {\"class\": \"CommandNotFound\", \"desc\": \"\\u001b[8m\"}}\n")),
        vec![(TIME, fails("unavailable", "\\u{1b}[8m"))]);
    p7_a_version_that_steers_the_terminal: agent(
        vec![Step::Expect("guest-info"), reply("{\"version\": \"\\u001b[8m\\u202e1\", \"supported_commands\": []}")],
        vec![(Call::Require("guest-exec"), fails("unavailable", "(version \\u{1b}[8m\\u{202e}1)"))]);
    p7_a_status_that_steers_the_terminal: typed(&[
        ("status", "guest-fsfreeze-status", "\"\\u001b[2Jthawed\\u200f\"", fails("unexpected", "`\\u{1b}[2Jthawed\\u{200f}`"))]);
    p7_a_file_system_that_steers_the_terminal: typed(&[
        ("filesystems", "guest-get-fsinfo", "[{\"name\": \"\u{9b}2J\u{202e}\", \"used-bytes\": \"\\u001b[1m\"}]", fails("unexpected", "\\u{202e}"))]);

    // What is asked for on the way to a freeze.
    g2_a_sync_program_that_never_ends: informed(
        vec![Step::Expect("guest-exec"), reply("{\"pid\": 7}"), Step::Expect("guest-exec-status"), Step::Stall],
        vec![(Call::Guest("sync-disks"), fails("timeout", "guest-exec-status"))]);
    g11_a_sync_program_without_a_pid: informed(
        then_time(vec![Step::Expect("guest-exec"), reply("{}")]),
        vec![(Call::Guest("sync-disks"), fails("unexpected", "pid")), (TIME, ok("sound"))]);
    g8_no_sync_program: informed(
        then_time(vec![Step::Expect("guest-exec"), send("{\"error\": {\"desc\": \"Failed to execute child process\"}}\n")]),
        vec![(Call::Guest("sync-disks"), ok("false")), (TIME, ok("sound"))]);
    g13_an_agent_that_never_reads: agent(
        vec![Step::Stall], vec![(Call::AskBulk(1 << 20), fails("timeout", "guest-file-write")), (Call::AskShort("guest-get-time"), fails("timeout", ""))])
        .memory(16);
}

/// Between connecting and the sync the reader may already have run, on a runtime of several threads.
#[tokio::test]
async fn g10_garbage_that_is_read_before_the_sync_is_sent() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("socket");
    let listener = UnixListener::bind(&path).unwrap();
    let steps = vec![send("login:\n{\"event\": \"READ\"}\n"), Step::ExpectSync, echo()];
    let peer = std::thread::spawn(move || play(&listener, steps));
    let connection = Connection::connect(&path, Limits::AGENT, Matching::Order).await.unwrap();
    let mut events = connection.events();
    let read = tokio::time::timeout(AMPLE, events.recv()).await.expect("the garbage ended the connection");
    assert_eq!(read.unwrap().name, "READ");
    connection.sync(7, AMPLE).await.unwrap();
    drop(connection);
    peer.join().unwrap().unwrap();
}
