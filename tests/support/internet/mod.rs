//! A small internet for one test, as root: two network namespaces, `host`, in which a test starts forkd, and `net`, with
//! real servers in it. Nothing of it has a name on this machine, and all of it ends with the test, however that ends.
//!
//! ```text
//! host                                net
//!   out0 203.0.113.2/24  ---veth---     in0 203.0.113.1/24 and .10 to .16, .20, .21, .53, .54
//!        10.77.0.2/24                       10.77.0.1/24, the neighbours
//!        2001:db8::2/64                     2001:db8::1/64 and ::10
//!   default by 203.0.113.1              lo  198.51.100.0/24, 169.254.169.254
//! ```
//!
//! - nginx at every address: pages, `/whoami`, and a package index in `/simple`, by http and https; credentials at
//!   169.254.169.254, as a cloud's metadata service has them
//! - git's daemon at 203.0.113.12 with `greeting.git`
//! - dnsmasq at 203.0.113.53 with the zone `test`; another at 203.0.113.54, where every name is 203.0.113.14
//! - TCP echoes at every address, ports 22, 25, 5432, 8080; UDP echoes at some, ports 7 and 443
//! - in `host`, a TCP echo on every address at port 22, for the host's sshd, and at 8080
#![allow(dead_code, reason = "each test file uses its own part")]

#[path = "../debian.rs"]
mod debian;
mod echoes;
mod namespace;
mod site;
mod wire;

use std::collections::BTreeSet;
use std::fs;
use std::net::{Ipv4Addr, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use tempfile::TempDir;

pub use debian::program;
use echoes::Echoes;
pub use namespace::Namespace;
use site::{HOSTS, Site};
use wire::Wire;

/// What the metadata service hands out.
pub const SECRET: &str = "the-cloud-s-credentials";
/// The host's addresses: the public one and the private one.
pub const HOST: [&str; 2] = ["203.0.113.2", "10.77.0.2"];
/// The nameserver in the host's resolv.conf.
pub const DNS: &str = "203.0.113.53";
/// The name whose address changes: [`Internet::move_short`].
pub const SHORT: &str = "short.test";
/// The name with 40 addresses, from this one up.
pub const MANY: (&str, Ipv4Addr) = ("many.test", Ipv4Addr::new(198, 51, 100, 101));

const TCP_ECHOES: [&str; 4] = ["[::]:22", "[::]:25", "[::]:5432", "[::]:8080"];
const UDP_ECHOES: [&str; 7] = [
    "203.0.113.10:7",
    "203.0.113.10:443",
    "203.0.113.13:443",
    "198.51.100.7:7",
    "10.77.0.1:7",
    "169.254.169.254:7",
    "[2001:db8::10]:7",
];
const HOST_TCP_ECHOES: [&str; 2] = ["[::]:22", "[::]:8080"];
const HOST_UDP_ECHOES: [&str; 1] = ["[::]:7"];
/// Longest that the servers may take to listen.
const PATIENCE: Duration = Duration::from_secs(20);

/// See above. Fields are dropped in this order.
pub struct Internet {
    wire: Wire,
    echoes: Echoes,
    host_echoes: Echoes,
    servers: Vec<Server>,
    dns: u32,
    /// Where forkd is started.
    pub host: Namespace,
    /// Everything else.
    pub net: Namespace,
    site: Site,
    dir: TempDir,
}

/// A moment.
pub struct Mark([usize; 4]);

struct Server(Child);

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl Internet {
    /// Everything listens when it returns.
    pub fn start() -> Internet {
        let dir = tempfile::tempdir().unwrap();
        let site = Site::build(dir.path());
        let (host, net) = (Namespace::new(), Namespace::new());
        connect(&host, &net);
        fs::write(site.path("resolv.conf"), format!("nameserver {DNS}\n")).unwrap();
        write_hosts(&site, "203.0.113.20");
        let mut servers = servers(&net, &site);
        let echoes = Echoes::start(&net, &TCP_ECHOES, &UDP_ECHOES);
        let host_echoes = Echoes::start(&host, &HOST_TCP_ECHOES, &HOST_UDP_ECHOES);
        for at in ["203.0.113.10:443", "203.0.113.12:9418", "203.0.113.53:53", "203.0.113.54:53"] {
            wait_for(&net, at, &mut servers);
        }
        let dns = servers[0].0.id();
        let wire = Wire::tap(&net);
        Internet { wire, echoes, host_echoes, servers, dns, host, net, site, dir }
    }

    /// The same program, arguments, environment and folder, run in `host` with the host's own `/etc/resolv.conf`. How its
    /// standard streams are, is to be said anew; its input is empty.
    pub fn command(&self, given: &Command) -> Command {
        let mut command = self.host.command("unshare");
        // Mounts that it makes stay its own.
        command.args(["--mount", "--propagation", "slave", "--", "sh", "-c"]);
        command.arg(r#"mount --bind "$0" /etc/resolv.conf && exec "$@""#).arg(self.site.path("resolv.conf"));
        command.arg(given.get_program()).args(given.get_args());
        for (name, value) in given.get_envs() {
            match value {
                Some(value) => command.env(name, value),
                None => command.env_remove(name),
            };
        }
        if let Some(folder) = given.get_current_dir() {
            command.current_dir(folder);
        }
        command
    }

    /// A shell command in `host`: its exit code, and all that it printed.
    pub fn shell(&self, script: &str) -> (Option<i32>, String) {
        let mut shell = Command::new("sh");
        shell.args(["-c", script]).current_dir(self.dir.path()).env("HOME", self.dir.path());
        // Neither a proxy nor a certificate authority of this machine is to have a say.
        let ours = |name: &str| {
            ["proxy", "ca_bundle", "ssl_cert", "pip_"].iter().any(|part| name.to_lowercase().contains(part))
        };
        for (name, _) in std::env::vars().filter(|(name, _)| ours(name)) {
            shell.env_remove(name);
        }
        let output = self.command(&shell).output().unwrap();
        let text = [output.stdout, output.stderr].concat();
        (output.status.code(), String::from_utf8_lossy(&text).into_owned())
    }

    /// The certificate of the authority that all https servers' are from.
    pub fn certificate(&self) -> PathBuf {
        self.site.path("ca.pem")
    }

    /// The folder of what is served: `repositories` by git's daemon, `www` by nginx, with the package index `www/simple`.
    pub fn served(&self) -> &Path {
        self.dir.path()
    }

    /// Runs one more server in `net`, which listens at the address when this returns. Its standard output goes to the file.
    pub fn serve(&mut self, program: &str, arguments: &[&str], at: &str, output: &Path) {
        let mut server = self.net.server(program);
        server.args(arguments).stdout(fs::File::create(output).unwrap());
        self.servers.push(Server(server.spawn().unwrap_or_else(|error| panic!("{server:?}: {error}"))));
        wait_for(&self.net, at, &mut self.servers);
    }

    /// Gives [`SHORT`] another address; answers of before are good for one second.
    pub fn move_short(&self, address: &str) {
        write_hosts(&self.site, address);
        let dns = rustix::process::Pid::from_raw(self.dns.cast_signed()).unwrap();
        rustix::process::kill_process(dns, rustix::process::Signal::HUP).unwrap();
        std::thread::sleep(Duration::from_millis(200));
    }

    /// How many packets have crossed the wire.
    pub fn packet_count(&self) -> usize {
        self.wire.count()
    }

    /// The packets after the first `count`, as [`Wire::since`] shows them, once those on their way have come.
    pub fn packets_since(&self, count: usize) -> Vec<String> {
        std::thread::sleep(Duration::from_millis(50));
        self.wire.since(count)
    }

    /// Where all logs are now, for [`Internet::seen_since`].
    pub fn mark(&self) -> Mark {
        Mark([
            self.packet_count(),
            self.questions().len(),
            self.other_questions().len(),
            self.echoed_in_host().len(),
        ])
    }

    /// All that has been seen of a guest since: packets, questions to either nameserver, and visitors of the host.
    pub fn seen_since(&self, mark: &Mark) -> Vec<String> {
        let [packets, questions, other, host] = mark.0;
        let mut seen = self.packets_since(packets);
        let logs =
            [(self.questions(), questions), (self.other_questions(), other), (self.echoed_in_host(), host)];
        seen.extend(logs.into_iter().flat_map(|(lines, from)| lines.into_iter().skip(from)));
        seen
    }

    /// What was asked of the nameserver of the host, as dnsmasq logs it: `query[A] www.test from 203.0.113.2`.
    pub fn questions(&self) -> Vec<String> {
        queries(&self.site.path("dns.log"))
    }

    /// What was asked of the other nameserver.
    pub fn other_questions(&self) -> Vec<String> {
        queries(&self.site.path("other-dns.log"))
    }

    /// What nginx was asked: `203.0.113.2 203.0.113.10:80 www.test /whoami 200`.
    pub fn visits(&self) -> Vec<String> {
        lines(&self.site.path("visits.log"))
    }

    /// Who came to the echoes of `net`.
    pub fn echoed(&self) -> Vec<String> {
        self.echoes.visitors()
    }

    /// Who came to those of `host`.
    pub fn echoed_in_host(&self) -> Vec<String> {
        self.host_echoes.visitors()
    }

    /// Links, addresses, routes, rules, sockets and processes in `host`, a line each. The same before and after: nothing
    /// is left.
    pub fn state(&self) -> BTreeSet<String> {
        let questions =
            ["-o link", "-o address", "route show table all", "-6 route show table all", "rule", "-6 rule"];
        let mut state: BTreeSet<String> = BTreeSet::new();
        for question in questions {
            state.extend(self.host.ip(question).lines().map(|line| format!("{question}: {line}")));
        }
        for table in ["tcp", "tcp6", "udp", "udp6", "raw", "raw6", "packet", "ip_tables_names"] {
            state.extend(self.host.inside(|| table_of_sockets(table)));
        }
        state.extend(self.processes());
        state
    }

    /// The processes in `host`, those aside that hold it.
    pub fn processes(&self) -> Vec<String> {
        let namespace = fs::read_link(self.host.path()).unwrap();
        let listed = fs::read_dir("/proc").unwrap().flatten();
        let pids = listed.filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
        let here = pids.filter(|pid| {
            fs::read_link(format!("/proc/{pid}/ns/net")).is_ok_and(|other| other == namespace)
                && *pid != self.host.pid()
        });
        here.map(|pid| {
            let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
            format!("{pid} {}", String::from_utf8_lossy(&line).replace('\0', " "))
        })
        .collect()
    }
}

/// A network table of /proc: addresses and states of its sockets.
fn table_of_sockets(table: &str) -> Vec<String> {
    let text = fs::read_to_string(format!("/proc/thread-self/net/{table}")).unwrap_or_default();
    let lines = text.lines().skip(1).map(|line| {
        let words: Vec<_> = line.split_whitespace().skip(1).take(3).collect();
        format!("{table}: {}", words.join(" "))
    });
    // Closed connections that TIME_WAIT keeps for a minute.
    lines.filter(|line| !(table.starts_with("tcp") && line.ends_with(" 06"))).collect()
}

/// The wire, addresses and routes.
fn connect(host: &Namespace, net: &Namespace) {
    host.ip(&format!("link add out0 type veth peer name in0 netns {}", net.pid()));
    for address in ["203.0.113.2/24", "10.77.0.2/24", "2001:db8::2/64 nodad"] {
        host.ip(&format!("address add {address} dev out0"));
    }
    for (namespace, device) in [(host, "out0"), (net, "in0")] {
        // Link-local addresses would come up some time later.
        namespace.ip(&format!("link set {device} addrgenmode none"));
    }
    host.ip("link set out0 up");
    let hosts = (10..=16).chain([20, 21, 53, 54]).map(|number| format!("203.0.113.{number}/24"));
    let others = [
        "203.0.113.1/24",
        "10.77.0.1/24",
        "169.254.169.254/32",
        "2001:db8::1/64 nodad",
        "2001:db8::10/64 nodad",
    ];
    for address in others.map(str::to_owned).into_iter().chain(hosts) {
        net.ip(&format!("address add {address} dev in0"));
    }
    net.ip("link set in0 up");
    // All of it answers, without an address of its own for each.
    net.ip("route add local 198.51.100.0/24 dev lo");
    host.ip("route add default via 203.0.113.1");
    host.ip("-6 route add default via 2001:db8::1");
}

/// The name whose answer is good for a second.
fn write_hosts(site: &Site, short: &str) {
    fs::write(site.path("hosts"), format!("{short} {SHORT}\n")).unwrap();
}

/// The host's nameserver first.
fn servers(net: &Namespace, site: &Site) -> Vec<Server> {
    let at = |name: &str| site.path(name).display().to_string();
    let dnsmasq = |address: &str, log: &str| {
        let mut server = net.server(program("dnsmasq"));
        server.args([
            "--keep-in-foreground",
            "--conf-file=/dev/null",
            "--user=root",
            "--group=root",
            "--pid-file=",
        ]);
        server.args(["--no-resolv", "--no-hosts", "--bind-interfaces", "--log-queries", "--local-ttl=1"]);
        server.args([format!("--listen-address={address}"), format!("--log-facility={}", at(log))]);
        server
    };
    let mut dns = dnsmasq(DNS, "dns.log");
    dns.args(["--local=/test/", "--cname=cname.test,www.test,300", "--txt-record=evil.test,secret"]);
    dns.args((0..40).map(|number| {
        format!("--host-record={},{},300", MANY.0, Ipv4Addr::from(u32::from(MANY.1) + number))
    }));
    dns.arg("--host-record=six.test,203.0.113.10,2001:db8::10,300")
        .arg(format!("--addn-hosts={}", at("hosts")));
    dns.args(HOSTS.map(|(name, address)| format!("--host-record={name},{address},300")));
    let mut other_dns = dnsmasq("203.0.113.54", "other-dns.log");
    other_dns.arg("--address=/#/203.0.113.14");
    let mut nginx = net.server(program("nginx"));
    nginx.args(["-c", &at("nginx.conf"), "-p", &at(""), "-e", &at("nginx.log")]);
    // Not by `git daemon`, whose process would outlive the one that is killed.
    let folder = Command::new("git").arg("--exec-path").output().expect("git is there").stdout;
    let mut git = net.server(Path::new(String::from_utf8(folder).unwrap().trim()).join("git-daemon"));
    git.args(["--listen=203.0.113.12", "--reuseaddr", "--export-all"]);
    git.arg(format!("--base-path={}", at("repositories")));
    // The repository is root's, and so is the daemon; what git thinks of other homes does not matter.
    git.env("HOME", at("")).arg(at("repositories"));
    let start = |mut server: Command| {
        let log = fs::File::options().create(true).append(true).open(site.path("servers.log")).unwrap();
        server.stdout(Stdio::null()).stderr(log);
        Server(server.spawn().unwrap_or_else(|error| panic!("{server:?}: {error}")))
    };
    [dns, other_dns, nginx, git].map(start).into()
}

/// Waits until somebody listens there.
fn wait_for(net: &Namespace, at: &str, servers: &mut [Server]) {
    let deadline = Instant::now() + PATIENCE;
    while net.inside(|| TcpStream::connect(at)).is_err() {
        let ended = servers.iter_mut().any(|server| server.0.try_wait().unwrap().is_some());
        assert!(!ended, "a server of the internet has ended; was it there before {at}?");
        assert!(Instant::now() < deadline, "nobody listens at {at}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

fn queries(log: &Path) -> Vec<String> {
    let all = lines(log).into_iter();
    all.filter_map(|line| line.find("query[").map(|start| line[start..].to_owned())).collect()
}

fn lines(path: &Path) -> Vec<String> {
    fs::read_to_string(path).unwrap_or_default().lines().map(str::to_owned).collect()
}
