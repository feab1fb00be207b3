//! Monitors that lie, flood, stall and break off.

use super::*;

fn greeting_with(from: &str, to: &str) -> Step {
    assert!(GREETING.contains(from));
    Step::Send(format!("{}\r\n", GREETING.replace(from, to)).into_bytes())
}

/// A monitor that greets with `first`, and then takes `qmp_capabilities`.
fn greeted(first: Step) -> Vec<Step> {
    vec![first, Step::Expect("qmp_capabilities"), answer("{}")]
}

/// One `query-status` that is answered with `reply`.
fn status(reply: Step) -> Vec<Step> {
    vec![Step::Expect("query-status"), reply]
}

/// `before`, and then an answered `query-status`: the connection must still be sound.
fn then_status(mut before: Vec<Step>) -> Vec<Step> {
    before.extend([Step::Expect("query-status"), answer("\"sound\"")]);
    before
}

/// `events` while a `query-status` is under way.
fn heard(events: Vec<Step>) -> Vec<Step> {
    let mut peer = vec![Step::Expect("query-status")];
    peer.extend(events);
    peer.push(answer("\"sound\""));
    peer
}

const STATUS: Call = Call::Raw("query-status");

/// A reply whose value is so many arrays in each other.
fn nested(depth: usize) -> Step {
    send(&format!("{{\"return\": {}{}, \"id\": $id}}\n", "[".repeat(depth), "]".repeat(depth)))
}

/// Every typed query with its reply, and what has to be found in it.
fn typed(replies: &[(&'static str, &'static str, Expected)]) -> Case {
    let mut peer = Vec::new();
    let mut calls = Vec::new();
    for (name, reply, expected) in replies {
        peer.extend([Step::Expect(name), answer(reply)]);
        let expected = match expected {
            Expected::Ok(text) => ok(text),
            Expected::Fails(kind, text) => fails(kind, text),
        };
        calls.push((Call::Typed(name), expected));
    }
    qmp(peer, calls)
}

fn split_everywhere() -> Case {
    let reply = "{\"return\": \"\\u0061\\\"}{\", \"id\": ";
    let mut peer = Vec::new();
    for at in 1..reply.len() {
        let (first, rest) = reply.split_at(at);
        let rest = format!("{rest}$id}}\n").into_bytes();
        peer.extend([Step::Expect("query-status"), Step::Trickle(first.into()), Step::Send(rest)]);
    }
    qmp(peer, vec![(Call::Times("query-status", reply.len() - 1), ok(r#""\u0061\"}{""#))])
}

transcripts! {
    // Greetings.
    q1_silence_instead_of_a_greeting:
        raw(vec![Step::Stall], vec![(Call::Qmp, fails("no greeting", "no greeting within 300ms"))]).limit(SHORT);
    q1_a_greeting_that_stops_half_way:
        raw(vec![send("{\"QMP\": {\"ver"), Step::Stall], vec![(Call::Qmp, fails("no greeting", ""))]).limit(SHORT);
    g11_a_greeting_byte_by_byte:
        raw(greeted(Step::Trickle(format!("{GREETING}\n").into())), vec![(Call::Qmp, ok("7.2.22 Debian"))]);
    g11_a_web_server: raw(
        vec![send("HTTP/1.1 400 Bad Request\r\n\r\n")],
        vec![(Call::Qmp, fails("not qmp", "`HTTP/1.1 400 Bad Request"))]);
    g11_an_ssh_server:
        raw(vec![send("SSH-2.0-OpenSSH_9.2\r\n")], vec![(Call::Qmp, fails("not qmp", "`SSH-2.0"))]);
    g11_a_greeting_of_garbage: raw(
        vec![Step::Send(vec![0x80, 0xc0, 0, 7, b'\n'])], vec![(Call::Qmp, fails("not qmp", "\\u{0}\\u{7}"))]);
    g11_a_greeting_that_is_a_sentinel:
        raw(vec![Step::Send(vec![0xff])], vec![(Call::Qmp, fails("not qmp", ""))]);
    g11_a_reply_instead_of_a_greeting:
        raw(vec![send("{\"return\": {}}\n")], vec![(Call::Qmp, fails("not qmp", "{\"return\": {}}"))]);
    g11_a_greeting_with_wrong_types:
        raw(vec![greeting_with("\"major\": 7", "\"major\": \"7\"")], vec![(Call::Qmp, fails("not qmp", ""))]);
    g11_a_greeting_with_a_number_past_64_bits: raw(
        vec![greeting_with("\"major\": 7", "\"major\": 36893488147419103232")],
        vec![(Call::Qmp, fails("not qmp", ""))]);
    g11_a_greeting_with_a_key_twice:
        raw(vec![greeting_with("\"major\": 7", "\"major\": 7, \"major\": 8")], vec![(Call::Qmp, fails("not qmp", ""))]);
    g11_a_greeting_of_70_kib:
        raw(vec![Step::CutOff(b"{\"QMP\": \"".repeat(8), 20_000)], vec![(Call::Qmp, fails("closed: limit", ""))]);
    g11_a_greeting_in_a_hundred_arrays:
        raw(vec![Step::Send(b"{\"a\":".repeat(100))], vec![(Call::Qmp, fails("closed: limit", "16 levels"))]);
    t20_a_greeting_from_the_future: raw(
        greeted(greeting_with("[\"oob\"]", "[\"oob\", \"warp\", {\"x\": 1}], \"mood\": null")),
        vec![(Call::Qmp, ok("7.2.22"))]);
    t20_a_greeting_in_pretty_mode: raw(
        greeted(Step::Send(GREETING.replace(", ", ",\r\n    ").into_bytes())), vec![(Call::Qmp, ok("7.2.22"))]);
    g11_a_second_greeting: raw(
        then_status(greeted(send(&format!("{GREETING}\r\n{GREETING}\r\n")))),
        vec![(Call::Qmp, ok("")), (STATUS, ok("sound"))]);
    p7_a_banner_that_steers_the_terminal: raw(
        vec![send("\u{1b}[2J\u{202e}root\u{2028}\u{9b}31m\n")],
        vec![(Call::Qmp, fails("not qmp", "`\\u{1b}[2J\\u{202e}root\\u{2028}\\u{9b}31m"))]);
    p7_a_version_that_steers_the_terminal: raw(
        greeted(greeting_with("Debian", "\\u001b[2J\\u200f")), vec![(Call::Qmp, ok("7.2.22 \\u{1b}[2J\\u{200f}"))]);

    // Ends.
    q2_the_end_before_a_greeting: raw(vec![Step::Close], vec![(Call::Qmp, fails("closed: eof", "the greeting"))]);
    q2_the_end_within_a_greeting:
        raw(vec![send("{\"QMP\": {"), Step::Close], vec![(Call::Qmp, fails("closed: eof", "the greeting"))]);
    q2_the_end_within_the_negotiation: raw(
        vec![send(GREETING), Step::Expect("qmp_capabilities"), Step::Close],
        vec![(Call::Qmp, fails("closed: eof", "qmp_capabilities"))]);
    g11_capabilities_refused: raw(
        vec![send(GREETING), Step::Expect("qmp_capabilities"), send("{\"error\": {\"class\": \"GenericError\", \"desc\": \"no\"}, \"id\": $id}\n")],
        vec![(Call::Qmp, fails("refused", "qmp_capabilities was refused: no"))]);
    q1_capabilities_never_answered: raw(
        vec![send(GREETING), Step::Expect("qmp_capabilities"), Step::Stall],
        vec![(Call::Qmp, fails("timeout", "no reply to qmp_capabilities"))]).limit(SHORT);
    q2_the_end_after_a_command: qmp(
        vec![Step::Expect("query-status"), Step::Close],
        vec![(STATUS, fails("closed: eof", "query-status")), (STATUS, fails("closed: eof", ""))]);
    q2_the_end_within_a_reply: qmp(
        vec![Step::Expect("query-status"), send("{\"return\": {\"run"), Step::Close],
        vec![(STATUS, fails("closed: eof", "query-status"))]);
    q2_the_end_with_a_command_prepared: qmp(
        vec![Step::Close], vec![(Call::Fired, fails("closed: eof", "query-status"))]);

    // Sizes.
    g11_a_line_without_end: qmp(
        vec![Step::Expect("query-status"), Step::CutOff(vec![b'x'; 4096], 50_000)],
        vec![(STATUS, fails("closed: limit", "more than 67108864 bytes")), (STATUS, fails("closed: limit", ""))])
        .memory(72);
    g11_a_string_without_end: qmp(
        vec![Step::Expect("query-status"), send("{\"return\": \""), Step::CutOff(vec![b'x'; 4096], 50_000)],
        vec![(STATUS, fails("closed: limit", "more than 67108864 bytes"))]).memory(72);
    g11_pretty_whitespace_without_end: qmp(
        vec![Step::Expect("query-status"), send("{\"return\": "), Step::CutOff(b"\r\n \t".repeat(1024), 50_000)],
        vec![(STATUS, fails("closed: limit", "more than 67108864 bytes"))]).memory(72);
    g11_blank_lines_are_nothing:
        qmp(then_status(vec![Step::Flood(b"\r\n \n".to_vec(), 1_000_000)]), vec![(STATUS, ok("sound"))]);
    g11_just_as_deep_as_allowed: qmp(status(nested(127)), vec![(STATUS, ok("[[["))]);
    g11_one_level_too_deep: qmp(status(nested(128)), vec![(STATUS, fails("closed: limit", "128 levels"))]);
    g11_a_million_levels: qmp(
        vec![Step::Expect("query-status"), send("{\"return\":"), Step::CutOff(b"[".to_vec(), 1_000_000)],
        vec![(STATUS, fails("closed: limit", "128 levels"))]);
    g11_a_million_levels_of_objects: qmp(
        vec![Step::Expect("query-status"), Step::CutOff(b"{\"a\":".to_vec(), 1_000_000)],
        vec![(STATUS, fails("closed: limit", "128 levels"))]);
    g11_little_text_that_would_be_much_memory: qmp(
        vec![Step::Expect("query-block"), send("{\"return\": ["), Step::CutOff(b"{},".to_vec(), 22_000_000)],
        vec![(Call::Typed("query-block"), fails("closed: limit", "2097152 values"))]).memory(16);
    g11_an_id_that_would_be_much_memory: qmp(
        then_status(vec![
            send("{\"return\": 1, \"id\": ["), Step::Flood(b"{\"\":0},".to_vec(), 500_000), send("0]}\n")]),
        vec![(STATUS, ok("sound"))]).memory(16);

    // What is no JSON, and what is JSON but not this protocol.
    g11_garbage_instead_of_a_reply: qmp(
        status(send("\u{1b}]0;owned\u{7}\n")),
        vec![(STATUS, fails("closed: malformed", "`\\u{1b}]0;owned\\u{7}"))]);
    g11_bytes_that_are_no_utf_8: qmp(
        status(Step::Send(b"{\"return\": \"\xc3\x28\", \"id\": $id}\n".to_vec())),
        vec![(STATUS, fails("closed: malformed", ""))]);
    g11_not_a_number: qmp(status(answer("NaN")), vec![(STATUS, fails("closed: malformed", "NaN"))]);
    g11_infinity: qmp(status(answer("-Infinity")), vec![(STATUS, fails("closed: malformed", ""))]);
    g11_a_bare_number: qmp(status(send("5\n")), vec![(STATUS, fails("closed: malformed", "`5`"))]);
    g11_a_million_brackets_that_are_no_object: qmp(
        vec![Step::Expect("query-status"), Step::Flood(b"[".to_vec(), 1_000_000), send("\n")],
        vec![(STATUS, fails("closed: malformed", "`[[["))]);
    g11_a_bracket_too_many: qmp(status(send("}\n")), vec![(STATUS, fails("closed: malformed", "`}`"))]);
    g11_a_line_cut_within_a_string:
        qmp(status(send("{\"return\": \"abc\n")), vec![(STATUS, fails("closed: malformed", ""))]);
    g11_a_key_twice: qmp(
        status(send("{\"return\": 1, \"return\": 2, \"id\": $id}\n")),
        vec![(STATUS, fails("closed: malformed", ""))]);
    g11_an_id_twice: qmp(
        status(send("{\"return\": 1, \"id\": $id, \"id\": $id}\n")),
        vec![(STATUS, fails("closed: malformed", ""))]);
    g11_an_error_of_the_wrong_type: qmp(
        status(send("{\"error\": \"no\", \"id\": $id}\n")), vec![(STATUS, fails("closed: malformed", ""))]);
    g11_half_a_surrogate: typed(&[
        ("query-status", r#"{"running": true, "status": "\ud800"}"#, fails("unexpected", "query-status")),
        ("query-status", r#"{"running": true, "status": "a"}"#, ok("\"a\""))]);
    g11_null_is_a_reply: qmp(
        vec![Step::Expect("query-status"), answer("null"), Step::Expect("query-status"), answer("null")],
        vec![(STATUS, ok("null")), (Call::Typed("query-status"), fails("unexpected", "`null`"))]);
    g11_a_reply_and_an_error_at_once: qmp(
        status(send("{\"return\": {}, \"error\": {\"class\": \"X\", \"desc\": \"both\"}, \"id\": $id}\n")),
        vec![(STATUS, fails("refused", "both"))]);
    g11_an_error_that_is_null:
        qmp(status(send("{\"return\": 1, \"error\": null, \"id\": $id}\n")), vec![(STATUS, ok("1"))]);
    g11_an_error_that_says_nothing:
        qmp(status(send("{\"error\": {}, \"id\": $id}\n")), vec![(STATUS, fails("refused", "query-status was refused"))]);
    g11_neither_reply_nor_error: qmp(
        then_status(vec![Step::Expect("query-status"), send("{\"id\": $id}\n{}\n"), answer("1")]),
        vec![(STATUS, ok("1")), (STATUS, ok("sound"))]);
    g11_a_storm_of_sentinels:
        qmp(then_status(vec![Step::Flood(vec![0xff], 1_000_000)]), vec![(STATUS, ok("sound"))]);
    g11_a_flood_of_empty_objects:
        qmp(then_status(vec![Step::Flood(b"{}\n".to_vec(), 100_000)]), vec![(STATUS, ok("sound"))]);
    g11_wrong_types_everywhere: typed(&[
        ("query-status", "[]", fails("unexpected", "query-status")),
        ("query-status", r#"{"running": 1, "status": "running"}"#, fails("unexpected", "invalid type")),
        ("query-status", r#"{"running": true, "running": true, "status": ""}"#, fails("unexpected", "duplicate")),
        ("query-name", r#"{"name": 5}"#, fails("unexpected", "query-name")),
        ("query-block", "{}", fails("unexpected", "query-block")),
        ("query-block", r#"[{"inserted": []}]"#, fails("unexpected", "query-block")),
        ("query-named-block-nodes", r#"[{"node-name": "n"}]"#, fails("unexpected", "missing field")),
        ("query-named-block-nodes", r#"[{"drv": "raw", "image": {"format": "raw", "virtual-size": -1}}]"#,
            fails("unexpected", "-1")),
        ("query-named-block-nodes", r#"[{"drv": "raw", "image": {"format": "raw", "virtual-size": 18446744073709551616}}]"#,
            fails("unexpected", "18446744073709551616")),
        ("x-debug-query-block-graph", r#"{"nodes": [], "edges": {}}"#, fails("unexpected", "x-debug")),
        ("x-debug-query-block-graph", r#"{"nodes": [{"id": 0.5, "type": ""}], "edges": []}"#, fails("unexpected", "0.5")),
        ("query-jobs", "[[]]", fails("unexpected", "query-jobs")),
        ("query-jobs", "[null]", fails("unexpected", "query-jobs")),
        ("query-block-jobs", r#"[{"device": null, "type": "x"}]"#, fails("unexpected", "query-block-jobs")),
        ("query-migrate", r#"{"status": []}"#, fails("unexpected", "query-migrate")),
        ("query-chardev", r#"[{"label": "c", "frontend-open": "yes"}]"#, fails("unexpected", "query-chardev")),
        ("blockdev-del", "5", fails("unexpected", "blockdev-del")),
        ("query-status", r#"{"running": true, "status": "sound"}"#, ok("sound"))]);
    t20_replies_from_the_future: typed(&[
        ("query-status", r#"{"running": true, "status": "dreaming", "mood": {}}"#, ok("dreaming")),
        ("query-name", r#"{"nick": 1}"#, ok("None")),
        ("query-block", r#"[{"device": "", "qdev": "/machine/peripheral/d", "io-status": "melting", "locked": 5,
            "inserted": {"drv": "qcow4", "node-name": "n", "image": {"format": "qcow4", "virtual-size": 1, "x": []},
            "detect_zeroes": "perhaps", "dirty-bitmaps": [{"status": "quantum"}]}}]"#, ok("qcow4")),
        ("query-named-block-nodes", r#"[{"drv": "nbd2", "node-name": "n",
            "image": {"format": "x", "virtual-size": 9223372036854775807}}]"#, ok("9223372036854775807")),
        ("x-debug-query-block-graph", r#"{"nodes": [{"id": 1, "type": "block-ghost", "name": "n"}],
            "edges": [{"parent": 1, "child": 1, "name": "haunts", "perm": ["fly"], "shared-perm": []}]}"#, ok("haunts")),
        ("query-jobs", r#"[{"id": "j", "type": "teleport", "status": "elsewhere", "current-progress": -1}]"#, ok("elsewhere")),
        ("query-block-jobs", r#"[{"device": "j", "type": "teleport", "io-status": "x", "status": "elsewhere"}]"#, ok("teleport")),
        ("query-migrate", r#"{"status": "wormhole"}"#, ok("true")),
        ("query-migrate", "{}", ok("false")),
        ("query-chardev", r#"[{"label": "c", "filename": "carrier-pigeon:", "frontend-open": true, "x": null}]"#, ok("pigeon")),
        ("blockdev-del", r#"{"more": "than promised"}"#, ok(""))]);

    // Who is answered.
    q2_a_reply_that_nobody_asked_for: qmp(
        then_status(vec![send("{\"return\": \"for somebody\", \"id\": 4711}\n{\"return\": \"for nobody\"}\n")]),
        vec![(STATUS, ok("sound"))]);
    q2_ids_of_every_wrong_type: qmp(
        status(send("{\"return\": 0, \"id\": \"$id\"}\n{\"return\": 0, \"id\": $id.0}\n{\"return\": 0, \"id\": -$id}\n\
            {\"return\": 0, \"id\": [$id]}\n{\"return\": 0, \"id\": {\"id\": $id}}\n{\"return\": 0, \"id\": null}\n\
            {\"return\": 0, \"id\": 1e400}\n{\"return\": 0, \"id\": 36893488147419103232}\n{\"return\": 5, \"id\": $id}\n")),
        vec![(STATUS, ok("5"))]);
    q2_a_reply_with_a_wrong_id_only: qmp(
        vec![Step::Expect("query-status"), send("{\"return\": 1, \"id\": \"$id\"}\n"), Step::Stall],
        vec![(STATUS, fails("timeout", "query-status"))]).limit(SHORT);
    q2_the_same_reply_twice: qmp(
        then_status(vec![Step::Expect("query-status"), answer("1"), answer("2"), answer("3")]),
        vec![(STATUS, ok("1")), (STATUS, ok("sound"))]);
    q2_an_error_without_an_id: qmp(
        status(send("{\"error\": {\"class\": \"GenericError\", \"desc\": \"JSON parse error\"}}\n{\"return\": 5, \"id\": $id}\n")),
        vec![(STATUS, ok("5"))]);
    q2_many_commands_answered_in_reverse:
        qmp(then_status(vec![Step::Reversed(60)]), vec![(Call::AtOnce(60), ok("")), (STATUS, ok("sound"))]);
    q2_a_late_reply_is_not_the_next_one_s: qmp(
        vec![Step::Expect("query-name"), Step::Expect("query-status"),
            send("{\"return\": \"late\", \"id\": 2}\n{\"return\": \"mine\", \"id\": $id}\n")],
        vec![(Call::Raw("query-name"), fails("timeout", "it may still be carried out")), (STATUS, ok("mine"))])
        .limit(Duration::from_secs(1));
    q2_a_caller_that_went_away: qmp(
        vec![Step::Expect("query-name"), send("{\"event\": \"GO\"}\n"), Step::Expect("query-status"),
            send("{\"return\": \"late\", \"id\": 2}\n{\"return\": \"mine\", \"id\": $id}\n")],
        vec![(Call::Dropped("query-name"), ok("dropped")), (STATUS, ok("mine"))]);

    // How replies arrive.
    g11_a_reply_byte_by_byte:
        qmp(status(Step::Trickle(b"{\"return\": {\"a\": \"}\\\"\"}, \"id\": $id}".to_vec())), vec![(STATUS, ok("}\\\""))]);
    g11_a_reply_split_everywhere: split_everywhere();
    t20_a_reply_in_pretty_mode: qmp(
        status(send("{\r\n    \"return\": {\r\n        \"a\": [\r\n        ]\r\n    },\r\n    \"id\": $id\r\n}\r\n")),
        vec![(STATUS, ok("\"a\""))]);
    g11_replies_without_line_ends: qmp(
        vec![Step::Expect("query-status"), send("{\"event\":\"A\"}{\"return\":5,\"id\":$id}{\"event\":\"B\"}")],
        vec![(STATUS, ok("5"))]);

    // Events.
    g11_a_hundred_thousand_events_before_a_reply: qmp(
        vec![Step::Expect("query-status"),
            Step::Flood(b"{\"event\": \"RTC_CHANGE\", \"data\": {\"offset\": 1}, \"timestamp\": {\"seconds\": 1, \"microseconds\": 2}}\r\n".to_vec(), 100_000),
            answer("5")],
        vec![(Call::Listen, ok("")), (STATUS, ok("5")), (Call::Event, ok("RTC_CHANGE"))]);
    g11_large_events_that_nobody_reads: qmp(
        vec![Step::Expect("query-status"),
            Step::Flood(format!("{{\"event\": \"E\", \"data\": \"{}\"}}\n", "x".repeat(15_000)).into(), 8000), answer("5")],
        vec![(Call::Listen, ok("")), (STATUS, ok("5")), (Call::Event, ok("E \"xxx"))]).memory(40);
    g11_huge_events_are_left_out: qmp(
        heard(vec![
            Step::Flood(format!("{{\"event\": \"HUGE\", \"data\": \"{}\"}}\n", "x".repeat(1 << 20)).into(), 64),
            send("{\"event\": \"SMALL\"}\n")]),
        vec![(Call::Listen, ok("")), (STATUS, ok("sound")), (Call::Event, ok("SMALL null"))]);
    t20_an_event_from_the_future: qmp(
        heard(vec![send("{\"event\": \"BLOCK_WARPED\", \"data\": {\"where\": [1]}, \"timestamp\": \"noon\", \"x\": 1}\n")]),
        vec![(Call::Listen, ok("")), (STATUS, ok("sound")), (Call::Event, ok("BLOCK_WARPED {\"where\":[1]}"))]);
    t20_an_event_with_a_new_value: qmp(
        heard(vec![send("{\"event\": \"JOB_STATUS_CHANGE\", \"data\": {\"status\": \"elsewhere\", \"id\": \"j\"}}\n")]),
        vec![(Call::Listen, ok("")), (STATUS, ok("sound")), (Call::Event, ok("elsewhere"))]);
    g11_an_event_without_data: qmp(
        heard(vec![send("{\"event\": \"STOP\"}\n")]),
        vec![(Call::Listen, ok("")), (STATUS, ok("sound")), (Call::Event, ok("STOP null"))]);
    g11_an_event_with_data_of_the_wrong_type: qmp(
        heard(vec![send("{\"event\": \"STOP\", \"data\": 5}\n")]),
        vec![(Call::Listen, ok("")), (STATUS, ok("sound")), (Call::Event, ok("STOP 5"))]);
    g11_events_without_a_name: qmp(
        heard(vec![send("{\"event\": 5}\n{\"event\": null}\n{\"event\": {}}\n{\"event\": \"A\", \"data\": \"\\ud800\"}\n{\"event\": \"LAST\"}\n")]),
        vec![(Call::Listen, ok("")), (STATUS, ok("sound")), (Call::Event, ok("LAST"))]);
    g11_an_event_that_is_also_a_reply: qmp(
        status(send("{\"event\": \"X\", \"return\": 1, \"id\": $id}\n{\"return\": 2, \"id\": $id}\n")), vec![(STATUS, ok("2"))]);

    // Refusals.
    q9_a_command_that_is_not_there: qmp(
        status(send("{\"error\": {\"class\": \"CommandNotFound\", \"desc\": \"The command query-status has not been found\"}, \"id\": $id}\n")),
        vec![(STATUS, fails("refused", "has not been found"))]);
    p7_an_error_that_steers_the_terminal: qmp(
        status(send("{\"error\": {\"class\": \"\\u001b[1m\", \"desc\": \"\\u001b[2J\\u0007\\r\\nok \\u202egnp.exe\\u2066\\u061c\"}, \"id\": $id}\n")),
        vec![(STATUS, fails("refused", "\\u{1b}[2J\\u{7}\\r\\nok \\u{202e}gnp.exe\\u{2066}\\u{61c}"))]);
    p7_an_error_of_a_mebibyte: qmp(
        vec![Step::Expect("query-status"), send("{\"error\": {\"desc\": \""), Step::Flood(vec![b'\x7f'; 1024], 1024),
            send("\"}, \"id\": $id}\n")],
        vec![(STATUS, fails("refused", "\\u{7f}…"))]);
    p7_a_reply_that_steers_the_terminal: typed(&[
        ("query-status", "\"\\u001b[2J\u{202e}\"", fails("unexpected", "\\u{202e}"))]);

    // What is sent.
    q2_a_monitor_that_never_reads: qmp(
        vec![Step::Stall],
        vec![(Call::Bulk("x-big", 1 << 20), fails("timeout", "x-big")), (STATUS, fails("timeout", "query-status")),
            (Call::PreparedDropped, fails("timeout", "query-status"))]).limit(SHORT).memory(16);
    q2_a_prepared_command_is_taken_back: qmp(
        then_status(vec![Step::Aborted]), vec![(Call::PreparedDropped, ok("")), (STATUS, ok("sound"))]);
    q2_prepared_commands_taken_back_in_a_row: qmp(
        then_status(vec![Step::Aborted, Step::Aborted, Step::Expect("query-status"), answer("\"fired\"")]),
        vec![(Call::PreparedDropped, ok("")), (Call::PreparedDropped, ok("")), (Call::Fired, ok("fired")), (STATUS, ok("sound"))]);
    q2_a_fired_command_that_is_never_answered: qmp(
        vec![Step::Expect("query-status"), Step::Stall],
        vec![(Call::Fired, fails("timeout", "it may still be carried out"))]).limit(SHORT);
    q2_a_prepared_command_is_refused: qmp(
        then_status(vec![Step::Expect("query-status"), send("{\"error\": {\"desc\": \"no\"}, \"id\": $id}\n")]),
        vec![(Call::Fired, fails("refused", "no")), (STATUS, ok("sound"))]);
    a_descriptor_goes_with_its_command: qmp(
        vec![Step::Descriptors("add-fd", 1), Step::Descriptors("add-fd", 1)],
        vec![(Call::Descriptors(1, 7), ok("file 7;")), (Call::Descriptors(1, 8), ok("file 8;"))]);
    as_many_descriptors_as_qemu_takes: qmp(
        vec![Step::Descriptors("add-fd", 16)], vec![(Call::Descriptors(16, 0), ok("file 14;file 15;"))]);
    one_descriptor_too_many_is_refused_here: qmp(
        then_status(vec![]),
        vec![(Call::Descriptors(17, 0), fails("local", "17 descriptors, 16 are the most")), (STATUS, ok("sound"))]);
}
