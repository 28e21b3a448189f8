//! A PostgreSQL that was up before the snapshot, used from the host through `forkd forward` by PostgreSQL's own programs, and
//! branched while it is busy. Needs what `linux.rs` needs and the machine `postgres` (CONTRIBUTING.md).
//! `FORKD_PGBENCH_SECONDS` says how long, `FORKD_SOAK=full` branches 50 times.

#[path = "linux/copies.rs"]
mod copies;
#[path = "support/debian.rs"]
mod debian;
#[path = "linux/harness.rs"]
mod harness;

use copies::Copies;
use debian::program;
use harness::soak;
use std::process::{Child, Command};

/// Clients at once, and the size of the tables: a hundred thousand accounts.
const CLIENTS: &str = "8";
const SCALE: &str = "1";

/// One copy, and its port 5432 on this host.
struct Database {
    copies: Copies,
    forward: Child,
    port: String,
}

impl Database {
    fn fork() -> Database {
        let copies = Copies::of("postgres", &[]);
        let (forward, ports) = copies.forward(&[copies.id(0), "5432"]);
        Database { port: ports[0].to_string(), copies, forward }
    }

    /// What a program of PostgreSQL prints, as a client on this host.
    fn client(&self, name: &str, arguments: &[&str]) -> String {
        let mut client = Command::new(program(name));
        client.args(["-h", "127.0.0.1", "-p", &self.port, "-U", "bench"]).args(arguments).arg("bench");
        let output = client.output().unwrap();
        let [stdout, stderr] = [output.stdout, output.stderr].map(|text| String::from_utf8(text).unwrap());
        assert!(output.status.success(), "{name} {arguments:?}: {stdout}{stderr}");
        stdout
    }

    /// The same in the guest.
    fn inside(&self, arguments: &[&str]) -> String {
        let pgbench = ["/usr/lib/postgresql/15/bin/pgbench", "-h", "127.0.0.1", "-U", "bench"];
        let command = [&["exec", self.copies.id(0), "--"][..], &pgbench, arguments, &["bench"]].concat();
        let (code, text) = self.copies.run(&command).both();
        assert_eq!(code, Some(0), "{text}");
        text
    }
}

impl Drop for Database {
    fn drop(&mut self) {
        self.copies.kill();
        let _ = self.forward.wait();
    }
}

/// A figure of what pgbench prints.
fn figure(printed: &str, name: &str) -> f64 {
    let line = printed.lines().find_map(|line| line.strip_prefix(&format!("{name} = ")));
    let line = line.unwrap_or_else(|| panic!("no {name} in {printed}"));
    line.split_whitespace().next().unwrap().parse().unwrap()
}

#[test]
fn a_hosts_psql_and_pgbench_use_a_copys_postgres_through_a_forward() {
    let seconds = std::env::var("FORKD_PGBENCH_SECONDS").unwrap_or_else(|_| "10".to_owned());
    let database = Database::fork();
    let version = database.client("psql", &["-tAc", "select split_part(version(), ' ', 2)"]);
    assert!(version.starts_with("15."), "{version}");
    database.client("psql", &["-qc", "create table mine (name text); insert into mine values ('here')"]);
    assert_eq!(database.client("psql", &["-tAc", "select name from mine"]), "here\n");
    // On the server's side: a hundred thousand rows are not to go through the port.
    database.client("pgbench", &["-i", "-I", "dtGp", "-s", SCALE, "-q"]);

    let one = ["-n", "-S", "-t", "50"];
    let many = ["-n", "-c", CLIENTS, "-T", &seconds];
    let through = [database.client("pgbench", &one), database.client("pgbench", &many)];
    let inside = [database.inside(&one), database.inside(&many)];
    for (way, printed) in [("through the forward", &through), ("in the guest", &inside)] {
        let ([select, mixed], failed) = (printed, "number of failed transactions: 0 ");
        assert!(printed.iter().all(|printed| printed.contains(failed)), "{printed:?}");
        println!(
            "{way}: a select of one client {:.1} ms; {CLIENTS} clients {:.1} transactions/s, {:.0} ms each",
            figure(select, "latency average"),
            figure(mixed, "tps"),
            figure(mixed, "latency average"),
        );
    }
    // A sibling has none of it.
    let sibling = Database::fork();
    assert_eq!(sibling.client("psql", &["-tAc", "select to_regclass('mine') is null"]), "t\n");
}

/// Whether every index and row is as it must be (amcheck), and what pgbench keeps equal in each transaction.
const CHECK: &str = "select (select count(bt_index_check(c.oid, true)) > 100 from pg_class c join pg_am a on c.relam = a.oid \
    where a.amname = 'btree' and c.relpersistence = 'p'), (select count(*) from verify_heapam('pgbench_accounts')), \
    (select count(*) from pgbench_accounts), (select sum(abalance) from pgbench_accounts), \
    (select sum(tbalance) from pgbench_tellers), (select sum(bbalance) from pgbench_branches), \
    (select coalesce(sum(delta), 0) from pgbench_history), (select count(*) from pgbench_history)";

#[test]
fn branches_of_a_busy_database_are_whole() {
    let full = soak();
    let database = Database::fork();
    database.client("psql", &["-qc", "create extension amcheck"]);
    database.client("pgbench", &["-i", "-I", "dtGp", "-s", SCALE, "-q"]);
    let (copies, id) = (&database.copies, database.copies.id(0));
    let busy = ["-h", "127.0.0.1", "-U", "bench", "-n", "-c", "2", "-T", "100000", "bench"];
    copies.json(&[&["exec", "--detach", id, "--", "/usr/lib/postgresql/15/bin/pgbench"][..], &busy].concat());
    let mut before = 0;
    for _ in 0..if full { 50 } else { 5 } {
        let ask = ["psql", "-h", "127.0.0.1", "-U", "bench", "-tAc", CHECK, "bench"];
        let report = copies.json(&[&["branch", id, "--exec", "--"][..], &ask].concat());
        let said = report["children"][0]["answer"].as_str().unwrap_or_else(|| panic!("{report}"));
        println!("{}: stood still for {} ms", said.trim_end(), report["pause_ms"]);
        let parts: Vec<_> = said.trim_end().split('|').collect();
        let [indexes, damaged, accounts, sums @ .., transactions] = &parts[..] else { panic!("{report}") };
        assert_eq!([*indexes, *damaged, *accounts], ["t", "0", "100000"], "{report}");
        assert!(sums.len() == 4 && sums.iter().all(|sum| *sum == sums[0]), "{report}");
        let transactions = transactions.parse().unwrap();
        assert!(transactions >= before, "a branch is older than the one before: {said} after {before}");
        before = transactions;
    }
    assert!(before > 0, "nothing was written meanwhile");
}
