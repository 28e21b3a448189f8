//! The platform's conventions on the way out: roots from SSL_CERT_FILE and SSL_CERT_DIR, proxies from the environment.
//! Each case is a process of its own, as these variables belong to a process.

use std::path::Path;
use std::process::Stdio;
use std::sync::{Arc, Mutex};

use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair};
use rustls::pki_types::{PrivateKeyDer, PrivatePkcs8KeyDer};
use tokio::io::{AsyncReadExt, AsyncWriteExt, copy_bidirectional};
use tokio::net::{TcpListener, TcpStream};
use tokio_rustls::TlsAcceptor;

mod support;
use support::http;
use support::server::{Fault, Server};

const URL: &str = "FORKD_TEST_URL";
const DOCUMENT: &[u8] = b"the document";

/// Not a test of its own: what the tests below start, with variables of their choice. Fetches a document.
#[tokio::test]
#[ignore = "started by the other tests"]
async fn fetch() {
    match http().get(&std::env::var(URL).unwrap(), 100).await {
        Ok(document) => println!("got {}", String::from_utf8_lossy(&document)),
        Err(error) => println!("failed {error} {error:?}"),
    }
}

/// What a process with these variables and no others gets from `url`.
async fn fetch_with(url: &str, variables: &[(&str, &str)]) -> String {
    let child = tokio::process::Command::new(std::env::current_exe().unwrap())
        .args(["fetch", "--exact", "--ignored", "--nocapture"])
        .env_clear()
        .envs(variables.iter().copied())
        .env(URL, url)
        .stderr(Stdio::inherit())
        .output();
    let output = String::from_utf8(child.await.unwrap().stdout).unwrap();
    let line = output.lines().find(|line| line.starts_with("got ") || line.starts_with("failed "));
    line.unwrap_or_else(|| panic!("{output}")).to_owned()
}

/// A CA and an https server in front of `server`; its port and the CA's certificate in PEM. Certified for `name`.
async fn https(server: &Server, name: &str) -> (u16, String) {
    let mut ca = CertificateParams::new(Vec::new()).unwrap();
    ca.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let ca = CertifiedIssuer::self_signed(ca, KeyPair::generate().unwrap()).unwrap();
    let key = KeyPair::generate().unwrap();
    let certificate = CertificateParams::new(vec![name.to_owned()]).unwrap().signed_by(&key, &ca).unwrap();
    let key = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(key.serialize_der()));
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = rustls::ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(vec![certificate.der().clone()], key)
        .unwrap();
    let (acceptor, behind) = (TlsAcceptor::from(Arc::new(config)), server.address());
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            let acceptor = acceptor.clone();
            tokio::spawn(async move {
                // A client that does not trust us hangs up here.
                let Ok(mut stream) = acceptor.accept(stream).await else { return };
                let mut plain = TcpStream::connect(behind).await.unwrap();
                let _ = copy_bidirectional(&mut stream, &mut plain).await;
            });
        }
    });
    (port, ca.pem())
}

fn write(dir: &Path, name: &str, text: &str) -> String {
    let path = dir.join(name);
    std::fs::write(&path, text).unwrap();
    path.to_str().unwrap().to_owned()
}

#[tokio::test]
async fn roots_come_from_the_environment_and_others_are_refused_with_a_reason() {
    let (dir, server) = (tempfile::tempdir().unwrap(), Server::start(DOCUMENT.to_vec()).await);
    let (port, ca) = https(&server, "localhost").await;
    let (_, another) = https(&server, "localhost").await;
    let url = format!("https://localhost:{port}/registry.json");
    let trusted = write(dir.path(), "ca.pem", &ca);
    assert_eq!(fetch_with(&url, &[("SSL_CERT_FILE", &trusted)]).await, "got the document");
    // A directory of hashed names, as c_rehash makes them; the name's hash does not matter here.
    let hashed = dir.path().join("hashed");
    std::fs::create_dir(&hashed).unwrap();
    write(&hashed, "0123abcd.0", &ca);
    assert_eq!(fetch_with(&url, &[("SSL_CERT_DIR", hashed.to_str().unwrap())]).await, "got the document");

    let other = write(dir.path(), "other.pem", &another);
    let before = server.request_count();
    let failed = fetch_with(&url, &[("SSL_CERT_FILE", &other)]).await;
    assert!(failed.contains("is not trusted: nobody this machine trusts has signed it"), "{failed}");
    assert!(failed.contains("Untrusted"), "final, not tried until the deadline: {failed}");
    assert_eq!(server.request_count(), before);
    // The right CA, but for another name.
    let by_address = url.replace("localhost", "127.0.0.1");
    let failed = fetch_with(&by_address, &[("SSL_CERT_FILE", &trusted)]).await;
    assert!(failed.contains("Untrusted") && failed.contains("name"), "{failed}");
    // No roots at all.
    let failed = fetch_with(&url, &[("SSL_CERT_FILE", "/does/not/exist")]).await;
    assert!(failed.starts_with("failed") && !failed.contains("Deadline"), "{failed}");
}

#[tokio::test]
async fn http_may_lead_to_https_and_never_back() {
    let (dir, server) = (tempfile::tempdir().unwrap(), Server::start(DOCUMENT.to_vec()).await);
    let (port, ca) = https(&server, "localhost").await;
    let trusted = write(dir.path(), "ca.pem", &ca);
    let secure = format!("https://localhost:{port}/x?Signature=hush");
    let front = Server::start(Vec::new()).await;
    front.fail_always(Fault::Redirect(secure.clone()));
    assert_eq!(fetch_with(&front.url(), &[("SSL_CERT_FILE", &trusted)]).await, "got the document");

    server.fail_always(Fault::Redirect(format!("{}?Signature=hush", front.url())));
    let failed = fetch_with(&secure, &[("SSL_CERT_FILE", &trusted)]).await;
    assert!(failed.contains("Downgrade") && failed.contains("not encrypted"), "{failed}");
    assert!(!failed.contains("hush"), "{failed}");
    assert_eq!(front.request_count(), 1);
}

/// A proxy that forwards both ways it can be asked; the first lines of the requests it got.
async fn proxy() -> (String, Arc<Mutex<Vec<String>>>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = format!("http://{}", listener.local_addr().unwrap());
    let seen = Arc::new(Mutex::new(Vec::new()));
    let lines = seen.clone();
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            tokio::spawn(forward(stream, lines.clone()));
        }
    });
    (address, seen)
}

async fn forward(mut client: TcpStream, seen: Arc<Mutex<Vec<String>>>) {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        let Ok(byte) = client.read_u8().await else { return };
        head.push(byte);
    }
    let head = String::from_utf8(head).unwrap();
    let line = head.lines().next().unwrap();
    seen.lock().unwrap().push(line.to_owned());
    let target = line.split(' ').nth(1).unwrap();
    let (host, head) = match target.strip_prefix("http://") {
        // CONNECT host:port
        None => (target.to_owned(), None),
        Some(rest) => {
            let (host, path) = rest.split_once('/').unwrap();
            (host.to_owned(), Some(head.replacen(target, &format!("/{path}"), 1)))
        }
    };
    let mut server = TcpStream::connect(host).await.unwrap();
    match head {
        Some(head) => server.write_all(head.as_bytes()).await.unwrap(),
        None => client.write_all(b"HTTP/1.1 200 OK\r\n\r\n").await.unwrap(),
    }
    let _ = copy_bidirectional(&mut client, &mut server).await;
}

#[tokio::test]
async fn proxies_come_from_the_environment() {
    let (dir, server) = (tempfile::tempdir().unwrap(), Server::start(DOCUMENT.to_vec()).await);
    let (port, ca) = https(&server, "localhost").await;
    let trusted = write(dir.path(), "ca.pem", &ca);
    let roots = ("SSL_CERT_FILE", trusted.as_str());
    let secure = format!("https://localhost:{port}/x");
    let (address, seen) = proxy().await;
    let last = || seen.lock().unwrap().last().cloned().unwrap_or_default();

    assert_eq!(fetch_with(&server.url(), &[("http_proxy", &address)]).await, "got the document");
    assert_eq!(last(), format!("GET {} HTTP/1.1", server.url()), "asked by the whole URL");
    assert_eq!(fetch_with(&secure, &[("https_proxy", &address), roots]).await, "got the document");
    assert_eq!(last(), format!("CONNECT localhost:{port} HTTP/1.1"), "a tunnel");
    assert_eq!(fetch_with(&secure, &[("ALL_PROXY", &address), roots]).await, "got the document");
    assert_eq!(seen.lock().unwrap().len(), 3);

    let direct = [("http_proxy", address.as_str()), ("no_proxy", "127.0.0.1")];
    assert_eq!(fetch_with(&server.url(), &direct).await, "got the document");
    assert_eq!(fetch_with(&server.url(), &[("https_proxy", &address)]).await, "got the document");
    assert_eq!(seen.lock().unwrap().len(), 3, "not asked");
    let gone = fetch_with(&server.url(), &[("http_proxy", "http://127.0.0.1:1")]).await;
    assert!(gone.contains("Connect"), "{gone}");
}
