//! The rows of the policy table: what a guest tries as root, and whether it is to get there.

use super::internet::Internet;

/// Forks with the same options.
pub struct Group {
    pub options: &'static [&'static str],
    pub rows: &'static [Row],
}

/// One attempt, in the words of `attempts.py`.
pub struct Row {
    pub attempt: &'static str,
    pub code: &'static str,
    pub open: bool,
    /// What must not be in [`Internet::seen_since`] of the attempt.
    pub unseen: &'static str,
    /// Done before it.
    pub before: fn(&Internet),
}

const fn open(attempt: &'static str, code: &'static str) -> Row {
    Row { attempt, code, open: true, unseen: "", before: |_| {} }
}

const fn shut(attempt: &'static str, code: &'static str, unseen: &'static str) -> Row {
    Row { attempt, code, open: false, unseen, before: |_| {} }
}

const fn unseen(row: Row, unseen: &'static str) -> Row {
    Row { unseen, ..row }
}

const fn moved(row: Row) -> Row {
    Row { before: |internet| internet.move_short("203.0.113.21"), ..row }
}

// SIBLING is the address of another child of the fork, which listens at port 7000.

pub const WITHOUT: Group = Group { options: &[], rows: WITHOUT_RULES };
pub const BY_NAME: Group = Group {
    options: &[
        "--allow=www.test:80",
        "--allow=tls.test",
        "--allow=*.wild.test:80",
        "--allow=short.test:80",
        "--allow=many.test:80",
        "--allow=half.test:80",
        "--allow=rebind.test:80",
        "--allow=metadata.test",
        "--allow=host.test:22",
        "--allow=loopback.test:22",
    ],
    rows: NAMES,
};
pub const BY_ALIAS: Group = Group { options: &["--allow=cname.test:80"], rows: ALIAS };
pub const BUT_DENIED: Group = Group {
    options: &["--allow=public", "--deny=evil.test", "--deny=198.51.100.0/24", "--deny=:25"],
    rows: DENIED,
};
pub const INSIDE: Group =
    Group { options: &["--allow=10.77.0.0/24:8080", "--allow=203.0.113.2:22"], rows: INNER };

const WITHOUT_RULES: &[Row] = &[
    open("a public host by name", "tcp('www.test', 80)"),
    open("a public address", "tcp('198.51.100.7', 8080)"),
    open("a public address by UDP", "udp('203.0.113.10', 7)"),
    open("another nameserver", "dns('203.0.113.54', 'www.test')"),
    open("another nameserver by TCP", "dns('203.0.113.54', 'www.test', stream=True)"),
    open("the gateway's resolver by TCP", "dns(gateway(), 'www.test', stream=True)"),
    shut("the cloud's metadata", "tcp('169.254.169.254', 80)", "> 169.254"),
    shut("the cloud's metadata by UDP", "udp('169.254.169.254', 7)", "> 169.254"),
    shut("the cloud's metadata by a name", "tcp('metadata.test', 80)", "> 169.254"),
    shut("the cloud's metadata as a number", "tcp('2852039166', 80)", "> 169.254"),
    shut("a name that leads inside (rebinding), each address", "each('rebind.test', 80)", "> 1"),
    shut("the host's ssh at its public address", "tcp('203.0.113.2', 22)", "> 203.0.113.2:22"),
    shut("the host's ssh at its private address", "tcp('10.77.0.2', 22)", "> 10.77.0.2"),
    shut("the host's ssh at its loopback", "packet(syn('127.0.0.1', 22))", "> 127."),
    shut("the host's ssh at another of 127.0.0.0/8", "packet(syn('127.0.0.53', 22))", "> 127."),
    shut("the host's ssh at 0.0.0.0", "packet(syn('0.0.0.0', 22))", ":22"),
    shut("the host's ssh at the gateway's address", "tcp(gateway(), 22)", ":22"),
    shut("the host's ssh by a name", "tcp('host.test', 22)", "> 203.0.113.2:22"),
    shut("the host's ssh by a name of its private address", "tcp('private-host.test', 22)", "> 10.77.0.2"),
    shut(
        "the host's ssh by a name of its loopback",
        "packet(syn(resolve('loopback.test')[0], 22))",
        "> 127.",
    ),
    shut("the host by UDP", "udp('203.0.113.2', 7)", "> 203.0.113.2:7"),
    shut("another service of the host", "tcp('203.0.113.2', 8080)", "> 203.0.113.2:8080"),
    shut("the gateway's port 80", "tcp(gateway(), 80)", ":80"),
    shut("the gateway's port 8080", "tcp(gateway(), 8080)", ":8080"),
    shut("the gateway's port 7 by UDP", "udp(gateway(), 7)", ":7"),
    shut("a sibling", "tcp(SIBLING, 7000)", "> 10."),
    shut("a sibling past the own routes", "packet(syn(SIBLING, 7000))", "> 10."),
    shut("the neighbours (10.0.0.0/8)", "tcp('10.77.0.1', 80)", "> 10."),
    shut("the neighbours by UDP", "udp('10.77.0.1', 7)", "> 10."),
    shut("the neighbours by a name", "tcp('neighbour.test', 80)", "> 10."),
    shut("172.16.0.0/12", "tcp('172.16.0.1', 80)", "> 172."),
    shut("192.168.0.0/16", "tcp('192.168.1.1', 80)", "> 192."),
    shut("100.64.0.0/10, of providers", "tcp('100.64.0.1', 80)", "> 100."),
    shut("broadcast", "udp('255.255.255.255', 7, broadcast=True)", "> 255."),
    shut("multicast", "udp('224.0.0.251', 5353)", "> 224."),
    shut("the class that is reserved", "packet(syn('240.0.0.1', 80))", "> 240."),
    shut("ping", "raw('203.0.113.10', 1, echo_request('203.0.113.10'))", "icmp"),
    shut("another protocol (GRE)", "raw('203.0.113.10', 47, bytes(8))", "ip-47"),
    shut("SCTP", "packet(ip('203.0.113.10', 132, bytes(24)))", "ip-132"),
    shut("IPv6", "tcp('2001:db8::10', 80, socket.AF_INET6)", "[2001:db8::10]"),
    shut("IPv6 in IPv4", "raw('203.0.113.10', 41, version6('2001:db8::10', 7))", "ip-41"),
    shut(
        "a stranger's source address",
        "packet(syn('203.0.113.10', 8080, '203.0.113.77'))",
        "> 203.0.113.10:8080",
    ),
    shut(
        "the host's source address",
        "packet(syn('203.0.113.10', 8080, '203.0.113.2'))",
        "> 203.0.113.10:8080",
    ),
    shut("a sibling's source address", "packet(syn('203.0.113.10', 8080, SIBLING))", "> 203.0.113.10:8080"),
    shut(
        "a sibling's source address by UDP",
        "packet(datagram('203.0.113.10', 7, SIBLING))",
        "> 203.0.113.10:7",
    ),
    shut(
        "a stranger's Ethernet address",
        "disguised('02:00:00:00:00:07', tcp, '203.0.113.10', 8080)",
        "> 203.0.113.10:8080",
    ),
    shut(
        "the first piece of a packet",
        "packet(datagram('203.0.113.10', 7, fragment=0x2000))",
        "> 203.0.113.10:7",
    ),
    // The way that it asks for is not taken.
    unseen(
        open(
            "a source route by the neighbours",
            r"packet(syn('203.0.113.10', 8080, options=b'\x83\7\4\x0a\x4d\0\1\0'))",
        ),
        "> 10.",
    ),
    shut("TCP to port 0", "tcp('203.0.113.10', 0)", "> 10."),
    shut("a packet that ends early", "packet(syn('203.0.113.10', 8080)[:30])", "> 203.0.113.10:8080"),
    shut("a frame of 9000 bytes to the neighbours", "large('10.77.0.1', 7)", "> 10."),
    open("a public host after all of that", "tcp('www.test', 80)"),
];

const NAMES: &[Row] = &[
    shut("an allowed name's address, unasked", "tcp('203.0.113.10', 80)", "> 203.0.113.10"),
    open("an allowed name at its port", "tcp('www.test', 80)"),
    open("its address, once asked", "tcp('203.0.113.10', 80)"),
    shut("an allowed name at another port", "tcp('www.test', 8080)", "> 203.0.113.10:8080"),
    shut("an allowed name by UDP 443 (QUIC)", "udp('www.test', 443)", "> 203.0.113.10:443"),
    open("an allowed name at any port", "tcp('tls.test', 8080)"),
    shut("the same by UDP 443 (QUIC)", "udp('tls.test', 443)", "> 203.0.113.13:443"),
    open("a name below an allowed one", "tcp('a.wild.test', 80)"),
    open("a name two below", "tcp('b.c.wild.test', 80)"),
    shut("the parent of `*.`", "tcp('wild.test', 80)", " wild.test "),
    open("a name with 40 addresses, the last", "tcp(resolve('many.test')[39], 80)"),
    open("a name with a public and an inner address", "each('half.test', 80)"),
    shut("the inner one of these", "tcp('10.77.0.1', 80)", "> 10."),
    open("a name that lives for a second", "tcp('short.test', 80)"),
    shut("its address 4 seconds later", "after(4, tcp, '203.0.113.20', 80)", "> 203.0.113.20"),
    moved(open("the name at its next address", "tcp(resolve('short.test')[0], 80)")),
    shut("another name", "tcp('evil.test', 80)", "evil.test"),
    shut("another name, by a question for TXT", "dns(gateway(), 'evil.test', 16)", "evil.test"),
    shut("a secret in a question", "dns(gateway(), 'the-secret.evil.test')", "evil.test"),
    shut("a secret in a question by TCP", "dns(gateway(), 'the-secret.evil.test', stream=True)", "evil.test"),
    shut("a secret in a reverse question", "dns(gateway(), '7.7.7.7.in-addr.arpa', 12)", "7.7.7.7"),
    shut("a public address", "tcp('198.51.100.7', 80)", "> 198."),
    shut("a public address by UDP", "udp('198.51.100.7', 7)", "> 198."),
    shut("another nameserver", "dns('203.0.113.54', 'www.test')", "> 203.0.113.54"),
    shut("another nameserver by TCP", "dns('203.0.113.54', 'www.test', stream=True)", "> 203.0.113.54"),
    shut("the host's nameserver past the gateway's", "dns('203.0.113.53', 'evil.test')", "evil.test"),
    shut("an allowed name that leads inside, each address", "each('rebind.test', 80)", "> 1"),
    shut("an allowed name of the metadata", "tcp('metadata.test', 80)", "> 169.254"),
    shut("an allowed name of the host", "tcp('host.test', 22)", "> 203.0.113.2:22"),
    shut("an allowed name of the host's loopback", "packet(syn('127.0.0.1', 22))", "> 127."),
];

const ALIAS: &[Row] = &[
    open("an allowed alias (CNAME)", "tcp('cname.test', 80)"),
    shut("what it is an alias of", "tcp('www.test', 80)", "query[A] www.test"),
    shut("an allowed alias at another port", "tcp('cname.test', 8080)", "> 203.0.113.10:8080"),
];

const DENIED: &[Row] = &[
    open("a public host", "tcp('www.test', 80)"),
    shut("a denied name", "tcp('evil.test', 80)", "evil.test"),
    shut("a denied name in capitals", "tcp('EVIL.test', 80)", "vil.test"),
    shut("a denied name's address", "tcp('203.0.113.14', 80)", "> 203.0.113.14"),
    shut("a denied name by another nameserver", "dns('203.0.113.54', 'evil.test')", "> 203.0.113.54"),
    shut("a denied network", "tcp('198.51.100.7', 80)", "> 198."),
    shut("a denied network by a name", "tcp('plain.test', 80)", "> 198."),
    shut("a denied port", "tcp('www.test', 25)", ":25"),
    shut("the neighbours", "tcp('10.77.0.1', 80)", "> 10."),
];

const INNER: &[Row] = &[
    open("an inner network that is allowed", "tcp('10.77.0.1', 8080)"),
    shut("the same at another port", "tcp('10.77.0.1', 80)", "> 10."),
    shut("the host in that network", "tcp('10.77.0.2', 8080)", "> 10."),
    open("an address of the host that is allowed", "tcp('203.0.113.2', 22)"),
    shut("the same at another port", "tcp('203.0.113.2', 8080)", "> 203.0.113.2:8080"),
    shut("a public address", "tcp('203.0.113.10', 80)", "> 203.0.113.10"),
    shut("a name", "tcp('www.test', 80)", "www.test"),
];
