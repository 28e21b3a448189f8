//! What the servers of the internet serve, made anew for each test: certificates, pages, a package index, a repository.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Names and addresses whose answers may be kept for five minutes.
pub const HOSTS: [(&str, &str); 18] = [
    ("www.test", "203.0.113.10"),
    ("pypi-mirror.test", "203.0.113.11"),
    ("git.test", "203.0.113.12"),
    ("tls.test", "203.0.113.13"),
    ("evil.test", "203.0.113.14"),
    ("a.wild.test", "203.0.113.15"),
    ("b.c.wild.test", "203.0.113.15"),
    ("wild.test", "203.0.113.16"),
    ("plain.test", "198.51.100.7"),
    // Names that lead where nobody from outside is to come.
    ("metadata.test", "169.254.169.254"),
    ("neighbour.test", "10.77.0.1"),
    ("rebind.test", "169.254.169.254"),
    ("rebind.test", "10.77.0.1"),
    ("half.test", "203.0.113.10"),
    ("half.test", "10.77.0.1"),
    ("host.test", "203.0.113.2"),
    ("private-host.test", "10.77.0.2"),
    ("loopback.test", "127.0.0.1"),
];
/// Bytes of `/large`.
const LARGE: u64 = 64 << 20;

const NGINX: &str = r#"
daemon off;
master_process off;
pid DIR/nginx.pid;
error_log DIR/nginx.log warn;
events { worker_connections 500; }
http {
    log_format visit '$remote_addr $server_addr:$server_port $host $request_uri $status';
    access_log DIR/visits.log visit;
    client_body_temp_path DIR/body;
    proxy_temp_path DIR/proxy;
    fastcgi_temp_path DIR/fastcgi;
    uwsgi_temp_path DIR/uwsgi;
    scgi_temp_path DIR/scgi;
    types { text/html html; }
    default_type application/octet-stream;
    ssl_certificate DIR/leaf.pem;
    ssl_certificate_key DIR/leaf.key;
    server {
        listen 80;
        listen [::]:80;
        listen 443 ssl;
        listen [::]:443 ssl;
        root DIR/www;
        location = /whoami { default_type text/plain; return 200 "$remote_addr\n"; }
    }
    server {
        listen 169.254.169.254:80;
        location / { default_type application/json; return 200 '{"SecretAccessKey": "SECRET"}\n'; }
    }
}
"#;

const GREETING: &str = "def greeting(name, loud=False):\n    said = f'hello {name}'\n    return said.upper() if loud else said\n";
const GREETING_TESTS: &str = "from greeting import greeting\n\n\ndef test_plain():\n    assert greeting('world') == 'hello world'\n\n\n\
    def test_loud():\n    assert greeting('world', loud=True) == 'HELLO WORLD'\n";

/// A folder with all of it.
pub struct Site {
    dir: PathBuf,
}

impl Site {
    /// Makes it in `dir`, which is there and empty.
    pub fn build(dir: &Path) -> Site {
        let site = Site { dir: dir.to_owned() };
        fs::create_dir_all(site.path("www/simple")).unwrap();
        fs::write(site.path("www/index.html"), "<h1>It works</h1>\n").unwrap();
        fs::File::create(site.path("www/large")).and_then(|file| file.set_len(LARGE)).unwrap();
        let conf = NGINX.replace("DIR", site.dir.to_str().unwrap()).replace("SECRET", super::SECRET);
        fs::write(site.path("nginx.conf"), conf).unwrap();
        let index = site.path("www/simple").display().to_string();
        site.run(
            "python3",
            &[concat!(env!("CARGO_MANIFEST_DIR"), "/tests/support/internet/wheels.py"), &index],
        );
        site.certificates();
        site.repository();
        site
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }

    /// A certificate authority, and a certificate of it for all names.
    fn certificates(&self) {
        let key = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"];
        let openssl = |arguments: &[&str]| self.run("openssl", arguments);
        let ca =
            ["req", "-x509", "-days", "2", "-subj", "/CN=test CA", "-keyout", "ca.key", "-out", "ca.pem"];
        openssl(&[&ca[..], &key].concat());
        let leaf = ["req", "-subj", "/CN=test", "-keyout", "leaf.key", "-out", "leaf.csr"];
        openssl(&[&leaf[..], &key].concat());
        let names: Vec<_> = HOSTS.iter().map(|(name, _)| format!("DNS:{name}")).collect();
        let names = format!("subjectAltName=DNS:cname.test,{}\nbasicConstraints=CA:FALSE\n", names.join(","));
        fs::write(self.path("leaf.ext"), names).unwrap();
        let sign =
            ["x509", "-req", "-days", "2", "-in", "leaf.csr", "-extfile", "leaf.ext", "-out", "leaf.pem"];
        openssl(&[&sign[..], &["-CA", "ca.pem", "-CAkey", "ca.key", "-CAcreateserial"]].concat());
    }

    /// `greeting.git`, whose tests pass.
    fn repository(&self) {
        let git = |arguments: &[&str]| self.run("git", arguments);
        git(&["init", "-q", "-b", "main", "greeting"]);
        fs::write(self.path("greeting/greeting.py"), GREETING).unwrap();
        fs::write(self.path("greeting/test_greeting.py"), GREETING_TESTS).unwrap();
        git(&["-C", "greeting", "add", "."]);
        git(&["-C", "greeting", "commit", "-q", "-m", "Greet"]);
        git(&["clone", "-q", "--bare", "greeting", "repositories/greeting.git"]);
    }

    fn run(&self, program: &str, arguments: &[&str]) {
        let mut command = Command::new(program);
        command.args(arguments).current_dir(&self.dir).env("HOME", &self.dir);
        for who in ["AUTHOR", "COMMITTER"] {
            command.env(format!("GIT_{who}_NAME"), "Test").env(format!("GIT_{who}_EMAIL"), "test@www.test");
        }
        let output = command.output().unwrap_or_else(|error| panic!("{program}: {error}"));
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{program} {arguments:?}: {said}");
    }
}
