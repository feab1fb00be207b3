//! The fuzzer's entry with random words of the protocol, whole and broken.

use proptest::prelude::*;

use crate::entry::conversation;

fn word() -> impl Strategy<Value = Vec<u8>> {
    let words: &[&[u8]] = &[
        b"{\"return\": {}, \"id\": 1}\n",
        b"{\"return\": {}, \"id\": 2}\n",
        b"\xff{\"return\": 7}\n",
        b"{\"return\": 7}\n",
        b"{\"return\": null}\n",
        b"{\"error\": {\"class\": \"X\", \"desc\": \"\\u001b[2J\\u202e\"}, \"id\": 1}\n",
        b"{\"event\": \"STOP\", \"data\": {}}\n",
        b"{\"QMP\": {}}\n",
        b"{\"return\": [",
        b"[{},{},{},{},{},{},{},{},{},{},{},{},{},{},{},{},{},{},{},{}],",
        b"{\"a\":{\"a\":{\"a\":{\"a\":{\"a\":{\"a\":{\"a\":",
        b"\"text\": \"\\ud800\"",
        b"garbage\x1b[0m",
        b"}]}",
        b"\r\n",
        b"\xff",
    ];
    prop_oneof![
        9 => prop::sample::select(words).prop_map(<[u8]>::to_vec),
        1 => prop::collection::vec(any::<u8>(), 0..300),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1000))]

    #[test]
    fn g11_every_conversation_comes_to_an_end(
        how in any::<u8>(),
        words in prop::collection::vec(word(), 0..20),
    ) {
        conversation(&[vec![how], words.concat()].concat());
    }
}
